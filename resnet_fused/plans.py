"""Plans: what a function did on the device, as straight-line Python; the next call skips all that decided about it.

A block's forward is some ten launches behind a hundred decisions, which shapes and settings fix. :func:`call` runs a
function as it is written the first time that it sees arguments of some kind; the second time it records allocations,
launches and PyTorch's computing operators; from the third time on these alone are done again. Views are gone: a launch
takes addresses. What is allocated is freed after its last use, as before.

Whoever calls a function through :func:`call` promises that nothing but the static arguments, the tensors' metadata and
what :func:`_settings` reads decides about what it does, and that it reads no tensor's values in Python.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from resnet_fused import backends, config

Function = Callable[..., tuple[Tensor | None, ...]]
"""Of static arguments and tensors (or None); returns tensors (or None)."""

_KEPT = 1024  # plans; a network has some ten for each size of its input
_ALIGNMENT = 15  # the lowest bits of an address decide which kernel may read it
_SMALL = 1 << 18  # bytes; what is allocated for launches alone, up to this, is allocated together
_APART = 256  # bytes, of which the addresses in it are multiples


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
_local = threading.local()  # .recorder: of this thread
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


def recorder() -> Recorder | None:
    """What records this thread's launches, if a plan is being made."""
    return getattr(_local, "recorder", None)


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


# --- recording --------------------------------------------------------------------------------------------------------


class AsTensor(NamedTuple):
    """An argument of a launch that takes a tensor, or a descriptor's, and not its address."""

    argument: Any


class _Stream:
    """An argument of a launch that is the current stream's handle."""


STREAM = _Stream()


class _Ref(NamedTuple):
    """A tensor as a part of a slot: an argument, or something that was allocated or computed."""

    slot: int
    offset: int  # bytes from the slot's first element
    kind: tuple[Any, ...]  # dtype, shape, strides
    address: bool = False  # of which only the address is taken


class _Step(NamedTuple):
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


class _Unplannable(Exception):
    """Why what was seen cannot be done again."""


