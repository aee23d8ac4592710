"""Tables 1 and 2 of "Identity Mappings in Deep Residual Networks" (arXiv 1603.05027) beside runs of one's own.

Table 1 changes what is on the shortcut, table 2 the order of BN and ReLU. The paper's figures are test errors of
ResNet-110 and ResNet-164 on CIFAR-10, medians of 5 runs, "fail" for more than 20%. --scale chooses how near one's own
runs come to that:

  smoke   8 and 11 layers, one epoch of 128 of scikit-learn's digits: shows that every row runs
  small   20 layers (of both kinds of unit), 4 epochs of the digits: a minute or two on two cores
  paper   110 and 164 layers, 164 epochs of CIFAR-10 (needs --data), 5 runs of each

Errors of different scales are NOT comparable: a short run of a shallow network tells how soon it learns, not how far.

The results are variants.csv, a row for each row of the tables, and variants.png in --out.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import common
import torch
from images import Dataset, cifar10, real_digits
from trainer import Recipe, Trainer, paper_warmup

from resnet_fused import models
from resnet_fused.cli import machine
from resnet_fused.cli.output import Output, UsageError, integer, table
from resnet_fused.models import mixing

EXAMPLES = """\
  python examples/variants.py
  python examples/variants.py --table 1 --runs 3
  python examples/variants.py --scale paper --data cifar-10-batches-bin
