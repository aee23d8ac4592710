"""Does a fused network train as the eager one does? Same weights, same batches, several seeds, fp32 and bf16 autocast.

A CIFAR ResNet learns scikit-learn's handwritten digits, from each seed and in each precision three times: fused, and
with PyTorch's modules (eager) in channels_last and in NCHW. The second layout is the yardstick: the same mathematics
rounded otherwise, which training carries as far as any other rounding. Two tests decide, each at 1%:

  start     After one update every gradient, every running statistic and the logits of the test images deviate from
            those of eager in fp64 by at most twice what eager's do in the worse layout (relative norms). Mann and
            Whitney's test on the halved deviations, with Bonferroni's correction for the number of tensors. There is
            no chaos yet: a few steps later some ReLU has seen another sign, and any two trainings part.
  training  Of the differences fused - eager from the same seed, rounding has no favourite sign. So the largest mean
            over the seeds of training loss and test error in all epochs is compared with what it becomes when seeds
            change their sign, by all 2^seeds choices. A tenth of the deviation of eager's seeds is allowed. Eager in
            NCHW takes the test too, as a control.

A faithful network fails each test in at most 1 of 100 runs. The exit code is 1 if one fails. In fp32 there is no TF32.

The results are convergence.csv, a row for each run and epoch, convergence.json and convergence.png in --out.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import common
import significance
import torch
from images import real_digits
from torch import Tensor, nn
from trainer import Recipe, Trainer

import resnet_fused
from resnet_fused import backends, models
from resnet_fused.cli import machine
from resnet_fused.cli.output import Output, UsageError, finite, integer, table

EXAMPLES = """\
  python examples/convergence.py                 # about five minutes on two cores
  python examples/convergence.py --quick         # 8 layers, 3 epochs
  python examples/convergence.py --device cuda --size 32 --bottleneck
  RESNET_FUSED_BACKEND=cuda,triton,aten python examples/convergence.py --device cuda
"""
NAME = "convergence"
AMP = {"fp32": "off", "bf16": "bf16"}
LAYOUTS = ("eager", "eager NCHW")
KINDS = (*LAYOUTS, "fused")
METRICS = ("train_loss", "test_error")
TIMES = 2.0
"""How many times as far from fp64 as eager a fused network may be after one update; the package's contract."""


ALLOWED = 0.1
"""How far from eager a fused network may be on the average, in deviations of eager's seeds."""


class Run(NamedTuple):
    """One training."""

    precision: str
    kind: str
    seed: int
    away: dict[str, float]  # how far from fp64 each tensor is after one update, relative to it
    rows: list[dict[str, Any]]  # one an epoch
    fallbacks: list[str]  # what did not run as asked, and why


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--seeds",
        type=int,
        choices=range(10, 17),
        default=12,
        metavar="N",
        help="10 to 16 (default: 12)",
    )
    parser.add_argument("--depth", type=int, metavar="N", help="layers, 6n + 2 (default: 20; with --quick 8)")
    parser.add_argument("--bottleneck", action="store_true", help="units four times as wide; 9n + 2 layers")
    parser.add_argument("--size", type=integer(8), default=8, metavar="N", help="pixels a side (default: 8, unscaled)")
    parser.add_argument("--epochs", type=integer(1), metavar="N", help="default: 8; with --quick 3")
    parser.add_argument("--batch", type=integer(1), default=64, metavar="N", help="default: 64")
    parser.add_argument("--rate", type=rate, default=0.02, metavar="RATE", help="default: 0.02")
    parser.add_argument("--quick", action="store_true", help="a smaller network and fewer epochs")
    parser.add_argument(
        "--processes", type=integer(1), metavar="N", help="seeds at a time (default: the cores, up to 4)"
    )
    args = parser.parse_args(arguments)
    if args.depth is None:
        args.depth = 8 if args.quick and not args.bottleneck else 20
    args.epochs = args.epochs or (3 if args.quick else 8)
    return args