class _Slot(NamedTuple):
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
        self.steps: list[_Step] = []
        self.slots: list[_Slot | None] = [None if t is None else _slot(t) for t in tensors]
        self._inputs = [(t.data_ptr(), _extent(t), i) for i, t in enumerate(tensors) if t is not None]
        self._made: dict[int, int] = {}  # the last slot by the address of its storage
        ends = sorted((low, low + extent) for low, extent, _ in self._inputs if extent)
        if any(a[1] > b[0] and a[0] != b[0] for a, b in itertools.pairwise(ends)):
            self.reason = "arguments overlap in memory"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        try:
            self._note(func, args, kwargs or {}, out)
        except (_Unplannable, RuntimeError) as reason:  # the latter of a tensor without an address
            self.reason = self.reason or str(reason)
        return out

    def launch(self, function: Callable[..., Any], *args: Any) -> None:
        """Note a launch, which takes the addresses of tensors, and Triton's descriptors with them.

        AsTensor and STREAM among ``args`` stand for what they say.
        """
        try:
            self.steps.append(_Step(function, [self._argument(a) for a in args], {}, (), False, True))
        except _Unplannable as reason:
            self.reason = self.reason or str(reason)

    def make(self, stream: int, function: Callable[..., Tensor], *args: Any) -> Tensor:
        """Note, and return, a tensor that ``function(stream, *args)`` looks up or makes: it is not allocated here."""
        with unseen():
            out = function(stream, *args)
        self.steps.append(_Step(function, [STREAM, *args], {}, (self._add(out),), False, False))
        return out

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if func.overloadpacket in _OF_DTYPES:
            return
        several = isinstance(out, (tuple, list))
        outs = list(out) if several else [out]
        if not all(t is None or isinstance(t, Tensor) for t in outs):
            raise _Unplannable(f"{func} returns numbers")
        if func.overloadpacket in _ALLOCATIONS:
            if outs[0].numel():
                self._allocate(outs[0])
            return
        mutates = func._schema.is_mutable
        read = self._nested(args), self._nested(kwargs)  # before results have slots: one may be a view of nowhere
        new = tuple(self._add(t) if t is not None and t.numel() and self._find(t) is None else None for t in outs)
        if mutates or any(slot is not None for slot in new):  # else a view
            self.steps.append(_Step(func, *read, new, several, mutates))

    def _allocate(self, t: Tensor) -> int:
        given, slot = {"dtype": t.dtype, "device": t.device}, self._add(t)
        self.steps.append(_Step(torch.empty_strided, [tuple(t.shape), t.stride()], given, (slot,), False, False))
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

    def ref(self, t: Tensor, *, address: bool = False) -> _Ref:
        """``t`` as a part of a slot; one without elements is allocated where it is read."""
        found = self._find(t) if t.numel() else (self._allocate(t), 0)
        if found is None:
            raise _Unplannable(f"a tensor of {t.dtype} {tuple(t.shape)} came from nowhere")
        return _Ref(*found, (t.dtype, tuple(t.shape), t.stride()), address)

    def _argument(self, a: Any, address: bool = True) -> Any:
        if isinstance(a, AsTensor):
            return self._argument(a.argument, False)
        if isinstance(a, Tensor):
            return self.ref(a, address=address) if a.numel() or not address else 0
        if isinstance(getattr(a, "base", None), Tensor):
            return _Described(_based(a, None), self.ref(a.base, address=address))
        if isinstance(a, (tuple, list)) and any(isinstance(part, Tensor) for part in a):
            raise _Unplannable("a launch takes several tensors as one argument")
        return a

    def _nested(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.ref(value)
        if isinstance(value, (tuple, list)):
            return [self._nested(v) for v in value]
        if isinstance(value, dict):
            return {name: self._nested(v) for name, v in value.items()}
        return value


class _Described(NamedTuple):
    """A tensor descriptor of Triton's."""

    descriptor: Any  # without its tensor
    base: _Ref


def _slot(t: Tensor) -> _Slot:
    storage = t.untyped_storage()
    kind = t.dtype, tuple(t.shape), t.stride(), t.device
    return _Slot(*kind, t.data_ptr(), StorageWeakRef(storage), storage.nbytes())


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


def _record(
    function: Function, static: Any, tensors: Sequence[Tensor | None], fixed: tuple[Tensor, ...]
) -> tuple[tuple[Tensor | None, ...], Plan]:
    """Run the function, and make its plan."""
    given = (*tensors, *fixed)
    found = Recorder(given)
    _local.recorder = found
    try:
        with found:
            outs = function(static, *tensors)
    finally:
        _local.recorder = None
    if found.reason is None:
        try:
            refs = [None if t is None else found.ref(t) for t in outs]
            return outs, _Writer(found, len(given), refs).plan()
        except _Unplannable as reason:
            found.reason = str(reason)
    return outs, Plan(reason=found.reason)


# --- the plan as source -----------------------------------------------------------------------------------------------


def _part(t: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The tensor at ``offset`` bytes behind the first element of ``t``, in the same memory."""
    if dtype == t.dtype:
        return t.as_strided(shape, stride, t.storage_offset() + offset // t.itemsize)
    first = (t.storage_offset() * t.itemsize + offset) // dtype.itemsize
    return torch.empty(0, dtype=dtype, device=t.device).set_(t.untyped_storage(), first, shape, stride)


class _Address:
    """In the place of a tensor of which only the address is asked for."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _based(descriptor: Any, base: Any) -> Any:
    """A tensor descriptor like this one, of another tensor."""
    found = object.__new__(type(descriptor))
    found.__dict__.update(descriptor.__dict__)
    found.base = base
    return found


def _described(descriptor: Any, base: Tensor | int) -> Any:
    """A tensor descriptor like this one, of another tensor or address."""
    return _based(descriptor, _Address(base) if isinstance(base, int) else base)


class _Writer:
    """Turns steps into a function ``replay(stream, t0, t1, ...)``."""

    def __init__(self, recorder: Recorder, inputs: int, outs: list[_Ref | None]) -> None:
        self._slots, self._inputs, self._outs = recorder.slots, inputs, outs
        self._device = self._slot(0).device
        self._names: dict[str, Any] = {"part": _part, "described": _described}
        self._constants: dict[int, str] = {}
        self._steps = self._live(recorder.steps)
        refs = [ref for step in self._steps for ref in _refs((step.args, step.kwargs))]
        self._addressed = {ref.slot for ref in refs if ref.address}
        as_tensors = {ref.slot for ref in (*refs, *outs) if ref is not None and not ref.address}
        self._offsets: dict[int, int] = {}  # in bytes, of the small ones that launches alone read
        self._nbytes = self._pack(as_tensors)

    def plan(self) -> Plan:
        arguments = ", ".join(["stream", *(f"t{i}" for i in range(self._inputs))])
        lines = [f"p{i} = t{i}.data_ptr()" for i in range(self._inputs) if i in self._addressed]
        if self._offsets:
            given = f"{self._nbytes}, dtype={self._constant(torch.uint8)}, device={self._constant(self._device)}"
            lines += [f"small = {self._constant(torch.empty)}({given})", "p = small.data_ptr()"]
        last = self._last_uses()
        for n, step in enumerate(self._steps):
            lines.append(self._line(step))
            lines += [f"p{slot} = t{slot}.data_ptr()" for slot in step.outs if slot in self._addressed]
            lines += [f"del t{slot}" for slot in last.get(n, ())]
        rows = self._rows()
        lines += [f"u{slot} = t{slot}.unbind()" for slot in rows]
        outs = [self._out(ref, rows) for ref in self._outs]
        parts = [text for text in dict.fromkeys(outs) if text.startswith("part(")]  # one tensor, though returned twice
        lines += [f"v{i} = {text}" for i, text in enumerate(parts)]
        outs = [f"v{parts.index(text)}" if text in parts else text for text in outs]
        lines.append(f"return ({', '.join(outs)}{',' if len(outs) == 1 else ''})")
        source = f"def replay({arguments}):\n" + "\n".join(f"    {line}" for line in lines) + "\n"
        exec(compile(source, "<plan>", "exec"), self._names)
        return Plan(source, self._names["replay"])

    def _live(self, steps: list[_Step]) -> list[_Step]:
        """Without those that only make what nobody reads."""
        used = {ref.slot for ref in self._outs if ref is not None}
        found = []
        for step in reversed(steps):
            if step.effect or any(slot in used for slot in step.outs):
                found.append(step)
                used.update(ref.slot for ref in _refs((step.args, step.kwargs)))
        return found[::-1]

    def _pack(self, as_tensors: set[int]) -> int:
        """Give the small allocations that nobody needs as tensors a place in one; returns its bytes."""
        nbytes, others = 0, []
        for step in self._steps:
            slot = step.outs[0] if step.function is torch.empty_strided else None
            made = None if slot is None or slot in as_tensors else self._slot(slot)
            if slot is not None and made is not None and made.nbytes <= _SMALL and made.device == self._device:
                self._offsets[slot] = nbytes
                nbytes += -(-made.nbytes // _APART) * _APART
            else:
                others.append(step)
        self._steps = others
        return nbytes

    def _slot(self, slot: int) -> _Slot:
        found = self._slots[slot]
        assert found is not None
        return found

    def _last_uses(self) -> dict[int, list[int]]:
        """Slots by the step after which they may go."""
        returned = {ref.slot for ref in self._outs if ref is not None}
        last: dict[int, int] = {}
        for n, step in enumerate(self._steps):
            for slot in (*step.outs, *(ref.slot for ref in _refs((step.args, step.kwargs)))):
                if slot is not None:
                    last[slot] = n
        found: dict[int, list[int]] = {}
        for slot, n in last.items():
            if slot not in returned and slot >= self._inputs and slot not in self._offsets:
                found.setdefault(n, []).append(slot)
        return found

    def _line(self, step: _Step) -> str:
        args = [self._expression(a) for a in step.args]
        args += [f"{name}={self._expression(a)}" for name, a in step.kwargs.items()]
        text = f"{self._constant(step.function)}({', '.join(args)})"
        outs = ["_" if slot is None else f"t{slot}" for slot in step.outs]
        if all(out == "_" for out in outs):
            return text
        return f"{', '.join(outs)}{',' if step.several and len(outs) == 1 else ''} = {text}"

    def _expression(self, value: Any) -> str:
        if isinstance(value, _Ref):
            if value.address:
                place = self._offsets.get(value.slot)
                name, offset = (f"p{value.slot}", value.offset) if place is None else ("p", place + value.offset)
                return f"{name} + {offset}" if offset else name
            return self._tensor(value)
        if isinstance(value, _Described):
            return f"described({self._constant(value.descriptor)}, {self._expression(value.base)})"
        if value is STREAM:
            return "stream"
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        if isinstance(value, list):
            return f"[{', '.join(map(self._expression, value))}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{name!r}: {self._expression(v)}' for name, v in value.items())}}}"
        return self._constant(value)

    def _tensor(self, ref: _Ref) -> str:
        like = self._slot(ref.slot)
        if ref.offset == 0 and ref.kind == like[:3]:
            return f"t{ref.slot}"
        dtype, shape, stride = ref.kind
        return f"part(t{ref.slot}, {ref.offset}, {self._constant(dtype)}, {shape}, {stride})"

    def _rows(self) -> dict[int, list[_Ref]]:
        """Slots of which several rows are returned."""
        found: dict[int, list[_Ref]] = {}
        for ref in self._outs:
            if ref is not None and self._row(ref) is not None:
                found.setdefault(ref.slot, []).append(ref)
        return {slot: refs for slot, refs in found.items() if len(refs) > 1}

    def _row(self, ref: _Ref) -> int | None:
        """Which row of its slot a reference is."""
        like = self._slot(ref.slot)
        if not like.shape or ref.kind != (like.dtype, like.shape[1:], like.stride[1:]) or like.stride[0] <= 0:
            return None
        row, rest = divmod(ref.offset, like.stride[0] * like.dtype.itemsize)
        return row if rest == 0 and row < like.shape[0] else None

    def _out(self, ref: _Ref | None, rows: dict[int, list[_Ref]]) -> str:
        if ref is None:
            return "None"
        if ref.slot in rows:
            row = self._row(ref)
            if row is not None:
                return f"u{ref.slot}[{row}]"
        return self._tensor(ref)

    def _constant(self, value: Any) -> str:
        """The name under which the source finds a value."""
        name = self._constants.get(id(value))
        if name is None:
            name = self._constants[id(value)] = f"c{len(self._constants)}"
            self._names[name] = value
        return name


def _refs(value: Any) -> Iterator[_Ref]:
    """All references in a step's arguments."""
    if isinstance(value, _Ref):
        yield value
    elif isinstance(value, _Described):
        yield value.base
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _refs(v)
    elif isinstance(value, dict):
        yield from _refs(list(value.values()))
