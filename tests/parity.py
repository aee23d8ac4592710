"""A block against its formula or against PyTorch's modules: run both, compare outputs, gradients and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from formulas import prelu_formula, unit_formula
from helpers import EPS, randn
from torch import Tensor, nn
from torch.func import functional_call
from units import UnitCase

import resnet_fused

EXACT = 1e-10
SEED = 7  # of the random factors, drawn by a block and by its formula

# What one more rounding of the largest value may cost, as for the post-activation blocks.
FLOOR = {torch.float32: 2e-6, torch.float16: 2 * EPS[torch.float16], torch.bfloat16: 2 * EPS[torch.bfloat16]}

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


def chain_formula(chain: nn.Sequential, cases: Iterable[UnitCase]) -> Formula:
    """One formula after the other, on the state of the whole chain."""
    formulas = [formula_of(block, case) for block, case in zip(chain, cases, strict=True)]

    def run(state, x):
        moved = {}
        for i, formula in enumerate(formulas):
            own = {name.removeprefix(f"{i}."): t for name, t in state.items() if name.startswith(f"{i}.")}
            x, written = formula(own, x)
            moved |= {f"{i}.{name}": t for name, t in written.items()}
        return x, moved

    return run


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
