"""``bench MODEL``: times and memory of the fused model beside eager PyTorch and ``torch.compile``."""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fused
from resnet_fused.cli import check, machine, models, timing
from resnet_fused.cli.output import Output, UsageError, integer, seconds, table
from resnet_fused.convert import MEMORY

SUMMARY = "times and peak memory beside eager PyTorch and torch.compile"
DESCRIPTION = """\
Time a model with fused blocks beside eager PyTorch and torch.compile. Every round calls each of them once, in
rotating order; medians, quartiles (IQR) and speed-ups (the median of the rounds' ratios) are over the rounds. Every
result is verified before it is timed; compiling and warming up are not timed. infer: forward in eval mode without
gradient, the model in DTYPE. train: forward, cross-entropy and backward without an optimiser step; bf16 and fp16 by
autocast with fp32 parameters. channels_last, compile and fused get parameters and images in channels_last, eager in
NCHW.
Exit code 1 if a fused result is wrong."""
EXAMPLES = """\
examples:
  %(prog)s resnet50
  %(prog)s resnet50 --mode train --batch 8 --peers eager,channels_last
  %(prog)s timm:resnet50d --dtype bf16 --rounds 30
  %(prog)s resnet50 --mode train --memory recompute
  %(prog)s mypackage.nets:build --size 64 --json > times.json
"""

PEERS = {
    "eager": "eager PyTorch, NCHW",
    "channels_last": "eager PyTorch, channels_last",
    "compile": "torch.compile, channels_last",
}
_FUSED = "fused"
_WARMUP = 2
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Greatest relative difference from eager fp32 for a result to be timed: of the output (infer), or of the loss and of
the norm of all gradients (train)."""


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [name for name in names if name not in PEERS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected names of {', '.join(PEERS)} with commas between, got {text!r}")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench``."""
    parser.add_argument("model", metavar="MODEL", help=models.HELP)
    parser.add_argument("--batch", type=integer(2), default=4, metavar="N", help="images in a batch (default: 4)")
    parser.add_argument(
        "--size", type=integer(8), default=224, metavar="PIXELS", help="height and width (default: 224)"
    )
    parser.add_argument("--mode", choices=("infer", "train", "both"), default="both", help="(default: both)")
    parser.add_argument("--dtype", choices=tuple(machine.DTYPES), default="fp32", help="(default: fp32)")
    parser.add_argument(
        "--peers",
        type=_peers,
        default=tuple(PEERS),
        metavar="LIST",
        help=f"what to time beside the fused model, with commas between (default: {','.join(PEERS)})",
    )
    parser.add_argument(
        "--rounds", type=integer(1), default=10, metavar="N", help="rounds that are timed (default: 10)"
    )
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="(default: 0)")
    parser.add_argument(
        "--memory", choices=MEMORY, default="save", help="what fused blocks keep for backward (default: save)"
    )
    machine.add_device_arguments(parser)


@dataclass(frozen=True)
class Setting:
    """What is the same for all peers of one mode."""

    mode: str  # infer, train
    dtype: torch.dtype
    device: torch.device


def run(args: argparse.Namespace, out: Output) -> int:
    """Build, verify, time, print."""
    where = machine.device(args.device)
    dtype = machine.DTYPES[args.dtype]
    loaded = models.load(args.model, seed=args.seed, batch=args.batch, size=args.size)
    report = models.wants_blocks(args.model, resnet_fused.fuse(copy.deepcopy(loaded.model), memory=args.memory))
    model = loaded.model.to(where)
    x = models.images(args.batch, args.size, args.seed).to(where)
    modes = ("infer", "train") if args.mode == "both" else (args.mode,)
    out.print(
        f"[bold]{args.model}[/bold] from {loaded.source}, {args.dtype}, "
        f"{args.batch} images of {args.size}x{args.size}, on {machine.sentence(where)}; {check.fused_sentence(report)}"
    )
    results: dict[str, Any] = {}
    right = True
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with out.progress(len(modes) * (len(args.peers) + 1 + args.rounds)) as advance:
            for mode in modes:
                setting = Setting(mode, dtype, where)
                results[mode] = measure(model, x, setting, args.peers, args.rounds, args.backend, args.memory, advance)
    finally:
        torch.backends.cudnn.benchmark = benchmark
    for mode, result in results.items():
        right = right and _FUSED in result["peers"]
        out.print(_result_table(mode, result))
        for name, reason in result["unavailable"].items():
            out.print(f"  {name} was not timed: {reason}")
    if where.type == "cpu":
        out.print(_CPU_NOTE)
    out.emit(
        {
            "model": args.model,
            "source": loaded.source,
            "batch": args.batch,
            "size": args.size,
            "dtype": args.dtype,
            "backend": args.backend,
            "memory": args.memory,
            "machine": machine.describe(where),
            "rounds": args.rounds,
            "blocks": report.to_dict(),
            "results": results,
            "verified": right,
        }
    )
    return 0 if right else 1


_CPU_NOTE = (
    "Times on a CPU that others share are noisy: compare within a table, not between runs. Peak memory is what "
    "one call adds, on the CPU the growth of the resident set."
)


