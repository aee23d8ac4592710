"""``conv3x3``: the implicit matrix products of csrc/conv3x3, which form what is pending as they read it.

One object of the extension for each problem and configuration has everything but the addresses. Activations are read
and written in channels_last, weights too; what comes otherwise is copied first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import backends, extension, tuning
from resnet_fused.cuda import _device
from resnet_fused.kernels._launch import SHORT, counters
from resnet_fused.reference import channels_last, no_statistics, weight_format
from resnet_fused.tuning import ConvConfig
from resnet_fused.tuning.problems import convolution

_KEPT = 1024  # problems: a large model has some tens
_ALIGNED = 16  # bytes


class Geometry(NamedTuple):
    """The arguments of ``_C.Conv3x3``."""

    type: str
    images: int
    height: int  # of the input
    width: int
    channels: int  # of the input
    filters: int
    stride: int
    dilation: int
    groups: int
    device: int


class Fprop(NamedTuple):
    """What comes with a forward convolution, for ``_C.Conv3x3.fprop``."""

    deferred: bool
    bias: bool = False
    residual: bool = False
    relu: bool = False
    statistics: bool = False


class Dgrad(NamedTuple):
    """What comes with the gradient of the input, for ``_C.Conv3x3.dgrad``."""

    sign: str  # "none", "bits", "values"
    factor: bool  # a
    partner: bool  # y, b, c
    deferred: bool
    sums: bool
    skip: bool
    skip_sign: str
    keep_dy: bool = False  # whether dy, which is formed, is written too


class Wgrad(NamedTuple):
    """What comes with the gradient of the weight, for ``_C.Conv3x3.wgrad``."""

    sign: str
    factor: bool
    partner: bool
    deferred: bool
    out: str  # dtype of the result


Chosen = tuple[str, int, int, str]  # a configuration as the extension has it


def _geometry(x: Tensor, weight: Tensor, stride: int, dilation: int, groups: int) -> Geometry:
    n, c, h, w = x.shape
    return Geometry(_type(x.dtype), n, h, w, c, weight.shape[0], stride, dilation, groups, x.device.index or 0)


def _type(dtype: torch.dtype) -> str:
    """fp32 operands are multiplied as TF32 where PyTorch's convolutions may, else as three TF32 products."""
    cudnn: Any = torch.backends.cudnn
    return "tf32" if dtype == torch.float32 and cudnn.conv.fp32_precision == "tf32" else SHORT[dtype]


def _fprop_forms(x, scale, shift, slope, weight, *rest) -> tuple[Geometry, Fprop]:
    *geometry, statistics = rest
    return _geometry(x, weight, *geometry), Fprop(scale is not None, statistics=statistics)


def _infer_forms(x, scale, shift, slope, weight, bias, residual, *rest) -> tuple[Geometry, Fprop]:
    *geometry, relu, _ = rest
    return _geometry(x, weight, *geometry), Fprop(scale is not None, True, residual is not None, relu)


def _dgrad_forms(
    dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale, *geometry
) -> tuple[Geometry, Dgrad]:
    grad = _sign_kind(sign), a is not None, y is not None
    skips = skip is not None, _sign_kind(skip_sign if skip is not None else None)
    return _geometry(x, weight, *geometry), Dgrad(*grad, scale is not None, mean is not None, *skips)


def _wgrad_forms(dz, sign, y, a, b, c, weight, x, scale, shift, slope, *rest) -> tuple[Geometry, Wgrad]:
    *geometry, dtype = rest
    grad = _sign_kind(sign), a is not None, y is not None
    return _geometry(x, weight, *geometry), Wgrad(*grad, scale is not None, SHORT[dtype])


_FORMS: dict[str, Callable[..., tuple[Geometry, Any]]] = {
    "conv3x3_fprop": _fprop_forms,
    "conv3x3_infer": _infer_forms,
    "conv3x3_dgrad": _dgrad_forms,
    "conv3x3_wgrad": _wgrad_forms,
}


