"""The sequence of PyTorch's operators that each op replaces, channels_last, as eager autograd runs it.

What eager keeps from its forward (the activation that a convolution read, the output of a ReLU, the indices of a pool)
or hands from one backward to the next (``dy``, for wgrad) is made beforehand and not timed. On CUDA the passes of a
batch norm are the kernels that PyTorch's own batch norm launches; the CPU has no such single passes, there they are
pointwise operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import reference

EPS = 1e-5
Outputs = dict[str, Tensor]
Call = Callable[[], Outputs]
POOL = reference.POOL


def prepare(op: str, a: Any) -> Call:
    """The sequence for one call of ``op``, whose arguments ``a`` has as attributes.

    Raises:
        NotImplementedError: there is none.
    """
    stem, _, direction = op.rpartition("_")
    function = _CONVS.get(direction) if stem.startswith("conv") else _OTHERS.get(op)
    if function is None:
        raise NotImplementedError(f"{op}: expected an op that eager PyTorch has a sequence for")
    return function(a)


# --- passes ---------------------------------------------------------------------------------------------------------


def normaliser(scale: Tensor | None, shift: Tensor | None) -> Callable[[Tensor], Tensor]:
    """``y * scale + shift`` per channel in one pass: a batch norm of mean 0 and variance 1."""
    if scale is None:
        return lambda y: y
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale) - EPS
    return lambda y: F.batch_norm(y, zeros, ones, scale, shift, False, 0.0, EPS)


def moments(y: Tensor) -> Outputs:
    """Mean and biased variance per channel, as a training batch norm takes them."""
    mean, var = torch.batch_norm_update_stats(y, None, None, 0.1)
    return {"mean": mean, "var": var}


def output_gradient(a: Any) -> Callable[[Tensor], Tensor]:
    """``a * dz + b * y + c``: the last pass of a batch norm's backward."""
    if a.a is None:
        return lambda dz: dz
    if a.b is None:
        return normaliser(a.a, torch.zeros_like(a.a))
    if a.y.is_cuda:
        # PyTorch's kernel computes weight * rstd * (dz - sum / n - (y - mean) * rstd^2 * product / n).
        zeros, ones = torch.zeros_like(a.a), torch.ones_like(a.a)
        one = torch.ones(1, dtype=torch.int32, device=a.y.device)
        total, product = -a.c / a.a, -a.b / a.a
        return lambda dz: torch.batch_norm_backward_elemt(dz, a.y, zeros, ones, a.a, total, product, one)
    va, vb, vc = (reference.per_channel(v).to(a.y.dtype) for v in (a.a, a.b, a.c))
    return lambda dz: torch.addcmul(torch.addcmul(vc, a.y, vb), dz, va)


def reducer(y: Tensor, mean: Tensor, rstd: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """``(dbeta, dgamma)`` from ``dz``: the first pass of a batch norm's backward."""
    ones = torch.ones_like(mean)
    if y.is_cuda:

        def on_gpu(dz: Tensor) -> tuple[Tensor, Tensor]:
            _, _, dgamma, dbeta = torch.batch_norm_backward_reduce(dz, y, mean, rstd, ones, True, True, True)
            return dbeta, dgamma

        return on_gpu

    def on_cpu(dz: Tensor) -> tuple[Tensor, Tensor]:
        _, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
            dz, y, ones, None, None, mean, rstd, True, EPS, [False, True, True]
        )
        return dbeta, dgamma

    return on_cpu


def relu_output(sign: Tensor | None, like: Tensor) -> Tensor | None:
    """The output of the ReLU whose mask ``sign`` is."""
    if sign is None or sign.dtype != torch.uint8:
        return sign
    return reference.unpack_mask(sign, like).to(like.dtype)


def masker(sign: Tensor | None, like: Tensor) -> Callable[[Tensor], Tensor]:
    """The backward of the ReLU whose mask ``sign`` is, from its output."""
    out = relu_output(sign, like)
    return (lambda dout: dout) if out is None else (lambda dout: torch.ops.aten.threshold_backward(dout, out, 0))


# --- convolutions ---------------------------------------------------------------------------------------------------


def _activation(a: Any) -> Callable[[], Tensor]:
    """What the convolution reads."""
    if a.scale is None:
        return lambda: a.x
    norm = normaliser(a.scale, a.shift)
    if a.slope is not None:
        slope = a.slope.to(a.x.dtype)
        return lambda: F.prelu(norm(a.x), slope)
    return lambda: norm(a.x).relu_()


def _geometry(a: Any) -> tuple[int, int, int, int]:
    return a.stride, a.dilation * (a.weight.shape[-1] - 1) // 2, a.dilation, a.groups


