"""How the Triton kernels are reached: one way to launch, to record what would be launched, and to size a grid."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import config, plans
from resnet_fused.ops._op import is_dispatched


class Launch(NamedTuple):
    """One kernel call."""

    kernel: Any  # what triton.jit made
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # of the kernel, by name, compile-time constants included
    options: dict[str, int]  # num_warps, num_stages


_recorded: ContextVar[list[Launch] | None] = ContextVar("resnet_fused_launches", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *, warps: int = 4, stages: int = 1, **arguments: Any) -> None:
    """Run ``kernel`` on the device of its first tensor, in that device's current stream.

    Args:
        kernel: what triton.jit made.
        grid: programs along each axis; nothing runs where one is 0.
        warps, stages: warps of a program, stages of its software pipeline.
        arguments: the kernel's, by name.
    """
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(Launch(kernel, grid, arguments, {"num_warps": warps, "num_stages": stages}))
        return
    if 0 in grid:
        return
    options = {"num_warps": warps, "num_stages": stages}
    held = (getattr(a, "base", a) for a in arguments.values())  # of a tensor descriptor: the tensor that it describes
    first = next(t for t in held if isinstance(t, Tensor))
    recorder = plans.recorder()
    with contextlib.nullcontext() if recorder is None else plans.unseen():
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                compiled = kernel[grid](**arguments, **options)
        else:
            compiled = kernel[grid](**arguments, **options)
    if recorder is not None:
        _note(recorder, Launch(kernel, grid, arguments, options), compiled)


def _note(recorder: plans.Recorder, launched: Launch, compiled: Any) -> None:
    """For a plan: the kernel that Triton compiled for these arguments, or what interprets it."""
    kernel, grid, arguments, options = launched
    if compiled is None:
        names = tuple(arguments)

        def interpreted(*values: Any) -> None:
            kernel[grid](**dict(zip(names, values, strict=True)), **options)

        recorder.launch(interpreted, *map(plans.AsTensor, arguments.values()))
        return
    defaults = {name: p.default for name, p in kernel.signature.parameters.items()}
    values = (arguments.get(name, defaults[name]) for name in kernel.arg_names)
    recorder.launch(functools.partial(_start, compiled[(*grid, 1, 1)[:3]]), plans.STREAM, *values)


def _start(run: Any, stream: int, *arguments: Any) -> None:
    run(*arguments, stream=stream)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within it kernels are not run but noted in the list: on meta tensors, what a call would launch."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        with plans.suspended():
            yield launches
    finally:
        _recorded.reset(token)


@functools.cache
def _cuda_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


# Few, so that every program of a small problem walks over several tiles in the interpreter.
_INTERPRETED_MULTIPROCESSORS = 3
# An H200's, for launches that are only recorded.
_RECORDED_MULTIPROCESSORS = 132


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, one on each multiprocessor."""
    if device.type == "cuda":
        return _cuda_multiprocessors(device.index or 0)
    return _INTERPRETED_MULTIPROCESSORS if device.type == "cpu" else _RECORDED_MULTIPROCESSORS


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)``."""
    return -(-a // b)


def rows(t: Tensor) -> Tensor:
    """The (N*H*W, C) matrix of a (N, C, H, W) tensor; a copy unless it is channels_last."""
    return t.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def vector(v: Tensor | None) -> Tensor | None:
    """A per-channel vector in contiguous memory."""
    return None if v is None else v.contiguous()


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether an element's offset in one of the tensors may exceed 32 bits."""
    return any(t is not None and t.numel() >= 2**31 for t in tensors)


# --- counters of arrival ---------------------------------------------------------------------------------------------

_counters: dict[tuple[int | None, int], Tensor] = {}
_captured: dict[tuple[int | None, int], tuple[int, Tensor]] = {}
_COUNTERS = 4096


def counters(device: torch.device, needed: int) -> Tensor:
    """Zeros (int32) that a kernel counts its programs' arrivals in, and leaves at zero again.

    One buffer for each device and stream, since kernels of one stream follow each other. A graph may be replayed in any
    stream: what is captured gets a buffer of its own, which the graph zeroes. Compiled code, which may put all memory
    of a call into a graph's pool, gets one that nobody holds.
    """
    if device.type != "cuda" or needed > _COUNTERS or is_dispatched():
        return _zeros(device, needed)
    stream = torch.cuda.current_stream(device).cuda_stream
    if plans.captures(device):
        return _counters_of_capture(stream, device, needed)
    recorder = plans.recorder()
    return _counters_of(stream, device) if recorder is None else recorder.make(stream, _counters_of, device)


def _zeros(device: torch.device, needed: int = _COUNTERS) -> Tensor:
    return torch.zeros(needed, dtype=torch.int32, device=device)


def _counters_of(stream: int, device: torch.device) -> Tensor:
    key = device.index, stream
    found = _counters.get(key)
    if found is None:
        found = _counters[key] = _zeros(device)
    return found


def _counters_of_capture(stream: int, device: torch.device, needed: int) -> Tensor:
    """One buffer for all that one stream does in one capture.

    It is held until the next capture in the stream, or the allocator would hand it out within this one.
    """
    capture = _capture_id(stream)
    if capture is None:
        return _zeros(device, needed)
    key = device.index, stream
    known, found = _captured.get(key, (None, None))
    if found is None or known != capture:
        found = _zeros(device)
        _captured[key] = capture, found
    return found


def _capture_id(stream: int) -> int | None:
    """The driver's number of the capture that a stream takes part in, if it can be had; PyTorch does not tell it."""
    driver = _driver()
    if driver is None:
        return None
    status, found = ctypes.c_int(), ctypes.c_uint64()
    given = ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(found)
    error = driver.cuStreamGetCaptureInfo_v2(*given, None, None, None)
    return found.value if error == 0 and status.value == _ACTIVE else None


_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE


@functools.cache
def _driver() -> Any:
    """The CUDA driver's library where it has the function that is asked for."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        return driver if hasattr(driver, "cuStreamGetCaptureInfo_v2") else None
    except OSError:
        return None


# --- what every kernel asks of its tensors ----------------------------------------------------------------------------

SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""The dtypes that kernels read, as problems name them."""


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why no kernel of this package runs on these tensors; None if one may."""
    given = [t for t in tensors if t is not None]
    first = given[0]
    if not (first.is_cuda or first.is_meta or (first.is_cpu and config.triton_interprets())):
        return f"Triton kernels run on CUDA devices, and a tensor is on {first.device}"
    for t in given:
        if t.device != first.device:
            return f"the kernel reads one device only, and tensors are on {first.device} and {t.device}"
        if t.is_floating_point() and t.dtype not in SHORT:
            return f"the kernel is written for float32, float16 and bfloat16, not {t.dtype}"
    if any(t.dim() == 4 and t.numel() == 0 for t in given):
        return "a tensor is empty"
    return _old_device(first.device.index or 0) if first.is_cuda else None


@functools.cache
def _old_device(index: int) -> str | None:
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"Triton kernels need compute capability 8.0, and cuda:{index} has {major}.{minor}"