@functools.lru_cache(_KEPT)
def _problem(kernels: ModuleType, geometry: Geometry) -> Any:
    """The extension's problem, or the sentence that says what of it does not fit."""
    try:
        return kernels.Conv3x3(**geometry._asdict())
    except ValueError as error:
        return str(error)


@functools.lru_cache(_KEPT)
def _built(kernels: ModuleType, geometry: Geometry, forms: Any, config: Chosen | None) -> Any:
    build = getattr(_problem(kernels, geometry), type(forms).__name__.lower())
    return build(**forms._asdict(), config=config)


def _launcher(op: str, args: Sequence[Any], **changed: Any) -> Any:
    """What runs ``op`` on flat arguments, some of their forms changed.

    It has the configuration that is asked for if that can run them, else the extension's choice.
    """
    geometry, forms = _FORMS[op](*args)
    forms = forms._replace(**changed) if changed else forms
    first = _built(extension.module, geometry, forms, None)
    asked = tuning.asked(op, convolution(op, *args), args[0].device, ConvConfig)
    if asked is None:
        return first
    config = (asked.chip, asked.rows, asked.columns, asked.feed)
    return _built(extension.module, geometry, forms, config) if config in first.configs else first


def candidates(op: str, *args: Any) -> tuple[ConvConfig, ...]:
    """The configurations of ``op`` on these flat arguments, the default first."""
    return tuple(ConvConfig(*config) for config in _built(extension.module, *_FORMS[op](*args), None).configs)


# --- tensors as the kernels read them -------------------------------------------------------------------------------


def _dense(t: Tensor) -> Tensor:
    """``t`` in channels_last, from an address that 16-byte accesses may begin at."""
    t = channels_last(t)
    return t.clone() if t.data_ptr() % _ALIGNED else t


def _dense_sign(sign: Tensor | None) -> Tensor | None:
    if sign is None:
        return None
    return sign.contiguous() if sign.dtype == torch.uint8 else _dense(sign)


def _optional(t: Tensor | None) -> Tensor | None:
    return None if t is None else _dense(t)


