"""The ops: contract, checks, registration with torch.library and choice of backend, one file per stem."""

from __future__ import annotations

from resnet_fused.ops import batch_norm, bn_add_relu, stem
from resnet_fused.ops.conv1x1 import conv1x1
from resnet_fused.ops.conv3x3 import conv3x3

__all__ = ["batch_norm", "bn_add_relu", "conv", "conv1x1", "conv3x3", "stem"]

_BY_KERNEL = {1: conv1x1, 3: conv3x3}


def conv(kernel: int):
    """The convolution ops of a kernel size, 1 or 3."""
    return _BY_KERNEL[kernel]
