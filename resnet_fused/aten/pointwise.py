"""Per-channel passes over an activation in as few kernels as PyTorch has.

On the CPU in fp32, ``relu(y * scale + shift + other)`` is a depthwise 1x1 convolution with oneDNN's post-ops: one pass
instead of three. Those entry points are private to PyTorch's compiler, so their absence only selects the other path.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused.reference import bn_sums, channels_last, compute_dtype, per_channel

_onednn = torch.ops.mkldnn
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(_onednn, name) for name in ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")
)


def onednn(*tensors: Tensor | None) -> bool:
    """Whether oneDNN's fused entry points take these tensors: on the CPU, fp32, not empty, not switched off."""
    if not (_HAS_ONEDNN and torch._C._get_mkldnn_enabled()):
        return False
    for t in tensors:
        if t is not None and not (t.is_cpu and t.dtype == torch.float32 and t.numel() > 0):
            return False
    return True


def conv_pointwise(x, weight, bias, padding, stride, dilation, groups, *, other=None, relu: bool) -> Tensor:
    """oneDNN's ``relu(conv2d(x, weight, bias) + other)`` in channels_last."""
    args = (weight, bias, padding, stride, dilation, groups)
    unary = "relu" if relu else None
    if other is None:
        return _onednn._convolution_pointwise(x, *args, unary or "none", [], "")
    return _onednn._convolution_pointwise.binary(x, other, *args, "add", 1.0, unary, [], "")


def affine(y: Tensor, scale: Tensor, shift: Tensor, *, other: Tensor | None = None, relu: bool) -> Tensor:
    """``relu(y * scale + shift + other)`` per channel, rounded to ``y``'s dtype (with ``other``: the promoted one)."""
    if onednn(y, scale, other):
        weight = scale.view(-1, 1, 1, 1)
        out = conv_pointwise(y, weight, shift, [0, 0], [1, 1], [1, 1], y.shape[1], other=other, relu=relu)
        return channels_last(out)
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    out = F.batch_norm(y, zero, one, scale, shift, False, 0.0, 0.0)
    if other is not None:
        out = out + other
    return channels_last(F.relu_(out) if relu else out)


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


def output_gradient(dz, sign, y, a, b, c, dtype: torch.dtype) -> Tensor:
    """``dy = a * dz' + b * y + c`` in ``dtype``."""
    dz = masked(dz, sign)
    if a is None:
        return dz.to(dtype)
    wide = a.dtype
    if b is None:
        return channels_last((dz.to(wide) * per_channel(a)).to(dtype))
    return channels_last(affine(y.to(wide), b, c, relu=False).addcmul_(dz.to(wide), per_channel(a)).to(dtype))
