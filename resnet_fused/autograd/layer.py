"""A convolution with its batch norm: the step that every dataflow repeats, forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fused import backends, ops, plans
from resnet_fused.operands import Conv, Gradient, Norm, TileStatistics
from resnet_fused.reference import compute_dtype


class NormSpec(NamedTuple):
    """What is fixed about a batch norm."""

    eps: float
    frozen: bool  # normalise with the running statistics
    group: Any = None  # process group whose ranks share the batch statistics


class Layer(NamedTuple):
    """What is fixed about a convolution and the norm behind it, if there is one."""

    kernel: int
    conv: Conv
    norm: NormSpec | None


class NormParameters(NamedTuple):
    """Tensors of a batch norm, each (C,) or None."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None


class Parameters(NamedTuple):
    """Tensors of a convolution and of the norm behind it; of a norm alone, with None for the convolution's.

    A norm takes a constant per channel out of what it normalises, so no convolution ever adds its bias: under batch
    statistics it only moves the running mean, under frozen ones it is part of the shift.
    """

    conv_weight: Tensor | None
    conv_bias: Tensor | None
    norm: NormParameters

    @classmethod
    def split(cls, flat: Sequence[Tensor | None]) -> list[Parameters]:
        """From ``TENSORS`` tensors each."""
        return [
            cls(flat[i], flat[i + 1], NormParameters(*flat[i + 2 : i + TENSORS])) for i in range(0, len(flat), TENSORS)
        ]


TENSORS = 6  # of Parameters, flat


class NormResult(NamedTuple):
    """A norm applied to a batch; ``counts`` and ``var`` are None for frozen statistics."""

    norm: Norm
    counts: Tensor | None  # (T,) int32, values per channel behind the statistics
    var: Tensor | None  # (C,) unbiased variance


def normalise(
    spec: NormSpec,
    parameters: NormParameters,
    tiles: TileStatistics | None,
    dtype: torch.dtype,
    conv_bias: Tensor | None = None,
) -> NormResult:
    """Resolve a norm from its batch's tiles (merged across ranks if it is synchronised) or its running statistics."""
    weight, bias, running_mean, running_var = parameters
    if spec.frozen or tiles is None:
        assert running_mean is not None
        assert running_var is not None
        if conv_bias is not None:
            wide = compute_dtype(dtype)
            running_mean = running_mean.to(wide) - conv_bias.to(wide)
        norm = ops.batch_norm.frozen(weight, bias, running_mean, running_var, spec.eps, compute_dtype(dtype))
        return NormResult(norm, None, None)
    if spec.group is not None:
        tiles = _gather(tiles, spec.group)
    norm, var = ops.batch_norm.finalize(tiles, weight, bias, spec.eps)
    return NormResult(norm, tiles.counts, var)


def _gather(tiles: TileStatistics, group: Any) -> TileStatistics:
    """One tile per rank; the count travels as bits in the same message."""
    merged = ops.batch_norm.merge(tiles)
    dtype, channels = merged.mean.dtype, merged.mean.shape[1]
    bits = merged.counts.to(torch.int32 if dtype == torch.float32 else torch.int64).view(dtype)
    message = torch.cat([merged.mean[0], merged.m2[0], bits])
    gathered = message.new_empty(dist.get_world_size(group) * message.numel())
    dist.all_gather_into_tensor(gathered, message, group)
    mean, m2, bits = gathered.view(-1, message.numel()).split([channels, channels, 1], 1)
    count = bits.contiguous().view(torch.int32 if dtype == torch.float32 else torch.int64)
    return TileStatistics(count.view(-1).to(torch.int32), mean.contiguous(), m2.contiguous())


