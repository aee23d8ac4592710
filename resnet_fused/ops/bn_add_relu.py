"""``bn_add_relu``: the end of a residual block, and its backward.

One formula covers the units of the papers (arXiv 1512.03385 and 1603.05027, PReLU 1502.01852, squeeze-and-excitation
1709.01507, stochastic depth 1603.09382)::

    F = y * scale + shift                  or y itself; ReLU'd with branch_relu
    S = shortcut * scale + shift           or the shortcut itself, or 0
    out = act((mix.branch + mix.branch_gate * gate) * F + (mix.shortcut + mix.shortcut_gate * gate) * S)

========  ======================================================================================================
forward   ``out``, the packed 1-bit mask of its ReLU, and the statistics of the rounded ``out``
backward  gradients of F's and S's norms, of the gate and the slopes, materialised
mask      ``dout`` where the ReLU passed
reduce    the sums of one or two norms from the masked gradient of the plain sum
apply     ``a * dz' + b * y + c`` plus a skip gradient
pool      mean of ``y * scale + shift`` over the pixels, which a gate is computed from
spread    the gradient of ``pool`` added to that of ``y * scale + shift``
========  ======================================================================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.operands import Deferred, Gradient, Mix, Norm, TileStatistics
from resnet_fused.ops import _check
from resnet_fused.ops._op import Op, empty_channels, empty_channels_last, empty_tiles

PLAIN = Mix()

# --- forward --------------------------------------------------------------------------------------------------------


def _check_terms(op, y, scale, shift, shortcut, shortcut_scale, shortcut_shift, gate, mix, slope) -> None:
    _check.activation(op, "y", y)
    _check.together(op, scale=scale, shift=shift)
    deferred = _check.together(op, shortcut_scale=shortcut_scale, shortcut_shift=shortcut_shift)
    if shortcut is not None:
        _check.same(op, "shortcut", shortcut, "y", y, dtype=False)
    elif deferred:
        _check.fail(op, "shortcut", "with shortcut_scale", None)
    vectors = {"scale": scale, "shift": shift, "shortcut_scale": shortcut_scale, "shortcut_shift": shortcut_shift}
    _check.channels(op, y, y.shape[1], **vectors, slope=slope)
    _check.mix(op, mix, gate, y)


def _check_forward(
    y, scale, shift, shortcut, shortcut_scale, shortcut_shift, gate, mix, branch_relu, relu, slope, mask, statistics
) -> None:
    op = "bn_add_relu_forward"
    _check_terms(op, y, scale, shift, shortcut, shortcut_scale, shortcut_shift, gate, mix, slope)
    if mask and (not relu or slope is not None):
        _check.fail(op, "mask", "False without relu or with slope", mask)


def _fake_forward(
    y, scale, shift, shortcut, shortcut_scale, shortcut_shift, gate, mix, branch_relu, relu, slope, mask, statistics
):
    bits = y.new_empty(((y.numel() + 7) // 8 if mask else 0,), dtype=torch.uint8)
    return (empty_channels_last(y, *y.shape), bits, *empty_tiles(y, statistics))


_forward = Op(
    "bn_add_relu_forward(Tensor y, Tensor? scale, Tensor? shift, Tensor? shortcut, Tensor? shortcut_scale,"
    " Tensor? shortcut_shift, Tensor? gate, float[] mix, bool branch_relu, bool relu, Tensor? slope, bool mask,"
    " bool statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _check_forward,
    _fake_forward,
)


def forward(
    y: Tensor | Deferred,
    shortcut: Tensor | Deferred | None,
    *,
    sign: bool,
    mix: Mix = PLAIN,
    gate: Tensor | None = None,
    branch_relu: bool = False,
    relu: bool = True,
    slope: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor | None, TileStatistics]:
    """``act((mix[0] + mix[1] * gate) * F + (mix[2] + mix[3] * gate) * S)``, rounded once.

    In PyTorch, with ``v(t) = t.view(1, -1, 1, 1)``::

        F = y.y * v(y.scale) + v(y.shift)                    # y itself where it is a plain tensor
        F = F.relu() if branch_relu else F
        S = shortcut.y * v(shortcut.scale) + v(shortcut.shift)   # likewise; 0 where there is none
        total = (mix[0] + mix[1] * gate) * F + (mix[2] + mix[3] * gate) * S
        out = prelu(total, slope) if slope is not None else total.relu() if relu else total

    With the defaults ``relu(bn(y) + shortcut)``, the unit of arXiv 1512.03385. The units of arXiv 1603.05027: with
    ``relu=False`` pre-activation, with ``branch_relu`` "ReLU before addition", with constants or a gate the shortcuts
    of its table 1. The gate is also the factor of squeeze-and-excitation (arXiv 1709.01507) and of stochastic depth
    (arXiv 1603.09382); ``slope`` makes the last activation the PReLU of arXiv 1502.01852.

    Args:
        y: the branch (N, C, H, W) of any floating dtype, plain or with its norm (no activation of its own).
        shortcut: None, plain, or the output of a projection with its norm; as ``y``.
        sign: whether backward will need to know where the ReLU let values through.
        mix: the four weights.
        gate: 4-d floating, every size 1 or that of ``y``; given where ``mix`` uses it and only there.
        branch_relu: a ReLU on F.
        relu: a ReLU on the sum; ``slope`` takes its place.
        slope: (C,) fp32 (fp64).
        statistics: whether those of ``out`` are wanted.
    Returns:
        ``out`` in channels_last, ``y``'s dtype (as of ``out += shortcut``); None without a ReLU on the sum or without
        ``sign``, else a packed 1-bit mask (``ceil(numel / 8)`` bytes), or ``out`` itself where a pass over bits costs
        more than reading ``out`` again; the statistics of the rounded ``out`` (of no tile unless asked for).
    Raises:
        ValueError, TypeError: an argument is outside the contract.
    """
    relu = relu and slope is None
    packed = sign and relu and _packs(y if isinstance(y, Tensor) else y.y)
    terms = (*_pending("y", y), *_pending("shortcut", shortcut))
    out, bits, *tiles = _forward(*terms, gate, list(mix), branch_relu, relu, slope, packed, statistics)
    kept = bits if packed else out if sign and relu else None
    return out, kept, TileStatistics(*tiles)


def _pending(name: str, t: Tensor | Deferred | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if not isinstance(t, Deferred):
        return t, None, None
    if t.slope is not None:
        _check.fail("bn_add_relu", name, "without a slope of its own", f"shape {tuple(t.slope.shape)}")
    return t.y, t.scale, t.shift


_packs_on_cpu = False


@contextlib.contextmanager
def packed_masks() -> Iterator[None]:
    """Within it the CPU keeps 1-bit masks too, as a GPU does: for counting what a GPU moves."""
    global _packs_on_cpu
    before, _packs_on_cpu = _packs_on_cpu, True
    try:
        yield
    finally:
        _packs_on_cpu = before


def _packs(y: Tensor) -> bool:
    # On the CPU packing and unpacking bits cost three passes, reading the output again costs one, and the output stays
    # in memory anyway as the next block's input.
    return y.device.type != "cpu" or _packs_on_cpu


# --- backward -------------------------------------------------------------------------------------------------------


class EndGradients(NamedTuple):
    """What backward of the block's end gives; None where it was not asked for."""

    dz: Tensor  # of y * scale + shift, or of y: (N, C, H, W), y's dtype
    dshortcut: Tensor | None  # of S: (N, C, H, W), the shortcut's dtype
    dbeta: Tensor | None  # (C,) fp32 (fp64), the sum of dz
    dgamma: Tensor | None  # (C,), the sum of dz * xhat
    shortcut_dbeta: Tensor | None  # (C,)
    shortcut_dgamma: Tensor | None  # (C,)
    dgate: Tensor | None  # the gate's shape, fp32 (fp64)
    dslope: Tensor | None  # (C,)


