"""``conv1x1`` and ``conv3x3`` through cuDNN and oneDNN."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import backends
from resnet_fused.aten.batch_norm import statistics as tile_statistics
from resnet_fused.aten.pointwise import activation, conv_pointwise, masked, onednn, output_gradient, sums
from resnet_fused.reference import channels_last, no_statistics, weight_format


def _padding(weight: Tensor, dilation: int) -> list[int]:
    return [dilation * (weight.shape[-1] - 1) // 2] * 2


def fprop(x, scale, shift, weight, stride, dilation, groups, statistics):
    """The input materialised, the convolution, one statistics pass."""
    act = activation(x, scale, shift)
    y = channels_last(F.conv2d(act, weight, None, stride, _padding(weight, dilation), dilation, groups))
    return (y, *(tile_statistics(y) if statistics else no_statistics(y)))


# --- inference ------------------------------------------------------------------------------------------------------

_PACKED_SIZES = 4


class _Packed(NamedTuple):
    owner: weakref.ref[Tensor]
    version: tuple[int, int]
    layouts: dict[tuple[Any, ...], Tensor]  # by input shape and geometry


_packed: dict[int, _Packed] = {}
"""By ``id`` of the weight, until it dies."""


def pack(weight: Tensor, shape: torch.Size, padding: int, stride: int, dilation: int, groups: int) -> Tensor:
    """``weight`` reordered for inputs of ``shape``; kept as long as the weight lives and is not written to.

    oneDNN's choice of layout depends on the input's size: one made without it was measured three times slower.
    """
    geometry = (padding, stride, dilation, groups)
    if weight.is_inference():  # no version counter, so a kept copy could go stale unseen
        return _reorder(weight, shape, *geometry)
    key, version = id(weight), (weight._version, weight.data_ptr())
    entry = _packed.get(key)
    if entry is None or entry.owner() is not weight or entry.version != version:
        owner = weakref.ref(weight, lambda _: _packed.pop(key, None))
        entry = _packed[key] = _Packed(owner, version, {})
    layout = entry.layouts.get((shape, *geometry))
    if layout is None:
        while len(entry.layouts) >= _PACKED_SIZES:
            entry.layouts.pop(next(iter(entry.layouts)), None)
        with torch.inference_mode(False):
            layout = entry.layouts[(shape, *geometry)] = _reorder(weight.detach(), shape, *geometry)
    return layout


def _reorder(weight, shape, padding, stride, dilation, groups) -> Tensor:
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, [padding] * 2, [stride] * 2, [dilation] * 2, groups, list(shape)
    )


def conv_bias(x, weight, bias, residual, stride, padding: list[int], dilation, groups, relu) -> Tensor:
    """``relu(conv2d(x, weight, bias) + residual)`` for any kernel size."""
    if onednn(x, weight, bias, residual):
        packed = pack(weight, x.shape, padding[0], stride, dilation, groups)
        other = None if residual is None else channels_last(residual)
        return channels_last(
            conv_pointwise(x, packed, bias, padding, [stride] * 2, [dilation] * 2, groups, other=other, relu=relu)
        )
    y = F.conv2d(x, weight, bias.to(x.dtype), stride, padding, dilation, groups)
    if residual is not None:
        y = y.add_(residual)
    return channels_last(y.relu_() if relu else y)


def infer(x, weight, bias, residual, stride, dilation, groups, relu) -> Tensor:
    """oneDNN's fused convolution on the CPU in fp32; convolution, add and ReLU elsewhere."""
    return conv_bias(x, weight, bias, residual, stride, _padding(weight, dilation), dilation, groups, relu)


# --- backward -------------------------------------------------------------------------------------------------------


def _backward(dy, act, weight, stride, dilation, groups, mask):
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, act, weight, None, [stride] * 2, _padding(weight, dilation), [dilation] * 2, False, [0, 0], groups, [*mask, False]
    )
    return dx, dw


def _through_input(dx, act, x, scale, mean, rstd, skip, skip_sign):
    none = dx.new_empty((0,), dtype=torch.float64 if dx.dtype == torch.float64 else torch.float32)
    dx = channels_last(dx)
    if scale is None:
        return (dx if skip is None else dx.add_(masked(skip, skip_sign))), none, none.clone()
    dz = torch.ops.aten.threshold_backward.grad_input(dx, act, 0, grad_input=dx)
    if mean is None:
        return dz, none, none.clone()
    return (dz, *sums(dz, x, mean, rstd))


def dgrad(dz, sign, y, a, b, c, weight, x, scale, shift, mean, rstd, skip, skip_sign, stride, dilation, groups):
    """``dy`` materialised, cuDNN's or oneDNN's dgrad, then the epilogue as passes."""
    dy = output_gradient(dz, sign, y, a, b, c, weight.dtype)
    act = activation(x, scale, shift)
    dx, _ = _backward(dy, act, weight, stride, dilation, groups, [True, False])
    return _through_input(dx, act, x, scale, mean, rstd, skip, skip_sign)


def wgrad(dz, sign, y, a, b, c, weight, x, scale, shift, stride, dilation, groups, dtype):
    """Both operands materialised, cuDNN's or oneDNN's wgrad."""
    dy = output_gradient(dz, sign, y, a, b, c, weight.dtype)
    _, dw = _backward(dy, activation(x, scale, shift), weight, stride, dilation, groups, [False, True])
    return weight_format(dw.to(dtype), weight)


def bprop(dz, sign, y, a, b, c, weight, x, scale, shift, mean, rstd, skip, skip_sign, stride, dilation, groups, dtype):
    """Both gradients from one materialised ``dy`` and one materialised input."""
    dy = output_gradient(dz, sign, y, a, b, c, weight.dtype)
    act = activation(x, scale, shift)
    dx, dw = _backward(dy, act, weight, stride, dilation, groups, [True, True])
    return (*_through_input(dx, act, x, scale, mean, rstd, skip, skip_sign), weight_format(dw.to(dtype), weight))


for _stem in ("conv1x1", "conv3x3"):
    for _direction in (fprop, infer, dgrad, wgrad, bprop):
        backends.register(f"{_stem}_{_direction.__name__}", "aten", _direction)