def coefficients(
    spec: NormSpec, weight: Tensor | None, result: NormResult, dbeta: Tensor | None, dgamma: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(a, b, c)`` of ``dy = a * dz + b * y + c``."""
    if result.counts is None:
        return result.norm.scale, None, None
    assert dbeta is not None  # batch statistics always have their sums taken
    assert dgamma is not None
    if spec.group is not None:
        both = torch.stack([dbeta, dgamma])
        dist.all_reduce(both, group=spec.group)
        dbeta, dgamma = both.unbind()
    return ops.batch_norm.coefficients(dbeta, dgamma, weight, result.norm, result.counts)


def output_gradient(
    spec: NormSpec,
    weight: Tensor | None,
    result: NormResult,
    y: Tensor,
    grad: Gradient,
    dbeta: Tensor | None,
    dgamma: Tensor | None,
) -> Gradient:
    """The gradient of the convolution's output ``y``, deferred, from that of its norm's output."""
    a, b, c = coefficients(spec, weight, result, dbeta, dgamma)
    return Gradient(grad.dz, grad.sign, None if b is None else y, a, b, c)


def conv_backward(
    layer: Layer,
    grad: Gradient,
    weight: Tensor,
    x: Any,
    norm: Norm | None,
    *,
    dtype: torch.dtype,
    need_dx: bool,
    need_dw: bool,
    skip: Gradient | None = None,
    skip_scale: float = 1.0,
    consume: bool = False,
) -> tuple[Tensor | None, ...]:
    """``(dx, dbeta, dgamma, dslope, dw)`` of one convolution, whichever are wanted; ``dtype`` is dw's.

    With ``consume`` the tensors ``grad.dz`` and ``skip.dz`` may be written over.
    """
    op = ops.conv(layer.kernel)
    if need_dx and need_dw:
        skipped = {"skip": skip, "skip_scale": skip_scale}
        return op.bprop(grad, weight, x, norm, layer.conv, dtype=dtype, consume=consume, **skipped)
    if need_dx:
        return (*op.dgrad(grad, weight, x, norm, layer.conv, skip=skip, skip_scale=skip_scale), None)
    if need_dw:
        return None, None, None, None, op.wgrad(grad, weight, x, layer.conv, dtype=dtype)
    return None, None, None, None, None


def like(gradient: Tensor | None, parameter: Tensor | None, needed: bool) -> Tensor | None:
    """A parameter's gradient in its dtype; None where none is wanted."""
    if not needed or gradient is None or parameter is None:
        return None
    return gradient.to(parameter.dtype)


def no_autocast(tensor: Tensor) -> Any:
    """Autocast switched off for ``tensor``'s device: operands have their dtypes already."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def forced_backend() -> str | None:
    """The backend in force, for backward to run under; None while compiling, where the choice is made at run time."""
    return None if torch.compiler.is_compiling() else backends.forced()


def same_backend(name: str | None) -> Any:
    """The backend that forward ran under."""
    return contextlib.nullcontext() if name is None or name == backends.forced() else backends.use_backend(name)


def planned(
    function: plans.Function, static: Any, tensors: Sequence[Tensor | None], norms: Sequence[NormSpec | None]
) -> tuple[Any, ...]:
    """``function(static, *tensors)`` by a plan where there is one; what waits for other ranks runs as it is written."""
    if any(norm is not None and norm.group is not None for norm in norms):
        return function(static, *tensors)
    return plans.call(function, static, tensors)


def differentiable_backward(
    ctx: Any,
    composition: Callable[..., tuple[Tensor, ...]],
    synchronised: bool,
    douts: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again, from ``composition(ctx.spec, *inputs)`` in PyTorch's operators.

    Raises:
        NotImplementedError: a norm is synchronised across processes.
    """
    if synchronised:
        raise NotImplementedError(
            "backward: expected create_graph=False with synchronised batch norm, got create_graph=True; "
            "run the model inside resnet_fused.disabled()"
        )
    needs = ctx.needs_input_grad[1:]
    given = [(i, dout) for i, dout in enumerate(douts) if dout is not None]
    with torch.enable_grad(), no_autocast(given[0][1]):
        # Views, so that a gradient ends at its own input where another input was computed from that one (tied weights).
        views = [None if t is None else t.view_as(t) for t in inputs]
        outs = composition(ctx.spec, *views)
        wanted = [t for t, need in zip(views, needs, strict=True) if need and t is not None]
        pairs = [(outs[i], dout.to(outs[i].dtype)) for i, dout in given if outs[i].requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], wanted, [d for _, d in pairs], create_graph=True, allow_unused=True
            )
        )
    return (None, *(next(found) if need else None for need in needs))
