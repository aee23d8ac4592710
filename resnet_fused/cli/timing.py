"""Interleaved timing and peak memory.

In every round each peer is called once, in an order that rotates, so that a slow moment of a shared machine falls on
all of them; medians and quartiles are over the rounds, and a speed-up is the median of the rounds' own ratios.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Durations of one peer in seconds, one a round."""

    samples: tuple[float, ...]

    def quantile(self, q: float) -> float:
        """Linear interpolation between the sorted samples."""
        return torch.tensor(self.samples, dtype=torch.float64).quantile(q).item()

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def speedup(self, over: Times) -> float:
        """How many times faster than ``over``: the median of the rounds' ratios."""
        ratios = [b / a for a, b in zip(self.samples, over.samples, strict=True)]
        return Times(tuple(ratios)).median

    def to_dict(self) -> dict[str, Any]:
        """Seconds: median, quartiles, least, and all samples."""
        return {
            "median_s": self.median,
            "q1_s": self.quantile(0.25),
            "q3_s": self.quantile(0.75),
            "min_s": min(self.samples),
            "samples_s": list(self.samples),
        }


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done everything; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(call: Call, device: torch.device, before: Call | None = None) -> float:
    """Seconds of one call, ``before`` left out.

    On a GPU the time between two events on the current stream, with the device idle before ``before``; the host does
    not wait between ``before`` and ``call``, so that a long ``before`` hides the host's time of ``call``.
    """
    synchronize(device)
    if before is not None:
        before()
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


Clock = Callable[[Call, torch.device, Call | None], float]


def interleave(
    calls: dict[str, Call],
    rounds: int,
    device: torch.device,
    advance: Callable[[str], None] = lambda text: None,
    label: str = "round",
    *,
    before: Call | None = None,
    clock: Clock = clock,
) -> dict[str, Times]:
    """Time ``calls`` for ``rounds`` rounds, one call of each a round, in an order that rotates.

    Args:
        advance: told before every round which it is.
        before: run before every call, outside its time.
        clock: takes the time of one call.
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        advance(f"{label} {i + 1} of {rounds}")
        for j in range(len(names)):
            name = names[(i + j) % len(names)]
            samples[name].append(clock(calls[name], device, before))
    return {name: Times(tuple(found)) for name, found in samples.items()}


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that one call needs at most on top of what is held before it; None where the system does not tell.

    On a GPU that is the caching allocator's figure. On the CPU it is the growth of the resident set (Linux), which also
    holds workspaces and whatever the C library does not give back, and is good to a few MiB.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux") or not _reset_high_water():
        return None
    resident = _status("VmRSS")
    call()
    peak = _status("VmHWM")
    return None if resident is None or peak is None else max(0, peak - resident)


def _reset_high_water() -> bool:
    """Give freed memory back to the system and start the high-water mark anew; False where that is not allowed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int | None:
    with open("/proc/self/status", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None
