"""``profile MODEL``: every kernel of a step or of one block, held against the bytes and FLOPs that its op needs."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from resnet_fused.cli import machine, models
from resnet_fused.cli.output import Output, UsageError, integer, table
from resnet_fused.profiling import ncu, trace
from resnet_fused.profiling import table as tables
from resnet_fused.profiling.capture import TARGET_SAYS, Capture, Job, capture, target
from resnet_fused.profiling.ranges import nvtx_domain
from resnet_fused.profiling.table import Kernel, Row

SUMMARY = "every kernel of a step: time, bytes against the minimum, limiting factor"
DESCRIPTION = """\
Profile one step (train: forward, loss, backward; infer: forward) after warming up, and tell for every kernel which
block and op launched it, its time, and how that compares with the fewest bytes and the FLOPs of the op at the bandwidth
and the matmul rate that were measured in the same run. torch works everywhere, on a CPU with PyTorch's ops in the place
of kernels; ncu adds measured bytes, the limiting factor and the utilisation of DRAM, multiprocessors and tensor cores.
Writes kernels.csv, kernels.json and the tool's own result to DIR. docs/profiling.md shows how to read them.
Exit code 3 if the tool is missing or not allowed."""
EXAMPLES = """\
examples:
  %(prog)s resnet50 --batch 8
  %(prog)s resnet50 --block layer2.0 --mode train --tool ncu --batch 256 --dtype bf16 --out profile
  %(prog)s resnet50 --block layer2.0 --tool ncu --dry-run
"""

UNAVAILABLE = 3
_ROWS = 40  # of the printed table, the longest kernels


class ToolError(Exception):
    """A profiler that is missing or not allowed; the text says what to do, in one line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``profile``."""
    parser.add_argument("model", metavar="MODEL", help=models.HELP)
    parser.add_argument(
        "--block", metavar="NAME", help="one block, such as layer2.0 or stem (default: all of the step)"
    )
    parser.add_argument("--mode", choices=("train", "infer"), default="train", help="(default: train)")
    parser.add_argument("--tool", choices=("torch", "nsys", "ncu"), default="torch", help="(default: torch)")
    parser.add_argument("--out", type=Path, default=Path("profile"), metavar="DIR", help="(default: profile)")
    parser.add_argument("--batch", type=integer(2), default=4, metavar="N", help="images in a batch (default: 4)")
    parser.add_argument(
        "--size", type=integer(8), default=224, metavar="PIXELS", help="height and width (default: 224)"
    )
    parser.add_argument("--dtype", choices=tuple(machine.DTYPES), default="fp32", help="(default: fp32)")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="(default: 0)")
    parser.add_argument("--dry-run", action="store_true", help="print the command of nsys or ncu and do nothing else")
    machine.add_device_arguments(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Profile, import, print."""
    job = Job(args.model, args.mode, args.batch, args.size, args.dtype, args.device, args.backend, args.seed)
    try:
        if args.dry_run:
            return _dry_run(args, job, out)
        _folder(args.out)
        found, kernels = _TOOLS[args.tool](args, job, out)
    except ToolError as error:
        print(f"profile: {error}", file=sys.stderr)
        return UNAVAILABLE
    kernels = [k for k in kernels if args.block in (None, k.place.block)]
    _report(args, found, kernels, out)
    return 0


def _dry_run(args: argparse.Namespace, job: Job, out: Output) -> int:
    if args.tool == "torch":
        raise UsageError("argument --dry-run: expected --tool nsys or ncu, got torch, which runs in this process")
    command = shlex.join(_command(args, job, args.tool))
    print(json.dumps({"command": command}) if out.json_mode else command)
    return 0


def _folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"argument --out: expected a folder that can be written, got {str(path)!r} ({error})"
        ) from error


# --- tools ------------------------------------------------------------------------------------------------------------


