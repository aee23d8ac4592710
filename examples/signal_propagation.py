"""How the gradient reaches the first layers: the formulas of arXiv 1603.05027, and residual networks as sums of paths.

Everything is computed in fp64, at the initialisation, on the first stage of the CIFAR networks of resnet_fused.models
(units of full pre-activation, 16 channels), for random normal images: no training, no data set.

  1. With x_{l+1} = a_l x_l + b_l F_l(x_l), the gradient of x_l is that of x_L times the product of all a from l to L-1,
     plus what comes through the branches (equations 4 to 8). The product is 1 for the identity, a power of the constant
     for scaling, and a product of 1 - g(x) for gates. Measured with branches, and without: with their last convolutions
     at zero and gates that pass no gradient on.
  2. Expanding the product over n units gives 2^n paths, of which n over k go through k branches (Veit et al., arXiv
     1605.06431). Every one of them is walked backward.

The results are signal_propagation.csv, signal_propagation_paths.csv and signal_propagation.png in --out.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from torch import Tensor, nn

from resnet_fused import models
from resnet_fused.blocks.mixing import ConstantScaling, ExclusiveGating, Mixing, NoShortcut, ShortcutGating
from resnet_fused.cli import machine
from resnet_fused.cli.output import Output, integer, table
from resnet_fused.models import mixing

EXAMPLES = """\
  python examples/signal_propagation.py
  python examples/signal_propagation.py --units 54 --paths 10
