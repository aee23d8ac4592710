"""A residual unit whose gate is computed from its branch (squeeze-and-excitation): two functions around the gate.

:class:`BranchFunction` hands out the last convolution's output in place of its normalised form: what comes back as its
gradient is that of ``bn(y)``, which is never written. :class:`EndFunction` is the other half of that agreement. Only
with a ReLU on the branch before the sum the branch is written: the gate's mean is that of the ReLU's output.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import ops
from resnet_fused.autograd import branch as branches
from resnet_fused.autograd import composition as compositions
from resnet_fused.autograd import end as ends
from resnet_fused.autograd.branch import INPUTS, Branch, BranchSpec, Incoming, Inputs, Wanted
from resnet_fused.autograd.end import EndSpec, Kept
from resnet_fused.autograd.layer import (
    TENSORS,
    Parameters,
    differentiable_backward,
    forced_backend,
    no_autocast,
    same_backend,
)
from resnet_fused.autograd.saved import RESULT, found_results, keep_parameters, keep_results, known
from resnet_fused.operands import Deferred, Gradient, Norm
from resnet_fused.reference import channels_last


class HalfSpec(NamedTuple):
    """What is fixed about :class:`BranchFunction`."""

    branch: BranchSpec
    relu: bool = False  # on the branch before the sum
    differentiable: bool = True  # whether a backward may follow (grad mode at the call)


class BranchFunction(torch.autograd.Function):
    """``(y, s, pooled, scale, shift, s_scale, s_shift, mean_0, var_0, ...)``.

    ``y`` (N, K, P, Q) stands for ``y * scale + shift``, its mean over pixels is ``pooled`` (N, K, 1, 1); ``s`` is the
    projection's output with its norm, or ``x``. Scales and shifts are empty where there is no norm.

    Args (of ``apply``): half: HalfSpec; *tensors: as for ResidualFunction, without the sum's norm.
    """

    @staticmethod
    def forward(ctx: Any, half: HalfSpec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        spec = half.branch
        inputs, flat = Inputs(*tensors[:INPUTS]), tensors[INPUTS:]  # type: ignore[arg-type]
        parameters = Parameters.split(flat)
        tiles = known(inputs.counts, inputs.mean, inputs.m2)
        branch = branches.forward(spec, inputs.x, inputs.shortcut, inputs.slope, tiles, parameters)
        last = branch.deferred(spec.last)
        projected = spec.projection is not None
        side = branch.ys[spec.last + 1] if projected else inputs.x.view_as(inputs.x)
        norms = [branch.norm(spec.last), branch.norm(spec.last + 1) if projected else None]
        needs_gradient = half.differentiable and any(ctx.needs_input_grad)
        sign = None
        if half.relu:
            norms[0] = None
            last, sign, _ = ops.bn_add_relu.forward(last, None, sign=needs_gradient)
        none = inputs.x.new_empty((0,))
        pairs = [(none, none) if norm is None else (norm.scale, norm.shift) for norm in norms]
        # Handed out and saved: an output that is also needed in backward has to be its own tensor under torch.compile.
        vectors = [v.clone() for pair in pairs for v in pair]
        moments = branches.moments(branch.results, parameters)
        ctx.mark_non_differentiable(*vectors, *moments)
        if needs_gradient:
            ctx.spec, ctx.backend = half, forced_backend()
            ctx.set_materialize_grads(False)
            kept = keep_parameters(spec.norms, flat)
            saved = (inputs.x, inputs.shortcut, inputs.slope, sign)
            made = branches.keep(spec, branch, parameters, lambda i: True)
            ctx.save_for_backward(*saved, *made, *keep_results(branch.results), *kept)
        y = last if isinstance(last, Tensor) else last.y
        return (y, side, ops.bn_add_relu.pool(last), *vectors, *moments)

    @staticmethod
    def backward(ctx: Any, df: Tensor | None, ds: Tensor | None, dpool: Tensor | None, *_: Any):
        spec: BranchSpec = ctx.spec.branch
        norms, made = len(spec.norms), branches.KEPT * len(spec.layers)
        x, shortcut, slope, sign, *rest = ctx.saved_tensors
        flat = rest[made + RESULT * norms :]
        inputs = Inputs(x, shortcut, None, slope)
        if df is None:  # EndFunction, the one reader of y, always has a gradient for it
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            synchronised = any(norm is not None and norm.group is not None for norm in spec.norms)
            return differentiable_backward(ctx, branch_composition, synchronised, [df, ds, dpool], (*inputs, *flat))
        results, parameters = found_results(rest[made : made + RESULT * norms]), Parameters.split(flat)
        with no_autocast(df), same_backend(ctx.backend):
            branch = branches.kept(spec, rest, x, parameters, results)
            needs = ctx.needs_input_grad[1:]
            each = [needs[i : i + TENSORS] for i in range(INPUTS, len(needs), TENSORS)]
            wanted = Wanted(spec, needs[0], None if shortcut is None else needs[1], needs[3], each)
            dz = channels_last(df)
            if dpool is not None:
                dz = ops.bn_add_relu.spread(dz, dpool)
            grad = Gradient(dz) if sign is None else ops.bn_add_relu.gradient(dz, sign)
            into = _incoming(grad, wanted, branch, spec.last)
            side = None
            if ds is not None:
                ds = channels_last(ds)
                projected = spec.projection is not None
                side = Incoming(Gradient(ds))
                if projected:
                    side = _incoming(side.grad, wanted, branch, spec.last + 1)
            keep = tuple(t for t in (df, ds) if t is not None)
            gradients = branches.backward(spec, wanted, branch, x, shortcut, slope, parameters, into, side, keep=keep)
        of_inputs = (gradients.x, gradients.shortcut, None, gradients.slope, None, None, None, None)
        return (None, *of_inputs, *(g for layer in gradients.parameters for g in layer))


def _incoming(grad: Gradient, wanted: Wanted, branch: Branch, i: int) -> Incoming:
    norm = branch.norm(i)
    if norm is None or not wanted.sums(i):
        return Incoming(grad)
    dbeta, dgamma, _ = ops.bn_add_relu.reduce(grad, branch.ys[i], norm)
    return Incoming(grad, 1.0, dbeta, dgamma)


def branch_composition(half: HalfSpec, *tensors: Any) -> tuple[Tensor, ...]:
    """The branch as PyTorch's own operators: (branch, shortcut, pooled)."""
    x, shortcut, _, slope, *_ = tensors[:INPUTS]
    f, s = compositions.branch(half.branch, x, shortcut, slope, Parameters.split(tensors[INPUTS:]))
    f = F.relu(f) if half.relu else f
    return f, s, f.mean((2, 3), keepdim=True)


