"""Per-channel passes over an activation in as few of PyTorch's kernels as there are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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


def activation(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, slope: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The tensor a convolution reads, and the one whose sign tells what its activation let through."""
    if scale is None or shift is None:
        return x, x
    if slope is None:
        act = affine(x, scale, shift, relu=True)
        return act, act
    z = affine(x, scale, shift, relu=False)
    return prelu(z, slope), z


def prelu(z: Tensor, slope: Tensor) -> Tensor:
    """``z`` where it is above 0, else ``slope * z``."""
    return channels_last(F.prelu(z, slope.to(z.dtype)))


def prelu_backward(dact: Tensor, z: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``z``, in its dtype, and of the slopes."""
    # What autograd runs for F.prelu; the gradient of the slopes comes elementwise.
    dz, dslope = torch.ops.aten._prelu_kernel_backward(dact.to(z.dtype), z, per_channel(slope).to(z.dtype))
    return channels_last(dz), dslope.sum((0, 2, 3), dtype=slope.dtype)


def factored(t: Tensor, factor: float) -> Tensor:
    """``t`` as an operand of ``torch.add(_, t, alpha=factor)``: in 16 bits that rounds the factor, too."""
    return t if factor == 1 else t.to(compute_dtype(t.dtype))


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


def output_gradient(
    dz, sign, y, a, b, c, dtype: torch.dtype, *, skip=None, skip_scale: float = 1.0, consume: bool = False
) -> Tensor:
    """``dy = a * dz' + b * y + c + skip_scale * skip`` in ``dtype``; with ``consume`` it may be written over ``dz``."""
    if consume and sign is None and b is not None and skip is None and dz.dtype == y.dtype == a.dtype == dtype:
        return torch.addcmul(per_channel(c), dz, per_channel(a), out=dz).addcmul_(y, per_channel(b))
    dz = masked(dz, sign)
    if a is None:
        if skip is None:
            return dz.to(dtype)
        return channels_last(torch.add(dz, factored(skip, skip_scale), alpha=skip_scale).to(dtype))
    wide = a.dtype
    if b is None:
        dy = dz.to(wide) * per_channel(a)
    else:
        dy = affine(y.to(wide), b, c, relu=False).addcmul_(dz.to(wide), per_channel(a))
    return channels_last((dy if skip is None else dy.add_(skip, alpha=skip_scale)).to(dtype))