def _check_backward(
    dout, sign, y, scale, shift, mean, rstd, shortcut, shortcut_scale, shortcut_shift, shortcut_mean, shortcut_rstd,
    gate, mix, branch_relu, slope, need_shortcut, need_gate,
) -> None:  # fmt: skip
    op = "bn_add_relu_backward"
    _check.activation(op, "dout", dout)
    _check_terms(op, y, scale, shift, shortcut, shortcut_scale, shortcut_shift, gate, mix, slope)
    _check.same(op, "dout", dout, "y", y, dtype=False)
    if sign is not None and slope is not None:
        _check.fail(op, "sign", "None with slope", f"shape {tuple(sign.shape)}")
    _check.sign(op, "sign", sign, dout)
    if _check.together(op, mean=mean, rstd=rstd) and scale is None:
        _check.fail(op, "scale and shift", "with mean and rstd", None)
    summed = _check.together(op, shortcut_mean=shortcut_mean, shortcut_rstd=shortcut_rstd)
    if summed and shortcut_scale is None:
        _check.fail(op, "shortcut_scale and shortcut_shift", "with shortcut_mean and shortcut_rstd", None)
    statistics = {"mean": mean, "rstd": rstd, "shortcut_mean": shortcut_mean, "shortcut_rstd": shortcut_rstd}
    _check.channels(op, y, y.shape[1], **statistics)
    for name, t, needed in (("shortcut", shortcut, need_shortcut), ("gate", gate, need_gate)):
        if needed and t is None:
            _check.fail(op, name, f"with need_{name}", None)