def _fprop(a: Any) -> Call:
    read, geometry = _activation(a), _geometry(a)

    def call() -> Outputs:
        y = F.conv2d(read(), a.weight, None, *geometry)
        return {"y": y, **moments(y)} if a.statistics else {"y": y}

    return call


def _infer(a: Any) -> Call:
    read, geometry = _activation(a), _geometry(a)
    norm = normaliser(torch.ones_like(a.bias), a.bias)
    slope = None if a.out_slope is None else a.out_slope.to(a.x.dtype)

    def call() -> Outputs:
        y = norm(F.conv2d(read(), a.weight, None, *geometry))
        y = y if a.residual is None else y.add_(a.residual)
        return {"y": F.prelu(y, slope) if slope is not None else y.relu_() if a.relu else y}

    return call


def _backward(a: Any, dy: Tensor, x: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, groups = _geometry(a)
    sizes = [stride] * 2, [padding] * 2, [dilation] * 2
    return torch.ops.aten.convolution_backward(dy, x, a.weight, None, *sizes, False, [0, 0], groups, [*mask, False])[:2]


def _gradients(a: Any, *, dw: bool) -> Call:
    """dgrad, with wgrad beside it if ``dw``."""
    if a.slope is not None:
        raise NotImplementedError("dgrad through a PReLU: eager PyTorch's sequence is not timed")
    mask, form, skip_mask = masker(a.sign, a.dz), output_gradient(a), masker(a.skip_sign, a.skip)
    z = _activation(a)()
    sums = None if a.mean is None else reducer(a.x, a.mean, a.rstd)

    def call() -> Outputs:
        dx, dweight = _backward(a, form(mask(a.dz)), z, [True, dw])
        if a.skip is not None:
            dx = dx.add_(skip_mask(a.skip), alpha=a.skip_scale)
        if a.scale is not None:
            dx = torch.ops.aten.threshold_backward(dx, z, 0)
        found = {"dx": dx}
        if dw:
            found["dw"] = dweight
        if sums is not None:
            found["dbeta"], found["dgamma"] = sums(dx)
        return found

    return call


def _wgrad(a: Any) -> Call:
    dy, z = output_gradient(a)(masker(a.sign, a.dz)(a.dz)), _activation(a)()
    return lambda: {"dw": _backward(a, dy, z, [False, True])[1]}


_CONVS: dict[str, Callable[[Any], Call]] = {
    "fprop": _fprop,
    "infer": _infer,
    "dgrad": lambda a: _gradients(a, dw=False),
    "wgrad": _wgrad,
    "bprop": lambda a: _gradients(a, dw=True),
}

# --- the block's end ------------------------------------------------------------------------------------------------


def _mixed(a: Any) -> Callable[[Tensor, Tensor | None], Tensor]:
    """``F`` and ``S`` added with their weights; ``F`` may be written over."""
    plain = tuple(a.mix) == (1.0, 0.0, 1.0, 0.0)
    gate = None if a.gate is None else a.gate.to(a.y.dtype)
    branch, shortcut = ((weight + by_gate * gate if by_gate else weight) for weight, by_gate in (a.mix[:2], a.mix[2:]))

    def add(f: Tensor, s: Tensor | None) -> Tensor:
        if s is None:
            return f if plain else branch * f
        # A norm's output is eager's own to write over; a plain branch is kept.
        return (f.add_(s) if a.scale is not None else f + s) if plain else branch * f + shortcut * s

    return add


def _end_forward(a: Any) -> Call:
    first, second, add = normaliser(a.scale, a.shift), normaliser(a.shortcut_scale, a.shortcut_shift), _mixed(a)
    slope = None if a.slope is None else a.slope.to(a.y.dtype)

    def call() -> Outputs:
        f = first(a.y)
        f = f.relu() if a.branch_relu else f
        total = add(f, None if a.shortcut is None else second(a.shortcut))
        out = F.prelu(total, slope) if slope is not None else total.relu() if a.relu else total
        return {"out": out, **moments(out)} if a.statistics else {"out": out}

    return call


def _end_backward(a: Any) -> Call:
    if a.slope is not None or a.branch_relu:
        raise NotImplementedError("a block's end with PReLU or branch_relu: eager PyTorch's sequence is not timed")
    mask = masker(a.sign, a.dout)
    f, s = normaliser(a.scale, a.shift)(a.y), None
    if a.shortcut is not None:
        s = normaliser(a.shortcut_scale, a.shortcut_shift)(a.shortcut)
    gate = 1.0 if a.gate is None else a.gate.to(a.y.dtype)
    branch, shortcut = a.mix[0] + a.mix[1] * gate, a.mix[2] + a.mix[3] * gate
    sums = None if a.mean is None else reducer(a.y, a.mean, a.rstd)
    shortcut_sums = None if a.shortcut_mean is None else reducer(a.shortcut, a.shortcut_mean, a.shortcut_rstd)

    def call() -> Outputs:
        g = mask(a.dout)
        found = {"dz": g * branch}
        dshortcut = g * shortcut if a.need_shortcut or shortcut_sums is not None else None
        if a.need_shortcut:
            found["dshortcut"] = dshortcut
        if sums is not None:
            found["dbeta"], found["dgamma"] = sums(found["dz"])
        if shortcut_sums is not None:
            found["shortcut_dbeta"], found["shortcut_dgamma"] = shortcut_sums(dshortcut)
        if a.need_gate:
            terms = [weight * t for weight, t in ((a.mix[1], f), (a.mix[3], s)) if weight and t is not None]
            found["dgate"] = (g * sum(terms)).sum_to_size(a.gate.shape)
        return found

    return call


def _end_mask(a: Any) -> Call:
    mask = masker(a.sign, a.dout)
    return lambda: {"dz": mask(a.dout)}


def _end_reduce(a: Any) -> Call:
    mask, sums = masker(a.sign, a.dz), reducer(a.y, a.mean, a.rstd)
    second = None if a.shortcut is None else reducer(a.shortcut, a.shortcut_mean, a.shortcut_rstd)

    def call() -> Outputs:
        g = mask(a.dz)
        dbeta, dgamma = sums(g)
        found = {"dbeta": dbeta, "dgamma": dgamma}
        return found if second is None else found | {"shortcut_dgamma": second(g)[1]}

    return call


def _end_apply(a: Any) -> Call:
    mask, form, skip_mask = masker(a.sign, a.dz), output_gradient(a), masker(a.skip_sign, a.skip)

    def call() -> Outputs:
        dy = form(mask(a.dz))
        if a.skip is not None:
            dy = torch.add(dy, skip_mask(a.skip), alpha=a.skip_scale)
        return {"dy": dy}

    return call


def _end_pool(a: Any) -> Call:
    norm = normaliser(a.scale, a.shift)
    return lambda: {"pool": norm(a.y).mean((2, 3), keepdim=True)}


def _end_spread(a: Any) -> Call:
    pixels = a.dz.shape[2] * a.dz.shape[3]
    return lambda: {"dz": torch.add(a.dz, a.dpool.to(a.dz.dtype), alpha=1 / pixels)}


# --- the stem -------------------------------------------------------------------------------------------------------


def _stem_forward(a: Any) -> Call:
    norm = normaliser(a.scale, a.shift)
    return lambda: {"out": F.max_pool2d(norm(a.y).relu_(), 3, 2, 1)}


def _stem_infer(a: Any) -> Call:
    norm = normaliser(torch.ones_like(a.bias), a.bias)

    def call() -> Outputs:
        return {"out": F.max_pool2d(norm(F.conv2d(a.x, a.weight, None, a.stride, a.padding)).relu_(), 3, 2, 1)}

    return call


def _through_pool(a: Any) -> Callable[[], Tensor]:
    """``dout`` taken back through the pool and the ReLU."""
    z = normaliser(a.scale, a.shift)(a.y).relu_()
    _, index = torch.ops.aten.max_pool2d_with_indices(z, *POOL)

    def dz() -> Tensor:
        dact = torch.ops.aten.max_pool2d_with_indices_backward(a.dout, z, *POOL, index)
        return torch.ops.aten.threshold_backward(dact, z, 0)

    return dz


def _stem_reduce(a: Any) -> Call:
    dz, sums = _through_pool(a), reducer(a.y, a.mean, a.rstd)

    def call() -> Outputs:
        dbeta, dgamma = sums(dz())
        return {"dbeta": dbeta, "dgamma": dgamma}

    return call


def _stem_apply(a: Any) -> Call:
    dz, form = _through_pool(a), output_gradient(a)
    return lambda: {"dy": form(dz())}


def _stem_backward(a: Any) -> Call:
    if a.count is None:
        raise NotImplementedError("the stem's backward with frozen statistics: eager PyTorch's sequence is not timed")
    dz = _through_pool(a)

    def call() -> Outputs:
        dy, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
            dz(), a.y, a.weight, None, None, a.mean, a.rstd, True, EPS, [True, True, True]
        )
        return {"dy": dy, "dbeta": dbeta, "dgamma": dgamma}

    return call


_OTHERS: dict[str, Callable[[Any], Call]] = {
    "bn_statistics": lambda a: lambda: moments(a.y),
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
