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


def store(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` rounded to ``dtype`` in channels_last memory of its own."""
    return torch.empty(t.shape, dtype=dtype, device=t.device, memory_format=CHANNELS_LAST).copy_(t)


# --- pending operations ---------------------------------------------------------------------------------------------


def affine(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``y * scale + shift`` per channel, unrounded."""
    return up(y) * per_channel(scale) + per_channel(shift)


def act(z: Tensor, slope: Tensor | None, relu: bool = True) -> Tensor:
    """The PReLU of arXiv 1502.01852 (``slope`` per channel), else the ReLU if ``relu``, else ``z``."""
    if slope is not None:
        return torch.where(z > 0, z, per_channel(slope) * z)
    return F.relu(z) if relu else z


def act_backward(dact: Tensor, z: Tensor, slope: Tensor | None) -> tuple[Tensor, Tensor]:
    """``dact`` taken back through PReLU or ReLU to ``z``, and the gradient of the slopes (empty without them)."""
    if slope is None:
        return torch.where(~(z <= 0), dact, dact.new_zeros(())), dact.new_empty((0,))
    positive = z > 0
    dslope = torch.where(positive, dact.new_zeros(()), dact * z).sum((0, 2, 3))
    return torch.where(positive, dact, per_channel(slope) * dact), dslope


def activation(x: Tensor, scale: Tensor | None, shift: Tensor | None, slope: Tensor | None = None) -> Tensor:
    """The tensor a convolution reads: ``x``, or ``act(x * scale + shift)`` rounded to ``x``'s dtype."""
    if scale is None or shift is None:
        return x
    return act(affine(x, scale, shift), slope).to(x.dtype)


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


def output_size(size: Any, kernel: int, stride: int, padding: int, dilation: int) -> Any:
    """Height or width of a convolution's output."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


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


def conv_fprop(x, scale, shift, slope, weight, stride: int, dilation: int, groups: int, statistics: bool):
    """``y = conv2d(activation(x), weight)`` and, if asked for, the statistics of the rounded ``y``."""
    y = channels_last(_conv(activation(x, scale, shift, slope), weight, stride, dilation, groups).to(x.dtype))
    if statistics:
        return (y, *bn_statistics(y))
    return (y, *no_statistics(y))


def no_statistics(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of no tile."""
    empty = y.new_empty((0, y.shape[1]), dtype=compute_dtype(y.dtype))
    return y.new_empty((0,), dtype=torch.int32), empty, torch.empty_like(empty)


def conv_infer(
    x, scale, shift, slope, weight, bias, residual, stride: int, dilation: int, groups: int, relu: bool, out_slope
) -> Tensor:
    """``act(conv2d(activation(x), weight) + bias + residual)``."""
    y = _conv(activation(x, scale, shift, slope), weight, stride, dilation, groups) + per_channel(bias)
    if residual is not None:
        y = y + residual
    return channels_last(act(y, out_slope, relu).to(x.dtype))


def _through_input(dx, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale):
    """The epilogue of dgrad: add the skip gradient to ``dx``, take it back through the deferred input's activation."""
    if skip is not None:
        dx = dx + skip_scale * up(masked(skip, skip_sign))
    none = dx.new_empty((0,))
    if scale is None:
        return channels_last(dx.to(x.dtype)), none, none.clone(), none.clone()
    dz, dslope = act_backward(dx, affine(x, scale, shift), slope)
    dz = channels_last(dz.to(x.dtype))
    sums = (none, none.clone()) if mean is None else bn_sums(dz, x, mean, rstd)
    return (dz, *sums, dslope)


def conv_dgrad(
    dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale: float,
    stride: int, dilation: int, groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of the convolution's input plus skip (deferred: back to ``y * scale + shift``), sums, ``dslope``."""
    dy = output_gradient(dz, sign, y, a, b, c, weight.dtype)
    dx, _ = _conv_backward(dy, x, weight, stride, dilation, groups, [True, False])
    return _through_input(dx, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale)


def conv_wgrad(
    dz, sign, y, a, b, c, weight, x, scale, shift, slope, stride: int, dilation: int, groups: int, dtype: torch.dtype
) -> Tensor:
    """Gradient of the weight, in ``dtype``."""
    dy = output_gradient(dz, sign, y, a, b, c, weight.dtype)
    read = activation(x, scale, shift, slope)
    _, dw = _conv_backward(dy, read, weight, stride, dilation, groups, [False, True])
    return weight_format(dw.to(dtype), weight)


def conv_bprop(
    dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale: float,
    stride: int, dilation: int, groups: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Both gradients of one convolution."""
    grad, deferred, geometry = (dz, sign, y, a, b, c), (x, scale, shift, slope), (stride, dilation, groups)
    dx = conv_dgrad(*grad, weight, *deferred, mean, rstd, skip, skip_sign, skip_scale, *geometry)
    return (*dx, conv_wgrad(*grad, weight, *deferred, *geometry, dtype))


# --- block end ------------------------------------------------------------------------------------------------------


def mix_weights(mix, gate: Tensor | None) -> tuple[Any, Any]:
    """The branch's and the shortcut's weights: numbers where the gate plays no part."""
    branch, branch_gate, shortcut, shortcut_gate = mix
    gate = None if gate is None else up(gate)
    return (
        branch + branch_gate * gate if branch_gate else branch,
        shortcut + shortcut_gate * gate if shortcut_gate else shortcut,
    )


def end_terms(y, scale, shift, shortcut, shortcut_scale, shortcut_shift, mix, branch_relu: bool) -> tuple[Any, Any]:
    """``F`` and ``S`` of a block's sum, unrounded; ``S`` is None where there is no shortcut or its weights are 0."""
    f = up(y) if scale is None else affine(y, scale, shift)
    f = F.relu(f) if branch_relu else f
    if shortcut is None or not (mix[2] or mix[3]):
        return f, None
    return f, up(shortcut) if shortcut_scale is None else affine(shortcut, shortcut_scale, shortcut_shift)


def end_sum(f: Tensor, s: Tensor | None, mix, gate: Tensor | None) -> Tensor:
    """``(mix[0] + mix[1] * gate) * F + (mix[2] + mix[3] * gate) * S``."""
    branch, shortcut = mix_weights(mix, gate)
    return branch * f if s is None else branch * f + shortcut * s


def bn_add_relu_forward(
    y, scale, shift, shortcut, shortcut_scale, shortcut_shift, gate, mix, branch_relu, relu, slope, mask, statistics
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``out = act(end_sum(F, S))``, the packed 1-bit mask ``!(out <= 0)`` and the statistics of the rounded ``out``."""
    f, s = end_terms(y, scale, shift, shortcut, shortcut_scale, shortcut_shift, mix, branch_relu)
    out = store(act(end_sum(f, s, mix, gate), slope, relu), y.dtype)
    bits = pack_mask(~(out <= 0)) if mask else out.new_empty((0,), dtype=torch.uint8)
    return (out, bits, *(bn_statistics(out) if statistics else no_statistics(out)))


def bn_add_relu_backward(
    dout, sign, y, scale, shift, mean, rstd, shortcut, shortcut_scale, shortcut_shift, shortcut_mean, shortcut_rstd,
    gate, mix, branch_relu, slope, need_shortcut, need_gate,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``(dz, dshortcut, dbeta, dgamma, shortcut_dbeta, shortcut_dgamma, dgate, dslope)``; empty where not asked for."""
    wide = compute_dtype(y.dtype)
    none = y.new_empty((0,), dtype=wide)
    f, s = end_terms(y, scale, shift, shortcut, shortcut_scale, shortcut_shift, mix, branch_relu)
    dtotal, dslope = up(masked(dout, sign)), none.clone()
    if slope is not None:
        dtotal, dslope = act_backward(dtotal, end_sum(f, s, mix, gate), slope)
    branch, factor = mix_weights(mix, gate)
    df = branch * dtotal
    dz = store(act_backward(df, f, None)[0] if branch_relu else df, y.dtype)
    sums = (none.clone(), none.clone()) if mean is None else bn_sums(dz, y, mean, rstd)
    ds, shortcut_sums = y.new_empty((0,)), (none.clone(), none.clone())
    if need_shortcut or shortcut_mean is not None:
        dshortcut = store(factor * dtotal, shortcut.dtype)
        ds = dshortcut if need_shortcut else ds
        if shortcut_mean is not None:
            shortcut_sums = bn_sums(dshortcut, shortcut, shortcut_mean, shortcut_rstd)
    dgate = none.clone()
    if need_gate:
        read = sum(weight * t for weight, t in ((mix[1], f), (mix[3], s)) if weight and t is not None)
        dgate = store((dtotal * read).sum_to_size(gate.shape), wide)
    return dz, ds, *sums, *shortcut_sums, dgate, dslope.to(wide)


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


def bn_add_relu_apply(dz, sign, y, a, b, c, skip, skip_sign, skip_scale: float) -> Tensor:
    """``a * dz' + b * y + c + skip_scale * skip'``, materialised in ``y``'s dtype."""
    dy = output_gradient(dz, sign, y, a, b, c, compute_dtype(y.dtype))
    return store(dy if skip is None else dy + skip_scale * up(masked(skip, skip_sign)), y.dtype)


def bn_add_relu_pool(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """The mean of ``y * scale + shift`` over the pixels: (N, C, 1, 1)."""
    z = up(y) if scale is None or shift is None else affine(y, scale, shift)
    return store(z.mean((2, 3), keepdim=True), y.dtype)


def bn_add_relu_spread(dz: Tensor, dpool: Tensor) -> Tensor:
    """``dz + dpool / (H * W)``."""
    return store(up(dz) + up(dpool) / (dz.shape[2] * dz.shape[3]), dz.dtype)


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