"""
NAME = "variants"
FAIL = 20.0
"""Above this test error, in %, the paper writes "fail"."""


class Case(NamedTuple):
    """One row of a table, or one column of a row of table 2."""

    table: int
    name: str
    shortcut: str  # what is on the shortcut
    branch: str  # what is on F
    network: str  # the paper's
    paper: str  # its error in %
    options: dict[str, Any]  # of models.cifar_resnet


def _first(name: str, on_shortcut: str, on_branch: str, paper: str, **options: Any) -> Case:
    return Case(1, name, on_shortcut, on_branch, "ResNet-110", paper, options)


def _second(name: str, unit: str, basic: str, bottleneck: str) -> list[Case]:
    return [
        Case(2, name, "1", "1", "ResNet-110", basic, {"unit": unit}),
        Case(2, name, "1", "1", "ResNet-164", bottleneck, {"unit": unit, "bottleneck": True}),
    ]


CASES = (
    _first("original", "1", "1", "6.61"),
    _first("constant scaling", "0", "1", "fail", mixing=mixing.no_shortcut()),  # a plain net
    _first("constant scaling", "0.5", "1", "fail", mixing=mixing.constant_scaling(0.5, 1.0)),
    _first("constant scaling", "0.5", "0.5", "12.35", mixing=mixing.constant_scaling(0.5, 0.5)),
    # The paper fails with every b_g from 0 to -5.
    _first("exclusive gating, b_g = 0", "1 - g(x)", "g(x)", "fail", mixing=mixing.exclusive_gating(0.0)),
    _first("exclusive gating, b_g = -6", "1 - g(x)", "g(x)", "8.70", mixing=mixing.exclusive_gating(-6.0)),
    _first("exclusive gating, b_g = -7", "1 - g(x)", "g(x)", "9.81", mixing=mixing.exclusive_gating(-7.0)),
    _first("shortcut-only gating, b_g = 0", "1 - g(x)", "1", "12.86", mixing=mixing.shortcut_gating(0.0)),
    _first("shortcut-only gating, b_g = -6", "1 - g(x)", "1", "6.91", mixing=mixing.shortcut_gating(-6.0)),
    _first("1x1 conv shortcut, every unit", "1x1 conv", "1", "12.22", shortcut="C"),
    _first("dropout shortcut", "dropout 0.5", "1", "fail", mixing=mixing.dropout_shortcut(0.5)),
    *_second("(a) original", "original", "6.61", "5.93"),
    *_second("(b) BN after addition", "bn_after_add", "8.17", "6.50"),
    *_second("(c) ReLU before addition", "relu_before_add", "7.84", "6.14"),
    *_second("(d) ReLU-only pre-activation", "relu_preact", "6.71", "5.91"),
    *_second("(e) full pre-activation", "full_preact", "6.37", "5.46"),
)
"""The figures of the paper, row by row."""


class Scale(NamedTuple):
    """How big the runs are."""

    depth: int  # in the place of 110
    bottleneck_depth: int  # in the place of 164
    recipe: Recipe
    runs: int
    images: int | None = None  # to train on, and to test on; None means all


SCALES = {
    "smoke": Scale(8, 11, Recipe(1, 32, 0.02), 1, 128),
    "small": Scale(20, 20, Recipe(4, 64, 0.02), 1),
    "paper": Scale(110, 164, Recipe(164, augment=True), 5),
}


class Found(NamedTuple):
    """One run of one case."""

    case: int  # index in CASES
    error: float  # test error, %; NaN if the loss was not finite
    loss: float  # training loss of the last epoch


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__, EXAMPLES)
    parser.add_argument("--scale", choices=SCALES, default="small", help="default: small")
    parser.add_argument("--data", type=Path, metavar="DIR", help="CIFAR-10's binary files; default: the digits")
    parser.add_argument("--table", type=int, choices=(1, 2), help="only this one (default: both)")
    parser.add_argument(
        "--runs", type=integer(1), metavar="N", help="of each row (default: 5 at --scale paper, else 1)"
    )
    parser.add_argument("--epochs", type=integer(1), metavar="N", help="default: those of the scale")
    parser.add_argument(
        "--processes", type=integer(1), metavar="N", help="runs at a time (default: the cores, up to 4)"
    )
    return parser.parse_args(arguments)


def load(data: Path | None, images: int | None) -> Dataset:
    """CIFAR-10 or the digits, all images or the first ones."""
    found = real_digits() if data is None else cifar10(data)
    if images is None:
        return found
    train, test = (p._replace(pixels=p.pixels[:images], labels=p.labels[:images]) for p in (found.train, found.test))
    return Dataset(f"{found.name}, of which {len(train.labels)} and {len(test.labels)} were used", train, test)


def train(index: int, scale: Scale, data: Path | None, seed: int, device: str) -> Found:
    """One run."""
    common.seed_everything(seed)
    options = CASES[index].options
    depth = scale.bottleneck_depth if options.get("bottleneck") else scale.depth
    loaded, recipe = load(data, scale.images), scale.recipe
    steps = len(loaded.train.labels) // recipe.batch * recipe.epochs
    recipe = recipe._replace(warmup=paper_warmup(depth, steps))
    trainer = Trainer(models.cifar_resnet(depth, **options), loaded, recipe, device=torch.device(device), seed=seed)
    trainer.run()
    last = trainer.rows[-1]
    return Found(index, math.nan if trainer.diverged else last["test_error"], last["train_loss"])


def run(args: argparse.Namespace, out: Output) -> list[dict[str, Any]]:
    """Train, tabulate and draw; the rows of the CSV."""
    device = machine.device(args.device)
    where = common.folder(args.out)
    if args.scale == "paper" and args.data is None:
        raise UsageError("argument --scale: expected --data with CIFAR-10's files for paper, got none")
    scale = SCALES[args.scale]
    scale = scale._replace(
        runs=args.runs or scale.runs, recipe=scale.recipe._replace(epochs=args.epochs or scale.recipe.epochs)
    )
    data = load(args.data, scale.images)
    wanted = [i for i, case in enumerate(CASES) if args.table in (None, case.table)]
    # "original" stands in both tables: the same network is trained once.
    first_with = {
        i: next(j for j in wanted if CASES[j].options in (CASES[i].options, _plain(CASES[i]))) for i in wanted
    }
    jobs = [
        (i, scale, args.data, seed, str(device))
        for seed in range(args.seed, args.seed + scale.runs)
        for i in sorted(set(first_with.values()), reverse=True)
    ]
    workers = args.processes or common.processes(device)
    with out.progress(len(jobs)) as advance:
        advance("training")
        found = common.parallel(
            train,
            jobs,
            workers,
            lambda f: advance(f"{_title(f.case)}: {f.error:.1f}%"),
        )
    rows = [_row(i, [f for f in found if f.case == first_with[i]], scale, data) for i in wanted]
    recipe = scale.recipe
    out.print(common.header(device, workers))
    out.print(
        f"Paper: 110 and 164 layers, CIFAR-10, 164 epochs, median of 5. These runs, scale {args.scale}: {scale.depth} "
        f"and {scale.bottleneck_depth} layers, {recipe.epochs} epochs of {len(data.train.labels) // recipe.batch} "
        f"steps, rate {recipe.rate:g}, median of {scale.runs}; {data.name}."
    )
    for number in sorted({row["table"] for row in rows}):
        out.print(_table(number, [row for row in rows if row["table"] == number]))
    if args.scale != "paper" or args.data is None or args.epochs is not None:
        out.print("The scales differ: the two columns of errors are not comparable, and small differences are chance.")
    common.write_csv(where / f"{NAME}.csv", rows)
    _draw(rows, args.scale, where / f"{NAME}.png")
    out.print(f"Wrote {NAME}.csv and {NAME}.png to {where}.")
    return rows


def _plain(case: Case) -> dict[str, Any]:
    """The options of ``case`` without those that are the defaults."""
    return {name: value for name, value in case.options.items() if (name, value) != ("unit", "original")}


def _title(index: int) -> str:
    case = CASES[index]
    return f"{case.name}, {case.network}" if case.table == 2 else f"{case.name}, shortcut {case.shortcut}"


def _row(index: int, found: list[Found], scale: Scale, data: Dataset) -> dict[str, Any]:
    """The paper's row and ours."""
    case = CASES[index]
    error = math.nan if any(math.isnan(f.error) for f in found) else median(f.error for f in found)
    return {
        "table": case.table,
        "case": case.name,
        "on_shortcut": case.shortcut,
        "on_branch": case.branch,
        "paper_network": case.network,
        "paper_error": case.paper,
        "our_depth": scale.bottleneck_depth if case.options.get("bottleneck") else scale.depth,
        "our_epochs": scale.recipe.epochs,
        "our_runs": len(found),
        "our_error": error,
        "our_verdict": "diverged" if math.isnan(error) else "fail" if error > FAIL else "trained",
        "our_train_loss": median(f.loss for f in found),
        "our_data": data.name,
    }


