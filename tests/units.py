"""Residual units with every shortcut and rule of mixing: the cases, their blocks, and blocks of PReLU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from helpers import rand, randn, randomise
from torch import Tensor, nn

import resnet_fused
from resnet_fused.blocks import mixing, plain_units
from resnet_fused.models.cifar import PadShortcut

UNITS = ("original", "bn_after_add", "relu_before_add", "relu_preact", "full_preact")
KINDS = ("basic", "bottleneck")
MODES = ("train", "eval", "frozen", "odd-frozen", "even-frozen")


class UnitCase(NamedTuple):
    """What stands on a unit's shortcut and how it is added.

    ``shortcut`` is identity, A, projection or conv as in :func:`formulas.unit_formula`, ``rule`` is the one of
    :func:`formulas.mixed`. A stride widens the unit by four channels.
    """

    shortcut: str
    rule: tuple
    stride: int
    why: str
    options: dict = {}  # noqa: RUF012 (read only)

    @property
    def id(self) -> str:
        return self.why.replace(" ", "-").replace(",", "")


# What the shortcut is, with the plain sum.
SHORTCUTS = (
    UnitCase("identity", ("sum",), 1, "identity"),
    UnitCase("A", ("sum",), 2, "option A, stride 2"),
    UnitCase("projection", ("sum",), 2, "option B, stride 2"),
    UnitCase("projection", ("sum",), 1, "option C, same size"),
    UnitCase("conv", ("sum",), 1, "1x1 convolution without norm"),
)
# How it is added.
RULES = (
    UnitCase("identity", ("scaling", 1.0, 0.5), 1, "scaling on the shortcut"),
    UnitCase("identity", ("scaling", 0.25, 1.0), 1, "scaling on the branch"),
    UnitCase("projection", ("scaling", 0.5, 0.5), 2, "scaling on both"),
    UnitCase("identity", ("scaling", 1.0, 0.0), 1, "scaling by nothing"),
    UnitCase("identity", ("exclusive",), 1, "exclusive gate"),
    UnitCase("projection", ("exclusive",), 2, "exclusive gate, option B"),
    UnitCase("identity", ("shortcut-gate",), 1, "shortcut gate"),
    UnitCase("A", ("shortcut-gate",), 2, "shortcut gate, option A"),
    UnitCase("identity", ("dropout", 0.4), 1, "dropout"),
    UnitCase("projection", ("dropout", 0.5), 2, "dropout, option B"),
    UnitCase("identity", ("none",), 2, "plain, stride 2"),
    UnitCase("identity", ("depth-row", 0.5), 1, "stochastic depth of rows"),
    UnitCase("projection", ("depth-row", 0.3), 2, "stochastic depth of rows, option B"),
    UnitCase("identity", ("depth-batch", 0.2), 1, "stochastic depth of a batch"),
    UnitCase("identity", ("learned", "channels"), 1, "learned scaling of channels"),
    UnitCase("projection", ("learned", 1), 2, "learned scaling, option B"),
    UnitCase("identity", ("squeeze",), 1, "squeeze and excitation"),
    UnitCase("projection", ("squeeze",), 2, "squeeze and excitation, option B"),
)
ONE_OF_EACH = tuple({case.rule[0]: case for case in reversed(RULES)}.values())
# A bottleneck's geometry.
WIDTHS = (
    UnitCase("identity", ("sum",), 1, "groups", {"groups": 2}),
    UnitCase("identity", ("sum",), 1, "dilation", {"dilation": 2}),
)


def build_rule(rule: tuple, inplanes: int, outplanes: int, stride: int) -> mixing.Mixing | None:
    """The module of a rule, gates and factors away from their initial values."""
    name, *numbers = rule
    if name == "sum":
        return None
    if name == "none":
        return mixing.NoShortcut()
    if name == "scaling":
        return mixing.ConstantScaling(branch=numbers[0], shortcut=numbers[1])
    if name in ("exclusive", "shortcut-gate"):
        cls = mixing.ExclusiveGating if name == "exclusive" else mixing.ShortcutGating
        return cls(inplanes, outplanes, stride, bias=0.4)
    if name == "dropout":
        return mixing.DropoutShortcut(*numbers)
    if name in ("depth-row", "depth-batch"):
        return mixing.StochasticDepth(*numbers, mode=name.removeprefix("depth-"))
    if name == "learned":
        module = mixing.LearnedScaling(outplanes if numbers[0] == "channels" else 1, init=-0.7)
        with torch.no_grad():
            module.weight.add_(0.3 * randn(module.weight.numel(), seed=3))
        return module
    return mixing.SqueezeExcitation(outplanes, 2)


def build_unit(
    kind: str, unit: str, case: UnitCase, *, package: object = resnet_fused.blocks, width: int = 4, **options: object
) -> nn.Module:
    """A randomised fp64 unit of ``package``: the fused one's, or :class:`Stock` for PyTorch's modules."""
    torch.manual_seed(0)
    cls = package.BasicUnit if kind == "basic" else package.BottleneckUnit
    inplanes, stride = width, case.stride
    same = case.shortcut in ("identity", "conv") or stride == 1
    outplanes = width if same and case.rule != ("none",) else width + 4
    if kind == "bottleneck":
        options = {"base_width": 128, **options}  # half as wide as its output
    planes = outplanes // cls.expansion
    options = {**case.options, **options}
    down = {
        "identity": lambda: None,
        "A": lambda: PadShortcut(inplanes, outplanes, stride),
        "projection": lambda: nn.Sequential(
            nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes)
        ),
        "conv": lambda: nn.Conv2d(inplanes, outplanes, 1, stride),
    }[case.shortcut]()
    rule = build_rule(case.rule, inplanes, outplanes, stride)
    return randomise(cls(inplanes, planes, stride, down, unit=unit, mixing=rule, **options)).double()


class Stock:
    """A package of the same units in PyTorch's modules."""

    BasicUnit = plain_units.PlainBasicUnit
    BottleneckUnit = plain_units.PlainBottleneckUnit
    PReLUBlock = plain_units.PlainPReLUBlock


