"""``bn_add_relu`` in PyTorch's passes."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused import backends
from resnet_fused.aten.pointwise import affine, masked, output_gradient, sums
from resnet_fused.reference import channels_last, pack_mask


def forward(y, scale, shift, shortcut, shortcut_scale, shortcut_shift, mask) -> tuple[Tensor, Tensor]:
    """The norm with the addition, the shift, the ReLU; a deferred shortcut is materialised first."""
    if shortcut_scale is not None:
        shortcut = affine(shortcut, shortcut_scale, shortcut_shift, relu=False)
    out = affine(y, scale, shift, other=shortcut, relu=True)
    return out, pack_mask(~(out <= 0)) if mask else out.new_empty((0,), dtype=torch.uint8)


def mask(dout, sign) -> Tensor:
    """A threshold pass."""
    return channels_last(masked(dout, sign))


def reduce(dz, sign, y, mean, rstd, shortcut, shortcut_mean, shortcut_rstd) -> tuple[Tensor, Tensor, Tensor]:
    """One reduction for each norm."""
    g = masked(dz, sign)
    dbeta, dgamma = sums(g, y, mean, rstd)
    if shortcut is None:
        return dbeta, dgamma, dgamma.new_empty((0,))
    return dbeta, dgamma, sums(g, shortcut, shortcut_mean, shortcut_rstd)[1]


def apply(dz, sign, y, a, b, c) -> Tensor:
    """Two passes."""
    return output_gradient(dz, sign, y, a, b, c, y.dtype)


for _function in (forward, mask, reduce, apply):
    backends.register(f"bn_add_relu_{_function.__name__}", "aten", _function)
