"""A residual unit as one function: the branch, then the end (:mod:`branch`, :mod:`end`).

The original unit (1512.03385) is ``relu(bn(conv(... relu(bn(conv(x))))) + shortcut)``: BasicBlock is a chain of two
convolutions, Bottleneck of three. Saved for backward are the input, each convolution's output, the per-channel norms
and the sign of the sum; a norm of the sum saves the sum, too. Of what the sum read nothing is saved that backward does
not read (under frozen norms, say), nor the outputs of the layers ``BranchSpec.recomputed``: those it computes again.
(The sum itself stays saved under its norm: it would cost the convolutions and one more pass.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused.autograd import branch as branches
from resnet_fused.autograd import composition as compositions
from resnet_fused.autograd import end as ends
from resnet_fused.autograd.branch import INPUTS, KEPT_INPUTS, Branch, BranchSpec, Inputs, Wanted
from resnet_fused.autograd.end import EndSpec, Kept
from resnet_fused.autograd.layer import (
    TENSORS,
    NormSpec,
    Parameters,
    differentiable_backward,
    forced_backend,
    no_autocast,
    planned,
    same_backend,
)
from resnet_fused.autograd.saved import RESULT, TILES, found_results, keep_parameters, keep_results, known
from resnet_fused.reference import channels_last


class ResidualSpec(NamedTuple):
    """What is fixed about a residual unit.

    The shortcut is what the projection makes of the branch's source, or of the ``shortcut`` tensor; without projection
    it is that tensor, and without either the unit's input.
    """

    branch: BranchSpec
    end: EndSpec = EndSpec()
    differentiable: bool = True  # whether a backward may follow (grad mode at the call)

    @property
    def norms(self) -> tuple[NormSpec | None, ...]:
        """Of the layers, the input and the sum: the order of the parameters."""
        return self.branch.norms if self.end.post is None else (*self.branch.norms, self.end.post)

    @property
    def moments(self) -> int:
        """Tensors: mean and variance of every norm with batch statistics."""
        return 2 * sum(norm is not None and not norm.frozen for norm in self.norms)

    def split(self, flat: Sequence[Any]) -> tuple[list[Any], Any]:
        """The branch's part of something that comes for each of ``norms``, and the sum's."""
        count = len(self.branch.norms)
        return list(flat[:count]), flat[count] if self.end.post is not None else None


class ResidualFunction(torch.autograd.Function):
    """``(out, [counts, mean, m2 of out,] mean_0, var_0, ...)``: output, its statistics if asked for, batch moments.

    Args (of ``apply``):
        spec: ResidualSpec.
        *tensors: Inputs, then for every norm of ``spec.norms`` TENSORS: its convolution's weight and bias (None for the
            norms of the input and the sum), weight, bias, running mean and variance of the norm.
    """

    @staticmethod
    def forward(ctx: Any, spec: ResidualSpec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        needs_gradient = spec.differentiable and any(ctx.needs_input_grad)
        found = planned(_forward, (spec, ctx.needs_input_grad[1:] if needs_gradient else None), tensors, spec.norms)
        handed_out = 1 + (TILES if spec.end.statistics else 0)
        made, moments = handed_out + spec.moments, found[handed_out : handed_out + spec.moments]
        ctx.mark_non_differentiable(*found[1:handed_out], *moments)
        if needs_gradient:
            ctx.spec, ctx.backend = spec, forced_backend()
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors[:KEPT_INPUTS], *found[made:], *keep_parameters(spec.norms, tensors[INPUTS:]))
        return (*found[:handed_out], *moments)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        spec: ResidualSpec = ctx.spec
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            synchronised = any(norm is not None and norm.group is not None for norm in spec.norms)
            inputs = (*Inputs(*saved[:KEPT_INPUTS]), *saved[len(saved) - TENSORS * len(spec.norms) :])
            return differentiable_backward(ctx, composition, synchronised, [dout], inputs)
        with no_autocast(dout), same_backend(ctx.backend):
            return (None, *planned(_backward, (spec, ctx.needs_input_grad[1:]), (dout, *saved), spec.norms))


def _forward(static: tuple[ResidualSpec, Sequence[bool] | None], *tensors: Any) -> tuple[Tensor | None, ...]:
    """The output, its statistics if asked for, the batch's moments, and what is kept: sign, sum, layers, norms."""
    spec, needs = static
    inputs, parameters = Inputs(*tensors[:INPUTS]), Parameters.split(tensors[INPUTS:])
    own, post = spec.split(parameters)
    tiles = known(inputs.counts, inputs.mean, inputs.m2)
    branch = branches.forward(spec.branch, inputs.x, inputs.shortcut, inputs.slope, tiles, own)
    end = ends.forward(
        spec.end,
        branch.deferred(spec.branch.last),
        _added(spec, branch, inputs),
        inputs.gate,
        inputs.end_slope,
        post,
        sign=needs is not None,
    )
    results = [*branch.results, *([] if end.kept.post is None else [end.kept.post])]
    statistics = end.tiles if spec.end.statistics else ()
    kept: tuple[Tensor | None, ...] = ()
    if needs is not None:
        made = branches.keep(spec.branch, branch, own, _reads(spec, inputs, _wanted(spec, inputs, needs)[0]))
        kept = (end.kept.sign, end.kept.total, *made, *keep_results(results))
    return (end.out, *statistics, *branches.moments(results, parameters), *kept)


