"""The end of the stem, ``max_pool2d(relu(bn(y)), 3, 2, 1)``, as one function; saved are ``y`` and the norm."""

from __future__ import annotations

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
        tiles = None if spec.frozen else ops.batch_norm.statistics(y)
        result = normalise(spec, NormParameters(*parameters), tiles, y.dtype)
        out = ops.stem.forward(Deferred(y, result.norm.scale, result.norm.shift))
        moments: list[Any] = [] if result.counts is None else [result.norm.mean, result.var]
        ctx.mark_non_differentiable(*moments)
        if any(ctx.needs_input_grad):
            ctx.spec, ctx.backend = spec, forced_backend()
            ctx.set_materialize_grads(False)
            kept = parameters if spec.frozen else (*parameters[:2], None, None)
            ctx.save_for_backward(y, *result.norm, result.counts, *kept)
        return (out, *moments)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        spec: NormSpec = ctx.spec
        y, *norm, count, weight, bias, mean, var = ctx.saved_tensors
        _, need_y, need_weight, need_bias, *_ = ctx.needs_input_grad
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            inputs = (y, weight, bias, mean, var)
            return differentiable_backward(ctx, composition, spec.group is not None, [dout], inputs)
        result = NormResult(Norm(*norm), count, None)
        dout = channels_last(dout)
        with no_autocast(dout), same_backend(ctx.backend):
            if not need_y:
                dy = None
                dbeta, dgamma = ops.stem.reduce(dout, y, result.norm)
            elif spec.group is None:
                dy, dbeta, dgamma = ops.stem.backward(dout, y, result.norm, weight, count)
            else:
                dbeta, dgamma = ops.stem.reduce(dout, y, result.norm)
                dy = ops.stem.apply(dout, y, result.norm, *coefficients(spec, weight, result, dbeta, dgamma))
        return None, dy, like(dgamma, weight, need_weight), like(dbeta, bias, need_bias), None, None


def composition(spec: NormSpec, y: Tensor, weight, bias, mean, var) -> tuple[Tensor]:
    """The stem's end as PyTorch's own operators, differentiable any number of times."""
    if not spec.frozen:
        mean = var = None
    z = F.batch_norm(y, mean, var, weight, bias, not spec.frozen, 0.0, spec.eps)
    return (F.max_pool2d(F.relu(z), 3, 2, 1),)