def rate(text: str) -> float:
    """The type of ``--rate``."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a rate above 0, got {text!r}")
    return value


# --- training -------------------------------------------------------------------------------------------------------


def network(kind: str, depth: int, bottleneck: bool) -> nn.Module:
    """One of the networks; the random state decides on its weights."""
    made = models.cifar_resnet(depth, bottleneck=bottleneck)
    return made if kind == "fused" else resnet_fused.unfuse(made)


def train(seed: int, args: argparse.Namespace, device: str) -> list[Run]:
    """All networks from one seed."""
    truth = _first_update(_trainer("fp64", "eager", seed, args, device))
    return [_train(precision, kind, seed, truth, args, device) for precision in AMP for kind in KINDS]


def _train(
    precision: str, kind: str, seed: int, truth: dict[str, Tensor], args: argparse.Namespace, device: str
) -> Run:
    before = backends.fallbacks.copy()
    trainer = _trainer(precision, kind, seed, args, device)
    first = _first_update(trainer)
    trainer.run()
    fallbacks = sorted(f"{name}: {reason}" for name, reason in backends.fallbacks - before)
    away = {name: _away(first[name], truth[name]) for name in truth}
    return Run(precision, kind, seed, away, trainer.rows, fallbacks)


def _trainer(precision: str, kind: str, seed: int, args: argparse.Namespace, device: str) -> Trainer:
    common.seed_everything(seed)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    made = network(kind, args.depth, args.bottleneck)
    if precision == "fp64":
        made.double().register_forward_pre_hook(lambda module, inputs: tuple(x.double() for x in inputs))
    recipe = Recipe(args.epochs, args.batch, args.rate, amp=AMP.get(precision, "off"))
    trainer = Trainer(made, real_digits(args.size), recipe, device=torch.device(device), seed=seed)
    if kind == "eager NCHW":
        made.to(memory_format=torch.contiguous_format)
        made.register_forward_pre_hook(lambda module, inputs: tuple(x.contiguous() for x in inputs))
    return trainer


def _first_update(trainer: Trainer) -> dict[str, Tensor]:
    """Gradients, running statistics and the logits of the test images, in fp64."""
    trainer.step()
    made, images = trainer.network, trainer.data.test
    found = {name: parameter.grad for name, parameter in made.named_parameters()}
    found |= {name: buffer for name, buffer in made.named_buffers() if buffer.is_floating_point()}
    with torch.no_grad(), trainer.autocast():
        found["logits"] = made.eval()(images.batch(torch.arange(len(images.labels)))[0])
    return {name: value.double().clone() for name, value in found.items()}


def _away(ours: Tensor, truth: Tensor) -> float:
    """How far ``ours`` is from ``truth``, relative to it."""
    found = ((ours - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
    return math.inf if math.isnan(found) else found


# --- judgement ------------------------------------------------------------------------------------------------------


def judge(runs: list[Run], epochs: int) -> dict[str, Any]:
    """Figures and the tests' p of the runs of one precision."""
    own = {kind: sorted((run for run in runs if run.kind == kind), key=lambda run: run.seed) for kind in KINDS}
    curves = {kind: [_curves(own[kind], metric, epochs) for metric in METRICS] for kind in KINDS}

    def training(kind: str) -> float:
        ours, eager = torch.cat(curves[kind], 1), torch.cat(curves["eager"], 1)
        return significance.sign_flips(ours - eager, ALLOWED * eager.std(0))

    start, ratios = _start(own)
    worst = max(ratios, key=ratios.__getitem__)
    p = {"start": start, "training": training("fused")}
    return {
        "runs": {kind: _ends(curves[kind], curves["eager"], math.ceil(epochs / 4)) for kind in KINDS},
        "off fp64, times eager": {"median": median(ratios.values()), "largest": ratios[worst], "of": worst},
        "p": p,
        "control": training("eager NCHW"),
        "passed": all(value >= significance.LEVEL for value in p.values()),
    }


def _start(own: dict[str, list[Run]]) -> tuple[float, dict[str, float]]:
    """p of the first test, and by tensor the ratio of fused to the worse of eager's layouts, medians of the seeds."""
    p, ratios = 1.0, {}
    names = own["fused"][0].away
    for name in names:
        eager = [[run.away[name] for run in own[layout]] for layout in LAYOUTS]
        fused = [run.away[name] for run in own["fused"]]
        p = min(p, max(significance.larger([x / TIMES for x in fused], values) for values in eager) * len(names))
        ratios[name] = median(fused) / max(1e-300, *map(median, eager))
    return p, ratios