def _added(spec: ResidualSpec, branch: Branch, inputs: Inputs):
    """What is added to the branch."""
    if spec.branch.projection is not None:
        return branch.deferred(spec.branch.last + 1)
    return inputs.x if inputs.shortcut is None else inputs.shortcut


def _wanted(spec: ResidualSpec, inputs: Inputs, needs: Sequence[bool]) -> tuple[Wanted, Any]:
    """Which gradients are asked for, of the branch and of the sum's norm; ``needs`` is flat, as the arguments are."""
    x, shortcut, _, slope, *_ = needs[:INPUTS]
    own, post = spec.split([needs[i : i + TENSORS] for i in range(INPUTS, len(needs), TENSORS)])
    return Wanted(spec.branch, x, None if inputs.shortcut is None else shortcut, slope, own), post


def _reads(spec: ResidualSpec, inputs: Inputs, wanted: Wanted) -> Callable[[int], bool]:
    """Whether backward reads the output of a layer, one of those that the sum reads."""
    materialised = ends.materialises(spec.end, inputs.gate, inputs.end_slope)
    return lambda i: materialised or wanted.sums(i)


def _backward(static: tuple[ResidualSpec, Any], dout: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the tensors that ``apply`` took, from those that forward kept."""
    spec, needs = static
    norms, made = len(spec.norms), branches.KEPT * len(spec.branch.layers)
    x, shortcut, gate, slope, end_slope, sign, total, *rest = saved
    inputs = Inputs(x, shortcut, gate, slope, end_slope)
    own, post = spec.split(Parameters.split(rest[made + RESULT * norms :]))
    results, post_result = spec.split(found_results(rest[made : made + RESULT * norms]))
    branch, kept = branches.kept(spec.branch, rest, x, own, results), Kept(sign, total, post_result)
    need = dict(zip(Inputs._fields, needs[:INPUTS], strict=True))
    wanted, post_needs = _wanted(spec, inputs, needs)
    last, projected = spec.branch.last, spec.branch.projection is not None
    dout = channels_last(dout)
    branches.recompute(spec.branch, branch, inputs.shortcut, inputs.slope, _reads(spec, inputs, wanted), dout)
    added = branch.ys[last + 1] if projected else inputs.x if inputs.shortcut is None else inputs.shortcut
    if projected:
        need_shortcut = wanted.shortcut or any(wanted.parameters[last + 1])
    else:
        need_shortcut = need["x" if inputs.shortcut is None else "shortcut"]
    found = ends.backward(
        spec.end,
        dout,
        kept,
        (branch.ys[last], branch.norm(last)),
        (added, branch.norm(last + 1) if projected else None),
        inputs.gate,
        inputs.end_slope,
        post,
        sums=wanted.sums(last),
        shortcut_sums=projected and wanted.sums(last + 1),
        need_shortcut=need_shortcut,
        need_gate=need["gate"],
        need_slope=need["end_slope"],
        need_post=post_needs or (False,) * TENSORS,
    )
    gradients = branches.backward(
        spec.branch,
        wanted,
        branch,
        inputs.x,
        inputs.shortcut,
        inputs.slope,
        own,
        found.branch,
        found.shortcut,
        keep=(dout,),
    )
    of_inputs = (gradients.x, gradients.shortcut, found.gate, gradients.slope, found.slope, None, None, None)
    of_parameters = [*gradients.parameters, *([] if post is None else [found.post])]
    return (*of_inputs, *(g for layer in of_parameters for g in layer))


# --- the same unit in differentiable PyTorch: double backward ---------------------------------------------------------


def composition(spec: ResidualSpec, *tensors: Any) -> tuple[Tensor]:
    """The unit as PyTorch's own operators, differentiable any number of times."""
    x, shortcut, gate, slope, end_slope, *_ = tensors[:INPUTS]
    own, post = spec.split(Parameters.split(tensors[INPUTS:]))
    f, s = compositions.branch(spec.branch, x, shortcut, slope, own)
    return (compositions.end(spec.end, f, s, gate, end_slope, post),)