def _fake_backward(
    dout, sign, y, scale, shift, mean, rstd, shortcut, shortcut_scale, shortcut_shift, shortcut_mean, shortcut_rstd,
    gate, mix, branch_relu, slope, need_shortcut, need_gate,
):  # fmt: skip
    sums = [empty_channels(y, given is not None) for given in (mean, rstd, shortcut_mean, shortcut_rstd)]
    dshortcut = empty_channels_last(shortcut, *shortcut.shape) if need_shortcut else y.new_empty((0,))
    wide = reference.compute_dtype(y.dtype)
    dgate = empty_channels_last(gate, *gate.shape, dtype=wide) if need_gate else y.new_empty((0,), dtype=wide)
    return (empty_channels_last(y, *y.shape), dshortcut, *sums, dgate, empty_channels(y, slope is not None))


_backward = Op(
    "bn_add_relu_backward(Tensor dout, Tensor? sign, Tensor y, Tensor? scale, Tensor? shift, Tensor? mean,"
    " Tensor? rstd, Tensor? shortcut, Tensor? shortcut_scale, Tensor? shortcut_shift, Tensor? shortcut_mean,"
    " Tensor? shortcut_rstd,"
    " Tensor? gate, float[] mix, bool branch_relu, Tensor? slope, bool need_shortcut, bool need_gate)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _check_backward,
    _fake_backward,
)


def backward(
    dout: Tensor,
    sign: Tensor | None,
    y: Tensor,
    norm: Norm | None,
    shortcut: Tensor | None,
    shortcut_norm: Norm | None,
    *,
    mix: Mix,
    gate: Tensor | None,
    branch_relu: bool,
    slope: Tensor | None,
    sums: bool,
    need_shortcut: bool,
    need_gate: bool,
) -> EndGradients:
    """The gradients of :func:`forward`, materialised: what autograd gives for the expression in its docstring.

    Args:
        dout: gradient of ``out``.
        sign: as forward returned it; None without a ReLU on the sum.
        y, norm, shortcut, shortcut_norm: the two summands and their norms, None where the tensor is plain.
        mix, gate, branch_relu, slope: forward's.
        sums: whether the sums of the norms that are given are wanted.
        need_shortcut: whether the gradient of S is; it may be ``dout`` itself where nothing changes it.
        need_gate: whether the gate's is.
    Raises:
        ValueError, TypeError: an argument is outside the contract.
    """
    same = need_shortcut and shortcut is not None and shortcut.dtype == dout.dtype and sign is None and slope is None
    passed_on = same and mix.shortcut == 1 and mix.shortcut_gate == 0
    found = _backward(
        dout,
        sign,
        y,
        *_affine(norm),
        *_statistics(norm if sums else None),
        shortcut,
        *_affine(shortcut_norm),
        *_statistics(shortcut_norm if sums else None),
        gate,
        list(mix),
        branch_relu,
        slope,
        need_shortcut and not passed_on,
        need_gate,
    )
    summed, shortcut_summed = sums and norm is not None, sums and shortcut_norm is not None
    asked = (need_shortcut, summed, summed, shortcut_summed, shortcut_summed, need_gate, slope is not None)
    dz, dshortcut, *rest = found
    if passed_on:
        dshortcut = reference.channels_last(dout)
    rest = [t if given else None for t, given in zip((dshortcut, *rest), asked, strict=True)]
    return EndGradients(dz, *rest)


