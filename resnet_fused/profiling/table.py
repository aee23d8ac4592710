"""One row for each kernel, whichever profiler measured it: its time, held against what its op must do at least.

An op may run several kernels (PyTorch's do). What belongs to the op call as a whole is then the same in the rows of all
its kernels: ``bytes_min``, ``bytes_ratio``, ``tflop_per_s``, ``bound_fraction``.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from resnet_fused.cli.ceilings import Rates
from resnet_fused.profiling.ranges import Call, Place


@dataclass(frozen=True)
class Kernel:
    """One kernel (on the CPU one op of PyTorch's) as a profiler measured it; None is what it does not tell."""

    name: str
    place: Place
    time_s: float
    dram_bytes: float | None = None
    limiting_factor: str | None = None
    registers: int | None = None  # per thread
    occupancy: float | None = None  # achieved, of the most warps that a multiprocessor holds
    dram: float | None = None  # utilisation, fraction of the peak
    sm: float | None = None
    tensor: float | None = None


@dataclass(frozen=True)
class Row:
    """A line of the table; units are in the names, ``*_fraction``, ``share`` and utilisations are fractions of 1."""

    kernel: str
    block: str
    phase: str
    op: str
    call: int | None
    time_us: float
    share: float | None  # of the step
    bytes: float | None  # read from and written to DRAM
    bytes_min: int | None
    bytes_ratio: float | None  # bytes of the op's kernels over bytes_min
    gb_per_s: float | None  # of the measured bytes; without them, of bytes_min over the op's time
    tflop_per_s: float | None
    bound_fraction: float | None  # bound over the op's time
    limiting_factor: str | None
    registers: int | None
    occupancy: float | None
    dram: float | None
    sm: float | None
    tensor: float | None


COLUMNS = tuple(field.name for field in fields(Row))


def rows(kernels: Sequence[Kernel], calls: Sequence[Call], rates: Rates, step_s: float | None) -> list[Row]:
    """The table in the order of launches."""
    known = {call.index: call for call in calls}
    groups: dict[int, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        if kernel.place.call is not None:
            groups[kernel.place.call].append(kernel)
    return [_row(kernel, known, groups, rates, step_s) for kernel in kernels]


def _row(
    kernel: Kernel, calls: dict[int, Call], groups: dict[int, list[Kernel]], rates: Rates, step_s: float | None
) -> Row:
    place = kernel.place
    call = None if place.call is None else calls[place.call]
    gb_per_s = None if kernel.dram_bytes is None else kernel.dram_bytes / kernel.time_s / 1e9
    ratio = tflops = fraction = None
    if call is not None:
        group = groups[call.index]
        time_s = sum(k.time_s for k in group)
        measured = [k.dram_bytes for k in group if k.dram_bytes is not None]
        ratio = sum(measured) / call.bytes if len(measured) == len(group) and call.bytes else None
        tflops = call.flops / time_s / 1e12
        fraction = rates.bound_s(call.bytes, call.flops) / time_s
        gb_per_s = call.bytes / time_s / 1e9 if gb_per_s is None else gb_per_s
    return Row(
        kernel.name,
        place.block,
        place.phase,
        "" if call is None else call.op,
        place.call,
        kernel.time_s * 1e6,
        None if step_s is None else kernel.time_s / step_s,
        kernel.dram_bytes,
        None if call is None else call.bytes,
        ratio,
        gb_per_s,
        tflops,
        fraction,
        kernel.limiting_factor,
        kernel.registers,
        kernel.occupancy,
        kernel.dram,
        kernel.sm,
        kernel.tensor,
    )


def to_csv(table: Sequence[Row]) -> str:
    """The rows with a header; an empty field is what is not known."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in table)
    return text.getvalue()


def to_dicts(table: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as plain dictionaries."""
    return [asdict(row) for row in table]
