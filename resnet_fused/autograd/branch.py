"""The branch of a residual unit: a chain of convolutions with their norms, beside it the shortcut's projection.

The chain and the projection read the unit's input, or ``relu(input)``, or ``relu(bn(input))`` (pre-activated units of
arXiv 1603.05027). Forward writes each convolution's output once and no normalised tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import ops
from resnet_fused.autograd.layer import (
    TENSORS,
    Layer,
    NormResult,
    NormSpec,
    Parameters,
    conv_backward,
    like,
    normalise,
    output_gradient,
)
from resnet_fused.operands import Deferred, Gradient, Norm, TileStatistics
from resnet_fused.reference import compute_dtype


class BranchSpec(NamedTuple):
    """What is fixed about a branch.

    The projection reads what the chain reads, or the tensor that is given as ``shortcut``.
    """

    chain: tuple[Layer, ...]  # an activation between them
    projection: Layer | None
    dtype: torch.dtype  # of the convolutions' operands
    pre: NormSpec | None = None  # the chain reads relu(bn(x))
    pre_relu: bool = False  # the chain reads relu(x)
    memory: str = "save"  # of what the sum read: see `recomputed`

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.chain if self.projection is None else (*self.chain, self.projection)

    @property
    def norms(self) -> tuple[NormSpec | None, ...]:
        """Of the layers, then of the input: the order of the parameters."""
        norms = tuple(layer.norm for layer in self.layers)
        return norms if self.pre is None else (*norms, self.pre)

    @property
    def last(self) -> int:
        """Index of the chain's last layer."""
        return len(self.chain) - 1

    @property
    def recomputed(self) -> range:
        """Layers whose outputs are not saved: none, the projection, or the chain's last and the projection."""
        first = {"save": len(self.layers), "projections": len(self.chain), "recompute": self.last}[self.memory]
        return range(first, len(self.layers))


class Inputs(NamedTuple):
    """The tensors that a unit's functions take in front of the parameters."""

    x: Tensor  # (N, C, H, W) channels_last, dtype of the convolutions' operands
    shortcut: Tensor | None = None  # what the projection reads, or what is added, in the place of x
    gate: Tensor | None = None  # broadcasts against the sum
    slope: Tensor | None = None  # of the PReLU between convolutions, (1,) or (C,)
    end_slope: Tensor | None = None  # of the PReLU at the end
    counts: Tensor | None = None  # statistics of x where they are known: TileStatistics
    mean: Tensor | None = None
    m2: Tensor | None = None


INPUTS = len(Inputs._fields)
KEPT_INPUTS = INPUTS - 3  # for backward: without the statistics
KEPT = 2  # tensors of each layer, of `keep`


class Branch(NamedTuple):
    """What forward made."""

    source: Tensor | Deferred  # what the chain reads
    weights: list[Tensor]  # of each layer, in the operands' dtype
    ys: list[Tensor]  # output of each layer
    results: list[NormResult | None]  # of ``BranchSpec.norms``

    def deferred(self, i: int) -> Tensor | Deferred:
        """Output of layer ``i`` with its norm."""
        result = self.results[i]
        return self.ys[i] if result is None else Deferred(self.ys[i], result.norm.scale, result.norm.shift)

    def norm(self, i: int) -> Norm | None:
        result = self.results[i]
        return None if result is None else result.norm


def slopes(slope: Tensor | None, y: Tensor) -> Tensor | None:
    """A PReLU's one or C slopes as the vector (C,) that ops take."""
    return None if slope is None else slope.to(compute_dtype(y.dtype)).expand(y.shape[1]).contiguous()


def slope_gradient(dslopes: Sequence[Tensor | None], slope: Tensor | None, needed: bool) -> Tensor | None:
    """The gradient of a PReLU's parameter from those of the vectors made from it."""
    if slope is None or not needed:
        return None
    total: Tensor | None = None
    for dslope in dslopes:
        if dslope is not None and dslope.numel() > 0:
            part = dslope.sum(0, keepdim=True) if slope.numel() == 1 else dslope
            total = part if total is None else total + part
    return None if total is None else total.to(slope.dtype)


def _weights(parameters: Sequence[Parameters]) -> list[Tensor]:
    """Of the layers; the other norms have none."""
    return [p.conv_weight for p in parameters if p.conv_weight is not None]


def operands(dtype: torch.dtype, parameters: Sequence[Parameters]) -> list[Tensor]:
    """The layers' weights in ``dtype``; those that have another one are cast in one launch."""
    weights = _weights(parameters)
    own = {weight.dtype for weight in weights}
    if own == {dtype} or len(own) > 1 or torch.compiler.is_compiling():
        return [weight.to(dtype) for weight in weights]
    found = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    torch._foreach_copy_(found, weights)
    return found


