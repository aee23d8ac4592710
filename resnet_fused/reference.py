"""The definition of correct: forward and backward of every op in plain PyTorch.

Arithmetic is fp32, or fp64 where the operands are fp64. Values are rounded to the tensors' dtype exactly where a kernel
hands them to the matrix units or to memory. The functions take the flat arguments of the registered ops (see ``ops/``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHANNELS_LAST = torch.channels_last


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulation, statistics and BN arithmetic for tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def up(t: Tensor) -> Tensor:
    return t.to(compute_dtype(t.dtype))


def weight_format(dw: Tensor, weight: Tensor) -> Tensor:
    """``dw`` in the memory format of ``weight``: autograd then accumulates it without a copy."""
    return dw.contiguous() if weight.is_contiguous() else channels_last(dw)


def per_channel(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=CHANNELS_LAST)


# --- pending operations ---------------------------------------------------------------------------------------------


def affine(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``y * scale + shift`` per channel, unrounded."""
    return up(y) * per_channel(scale) + per_channel(shift)


def activation(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """The tensor a convolution reads: ``x``, or ``relu(x * scale + shift)`` rounded to ``x``'s dtype."""
    if scale is None or shift is None:
        return x
    return F.relu(affine(x, scale, shift)).to(x.dtype)


def pack_mask(positive: Tensor) -> Tensor:
    """Bits of a boolean (N, C, H, W) tensor in NHWC order, element ``8 * j + i`` in bit ``i`` of byte ``j``."""
    flat = positive.permute(0, 2, 3, 1).reshape(-1)
    flat = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=flat.device)).sum(1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`pack_mask`: booleans of the shape of ``like``."""
    n, c, h, w = like.shape
    bits = (mask.view(-1, 1) >> torch.arange(8, dtype=torch.uint8, device=mask.device)) & 1
    return bits.view(-1)[: like.numel()].view(n, h, w, c).permute(0, 3, 1, 2).bool()


def masked(dz: Tensor, sign: Tensor | None) -> Tensor:
    """``dz`` where the ReLU passed, else 0 (see :class:`resnet_fused.operands.Gradient`)."""
    if sign is None:
        return dz
    positive = unpack_mask(sign, dz) if sign.dtype == torch.uint8 else ~(sign <= 0)
    return torch.where(positive, dz, dz.new_zeros(()))


def output_gradient(dz, sign, y, a, b, c, dtype: torch.dtype) -> Tensor:
    """``dy = a * dz' + b * y + c`` rounded to ``dtype``."""
    dy = up(masked(dz, sign))
    if a is not None:
        dy = dy * per_channel(a)
    if b is not None and c is not None:
        dy = dy + affine(y, b, c)
    return channels_last(dy.to(dtype))


# --- batch norm -----------------------------------------------------------------------------------------------------


def bn_statistics(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and sum of squared deviations per channel, as one tile."""
    v = up(y)
    m = y.numel() // max(y.shape[1], 1)
    count = torch.full((1,), m, dtype=torch.int32, device=y.device)
    if m == 0:
        zeros = v.new_zeros((1, y.shape[1]))
        return count, zeros, zeros.clone()
    mean = v.mean((0, 2, 3))
    m2 = (v - per_channel(mean)).square().sum((0, 2, 3))
    return count, mean.unsqueeze(0), m2.unsqueeze(0)


def bn_merge(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Several tiles into one: ``M2 = sum M2_t + n_t * (mean_t - mean)^2``."""
    n = count.to(mean.dtype).unsqueeze(1)
    seen = n > 0
    total = n.sum(0).clamp_min(1)
    merged = torch.where(seen, mean * n, 0.0).sum(0) / total
    deviation = torch.where(seen, m2 + n * (mean - merged).square(), 0.0).sum(0)
    return count.sum(0, keepdim=True, dtype=count.dtype), merged.unsqueeze(0), deviation.unsqueeze(0)


def bn_finalize(count: Tensor, mean: Tensor, m2: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
    """``(scale, shift, mean, rstd, var)``: biased variance in ``rstd``, unbiased in ``var``."""
    one_tile = mean.shape[0] == 1
    _, merged, deviation = (count, mean, m2) if one_tile else bn_merge(count, mean, m2)
    total = count.sum(0, keepdim=True)  # int64: several tiles may hold more than int32 counts
    n = total.to(mean.dtype)
    rstd = torch.rsqrt(deviation[0] / n + eps)
    scale, shift = scale_and_shift(merged[0], rstd, weight, bias)
    return scale, shift, merged[0].clone(), rstd, deviation[0] / (n - 1)


def scale_and_shift(mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``gamma * rstd`` and ``beta - mean * scale`` in the statistics' dtype."""
    scale = rstd.clone() if weight is None else weight.to(rstd.dtype) * rstd
    shift = -mean * scale if bias is None else bias.to(rstd.dtype) - mean * scale
    return scale, shift


def bn_coefficients(
    dbeta: Tensor, dgamma: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, count: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``(a, b, c)`` of ``dy = a * dz + b * y + c`` for batch statistics over ``sum(count)`` values."""
    n = count.sum().to(mean.dtype)
    a = rstd.clone() if weight is None else weight.to(rstd.dtype) * rstd
    b = -a * rstd * dgamma / n
    c = a * (mean * rstd * dgamma - dbeta) / n
    return a, b, c


def bn_sums(dz: Tensor, y: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """``dbeta = sum dz`` and ``dgamma = sum dz * xhat``."""
    g = up(dz)
    xhat = (up(y) - per_channel(mean)) * per_channel(rstd)
    return g.sum((0, 2, 3)).to(mean.dtype), (g * xhat).sum((0, 2, 3)).to(mean.dtype)


# --- convolutions ---------------------------------------------------------------------------------------------------


def _conv(x: Tensor, weight: Tensor, stride: int, dilation: int, groups: int) -> Tensor:
    padding = dilation * (weight.shape[-1] - 1) // 2
    return F.conv2d(up(x), up(weight), None, stride, padding, dilation, groups)


def _conv_backward(dy, x, weight, stride, dilation, groups, mask) -> tuple[Any, Any]:
    padding = dilation * (weight.shape[-1] - 1) // 2
    dx, dw, _ = torch.ops.aten.convolution_backward(
        up(dy),
        up(x),
        up(weight),
        None,
        [stride] * 2,
        [padding] * 2,
        [dilation] * 2,
        False,
        [0, 0],
        groups,
        [*mask, False],
    )
    return dx, dw


def conv_fprop(x, scale, shift, weight, stride: int, dilation: int, groups: int, statistics: bool):
    """``y = conv2d(activation(x), weight)`` and, if asked for, the statistics of the rounded ``y``."""
    y = channels_last(_conv(activation(x, scale, shift), weight, stride, dilation, groups).to(x.dtype))
    if statistics:
        return (y, *bn_statistics(y))
    return (y, *no_statistics(y))


def no_statistics(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of no tile."""
    empty = y.new_empty((0, y.shape[1]), dtype=compute_dtype(y.dtype))
    return y.new_empty((0,), dtype=torch.int32), empty, torch.empty_like(empty)


def conv_infer(x, weight, bias, residual, stride: int, dilation: int, groups: int, relu: bool) -> Tensor:
    """``relu(conv2d(x, weight) + bias + residual)``."""
    y = _conv(x, weight, stride, dilation, groups) + per_channel(bias)
    if residual is not None:
        y = y + residual
    return channels_last((F.relu(y) if relu else y).to(x.dtype))


def _through_input(dx, x, scale, shift, mean, rstd, skip, skip_sign, dtype):
    """The epilogue of dgrad: add the skip gradient to ``dx``, or take it back through the deferred input's ReLU."""
    none = dx.new_empty((0,))
    if scale is None:
        if skip is not None:
            dx = dx + up(masked(skip, skip_sign))
        return channels_last(dx.to(dtype)), none, none.clone()
    dz = channels_last(torch.where(~(affine(x, scale, shift) <= 0), dx, dx.new_zeros(())).to(dtype))
    if mean is None:
        return dz, none, none.clone()
    return (dz, *bn_sums(dz, x, mean, rstd))


def conv_dgrad(
    dz, sign, y, a, b, c, weight, x, scale, shift, mean, rstd, skip, skip_sign, stride: int, dilation: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the convolution's input (plain: plus skip; deferred: of its ``y * scale + shift``, and the sums)."""
    dy = output_gradient(dz, sign, y, a, b, c, weight.dtype)
    dx, _ = _conv_backward(dy, x, weight, stride, dilation, groups, [True, False])
    return _through_input(dx, x, scale, shift, mean, rstd, skip, skip_sign, x.dtype)


def conv_wgrad(
    dz, sign, y, a, b, c, weight, x, scale, shift, stride: int, dilation: int, groups: int, dtype: torch.dtype
) -> Tensor:
    """Gradient of the weight, in ``dtype``."""
    dy = output_gradient(dz, sign, y, a, b, c, weight.dtype)
    act = activation(x, scale, shift)
    _, dw = _conv_backward(dy, act, weight, stride, dilation, groups, [False, True])
    return weight_format(dw.to(dtype), weight)


def conv_bprop(
    dz, sign, y, a, b, c, weight, x, scale, shift, mean, rstd, skip, skip_sign, stride, dilation, groups, dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both gradients of one convolution."""
    grad = (dz, sign, y, a, b, c)
    dx = conv_dgrad(*grad, weight, x, scale, shift, mean, rstd, skip, skip_sign, stride, dilation, groups)
    return (*dx, conv_wgrad(*grad, weight, x, scale, shift, stride, dilation, groups, dtype))


# --- block end ------------------------------------------------------------------------------------------------------


def bn_add_relu_forward(y, scale, shift, shortcut, shortcut_scale, shortcut_shift, mask: bool) -> tuple[Tensor, Tensor]:
    """``out = relu(y * scale + shift + shortcut)`` and the packed 1-bit mask ``!(sum <= 0)``."""
    total = affine(y, scale, shift)
    if shortcut is not None:
        deferred = shortcut_scale is not None
        total = total + (affine(shortcut, shortcut_scale, shortcut_shift) if deferred else shortcut)
    out = channels_last(F.relu(total).to(y.dtype))
    return out, pack_mask(~(out <= 0)) if mask else out.new_empty((0,), dtype=torch.uint8)


def bn_add_relu_mask(dout: Tensor, sign: Tensor) -> Tensor:
    """``dout`` where the block's ReLU passed, else 0."""
    return channels_last(masked(dout, sign))


def bn_add_relu_reduce(
    dz, sign, y, mean, rstd, shortcut, shortcut_mean, shortcut_rstd
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dbeta, dgamma, dgamma of the shortcut's norm)``; both norms share ``dbeta``."""
    g = masked(dz, sign)
    dbeta, dgamma = bn_sums(g, y, mean, rstd)
    if shortcut is None:
        return dbeta, dgamma, dgamma.new_empty((0,))
    return dbeta, dgamma, bn_sums(g, shortcut, shortcut_mean, shortcut_rstd)[1]


def bn_add_relu_apply(dz, sign, y, a, b, c) -> Tensor:
    """The materialised ``dy = a * dz' + b * y + c``, in ``y``'s dtype."""
    return output_gradient(dz, sign, y, a, b, c, y.dtype)


# --- stem -----------------------------------------------------------------------------------------------------------

POOL = ([3, 3], [2, 2], [1, 1], [1, 1], False)  # kernel, stride, padding, dilation, ceil_mode


def stem_forward(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``max_pool2d(relu(y * scale + shift), 3, 2, 1)``."""
    return channels_last(F.max_pool2d(activation(y, scale, shift), 3, 2, 1))


def stem_infer(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """``max_pool2d(relu(conv2d(x, weight) + bias), 3, 2, 1)``."""
    y = F.conv2d(up(x), up(weight), up(bias), stride, padding)
    return channels_last(F.max_pool2d(F.relu(y).to(x.dtype), 3, 2, 1))


def stem_gradient(dout: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``dout`` taken back through the pool and the ReLU to ``y * scale + shift``, unrounded."""
    z = activation(y, scale, shift)
    _, index = torch.ops.aten.max_pool2d_with_indices(z, *POOL)
    dz = torch.ops.aten.max_pool2d_with_indices_backward(up(dout), up(z), *POOL, index)
    return torch.where(~(affine(y, scale, shift) <= 0), dz, dz.new_zeros(()))


def stem_reduce(dout, y, scale, shift, mean, rstd) -> tuple[Tensor, Tensor]:
    """``(dbeta, dgamma)`` of the stem's norm."""
    return bn_sums(stem_gradient(dout, y, scale, shift), y, mean, rstd)


def stem_apply(dout, y, scale, shift, a, b, c) -> Tensor:
    """The gradient of the stem convolution's output, ``dy = a * dz + b * y + c``, in ``y``'s dtype."""
    return output_gradient(stem_gradient(dout, y, scale, shift), None, y, a, b, c, y.dtype)


def stem_backward(dout, y, scale, shift, mean, rstd, weight, count) -> tuple[Tensor, Tensor, Tensor]:
    """``(dy, dbeta, dgamma)``: reduce, coefficients and apply; ``count`` None for frozen statistics."""
    dbeta, dgamma = stem_reduce(dout, y, scale, shift, mean, rstd)
    a, b, c = (scale, None, None) if count is None else bn_coefficients(dbeta, dgamma, weight, mean, rstd, count)
    return stem_apply(dout, y, scale, shift, a, b, c), dbeta, dgamma
