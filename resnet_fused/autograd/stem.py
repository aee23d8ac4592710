"""The end of the stem, ``max_pool2d(relu(bn(y)), 3, 2, 1)``, as one function; saved are ``y`` and the norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import ops
from resnet_fused.autograd.layer import (
    NormParameters,
    NormResult,
    NormSpec,
    coefficients,
    differentiable_backward,
    forced_backend,
    like,
    no_autocast,
    normalise,
    planned,
    same_backend,
)
from resnet_fused.operands import Deferred, Norm
from resnet_fused.reference import channels_last


class StemFunction(torch.autograd.Function):
    """``(out, mean, var)``; the moments are missing under frozen statistics.

    Args (of ``apply``):
        spec: NormSpec.
        y: (N, C, H, W) channels_last, the stem convolution's output.
        parameters: weight, bias, running mean and variance of the norm.
    """

    @staticmethod
    def forward(ctx: Any, spec: NormSpec, y: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        out, *norm, counts, var = planned(_forward, spec, (y, *parameters), [spec])
        moments = [] if counts is None else [Norm(*norm).mean, var]
        ctx.mark_non_differentiable(*moments)
        if any(ctx.needs_input_grad):
            ctx.spec, ctx.backend = spec, forced_backend()
            ctx.set_materialize_grads(False)
            kept = parameters if spec.frozen else (*parameters[:2], None, None)
            ctx.save_for_backward(y, *norm, counts, *kept)
        return (out, *moments)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        spec: NormSpec = ctx.spec
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        y, *saved, mean, var = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs = (y, *saved[-2:], mean, var)
            return differentiable_backward(ctx, composition, spec.group is not None, [dout], inputs)
        needs = ctx.needs_input_grad[1:4]
        with no_autocast(dout), same_backend(ctx.backend):
            found = planned(_backward, (spec, needs), (dout, y, *saved), [spec])
        return (None, *found, None, None)


def _forward(spec: NormSpec, y: Tensor, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """``(out, scale, shift, mean, rstd, counts, unbiased variance)``."""
    tiles = None if spec.frozen else ops.batch_norm.statistics(y)
    result = normalise(spec, NormParameters(*parameters), tiles, y.dtype)
    out = ops.stem.forward(Deferred(y, result.norm.scale, result.norm.shift))
    return (out, *result.norm, result.counts, result.var)


def _backward(static: tuple[NormSpec, Sequence[bool]], dout: Tensor, y: Tensor, *saved: Any):
    """Gradients of ``y``, weight and bias, as far as needed."""
    spec, (need_y, need_weight, need_bias) = static
    *norm, counts, weight, bias = saved
    result = NormResult(Norm(*norm), counts, None)
    dout = channels_last(dout)
    if not need_y:
        dy = None
        dbeta, dgamma = ops.stem.reduce(dout, y, result.norm)
    elif spec.group is None:
        dy, dbeta, dgamma = ops.stem.backward(dout, y, result.norm, weight, counts)
    else:
        dbeta, dgamma = ops.stem.reduce(dout, y, result.norm)
        dy = ops.stem.apply(dout, y, result.norm, *coefficients(spec, weight, result, dbeta, dgamma))
    return dy, like(dgamma, weight, need_weight), like(dbeta, bias, need_bias)


def composition(spec: NormSpec, y: Tensor, weight, bias, mean, var) -> tuple[Tensor]:
    """The stem's end as PyTorch's own operators, differentiable any number of times."""
    if not spec.frozen:
        mean = var = None
    z = F.batch_norm(y, mean, var, weight, bias, not spec.frozen, 0.0, spec.eps)
    return (F.max_pool2d(F.relu(z), 3, 2, 1),)
