"""Nsight Compute: the command that profiles, and its raw page in CSV read back.

The page has a row of metric names, a row of units, and a row for each kernel; lines of log may stand in front. The NVTX
ranges that were open stand in one field, outermost first::

    4711  "resnet_fused:layer2.0 forward:none:none:none:none:none:none"  "resnet_fused:conv1x1_fprop #3:none:..."

"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path

from resnet_fused.profiling import blocks
from resnet_fused.profiling.ranges import place
from resnet_fused.profiling.table import Kernel

TIME = "gpu__time_duration.sum"
READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
SM = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
MEMORY = "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed"
DRAM = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
L2 = "lts__throughput.avg.pct_of_peak_sustained_elapsed"
L1 = "l1tex__throughput.avg.pct_of_peak_sustained_active"
TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
REGISTERS = "launch__registers_per_thread"
METRICS = (TIME, READ, WRITTEN, SM, MEMORY, DRAM, L2, L1, TENSOR, OCCUPANCY, REGISTERS)
BREAKDOWNS = (
    f"breakdown:{SM}",
    f"breakdown:{MEMORY}",
)  # each becomes the metrics that its throughput is the maximum of

_NVTX = "Push/Pop_Range"  # in the name of the column
_SCALES = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_LATENCY = 60.0  # percent; with everything below it no unit is the limit, waiting is


def command(ncu: str, out: Path, block: str | None, domain: str | None, target: Sequence[str]) -> list[str]:
    """Profile the kernels of ``block`` (all where it is None) that ``target`` launches between start and stop.

    Clocks are left as they are; caches are flushed before every kernel.
    """
    prefix = "" if domain is None else f"{domain}@"
    phases = () if block is None else (blocks.FORWARD, blocks.BACKWARD)
    includes = [part for phase in phases for part in ("--nvtx-include", f"{prefix}{block} {phase}/")]
    return [
        *(ncu, "--profile-from-start", "off", "--nvtx", *includes),
        *("--clock-control", "none", "--cache-control", "all"),
        *("--metrics", ",".join((*METRICS, *BREAKDOWNS))),
        *("--force-overwrite", "--export", str(out), *target),
    ]


def import_command(ncu: str, report: Path) -> list[str]:
    """Print the raw page of a report as CSV."""
    return [ncu, "--import", str(report), "--csv", "--page", "raw", "--print-units", "base"]


def read(text: str) -> list[Kernel]:
    """The kernels of a raw page.

    Raises:
        ValueError: it is no raw page, or lacks a metric.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError('ncu: expected a raw page in CSV with a header that begins with "ID", got none')
    header, units, *found = list(csv.reader(lines[start:])) + ([[]] if start == len(lines) - 1 else [])
    missing = [name for name in ("Kernel Name", *METRICS) if name not in header]
    if missing:
        raise ValueError(f"ncu: expected the raw page to have {', '.join(missing)}, got none")
    unit = dict(zip(header, units, strict=False))
    return [_kernel(dict(zip(header, row, strict=True)), unit) for row in found if len(row) == len(header)]


def _kernel(row: dict[str, str], unit: dict[str, str]) -> Kernel:
    values = {name: number * _scale(unit[name]) for name, text in row.items() if (number := _number(text)) is not None}
    if TIME not in values:
        raise ValueError(f"ncu: expected {TIME} of {row['Kernel Name']} to be a number, got {row[TIME]!r}")
    moved = values[READ] + values[WRITTEN] if READ in values and WRITTEN in values else None
    occupancy, dram, sm, tensor = (
        values[name] / 100 if name in values else None for name in (OCCUPANCY, DRAM, SM, TENSOR)
    )
    return Kernel(
        row["Kernel Name"],
        place(_ranges(row)),
        values[TIME],
        moved,
        limiting_factor({name: value for name, value in values.items() if _is_utilisation(name)}),
        int(values[REGISTERS]) if REGISTERS in values else None,
        occupancy,
        dram,
        sm,
        tensor,
    )


def _ranges(row: dict[str, str]) -> list[str]:
    """Names of the push/pop ranges, outermost first."""
    text = next((value for name, value in row.items() if _NVTX in name), "")
    return [entry.split(":")[1] for entry in re.findall(r'"([^"]*)"', text) if ":" in entry]


def _number(text: str) -> float | None:
    """With commas between the thousands; None for words, and for what ncu has no data for."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _scale(unit: str) -> float:
    """``us`` or ``usecond`` to seconds, ``Mbyte`` to bytes; a unit of another kind is 1."""
    for base in ("second", "byte", "s"):
        if unit.endswith(base):
            return _SCALES.get(unit.removesuffix(base), 1.0)
    return 1.0


# --- the limiting factor ----------------------------------------------------------------------------------------------

_UNITS = (
    (r"dram|gpu__dram|fbpa", "DRAM"),
    (r"lts|ltc|l2", "L2"),
    (r"l1tex", "L1 and shared memory"),
    (r"idc", "constant cache"),
    (r"sm.*tensor", "tensor cores"),
    (r"sm.*(pipe_\w+?)(?:_cycles|\.)", "{0}"),
    (r"sm.*(issue|inst_executed)", "instruction issue"),
)


def _is_utilisation(name: str) -> bool:
    return name in (L1, DRAM, L2) or (
        name.endswith(".pct_of_peak_sustained_elapsed")
        and not name.startswith(("sm__throughput", "gpu__compute_memory"))
    )


def limiting_factor(utilisations: dict[str, float]) -> str | None:
    """The busiest unit with its percentage; "latency" in front where even that one is far from its peak."""
    if not utilisations:
        return None
    name = max(utilisations, key=lambda key: utilisations[key])
    percent = utilisations[name]
    busiest = f"{_unit(name)} {percent:.0f}%"
    return busiest if percent >= _LATENCY else f"latency ({busiest})"


def _unit(name: str) -> str:
    for pattern, unit in _UNITS:
        if match := re.match(pattern, name):
            return unit.format(*(group.replace("_", " ") for group in match.groups()))
    return name.partition(".")[0]
