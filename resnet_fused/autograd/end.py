"""The end of a residual unit: branch and shortcut weighed and added, then ReLU, PReLU, norm + ReLU, or nothing."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from resnet_fused import ops
from resnet_fused.autograd.branch import Incoming, slope_gradient, slopes
from resnet_fused.autograd.layer import TENSORS, NormResult, NormSpec, Parameters, normalise
from resnet_fused.autograd.norm_relu import norm_relu_backward
from resnet_fused.operands import Deferred, Gradient, Mix, Norm, TileStatistics


class EndSpec(NamedTuple):
    """What is fixed about a unit's end."""

    mix: Mix = Mix()
    shortcut: bool = True  # whether the sum has one; a plain network's has not
    branch_relu: bool = False  # a ReLU on the branch before the sum
    post: NormSpec | None = None  # a norm of the sum
    relu: bool = True  # at the very end; a PReLU's slope takes its place
    statistics: bool = False  # of the output, for the unit that reads it


class Kept(NamedTuple):
    """What forward keeps for backward."""

    sign: Tensor | None
    total: Tensor | None = None  # the sum, where a norm follows
    post: NormResult | None = None


class End(NamedTuple):
    """What forward made."""

    out: Tensor
    kept: Kept
    tiles: TileStatistics


def forward(
    spec: EndSpec,
    branch: Tensor | Deferred,
    shortcut: Tensor | Deferred | None,
    gate: Tensor | None,
    slope: Tensor | None,
    post: Parameters | None,
    *,
    sign: bool,
) -> End:
    """One pass, or two with a norm of the sum: its statistics come with the first."""
    y = branch if isinstance(branch, Tensor) else branch.y
    mixed: dict[str, Any] = {"mix": spec.mix, "gate": gate, "branch_relu": spec.branch_relu}
    added = shortcut if spec.shortcut else None
    if spec.post is None or post is None:
        out, bits, tiles = ops.bn_add_relu.forward(
            branch,
            added,
            sign=sign and spec.relu,
            relu=spec.relu,
            slope=slopes(slope, y),
            statistics=spec.statistics,
            **mixed,
        )
        return End(out, Kept(bits), tiles)
    batch = not spec.post.frozen
    total, _, tiles = ops.bn_add_relu.forward(branch, added, sign=False, relu=False, statistics=batch, **mixed)
    result = normalise(spec.post, post.norm, tiles, total.dtype)
    normed = Deferred(total, result.norm.scale, result.norm.shift)
    out, bits, tiles = ops.bn_add_relu.forward(
        normed, None, sign=sign and spec.relu, relu=spec.relu, statistics=spec.statistics
    )
    return End(out, Kept(bits, total, result), tiles)


def materialises(spec: EndSpec, gate: Tensor | None, slope: Tensor | None) -> bool:
    """Whether backward writes the branch's gradient and may read what was added; elsewhere only norms' sums read it."""
    return gate is not None or spec.branch_relu or slope is not None


class EndGradients(NamedTuple):
    """Gradients of what a unit's end read."""

    branch: Incoming
    shortcut: Incoming | None
    gate: Tensor | None
    slope: Tensor | None
    post: tuple[Tensor | None, ...]  # as Parameters


def backward(
    spec: EndSpec,
    dout: Tensor,
    kept: Kept,
    branch: tuple[Tensor, Norm | None],
    shortcut: tuple[Tensor, Norm | None] | None,
    gate: Tensor | None,
    slope: Tensor | None,
    post: Parameters | None,
    *,
    sums: bool,
    shortcut_sums: bool,
    need_shortcut: bool,
    need_gate: bool,
    need_slope: bool,
    need_post: tuple[bool, ...],
) -> EndGradients:
    """Back to the norms' outputs: pending where the ops can form it as they read, materialised in one pass elsewhere.

    Args:
        dout: channels_last.
        kept: forward's.
        branch, shortcut: the tensors that were added, with their norms.
        sums, shortcut_sums: whether the sums of these norms' backward are wanted.
    """
    sign = kept.sign
    dpost: tuple[Tensor | None, ...] = (None,) * TENSORS
    if kept.post is not None and spec.post is not None and post is not None:
        assert kept.total is not None
        dout, dpost = norm_relu_backward(spec.post, dout, sign, kept.total, kept.post, post, need_post)
        sign = None
    y, norm = branch
    added, added_norm = shortcut if shortcut is not None and spec.shortcut else (None, None)
    if materialises(spec, gate, slope):
        found = ops.bn_add_relu.backward(
            dout,
            sign,
            y,
            norm,
            added,
            added_norm,
            mix=spec.mix,
            gate=gate,
            branch_relu=spec.branch_relu,
            slope=slopes(slope, y),
            sums=sums or shortcut_sums,
            need_shortcut=need_shortcut and added is not None,
            need_gate=need_gate,
        )
        into_branch = Incoming(Gradient(found.dz), 1.0, found.dbeta, found.dgamma)
        into_shortcut = None
        if found.dshortcut is not None:
            into_shortcut = Incoming(Gradient(found.dshortcut), 1.0, found.shortcut_dbeta, found.shortcut_dgamma)
        dgate = None if found.dgate is None or gate is None else found.dgate.to(gate.dtype)
        dslope = slope_gradient([found.dslope], slope, need_slope)
        return EndGradients(into_branch, into_shortcut, dgate, dslope, dpost)

    grad = Gradient(dout) if sign is None else ops.bn_add_relu.gradient(dout, sign)
    dbeta = dgamma = shortcut_dgamma = None
    if sums and norm is not None:
        other = (added, added_norm) if shortcut_sums else ()
        dbeta, dgamma, shortcut_dgamma = ops.bn_add_relu.reduce(grad, y, norm, *other)
    elif shortcut_sums and added is not None and added_norm is not None:
        dbeta, shortcut_dgamma, _ = ops.bn_add_relu.reduce(grad, added, added_norm)
    mix = spec.mix
    into_branch = Incoming(grad, mix.branch, _times(dbeta, mix.branch), _times(dgamma, mix.branch))
    into_shortcut = None
    if added is not None:
        factor = mix.shortcut
        own = dbeta.clone() if sums and shortcut_sums and dbeta is not None else dbeta  # two parameters' gradients
        into_shortcut = Incoming(grad, factor, _times(own, factor), _times(shortcut_dgamma, factor))
    return EndGradients(into_branch, into_shortcut, None, None, dpost)


def _times(t: Tensor | None, factor: float) -> Tensor | None:
    return t if t is None or factor == 1 else t * factor
