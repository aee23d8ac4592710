"""``bn_add_relu`` in PyTorch's passes.

The plain sum ``relu(y * scale + shift + shortcut)`` rounds as PyTorch's own composition does. Everything else is
computed in fp32 (fp64) and rounded once: PyTorch's kernels read operands of unlike dtypes without a pass of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import backends
from resnet_fused.aten.batch_norm import statistics as tile_statistics
from resnet_fused.aten.pointwise import affine, factored, masked, output_gradient, prelu, prelu_backward, sums
from resnet_fused.reference import channels_last, compute_dtype, no_statistics, pack_mask, per_channel, store


def forward(
    y, scale, shift, shortcut, shortcut_scale, shortcut_shift, gate, mix, branch_relu, relu, slope, mask, statistics
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The plain sum is the norm with the addition, the shift, the ReLU; a deferred shortcut is materialised first."""
    if scale is not None and gate is None and slope is None and relu and not branch_relu and _adds(mix, shortcut):
        if shortcut_scale is not None:
            shortcut = affine(shortcut, shortcut_scale, shortcut_shift, relu=False)
        out = affine(y, scale, shift, other=shortcut, relu=True)
    else:
        f = _branch(y, scale, shift, relu=branch_relu, wide=slope is not None)
        s = _shortcut(shortcut, shortcut_scale, shortcut_shift, mix)
        own = f is not y and f.dtype == compute_dtype(y.dtype)
        total = _sum(f, s, *_weights(mix, gate), into=f if own else None)
        if slope is not None:
            total = prelu(total, slope)
        elif relu:
            total = F.relu(total) if total is y else total.relu_()
        out = _own(total.to(y.dtype), y)
    bits = pack_mask(~(out <= 0)) if mask else out.new_empty((0,), dtype=torch.uint8)
    return (out, bits, *(tile_statistics(out) if statistics else no_statistics(out)))


def _adds(mix, shortcut) -> bool:
    """Whether nothing is weighed."""
    return mix[0] == 1 and (shortcut is None or mix[2] == 1)


def _weights(mix, gate) -> tuple[Any, Any]:
    """The weights of branch and shortcut: numbers where the gate plays no part, else a pass over the gate at most."""

    def weight(constant: float, factor: float) -> Any:
        if factor == 0:
            return constant
        wide = gate.to(compute_dtype(gate.dtype))
        return wide if constant == 0 and factor == 1 else torch.rsub(wide, constant, alpha=-factor)

    branch, branch_gate, shortcut, shortcut_gate = mix
    return weight(branch, branch_gate), weight(shortcut, shortcut_gate)


def _is_one(weight: Any) -> bool:
    return not isinstance(weight, Tensor) and weight == 1


def _branch(y, scale, shift, *, relu: bool, wide: bool) -> Tensor:
    """F in the accumulation dtype; unless ``wide`` a ``y`` without a norm keeps its own."""
    if scale is not None:
        f = torch.addcmul(per_channel(shift), y, per_channel(scale))
        return f.relu_() if relu else f
    f = y.to(compute_dtype(y.dtype)) if wide else y
    return F.relu(f) if relu else f


def _shortcut(shortcut, scale, shift, mix) -> Tensor | None:
    """S, None where nothing is added."""
    if shortcut is None or not (mix[2] or mix[3]):
        return None
    return shortcut if scale is None else torch.addcmul(per_channel(shift), shortcut, per_channel(scale))


def _sum(f: Tensor, s: Tensor | None, branch: Any, shortcut: Any, *, into: Tensor | None = None) -> Tensor:
    """``branch * f + shortcut * s``, written to ``into`` if given; it is ``f`` itself where nothing changes that."""
    if s is None:
        return f if _is_one(branch) else torch.mul(f, branch, out=into)
    if _is_one(shortcut):
        f, s, shortcut = s, f, branch
    elif not _is_one(branch):
        f = into = torch.mul(f.to(compute_dtype(f.dtype)), branch, out=into)
    if isinstance(shortcut, Tensor):
        return torch.addcmul(f, s, shortcut, out=into)
    return torch.add(f, factored(s, shortcut), alpha=shortcut, out=into)


def _own(t: Tensor, *others: Tensor) -> Tensor:
    """``t`` in channels_last, copied where it is one of ``others``."""
    t = channels_last(t)
    return t.clone() if any(t is other for other in others) else t


