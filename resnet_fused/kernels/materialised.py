"""Convolutions whose operands are written first: one Triton pass before and after PyTorch's own convolution (cuDNN).

What is formed on the way elsewhere is a tensor here: the activated input, ``dy``. The functions take the flat arguments
of the conv ops, of any kernel size. Bytes: beside the convolution's own, a read and a write of each materialised tensor
and a read for statistics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fused.aten.conv import convolution, convolution_backward
from resnet_fused.kernels._launch import unsupported
from resnet_fused.kernels.batch_norm import bn_statistics
from resnet_fused.kernels.bn_add_relu import (
    bn_add_relu_apply,
    bn_add_relu_backward,
    bn_add_relu_forward,
    bn_add_relu_mask,
)
from resnet_fused.reference import channels_last, no_statistics, weight_format

_PLAIN_SUM = [1.0, 0.0, 1.0, 0.0]
_NO_SHORTCUT = (None, None, None)


def activation(x: Tensor, scale: Tensor | None, shift: Tensor | None, slope: Tensor | None) -> Tensor:
    """The tensor that the convolution reads."""
    if scale is None:
        return x
    return _end(x, scale, shift, None, slope is None, slope)


def _end(y, scale, shift, shortcut, relu: bool, slope) -> Tensor:
    """``act(y * scale + shift + shortcut)`` in one pass."""
    terms = (y, scale, shift, shortcut, None, None, None, _PLAIN_SUM, False)
    return bn_add_relu_forward(*terms, relu, slope, False, False)[0]


def output_gradient(dz, sign, y, a, b, c, dtype: torch.dtype) -> Tensor:
    """``dy = a * dz' + b * y + c`` in ``dtype``."""
    if a is not None:
        dy = bn_add_relu_apply(dz, sign, dz if y is None else y, a, b, c, None, None, 1.0)
    else:
        dy = channels_last(dz) if sign is None else bn_add_relu_mask(dz, sign)
    return dy.to(dtype)


def _through_input(dx, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale) -> tuple[Tensor, ...]:
    """The epilogue: one pass for the skip gradient, one for the activation and its sums."""
    dx = channels_last(dx)
    if skip is not None:
        dx = bn_add_relu_apply(dx, None, dx, None, None, None, skip, skip_sign, skip_scale)
    if scale is None:
        none = dx.new_empty((0,), dtype=torch.float32)
        return dx, none, none.clone(), none.clone()
    dz, _, dbeta, dgamma, _, _, _, dslope = bn_add_relu_backward(
        dx, None, x, scale, shift, mean, rstd, *_NO_SHORTCUT, None, None, None, _PLAIN_SUM, slope is None, slope,
        False, False,
    )  # fmt: skip
    return dz, dbeta, dgamma, dslope


def fprop(x, scale, shift, slope, weight, stride, dilation, groups, statistics) -> tuple[Tensor, ...]:
    """The input activated, the convolution, its statistics."""
    y = convolution(activation(x, scale, shift, slope), weight, stride, dilation, groups)
    return (y, *(bn_statistics(y) if statistics else no_statistics(y)))


def infer(x, scale, shift, slope, weight, bias, residual, stride, dilation, groups, relu, out_slope) -> Tensor:
    """The input activated, the convolution, and one pass for bias, residual and activation."""
    y = convolution(activation(x, scale, shift, slope), weight, stride, dilation, groups)
    return _end(y, torch.ones_like(bias), bias, residual, relu, out_slope)


def dgrad(
    dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale,
    stride, dilation, groups,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``dy``, the convolution's dgrad, the epilogue."""
    dy = output_gradient(dz, sign, y, a, b, c, weight.dtype)
    dx, _ = convolution_backward(dy, x, weight, stride, dilation, groups, [True, False])  # reads no value of x
    return _through_input(dx, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale)


def wgrad(dz, sign, y, a, b, c, weight, x, scale, shift, slope, stride, dilation, groups, dtype) -> Tensor:
    """``dy`` and the activated input, the convolution's wgrad."""
    dy, act = output_gradient(dz, sign, y, a, b, c, weight.dtype), activation(x, scale, shift, slope)
    _, dw = convolution_backward(dy, act, weight, stride, dilation, groups, [False, True])
    return weight_format(dw.to(dtype), weight)


def bprop(
    dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale, *geometry
) -> tuple[Tensor, ...]:
    """Both gradients of one ``dy`` and one activated input."""
    stride, dilation, groups, dtype = geometry
    dy, act = output_gradient(dz, sign, y, a, b, c, weight.dtype), activation(x, scale, shift, slope)
    dx, dw = convolution_backward(dy, act, weight, stride, dilation, groups, [True, True])
    found = _through_input(dx, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale)
    return (*found, weight_format(dw.to(dtype), weight))


# --- what the passes decline ----------------------------------------------------------------------------------------


def _masks(*pairs: tuple[Tensor | None, Tensor | None]) -> str | None:
    for sign, of in pairs:
        if of is not None and sign is not None and sign.dtype == torch.uint8 and of.shape[1] % 8:
            return f"the kernel reads packed masks of channels in multiples of 8, not {of.shape[1]}"
    return None


def _fprop_unsupported(x, scale, shift, slope, weight, *rest) -> str | None:
    return unsupported(x, scale, shift, slope, weight)


def _infer_unsupported(x, scale, shift, slope, weight, bias, residual, *rest) -> str | None:
    return unsupported(x, scale, shift, slope, weight, bias, residual, rest[-1])


def _wgrad_unsupported(dz, sign, y, a, b, c, weight, x, scale, shift, slope, *rest) -> str | None:
    return unsupported(dz, sign, y, a, b, c, weight, x, scale, shift, slope) or _masks((sign, dz))


def _dgrad_unsupported(*args) -> str | None:
    mean, rstd, skip, skip_sign = args[11:15]
    return (
        _wgrad_unsupported(*args[:11]) or unsupported(args[0], mean, rstd, skip, skip_sign) or _masks((skip_sign, skip))
    )


UNSUPPORTED: dict[str, Callable[..., str | None]] = {
    "fprop": _fprop_unsupported,
    "infer": _infer_unsupported,
    "dgrad": _dgrad_unsupported,
    "wgrad": _wgrad_unsupported,
    "bprop": _dgrad_unsupported,
}