def _table(number: int, rows: list[dict[str, Any]]) -> Any:
    title = {1: "Table 1: on the shortcut, and on F", 2: "Table 2: order of BN and ReLU"}[number]
    columns = [
        "case",
        "shortcut",
        "F",
        "the paper's net",
        "the paper's error, %",
        "our depth",
        "our error, %",
        "our loss",
    ]
    cells = []
    for row in rows:
        ours = {"diverged": "diverged", "fail": f"fail ({row['our_error']:.2f})", "trained": f"{row['our_error']:.2f}"}
        cells.append(
            [
                *(row[name] for name in ("case", "on_shortcut", "on_branch", "paper_network", "paper_error")),
                str(row["our_depth"]),
                ours[row["our_verdict"]],
                f"{row['our_train_loss']:.3f}",
            ]
        )
    return table(title, columns, cells, left=4)


def _draw(rows: list[dict[str, Any]], scale: str, path: Path) -> None:
    """Bars for every row: the paper's error on the left, ours on the right, each with its own axis."""
    labels = [
        f"{row['case']}, {row['paper_network']}" if row["table"] == 2 else
        f"{row['case']}" + (f", {row['on_shortcut']} and {row['on_branch']}" if "scaling" in row["case"] else "")
        for row in rows
    ]  # fmt: skip
    height = 1.6 + 0.3 * len(rows)
    with common.figure(path, 1, 2, (13, height)) as (figure, axes):
        left, right = axes[0]
        right.sharey(left)
        right.tick_params(labelleft=False)
        papers = [None if row["paper_error"] == "fail" else float(row["paper_error"]) for row in rows]
        ours = [None if row["our_verdict"] == "diverged" else row["our_error"] for row in rows]
        for each, values, cap, color in ((left, papers, FAIL, "0.6"), (right, ours, 100.0, "tab:blue")):
            for y, value in enumerate(values):
                failed = value is None or value > FAIL
                bar = each.barh(y, cap if value is None else value, color="tab:red" if failed else color, alpha=0.7)
                text = ("fail" if each is left else "diverged") if value is None else f"{value:.2f}"
                each.bar_label(bar, [text], padding=3, fontsize=8)
            each.margins(x=0.15)
            each.grid(alpha=0.3, axis="x")
        left.set_yticks(range(len(rows)), labels, fontsize=8)
        left.invert_yaxis()
        left.set(xlabel="test error, %", title="the paper: CIFAR-10, 110 and 164 layers (red: above 20%)")
        depths = " and ".join(str(depth) for depth in sorted({row["our_depth"] for row in rows}))
        right.set(xlabel="test error, %", title=f"these runs: scale {scale}, {depths} layers")
        figure.suptitle(f"Scales differ. These runs: {rows[0]['our_data']}", fontsize=10)


if __name__ == "__main__":
    raise SystemExit(common.launch(run, parse()))