def read_source(spec: BranchSpec, x: Tensor, pre: NormResult | None) -> Tensor | Deferred:
    """What the chain reads."""
    if pre is not None:
        return Deferred(x, pre.norm.scale, pre.norm.shift)
    if spec.pre_relu:
        one = x.new_ones(x.shape[1], dtype=compute_dtype(x.dtype))
        return Deferred(x, one, torch.zeros_like(one))
    return x


def layer_input(
    spec: BranchSpec, branch: Branch, i: int, shortcut: Tensor | None, slope: Tensor | None
) -> Tensor | Deferred:
    """What layer ``i`` reads."""
    if i > spec.last:
        return branch.source if shortcut is None else shortcut
    if i == 0:
        return branch.source
    found = branch.deferred(i - 1)
    return found._replace(slope=slopes(slope, found.y)) if isinstance(found, Deferred) else found


def forward(
    spec: BranchSpec,
    x: Tensor,
    shortcut: Tensor | None,
    slope: Tensor | None,
    tiles: TileStatistics | None,
    parameters: Sequence[Parameters],
) -> Branch:
    """Run the chain and the projection.

    Args:
        spec: BranchSpec.
        x: (N, C, H, W) channels_last.
        shortcut: what the projection reads, None for what the chain reads.
        slope: of the PReLU between the chain's layers, (1,) or (C,); None for the ReLU.
        tiles: statistics of ``x`` where they are known already, for ``spec.pre``.
        parameters: of ``spec.norms``.
    """
    results: list[NormResult | None] = [None] * len(parameters)
    if spec.pre is not None:
        if tiles is None and not spec.pre.frozen:
            tiles = ops.batch_norm.statistics(x)
        results[-1] = normalise(spec.pre, parameters[-1].norm, tiles, x.dtype)
    source = read_source(spec, x, None if spec.pre is None else results[-1])
    branch = Branch(source, operands(spec.dtype, parameters), [], results)
    for i, layer in enumerate(spec.layers):
        _, bias, norm_parameters = parameters[i]
        batch = layer.norm is not None and not layer.norm.frozen
        h = layer_input(spec, branch, i, shortcut, slope)
        y, own = ops.conv(layer.kernel).fprop(h, branch.weights[i], layer.conv, statistics=batch)
        branch.ys.append(y)
        if layer.norm is not None:
            results[i] = normalise(layer.norm, norm_parameters, own, y.dtype, bias)
    return branch


def keep(
    spec: BranchSpec, branch: Branch, parameters: Sequence[Parameters], is_read: Callable[[int], bool]
) -> list[Tensor | None]:
    """What is saved: the layers' outputs, and the weights that were cast.

    Of the outputs that the sum read those are left out that backward computes again, or does not read (``is_read(i)``).
    """
    dropped = [i for i in range(spec.last, len(branch.ys)) if i in spec.recomputed or not is_read(i)]
    ys = [None if i in dropped else y for i, y in enumerate(branch.ys)]
    pairs = zip(branch.weights, _weights(parameters), strict=True)
    return [*ys, *(None if cast.dtype == weight.dtype else cast for cast, weight in pairs)]


def kept(
    spec: BranchSpec,
    saved: Sequence[Any],
    x: Tensor,
    parameters: Sequence[Parameters],
    results: list[NormResult | None],
) -> Branch:
    """What forward made; ``saved`` begins with what :func:`keep` gave, ``KEPT`` tensors a layer."""
    layers = len(spec.layers)
    source = read_source(spec, x, results[-1] if spec.pre is not None else None)
    pairs = zip(saved[layers : KEPT * layers], _weights(parameters), strict=True)
    weights = [weight if cast is None else cast for cast, weight in pairs]
    return Branch(source, weights, list(saved[:layers]), results)


def moments(results: Sequence[NormResult | None], parameters: Sequence[Parameters]) -> list[Tensor]:
    """``(mean, unbiased variance)`` of every norm with batch statistics, the convolution's bias included."""
    found: list[Any] = []
    for result, (_, bias, _) in zip(results, parameters, strict=True):
        if result is not None and result.counts is not None:
            mean = result.norm.mean
            found += (mean if bias is None else mean + bias, result.var)
    return found


# --- backward -------------------------------------------------------------------------------------------------------


