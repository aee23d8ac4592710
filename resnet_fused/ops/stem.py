"""``stem``: ``max_pool2d(relu(bn(y)), 3, 2, 1)`` after an ImageNet ResNet's first convolution, and its backward.

No index tensor is kept: backward finds the winners again from ``y``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.operands import Deferred, Norm
from resnet_fused.ops import _check
from resnet_fused.ops._conv import output_size
from resnet_fused.ops._op import Op, empty_channels_last


def _pooled(y: Tensor) -> tuple:
    return (y.shape[0], y.shape[1], output_size(y.shape[2], 3, 2, 1), output_size(y.shape[3], 3, 2, 1))


def _check_forward(y, scale, shift) -> None:
    _check.activation("stem_forward", "y", y)
    _check.channels("stem_forward", y, y.shape[1], scale=scale, shift=shift)


def _fake_forward(y, scale, shift):
    return empty_channels_last(y, *_pooled(y))


_forward = Op("stem_forward(Tensor y, Tensor scale, Tensor shift) -> Tensor", _check_forward, _fake_forward)


def forward(y: Deferred) -> Tensor:
    """``max_pool2d(relu(y.y * y.scale + y.shift), 3, 2, 1)``, (N, C, ceil(H / 2), ceil(W / 2))."""
    if y.slope is not None:
        _check.fail("stem_forward", "y", "without a slope", f"shape {tuple(y.slope.shape)}")
    return _forward(y.y, y.scale, y.shift)


def _check_infer(x, weight, bias, stride, padding) -> None:
    op = "stem_infer"
    _check.activation(op, "x", x)
    if weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        _check.fail(op, "weight", f"of shape (K, {x.shape[1]}, R, S)", f"shape {tuple(weight.shape)}")
    if weight.dtype != x.dtype:
        _check.fail(op, "weight", f"of x's dtype {x.dtype}", weight.dtype, TypeError)
    _check.device(op, "weight", weight, "x", x)
    _check.channels(op, x, weight.shape[0], bias=bias)
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0)):
        if value < least:
            _check.fail(op, name, f">= {least}", value)


def _fake_infer(x, weight, bias, stride, padding):
    sizes = zip(x.shape[2:], weight.shape[2:], strict=True)
    p, q = (reference.output_size(size, r, stride, padding, 1) for size, r in sizes)
    return empty_channels_last(x, x.shape[0], weight.shape[0], output_size(p, 3, 2, 1), output_size(q, 3, 2, 1))


_infer = Op(
    "stem_infer(Tensor x, Tensor weight, Tensor bias, int stride, int padding) -> Tensor", _check_infer, _fake_infer
)


def infer(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, padding: int) -> Tensor:
    """``max_pool2d(relu(conv2d(x, weight, bias, stride, padding)), 3, 2, 1)``; ``bias`` (K,) fp32 (fp64)."""
    return _infer(x, weight, bias, stride, padding)


def bind(x: Tensor, weight: Tensor, bias: Tensor, *, stride: int, padding: int) -> Callable[[Tensor], Tensor]:
    """:func:`infer` for inputs like ``x`` (shape, dtype, device) with the choices and preparations made once."""
    bound = _infer.bind(x, weight, bias, stride, padding)
    return bound if bound is not None else lambda x: _infer(x, weight, bias, stride, padding)


def _check_backward(op, dout, y, scale, shift, **vectors) -> None:
    _check.activation(op, "y", y)
    _check.activation(op, "dout", dout)
    if tuple(dout.shape) != _pooled(y):
        _check.fail(op, "dout", f"of the pooled shape {_pooled(y)}", f"shape {tuple(dout.shape)}")
    _check.channels(op, y, y.shape[1], scale=scale, shift=shift, **vectors)


def _check_reduce(dout, y, scale, shift, mean, rstd) -> None:
    _check_backward("stem_reduce", dout, y, scale, shift, mean=mean, rstd=rstd)


def _fake_reduce(dout, y, scale, shift, mean, rstd):
    return torch.empty_like(mean), torch.empty_like(mean)


_reduce = Op(
    "stem_reduce(Tensor dout, Tensor y, Tensor scale, Tensor shift, Tensor mean, Tensor rstd) -> (Tensor, Tensor)",
    _check_reduce,
    _fake_reduce,
)


def reduce(dout: Tensor, y: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """``(dbeta, dgamma)`` from the pooled gradient ``dout`` and the convolution's output ``y``."""
    return _reduce(dout, y, *norm)


def _check_apply(dout, y, scale, shift, a, b, c) -> None:
    _check.together("stem_apply", b=b, c=c)
    _check_backward("stem_apply", dout, y, scale, shift, a=a, b=b, c=c)


def _fake_apply(dout, y, scale, shift, a, b, c):
    return empty_channels_last(y, *y.shape)


_apply = Op(
    "stem_apply(Tensor dout, Tensor y, Tensor scale, Tensor shift, Tensor a, Tensor? b, Tensor? c) -> Tensor",
    _check_apply,
    _fake_apply,
)


def apply(dout: Tensor, y: Tensor, norm: Norm, a: Tensor, b: Tensor | None, c: Tensor | None) -> Tensor:
    """The gradient of the stem convolution's output: ``dout`` through pool and ReLU, then ``a * dz + b * y + c``."""
    return _apply(dout, y, norm.scale, norm.shift, a, b, c)


def _check_joint(dout, y, scale, shift, mean, rstd, weight, count) -> None:
    _check_backward("stem_backward", dout, y, scale, shift, mean=mean, rstd=rstd)
    _check.parameters("stem_backward", mean, weight=weight)
    if count is not None:
        _check.count("stem_backward", count, mean)


def _fake_joint(dout, y, scale, shift, mean, rstd, weight, count):
    return empty_channels_last(y, *y.shape), torch.empty_like(mean), torch.empty_like(mean)


_joint = Op(
    "stem_backward(Tensor dout, Tensor y, Tensor scale, Tensor shift, Tensor mean, Tensor rstd, Tensor? weight,"
    " Tensor? count) -> (Tensor, Tensor, Tensor)",
    _check_joint,
    _fake_joint,
)


def backward(
    dout: Tensor, y: Tensor, norm: Norm, weight: Tensor | None, count: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dy, dbeta, dgamma)``: :func:`reduce`, the norm's coefficients and :func:`apply` in one call.

    ``weight`` (C,) is the norm's gamma; ``count`` (T,) int32 its tiles' counts, None for frozen statistics.
    """
    return _joint(dout, y, *norm, weight, count)


for _name in ("forward", "infer", "reduce", "apply", "backward"):
    backends.register(f"stem_{_name}", "reference", getattr(reference, f"stem_{_name}"))
