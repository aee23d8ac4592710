"""The residual unit of He et al. (1512.03385): ``relu(bn(conv(... relu(bn(conv(x))))) + shortcut)`` as one function.

BasicBlock is a chain of two convolutions, Bottleneck of three. Forward writes each convolution's output once and no
normalised tensor; saved for backward are the input, those outputs, the per-channel norms and the sign of the sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import ops
from resnet_fused.autograd.layer import (
    Layer,
    NormParameters,
    NormResult,
    conv_backward,
    differentiable_backward,
    forced_backend,
    like,
    no_autocast,
    normalise,
    output_gradient,
    same_backend,
)
from resnet_fused.operands import Deferred, Gradient, Norm
from resnet_fused.reference import channels_last


class ResidualSpec(NamedTuple):
    """What is fixed about a residual unit.

    The shortcut is the identity when both ``projection`` and the ``shortcut`` tensor are missing; with a projection
    alone it reads ``x``, with both it reads the tensor; with the tensor alone it is the tensor.
    """

    chain: tuple[Layer, ...]
    projection: Layer | None
    dtype: torch.dtype  # of the convolutions' operands
    differentiable: bool = True  # whether a backward may follow (grad mode at the call)

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.chain if self.projection is None else (*self.chain, self.projection)


TENSORS = 5  # tensors per layer: weight, then NormParameters


def _split(flat: Any) -> list[tuple[Tensor, NormParameters]]:
    return [(flat[i], NormParameters(*flat[i + 1 : i + TENSORS])) for i in range(0, len(flat), TENSORS)]


class ResidualFunction(torch.autograd.Function):
    """``(out, mean_0, var_0, ...)``: the block's output and the batch moments of each layer with batch statistics.

    Args (of ``apply``):
        spec: ResidualSpec.
        x: (N, C, H, W) channels_last, dtype ``spec.dtype``.
        shortcut: a tensor, see ResidualSpec, or None.
        flat: for every layer its convolution's weight, then weight, bias, running mean and variance of its norm.
    """

    @staticmethod
    def forward(
        ctx: Any, spec: ResidualSpec, x: Tensor, shortcut: Tensor | None, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        parameters = _split(flat)
        last = len(spec.chain) - 1
        ys: list[Tensor] = []
        results: list[NormResult] = []
        source: Tensor | Deferred = x
        for i, layer in enumerate(spec.layers):
            weight, norm_parameters = parameters[i]
            if i > last:
                source = x if shortcut is None else shortcut
            y, tiles = ops.conv(layer.kernel).fprop(
                source, weight.to(spec.dtype), layer.conv, statistics=not layer.norm.frozen
            )
            result = normalise(layer.norm, norm_parameters, tiles, y.dtype)
            ys.append(y)
            results.append(result)
            source = Deferred(y, result.norm.scale, result.norm.shift)
        end = Deferred(ys[last], results[last].norm.scale, results[last].norm.shift)
        if spec.projection is None:
            added: Tensor | Deferred = x if shortcut is None else shortcut
        else:
            added = source
        needs_gradient = spec.differentiable and any(ctx.needs_input_grad)
        out, sign = ops.bn_add_relu.forward(end, added, sign=needs_gradient)
        moments: list[Any] = [t for r in results if r.counts is not None for t in (r.norm.mean, r.var)]
        ctx.mark_non_differentiable(*moments)
        if needs_gradient:
            ctx.spec, ctx.backend = spec, forced_backend()
            ctx.set_materialize_grads(False)
            # Running statistics that this batch is about to change play no part in backward.
            frozen = [layer.norm.frozen for layer in spec.layers]
            kept = [t if i % TENSORS < 3 or frozen[i // TENSORS] else None for i, t in enumerate(flat)]
            ctx.save_for_backward(x, shortcut, sign, *ys, *(t for r in results for t in (*r.norm, r.counts)), *kept)
        return (out, *moments)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        spec: ResidualSpec = ctx.spec
        count = len(spec.layers)
        x, shortcut, sign, *rest = ctx.saved_tensors
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        flat = rest[6 * count :]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            synchronised = any(layer.norm.group is not None for layer in spec.layers)
            return differentiable_backward(ctx, composition, synchronised, dout, (x, shortcut, *flat))
        ys = rest[:count]
        results = [
            NormResult(Norm(*v[:4]), v[4], None)
            for v in (rest[count + 5 * i : count + 5 * i + 5] for i in range(count))
        ]
        with no_autocast(dout), same_backend(ctx.backend):
            return _backward(spec, ctx.needs_input_grad, dout, x, shortcut, sign, ys, results, _split(flat))


def _backward(spec, needs, dout, x, shortcut, sign, ys, results, parameters) -> tuple[Tensor | None, ...]:
    need_x, need_shortcut = needs[1], needs[2]
    need = [needs[3 + TENSORS * i : 3 + TENSORS * (i + 1)] for i in range(len(parameters))]  # weight, gamma, beta, -, -
    gradients: list[tuple[Tensor | None, ...]] = [(None,) * TENSORS] * len(parameters)
    last = len(spec.chain) - 1
    grad = ops.bn_add_relu.gradient(channels_last(dout), sign)

    def wants_sums(i: int, below: bool) -> bool:
        """Whether the two sums of norm ``i`` are used: by its parameters, or by ``dy`` under batch statistics."""
        return need[i][1] or need[i][2] or (not spec.layers[i].norm.frozen and (need[i][0] or below))

    below_end = need_x or any(any(n) for n in need[:last])
    projected = spec.projection is not None
    projection_below = need_shortcut if shortcut is not None else need_x
    both = projected and wants_sums(last + 1, projection_below)
    dbeta = dgamma = projection_dgamma = None
    if both or wants_sums(last, below_end):
        other = (ys[last + 1], results[last + 1].norm) if both else ()
        dbeta, dgamma, projection_dgamma = ops.bn_add_relu.reduce(grad, ys[last], results[last].norm, *other)

    def layer_backward(i, grad_z, sums, source, source_norm, need_dx, skip=None, consume=False):
        """One layer: parameter gradients, and the gradient (with the sums) that goes further down."""
        weight, norm_parameters = parameters[i]
        dw = dx = sums_below = None
        if need_dx or need[i][0]:
            layer = spec.layers[i]
            dy = output_gradient(layer.norm, norm_parameters.weight, results[i], ys[i], grad_z, *sums)
            dx, *sums_below, dw = conv_backward(
                layer,
                dy,
                weight,
                source,
                source_norm,
                need_dx=need_dx,
                need_dw=need[i][0],
                skip=skip,
                consume=consume,
            )
        gradients[i] = (
            like(dw, weight, need[i][0]),
            like(sums[1], norm_parameters.weight, need[i][1]),
            like(sums[0], norm_parameters.bias, need[i][2]),
            None,
            None,
        )
        return dx, sums_below

    dshortcut = None
    skip = grad if shortcut is None else None
    if projected:
        source = x if shortcut is None else shortcut
        dx, _ = layer_backward(last + 1, grad, (dbeta, projection_dgamma), source, None, projection_below)
        if shortcut is None:
            skip = None if dx is None else Gradient(dx)
        else:
            dshortcut = dx
    elif need_shortcut:
        dshortcut = ops.bn_add_relu.masked(grad).to(shortcut.dtype)

    sums = (dbeta, dgamma)
    dz: Gradient | None = grad
    dx = None
    ours = skip is None or skip.dz is not dout
    consume = projected and grad.dz is not dout  # not read again as the skip gradient
    for i in range(last, -1, -1):
        below = need_x or any(any(n) for n in need[:i])
        if i == 0:
            dx, _ = layer_backward(0, dz, sums, x, None, need_x, skip if need_x else None, consume and ours)
            break
        previous = results[i - 1].norm
        source = Deferred(ys[i - 1], previous.scale, previous.shift)
        source_norm = previous if below and wants_sums(i - 1, need_x or any(any(n) for n in need[: i - 1])) else None
        dx, sums = layer_backward(i, dz, sums, source, source_norm, below, consume=consume)
        if not below:
            dx = None
            break
        dz, consume = Gradient(dx), True
        sums = sums if source_norm is not None else (None, None)
    return (None, dx if need_x else None, dshortcut, *(g for layer in gradients for g in layer))


# --- the same unit in differentiable PyTorch: double backward ---------------------------------------------------------


def composition(spec: ResidualSpec, x: Tensor, shortcut: Tensor | None, *flat: Tensor | None) -> Tensor:
    """The unit as PyTorch's own operators, differentiable any number of times."""
    last = len(spec.chain) - 1
    parameters = _split(flat)

    def layer(i: int, h: Tensor) -> Tensor:
        kernel, conv, norm = spec.layers[i]
        weight, (gamma, beta, mean, var) = parameters[i]
        padding = conv.dilation * (kernel - 1) // 2
        y = F.conv2d(h.to(spec.dtype), weight.to(spec.dtype), None, conv.stride, padding, conv.dilation, conv.groups)
        if not norm.frozen:
            mean = var = None
        return F.batch_norm(y, mean, var, gamma, beta, not norm.frozen, 0.0, norm.eps)

    h = x
    for i in range(len(spec.chain)):
        h = layer(i, h if i == 0 else F.relu(h))
    source = x if shortcut is None else shortcut
    added = source if spec.projection is None else layer(last + 1, source)
    return F.relu((h + added).to(h.dtype))