"""
NAME = "signal_propagation"
# The number of a gate is the initial value of b_g.
RULES: dict[str, mixing.MixingRule | None] = {
    "identity": None,
    "plain": mixing.no_shortcut(),
    "scaling 0.5, F 0.5": mixing.constant_scaling(0.5, 0.5),
    "scaling 0.5": mixing.constant_scaling(0.5, 1.0),
    "scaling 0.9": mixing.constant_scaling(0.9, 1.0),
    "exclusive gate, 0": mixing.exclusive_gating(0.0),
    "exclusive gate, -6": mixing.exclusive_gating(-6.0),
    "shortcut gate, 0": mixing.shortcut_gating(0.0),
    "shortcut gate, -6": mixing.shortcut_gating(-6.0),
}
CHANNELS = 16


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = common.parser(__doc__, EXAMPLES)
    parser.add_argument("--units", type=integer(2), default=24, metavar="N", help="for the formulas (default: 24)")
    parser.add_argument(
        "--paths", type=integer(2), default=11, metavar="N", help="units whose 2^N paths are walked (default: 11)"
    )
    parser.add_argument("--batch", type=integer(2), default=8, metavar="N", help="images (default: 8)")
    parser.add_argument("--size", type=integer(2), default=8, metavar="N", help="pixels a side (default: 8)")
    return parser.parse_args(arguments)


# --- the formulas ---------------------------------------------------------------------------------------------------


def stage(units: int, rule: mixing.MixingRule | None, seed: int) -> nn.Sequential:
    """``units`` units of one width in fp64; the same convolutions for every rule."""
    torch.manual_seed(seed)
    made = models.cifar_resnet(6 * units + 2, unit="full_preact", mixing=rule).layer1
    generator = torch.Generator().manual_seed(seed)
    for unit in made:
        for conv in (unit.conv1, unit.conv2):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    return made.double().train()


def without_branches(units: nn.Sequential) -> nn.Sequential:
    """A copy whose branches give zero and whose gates pass no gradient on: nothing but the factors of the shortcuts."""
    made = copy.deepcopy(units)
    for unit in made:
        nn.init.zeros_(unit.conv2.weight)
        if hasattr(unit.mixing, "conv"):
            unit.mixing.conv.register_forward_pre_hook(lambda module, inputs: tuple(x.detach() for x in inputs))
    return made


def states(units: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> list[Tensor]:
    """``[x_0, ..., x_L]``."""
    found = [x]
    for unit in units:
        found.append(unit(found[-1]))
    return found


def gradients(units: Sequence[Callable[[Tensor], Tensor]], x: Tensor, last: Tensor) -> list[Tensor]:
    """The gradients of ``[x_0, ..., x_L]`` for ``last``, that of x_L, by autograd; zeros where nothing arrives."""
    found = states(units, x.detach().requires_grad_())
    grads = torch.autograd.grad(found[-1], found, last, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for grad in grads]


def factor(rule: Mixing | None, x: Tensor) -> Tensor | float:
    """What the shortcut of one unit is multiplied by at its input ``x``: a number, or a tensor shaped as ``x``."""
    if rule is None:
        return 1.0
    if isinstance(rule, NoShortcut):
        return 0.0
    if isinstance(rule, ConstantScaling):
        return rule.shortcut
    if isinstance(rule, (ExclusiveGating, ShortcutGating)):
        return 1 - torch.sigmoid(rule.conv(x))
    raise TypeError(f"factor: expected a rule without randomness, got {type(rule).__name__}")


@torch.no_grad()
def predicted(units: nn.Sequential, x: Tensor, last: Tensor) -> list[Tensor]:
    """``last`` times the product of all factors from l to L - 1, for l from 0 to L (the first term of equation 8)."""
    inputs = states(units, x)[:-1]
    found = [last]
    for unit, given in zip(reversed(units), reversed(inputs), strict=True):
        found.append(found[-1] * factor(unit.mixing, given))
    return found[::-1]


class Sums(NamedTuple):
    """How far equations 4 to 8 are from what the network computes, relative to the largest value."""

    forward: float
    backward: float


def check_sums(units: nn.Sequential, x: Tensor, last: Tensor) -> Sums:
    """x_L and the gradient of x_0 put together from branches that are evaluated alone, for constant factors."""
    x = x.detach().requires_grad_()
    found = states(units, x)
    branches = copy.deepcopy(units)
    shares = []
    for i, unit in enumerate(branches):
        rule, unit.mixing = unit.mixing, NoShortcut()  # the unit is its branch F
        ahead = math.prod(float(factor(later.mixing, x)) for later in units[i + 1 :])
        share = rule.branch if isinstance(rule, ConstantScaling) else 1.0
        shares.append(ahead * share * unit(found[i]))
    product = math.prod(float(factor(unit.mixing, x)) for unit in units)
    total = torch.stack(shares).sum(0)
    (whole,) = torch.autograd.grad(found[-1], x, last, retain_graph=True)
    (through,) = torch.autograd.grad(total, x, last)
    return Sums(_deviation(product * x + total, found[-1]), _deviation(product * last + through, whole))


def _deviation(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).abs().max() / exact.abs().max()).item()


# --- paths ----------------------------------------------------------------------------------------------------------


class Length(NamedTuple):
    """All paths through ``k`` branches."""

    k: int
    paths: int
    mean_norm: float  # of the gradients that single paths bring to x_0
    norm: float  # of their sum


def walk(units: nn.Sequential, x: Tensor, last: Tensor) -> tuple[list[Length], float]:
    """Every path backward from x_L to x_0, by the number of branches; and the deviation of their sum from autograd.

    Backward through a unit at a fixed point, v becomes v + A'v: v along the shortcut, A'v through the branch. The 2^n
    paths are the leaves of the tree of these choices, n the number of units.
    """
    with torch.no_grad():
        inputs = [t.detach() for t in states(units, x)[:-1]]
    graphs = []
    for unit, given in zip(units, inputs, strict=True):
        given = given.requires_grad_()
        graphs.append((unit(given), given))
    count = [0] * (len(units) + 1)
    norms = [0.0] * (len(units) + 1)
    sums = [torch.zeros_like(x) for _ in range(len(units) + 1)]

    def back(i: int, k: int, v: Tensor) -> None:
        if i == 0:
            count[k] += 1
            norms[k] += v.norm().item()
            sums[k] += v
            return
        out, given = graphs[i - 1]
        (both,) = torch.autograd.grad(out, given, v, retain_graph=True)
        back(i - 1, k, v)
        back(i - 1, k + 1, both - v)

    back(len(units), 0, last)
    lengths = [Length(k, count[k], norms[k] / count[k], sums[k].norm().item()) for k in range(len(units) + 1)]
    return lengths, _deviation(torch.stack(sums).sum(0), gradients(units, x, last)[0])


# --- output ---------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, out: Output) -> None:
    """Both parts."""
    device = machine.device(args.device)
    where = common.folder(args.out)
    common.seed_everything(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    x, last = torch.randn((2, args.batch, CHANNELS, args.size, args.size), generator=generator, dtype=torch.float64)
    x, last = (t.to(device).contiguous(memory_format=torch.channels_last) for t in (x, last))

    with common.one_thread(), out.progress(len(RULES) + 1) as advance:
        rows, summary = [], []
        for name, rule in RULES.items():
            advance(name)
            found, line = _rule(name, stage(args.units, rule, args.seed).to(device), x, last)
            rows += found
            summary.append(line)
        advance(f"2^{args.paths} paths")
        lengths, deviation = walk(stage(args.paths, None, args.seed).to(device), x, last)

    out.print(common.header(device, 1))
    out.print(f"Data: random normal images, {args.batch} x {CHANNELS} x {args.size} x {args.size}, fp64. No training.")
    columns = ["on the shortcut", "predicted product", "measured, F = 0", "off by", "measured, with F"]
    columns += ["eq. 4, 6 off by", "eq. 5, 8 off by"]
    title = f"Norm of the gradient at the first of {args.units} units, relative to that behind the last"
    out.print(table(title, columns, summary))
    rows_of_paths = _paths(lengths)
    title = f"The {2**args.paths} paths through {args.paths} units with identity shortcuts"
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows_of_paths]
    out.print(table(title, list(rows_of_paths[0]), cells, left=0))
    most = max(rows_of_paths, key=lambda row: row["paths_times_mean_norm"])["branches"]
    out.print(
        f"The gradients of all paths add up to autograd's, off by {deviation:.1e}. Paths through {most} branches bring "
        f"most (number times mean norm), while the mean length of all is {args.paths / 2:g}."
    )
    common.write_csv(where / f"{NAME}.csv", rows)
    common.write_csv(where / f"{NAME}_paths.csv", rows_of_paths)
    _draw(rows, rows_of_paths, args.units, where / f"{NAME}.png")
    out.print(f"Wrote {NAME}.csv, {NAME}_paths.csv and {NAME}.png to {where}.")


def _rule(name: str, units: nn.Sequential, x: Tensor, last: Tensor) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the CSV for one rule, and its line of the table."""
    bare = without_branches(units)
    product, alone, full = predicted(bare, x, last), gradients(bare, x, last), gradients(units, x, last)
    expected = predicted(units, x, last)
    rows = [
        {
            "rule": name,
            "unit": i,
            "predicted_without_branches": (product[i].norm() / last.norm()).item(),
            "measured_without_branches": (alone[i].norm() / last.norm()).item(),
            "deviation": (alone[i] - product[i]).abs().max().item() / max(product[i].abs().max().item(), 1e-300),
            "predicted_shortcut_term": (expected[i].norm() / last.norm()).item(),
            "measured_with_branches": (full[i].norm() / last.norm()).item(),
        }
        for i in range(len(full))
    ]
    constant = all(isinstance(factor(unit.mixing, x), float) for unit in units)
    sums = [f"{value:.1e}" for value in check_sums(units, x, last)] if constant else ["", ""]
    first, worst = rows[0], max(row["deviation"] for row in rows)
    line = [name, f"{first['predicted_without_branches']:.3g}", f"{first['measured_without_branches']:.3g}"]
    return rows, [*line, f"{worst:.1e}", f"{first['measured_with_branches']:.3g}", *sums]


