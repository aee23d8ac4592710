"""A plan as Python: what was recorded, one line each, with the addresses of the call's own tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resnet_fused.plans.record import STREAM, Described, Recorder, Ref, Slot, Step, based, refs_in

_SMALL = 1 << 18  # bytes; what is allocated for launches alone, up to this, is allocated together
_APART = 256  # bytes, of which the addresses in it are multiples


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


def _described(descriptor: Any, base: Tensor | int) -> Any:
    """A tensor descriptor like this one, of another tensor or address."""
    return based(descriptor, _Address(base) if isinstance(base, int) else base)


def write(recorder: Recorder, inputs: int, outs: list[Ref | None]) -> tuple[str, Callable[..., Any]]:
    """The source of a function ``replay(stream, t0, t1, ...)`` of as many inputs, and the function itself.

    Args:
        outs: what it returns.
    """
    return _Writer(recorder, inputs, outs).write()


class _Writer:
    """Turns steps into source."""

    def __init__(self, recorder: Recorder, inputs: int, outs: list[Ref | None]) -> None:
        self._slots, self._inputs, self._outs = recorder.slots, inputs, outs
        self._device = self._slot(0).device
        self._names: dict[str, Any] = {"part": _part, "described": _described}
        self._constants: dict[int, str] = {}
        self._steps = self._live(recorder.steps)
        refs = [ref for step in self._steps for ref in refs_in((step.args, step.kwargs))]
        self._addressed = {ref.slot for ref in refs if ref.address}
        as_tensors = {ref.slot for ref in (*refs, *outs) if ref is not None and not ref.address}
        self._offsets: dict[int, int] = {}  # in bytes, of the small ones that launches alone read
        self._nbytes = self._pack(as_tensors)

    def write(self) -> tuple[str, Callable[..., Any]]:
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
        return source, self._names["replay"]

    def _live(self, steps: list[Step]) -> list[Step]:
        """Without those that only make what nobody reads."""
        used = {ref.slot for ref in self._outs if ref is not None}
        found = []
        for step in reversed(steps):
            if step.effect or any(slot in used for slot in step.outs):
                found.append(step)
                used.update(ref.slot for ref in refs_in((step.args, step.kwargs)))
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

    def _slot(self, slot: int) -> Slot:
        found = self._slots[slot]
        assert found is not None
        return found

    def _last_uses(self) -> dict[int, list[int]]:
        """Slots by the step after which they may go."""
        returned = {ref.slot for ref in self._outs if ref is not None}
        last: dict[int, int] = {}
        for n, step in enumerate(self._steps):
            for slot in (*step.outs, *(ref.slot for ref in refs_in((step.args, step.kwargs)))):
                if slot is not None:
                    last[slot] = n
        found: dict[int, list[int]] = {}
        for slot, n in last.items():
            if slot not in returned and slot >= self._inputs and slot not in self._offsets:
                found.setdefault(n, []).append(slot)
        return found

    def _line(self, step: Step) -> str:
        args = [self._expression(a) for a in step.args]
        args += [f"{name}={self._expression(a)}" for name, a in step.kwargs.items()]
        text = f"{self._constant(step.function)}({', '.join(args)})"
        outs = ["_" if slot is None else f"t{slot}" for slot in step.outs]
        if all(out == "_" for out in outs):
            return text
        return f"{', '.join(outs)}{',' if step.several and len(outs) == 1 else ''} = {text}"

    def _expression(self, value: Any) -> str:
        if isinstance(value, Ref):
            if value.address:
                place = self._offsets.get(value.slot)
                name, offset = (f"p{value.slot}", value.offset) if place is None else ("p", place + value.offset)
                return f"{name} + {offset}" if offset else name
            return self._tensor(value)
        if isinstance(value, Described):
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

    def _tensor(self, ref: Ref) -> str:
        like = self._slot(ref.slot)
        if ref.offset == 0 and ref.kind == like[:3]:
            return f"t{ref.slot}"
        dtype, shape, stride = ref.kind
        return f"part(t{ref.slot}, {ref.offset}, {self._constant(dtype)}, {shape}, {stride})"

    def _rows(self) -> dict[int, list[Ref]]:
        """Slots of which several rows are returned."""
        found: dict[int, list[Ref]] = {}
        for ref in self._outs:
            if ref is not None and self._row(ref) is not None:
                found.setdefault(ref.slot, []).append(ref)
        return {slot: refs for slot, refs in found.items() if len(refs) > 1}

    def _row(self, ref: Ref) -> int | None:
        """Which row of its slot a reference is."""
        like = self._slot(ref.slot)
        if not like.shape or ref.kind != (like.dtype, like.shape[1:], like.stride[1:]) or like.stride[0] <= 0:
            return None
        row, rest = divmod(ref.offset, like.stride[0] * like.dtype.itemsize)
        return row if rest == 0 and row < like.shape[0] else None

    def _out(self, ref: Ref | None, rows: dict[int, list[Ref]]) -> str:
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