def backward(
    dout, sign, y, scale, shift, mean, rstd, shortcut, shortcut_scale, shortcut_shift, shortcut_mean, shortcut_rstd,
    gate, mix, branch_relu, slope, need_shortcut, need_gate,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A pass for the activation, one for each weight that is not 1, one for the gate and one for each pair of sums."""
    none = y.new_empty((0,), dtype=compute_dtype(y.dtype))
    branch, factor = _weights(mix, gate)
    f: Any = None
    s = None
    if branch_relu or need_gate or slope is not None:
        f = _branch(y, scale, shift, relu=branch_relu, wide=need_gate or slope is not None)
    if need_gate or slope is not None:
        s = _shortcut(shortcut, shortcut_scale, shortcut_shift, mix)
    dtotal, dslope = masked(dout, sign), none.clone()
    if slope is not None:
        dtotal, dslope = prelu_backward(dtotal, _sum(f, s, branch, factor), slope)

    df = torch.ops.aten.threshold_backward(dtotal, f, 0) if branch_relu else dtotal
    dz = _own(_weighted(df, branch, y.dtype), dout)
    norm_sums = (none, none.clone()) if mean is None else sums(dz, y, mean, rstd)
    dshortcut, shortcut_sums = y.new_empty((0,)), (none.clone(), none.clone())
    if need_shortcut or shortcut_mean is not None:
        ds = _weighted(dtotal, factor, shortcut.dtype)
        if shortcut_mean is not None:
            shortcut_sums = sums(ds, shortcut, shortcut_mean, shortcut_rstd)
        if need_shortcut:
            dshortcut = _own(ds, dout, dz)
    dgate = _gate_gradient(dtotal, f, s, mix, gate) if need_gate else none.clone()
    return dz, dshortcut, *norm_sums, *shortcut_sums, dgate, dslope


def _weighted(t: Tensor, weight: Any, dtype: torch.dtype) -> Tensor:
    """``t * weight`` in ``dtype``, rounded once; ``t`` itself where nothing changes it."""
    if _is_one(weight):
        return channels_last(t.to(dtype))
    out = torch.empty(t.shape, dtype=dtype, device=t.device, memory_format=torch.channels_last)
    return torch.mul(t.to(torch.promote_types(t.dtype, dtype)), weight, out=out)


def _gate_gradient(dtotal: Tensor, f: Tensor, s: Tensor | None, mix, gate: Tensor) -> Tensor:
    """The sum of ``dtotal * (mix[1] * f + mix[3] * s)`` over what the gate is broadcast to; ``f`` is wide."""
    wide = f.dtype
    if mix[3] == 0 or s is None:
        read = f * mix[1]
    else:
        read = _sum(f, s, mix[1], mix[3]) if mix[1] else s.to(wide) * mix[3]
    product = dtotal.to(wide) * read
    return channels_last(product) if gate.shape == product.shape else store(product.sum_to_size(gate.shape), wide)


def mask(dout, sign) -> Tensor:
    """A threshold pass."""
    return channels_last(masked(dout, sign))


def reduce(dz, sign, y, mean, rstd, shortcut, shortcut_mean, shortcut_rstd) -> tuple[Tensor, Tensor, Tensor]:
    """One reduction for each norm."""
    g = masked(dz, sign)
    dbeta, dgamma = sums(g, y, mean, rstd)
    if shortcut is None:
        return dbeta, dgamma, dgamma.new_empty((0,))
    return dbeta, dgamma, sums(g, shortcut, shortcut_mean, shortcut_rstd)[1]


def apply(dz, sign, y, a, b, c, skip, skip_sign, skip_scale) -> Tensor:
    """Two passes, and one for the skip gradient."""
    skip = None if skip is None else masked(skip, skip_sign)
    return _own(output_gradient(dz, sign, y, a, b, c, y.dtype, skip=skip, skip_scale=skip_scale), dz)


def pool(y, scale, shift) -> Tensor:
    """One reduction; the norm is applied to the means."""
    mean = y.mean((2, 3), keepdim=True, dtype=compute_dtype(y.dtype))
    return store(mean if scale is None else torch.addcmul(per_channel(shift), mean, per_channel(scale)), y.dtype)


def spread(dz, dpool) -> Tensor:
    """One pass."""
    pixels = max(dz.shape[2] * dz.shape[3], 1)
    return channels_last(torch.add(dz, factored(dpool, 1 / pixels), alpha=1 / pixels).to(dz.dtype))


for _function in (forward, backward, mask, reduce, apply, pool, spread):
    backends.register(f"bn_add_relu_{_function.__name__}", "aten", _function)