def _paths(lengths: list[Length]) -> list[dict[str, Any]]:
    total = sum(length.paths * length.mean_norm for length in lengths)
    return [
        {
            "branches": length.k,
            "paths": length.paths,
            "binomial": math.comb(len(lengths) - 1, length.k),
            "mean_norm": length.mean_norm,
            "paths_times_mean_norm": length.paths * length.mean_norm,
            "share": length.paths * length.mean_norm / total,
            "norm_of_sum": length.norm,
        }
        for length in lengths
    ]


def _draw(rows: list[dict[str, Any]], paths: list[dict[str, Any]], units: int, path: Path) -> None:
    with common.figure(path, 2, 2, (13, 9)) as (figure, axes):
        (top, formula), (lengths, share) = axes
        for i, name in enumerate(RULES):
            own = [row for row in rows if row["rule"] == name]
            at = [row["unit"] for row in own]
            top.plot(at, [row["measured_with_branches"] for row in own], color=f"C{i}", label=name)
            if name != "plain":
                formula.plot(at, [row["predicted_without_branches"] for row in own], "--", color=f"C{i}")
                formula.plot(
                    at,
                    [row["measured_without_branches"] for row in own],
                    "o",
                    color=f"C{i}",
                    markersize=9 - 0.8 * i,
                    label=name,
                )
        top.set(yscale="log", ylabel="norm of the gradient, relative", title="with branches, by autograd")
        formula.set(yscale="log", title="branches at 0: autograd (dots), product of factors (lines)")
        for each in (top, formula):
            each.set(xlabel=f"x_l, l from 0 to {units}")
            each.legend(fontsize=8)
            each.grid(alpha=0.3)
        k = [row["branches"] for row in paths]
        lengths.bar(k, [row["paths"] for row in paths], alpha=0.5, label="paths")
        lengths.plot(k, [row["binomial"] for row in paths], "k.", label="n over k")
        lengths.set(
            xlabel="branches on the path",
            ylabel="number of paths",
            title="lengths of paths; norm of one path's gradient",
        )
        twin = lengths.twinx()
        twin.plot(k, [row["mean_norm"] for row in paths], "C1-o", markersize=4)
        twin.set(yscale="log", ylabel="mean norm of a path's gradient (orange)")
        lengths.legend()
        share.bar(k, [100 * row["share"] for row in paths], alpha=0.5)
        share.set(
            xlabel="branches on the path",
            ylabel="share of paths x mean norm, %",
            title="what paths of one length bring",
        )
        share.grid(alpha=0.3)
        figure.suptitle("At the initialisation, random normal images, fp64", fontsize=10)


if __name__ == "__main__":
    raise SystemExit(common.launch(run, parse()))