def _torch(args: argparse.Namespace, job: Job, out: Output) -> tuple[Capture, list[Kernel]]:
    device = machine.device(job.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    profiler = torch.profiler.profile(activities=activities)
    with out.progress(1) as advance:
        advance("warming up, then one step under torch.profiler")
        found = capture(job, args.block, record_function, lambda: profiler)
    path = args.out / "trace.json"
    profiler.export_chrome_trace(str(path))
    return found, trace.read_chrome(path)


def _ncu(args: argparse.Namespace, job: Job, out: Output) -> tuple[Capture, list[Kernel]]:
    tool = _find("ncu", job)
    found = _profiled(args, job, tool, out)
    page = _output(ncu.import_command(tool, args.out / "ncu.ncu-rep"))
    (args.out / "ncu.csv").write_text(page, encoding="utf-8")
    return found, ncu.read(page)


def _nsys(args: argparse.Namespace, job: Job, out: Output) -> tuple[Capture, list[Kernel]]:
    tool = _find("nsys", job)
    found = _profiled(args, job, tool, out)
    database = args.out / "nsys.sqlite"
    report = str(args.out / "nsys.nsys-rep")
    _output([tool, "export", "--type", "sqlite", "--force-overwrite", "true", "--output", str(database), report])
    return found, trace.read_nsys(database)


_TOOLS = {"torch": _torch, "nsys": _nsys, "ncu": _ncu}


def _command(args: argparse.Namespace, job: Job, tool: str) -> list[str]:
    """The profiler's command line."""
    process = target(args.out / "calls.json", job, args.block)
    if args.tool == "ncu":
        return ncu.command(tool, args.out / "ncu", args.block, nvtx_domain(), process)
    return [
        *(tool, "profile", "--trace", "cuda,nvtx", "--capture-range", "cudaProfilerApi", "--capture-range-end", "stop"),
        *("--force-overwrite", "true", "--output", str(args.out / "nsys"), *process),
    ]


def _find(tool: str, job: Job) -> str:
    """The path of the tool, where it could work."""
    device = machine.device(job.device)
    if device.type != "cuda":
        raise ToolError(f"expected a GPU for --tool {tool}, got {device}; --tool torch works on the CPU")
    path = shutil.which(tool)
    if path is None:
        package = "Nsight Compute" if tool == "ncu" else "Nsight Systems"
        raise ToolError(
            f"expected {tool} on PATH, got none; install {package} (part of the CUDA toolkit) or put its folder on "
            "PATH; --tool torch works without it"
        )
    return path


def _profiled(args: argparse.Namespace, job: Job, tool: str, out: Output) -> Capture:
    """Run the profiler, its output to a log; what the profiled process wrote."""
    command = _command(args, job, tool)
    out.print(shlex.join(command))
    with out.progress(1) as advance:
        advance(f"running {args.tool}")
        _output(command)
    return Capture.read(args.out / "calls.json")


_FORBIDDEN = "ERR_NVGPUCTRPERM"


def _output(command: Sequence[str]) -> str:
    """Standard output of a profiler.

    Raises:
        ToolError: it failed.
        UsageError: the profiled process refused its input.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = f"{done.stdout}\n{done.stderr}"
    if _FORBIDDEN in said:
        raise ToolError(
            f"expected permission to read the GPU's counters, got {_FORBIDDEN}; run as root, load the driver with "
            "NVreg_RestrictProfilingToAdminUsers=0, or start the container with --cap-add=SYS_ADMIN; "
            "--tool torch works without it"
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    wrong = [line.removeprefix(TARGET_SAYS) for line in lines if line.startswith(TARGET_SAYS)]
    if wrong:
        raise UsageError(wrong[0])
    if done.returncode != 0:
        telling = [line for line in lines if "error" in line.lower()] or lines or ["no output"]
        raise ToolError(
            f"expected {Path(command[0]).name} to succeed, got exit code {done.returncode}: {telling[-1]}; "
            "--tool torch works without it"
        )
    return done.stdout


# --- the table --------------------------------------------------------------------------------------------------------


def _report(args: argparse.Namespace, found: Capture, kernels: list[Kernel], out: Output) -> None:
    """Write and print the table."""
    rows = tables.rows(kernels, found.calls, found.rates, found.step_s)
    document = {
        **found.job._asdict(),
        "block": args.block,
        "tool": args.tool,
        "machine": found.machine,
        "step_us": found.step_s * 1e6,
        "bytes_per_s": found.rates.bytes_per_s,
        "flop_per_s": found.rates.flop_per_s,
        "kernels": tables.to_dicts(rows),
    }
    (args.out / "kernels.csv").write_text(tables.to_csv(rows), encoding="utf-8")
    (args.out / "kernels.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    job, rates = found.job, found.rates
    out.print(
        f"[bold]{job.model}[/bold] {job.mode}, {job.dtype}, {job.batch} images of {job.size}x{job.size}, on "
        f"{found.machine['name']}: a step takes {found.step_s * 1e3:.3g} ms; ceilings measured here: "
        f"{rates.bytes_per_s / 1e9:.3g} GB/s, {rates.flop_per_s / 1e12:.3g} TFLOP/s"
    )
    longest = sorted(rows, key=lambda row: -row.time_us)[:_ROWS]
    shown = [row for row in rows if row in longest]
    out.print(_table(shown, f"{len(shown)} of {len(rows)} kernels, in the order of launches"))
    out.print(f"{_totals(rows)}. All rows: {args.out / 'kernels.csv'}, {args.out / 'kernels.json'}")
    out.emit(document)


def _table(rows: list[Row], title: str) -> Any:
    """The columns that any row has a value for."""
    columns = [(name, values) for name, values in _CELLS.items() if any(values(row) for row in rows)]
    lines = [[values(row) for _, values in columns] for row in rows]
    return table(title, [name for name, _ in columns], lines, left=sum(name in _LEFT for name, _ in columns))


def _figure(value: float | None, digits: str, scale: float = 1.0) -> str:
    return "" if value is None else format(value * scale, digits)


_LEFT = ("block", "op", "kernel")
_CELLS = {
    "block": lambda row: f"{row.block} {row.phase[:3]}".strip(),
    "op": lambda row: row.op if row.call is None else f"{row.op} #{row.call}",
    "kernel": lambda row: row.kernel if len(row.kernel) <= 40 else f"{row.kernel[:37]}...",
    "us": lambda row: _figure(row.time_us, ".1f"),
    "share": lambda row: _figure(row.share, ".1f", 100) + ("" if row.share is None else "%"),
    "min MB": lambda row: _figure(row.bytes_min, ".2f", 1e-6),
    "x min": lambda row: _figure(row.bytes_ratio, ".2f"),
    "GB/s": lambda row: _figure(row.gb_per_s, ".0f"),
    "TFLOP/s": lambda row: _figure(row.tflop_per_s, ".3g"),
    "of bound": lambda row: _figure(row.bound_fraction, ".0%"),
    "limited by": lambda row: row.limiting_factor or "",
    "regs": lambda row: _figure(row.registers, ".0f"),
    "occ.": lambda row: _figure(row.occupancy, ".0%"),
}


def _totals(rows: list[Row]) -> str:
    """Time in ops of this package and outside of them."""
    inside = sum(row.time_us for row in rows if row.call is not None)
    total = sum(row.time_us for row in rows)
    share = inside / total if total else 0.0
    return f"{share:.0%} of the kernels' time is in ops of this package"