def unit_pair(kind: str, unit: str, case: UnitCase, **options: object) -> tuple[nn.Module, nn.Module]:
    """The fused unit and the stock one, with the same state."""
    return build_unit(kind, unit, case, **options), build_unit(kind, unit, case, package=Stock, **options)


def unit_input(case: UnitCase, n: int = 3, width: int = 4, size: tuple[int, int] = (5, 7), *, seed: int = 5) -> Tensor:
    return randn(n, width, *size, seed=seed)


def leaf_input(case: UnitCase, width: int = 4, size: tuple[int, int] = (3, 4)) -> Tensor:
    """A small input for finite differences, with which no ReLU stands within a step of its kink."""
    return unit_input(case, 2, width, size, seed=8).requires_grad_()


def set_mode(block: nn.Module, mode: str) -> nn.Module:
    """train: all in training; eval: nothing; the others: a block in training whose norms are (partly) in eval."""
    block.train(mode != "eval")
    for i, norm in enumerate(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        if mode == "frozen" or mode == ("even-frozen" if i % 2 else "odd-frozen"):
            norm.eval()
    return block


# --- units in a row ---------------------------------------------------------------------------------------------------

CHAINS = {
    "identities": (SHORTCUTS[0],) * 3,
    "option B, then identities": (SHORTCUTS[2], SHORTCUTS[0], SHORTCUTS[0]),
    "option A in the middle": (SHORTCUTS[0], SHORTCUTS[1], SHORTCUTS[0]),
    "rules": (*(case for case in ONE_OF_EACH if case.rule[0] in ("depth-row", "squeeze")), SHORTCUTS[0]),
}


def build_chain(
    kind: str, cases, *, package: object = resnet_fused.blocks, units: str | tuple = "full_preact", **options
):
    """Units in a row, all of which emit."""
    width, blocks = 4, []
    units = (units,) * len(cases) if isinstance(units, str) else units
    for unit, case in zip(units, cases, strict=True):
        blocks.append(build_unit(kind, unit, case, package=package, width=width))
        blocks[-1].emit_statistics = True
        width += 4 if case.stride == 2 else 0
    return nn.Sequential(*blocks)


def chain_pair(kind: str = "basic", cases: tuple[UnitCase, ...] = CHAINS["identities"]) -> tuple[nn.Sequential, ...]:
    return build_chain(kind, cases), build_chain(kind, cases, package=Stock)


# --- PReLU ------------------------------------------------------------------------------------------------------------


def build_prelu(
    bias: bool = True, slopes: int = 1, final: bool = True, *, package: object = resnet_fused.blocks, channels: int = 4
) -> nn.Module:
    """A randomised fp64 block of ``package``; its slopes have both signs, one is 0 and one is above 1."""
    torch.manual_seed(0)
    block = package.PReLUBlock(channels, bias=bias, num_parameters=slopes, final_activation=final)
    with torch.no_grad():
        block.prelu.weight.copy_(torch.tensor([0.25, -0.5, 1.5, 0.0]).repeat(-(-slopes // 4))[:slopes])
    return randomise(block).double()


def prelu_pair(*args, **options) -> tuple[nn.Module, nn.Module]:
    return build_prelu(*args, **options), build_prelu(*args, package=Stock, **options)


def prelu_input(n: int = 3, channels: int = 4, size: tuple[int, int] = (5, 7), *, seed: int = 5) -> Tensor:
    return randn(n, channels, *size, seed=seed)


# --- conditioning -----------------------------------------------------------------------------------------------------


def conditioned(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Norms that amplify no error of arithmetic in ``dtype``.

    In 16 bits a value near 0 falls on either side of a ReLU by chance, and one such element outweighs all rounding:
    there the norms' output has one sign all over a channel, positive in every other one. In fp32 that is rare, and
    large means would cancel in the gradients instead.
    """
    for i, norm in enumerate(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        size = norm.weight.numel()
        with torch.no_grad():
            norm.weight.copy_(rand(size, seed=i) * (1.0 if dtype == torch.float32 else 0.3))
            norm.bias.copy_(randn(size, seed=i) * 0.2 if dtype == torch.float32 else 1.5 * _signs(size))
            norm.running_mean.zero_()
            norm.running_var.fill_(4.0)
    with torch.no_grad():
        for name, p in block.named_parameters():
            if name == "mixing.weight":
                p.abs_()  # branch and shortcut have the same sign
    return block


def conditioned_input(dtype: torch.dtype) -> Tensor:
    """An input (4, 16, 8, 9) in fp64 of the same signs."""
    x = randn(4, 16, 8, 9, seed=5)
    return x if dtype == torch.float32 else 0.3 * x + 1.5 * _signs(16)[:, None, None]


def _signs(channels: int) -> Tensor:
    return 1.0 - 2.0 * (torch.arange(channels) % 2).double()
