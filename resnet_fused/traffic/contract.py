"""The fewest bytes and the FLOPs of one op call, from its contract and the shapes of its arguments alone.

Bytes: every tensor that the result depends on is read once from memory and every result written once, as if caches held
whatever is needed again. So

- a tensor that is given for its shape or dtype alone is not read: the input of a plain dgrad, the weight in wgrad;
- of a strided convolution's input only the pixels that its taps reach are read: a quarter for a 1x1 of stride 2;
- one tensor in two roles is read once; a packed mask is one bit an element;
- ``bprop`` reads what its dgrad and its wgrad share once (:func:`parts` tells the two apart);
- ``stem_backward`` under batch statistics reads its operands twice, since ``dy`` depends on the sums of all of ``dz``;
- vectors of one value a channel (scale, shift, statistics, sums) and the slopes count only in the ops that have nothing
  else: beside an activation they are below a thousandth, and how many tiles of statistics there are is the kernel's.

FLOPs: two for each multiply-add of a convolution, padding included; pointwise arithmetic and reductions count 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from resnet_fused import reference
from resnet_fused.ops._conv import output_size
from resnet_fused.ops._op import ops


@dataclass(frozen=True)
class Traffic:
    """What one call must do."""

    bytes: int
    flops: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.flops + other.flops)


def of(op: str, args: tuple[Any, ...]) -> Traffic:
    """The fewest bytes of one call of ``op``, and its FLOPs.

    Args:
        op: name of a registered op, such as ``conv1x1_dgrad``.
        args: the op's arguments in the order of its schema; real, fake or meta tensors.
    Raises:
        ValueError: there is no such op, or the number of arguments is wrong.
    """
    return _rule(op)(_named(op, args))


def parts(op: str, args: tuple[Any, ...]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """``bprop`` as the dgrad and the wgrad that it stands for; any other call as itself."""
    stem, _, direction = op.rpartition("_")
    if direction != "bprop":
        return ((op, args),)
    found = vars(_named(op, args))
    calls = (f"{stem}_dgrad", f"{stem}_wgrad")
    return tuple((call, tuple(found[name] for name in _names(call))) for call in calls)


@functools.cache
def _names(op: str) -> tuple[str, ...]:
    if op not in ops:
        raise ValueError(f"traffic.of: expected op to be a registered op, got {op!r}")
    return tuple(argument.name for argument in ops[op].overload._schema.arguments)


def _named(op: str, args: tuple[Any, ...]) -> SimpleNamespace:
    names = _names(op)
    if len(args) != len(names):
        raise ValueError(f"{op}: expected {len(names)} arguments ({', '.join(names)}), got {len(args)}")
    return SimpleNamespace(**dict(zip(names, args, strict=True)))


def _rule(op: str) -> Callable[[SimpleNamespace], Traffic]:
    _names(op)
    return _RULES[op.partition("_")[2] if op.startswith("conv") else op]


def _bytes(*tensors: Tensor | None) -> int:
    """Of each tensor once."""
    distinct = {id(t): t for t in tensors if t is not None}
    return sum(t.numel() * t.element_size() for t in distinct.values())


# --- convolutions -----------------------------------------------------------------------------------------------------


def _flops(a: SimpleNamespace) -> int:
    n, _, h, w = a.x.shape
    k, c_per_group, r, _ = a.weight.shape
    p, q = (output_size(size, r, a.stride, a.dilation) for size in (h, w))
    return 2 * n * p * q * k * c_per_group * r * r


def _output_bytes(a: SimpleNamespace) -> int:
    n, _, h, w = a.x.shape
    p, q = (output_size(size, a.weight.shape[2], a.stride, a.dilation) for size in (h, w))
    return n * a.weight.shape[0] * p * q * a.x.element_size()


def _reached_bytes(a: SimpleNamespace) -> int:
    """Of the pixels of ``x`` that some tap of some output pixel reads."""
    n, c, h, w = a.x.shape
    kernel = a.weight.shape[2]
    padding = a.dilation * (kernel - 1) // 2
    pixels = math.prod(reached(size, kernel, a.stride, padding, a.dilation) for size in (h, w))
    return n * c * pixels * a.x.element_size()


@functools.cache
def reached(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many of ``size`` rows (or columns) of an image some tap of a convolution reads."""
    outputs = reference.output_size(size, kernel, stride, padding, dilation)
    taps = {p * stride + r * dilation - padding for p in range(outputs) for r in range(kernel)}
    return sum(0 <= tap < size for tap in taps)


def _fprop(a: SimpleNamespace) -> Traffic:
    return Traffic(_reached_bytes(a) + _bytes(a.weight) + _output_bytes(a), _flops(a))


def _infer(a: SimpleNamespace) -> Traffic:
    return Traffic(_fprop(a).bytes + _bytes(a.residual), _flops(a))


def _weight_gradient_bytes(a: SimpleNamespace) -> int:
    return a.weight.numel() * a.dtype.itemsize


def _dgrad(a: SimpleNamespace) -> Traffic:
    # A deferred input is read for its activation's mask, without a skip gradient only where dx is not 0 anyway.
    read = 0 if a.scale is None else _reached_bytes(a) if a.skip is None else _bytes(a.x)
    operands = _bytes(a.dz, a.sign, a.y, a.weight, a.skip, a.skip_sign)
    return Traffic(operands + read + _bytes(a.x), _flops(a))


def _wgrad(a: SimpleNamespace) -> Traffic:
    return Traffic(_bytes(a.dz, a.sign, a.y) + _reached_bytes(a) + _weight_gradient_bytes(a), _flops(a))


