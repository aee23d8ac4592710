"""Implementations through PyTorch's own kernels (cuDNN, oneDNN, ATen); importing registers them.

A deferred input is materialised here, one pass, and dropped again after the convolution.
"""

from __future__ import annotations

from resnet_fused.aten import batch_norm, bn_add_relu, conv, stem

__all__ = ["batch_norm", "bn_add_relu", "conv", "stem"]
