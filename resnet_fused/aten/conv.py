"""``conv1x1`` and ``conv3x3`` through cuDNN and oneDNN, and through matrix products for small images on the CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import backends
from resnet_fused.aten.batch_norm import statistics as tile_statistics
from resnet_fused.aten.pointwise import activation, factored, masked, output_gradient, prelu, prelu_backward, sums
from resnet_fused.reference import channels_last, compute_dtype, no_statistics, output_size, weight_format


def _padding(weight: Tensor, dilation: int) -> list[int]:
    return [dilation * (weight.shape[-1] - 1) // 2] * 2


# Pixels of an output image up to which the CPU's matrix product beats oneDNN's 1x1 convolution, forward and backward
# (docs/perf-notes.md): the last two stages of an ImageNet ResNet.
_PRODUCT_PIXELS = 14 * 14


def _is_product(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether a plain matrix product does the convolution."""
    small = x.shape[2] * x.shape[3] <= _PRODUCT_PIXELS * stride * stride
    return small and x.is_cpu and weight.shape[-1] == 1 and x.dtype == torch.float32


def _rows(t: Tensor) -> Tensor:
    """A channels_last (N, C, H, W) tensor as its (N * H * W, C) matrix."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_rows`, with the images and sizes of ``like``."""
    return rows.view(like.shape[0], *like.shape[2:], rows.shape[1]).permute(0, 3, 1, 2)


def convolution(act: Tensor, weight: Tensor, stride: int, dilation: int, groups: int) -> Tensor:
    """``conv2d(act, weight)`` in channels_last, padded as these ops are."""
    if _is_product(act, weight, stride):
        act = act[:, :, ::stride, ::stride]
        return channels_last(_image(_rows(act) @ weight.flatten(1).t(), act))
    return channels_last(F.conv2d(act, weight, None, stride, _padding(weight, dilation), dilation, groups))


def fprop(x, scale, shift, slope, weight, stride, dilation, groups, statistics):
    """The input materialised, the convolution, one statistics pass."""
    y = convolution(activation(x, scale, shift, slope)[0], weight, stride, dilation, groups)
    return (y, *(tile_statistics(y) if statistics else no_statistics(y)))


# --- inference ------------------------------------------------------------------------------------------------------

_onednn = torch.ops.mkldnn
# Private to PyTorch's compiler, so their absence only selects the other path.
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(_onednn, name)
    for name in ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")
)


def onednn(*tensors: Tensor | None) -> bool:
    """Whether oneDNN's fused convolution takes these tensors: on the CPU, fp32, not empty, not switched off."""
    if not (_HAS_ONEDNN and torch._C._get_mkldnn_enabled()):
        return False
    for t in tensors:
        if t is not None and not (t.is_cpu and t.dtype == torch.float32 and t.numel() > 0):
            return False
    return True


def conv_bias(x, weight, bias, residual, stride, padding: int, dilation, groups, relu) -> Tensor:
    """``relu(conv2d(x, weight, bias) + residual)`` for any kernel size."""
    bound = bind_bias(x, weight, bias, residual, stride, padding, dilation, groups, relu)
    if bound is not None:
        return bound(x, residual)
    y = F.conv2d(x, weight, bias.to(x.dtype), stride, padding, dilation, groups)
    if residual is not None:
        y = y.add_(residual)
    return channels_last(y.relu_() if relu else y)


