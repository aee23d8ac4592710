"""Plans: what a function did on the device, as straight-line Python; the next call skips all that decided about it.

A block is a score of launches behind many checks and choices, which shapes and settings decide. :func:`call` runs a
function as it is written the first time that it sees arguments of some kind; the second time it records allocations,
launches and PyTorch's computing operators; from the third time on these alone are done again. Views are gone: a launch
takes addresses. What is allocated is freed after its last use, as before.

Whoever calls a function through :func:`call` promises that nothing but the static arguments, the tensors' metadata and
what :func:`_settings` reads decides about what it does, and that it reads no tensor's values in Python.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused import backends, config
from resnet_fused.plans.record import STREAM, AsTensor, Recorder, Unplannable, recorder, recording, unseen
from resnet_fused.plans.source import write

__all__ = [
    "STREAM", "AsTensor", "Own", "Plan", "Recorder", "call", "captures", "everywhere", "forget", "plans", "recorder",
    "suspended", "unseen",
]  # fmt: skip

Function = Callable[..., tuple[Tensor | None, ...]]
"""Of static arguments and tensors (or None); returns tensors (or None)."""

_KEPT = 1024  # plans; a network has some ten for each size of its input
_ALIGNMENT = 15  # the lowest bits of an address decide which kernel may read it


class Plan:
    """One function for one kind of arguments.

    Attributes:
        source: what is run, as text.
        reason: why there is no plan; None if there is one.
    """

    def __init__(self, source: str = "", run: Callable[..., Any] | None = None, reason: str | None = None) -> None:
        self.source, self.run, self.reason = source, run, reason


_SEEN = Plan(reason="called once")
_plans: dict[Hashable, Plan] = {}
_adding = threading.Lock()
_suspended = 0  # contexts in any thread within which every call runs as it is written
_everywhere = False  # whether calls on the CPU are planned too; there is little to gain, but for tests


def call(function: Function, static: Hashable, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """``function(static, *tensors)``, by a plan where there is one; the first tensor tells the device."""
    return _call(_plans, (function, static), function, static, tensors, ())


class Own:
    """Plans of one function with one static argument, such as an object that it is a method of; they live as this does.

    Args:
        fixed: tensors that the function reads besides its arguments. They are not looked at again: they are to stay
            what and where they are.
    """

    def __init__(self, fixed: Sequence[Tensor] = ()) -> None:
        self._fixed = tuple(fixed)
        self._plans: dict[Hashable, Plan] = {}

    def call(self, function: Function, static: Any, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """As :func:`call`."""
        return _call(self._plans, (), function, static, tensors, self._fixed)

    def plans(self) -> list[Plan]:
        """All that were made."""
        return [plan for plan in list(self._plans.values()) if plan is not _SEEN]


def _call(
    kept: dict[Hashable, Plan],
    name: tuple[Hashable, ...],
    function: Function,
    static: Any,
    tensors: Sequence[Tensor | None],
    fixed: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    first = tensors[0]
    assert first is not None
    if not _plannable(first):
        return function(static, *tensors)
    key = (*name, *_kinds(tensors), *_settings(first))
    plan = kept.get(key)
    if plan is not None and plan.run is not None:
        return _replay(plan.run, first, (*tensors, *fixed))
    if plan is None:
        with _adding:
            while len(kept) >= _KEPT:
                del kept[next(iter(kept))]
            kept[key] = _SEEN
    elif plan is _SEEN:
        kept[key] = Plan(reason="failed while it was recorded")
        found, kept[key] = _record(function, static, tensors, fixed)
        return found
    return function(static, *tensors)


def plans() -> list[Plan]:
    """All that were made by :func:`call`."""
    return [plan for plan in list(_plans.values()) if plan is not _SEEN]


def forget() -> None:
    """Drop all of them."""
    with _adding:
        _plans.clear()


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """Within it every call in any thread runs as it is written: something looks at ops or launches, or changes them."""
    global _suspended
    _suspended += 1
    try:
        yield
    finally:
        _suspended -= 1


@contextlib.contextmanager
def everywhere() -> Iterator[None]:
    """Within it calls on the CPU are planned too, as they are on a GPU."""
    global _everywhere
    before, _everywhere = _everywhere, True
    try:
        yield
    finally:
        _everywhere = before


def _plannable(first: Tensor) -> bool:
    if type(first) is not Tensor and type(first) is not torch.nn.Parameter:
        return False
    if torch.compiler.is_compiling() or _suspended or torch._C._len_torch_dispatch_stack():
        return False
    if not first.is_cuda:
        return _everywhere
    return config.plans() and not captures(first.device)


def captures(device: torch.device) -> bool:
    """Whether the current stream of a CUDA device is being captured into a graph."""
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _kinds(tensors: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Of each tensor what may decide, and which are the same one."""
    kinds = tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    low = tuple([a & _ALIGNMENT for a in addresses])
    known = [a for a in addresses if a]
    same = () if len(set(known)) == len(known) else tuple(map(addresses.index, addresses))
    return kinds, low, same


def _settings(first: Tensor) -> tuple[Any, ...]:
    """What else decides."""
    cudnn: Any = torch.backends.cudnn
    tf32 = first.dtype == torch.float32 and cudnn.conv.fp32_precision
    return backends.forced(), tf32, torch.is_inference_mode_enabled()


def _replay(run: Callable[..., Any], first: Tensor, tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    if not first.is_cuda:
        return run(0, *tensors)
    index = first.get_device()
    if index == torch._C._cuda_getDevice():
        return run(torch._C._cuda_getCurrentRawStream(index), *tensors)
    with torch.cuda.device(index):
        return run(torch._C._cuda_getCurrentRawStream(index), *tensors)


def _record(
    function: Function, static: Any, tensors: Sequence[Tensor | None], fixed: tuple[Tensor, ...]
) -> tuple[tuple[Tensor | None, ...], Plan]:
    """Run the function, and make its plan."""
    given = (*tensors, *fixed)
    found = Recorder(given)
    with recording(found):
        outs = function(static, *tensors)
    if found.reason is None:
        try:
            refs = [None if t is None else found.ref(t) for t in outs]
            return outs, Plan(*write(found, len(given), refs))
        except Unplannable as reason:
            found.reason = str(reason)
    return outs, Plan(reason=found.reason)
