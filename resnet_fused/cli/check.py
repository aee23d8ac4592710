"""``check MODEL``: error of outputs and every gradient against fp64, beside PyTorch's own error."""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from dataclasses import asdict
from typing import Any

import torch

import resnet_fused
from resnet_fused.cli import compare, machine, models
from resnet_fused.cli.output import Output, UsageError, integer, table
from resnet_fused.convert import MEMORY

SUMMARY = "errors of outputs and gradients against fp64, beside PyTorch's own"
DESCRIPTION = """\
Compare a model's fused blocks with fp64, tensor by tensor, beside PyTorch's own error in the same dtype.
Exit code 0 if the fused error of every tensor is at most twice PyTorch's plus a floor (1e-6 in fp32, 1e-3 in fp16,
8e-3 in bf16), 1 if not. PyTorch's error is the larger one of its two memory formats (at most ten times the lesser).
The error of a tensor is norm(value - truth) / norm(truth). A tensor beyond its bound is tried again with other
images, since a single ReLU input within rounding error of 0 can outweigh all rounding; it fails if it is beyond the
bound in every draw.
Models of torchvision and timm get seeded random parameters and norms; one's own keeps its values."""
EXAMPLES = """\
examples:
  %(prog)s resnet50
  %(prog)s timm:resnet50d --dtype bf16 --mode train
  %(prog)s resnet_fused.models:cifar_resnet20 --size 32 --batch 16
  %(prog)s mypackage.nets:build --brief
  %(prog)s resnet50 --mode train --memory recompute
  %(prog)s resnext50_32x4d --json > errors.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``check``."""
    parser.add_argument("model", metavar="MODEL", help=models.HELP)
    parser.add_argument("--batch", type=integer(2), default=4, metavar="N", help="images in a batch (default: 4)")
    parser.add_argument("--size", type=integer(8), default=64, metavar="PIXELS", help="height and width (default: 64)")
    parser.add_argument("--dtype", choices=tuple(machine.DTYPES), default="fp32", help="of the model (default: fp32)")
    parser.add_argument("--mode", choices=("train", "eval", "both"), default="both", help="(default: both)")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="(default: 0)")
    parser.add_argument(
        "--draws", type=integer(1), default=5, metavar="N", help="tries for a tensor beyond its bound (default: 5)"
    )
    parser.add_argument("--brief", action="store_true", help="print the summary without the table of all tensors")
    parser.add_argument(
        "--memory", choices=MEMORY, default="save", help="what fused blocks keep for backward (default: save)"
    )
    machine.add_device_arguments(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Build, fuse, compare, print; see the top of this file."""
    where = machine.device(args.device)
    dtype = machine.DTYPES[args.dtype]
    loaded = models.load(args.model, seed=args.seed, batch=args.batch, size=args.size)
    model = loaded.model.to(where)
    fused = resnet_fused.fuse(copy.deepcopy(model), backend=args.backend, memory=args.memory)
    report = models.wants_blocks(args.model, fused)
    modes = ("train", "eval") if args.mode == "both" else (args.mode,)

    def images(draw: int) -> torch.Tensor:
        return models.images(args.batch, args.size, args.seed + draw).to(where)

    with out.progress(1 + 4 * len(modes)) as advance:
        advance("which path each block takes")
        try:
            model.train(False)(images(0))
        except Exception as error:
            raise UsageError(
                f"expected MODEL {args.model!r} to take images of shape ({args.batch}, 3, {args.size}, {args.size}), "
                f"got {type(error).__name__}: {error}"
            ) from error
        try:
            paths = {mode: _paths(fused, images(0), mode) for mode in modes}
            rows = compare.compare(
                model,
                images,
                modes=modes,
                dtype=dtype,
                seed=args.seed,
                draws=args.draws,
                backend=args.backend,
                memory=args.memory,
                advance=advance,
            )
        except NotImplementedError as error:
            if args.backend == "auto":
                raise
            raise UsageError(f"argument --backend: {error}; use --backend auto") from error
    failed = [row for row in rows if row.failed]
    summaries = compare.summaries(rows)
    floor = compare.FLOORS[dtype]
    out.emit(
        {
            "model": args.model,
            "source": loaded.source,
            "parameters": loaded.values,
            "batch": args.batch,
            "size": args.size,
            "dtype": args.dtype,
            "seed": args.seed,
            "backend": args.backend,
            "memory": args.memory,
            "machine": machine.describe(where),
            "bound": {"factor": compare.FACTOR, "floor": floor, "draws": args.draws},
            "blocks": report.to_dict(),
            "paths": paths,
            "tensors": [row.to_dict() for row in rows],
            "summary": [asdict(summary) for summary in summaries],
            "failed": [f"{row.mode}: {row.kind} {row.name}" for row in failed],
            "passed": not failed,
        }
    )
    out.print(
        f"[bold]{args.model}[/bold] from {loaded.source} (parameters: {loaded.values}), {args.dtype}, "
        f"{args.batch} images of {args.size}x{args.size}, on {machine.sentence(where)}"
    )
    print_blocks(out, report, paths)
    if not args.brief:
        title = "Relative error against fp64 of every tensor (bound: " + bound(floor) + ")"
        out.print(table(title, ("mode", "kind", "tensor", *_COLUMNS), [_cells(row) for row in rows], left=3))
    out.print(summary_table(summaries))
    print_flips(out, rows)
    worst = sorted(rows, key=lambda row: row.share, reverse=True)[:5]
    out.print(
        table("Nearest to the bound", ("mode", "kind", "tensor", *_COLUMNS), [_cells(row) for row in worst], left=3)
    )
    again = [row for row in rows if row.draws > 1 and not row.failed]
    if again:
        most = max(row.draws for row in again)
        out.print(
            f"{len(again)} tensors were beyond the bound for the first images and within it for others ({most} "
            "draws at most): a ReLU input within rounding error of 0, not a fault. The tables show the images that "
            "decided."
        )
    if failed:
        out.print(
            f"[red]FAILED[/red]: {len(failed)} of {len(rows)} tensors beyond {bound(floor)} in {args.draws} draws:"
        )
        for row in failed[:20]:
            out.print(f"  {row.mode}: {row.kind} {row.name}: {row.fused:.2e}, eager {row.eager:.2e}")
        return 1
    out.print(f"[green]passed[/green]: all {len(rows)} tensors within {bound(floor)}.")
    return 0


def bound(floor: float) -> str:
    """The bound as a formula."""
    return f"{compare.FACTOR:g} x eager + {floor:g}"


_COLUMNS = ("eager NCHW", "eager channels_last", "fused", "fused / eager", "of the bound")


def _cells(row: compare.Row) -> tuple[str, ...]:
    errors = (f"{value:.1e}" for value in (row.eager_nchw, row.eager_channels_last, row.fused))
    share = f"{row.share:.0%}" if row.share <= 1 else f"[red]{row.share:.1f} x[/red]"
    return row.mode, row.kind, row.name, *errors, f"{row.ratio:.2f}", share


def _paths(fused: torch.nn.Module, x: torch.Tensor, mode: str) -> dict[str, int]:
    """How many blocks and stems took each path; in eval mode without gradient."""
    with torch.set_grad_enabled(mode == "train"):
        steps = resnet_fused.explain(fused.train(mode == "train"), x).steps
    return dict(Counter(step.path for step in steps))


def print_blocks(out: Output, report: resnet_fused.Report, paths: dict[str, dict[str, int]]) -> None:
    """What was fused, what was declined and why, and which path was taken."""
    out.print(fused_sentence(report))
    reasons = Counter(row.detail for row in report.declined)
    for detail, count in reasons.items():
        out.print(f"  declined, {count} times: {detail}")
    for mode, counts in paths.items():
        out.print(f"  {mode}: " + ", ".join(f"{count} on path {path}" for path, count in counts.items()))


def fused_sentence(report: resnet_fused.Report) -> str:
    """``16 of 16 blocks fused; stem: fused``."""
    return str(report).splitlines()[-1]


def print_flips(out: Output, rows: list[compare.Row]) -> None:
    """What a gradient's error far above rounding is, where an eager or a fused one has it in fp32."""
    if any(
        row.floor == compare.FLOORS[torch.float32] and max(row.eager_nchw, row.eager_channels_last, row.fused) > 1e-4
        for row in rows
    ):
        out.print(
            "Errors above 1e-4 come from single ReLU inputs within rounding error of 0, where the gradient jumps: they "
            "hit eager and fused models alike, at random."
        )


def summary_table(summaries: list[compare.Summary]) -> Any:
    """Medians and worst cases, one row for each mode and kind."""
    columns = (
        "mode",
        "kind",
        "tensors",
        "eager NCHW",
        "eager channels_last",
        "fused",
        "fused / eager",
        "worst eager",
        "worst fused",
        "of the bound",
    )
    rows = [
        (
            s.mode,
            s.kind,
            str(s.count),
            *(f"{value:.1e}" for value in (s.eager_nchw, s.eager_channels_last, s.fused)),
            f"{s.ratio:.2f}",
            *(f"{value:.1e}" for value in (s.eager_worst, s.fused_worst)),
            f"{s.share:.0%}",
        )
        for s in summaries
    ]
    return table("Relative error against fp64: medians over the tensors, and the worst", columns, rows, left=2)
