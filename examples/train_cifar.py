"""Train a CIFAR network of resnet_fused.models on CIFAR-10, as the papers do (arXiv 1512.03385, 1603.05027).

--data names a folder with the binary version of CIFAR-10 (data_batch_1.bin to data_batch_5.bin and test_batch.bin);
nothing is downloaded. Without it the images are SYNTHETIC, which shows that everything runs and nothing else.

The results are train_cifar.csv, train_cifar.png and the checkpoint train_cifar.pt in --out. --resume continues a run
that was interrupted, at whatever step, with the bits that it would have had. With torchrun every process takes a share
of each batch: gloo on the CPU, nccl on GPUs.
"""

from __future__ import annotations

import argparse
import ast
import functools
from pathlib import Path
from typing import Any

import checkpoints
import common
import torch
from images import Dataset, cifar10, synthetic
from torch import nn
from trainer import AMP, Recipe, Trainer, World, paper_warmup, world

import resnet_fused
from resnet_fused import models
from resnet_fused.blocks.plain_units import UNITS
from resnet_fused.cli import machine
from resnet_fused.cli.output import Output, UsageError, integer, table

EXAMPLES = """\
  python examples/train_cifar.py                                          # about a minute, synthetic images
  python examples/train_cifar.py --data cifar-10-batches-bin --depth 110  # the paper's recipe
  python examples/train_cifar.py --data DIR --depth 110 --unit full_preact --amp bf16
  python examples/train_cifar.py --mixing shortcut_gating:-6 --shortcut B
  python examples/train_cifar.py --data DIR --resume                      # after an interruption
  torchrun --nproc-per-node 2 examples/train_cifar.py --batch 64
"""
NAME = "train_cifar"
NORMS = {
    "batch": nn.BatchNorm2d,
    "sync": nn.SyncBatchNorm,
    "group": functools.partial(nn.GroupNorm, 8),
}
RULES = tuple(name for name in models.mixing.__all__ if name not in ("MixingRule", "MixingSite"))
NETWORKS = tuple(name for name in models.__all__ if name.startswith("cifar_"))
ANY_DEPTH = ("cifar_resnet", "cifar_preact_resnet")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__, EXAMPLES)
    network = parser.add_argument_group("network")
    network.add_argument("--model", default="cifar_resnet", choices=NETWORKS, metavar="NAME", help=", ".join(NETWORKS))
    network.add_argument("--depth", type=int, metavar="N", help=f"layers, for {' and '.join(ANY_DEPTH)} (default: 20)")
    network.add_argument("--unit", choices=UNITS, help="order of norm, ReLU and addition")
    network.add_argument("--shortcut", choices=("A", "B", "C"), help="where the size changes, in C everywhere")
    network.add_argument(
        "--mixing", type=mixing, metavar="RULE[:VALUE,...]", help=f"sum of branch and shortcut: {', '.join(RULES)}"
    )
    network.add_argument("--bottleneck", action="store_true", default=None, help="units of 1x1, 3x3, 1x1 convolutions")
    network.add_argument("--norm", default="batch", choices=NORMS, help="sync needs GPUs (default: batch)")
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, metavar="DIR", help="folder with CIFAR-10's binary files")
    data.add_argument(
        "--images", type=integer(10), default=1024, metavar="N", help="synthetic images to train on (default: 1024)"
    )
    data.add_argument("--normalise", default="pixel", choices=("pixel", "channel"), help="the mean to subtract")
    data.add_argument("--no-augment", action="store_true", help="no random crops and mirror images")
    recipe = parser.add_argument_group("recipe (defaults with --data: the papers')")
    recipe.add_argument("--epochs", type=integer(1), metavar="N", help="default: 164 with --data, else 6")
    recipe.add_argument("--batch", type=integer(1), metavar="N", help="of all processes (default: 128, synthetic 64)")
    recipe.add_argument("--rate", type=float, default=0.1, help="a tenth of it after 1/2, a hundredth after 3/4")
    recipe.add_argument("--momentum", type=float, default=0.9)
    recipe.add_argument("--weight-decay", type=float, default=1e-4)
    recipe.add_argument(
        "--warmup", type=integer(0), metavar="STEPS", help="at a tenth of the rate (default: 400/64000 of the steps "
        "from 110 layers on, else 0)"
    )  # fmt: skip
    recipe.add_argument("--amp", default="off", choices=AMP, help="autocast; fp16 with a GradScaler")
    checkpoint = parser.add_argument_group("checkpoints")
    checkpoint.add_argument(
        "--checkpoint-every", type=integer(1), metavar="STEPS", help="default: after every epoch; at the end always"
    )
    checkpoint.add_argument("--resume", action="store_true", help=f"continue from {NAME}.pt in --out")
    checkpoint.add_argument("--stop-after", type=integer(1), metavar="STEPS", help="stop early, to be resumed")
    return parser.parse_args(arguments)


