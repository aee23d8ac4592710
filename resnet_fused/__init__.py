"""Fused residual blocks for PyTorch: drop-in blocks, units and stem, and a one-line swap of whole models."""

from __future__ import annotations

from resnet_fused import aten as _aten
from resnet_fused import cuda as _cuda
from resnet_fused import kernels as _kernels
from resnet_fused import models
from resnet_fused.backends import use_backend
from resnet_fused.blocks import BasicBlock, BasicUnit, Bottleneck, BottleneckUnit, NormReLU, PReLUBlock
from resnet_fused.blocks.paths import disabled
from resnet_fused.convert import fuse, refresh, unfuse
from resnet_fused.graphs import Replay, capture
from resnet_fused.report import Explanation, Report, explain, report

__version__ = "0.1.0"

__all__ = [
    "BasicBlock",
    "BasicUnit",
    "Bottleneck",
    "BottleneckUnit",
    "Explanation",
    "NormReLU",
    "PReLUBlock",
    "Replay",
    "Report",
    "capture",
    "disabled",
    "explain",
    "fuse",
    "models",
    "refresh",
    "report",
    "unfuse",
    "use_backend",
]

del _aten, _cuda, _kernels
