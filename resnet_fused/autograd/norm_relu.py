"""``relu(bn(x))`` of a tensor that no convolution of ours wrote: the end of a pre-activated network."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import ops
from resnet_fused.autograd import composition as compositions
from resnet_fused.autograd.layer import (
    NormParameters,
    NormResult,
    NormSpec,
    Parameters,
    coefficients,
    differentiable_backward,
    forced_backend,
    like,
    no_autocast,
    normalise,
    planned,
    same_backend,
)
from resnet_fused.autograd.saved import known
from resnet_fused.operands import Deferred, Gradient, Norm
from resnet_fused.reference import channels_last


class NormReLUSpec(NamedTuple):
    """What is fixed about a norm and its ReLU."""

    norm: NormSpec
    differentiable: bool = True  # whether a backward may follow (grad mode at the call)


class NormReLUFunction(torch.autograd.Function):
    """``(out, mean, var)``; the moments are missing under frozen statistics.

    Args (of ``apply``):
        spec: NormReLUSpec.
        x: (N, C, H, W) channels_last.
        counts, mean, m2: statistics of ``x`` where they are known, else None.
        parameters: weight, bias, running mean and variance of the norm.
    """

    @staticmethod
    def forward(
        ctx: Any, spec: NormReLUSpec, x: Tensor, counts, mean, m2, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        needs_gradient = spec.differentiable and any(ctx.needs_input_grad)
        found = planned(_forward, (spec.norm, needs_gradient), (x, counts, mean, m2, *parameters), [spec.norm])
        out, sign, *norm, own_counts, var = found
        moments = [] if own_counts is None else [Norm(*norm).mean, var]
        ctx.mark_non_differentiable(*moments)
        if needs_gradient:
            ctx.spec, ctx.backend = spec, forced_backend()
            ctx.set_materialize_grads(False)
            kept = parameters if spec.norm.frozen else (*parameters[:2], None, None)
            ctx.save_for_backward(x, sign, *norm, own_counts, *kept)
        return (out, *moments)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        spec: NormSpec = ctx.spec.norm
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        x, *saved = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs = (x, None, None, None, *saved[-4:])
            return differentiable_backward(ctx, composition, spec.group is not None, [dout], inputs)
        needs = ctx.needs_input_grad
        with no_autocast(dout), same_backend(ctx.backend):
            dx, *gradients = planned(_backward, (spec, needs[5:]), (dout, x, *saved), [spec])
        return None, dx if needs[1] else None, None, None, None, *gradients, None, None


def _forward(static: tuple[NormSpec, bool], x: Tensor, counts, mean, m2, *parameters: Tensor | None):
    """``(out, sign, scale, shift, mean, rstd, counts, unbiased variance)``."""
    spec, needs_gradient = static
    tiles = known(counts, mean, m2)
    if tiles is None and not spec.frozen:
        tiles = ops.batch_norm.statistics(x)
    result = normalise(spec, NormParameters(*parameters), tiles, x.dtype)
    normed = Deferred(x, result.norm.scale, result.norm.shift)
    out, sign, _ = ops.bn_add_relu.forward(normed, None, sign=needs_gradient)
    return (out, sign, *result.norm, result.counts, result.var)


def _backward(static: tuple[NormSpec, tuple[bool, ...]], dout: Tensor, x: Tensor, sign, *saved: Any):
    """Gradients of ``x``, weight and bias, the last two as far as needed."""
    spec, needs = static
    *norm, counts, weight, bias, mean, var = saved
    parameters = Parameters(None, None, NormParameters(weight, bias, mean, var))
    result = NormResult(Norm(*norm), counts, None)
    need = (False, False, *needs)
    dx, gradients = norm_relu_backward(spec, channels_last(dout), sign, x, result, parameters, need)
    return dx, *gradients[2:4]


def norm_relu_backward(
    spec: NormSpec,
    dout: Tensor,
    sign: Tensor | None,
    total: Tensor,
    result: NormResult,
    parameters: Parameters,
    need: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Through a ReLU (given its ``sign``) and a norm to the tensor that it normalised; gradients as Parameters."""
    grad = Gradient(dout) if sign is None else ops.bn_add_relu.gradient(dout, sign)
    *_, need_gamma, need_beta, _, _ = need
    dbeta = dgamma = None
    if not spec.frozen or need_gamma or need_beta:
        dbeta, dgamma, _ = ops.bn_add_relu.reduce(grad, total, result.norm)
    a, b, c = coefficients(spec, parameters.norm.weight, result, dbeta, dgamma)
    dtotal = ops.bn_add_relu.apply(Gradient(grad.dz, grad.sign, None if b is None else total, a, b, c), total)
    gamma, beta = like(dgamma, parameters.norm.weight, need_gamma), like(dbeta, parameters.norm.bias, need_beta)
    return dtotal, (None, None, gamma, beta, None, None)


def composition(spec: NormReLUSpec, x: Tensor, counts, mean, m2, *parameters: Tensor | None) -> tuple[Tensor]:
    """``relu(bn(x))`` as PyTorch's own operators."""
    return (F.relu(compositions.norm(spec.norm, x, Parameters(None, None, NormParameters(*parameters)))),)
