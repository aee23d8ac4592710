"""torch.profiler's chrome trace, and Nsight Systems' SQLite export: each kernel placed by where it was launched.

A kernel is tied to its launch by the correlation id; the launch happened in a thread, within the ranges that were open.
On the CPU the ops of PyTorch that our ops call take the place of kernels.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from resnet_fused.profiling.ranges import Place, is_range, place
from resnet_fused.profiling.table import Kernel


class _Range(NamedTuple):
    start: float
    end: float
    name: str


def _open(ranges: Iterable[_Range], at: float) -> list[str]:
    """Names of the ranges that hold the moment, outermost first."""
    holding = [r for r in ranges if r.start <= at <= r.end]
    return [r.name for r in sorted(holding, key=lambda r: (r.start, -r.end))]


# --- torch.profiler ---------------------------------------------------------------------------------------------------

_LAUNCHES = ("cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def read_chrome(path: Path) -> list[Kernel]:
    """The kernels of a chrome trace, times in microseconds; ops of PyTorch's where no device took part."""
    with path.open(encoding="utf-8") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    ranges: dict[Any, list[_Range]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "user_annotation" and is_range(event["name"]):
            ranges[event["tid"]].append(_Range(event["ts"], event["ts"] + event["dur"], event["name"]))
    device = sorted((event for event in events if event.get("cat") in _DEVICE), key=lambda event: event["ts"])
    if not device:
        return _cpu_kernels([event for event in events if event.get("cat") == "cpu_op"], ranges)
    launches = {e["args"]["correlation"]: e for e in events if e.get("cat") in _LAUNCHES and "correlation" in e["args"]}
    return [_device_kernel(event, launches.get(event["args"].get("correlation")), ranges) for event in device]


def _device_kernel(event: dict[str, Any], launch: dict[str, Any] | None, ranges: dict[Any, list[_Range]]) -> Kernel:
    args = event["args"]
    occupancy = args.get("est. achieved occupancy %")
    return Kernel(
        event["name"],
        Place() if launch is None else place(_open(ranges[launch["tid"]], launch["ts"])),
        event["dur"] / 1e6,
        registers=args.get("registers per thread"),
        occupancy=None if occupancy is None else occupancy / 100,
    )


def _cpu_kernels(ops: list[dict[str, Any]], ranges: dict[Any, list[_Range]]) -> list[Kernel]:
    """The outermost ops that no range begins in: autograd's own wrappers hold ranges and are looked into."""
    kernels: list[Kernel] = []
    done: dict[Any, float] = defaultdict(lambda: float("-inf"))
    for op in sorted(ops, key=lambda op: (op["ts"], -op["dur"])):
        start, end = op["ts"], op["ts"] + op["dur"]
        within = ranges[op["tid"]]
        if start < done[op["tid"]] or op["dur"] <= 0:
            continue
        if op["name"].startswith("autograd::engine") or any(start <= r.start and r.end <= end for r in within):
            continue
        done[op["tid"]] = end
        kernels.append(Kernel(op["name"], place(_open(within, start)), op["dur"] / 1e6))
    return kernels


# --- Nsight Systems ---------------------------------------------------------------------------------------------------

_PUSH_POP = 59  # NvtxPushPopRange in ENUM_NSYS_EVENT_TYPE

_KERNELS = """
SELECT names.value, kernels.end - kernels.start, kernels.registersPerThread, launches.globalTid, launches.start
FROM CUPTI_ACTIVITY_KIND_KERNEL AS kernels
JOIN StringIds AS names ON names.id = kernels.demangledName
LEFT JOIN CUPTI_ACTIVITY_KIND_RUNTIME AS launches ON launches.correlationId = kernels.correlationId
ORDER BY kernels.start
"""
_RANGES = """
SELECT events.start, events.end, COALESCE(events.text, names.value), events.globalTid
FROM NVTX_EVENTS AS events LEFT JOIN StringIds AS names ON names.id = events.textId
WHERE events.eventType = ? AND events.end IS NOT NULL
"""


def read_nsys(path: Path) -> list[Kernel]:
    """The kernels of ``nsys export --type sqlite``, times in nanoseconds."""
    database = sqlite3.connect(path)
    try:
        ranges: dict[Any, list[_Range]] = defaultdict(list)
        for start, end, name, thread in database.execute(_RANGES, (_PUSH_POP,)):
            if name is not None and is_range(name):
                ranges[thread].append(_Range(start, end, name))
        return [
            Kernel(
                name,
                Place() if launched is None else place(_open(ranges[thread], launched)),
                time / 1e9,
                registers=registers,
            )
            for name, time, registers, thread, launched in database.execute(_KERNELS)
        ]
    finally:
        database.close()
