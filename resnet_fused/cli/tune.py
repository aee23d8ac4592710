"""``tune``: measure which backend and which configuration of each kernel is fastest on this GPU."""

from __future__ import annotations

import argparse
import datetime
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import resnet_fused
from resnet_fused import config
from resnet_fused.cli import machine, models
from resnet_fused.cli.output import Output, UsageError, integer, table
from resnet_fused.tuning import calls, tables

SUMMARY = "measure the fastest kernels for this GPU"
DESCRIPTION = (
    "Time every candidate of every operation of the models on this GPU, each after a comparison with the reference, "
    "and write the fastest to a table that the package follows. Without a GPU only --check works."
)
EXAMPLES = """\
examples:
  %(prog)s                                           ResNet-50, 34 and 18, batch 256, bf16: the table of this GPU
  %(prog)s --model resnet50 --ops conv1x1 --budget 500
                                                     part of it; what was measured before stays
  %(prog)s --check                                   verify the tables that come with the package
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All have a default."""

    def names(text: str) -> tuple[str, ...]:
        return tuple(filter(None, text.split(",")))

    parser.add_argument(
        "--model", type=names, default=("resnet50", "resnet34", "resnet18"), metavar="LIST", help=models.HELP
    )
    parser.add_argument("--batch", type=integer(1), default=256, metavar="N", help="images (default: 256)")
    parser.add_argument("--size", type=integer(1), default=224, metavar="PIXELS", help="(default: 224)")
    parser.add_argument("--dtype", choices=tuple(machine.DTYPES), default="bf16", help="(default: bf16)")
    parser.add_argument("--mode", choices=("infer", "train", "both"), default="both", help="(default: both)")
    parser.add_argument(
        "--ops", type=names, default=(), metavar="LIST", help="only operations whose names begin so (default: all)"
    )
    parser.add_argument(
        "--jobs",
        type=integer(1),
        default=os.cpu_count(),
        metavar="N",
        help="processes that compile (default: one a CPU)",
    )
    parser.add_argument(
        "--budget",
        type=integer(1),
        metavar="SECONDS",
        help="stop then and keep what was measured",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table (default: this GPU's, in the package)")
    parser.add_argument("--check", action="store_true", help="verify tables (--out, else all of the package)")


def run(args: argparse.Namespace, out: Output) -> int:
    """Check, or measure and write."""
    if args.check:
        return _check([args.out] if args.out else sorted(tables.FOLDER.glob("*.json")), out)
    if not torch.cuda.is_available():
        raise UsageError("expected a GPU that torch can use, got none; --check works without")
    if config.triton_interprets():
        raise UsageError("expected TRITON_INTERPRET to be unset, got kernels that are interpreted")
    device = torch.device("cuda", torch.cuda.current_device())
    path = args.out or tables.path_of(torch.cuda.get_device_name(device))
    if not path.parent.is_dir():
        raise UsageError(f"argument --out: expected a file in a folder that exists, got {str(path)!r}")
    deadline = math.inf if args.budget is None else time.monotonic() + args.budget
    return _tune(args, out, device, path, deadline)


# --- measuring ------------------------------------------------------------------------------------------------------


def _tune(args: argparse.Namespace, out: Output, device: torch.device, path: Path, deadline: float) -> int:
    from resnet_fused.tuning import measure  # brings Triton

    found = measure.problems(_calls(args))
    if not found:
        raise UsageError(f"expected --ops to begin the name of an operation of the models, got {','.join(args.ops)!r}")
    known = _known(path)
    metadata = _metadata(device)

    def save(entries: list[tables.Entry]) -> None:
        new = path.with_suffix(".new")
        new.write_text(tables.Table(metadata, entries).dumps(), encoding="utf-8")
        new.replace(path)

    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        measure.compile_ahead(found, device, args.jobs, deadline, _report)
        timer = measure.CudaTimer(device)
        entries = measure.tune(found, device, timer, known, deadline=deadline, report=_report, save=save)
    finally:
        torch.backends.cudnn.benchmark = benchmark
    measured = [e for e in entries if e not in known.entries]
    out.emit({**metadata, "file": str(path), "entries": [entry.to_json() for entry in measured]})
    wins = Counter((entry.op, entry.backend) for entry in measured)
    out.print(table(f"{metadata['gpu']}: fastest", ("operation", "backend", "problems"), _rows(wins), left=2))
    out.print(f"{len(measured)} of {len(found)} problems measured; {path} has {len(entries)} entries")
    return 0


def _rows(wins: Counter[tuple[str, str]]) -> list[tuple[str, ...]]:
    return [(*pair, str(count)) for pair, count in sorted(wins.items())]


def _report(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _calls(args: argparse.Namespace) -> list[calls.Call]:
    """Of all models and modes."""
    found = []
    for name in args.model:
        for train in (True, False):
            if args.mode in ("both", "train" if train else "infer"):
                shape: dict[str, Any] = {"batch": args.batch, "size": args.size, "dtype": machine.DTYPES[args.dtype]}
                found += calls.of_model(_builder(name), **shape, train=train)
    found = calls.unique([*(p for call in found for p in calls.parts(call)), *found])
    return [call for call in found if not args.ops or call.op.startswith(args.ops)]


def _builder(name: str) -> Callable[[], nn.Module]:
    """The package's own model of this name, else torchvision's or timm's."""
    return getattr(resnet_fused.models, name, None) or models.find(name).build


def _known(path: Path) -> tables.Table:
    """What was measured before, on this GPU."""
    if not path.exists():
        return tables.Table({}, [])
    try:
        return tables.load(path)
    except ValueError as error:
        raise UsageError(f"{error}; delete {path} or correct it") from error


def _metadata(device: torch.device) -> dict[str, Any]:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": _first_line("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
    }


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.partition("\n")[0].strip()


# --- checking -------------------------------------------------------------------------------------------------------


def _check(paths: list[Path], out: Output) -> int:
    """1 where a table has something that the code does not know."""
    wrong: list[str] = []
    count = 0
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"argument --out: expected a table, got {path} ({error.strerror})") from error
        found, errors = tables.parse(text, path.name)
        count += len(found.entries)
        wrong += [*errors, *_unknown(found, path.name)]
    for sentence in wrong:
        out.print(sentence)
    out.emit({"tables": [path.name for path in paths], "entries": count, "wrong": wrong})
    out.print(f"{len(paths)} tables, {count} entries, {len(wrong)} wrong")
    return 1 if wrong else 0


def _unknown(found: tables.Table, name: str) -> list[str]:
    if not found.entries:
        return []
    from resnet_fused.tuning import measure  # brings Triton

    sentences = ((i, measure.unknown(entry)) for i, entry in enumerate(found.entries))
    return [f"{name}, entry {i}: {sentence}" for i, sentence in sentences if sentence is not None]
