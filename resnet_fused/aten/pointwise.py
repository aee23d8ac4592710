"""Per-channel passes over an activation in as few of PyTorch's kernels as there are."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.reference import bn_sums, channels_last, compute_dtype, per_channel


def affine(y: Tensor, scale: Tensor, shift: Tensor, *, other: Tensor | None = None, relu: bool) -> Tensor:
    """``relu(y * scale + shift + other)`` per channel, rounded to ``y``'s dtype."""
    if y.dtype != scale.dtype:  # 16 bits: one pass with fp32 arithmetic
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        out = torch.batch_norm(y, scale, shift, zero, one, False, 0.0, 0.0, False)
        if other is not None:
            out.add_(other)
    elif other is not None and other.dtype == y.dtype:
        out = torch.addcmul(other, y, per_channel(scale)).add_(per_channel(shift))
    else:
        out = torch.addcmul(per_channel(shift), y, per_channel(scale))
        if other is not None:
            out.add_(other)
    return channels_last(out.relu_() if relu else out)


def activation(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """The tensor a convolution reads."""
    return x if scale is None or shift is None else affine(x, scale, shift, relu=True)


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, in the accumulation dtype."""
    wide = y if y.device.type == "cuda" else y.to(compute_dtype(y.dtype))
    mean, var = torch.ops.aten.batch_norm_update_stats(wide, None, None, 0.0)
    return mean, var


def sums(dz: Tensor, y: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """``(sum dz, sum dz * xhat)`` per channel."""
    if y.numel() == 0 or dz.dtype != y.dtype:
        return bn_sums(dz, y, mean, rstd)
    if y.device.type == "cuda":
        total, moment, _, _ = torch.batch_norm_backward_reduce(dz, y, mean, rstd, None, True, False, False)
        return total, moment * rstd
    if y.dtype != mean.dtype:
        return bn_sums(dz, y, mean, rstd)
    _, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        dz, y, None, None, None, mean, rstd, True, 0.0, [False, True, True]
    )
    return dbeta, dgamma


def masked(dz: Tensor, sign: Tensor | None) -> Tensor:
    """``dz`` where the block's ReLU passed, else 0."""
    if sign is None:
        return dz
    if sign.dtype != torch.uint8:
        return torch.ops.aten.threshold_backward(dz, sign.to(dz.dtype), 0)
    c, m = dz.shape[1], dz.numel()
    bits = (sign.view(-1, 1) >> torch.arange(8, dtype=torch.uint8, device=sign.device)).bitwise_and_(1).view(-1)[:m]
    bits = bits.view(dz.shape[0], *dz.shape[2:], c).permute(0, 3, 1, 2)
    return torch.where(bits.bool(), dz, 0)


def output_gradient(dz, sign, y, a, b, c, dtype: torch.dtype, *, consume: bool = False) -> Tensor:
    """``dy = a * dz' + b * y + c`` in ``dtype``; with ``consume`` it may be written over ``dz``."""
    if consume and sign is None and b is not None and dz.dtype == y.dtype == a.dtype == dtype:
        return torch.addcmul(per_channel(c), dz, per_channel(a), out=dz).addcmul_(y, per_channel(b))
    dz = masked(dz, sign)
    if a is None:
        return dz.to(dtype)
    wide = a.dtype
    if b is None:
        return channels_last((dz.to(wide) * per_channel(a)).to(dtype))
    return channels_last(affine(y.to(wide), b, c, relu=False).addcmul_(dz.to(wide), per_channel(a)).to(dtype))
