"""Ranges around blocks and ops, for NVTX or for torch.profiler, and the list of op calls that they belong to.

A block's range is named ``layer2.0 forward`` or ``layer2.0 backward``; an op's, within it, ``conv1x1_fprop #12`` with
the number of the call. Outside of :func:`ranged` nothing of this exists.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_fused.convert import refresh
from resnet_fused.ops._op import observed
from resnet_fused.profiling import blocks
from resnet_fused.traffic.contract import of

DOMAIN = "resnet_fused"

Range = Callable[[str], AbstractContextManager[Any]]
"""Makes the range of a name."""


@dataclass(frozen=True)
class Call:
    """One call of an op."""

    index: int
    block: str
    phase: str
    op: str
    shape: tuple[int, ...]  # of its first argument
    bytes: int  # the fewest that it must move
    flops: int

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape)}

    @staticmethod
    def from_dict(found: dict[str, Any]) -> Call:
        return Call(**{**found, "shape": tuple(found["shape"])})


class _Recorder(threading.local):
    """Opens the ranges and lists the calls; each thread has its own stack of ranges, all add to one list."""

    def __init__(self, make: Range, calls: list[Call]) -> None:
        self._make, self._calls = make, calls
        self._open: list[tuple[str, str, AbstractContextManager[Any]]] = []

    def enter(self, block: str, phase: str) -> None:
        entered = self._make(f"{block} {phase}")
        entered.__enter__()
        self._open.append((block, phase, entered))

    def leave(self) -> None:
        *_, entered = self._open.pop()
        entered.__exit__(None, None, None)

    def observe(self, op: str, args: tuple[Any, ...]) -> AbstractContextManager[Any]:
        block, phase = self._open[-1][:2] if self._open else ("", "")
        traffic = of(op, args)
        index = len(self._calls)
        self._calls.append(Call(index, block, phase, op, tuple(args[0].shape), traffic.bytes, traffic.flops))
        return self._make(f"{op} #{index}")


@contextlib.contextmanager
def ranged(model: nn.Module, make: Range) -> Iterator[list[Call]]:
    """Within it every block and op of ``model`` runs in a range; yields the list that the calls are added to."""
    calls: list[Call] = []
    recorder = _Recorder(make, calls)
    refresh(model)  # what inference has bound passes by the ops
    try:
        with blocks.watched(model, recorder), observed(recorder.observe):
            yield calls
    finally:
        refresh(model)


_OP_RANGE = re.compile(r"(\w+) #(\d+)")
_BLOCK_RANGE = re.compile(rf"(.+) ({blocks.FORWARD}|{blocks.BACKWARD})")


@dataclass(frozen=True)
class Place:
    """Where a kernel was launched."""

    block: str = ""
    phase: str = ""
    call: int | None = None


def is_range(name: str) -> bool:
    """Whether a range's name is one of ours."""
    return bool(_OP_RANGE.fullmatch(name) or _BLOCK_RANGE.fullmatch(name))


def place(names: list[str]) -> Place:
    """From the names of the open ranges, outermost first; others than ours are passed over."""
    block = phase = ""
    for name in names:
        if op := _OP_RANGE.fullmatch(name):
            return Place(block, phase, int(op[2]))
        if found := _BLOCK_RANGE.fullmatch(name):
            block, phase = found[1], found[2]
    return Place(block, phase)


# --- NVTX -------------------------------------------------------------------------------------------------------------


class _Attributes(ctypes.Structure):
    """``nvtxEventAttributes_t`` of NVTX 3."""

    _fields_ = (
        ("version", ctypes.c_uint16),
        ("size", ctypes.c_uint16),
        ("category", ctypes.c_uint32),
        ("color_type", ctypes.c_int32),
        ("color", ctypes.c_uint32),
        ("payload_type", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("payload", ctypes.c_uint64),
        ("message_type", ctypes.c_int32),
        ("message", ctypes.c_char_p),
    )


_VERSION, _ASCII = 3, 1  # NVTX_VERSION, NVTX_MESSAGE_TYPE_ASCII


@functools.cache
def _library() -> ctypes.CDLL | None:
    """NVTX as a shared library: PyTorch's own functions know no domains."""
    name = "libnvtx3interop.so.1"
    folders = [Path(entry) / "nvidia" for entry in sys.path]
    found = [str(path) for folder in folders for path in sorted(folder.glob(f"*/lib/{name}"))]
    for path in (*found, name, f"/usr/local/cuda/lib64/{name}"):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(path)
            library.nvtxDomainCreateA.restype = ctypes.c_void_p
            library.nvtxDomainCreateA.argtypes = [ctypes.c_char_p]
            library.nvtxDomainRangePushEx.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Attributes)]
            library.nvtxDomainRangePop.argtypes = [ctypes.c_void_p]
            return library
    return None


def nvtx_domain() -> str | None:
    """The domain of :func:`nvtx`'s ranges; None (NVTX's default one) where NVTX's library is not installed."""
    return DOMAIN if _library() is not None else None


@functools.cache
def _domain() -> Any:
    library = _library()
    return None if library is None else library.nvtxDomainCreateA(DOMAIN.encode())


@contextlib.contextmanager
def nvtx(name: str) -> Iterator[None]:
    """An NVTX range of the calling thread."""
    library = _library()
    if library is None:
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()
        return
    attributes = _Attributes(version=_VERSION, size=ctypes.sizeof(_Attributes), message_type=_ASCII)
    attributes.message = name.encode()
    library.nvtxDomainRangePushEx(_domain(), ctypes.byref(attributes))
    try:
        yield
    finally:
        library.nvtxDomainRangePop(_domain())