def _ends(curves: list[Tensor], eager: list[Tensor], epochs: int) -> dict[str, Any]:
    """Of the last epochs: mean and deviation over the seeds, mean difference from eager and its standard error."""
    found = {}
    for name, ours, theirs in zip(METRICS, curves, eager, strict=True):
        ends, differences = ours[:, -epochs:].mean(1), (ours - theirs)[:, -epochs:].mean(1)
        values = (ends.mean(), ends.std(), differences.mean(), differences.std() / math.sqrt(len(ends)))
        found[name] = dict(zip(("mean", "deviation", "minus_eager", "error"), map(float, values), strict=True))
    return found


def _curves(runs: list[Run], metric: str, epochs: int) -> Tensor:
    """(seeds, epochs); NaN behind the end of a run that diverged."""
    return torch.tensor(
        [[row[metric] for row in run.rows] + [math.nan] * (epochs - len(run.rows)) for run in runs], dtype=torch.float64
    )


# --- output ---------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, out: Output) -> bool:
    """Train, judge, tabulate and draw; whether all tests passed."""
    device = machine.device(args.device)
    where = common.folder(args.out)
    try:
        made = network("fused", args.depth, args.bottleneck)
    except ValueError as error:
        raise UsageError(str(error)) from error
    data = real_digits(args.size)
    Trainer(made, data, Recipe(args.epochs, args.batch), device=device, seed=0)  # a wrong batch is told before the runs
    seeds = range(args.seed, args.seed + args.seeds)
    workers = args.processes or common.processes(device)
    with out.progress(len(seeds)) as advance:
        advance("training")
        jobs = [(seed, args, str(device)) for seed in seeds]
        found = common.parallel(train, jobs, workers, lambda runs: advance(f"seed {runs[0].seed}"))
    runs = [run for of_one_seed in found for run in of_one_seed]
    with common.one_thread():
        document = {
            "machine": machine.describe(device),
            "data": data.name,
            "network": describe(args, made),
            "recipe": {"epochs": args.epochs, "batch": args.batch, "rate": args.rate},
            "seeds": list(seeds),
            **ran(made, runs),
            "precisions": {
                precision: judge([run for run in runs if run.precision == precision], args.epochs) for precision in AMP
            },
        }
    passed = all(found["passed"] for found in document["precisions"].values())
    used = "; ".join([", ".join(dict.fromkeys(document["backends"].values())), *document["fallbacks"]])
    last = math.ceil(args.epochs / 4)
    out.print(common.header(device, workers))
    out.print(f"Data: {data.name}. {args.epochs} epochs of {len(data.train.labels) // args.batch} steps.")
    out.print(f"Network: {document['network']}; units fused: {document['fused']}; backends: {used}.")
    ends = f"{len(seeds)} seeds, mean of the last {last} epochs: ± deviation; difference ± standard error"
    out.print(table(ends, COLUMNS, cells(document), left=2))
    out.print(table(f"p of each test, which passes from {significance.LEVEL:g} on", TESTS, verdicts(document)))
    _write(runs, document, where)
    out.print(f"Wrote {NAME}.csv, {NAME}.json and {NAME}.png to {where}.")
    return passed


def describe(args: argparse.Namespace, made: nn.Module) -> str:
    """The network in words."""
    units = ", bottlenecks" if args.bottleneck else ""
    return f"cifar_resnet {args.depth}{units}, {sum(p.numel() for p in made.parameters()):,} parameters"


def ran(made: nn.Module, runs: list[Run]) -> dict[str, Any]:
    """What of the network is fused, the backend that was asked for, each op's first choice, and what did not run so."""
    units = resnet_fused.report(made).to_dict()
    return {
        "fused": f"{sum(unit['status'] == 'fused' for unit in units)} of {len(units)}",
        "backend": backends.forced(),
        "backends": {op: name for unit in units for op, name in unit["backends"].items()},
        "fallbacks": sorted({reason for run in runs for reason in run.fallbacks}),
    }