def _bprop(a: SimpleNamespace) -> Traffic:
    read = _bytes(a.x) if a.scale is not None and a.skip is not None else _reached_bytes(a)
    operands = _bytes(a.dz, a.sign, a.y, a.weight, a.skip, a.skip_sign)
    return Traffic(operands + read + _bytes(a.x) + _weight_gradient_bytes(a), 2 * _flops(a))


# --- batch norm -------------------------------------------------------------------------------------------------------


def _statistics(a: SimpleNamespace) -> Traffic:
    return Traffic(_bytes(a.y), 0)


def _vectors(results: int) -> Callable[[SimpleNamespace], Traffic]:
    """An op on vectors: all that is given, and ``results`` vectors of the channels of ``mean``."""

    def rule(a: SimpleNamespace) -> Traffic:
        given = [value for value in vars(a).values() if isinstance(value, torch.Tensor)]
        return Traffic(_bytes(*given) + results * a.mean.shape[-1] * a.mean.element_size(), 0)

    return rule


# --- block end --------------------------------------------------------------------------------------------------------


def _end_forward(a: SimpleNamespace) -> Traffic:
    shortcut = a.shortcut if a.mix[2] or a.mix[3] else None
    bits = math.ceil(a.y.numel() / 8) if a.mask else 0
    return Traffic(_bytes(a.y, shortcut, a.gate) + _bytes(a.y) + bits, 0)


def _end_backward(a: SimpleNamespace) -> Traffic:
    _, branch_gate, shortcut, shortcut_gate = a.mix
    # F and S are read where the gate's or a slope's gradient, a ReLU's mask or a norm's sums depend on them.
    reads_y = a.mean is not None or a.branch_relu or a.slope is not None or (a.need_gate and branch_gate)
    reads_shortcut = a.shortcut_mean is not None or (
        (a.slope is not None and (shortcut or shortcut_gate)) or (a.need_gate and shortcut_gate)
    )
    read = _bytes(a.dout, a.sign, a.y if reads_y else None, a.shortcut if reads_shortcut else None, a.gate)
    gate = a.gate.numel() * (8 if a.y.dtype == torch.float64 else 4) if a.need_gate else 0
    return Traffic(read + _bytes(a.y) + (_bytes(a.shortcut) if a.need_shortcut else 0) + gate, 0)


def _end_mask(a: SimpleNamespace) -> Traffic:
    return Traffic(_bytes(a.dout, a.sign) + _bytes(a.dout), 0)


def _end_reduce(a: SimpleNamespace) -> Traffic:
    return Traffic(_bytes(a.dz, a.sign, a.y, a.shortcut), 0)


def _end_apply(a: SimpleNamespace) -> Traffic:
    y = None if a.b is None else a.y
    return Traffic(_bytes(a.dz, a.sign, y, a.skip, a.skip_sign) + _bytes(a.y), 0)


def _end_pool(a: SimpleNamespace) -> Traffic:
    pixels = a.y.shape[2] * a.y.shape[3]
    return Traffic(_bytes(a.y) + (_bytes(a.y) // pixels if pixels else 0), 0)


def _end_spread(a: SimpleNamespace) -> Traffic:
    return Traffic(_bytes(a.dz, a.dpool) + _bytes(a.dz), 0)


# --- stem -------------------------------------------------------------------------------------------------------------


def _pooled(size: int) -> int:
    return output_size(size, 3, 2, 1)


def _stem_forward(a: SimpleNamespace) -> Traffic:
    n, c, h, w = a.y.shape
    return Traffic(_bytes(a.y) + n * c * _pooled(h) * _pooled(w) * a.y.element_size(), 0)


def _stem_infer(a: SimpleNamespace) -> Traffic:
    n, c, *sizes = a.x.shape
    k, _, *kernel = a.weight.shape
    p, q = ((size + 2 * a.padding - r) // a.stride + 1 for size, r in zip(sizes, kernel, strict=True))
    pooled = n * k * _pooled(p) * _pooled(q) * a.x.element_size()
    return Traffic(_bytes(a.x, a.weight) + pooled, 2 * n * p * q * k * c * math.prod(kernel))


def _stem_reduce(a: SimpleNamespace) -> Traffic:
    return Traffic(_bytes(a.dout, a.y), 0)


def _stem_apply(a: SimpleNamespace) -> Traffic:
    return Traffic(_bytes(a.dout, a.y) + _bytes(a.y), 0)


def _stem_backward(a: SimpleNamespace) -> Traffic:
    return _stem_apply(a) if a.count is None else _stem_reduce(a) + _stem_apply(a)


_RULES: dict[str, Callable[[SimpleNamespace], Traffic]] = {
    "fprop": _fprop,
    "infer": _infer,
    "dgrad": _dgrad,
    "wgrad": _wgrad,
    "bprop": _bprop,
    "bn_statistics": _statistics,
    "bn_merge": _vectors(2),
    "bn_finalize": _vectors(5),
    "bn_coefficients": _vectors(3),
    "bn_add_relu_forward": _end_forward,
    "bn_add_relu_backward": _end_backward,
    "bn_add_relu_mask": _end_mask,
    "bn_add_relu_reduce": _end_reduce,
    "bn_add_relu_apply": _end_apply,
    "bn_add_relu_pool": _end_pool,
    "bn_add_relu_spread": _end_spread,
    "stem_forward": _stem_forward,
    "stem_infer": _stem_infer,
    "stem_reduce": _stem_reduce,
    "stem_apply": _stem_apply,
    "stem_backward": _stem_backward,
}
"""By direction for convolutions, by name for the rest."""