def mixing(text: str) -> models.mixing.MixingRule:
    """``name:value,value`` as the rule ``models.mixing.name(value, value)``."""
    name, _, values = text.partition(":")
    if name not in RULES:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(RULES)}, got {name!r}")
    try:
        rule = getattr(models.mixing, name)(*(ast.literal_eval(v.strip()) for v in values.split(",") if v))
        rule(models.mixing.MixingSite(16, 16, 1, 0, 1))  # the values are checked where modules are made
    except (TypeError, ValueError, SyntaxError) as error:
        raise argparse.ArgumentTypeError(f"expected values that {name} takes, got {values!r} ({error})") from error
    return rule


def build(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The network of the options.

    Raises:
        UsageError: they contradict each other.
    """
    if args.norm == "sync" and device.type != "cuda":
        raise UsageError(f"argument --norm: expected a GPU for sync, got {device}; PyTorch has it there alone")
    options: dict[str, Any] = {"norm_layer": NORMS[args.norm]}
    if args.model in ANY_DEPTH:
        options["depth"] = 20 if args.depth is None else args.depth
    elif args.depth is not None:
        raise UsageError(f"argument --depth: expected --model {' or '.join(ANY_DEPTH)}, got {args.model}")
    for name in ("unit", "shortcut", "mixing", "bottleneck"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    try:
        return getattr(models, args.model)(**options)
    except ValueError as error:
        raise UsageError(str(error)) from error


def load(args: argparse.Namespace) -> Dataset:
    """CIFAR-10, or the stand-in."""
    if args.data is not None:
        return cifar10(args.data, args.normalise)
    return synthetic(args.images, max(args.images // 5, 1), args.normalise, args.seed)


def recipe_of(args: argparse.Namespace, depth: int, images: int) -> Recipe:
    """The papers' recipe with what the options change."""
    real = args.data is not None
    batch = args.batch or (128 if real else min(64, images))
    epochs = args.epochs or (164 if real else 6)
    warmup = paper_warmup(depth, images // batch * epochs) if args.warmup is None else args.warmup
    return Recipe(
        epochs, batch, args.rate, args.momentum, args.weight_decay, warmup, not args.no_augment, args.amp
    )  # fmt: skip


def run(args: argparse.Namespace, out: Output) -> Trainer:
    """Everything; the trainer as it is at the end."""
    device = machine.device(args.device)
    with world(device) as here:
        if device.type == "cuda" and here.size > 1:
            device = torch.device("cuda", here.local_rank)
            torch.cuda.set_device(device)
        return _train(args, out if here.first else Output(json_mode=True), device, here)


def _train(args: argparse.Namespace, out: Output, device: torch.device, here: World) -> Trainer:
    where = common.folder(args.out)
    common.seed_everything(args.seed)
    data = load(args)
    network = build(args, device)
    recipe = recipe_of(args, int(network.depth), len(data.train.labels))  # type: ignore[arg-type]
    trainer = Trainer(network, data, recipe, device=device, seed=args.seed, world=here)
    chosen = ("model", "depth", "unit", "shortcut", "mixing", "bottleneck", "norm")
    run_is = {name: repr(getattr(args, name)) for name in (*chosen, "seed", "normalise")}
    run_is |= {"data, as crc32": data.crc32()} | {"device": device.type}
    run_is |= {f"recipe {name}": value for name, value in recipe._asdict().items()}
    if args.resume:
        state = checkpoints.load(where / f"{NAME}.pt")
        for name, value in run_is.items():
            other = state["run"].get(name)
            if other != value:
                raise UsageError(f"argument --resume: expected a checkpoint of a run with {name} {value}, got {other}")
        trainer.load_state(state)

    parameters = sum(p.numel() for p in network.parameters())
    out.print(common.header(device) + (f", {here.size} processes" if here.size > 1 else ""))
    out.print(f"Data: {data.name}.")
    out.print(f"Network: {args.model}, depth {network.depth}, {parameters:,} parameters; {_fused(network)}.")
    out.print(
        f"Recipe: {recipe.epochs} epochs of {trainer.steps_per_epoch} steps of {recipe.batch} images, "
        f"rate {recipe.rate:g}, {recipe.warmup} steps of warm-up, amp {recipe.amp}"
        + (f"; resumed at step {trainer.steps}." if args.resume else ".")
    )
    _loop(trainer, args, out, where, run_is)
    if here.first and trainer.rows:
        _report(trainer, out, where)
    return trainer


def _fused(network: nn.Module) -> str:
    rows = [row for row in resnet_fused.report(network).rows if row.kind != "stem"]
    return f"{sum(row.status == 'fused' for row in rows)} of {len(rows)} units fused"


def _loop(trainer: Trainer, args: argparse.Namespace, out: Output, where: Path, run_is: dict[str, Any]) -> None:
    """The steps, with a progress bar and checkpoints."""
    every = args.checkpoint_every or trainer.steps_per_epoch
    until = min(args.stop_after or trainer.total_steps, trainer.total_steps)
    saved = -1

    def save() -> None:
        nonlocal saved
        saved = trainer.steps
        state = trainer.state()  # on every process
        if trainer.world.first:
            checkpoints.save(where / f"{NAME}.pt", {"run": run_is, **state})
            if trainer.rows:
                common.write_csv(where / f"{NAME}.csv", trainer.rows)

    with out.progress(max(until - trainer.steps, 1)) as advance:

        def after_step() -> None:
            if trainer.steps % every == 0:
                save()
            row = trainer.rows[-1] if trainer.rows else None
            so_far = f", training loss {row['train_loss']:.3f}, test error {row['test_error']:.1f}%" if row else ""
            if trainer.world.first:
                epoch = min(len(trainer.rows) + 1, trainer.recipe.epochs)
                advance(f"epoch {epoch} of {trainer.recipe.epochs}{so_far}")

        trainer.run(until, after_step)
    if saved != trainer.steps:
        save()


def _report(trainer: Trainer, out: Output, where: Path) -> None:
    """The table of the last epochs, and the PNG."""
    rows = trainer.rows
    columns = list(rows[0])
    out.print(table("Training" if len(rows) <= 10 else "Training, the last 10 epochs", columns, [
        [f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows[-10:]
    ], left=0))  # fmt: skip
    with common.figure(where / f"{NAME}.png", 1, 2, (11, 4.2)) as (figure, axes):
        epochs = [row["epoch"] for row in rows]
        left, right = axes[0]
        left.plot(epochs, [row["train_loss"] for row in rows], "o-", markersize=3)
        left.set(xlabel="epoch", ylabel="training loss (cross-entropy)", yscale="log")
        for name, style in (("train_error", "--"), ("test_error", "-")):
            right.plot(epochs, [row[name] for row in rows], style, label=name.replace("_", " "))
        right.set(xlabel="epoch", ylabel="error, %", ylim=(0, None))
        right.legend()
        for each in axes[0]:
            each.grid(alpha=0.3)
            each.xaxis.get_major_locator().set_params(integer=True)
        figure.suptitle(trainer.data.name, fontsize=10)
    last = rows[-1]
    state = "diverged" if trainer.diverged else "done" if trainer.steps == trainer.total_steps else "stopped early"
    out.print(
        f"{state} at step {trainer.steps} of {trainer.total_steps}: training error {last['train_error']:.2f}%, "
        f"test error {last['test_error']:.2f}%, on {trainer.data.name}."
    )
    out.print(f"Wrote {NAME}.csv, {NAME}.png and {NAME}.pt to {where}.")


if __name__ == "__main__":
    raise SystemExit(common.launch(run, parse()))
