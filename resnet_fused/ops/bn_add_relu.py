"""``bn_add_relu``: the end of a residual block, ``relu(bn(y) + shortcut)``, and its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.operands import Deferred, Gradient, Norm
from resnet_fused.ops import _check
from resnet_fused.ops._op import Op, empty_channels_last

# --- forward --------------------------------------------------------------------------------------------------------


def _check_forward(y, scale, shift, shortcut, shortcut_scale, shortcut_shift, mask) -> None:
    op = "bn_add_relu_forward"
    _check.activation(op, "y", y)
    _check.channels(op, y, y.shape[1], scale=scale, shift=shift)
    deferred = _check.together(op, shortcut_scale=shortcut_scale, shortcut_shift=shortcut_shift)
    if shortcut is not None:
        _check.same(op, "shortcut", shortcut, "y", y, dtype=False)
    elif deferred:
        _check.fail(op, "shortcut", "with shortcut_scale", None)
    _check.channels(op, y, y.shape[1], shortcut_scale=shortcut_scale, shortcut_shift=shortcut_shift)


def _fake_forward(y, scale, shift, shortcut, shortcut_scale, shortcut_shift, mask):
    return empty_channels_last(y, *y.shape), y.new_empty(((y.numel() + 7) // 8 if mask else 0,), dtype=torch.uint8)


_forward = Op(
    "bn_add_relu_forward(Tensor y, Tensor scale, Tensor shift, Tensor? shortcut, Tensor? shortcut_scale,"
    " Tensor? shortcut_shift, bool mask) -> (Tensor, Tensor)",
    _check_forward,
    _fake_forward,
)


def forward(y: Deferred, shortcut: Tensor | Deferred | None, *, sign: bool) -> tuple[Tensor, Tensor | None]:
    """``relu(y.y * y.scale + y.shift + shortcut)``, and what tells backward where the ReLU let values through.

    Args:
        y: the last convolution's output (N, C, H, W) with its norm; the ReLU is that of the sum.
        shortcut: None, plain, or the output of a projection with its norm (no ReLU of its own).
        sign: whether backward will need the sign.
    Returns:
        ``out`` in channels_last, ``y``'s dtype (as of ``out += shortcut``); and None, a packed 1-bit mask
        (``ceil(numel / 8)`` bytes), or ``out`` itself where a pass over bits costs more than reading ``out`` again.
    """
    s, s_scale, s_shift = shortcut if isinstance(shortcut, Deferred) else (shortcut, None, None)
    packed = sign and _packs(y.y)
    out, mask = _forward(*y, s, s_scale, s_shift, packed)
    return out, (mask if packed else out if sign else None)


def _packs(y: Tensor) -> bool:
    # On the CPU packing and unpacking bits cost three passes, reading the output again costs one, and the output stays
    # in memory anyway as the next block's input.
    return y.device.type != "cpu"


# --- backward -------------------------------------------------------------------------------------------------------


def _check_mask(dout, sign) -> None:
    _check.activation("bn_add_relu_mask", "dout", dout)
    _check.sign("bn_add_relu_mask", "sign", sign, dout)


def _fake_mask(dout, sign):
    return empty_channels_last(dout, *dout.shape)


_mask = Op("bn_add_relu_mask(Tensor dout, Tensor sign) -> Tensor", _check_mask, _fake_mask)


def gradient(dout: Tensor, sign: Tensor) -> Gradient:
    """The gradient of the sum: pending on packed bits, which every reader applies; masked here and now otherwise."""
    if sign.dtype == torch.uint8:
        return Gradient(dout, sign)
    return Gradient(_mask(dout, sign))


def masked(grad: Gradient) -> Tensor:
    """``grad.dz`` with its mask applied: the gradient of a plain shortcut."""
    return grad.dz if grad.sign is None else _mask(grad.dz, grad.sign)


def _check_reduce(dz, sign, y, mean, rstd, shortcut, shortcut_mean, shortcut_rstd) -> None:
    op = "bn_add_relu_reduce"
    _check.activation(op, "dz", dz)
    _check.sign(op, "sign", sign, dz)
    _check.same(op, "y", y, "dz", dz, dtype=False)
    _check.channels(op, y, y.shape[1], mean=mean, rstd=rstd)
    if _check.together(op, shortcut=shortcut, shortcut_mean=shortcut_mean, shortcut_rstd=shortcut_rstd):
        _check.same(op, "shortcut", shortcut, "dz", dz, dtype=False)
        _check.channels(op, y, y.shape[1], shortcut_mean=shortcut_mean, shortcut_rstd=shortcut_rstd)


def _fake_reduce(dz, sign, y, mean, rstd, shortcut, shortcut_mean, shortcut_rstd):
    return torch.empty_like(mean), torch.empty_like(mean), mean.new_empty((0,) if shortcut is None else mean.shape)


_reduce = Op(
    "bn_add_relu_reduce(Tensor dz, Tensor? sign, Tensor y, Tensor mean, Tensor rstd, Tensor? shortcut,"
    " Tensor? shortcut_mean, Tensor? shortcut_rstd) -> (Tensor, Tensor, Tensor)",
    _check_reduce,
    _fake_reduce,
)


def reduce(
    grad: Gradient, y: Tensor, norm: Norm, shortcut: Tensor | None = None, shortcut_norm: Norm | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dbeta, dgamma, dgamma of the shortcut's norm)`` in one pass; ``dbeta`` is that of both norms."""
    s_mean, s_rstd = (None, None) if shortcut_norm is None else (shortcut_norm.mean, shortcut_norm.rstd)
    return _reduce(grad.dz, grad.sign, y, norm.mean, norm.rstd, shortcut, s_mean, s_rstd)


def _check_apply(dz, sign, y, a, b, c) -> None:
    op = "bn_add_relu_apply"
    _check.activation(op, "dz", dz)
    _check.sign(op, "sign", sign, dz)
    _check.same(op, "y", y, "dz", dz, dtype=False)
    _check.together(op, b=b, c=c)
    _check.channels(op, y, y.shape[1], a=a, b=b, c=c)


def _fake_apply(dz, sign, y, a, b, c):
    return empty_channels_last(y, *y.shape)


_apply = Op(
    "bn_add_relu_apply(Tensor dz, Tensor? sign, Tensor y, Tensor a, Tensor? b, Tensor? c) -> Tensor",
    _check_apply,
    _fake_apply,
)


def apply(grad: Gradient, y: Tensor) -> Tensor:
    """The materialised ``dy = a * dz' + b * y + c``, in ``y``'s dtype."""
    return _apply(grad.dz, grad.sign, y, grad.a, grad.b, grad.c)


for _name in ("forward", "mask", "reduce", "apply"):
    backends.register(f"bn_add_relu_{_name}", "reference", getattr(reference, f"bn_add_relu_{_name}"))