COLUMNS = ("precision", "run", "training loss", "minus eager", "test error, %", "minus eager")
TESTS = ("precision", "off fp64 at first, times eager", "start", "training", "training, eager NCHW", "verdict")
DIGITS = dict(zip(METRICS, (5, 2), strict=True))


def cells(document: dict[str, Any]) -> list[list[str]]:
    """The last epochs: a row for each precision and kind."""
    rows = []
    for precision, found in document["precisions"].items():
        for kind, own in found["runs"].items():
            row = [precision, kind]
            for name, digits in DIGITS.items():
                value = own[name]
                row.append(f"{value['mean']:.{digits}f} ± {value['deviation']:.{digits}f}")
                row.append(f"{value['minus_eager']:+.{digits}f} ± {value['error']:.{digits}f}")
            rows.append([*row[:3], "", row[4], ""] if kind == "eager" else row)
    return rows


def verdicts(document: dict[str, Any]) -> list[list[str]]:
    """A row for each precision."""
    rows = []
    for precision, found in document["precisions"].items():
        off = found["off fp64, times eager"]
        ratios = f"{off['median']:.2f}, at most {off['largest']:.2f} ({off['of']})"
        p = [f"{value:.3f}" for value in (*found["p"].values(), found["control"])]
        rows.append([precision, ratios, *p, "PASS" if found["passed"] else "FAIL"])
    return rows


def _write(runs: list[Run], document: dict[str, Any], where: Path) -> None:
    """The three files."""
    runs = sorted(runs, key=lambda run: run[:3])
    rows = [{"precision": run.precision, "kind": run.kind, "seed": run.seed} | row for run in runs for row in run.rows]
    common.write_csv(where / f"{NAME}.csv", rows)
    with common.replacing(where / f"{NAME}.json") as temporary:
        temporary.write_text(json.dumps(finite(document), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    _draw(runs, document, where / f"{NAME}.png")


def _draw(runs: list[Run], document: dict[str, Any], path: Path) -> None:
    """A column for each precision: losses and errors by epoch, and how far from fp64 the first gradients are."""
    epochs, seeds = document["recipe"]["epochs"], len(document["seeds"])
    with common.figure(path, 3, len(AMP), (9, 8), dpi=80) as (figure, grid):
        for column, (precision, found) in zip(grid.T, document["precisions"].items(), strict=True):
            own = {kind: [run for run in runs if (run.precision, run.kind) == (precision, kind)] for kind in KINDS}
            for axes, metric in zip(column, METRICS, strict=False):
                x, eager = range(1, epochs + 1), torch.cat([_curves(own[kind], metric, epochs) for kind in LAYOUTS])
                label = f"eager, both layouts: range of {seeds} seeds"
                axes.fill_between(x, eager.amin(0), eager.amax(0), color="tab:orange", alpha=0.35, lw=0, label=label)
                for i, curve in enumerate(_curves(own["fused"], metric, epochs)):
                    axes.plot(x, curve, color="tab:blue", linewidth=0.7, label=None if i else "fused: every seed")
                axes.set(xlabel="epoch", yscale="log")
                axes.xaxis.get_major_locator().set_params(integer=True)
            for kind, style, width in zip(KINDS, ("-", ":", "-"), (3, 1, 0.7), strict=True):
                middle = [median(run.away[name] for run in own[kind]) for name in own[kind][0].away]
                color = "tab:blue" if kind == "fused" else "tab:orange"
                column[2].plot(middle, style, color=color, linewidth=width, alpha=0.35 if width > 1 else 1, label=kind)
            title = f"{precision}{' autocast' if precision == 'bf16' else ''}: {'PASS' if found['passed'] else 'FAIL'}"
            column[0].set(title=title, ylabel="training loss")
            column[1].set(ylabel="test error, %")
            column[2].set(xlabel="gradients, statistics, logits", ylabel="deviation from fp64", yscale="log")
            for axes in column:
                axes.legend(fontsize=7)
                axes.grid(alpha=0.3)
        figure.suptitle(f"{document['network']}, on {document['machine']['name']}\n{document['data']}", fontsize=9)


if __name__ == "__main__":
    raise SystemExit(common.launch(run, parse()))