def recompute(
    spec: BranchSpec,
    branch: Branch,
    shortcut: Tensor | None,
    slope: Tensor | None,
    is_read: Callable[[int], bool],
    like: Tensor,
) -> None:
    """Compute the outputs that were not saved from forward's operands; of statistics there is no need.

    An output whose values nobody reads (``is_read(i)``) gets its shape and dtype alone. ``like`` has that shape.
    """
    for i in range(spec.last, len(spec.layers)):
        if branch.ys[i] is not None:
            continue
        if is_read(i):
            layer, h = spec.layers[i], layer_input(spec, branch, i, shortcut, slope)
            branch.ys[i], _ = ops.conv(layer.kernel).fprop(h, branch.weights[i], layer.conv, statistics=False)
        else:
            branch.ys[i] = like.new_full((), math.nan, dtype=spec.dtype).expand(like.shape)


class Wanted:
    """Which gradients of a branch are asked for, and what has to be computed for them."""

    def __init__(
        self, spec: BranchSpec, x: bool, shortcut: bool | None, slope: bool, parameters: Sequence[Sequence[bool]]
    ) -> None:
        """``shortcut`` is None where no tensor is given: the projection reads what the chain reads."""
        self.spec, self.x, self.slope, self.parameters = spec, x, slope, parameters
        self.source = x or (spec.pre is not None and any(parameters[-1]))  # the gradient of what the chain reads
        self.shortcut = self.source if shortcut is None else shortcut  # of what the projection reads

    def below(self, i: int) -> bool:
        """Whether anything that layer ``i`` reads wants a gradient."""
        if i > self.spec.last:
            return self.shortcut
        return self.source or (i > 0 and self.slope) or any(any(p) for p in self.parameters[:i])

    def sums(self, i: int) -> bool:
        """Whether norm ``i``'s two sums are used: by its parameters, or by ``dy`` under batch statistics."""
        norm = self.spec.norms[i]
        if norm is None:
            return False
        weight, bias, gamma, beta, *_ = self.parameters[i]
        if norm.frozen:
            return gamma or beta or bias
        below = self.x if i == len(self.spec.layers) else self.below(i)
        return gamma or beta or weight or below


class Incoming(NamedTuple):
    """The gradient that comes back to a norm's output (or to the convolution's where there is no norm)."""

    grad: Gradient
    factor: float = 1.0  # of ``grad.dz``; the sums have it already
    dbeta: Tensor | None = None
    dgamma: Tensor | None = None


class BranchGradients(NamedTuple):
    """Gradients of a branch's inputs, None where nobody asked."""

    x: Tensor | None
    shortcut: Tensor | None
    slope: Tensor | None
    parameters: list[tuple[Tensor | None, ...]]  # TENSORS for each of ``BranchSpec.norms``


