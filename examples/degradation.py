"""Do deeper plain networks train worse, and deeper residual ones not? (arXiv 1512.03385, section 4.2, on small images)

Trains the CIFAR networks of resnet_fused.models with and without shortcuts, at several depths and from several seeds,
on scikit-learn's handwritten digits of 8x8 pixels: real data, but smaller and easier than the paper's CIFAR-10. Then it
says whether the effect is there in these runs, whatever the answer. The exit code is 0 either way.

The results are degradation.csv, a row for each network and epoch, and degradation.png in --out.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any, NamedTuple

import common
import torch
from images import real_digits
from trainer import Recipe, Trainer

from resnet_fused import models
from resnet_fused.cli import machine
from resnet_fused.cli.output import Output, integer, table

EXAMPLES = """\
  python examples/degradation.py
  python examples/degradation.py --depths 20,56 --epochs 12 --seeds 5
"""
NAME = "degradation"
KINDS = {"plain": models.mixing.no_shortcut(), "residual": None}
MARGIN = 1.0
"""By how many percentage points training errors must differ to count."""


class Run(NamedTuple):
    """One network that was trained."""

    kind: str
    depth: int
    seed: int
    rows: list[dict[str, Any]]  # one an epoch

    @property
    def error(self) -> float:
        """Training error of the last epoch, %."""
        return self.rows[-1]["train_error"]

    @property
    def loss(self) -> float:
        return self.rows[-1]["train_loss"]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__, EXAMPLES)
    parser.add_argument("--depths", type=depths, default=(8, 20, 44), metavar="N,N,...", help="default: 8,20,44")
    parser.add_argument("--seeds", type=integer(1), default=3, metavar="N", help="runs of each network (default: 3)")
    parser.add_argument("--epochs", type=integer(1), default=5, metavar="N", help="default: 5")
    parser.add_argument("--batch", type=integer(1), default=64, metavar="N", help="default: 64")
    parser.add_argument("--rate", type=float, default=0.02, help="default: 0.02, at which all these depths train")
    parser.add_argument(
        "--processes", type=integer(1), metavar="N", help="runs at a time (default: the cores, up to 4)"
    )
    return parser.parse_args(arguments)


def depths(text: str) -> tuple[int, ...]:
    """At least two depths, ascending."""
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if len(found) < 2 or any(depth < 8 or depth % 6 != 2 for depth in found):
        raise argparse.ArgumentTypeError(
            f"expected two or more depths of the form 6n + 2, such as 8,20,44, got {text!r}"
        )
    return found


def train(kind: str, depth: int, seed: int, recipe: Recipe, device: str) -> Run:
    """One network on the digits."""
    common.seed_everything(seed)
    network = models.cifar_resnet(depth, mixing=KINDS[kind])
    trainer = Trainer(network, real_digits(), recipe, device=torch.device(device), seed=seed)
    trainer.run()
    return Run(kind, depth, seed, trainer.rows)


class Verdict(NamedTuple):
    """What the runs say about the shallowest and the deepest network."""

    plain: int  # seeds in which the deeper plain net has the higher training error, by MARGIN and more, and higher loss
    residual: int  # seeds in which the deeper residual net's training error is not higher by MARGIN
    seeds: int

    @property
    def seen(self) -> bool:
        return self.plain == self.residual == self.seeds


def judge(runs: list[Run]) -> Verdict:
    """Compare the deepest with the shallowest network, seed by seed."""
    found = {(run.kind, run.depth, run.seed): run for run in runs}
    shallow, deep = min(run.depth for run in runs), max(run.depth for run in runs)
    seeds = sorted({run.seed for run in runs})
    plain = residual = 0
    for seed in seeds:
        a, b = found["plain", shallow, seed], found["plain", deep, seed]
        # A loss that is not a number counts as the higher one.
        plain += not (b.error < a.error + MARGIN) and not (b.loss <= a.loss)
        residual += found["residual", deep, seed].error < found["residual", shallow, seed].error + MARGIN
    return Verdict(plain, residual, len(seeds))


def run(args: argparse.Namespace, out: Output) -> Verdict:
    """Train, tabulate, draw and judge."""
    device = machine.device(args.device)
    where = common.folder(args.out)
    data = real_digits()
    recipe = Recipe(args.epochs, args.batch, args.rate)
    seeds = range(args.seed, args.seed + args.seeds)
    jobs = [
        (kind, depth, seed, recipe, str(device))
        for depth in sorted(args.depths, reverse=True)  # the long ones first
        for seed in seeds
        for kind in KINDS
    ]
    Trainer(models.cifar_resnet(8), data, recipe, device=device, seed=0)  # wrong options are told before the runs
    workers = args.processes or common.processes(device)
    with out.progress(len(jobs)) as advance:
        advance("training")
        runs = common.parallel(
            train,
            jobs,
            workers,
            lambda run: advance(f"{run.kind}-{run.depth}, seed {run.seed}: training error {run.error:.1f}%"),
        )
    runs.sort(key=lambda run: (run.kind, run.depth, run.seed))
    out.print(common.header(device, workers))
    out.print(
        f"Data: {data.name}. {args.epochs} epochs of {len(data.train.labels) // args.batch} steps, rate {args.rate:g}."
    )
    out.print(_table(runs, args.depths))
    verdict = judge(runs)
    out.print(*_sentences(verdict, args.depths))
    common.write_csv(
        where / f"{NAME}.csv",
        [{"kind": run.kind, "depth": run.depth, "seed": run.seed} | row for run in runs for row in run.rows],
    )
    _draw(runs, args.depths, data.name, where / f"{NAME}.png")
    out.print(f"Wrote {NAME}.csv and {NAME}.png to {where}.")
    return verdict


def _table(runs: list[Run], wanted: tuple[int, ...]) -> Any:
    """The last epoch of every network, all seeds."""
    rows = []
    for kind in KINDS:
        for depth in wanted:
            own = [run for run in runs if (run.kind, run.depth) == (kind, depth)]
            errors, losses = ([f"{value:.{digits}f}" for value in values] for values, digits in (
                ([run.error for run in own], 1), ([run.loss for run in own], 3)
            ))  # fmt: skip
            tests = [f"{run.rows[-1]['test_error']:.1f}" for run in own]
            rows.append([f"{kind}, {depth} layers", "  ".join(errors), "  ".join(losses), "  ".join(tests)])
    columns = ["network", "training error, %, by seed", "training loss, by seed", "test error, %, by seed"]
    return table("Last epoch", columns, rows)


def _sentences(verdict: Verdict, wanted: tuple[int, ...]) -> list[str]:
    shallow, deep = wanted[0], wanted[-1]
    answer = "seen in these runs" if verdict.seen else "NOT seen in all of these runs"
    return [
        f"Degradation of plain networks, and not of residual ones: {answer}.\n"
        f"  plain: {deep} layers have the higher training loss, and an error higher by at least {MARGIN:g} percentage "
        f"point, than {shallow} layers in {verdict.plain} of {verdict.seeds} seeds;\n"
        f"  residual: the training error of {deep} layers is not higher by {MARGIN:g} percentage point in "
        f"{verdict.residual} of {verdict.seeds} seeds."
    ]


def _draw(runs: list[Run], wanted: tuple[int, ...], data: str, path: Any) -> None:
    """Training errors by epoch, as in figure 4 of arXiv 1512.03385, and the last losses by depth."""
    with common.figure(path, 1, 3, (14, 4.2)) as (figure, grid):
        for axes, kind in zip(grid[0], KINDS, strict=False):
            for i, depth in enumerate(wanted):
                own = [
                    [row["train_error"] for row in run.rows] for run in runs if (run.kind, run.depth) == (kind, depth)
                ]
                epochs = range(1, max(map(len, own)) + 1)
                for curve in own:
                    axes.plot(range(1, len(curve) + 1), curve, color=f"C{i}", alpha=0.3, linewidth=1)
                middle = [median([curve[e - 1] for curve in own if len(curve) >= e]) for e in epochs]
                axes.plot(epochs, middle, color=f"C{i}", linewidth=2.2, label=f"{depth} layers")
            axes.set(xlabel="epoch", ylabel="training error, %", ylim=(-2, 100), title=f"{kind} networks")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(title=f"median of {len({run.seed for run in runs})} seeds")
        last = grid[0][2]
        for kind, marker in zip(KINDS, ("s", "o"), strict=True):
            own_runs = [run for run in runs if run.kind == kind]
            last.plot([run.depth for run in own_runs], [run.loss for run in own_runs], marker, alpha=0.5)
            color = last.lines[-1].get_color()
            middle = [median(run.loss for run in own_runs if run.depth == depth) for depth in wanted]
            last.plot(wanted, middle, color=color, label=kind)
        last.set(xlabel="layers", ylabel="training loss, last epoch", yscale="log", xticks=wanted, title="by depth")
        last.legend()
        for axes in grid[0]:
            axes.grid(alpha=0.3)
        figure.suptitle(data, fontsize=10)


if __name__ == "__main__":
    raise SystemExit(common.launch(run, parse()))