def _vector(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def _sign_kind(sign: Tensor | None) -> str:
    return "none" if sign is None else "bits" if sign.dtype == torch.uint8 else "values"


def _workspace(launcher: Any, device: torch.device) -> Tensor | None:
    return torch.empty(launcher.workspace, dtype=torch.uint8, device=device) if launcher.workspace else None


def _counters(launcher: Any, device: torch.device) -> Tensor | None:
    return counters(device, launcher.counters) if launcher.counters else None


def _output(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    p, q = ((size - 1) // stride + 1 for size in x.shape[2:])
    shape = (x.shape[0], weight.shape[0], p, q)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


# --- the ops ----------------------------------------------------------------------------------------------------------
#
# A name that is bound anew keeps a copy alive until its kernel is enqueued; the allocator reuses it in stream order.


def _forward(
    launcher: Any, x, scale, shift, weight, bias, residual, stride: int, statistics: bool
) -> tuple[Tensor, ...]:
    x, weight, residual = _dense(x), _dense(weight), _optional(residual)
    scale, shift, bias = _vector(scale), _vector(shift), _vector(bias)
    y = _output(x, weight, stride)
    tile: tuple[Tensor, ...] = ()
    if statistics:
        mean, m2 = torch.empty((2, 1, y.shape[1]), dtype=torch.float32, device=y.device).unbind()
        tile = torch.empty(1, dtype=torch.int32, device=y.device), mean, m2
    workspace, arrived = _workspace(launcher, x.device), _counters(launcher, x.device)
    tensors = (x, scale, shift, weight, bias, residual, y, *(tile or (None,) * 3), workspace, arrived)
    _device.run(launcher.run, x.device, *tensors)
    return (y, *(tile or no_statistics(y)))


def fprop(*args: Any) -> tuple[Tensor, ...]:
    """``y = conv2d(x or relu(x * scale + shift), weight)`` and one tile of statistics."""
    x, scale, shift, _, weight, stride, _, _, statistics = args
    return _forward(_launcher("conv3x3_fprop", args), x, scale, shift, weight, None, None, stride, statistics)


def infer(*args: Any) -> Tensor:
    """``relu(conv2d(x or relu(x * scale + shift), weight) + bias + residual)``."""
    x, scale, shift, _, weight, bias, residual, stride, *_ = args
    return _forward(_launcher("conv3x3_infer", args), x, scale, shift, weight, bias, residual, stride, False)[0]


def _dense_gradient(dz, sign, y, a, b, c) -> tuple[Any, ...]:
    return (_dense(dz), _dense_sign(sign), _optional(y), *map(_vector, (a, b, c)))


def _input_gradient(launcher: Any, grad, weight, x, scale, shift, mean, rstd, skip, skip_sign, skip_scale, *, dy):
    """``(dx, dbeta, dgamma, dslope)`` of a dense gradient; ``dy`` takes it as it was formed."""
    read = None if scale is None else _dense(x)
    weight, skip, skip_sign = _dense(weight), _optional(skip), _dense_sign(skip_sign if skip is not None else None)
    scale, shift, mean, rstd = map(_vector, (scale, shift, mean, rstd))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    none = torch.empty(0, dtype=torch.float32, device=x.device)
    sums: tuple[Tensor, ...] = ()
    if mean is not None:
        sums = torch.empty((2, x.shape[1]), dtype=torch.float32, device=x.device).unbind()
    workspace, arrived = _workspace(launcher, x.device), _counters(launcher, x.device)
    operands = (*grad, weight, read, scale, shift, mean, rstd, skip, skip_sign)
    written = (dx, *(sums or (None, None)), dy, workspace, arrived)
    _device.run(launcher.run, x.device, *operands, skip_scale, *written)
    return (dx, *(sums or (none, none.clone())), none.clone())


def dgrad(*args: Any) -> tuple[Tensor, ...]:
    """Gradient of the input, ``dy`` formed as it is read; its ReLU, skip gradient and sums on the way out."""
    weight, x, scale, shift, _, *ends = args[6:16]
    launcher = _launcher("conv3x3_dgrad", args)
    return _input_gradient(launcher, _dense_gradient(*args[:6]), weight, x, scale, shift, *ends, dy=None)


def _weight_gradient(launcher: Any, grad, weight, x, scale, shift, dtype: torch.dtype) -> Tensor:
    """``dw`` of a dense gradient."""
    x = _dense(x)
    dw = torch.empty(weight.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    scale, shift, workspace = _vector(scale), _vector(shift), _workspace(launcher, x.device)
    _device.run(launcher.run, x.device, *grad, x, scale, shift, dw, workspace)
    return weight_format(dw, weight)


def wgrad(*args: Any) -> Tensor:
    """Gradient of the weight, both operands formed as they are read."""
    weight, x, scale, shift = args[6:10]
    launcher = _launcher("conv3x3_wgrad", args)
    return _weight_gradient(launcher, _dense_gradient(*args[:6]), weight, x, scale, shift, args[-1])


def bprop(*args: Any) -> tuple[Tensor, ...]:
    """dgrad writes the ``dy`` that it forms, and wgrad reads it; each forms its own where dgrad cannot."""
    weight, x, scale, shift, _, *ends = args[6:16]
    grad, x = _dense_gradient(*args[:6]), _dense(x)
    dgrads, wgrads, dy = args[:-1], (*args[:11], *args[16:]), None
    first, second = _launcher("conv3x3_dgrad", dgrads), _launcher("conv3x3_wgrad", wgrads)
    if grad[1] is not None or grad[3] is not None:
        keeps = _launcher("conv3x3_dgrad", dgrads, keep_dy=True)
        if keeps.configs:
            first, second = keeps, _launcher("conv3x3_wgrad", wgrads, sign="none", factor=False, partner=False)
            dy = torch.empty_like(grad[0])
    found = _input_gradient(first, grad, weight, x, scale, shift, *ends, dy=dy)
    read = grad if dy is None else (dy, *[None] * 5)
    return (*found, _weight_gradient(second, read, weight, x, scale, shift, args[-1]))


# --- what the kernels decline -----------------------------------------------------------------------------------------


def _unsupported(tensors: Sequence[Tensor | None], x: Tensor, weight: Tensor, geometry: Sequence[int]) -> str | None:
    """What every op declines; ``tensors`` are all of its arguments that are."""
    if extension.module is None:
        return extension.reason
    reason = _device.unsupported(extension.module, *tensors)
    if reason is not None:
        return reason
    if x.dtype not in SHORT:
        return f"the kernel is written for float32, float16 and bfloat16, not {x.dtype}"
    other = next((t.dtype for t in tensors if t is not None and t.dim() == 4 and t.dtype != x.dtype), None)
    if other is not None:
        return f"the kernel reads activations of one dtype, not {x.dtype} and {other}"
    if x.numel() == 0:
        return "a tensor is empty"
    problem = _problem(extension.module, _geometry(x, weight, *geometry))
    return problem if isinstance(problem, str) else None


def _prelu(*slopes: Tensor | None) -> str | None:
    return None if all(slope is None for slope in slopes) else "the kernel has the ReLU only, not the PReLU's slopes"


def _unconfigured(op: str, args: Sequence[Any]) -> str | None:
    geometry, forms = _FORMS[op](*args)
    if _built(extension.module, geometry, forms, None).configs:
        return None
    return f"no configuration of the kernel runs {geometry} with {forms}"


def _fprop_unsupported(*args: Any) -> str | None:
    x, scale, shift, slope, weight, *geometry, _ = args
    reason = _unsupported((x, scale, shift, weight), x, weight, geometry) or _prelu(slope)
    return reason or _unconfigured("conv3x3_fprop", args)


def _infer_unsupported(*args: Any) -> str | None:
    x, scale, shift, slope, weight, bias, residual, *geometry, _, out_slope = args
    reason = _unsupported((x, scale, shift, weight, bias, residual), x, weight, geometry) or _prelu(slope, out_slope)
    return reason or _unconfigured("conv3x3_infer", args)


def _dgrad_unsupported(*args: Any) -> str | None:
    weight, x, _, _, slope = args[6:11]
    tensors = [x, *(a for a in args if isinstance(a, Tensor))]
    reason = _unsupported(tensors, x, weight, args[16:]) or _prelu(slope)
    return reason or _unconfigured("conv3x3_dgrad", args)


def _wgrad_unsupported(*args: Any) -> str | None:
    weight, x, _, _, slope, *geometry, dtype = args[6:]
    reason = _unsupported([x, *args[:10]], x, weight, geometry) or _prelu(slope)
    if reason is None and dtype not in SHORT:
        reason = f"the kernel writes float32, float16 and bfloat16, not {dtype}"
    return reason or _unconfigured("conv3x3_wgrad", args)


def _bprop_unsupported(*args: Any) -> str | None:
    return _dgrad_unsupported(*args[:-1]) or _wgrad_unsupported(*args[:11], *args[16:])


# --- registration -----------------------------------------------------------------------------------------------------


def _preferred(op: str) -> Callable[..., bool]:
    def preferred(*args: Any) -> bool:
        device = args[0].device
        contested = tuning.contested(op, device, "cuda")
        return not (contested and tuning.loses(op, convolution(op, *args), device, "cuda"))

    return preferred


def _register(direction: str, run: Callable[..., Any], unsupported_reason: Callable[..., str | None]) -> None:
    op = f"conv3x3_{direction}"
    # bprop takes what its halves take.
    choices = functools.partial(candidates, op) if op in _FORMS else None
    extra: dict[str, Any] = {"preferred": _preferred(op), "candidates": choices}
    backends.register(op, "cuda", run, unsupported_reason, default=False, **extra)


_register("fprop", fprop, _fprop_unsupported)
_register("infer", infer, _infer_unsupported)
_register("dgrad", dgrad, _dgrad_unsupported)
_register("wgrad", wgrad, _wgrad_unsupported)
_register("bprop", bprop, _bprop_unsupported)