def backward(
    spec: BranchSpec,
    wanted: Wanted,
    branch: Branch,
    x: Tensor,
    shortcut: Tensor | None,
    slope: Tensor | None,
    parameters: Sequence[Parameters],
    into_branch: Incoming,
    into_shortcut: Incoming | None,
    *,
    keep: tuple[Tensor, ...],
) -> BranchGradients:
    """From the gradients of the branch's and the projection's outputs to those of everything that went in.

    ``into_shortcut`` belongs to the projection's output, or to ``x`` itself where there is no projection and no
    ``shortcut``. Gradients that are not in ``keep`` may be written over.
    """
    gradients: list[tuple[Tensor | None, ...]] = [(None,) * TENSORS] * len(parameters)
    dslopes: list[Tensor | None] = []

    def layer_backward(i, into: Incoming, source, source_norm, need_dx, skip=None, skip_scale=1.0, consume=False):
        """One layer: parameter gradients, and the gradient (with the sums) that goes further down."""
        layer, (weight, bias, norm), result = spec.layers[i], parameters[i], branch.results[i]
        need_weight, need_bias, need_gamma, need_beta, *_ = wanted.parameters[i]
        dx = dbeta = dgamma = dslope = dw = None
        if need_dx or need_weight:
            dy = _output_gradient(layer, norm.weight, result, branch.ys[i], into)
            found = conv_backward(
                layer,
                dy,
                branch.weights[i],
                source,
                source_norm,
                dtype=weight.dtype,
                need_dx=need_dx,
                need_dw=need_weight,
                skip=skip,
                skip_scale=skip_scale,
                consume=consume,
            )
            dx, dbeta, dgamma, dslope, dw = found
        dbias = None
        if need_bias and bias is not None and result is not None:
            # Under batch statistics the norm takes the bias out again: its gradient is 0.
            frozen = result.counts is None and into.dbeta is not None
            dbias = result.norm.scale * into.dbeta if frozen else torch.zeros_like(bias)
        gradients[i] = (
            like(dw, weight, need_weight),
            like(dbias, bias, need_bias),
            like(into.dgamma, norm.weight, need_gamma),
            like(into.dbeta, norm.bias, need_beta),
            None,
            None,
        )
        dslopes.append(dslope)
        return dx, dbeta, dgamma

    last = spec.last
    deferred_source = isinstance(branch.source, Deferred)
    dshortcut = None
    skip: Gradient | None = None
    identity = None  # the shortcut's gradient where it is the unit's input itself
    if spec.projection is not None and into_shortcut is not None:
        source = layer_input(spec, branch, last + 1, shortcut, slope)
        dx, *_ = layer_backward(last + 1, into_shortcut, source, None, wanted.shortcut)
        if shortcut is None:
            skip = None if dx is None else Gradient(dx)
        else:
            dshortcut = dx
    elif into_shortcut is not None and shortcut is None:
        identity = into_shortcut
    elif into_shortcut is not None and wanted.shortcut and shortcut is not None:
        dshortcut = ops.bn_add_relu.masked(into_shortcut.grad).to(shortcut.dtype)
        dshortcut = dshortcut if into_shortcut.factor == 1 else dshortcut * into_shortcut.factor

    into = into_branch
    # The last layer may write over its gradient unless that is autograd's or is read again as the shortcut's.
    shared = (identity is not None and identity.grad.dz is into.grad.dz) or dshortcut is into.grad.dz
    consume = not shared and not any(t is into.grad.dz for t in keep)
    for i in range(last, 0, -1):
        below = wanted.below(i)
        source = layer_input(spec, branch, i, shortcut, slope)
        norm = branch.norm(i - 1) if below and wanted.sums(i - 1) else None
        dx, dbeta, dgamma = layer_backward(i, into, source, norm, below, consume=consume)
        if dx is None:
            return BranchGradients(None, dshortcut, slope_gradient(dslopes, slope, wanted.slope), gradients)
        into = Incoming(Gradient(dx), 1.0, dbeta, dgamma) if norm is not None else Incoming(Gradient(dx))
        consume = True

    skip_scale = 1.0
    if identity is not None and not deferred_source and wanted.x:
        skip, skip_scale = identity.grad, identity.factor
    consume = consume and (skip is None or not any(t is skip.dz for t in keep))
    norm = branch.norm(len(spec.layers)) if spec.pre is not None and wanted.sums(len(spec.layers)) else None
    dx, dbeta, dgamma = layer_backward(
        0, into, branch.source, norm, wanted.source, skip if wanted.source else None, skip_scale, consume
    )
    if deferred_source and dx is not None:
        source_gradient = Incoming(Gradient(dx), 1.0, *((dbeta, dgamma) if norm is not None else (None, None)))
        dx = _input_gradient(spec, wanted, branch, x, parameters, source_gradient, identity, gradients)
    dslope = slope_gradient(dslopes, slope, wanted.slope)
    return BranchGradients(dx if wanted.x else None, dshortcut, dslope, gradients)


def _output_gradient(layer: Layer, gamma: Tensor | None, result: NormResult | None, y: Tensor, into: Incoming):
    """The gradient of a convolution's output, deferred."""
    grad = into.grad
    if layer.norm is None or result is None:
        a = None if into.factor == 1 else y.new_full((y.shape[1],), into.factor, dtype=compute_dtype(y.dtype))
        return Gradient(grad.dz, grad.sign, None, a)
    found = output_gradient(layer.norm, gamma, result, y, grad, into.dbeta, into.dgamma)
    if into.factor != 1:
        assert found.a is not None
        found = found._replace(a=found.a * into.factor)
    return found


def _input_gradient(spec, wanted, branch, x, parameters, into: Incoming, identity: Incoming | None, gradients):
    """Of a pre-activated unit's input: through the norm in front, plus the identity shortcut's."""
    grad = into.grad
    if spec.pre is not None:
        i = len(spec.layers)
        result, norm = branch.results[i], parameters[i].norm
        *_, need_gamma, need_beta, _, _ = wanted.parameters[i]
        gamma, beta = like(into.dgamma, norm.weight, need_gamma), like(into.dbeta, norm.bias, need_beta)
        gradients[i] = (None, None, gamma, beta, None, None)
        if not wanted.x:
            return None
        grad = output_gradient(spec.pre, norm.weight, result, x, grad, into.dbeta, into.dgamma)
    elif identity is None:
        return grad.dz
    if identity is None:
        return ops.bn_add_relu.apply(grad, x)
    return ops.bn_add_relu.apply(grad, x, skip=identity.grad, skip_scale=identity.factor)