def bind_bias(
    x, weight, bias, residual, stride, padding: int, dilation, groups, relu, *, overwrite_residual: bool = False
) -> Callable[..., Tensor] | None:
    """:func:`conv_bias` as a function of ``x`` and ``residual`` for inputs of ``x``'s shape, or None without oneDNN.

    The weight is laid out for that shape: a layout made without it was measured three times slower.
    """
    if not onednn(x, weight, bias, residual):
        return None
    # One channel or one pixel has both memory formats at once: oneDNN of torch 2.11 refuses some of these.
    sizes = (output_size(size, weight.shape[-1], stride, padding, dilation) for size in x.shape[2:])
    if 1 in (x.shape[1], weight.shape[0], x.shape[2] * x.shape[3], math.prod(sizes)):
        return None
    geometry = ([padding] * 2, [stride] * 2, [dilation] * 2, groups)
    args = (_onednn._reorder_convolution_weight(weight.detach(), *geometry, list(x.shape)), bias, *geometry)
    unary = "relu" if relu else None

    def fused(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return channels_last(_onednn._convolution_pointwise(x, *args, unary or "none", [], ""))
        other = channels_last(residual)
        if overwrite_residual:
            return _onednn._convolution_pointwise_.binary(other, x, *args, "add", 1.0, unary, [], "")
        return channels_last(_onednn._convolution_pointwise.binary(x, other, *args, "add", 1.0, unary, [], ""))

    return fused


def infer(x, scale, shift, slope, weight, bias, residual, stride, dilation, groups, relu, out_slope) -> Tensor:
    """oneDNN's fused convolution on the CPU in fp32; convolution, add and ReLU elsewhere. The rest in passes."""
    act, _ = activation(x, scale, shift, slope)
    y = conv_bias(act, weight, bias, residual, stride, _padding(weight, dilation)[0], dilation, groups, relu)
    return y if out_slope is None else prelu(y, out_slope)


def bind_infer(
    x, scale, shift, slope, weight, bias, residual, stride, dilation, groups, relu, out_slope, *,
    overwrite_residual: bool,
) -> Callable[..., Tensor] | None:  # fmt: skip
    """:func:`infer` with the weight laid out once."""
    geometry = (stride, _padding(weight, dilation)[0], dilation, groups)
    conv = bind_bias(x, weight, bias, residual, *geometry, relu, overwrite_residual=overwrite_residual)
    if conv is None or (scale is None and out_slope is None):
        return conv

    def passes(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = conv(activation(x, scale, shift, slope)[0], residual)
        return y if out_slope is None else prelu(y, out_slope)

    return passes


# --- backward -------------------------------------------------------------------------------------------------------


def convolution_backward(dy, act, weight, stride, dilation, groups, mask):
    """``(dact, dw)`` of :func:`convolution`, each where ``mask`` asks for it."""
    if _is_product(act, weight, stride):
        rows, taken = _rows(dy), act[:, :, ::stride, ::stride]
        dw = (rows.t() @ _rows(taken)).view_as(weight) if mask[1] else None
        if not mask[0]:
            return None, dw
        dx = _image(rows @ weight.flatten(1), dy)
        if stride > 1:
            full = torch.zeros_like(act)
            full[:, :, ::stride, ::stride] = dx
            dx = full
        return dx, dw
    padding, no = _padding(weight, dilation), [0, 0]
    geometry = ([stride] * 2, padding, [dilation] * 2, False, no, groups, [*mask, False])
    return torch.ops.aten.convolution_backward(dy, act, weight, None, *geometry)[:2]


def _through_input(dx, read, x, scale, slope, mean, rstd, skip, skip_sign, skip_scale):
    """The epilogue as passes, written over ``dx``; ``read`` is what :func:`activation` gave beside the input."""
    none = dx.new_empty((0,), dtype=compute_dtype(dx.dtype))
    dx, dslope = channels_last(dx), none.clone()
    if skip is not None:
        dx.add_(factored(masked(skip, skip_sign), skip_scale), alpha=skip_scale)
    if scale is None:
        return dx, none, none.clone(), dslope
    if slope is None:
        dz = torch.ops.aten.threshold_backward.grad_input(dx, read, 0, grad_input=dx)
    else:
        dz, dslope = prelu_backward(dx, read, slope)
    if mean is None:
        return dz, none, none.clone(), dslope
    return (dz, *sums(dz, x, mean, rstd), dslope)


def _adds_into(skip: Tensor | None, skip_sign: Tensor | None, x: Tensor, weight: Tensor, stride: int) -> bool:
    """Whether a matrix product can add the input's gradient to ``skip`` in place: no tensor and no pass of its own."""
    if skip is None or skip_sign is not None or not skip.is_contiguous(memory_format=torch.channels_last):
        return False
    product = weight.shape[-1] == 1 and stride == 1 and x.is_cpu
    return product and x.dtype == skip.dtype == weight.dtype == torch.float32


def dgrad(
    dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale,
    stride, dilation, groups,
):  # fmt: skip
    """``dy`` materialised, cuDNN's or oneDNN's dgrad, then the epilogue as passes."""
    dy = output_gradient(dz, sign, y, a, b, c, weight.dtype)
    act, read = activation(x, scale, shift, slope)
    dx, _ = convolution_backward(dy, act, weight, stride, dilation, groups, [True, False])
    return _through_input(dx, read, x, scale, slope, mean, rstd, skip, skip_sign, skip_scale)


def wgrad(dz, sign, y, a, b, c, weight, x, scale, shift, slope, stride, dilation, groups, dtype):
    """Both operands materialised, cuDNN's or oneDNN's wgrad."""
    dy = output_gradient(dz, sign, y, a, b, c, weight.dtype)
    act, _ = activation(x, scale, shift, slope)
    _, dw = convolution_backward(dy, act, weight, stride, dilation, groups, [False, True])
    return weight_format(dw.to(dtype), weight)


def bprop(
    dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale, *geometry,
    consume: bool = False,
):  # fmt: skip
    """Both gradients from one materialised ``dy`` and one input; with ``consume`` written over ``dz`` and ``skip``."""
    stride, dilation, groups, dtype = geometry
    dy = output_gradient(dz, sign, y, a, b, c, weight.dtype, consume=consume)
    act, read = activation(x, scale, shift, slope)
    if consume and _adds_into(skip, skip_sign, x, weight, stride):
        _, dw = convolution_backward(dy, act, weight, stride, dilation, groups, [False, True])
        into, dx, skip = _rows(skip), skip, None
        torch.addmm(into, _rows(dy), weight.flatten(1), beta=skip_scale, out=into)
    else:
        dx, dw = convolution_backward(dy, act, weight, stride, dilation, groups, [True, True])
    found = _through_input(dx, read, x, scale, slope, mean, rstd, skip, skip_sign, skip_scale)
    return (*found, weight_format(dw.to(dtype), weight))


for _stem in ("conv1x1", "conv3x3"):
    backends.register(f"{_stem}_infer", "aten", infer, bind=bind_infer)
    backends.register(f"{_stem}_bprop", "aten", bprop, consume=functools.partial(bprop, consume=True))
    for _direction in (fprop, dgrad, wgrad):
        backends.register(f"{_stem}_{_direction.__name__}", "aten", _direction)
