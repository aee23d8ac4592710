"""A fused block's training path: the deferred algorithm with its gradients, statistics of the batch or frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused.autograd.branch import BranchSpec, Inputs
from resnet_fused.autograd.end import EndSpec
from resnet_fused.autograd.gated import BranchFunction, EndFunction, HalfSpec
from resnet_fused.autograd.layer import Layer, no_autocast
from resnet_fused.autograd.norm_relu import NormReLUFunction, NormReLUSpec
from resnet_fused.autograd.residual import ResidualFunction, ResidualSpec
from resnet_fused.blocks import carried, norms
from resnet_fused.blocks.layout import channels_last, like_eager, operand_dtype
from resnet_fused.blocks.structure import (
    ConvNorm,
    Structure,
    chain_shape,
    check_batches,
    check_projection,
    geometry,
    mixture,
    promoted,
    sources,
)
from resnet_fused.operands import TileStatistics


def train(block: Any, structure: Structure, x: Tensor) -> Tensor:
    """The block's output for ``x``; moves running statistics as PyTorch does."""
    unit, dtype, read = structure.unit, operand_dtype(x), x
    check_batches(structure, tuple(x.shape))
    if structure.before is not None and unit.preactivated:
        # Modules of PyTorch's read the pre-activated tensor too, so it has to be written.
        read = F.relu(x) if unit.pre is None else norm_relu(unit.pre, x)
        structure = structure._replace(unit=unit._replace(pre=None, pre_relu=False))
    outside = _outside(structure, x, read)
    mixed = mixture(structure, x, outside, dtype)
    tiles = carried.received(x) if structure.unit.pre is not None and x.dtype == dtype else None
    inputs = Inputs(
        channels_last(read.to(dtype)),
        _shortcut(structure, x, outside, dtype),
        mixed.gate,
        None if unit.prelu is None else unit.prelu.weight,
        None if unit.end_prelu is None else unit.end_prelu.weight,
        *(tiles or ()),
    )
    emits = getattr(block, "emit_statistics", False) and block.training and not torch.compiler.is_compiling()
    branch = _branch_spec(structure, dtype, block._resnet_fused_memory)
    end = EndSpec(
        mixed.mix,
        unit.has_shortcut,
        unit.branch_relu,
        None if unit.post is None else norms.spec(unit.post),
        unit.relu,
        bool(emits),
    )
    if mixed.total is not None and mixed.gate is None:
        out, statistics, moments = _gated(structure, mixed.total, branch, end, inputs)
    else:
        spec = ResidualSpec(branch, end, torch.is_grad_enabled())
        with no_autocast(x):
            out, *moments = ResidualFunction.apply(spec, *_distinct([*inputs, *sources(structure)]))
        statistics, moments = (moments[:3], moments[3:]) if emits else (None, moments)
    _update(structure.norms, moments)
    out = like_eager(promoted(structure, out, outside), x, structure.chain)
    if statistics is not None:
        carried.hand_on(out, TileStatistics(*statistics))
    return out


def _distinct(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """``tensors``; while compiling, one that comes twice (tied parameters) comes as a view the second time."""
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Tensor | None] = []
    for t in tensors:
        found.append(t.view_as(t) if t is not None and any(t is other for other in found) else t)
    return found


def _gated(structure: Structure, total: Tensor, branch: BranchSpec, end: EndSpec, inputs: Inputs):
    """Branch, gate, end; a norm of the sum comes after."""
    x, post = inputs.x, structure.unit.post
    flat = sources(structure if post is None else structure._replace(unit=structure.unit._replace(post=None)))
    with no_autocast(x):
        branch = branch._replace(memory="save")  # the end reads what the branch made
        half = HalfSpec(branch, end.branch_relu, torch.is_grad_enabled())
        y, side, pooled, *vectors = BranchFunction.apply(half, *_distinct([*inputs, *flat]))
    vectors, moments = vectors[:4], vectors[4:]
    mixing = structure.unit.mixing
    assert mixing is not None
    gate = mixing.gate(pooled, total)
    if inputs.shortcut is not None and structure.projection is None:
        side = inputs.shortcut
    if not end.shortcut:
        side = None
    scale, shift, side_scale, side_shift = vectors
    plain = EndSpec(end.mix, end.shortcut, False, None, end.relu and post is None, end.statistics and post is None)
    with no_autocast(x):
        out, *statistics = EndFunction.apply(
            plain, y, side, scale, shift, side_scale, side_shift, gate, inputs.end_slope
        )
    if post is not None:
        out, *post_moments = _norm_relu(post, out, None)
        moments = [*moments, *post_moments]
    return out, statistics or None, moments


def _outside(structure: Structure, x: Tensor, read: Tensor) -> Tensor | None:
    """What PyTorch's modules make of the shortcut, if there are any."""
    outside = None
    if structure.before is not None:
        outside = structure.before(read)
    check_projection(structure, tuple((x if outside is None else outside).shape))
    return outside


def _shortcut(structure: Structure, x: Tensor, outside: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What the projection reads or the sum adds, where that is not the tensor that the branch has anyway."""
    projected = structure.projection is not None
    if outside is None and (projected or x.dtype == dtype or not structure.unit.has_shortcut):
        return None
    shortcut = x if outside is None else outside
    if projected:
        return channels_last(shortcut.to(dtype))
    return channels_last(shortcut.expand(chain_shape(structure, tuple(x.shape))))  # a sum broadcasts


def _branch_spec(structure: Structure, dtype: torch.dtype, memory: str) -> BranchSpec:
    unit = structure.unit
    return BranchSpec(
        tuple(_layer(pair) for pair in structure.chain),
        None if structure.projection is None else _layer(structure.projection),
        dtype,
        None if unit.pre is None else norms.spec(unit.pre),
        unit.pre_relu,
        memory,
    )


def _layer(pair: ConvNorm) -> Layer:
    conv, norm = pair
    return Layer(conv.kernel_size[0], geometry(conv), None if norm is None else norms.spec(norm))


def _update(modules: list[Any], moments: list[Tensor]) -> None:
    moved = [norm for norm in modules if norm is not None and norms.batch_statistics(norm)]
    norms.update_running(list(zip(moved, moments[::2], moments[1::2], strict=True)))


# --- a norm and its ReLU alone ----------------------------------------------------------------------------------------


def norm_relu(norm: Any, x: Tensor) -> Tensor:
    """``relu(norm(x))`` in one pass, running statistics included; ``x`` in any memory format."""
    norms.check_batch(norm, tuple(x.shape))
    with no_autocast(x):
        out, *moments = _norm_relu(norm, channels_last(x), carried.received(x))
    _update([norm], moments)
    return like_eager(out, x, ())


def _norm_relu(norm: nn.Module, x: Tensor, tiles: TileStatistics | None) -> tuple[Tensor, ...]:
    spec = NormReLUSpec(norms.spec(norm), torch.is_grad_enabled())
    return NormReLUFunction.apply(spec, x, *(tiles or (None, None, None)), *norms.parameters(norm))