class EndFunction(torch.autograd.Function):
    """``(out, [counts, mean, m2 of out])``: a unit's end, given the gate.

    Args (of ``apply``):
        spec: EndSpec without a norm of the sum.
        y, s, scale, shift, s_scale, s_shift: of :class:`BranchFunction`; ``s`` without norm may be any shortcut.
        gate: broadcasts against the sum.
        slope: of the PReLU at the end, (1,) or (C,), or None.
    """

    @staticmethod
    def forward(ctx: Any, spec: EndSpec, y, s, scale, shift, s_scale, s_shift, gate, slope) -> tuple[Tensor, ...]:
        branch = Deferred(y, scale, shift) if scale.numel() else y
        shortcut = Deferred(s, s_scale, s_shift) if s_scale.numel() else s
        needs_gradient = any(ctx.needs_input_grad)
        end = ends.forward(spec, branch, shortcut, gate, slope, None, sign=needs_gradient)
        statistics = end.tiles if spec.statistics else ()
        ctx.mark_non_differentiable(*statistics)
        if needs_gradient:
            ctx.spec, ctx.backend = spec, forced_backend()
            ctx.save_for_backward(y, s, scale, shift, s_scale, s_shift, gate, slope, end.kept.sign)
        return (end.out, *statistics)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        spec: EndSpec = ctx.spec
        *inputs, sign = ctx.saved_tensors
        y, s, scale, shift, s_scale, s_shift, gate, slope = inputs
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return differentiable_backward(ctx, end_composition, False, [dout], inputs)
        _, _, need_s, _, _, _, _, need_gate, need_slope = ctx.needs_input_grad
        with no_autocast(dout), same_backend(ctx.backend):
            # No sums are asked for, so mean and rstd are not read.
            norm = Norm(scale, shift, scale, scale) if scale.numel() else None
            side = Norm(s_scale, s_shift, s_scale, s_scale) if s_scale.numel() else None
            found = ends.backward(
                spec,
                channels_last(dout),
                Kept(sign),
                (y, norm),
                None if s is None else (s, side),
                gate,
                slope,
                None,
                sums=False,
                shortcut_sums=False,
                need_shortcut=need_s,
                need_gate=need_gate,
                need_slope=need_slope,
                need_post=(False,) * TENSORS,
            )
        ds = None if found.shortcut is None else found.shortcut.grad.dz
        return None, found.branch.grad.dz, ds if need_s else None, None, None, None, None, found.gate, found.slope


def _stands_for(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``y * scale + shift`` in value, whose gradient is ``y``'s as :class:`BranchFunction` takes it."""
    if not scale.numel():
        return y
    value = y.detach() * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    return y + (value.to(y.dtype) - y.detach())


def end_composition(spec: EndSpec, y, s, scale, shift, s_scale, s_shift, gate, slope) -> tuple[Tensor]:
    """The end as PyTorch's own operators."""
    shortcut = None if s is None else _stands_for(s, s_scale, s_shift)
    return (compositions.end(spec, _stands_for(y, scale, shift), shortcut, gate, slope, None),)
