"""Notes what a function does on the device while it runs: what a plan does again."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_local = threading.local()  # .recorder: of this thread


def recorder() -> Recorder | None:
    """What records this thread's launches, if a plan is being made."""
    return getattr(_local, "recorder", None)


@contextlib.contextmanager
def recording(found: Recorder) -> Iterator[None]:
    """Within it ``found`` records what this thread does."""
    _local.recorder = found
    try:
        with found:
            yield
    finally:
        _local.recorder = None


class AsTensor(NamedTuple):
    """An argument of a launch that takes a tensor, or a descriptor's, and not its address."""

    argument: Any


class _Stream:
    """An argument of a launch that is the current stream's handle."""


STREAM = _Stream()


class Ref(NamedTuple):
    """A tensor as a part of a slot: an argument, or something that was allocated or computed."""

    slot: int
    offset: int  # bytes from the slot's first element
    kind: tuple[Any, ...]  # dtype, shape, strides
    address: bool = False  # of which only the address is taken


class Step(NamedTuple):
    """Something that is done on the device, or allocated."""

    function: Any
    args: Any  # references in the place of tensors
    kwargs: dict[str, Any]
    outs: tuple[int | None, ...]  # slots that it makes
    several: bool  # whether it returns a tuple
    effect: bool  # whether it counts even if nobody reads what it returns


_ALLOCATIONS = frozenset(
    getattr(torch.ops.aten, name) for name in ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
)


_OF_DTYPES = frozenset([torch.ops.aten.promote_types, torch.ops.aten.result_type])  # what they return, the key decides


class Unplannable(Exception):
    """Why what was seen cannot be done again."""


class Slot(NamedTuple):
    """A tensor that was given, allocated or computed; it is not held, so memory is freed as without a recorder."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device
    address: int
    storage: StorageWeakRef
    nbytes: int  # of the storage


class Recorder(TorchDispatchMode):
    """Notes what a function does with its tensors while it runs."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.reason: str | None = None
        self.steps: list[Step] = []
        self.slots: list[Slot | None] = [None if t is None else _slot(t) for t in tensors]
        self._inputs = [(t.data_ptr(), _extent(t), i) for i, t in enumerate(tensors) if t is not None]
        self._made: dict[int, int] = {}  # the last slot by the address of its storage
        ends = sorted((low, low + extent) for low, extent, _ in self._inputs if extent)
        if any(a[1] > b[0] and a[0] != b[0] for a, b in itertools.pairwise(ends)):
            self.reason = "arguments overlap in memory"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        try:
            self._note(func, args, kwargs or {}, out)
        except (Unplannable, RuntimeError) as reason:  # the latter of a tensor without an address
            self.reason = self.reason or str(reason)
        return out

    def launch(self, function: Callable[..., Any], *args: Any) -> None:
        """Note a launch, which takes the addresses of tensors, and Triton's descriptors with them.

        AsTensor and STREAM among ``args`` stand for what they say.
        """
        try:
            self.steps.append(Step(function, [self._argument(a) for a in args], {}, (), False, True))
        except Unplannable as reason:
            self.reason = self.reason or str(reason)

    def make(self, stream: int, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Note, and return, a tensor that ``function(stream, *args)`` looks up or makes: it is not allocated here."""
        with unseen():
            out = function(stream, *args)
        self.steps.append(Step(function, [STREAM, *args], {}, (self._add(out),), False, False))
        return out

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if func.overloadpacket in _OF_DTYPES:
            return
        several = isinstance(out, (tuple, list))
        outs = list(out) if several else [out]
        if not all(t is None or isinstance(t, Tensor) for t in outs):
            raise Unplannable(f"{func} returns numbers")
        if func.overloadpacket in _ALLOCATIONS:
            if outs[0].numel():
                self._allocate(outs[0])
            return
        mutates = func._schema.is_mutable
        read = self._nested(args), self._nested(kwargs)  # before results have slots: one may be a view of nowhere
        new = tuple(self._add(t) if t is not None and t.numel() and self._find(t) is None else None for t in outs)
        if mutates or any(slot is not None for slot in new):  # else a view
            self.steps.append(Step(func, *read, new, several, mutates))

    def _allocate(self, t: Tensor) -> int:
        given, slot = {"dtype": t.dtype, "device": t.device}, self._add(t)
        self.steps.append(Step(torch.empty_strided, [tuple(t.shape), t.stride()], given, (slot,), False, False))
        return slot

    def _add(self, t: Tensor) -> int:
        """A slot for a tensor in memory that was not there before."""
        self.slots.append(_slot(t))
        slot = len(self.slots) - 1
        if t.numel():
            self._made[t.untyped_storage().data_ptr()] = slot
        return slot

    def _find(self, t: Tensor) -> tuple[int, int] | None:
        """Slot and offset of ``t``'s first element."""
        address = t.data_ptr()
        slot = self._made.get(t.untyped_storage().data_ptr())
        made = None if slot is None else self.slots[slot]
        if slot is not None and made is not None and not made.storage.expired():
            return slot, address - made.address
        for low, extent, i in self._inputs:
            if low <= address and address + _extent(t) <= low + extent:
                return i, address - low
        return None

    def ref(self, t: Tensor, *, address: bool = False) -> Ref:
        """``t`` as a part of a slot; one without elements is allocated where it is read."""
        found = self._find(t) if t.numel() else (self._allocate(t), 0)
        if found is None:
            raise Unplannable(f"a tensor of {t.dtype} {tuple(t.shape)} came from nowhere")
        return Ref(*found, (t.dtype, tuple(t.shape), t.stride()), address)

    def _argument(self, a: Any, address: bool = True) -> Any:
        if isinstance(a, AsTensor):
            return self._argument(a.argument, False)
        if isinstance(a, Tensor):
            return self.ref(a, address=address) if a.numel() or not address else 0
        if isinstance(getattr(a, "base", None), Tensor):
            return Described(based(a, None), self.ref(a.base, address=address))
        if isinstance(a, (tuple, list)) and any(isinstance(part, Tensor) for part in a):
            raise Unplannable("a launch takes several tensors as one argument")
        return a

    def _nested(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.ref(value)
        if isinstance(value, (tuple, list)):
            return [self._nested(v) for v in value]
        if isinstance(value, dict):
            return {name: self._nested(v) for name, v in value.items()}
        return value


class Described(NamedTuple):
    """A tensor descriptor of Triton's."""

    descriptor: Any  # without its tensor
    base: Ref


def _slot(t: Tensor) -> Slot:
    storage = t.untyped_storage()
    kind = t.dtype, tuple(t.shape), t.stride(), t.device
    return Slot(*kind, t.data_ptr(), StorageWeakRef(storage), storage.nbytes())


def _extent(t: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if t.numel() == 0:
        return 0
    return (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.itemsize


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Within it nothing of this thread is recorded."""
    found = recorder()
    if found is None:
        yield
        return
    _local.recorder = None
    try:
        with _disable_current_modes():
            yield
    finally:
        _local.recorder = found


def based(descriptor: Any, base: Any) -> Any:
    """A tensor descriptor like this one, of another tensor."""
    found = object.__new__(type(descriptor))
    found.__dict__.update(descriptor.__dict__)
    found.base = base
    return found


def refs_in(value: Any) -> Iterator[Ref]:
    """All references in a step's arguments."""
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, Described):
        yield value.base
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from refs_in(v)
    elif isinstance(value, dict):
        yield from refs_in(list(value.values()))
