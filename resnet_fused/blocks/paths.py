"""Which path a fused block takes for a call, why, and how that is made visible."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from resnet_fused import backends
from resnet_fused.ops._check import FLOATING

TRAIN, INFER, ORIGINAL = "train", "infer", "original"


class Reason(NamedTuple):
    """Why a block is not fused: a short stable code and a sentence."""

    code: str
    detail: str


class Call(NamedTuple):
    """One call of a fused module, as :func:`recording` collects them."""

    module: nn.Module
    path: str
    reason: Reason | None


_disabled: ContextVar[bool] = ContextVar("resnet_fused_disabled", default=False)
_recorder: ContextVar[list[Call] | None] = ContextVar("resnet_fused_recorder", default=None)


_disabled_contexts = 0  # open in any thread: torch.compile guards on an int, not on a ContextVar before 2.14


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Run every fused block by its original forward within the context, compiled ones in other threads too."""
    global _disabled_contexts
    token = _disabled.set(True)
    _disabled_contexts += 1
    try:
        yield
    finally:
        _disabled_contexts -= 1
        _disabled.reset(token)


def _is_disabled() -> bool:
    return _disabled_contexts > 0 if torch.compiler.is_compiling() else _disabled.get()


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """Collect the path of every fused module called within the context."""
    calls: list[Call] = []
    token = _recorder.set(calls)
    try:
        yield calls
    finally:
        _recorder.reset(token)


def take(module: nn.Module, path: str, reason: Reason | None = None) -> None:
    """Make the path of one call visible: to a recorder, and (a fallback) in the log and the counts."""
    calls = _recorder.get()
    if calls is not None:
        calls.append(Call(module, path, reason))
    if reason is not None:
        backends.note_fallback(type(module).__name__, reason.detail)


def transformed(x: Any) -> Reason | None:
    """Why the way this call is made, not the block itself, needs PyTorch's own operators."""
    if _is_disabled():
        return Reason("disabled", "inside resnet_fused.disabled()")
    if torch.compiler._is_exporting_flag:  # is_exporting() is taken as True by the torch.compile of 2.11
        return Reason(
            "export", "exported programs, ONNX included, hold PyTorch's own operators and run without this package"
        )
    if isinstance(x, torch.fx.Proxy):
        return Reason("fx", "symbolic tracing sees the original modules (name the block a leaf to keep it fused)")
    if torch.jit.is_tracing():
        return Reason("tracing", "torch.jit.trace and ONNX export record the original modules")
    if torch._C._are_functorch_transforms_active():
        return Reason("functorch", "vmap, grad and jvp differentiate PyTorch's own operators")
    if forward_ad._current_level >= 0:
        return Reason("forward-mode", "forward-mode differentiation needs PyTorch's own operators")
    if _has_any_global_hook():
        return Reason("hooks", "a global module hook sees the call of every module")
    if type(x) not in (Tensor, nn.Parameter) and not isinstance(x, FakeTensor):
        return Reason("subclass", f"the input is a {type(x).__name__}")
    if x.device.type not in ("cpu", "cuda") or x.layout != torch.strided:
        return Reason("device", f"no fused path for {x.layout} tensors on device {x.device.type}")
    return None


def input_reason(x: Tensor, synchronised: bool) -> Reason | None:
    """Why tensors like ``x`` go to PyTorch's modules; ``synchronised``: other ranks wait even for an empty batch."""
    if x.dim() != 4 or x.dtype not in FLOATING:
        return Reason("input", f"the input is {x.dim()}-d {x.dtype}, not a 4-d floating tensor")
    if x.numel() == 0 and not synchronised:
        return Reason("empty", "the input is empty")
    return None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def descendants(module: nn.Module) -> list[nn.Module]:
    """Every module below ``module``, each call anew: children may be replaced at any time."""
    found: list[nn.Module] = []
    for child in module._modules.values():
        if child is not None:
            found.append(child)
            if child._modules:
                found += descendants(child)
    return found


def signature(modules: Iterable[nn.Module]) -> list[Any]:
    """All that decides about fusing, of each module; equal lists mean equal decisions."""
    marks: list[Any] = []
    for module in modules:
        attributes = module.__dict__
        marks += (module, type(module), attributes.get("training"), has_hooks(module))
        if "stride" in attributes:
            marks += map(attributes.get, _GEOMETRY)
            marks.append(attributes["_parameters"].get("bias") is None)
        elif "drop_prob" in attributes:
            marks.append(attributes["drop_prob"])
    return marks


_GEOMETRY = ("kernel_size", "stride", "padding", "padding_mode", "dilation", "groups")
