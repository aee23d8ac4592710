"""``demo``: what is fused, that the answers are the same, how exact and how fast it is, and a training run."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import resnet_fused
from resnet_fused.cli import bench, check, compare, digits, machine, photos, timing
from resnet_fused.cli.output import Output, UsageError, require, seconds, table

SUMMARY = "photographs, errors, speed and a training run, in about two minutes"
DESCRIPTION = f"""\
Fuse torchvision's resnet50 and show what was swapped; classify two photographs fused and unfused; measure errors
against fp64 and times beside eager PyTorch; train a small network on scikit-learn's digits fused and unfused from one
seed, with the loss curves in a PNG. Runs on the CPU without a GPU, and downloads nothing: pretrained weights are used
if torch's hub cache holds them. Exit code 1 if a block is not fused, an answer differs, an error is beyond its bound
(see `check --help`), or a training run ends below {digits.ACCURACY:.0%} on the test images."""
EXAMPLES = """\
examples:
  %(prog)s
  %(prog)s --out figures
  %(prog)s --quick --json
"""

_SEED = 0
_LAYOUTS = ("eager", "channels_last", "fused")
_NAMES = {"eager": "eager, NCHW", "channels_last": "eager, channels_last", "fused": "resnet_fused"}
_PNG = "digits.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``demo``."""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("resnet_fused_demo"),
        metavar="DIR",
        help="folder for the PNG (default: ./resnet_fused_demo)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="smaller images, fewer rounds and two epochs: the same checks but for the accuracy to be reached",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """All parts in order; everything is computed on the CPU."""
    require("demo", "torchvision", "sklearn", "matplotlib", extra="demo")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"argument --out: expected a folder that can be written, got {args.out} ({error.strerror})"
        ) from error
    begin = time.perf_counter()
    where = torch.device("cpu")
    document: dict[str, Any] = {"machine": machine.describe(where), "quick": args.quick}
    out.print(f"resnet_fused {resnet_fused.__version__} on {machine.sentence(where)}")
    right = [
        _network(args, out, document),
        _training(args, out, document),
    ]
    document["passed"] = all(right)
    document["wall_s"] = time.perf_counter() - begin
    out.emit(document)
    verdict = "[green]Everything agreed[/green]" if all(right) else "[red]Something did not agree, see above[/red]"
    out.print(f"\n{verdict}; {document['wall_s']:.0f} s.")
    return 0 if all(right) else 1


def _network(args: argparse.Namespace, out: Output, document: dict[str, Any]) -> bool:
    """The parts about resnet50."""
    rounds = _rounds(args.quick)
    with out.progress(2 + 8 + sum(rounds.values())) as advance:
        advance("photographs")
        pictures = photos.load()
        network = photos.network(pictures, _SEED)
        unfused = network.model
        fused = resnet_fused.fuse(copy.deepcopy(unfused))
        report = resnet_fused.report(fused)
        out.heading("What was swapped: torchvision's resnet50")
        right = _show_blocks(out, report, document)

        advance("classification")
        answers = photos.classify(fused, unfused, pictures, network.categories)
        out.heading("Two photographs, fused and unfused")
        out.print(f"Parameters: {network.origin}.")
        right &= _show_answers(out, answers, document)
        document["parameters"] = {"pretrained": network.pretrained, "origin": network.origin}

        size = 64 if args.quick else 96
        rows = compare.compare(
            unfused,
            lambda draw: photos.small(pictures, size, draw),
            modes=("train", "eval"),
            dtype=torch.float32,
            seed=_SEED,
            draws=5,
            advance=lambda text: advance(f"errors, {text}"),
        )
        out.heading(f"How exact: both photographs and their mirror images at {size}x{size}, fp32, against fp64")
        right &= _show_errors(out, rows, document)

        out.heading("How fast")
        _show_times(out, unfused, fused, pictures, rounds, args.quick, document, advance)
    return right


def _show_blocks(out: Output, report: resnet_fused.Report, document: dict[str, Any]) -> bool:
    document["blocks"] = report.to_dict()
    rows = []
    for stage in photos.stages(report):
        ops: dict[str, list[str]] = {}
        for op, backend in stage["backends"].items():
            ops.setdefault(backend, []).append(op)
        used = "; ".join(f"{backend}: {', '.join(names)}" for backend, names in ops.items())
        rows.append((stage["name"], stage["kind"], f"{stage['fused']} of {stage['count']}", used))
    out.print(table(None, ("where", "kind", "fused", "backend: operations"), rows, left=4))
    out.print(check.fused_sentence(report))
    return bool(report.fused) and not report.declined


def _show_answers(out: Output, answers: list[photos.Answer], document: dict[str, Any]) -> bool:
    document["photographs"] = [answer._asdict() for answer in answers]
    rows = []
    for answer in answers:
        for i, (name, p, q) in enumerate(zip(answer.classes, answer.fused, answer.unfused, strict=True)):
            rows.append((answer.photo if i == 0 else "", name, f"{p:.4%}", f"{q:.4%}"))
    out.print(table(None, ("photograph", "class", "fused", "unfused"), rows, left=2))
    same = all(answer.same for answer in answers)
    greatest = max(answer.difference for answer in answers)
    told = "the same classes in the same order" if same else "[red]different classes[/red]"
    out.print(f"Top {photos.TOP}: {told}; greatest difference of any of the 1000 probabilities: {greatest:.1e}")
    return same


def _show_errors(out: Output, rows: list[compare.Row], document: dict[str, Any]) -> bool:
    summaries = compare.summaries(rows)
    failed = [row for row in rows if row.failed]
    document["errors"] = [asdict(summary) for summary in summaries]
    document["errors_beyond_bound"] = [row.to_dict() for row in failed]
    out.print(check.summary_table(summaries))
    check.print_flips(out, rows)
    limit = check.bound(compare.FLOORS[torch.float32])
    if failed:
        out.print(f"[red]{len(failed)} of {len(rows)} tensors beyond {limit}[/red]: see `resnet-fused check resnet50`")
    else:
        out.print(f"All {len(rows)} outputs, gradients and buffers within {limit}.")
    return not failed


def _rounds(quick: bool) -> dict[str, int]:
    return {"1": 2, "4": 2, "train": 1} if quick else {"1": 9, "4": 5, "train": 5}


def _show_times(
    out: Output,
    unfused: nn.Module,
    fused: nn.Module,
    pictures: list[photos.Photo],
    rounds: dict[str, int],
    quick: bool,
    document: dict[str, Any],
    advance: Callable[[str], None],
) -> None:
    """Inference of 1 and 4 images, and a training step, in fp32 on the CPU."""
    last = torch.channels_last
    networks = {"eager": unfused, "channels_last": copy.deepcopy(unfused).to(memory_format=last), "fused": fused}
    size, train_size = (96, 64) if quick else (224, 128)
    views = torch.cat([photo.views[:2] for photo in pictures])
    large = torch.nn.functional.interpolate(views, (size, size)) if size != views.shape[-1] else views
    labels = torch.arange(4)
    parts = [
        ("1", "inference, 1 image", large[:1], "infer"),
        ("4", "inference, 4 images", large, "infer"),
        ("train", "training step, 4 images", photos.small(pictures, train_size, 0), "train"),
    ]
    rows: list[tuple[str, ...]] = []
    document["times"] = {}
    for key, label, x, mode in parts:
        setting = bench.Setting(mode, torch.float32, torch.device("cpu"))
        calls = {}
        for name in _LAYOUTS:
            images = x if name == "eager" else x.contiguous(memory_format=last)
            calls[name] = bench.step(networks[name], images, labels, setting)
            calls[name]()
        times = timing.interleave(calls, rounds[key], setting.device, advance, f"speed, {label}: round")
        document["times"][f"{label} of {x.shape[-1]}x{x.shape[-1]}"] = {
            name: {**found.to_dict(), "speedup_of_fused": times["fused"].speedup(found)}
            for name, found in times.items()
        }
        for name, found in times.items():
            rows.append(
                (
                    f"{label}, {x.shape[-1]}x{x.shape[-1]}" if name == "eager" else "",
                    _NAMES[name],
                    seconds(found.median),
                    f"{seconds(found.quantile(0.25))} - {seconds(found.quantile(0.75))}",
                    "" if name == "fused" else f"{times['fused'].speedup(found):.2f} x",
                )
            )
    out.print(table(None, ("what", "how", "median ms", "IQR ms", "fused is faster"), rows, left=2))
    out.print(
        f"fp32, {torch.get_num_threads()} threads of {machine.cpu_name()}; rounds interleaved, a training step is "
        "forward, loss and backward. Times on a shared CPU are noisy: the ratios, medians over the rounds, mean more "
        "than the milliseconds."
    )


def _training(args: argparse.Namespace, out: Output, document: dict[str, Any]) -> bool:
    """The digits."""
    epochs = 2 if args.quick else digits.EPOCHS
    begin = time.perf_counter()
    with out.progress(2 * epochs) as advance:
        advance("digits")
        curves = digits.both(epochs, advance)
    path = args.out / _PNG
    digits.draw(curves, path)
    document["training"] = {
        "required_accuracy": None if args.quick else digits.ACCURACY,
        "epochs": epochs,
        "png": str(path),
        **{name: asdict(curve) for name, curve in curves.items()},
    }
    out.heading(f"Training: ResNet-{digits.DEPTH} on scikit-learn's 8x8 digits, {epochs} epochs, one seed")
    rows = [
        (name, f"{curve.losses[0]:.6f}", f"{curve.losses[-1]:.6f}", f"{curve.accuracy:.2%}")
        for name, curve in curves.items()
    ]
    out.print(table(None, ("run", "first loss", "last loss", "test accuracy"), rows))
    pairs = zip(curves["fused"].losses, curves["unfused"].losses, strict=True)
    differences = [abs(a - b) for a, b in pairs]
    out.print(
        f"Loss difference: {differences[0]:.0e} in step 1, {differences[19]:.0e} in step 20; rounding then parts the "
        f"two runs, as it parts any two.\nLoss curves: {path} ({time.perf_counter() - begin:.0f} s)"
    )
    if args.quick:
        return True
    enough = all(curve.accuracy >= digits.ACCURACY for curve in curves.values())
    if not enough:
        out.print(f"[red]Expected at least {digits.ACCURACY:.0%} on the test images in both runs.[/red]")
    return enough