def measure(
    model: nn.Module,
    x: Tensor,
    setting: Setting,
    peers: tuple[str, ...],
    rounds: int,
    backend: str,
    memory: str,
    advance: Callable[[str], None],
) -> dict[str, Any]:
    """Verify, warm up and time every peer in one mode.

    Returns:
        {"peers": name -> times, speed-ups, peak_memory_bytes, difference; "unavailable": name -> reason}.
    """
    labels = torch.arange(x.shape[0], device=x.device)
    twin = copy.deepcopy(model)
    truth = _outcome(step(twin, x, labels, Setting(setting.mode, torch.float32, setting.device))(), twin)
    calls: dict[str, timing.Call] = {}
    found: dict[str, dict[str, Any]] = {}
    unavailable: dict[str, str] = {}
    for name in (*peers, _FUSED):
        advance(f"{setting.mode}: {'compiling' if name == 'compile' else 'warming up'} {name}")
        try:
            twin, images = _prepare(name, model, x, backend, memory)
            call = step(twin, images, labels, setting)
            difference = _difference(_outcome(call(), twin), truth)
        except NotImplementedError as error:
            if name != _FUSED or backend == "auto":
                raise
            raise UsageError(f"argument --backend: {error}; use --backend auto") from error
        except Exception as error:
            if name != "compile":
                raise
            unavailable[name] = _first_line(error)
            continue
        if not difference <= TOLERANCES[setting.dtype]:
            unavailable[name] = (
                f"wrong result: relative difference {difference:.1e} from eager fp32, "
                f"{TOLERANCES[setting.dtype]:g} allowed"
            )
            continue
        for _ in range(_WARMUP):
            call()
        calls[name] = call
        found[name] = {"difference": difference, "peak_memory_bytes": timing.peak_memory(call, setting.device)}
    times = timing.interleave(calls, rounds, setting.device, advance, f"{setting.mode}: round")
    for name, measured in times.items():
        found[name].update(measured.to_dict())
        found[name]["speedup_of_fused"] = times[_FUSED].speedup(measured) if _FUSED in times else None
        found[name]["images_per_s"] = x.shape[0] / measured.median
    return {"peers": found, "unavailable": unavailable}


def _prepare(name: str, model: nn.Module, x: Tensor, backend: str, memory: str) -> tuple[nn.Module, Tensor]:
    """A copy of ``model`` as one peer runs it, and its input."""
    twin = copy.deepcopy(model)
    if name == "eager":
        return twin, x
    twin, x = twin.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    if name == "compile":
        torch.compiler.reset()
        return cast(nn.Module, torch.compile(twin)), x
    return resnet_fused.fuse(twin, backend=backend, memory=memory) if name == _FUSED else twin, x


def step(model: nn.Module, x: Tensor, labels: Tensor, setting: Setting) -> timing.Call:
    """The call that is timed: it returns the outputs (infer) or the loss (train)."""
    if setting.mode == "infer":
        model, x = model.to(setting.dtype).eval(), x.to(setting.dtype)

        def infer() -> Any:
            with torch.no_grad():
                return model(x)

        return infer
    model.train()
    half = setting.dtype != torch.float32
    amp = torch.autocast(setting.device.type, setting.dtype) if half else contextlib.nullcontext()

    def train() -> Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        with amp:
            loss = _loss(model(x), labels)
        loss.backward()
        return loss.detach()

    return train


def _tensors(out: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(out)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _loss(out: Any, labels: Tensor) -> Tensor:
    """Cross-entropy of logits, the mean square of any other output."""
    total = torch.zeros((), device=labels.device)
    for leaf in _tensors(out):
        logits = leaf.dim() == 2 and leaf.shape[1] > 1
        total = total + (F.cross_entropy(leaf, labels % leaf.shape[1]) if logits else leaf.float().square().mean())
    return total


def _outcome(out: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
    """All outputs as one vector, and the norm of all gradients; copies, since a compiled call may reuse its memory."""
    gradients = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
    norm = torch.stack(gradients).norm() if gradients else torch.zeros(())
    return torch.cat([leaf.detach().double().reshape(-1) for leaf in _tensors(out)]), norm


def _difference(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    """The greater relative difference of the two parts of an outcome."""
    if found[0].shape != truth[0].shape:
        return float("inf")
    parts = [((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(found, truth, strict=True)]
    return max(parts) if all(part == part for part in parts) else float("inf")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no text'}"[:300]


def _result_table(mode: str, result: dict[str, Any]) -> Any:
    """One row for each peer that was timed."""
    rows = []
    for name, known in result["peers"].items():
        memory, speedup = known["peak_memory_bytes"], known["speedup_of_fused"]
        rows.append(
            (
                PEERS.get(name, "[bold]resnet_fused[/bold], channels_last"),
                seconds(known["median_s"]),
                f"{seconds(known['q1_s'])} - {seconds(known['q3_s'])}",
                seconds(known["min_s"]),
                f"{known['images_per_s']:.1f}",
                "" if name == _FUSED or speedup is None else f"{speedup:.2f} x",
                "unknown" if memory is None else f"{memory / 2**20:.0f}",
                f"{known['difference']:.0e}",
            )
        )
    columns = ("", "median ms", "IQR ms", "least ms", "images/s", "fused is faster", "peak MiB", "difference")
    titles = {"infer": "Inference", "train": "Training: forward, loss, backward"}
    return table(titles[mode], columns, rows)