def _affine(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.scale, norm.shift)


def _statistics(norm: Norm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if norm is None else (norm.mean, norm.rstd)


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
    return _reduce(grad.dz, grad.sign, y, norm.mean, norm.rstd, shortcut, *_statistics(shortcut_norm))


def _check_apply(dz, sign, y, a, b, c, skip, skip_sign, skip_scale) -> None:
    op = "bn_add_relu_apply"
    _check.activation(op, "dz", dz)
    _check.sign(op, "sign", sign, dz)
    _check.same(op, "y", y, "dz", dz, dtype=False)
    if _check.together(op, b=b, c=c) and a is None:
        _check.fail(op, "a", "with b and c", None)
    _check.channels(op, y, y.shape[1], a=a, b=b, c=c)
    if skip is not None:
        _check.same(op, "skip", skip, "dz", dz, dtype=False)
        _check.sign(op, "skip_sign", skip_sign, skip)


def _fake_apply(dz, sign, y, a, b, c, skip, skip_sign, skip_scale):
    return empty_channels_last(y, *y.shape)


_apply = Op(
    "bn_add_relu_apply(Tensor dz, Tensor? sign, Tensor y, Tensor? a, Tensor? b, Tensor? c, Tensor? skip,"
    " Tensor? skip_sign, float skip_scale) -> Tensor",
    _check_apply,
    _fake_apply,
)


def apply(grad: Gradient, y: Tensor, *, skip: Gradient | None = None, skip_scale: float = 1.0) -> Tensor:
    """The materialised ``dy = a * dz' + b * y + c + skip_scale * skip'``, in ``y``'s dtype.

    ``skip'`` is ``skip.dz`` with its mask: the gradient that reaches ``y`` by another way. ``a`` None stands for 1.
    """
    s, s_sign = (None, None) if skip is None else (skip.dz, skip.sign)
    return _apply(grad.dz, grad.sign, y, grad.a, grad.b, grad.c, s, s_sign, skip_scale)


# --- the mean over the pixels -----------------------------------------------------------------------------------------


def _check_pool(y, scale, shift) -> None:
    op = "bn_add_relu_pool"
    _check.activation(op, "y", y)
    _check.together(op, scale=scale, shift=shift)
    _check.channels(op, y, y.shape[1], scale=scale, shift=shift)


def _fake_pool(y, scale, shift):
    return empty_channels_last(y, *y.shape[:2], 1, 1)


_pool = Op("bn_add_relu_pool(Tensor y, Tensor? scale, Tensor? shift) -> Tensor", _check_pool, _fake_pool)


def pool(y: Tensor | Deferred) -> Tensor:
    """``(y.y * y.scale + y.shift).mean((2, 3), keepdim=True)`` in ``y``'s dtype, accumulated in fp32 (fp64).

    What squeeze-and-excitation computes its gate from (arXiv 1709.01507, eq. 2); ``y`` (N, C, H, W), plain or with its
    norm (no activation of its own).
    """
    return _pool(*_pending("y", y))


def _check_spread(dz, dpool) -> None:
    op = "bn_add_relu_spread"
    _check.activation(op, "dz", dz)
    _check.activation(op, "dpool", dpool)
    if tuple(dpool.shape) != (*dz.shape[:2], 1, 1):
        _check.fail(op, "dpool", f"of shape {(*dz.shape[:2], 1, 1)}", f"shape {tuple(dpool.shape)}")
    _check.device(op, "dpool", dpool, "dz", dz)


def _fake_spread(dz, dpool):
    return empty_channels_last(dz, *dz.shape)


_spread = Op("bn_add_relu_spread(Tensor dz, Tensor dpool) -> Tensor", _check_spread, _fake_spread)


def spread(dz: Tensor, dpool: Tensor) -> Tensor:
    """``dz + dpool / (H * W)`` in ``dz``'s dtype: the gradient of :func:`pool`, (N, C, 1, 1), added to ``dz``."""
    return _spread(dz, dpool)


for _name in ("forward", "backward", "mask", "reduce", "apply", "pool", "spread"):
    backends.register(f"bn_add_relu_{_name}", "reference", getattr(reference, f"bn_add_relu_{_name}"))
