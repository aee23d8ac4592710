"""Implementations in CUDA C++ through the extension `resnet_fused._C`; importing registers them.

A kernel that no GPU has run yet is registered with `default=False`: it runs only when the backend is forced.
"""

from __future__ import annotations

from resnet_fused.cuda import batch_norm, conv3x3

__all__ = ["batch_norm", "conv3x3"]
