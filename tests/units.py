"""Cases of residual units with every shortcut and rule of mixing, their blocks, and the comparison with a formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from formulas import prelu_formula, unit_formula
from helpers import EPS, rand, randn, randomise
from torch import Tensor, nn
from torch.func import functional_call

import resnet_fused
from resnet_fused.blocks import mixing, plain_units
from resnet_fused.models.cifar import PadShortcut

EXACT = 1e-10
SEED = 7  # of the random factors, drawn by a block and by its formula
UNITS = ("original", "bn_after_add", "relu_before_add", "relu_preact", "full_preact")
KINDS = ("basic", "bottleneck")
MODES = ("train", "eval", "frozen", "odd-frozen", "even-frozen")


class UnitCase(NamedTuple):
    """What stands on a unit's shortcut and how it is added.

    ``shortcut`` is identity, A, projection or conv as in :func:`formulas.unit_formula`, ``rule`` is the one of
    :func:`formulas.mixed`; ``widths`` are the channels of input and output, a multiple of four for bottlenecks.
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


# What one more rounding of the largest value may cost, as for the post-activation blocks.
FLOOR = {torch.float32: 2e-6, torch.float16: 2 * EPS[torch.float16], torch.bfloat16: 2 * EPS[torch.bfloat16]}


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


# --- against the formula ----------------------------------------------------------------------------------------------

Formula = Callable[[dict[str, Tensor], Tensor], tuple[Tensor, dict[str, Tensor]]]


def norms_in_training(block: nn.Module) -> frozenset[str]:
    return frozenset(name for name, m in block.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training)


def formula_of(block: nn.Module, case: UnitCase) -> Formula:
    """The formula of a unit built by :func:`build_unit`, as a function of a state and the input."""
    options = {
        "batch": norms_in_training(block),
        "training": block.training,
        "shortcut": case.shortcut,
        "rule": case.rule,
        "stride": case.stride,
        "preactivate": block.preactivate,
        **{name: value for name, value in case.options.items() if name in ("groups", "dilation")},
    }
    return lambda state, x: unit_formula(block.unit, state, x, **options)


def prelu_formula_of(block: nn.Module) -> Formula:
    batch, final = norms_in_training(block), block.final_activation
    return lambda state, x: prelu_formula(state, x, batch=batch, final_activation=final)


def state_of(block: nn.Module) -> dict[str, Tensor]:
    """A copy of the state; parameters that want a gradient are leaves that do."""
    wanted = {name for name, p in block.named_parameters() if p.requires_grad}
    state = {name: t.detach().clone() for name, t in block.state_dict().items()}
    return {name: t.requires_grad_() if name in wanted else t for name, t in state.items()}


def run_formula(formula: Formula, state: dict[str, Tensor], x: Tensor, *, need_dx: bool = True) -> dict[str, Tensor]:
    """Output, gradients and written buffers, in a dictionary as :func:`run_block` gives it."""
    x = x.detach().clone().requires_grad_(need_dx)
    torch.manual_seed(SEED)
    out, moved = formula(state, x)
    leaves = ({"x": x} if need_dx else {}) | {name: t for name, t in state.items() if t.requires_grad}
    found = {"out": out.detach()} | {f"buffer {name}": t for name, t in moved.items()}
    if leaves:
        gradients = torch.autograd.grad(out, list(leaves.values()), _dout(out), allow_unused=True)
        found |= {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return found


def run_block(block: nn.Module, x: Tensor, *, need_dx: bool = True) -> dict[str, Tensor]:
    """Output, gradients, and the buffers that changed, of one forward and backward of ``block``."""
    before = {name: b.clone() for name, b in block.named_buffers()}
    block.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_(need_dx)
    torch.manual_seed(SEED)
    out = block(x)
    found = {"out": out.detach().clone()}
    if out.requires_grad:
        out.backward(_dout(out))
    found |= {f"buffer {name}": b.clone() for name, b in block.named_buffers() if not torch.equal(b, before[name])}
    found |= {"x": x.grad} if need_dx and x.grad is not None else {}
    return found | {name: p.grad for name, p in block.named_parameters() if p.grad is not None}


def _dout(out: Tensor) -> Tensor:
    return randn(*out.shape, seed=9).to(out.dtype)


def assert_same(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = EXACT, what: str = "result"
) -> None:
    """The same tensors exist, and agree relative to the largest value or to 1, which the largest gradients exceed.

    Some gradients are zero but for rounding: that of a bias in front of batch statistics, for example.
    """
    assert ours.keys() == theirs.keys(), what
    for name, exact in theirs.items():
        assert ours[name].shape == exact.shape, f"{what}: {name}"
        assert ours[name].dtype == exact.dtype, f"{what}: {name}"
        if exact.numel() == 0:
            continue
        deviation = (ours[name] - exact).abs().max().item()
        assert deviation <= tolerance * max(1.0, exact.abs().max().item()), f"{what}: {name} is off by {deviation:.3g}"


def assert_no_worse(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    exact: dict[str, Tensor],
    what: str,
    dtype: torch.dtype | None = None,
) -> None:
    """The same tensors with the same dtypes exist; against fp64 ours are at most twice as wrong as PyTorch's modules'.

    The floor is relative to the largest value of all tensors of a kind (images, weights, vectors, buffers), because
    some gradients cancel to nothing but rounding. ``dtype``: that of the arithmetic, the output's unless given.
    """
    assert ours.keys() == theirs.keys() == exact.keys(), what
    kinds = {name: ("buffer" in name, name in ("out", "x"), t.dim()) for name, t in exact.items()}
    scales = {
        kind: max(exact[name].abs().max().item() for name in kinds if kinds[name] == kind) for kind in kinds.values()
    }
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, f"{what}: {name} is {ours[name].dtype} instead of {value.dtype}"
        a, b = ((t[name].double() - exact[name]).abs().max().item() for t in (ours, theirs))
        floor = FLOOR[dtype or theirs["out"].dtype] * scales[kinds[name]]
        assert a <= 2 * b + floor, f"{what}: {name} is off by {a:.3g}, PyTorch's by {b:.3g}, floor {floor:.3g}"


def path_of(block: nn.Module, x: Tensor) -> tuple[str | None, str | None]:
    """Path and reason of the one call that a forward makes; None for a block that has only one way."""
    steps = resnet_fused.explain(block, x).steps
    assert len(steps) <= 1
    return (steps[0].path, steps[0].reason) if steps else (None, None)


# --- finite differences -----------------------------------------------------------------------------------------------


def as_function(block: nn.Module) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The block as a function of its input and parameters, equal random factors on each call; and its parameters."""
    names = [name for name, _ in block.named_parameters()]
    buffers = {name: b.clone() for name, b in block.named_buffers()}

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(SEED)
        state = dict(zip(names, parameters, strict=True)) | {name: b.clone() for name, b in buffers.items()}
        return functional_call(block, state, (x,))

    return run, [p.detach().clone().requires_grad_() for p in block.parameters()]
