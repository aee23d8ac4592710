"""Every unit of arXiv 1603.05027 with every kind of shortcut: values and gradients of the papers' formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close, assert_same_step, dtype_id, randn, step
from parity import (
    EXACT,
    as_function,
    assert_no_worse,
    assert_same,
    formula_of,
    path_of,
    run_block,
    run_formula,
    state_of,
)
from torch import nn
from units import (
    KINDS,
    MODES,
    SHORTCUTS,
    UNITS,
    WIDTHS,
    Stock,
    UnitCase,
    build_unit,
    conditioned,
    conditioned_input,
    leaf_input,
    set_mode,
    unit_input,
    unit_pair,
)

import resnet_fused
from resnet_fused.blocks import BasicUnit, BottleneckUnit, mixing

every_unit = pytest.mark.parametrize("unit", UNITS)
both_kinds = pytest.mark.parametrize("kind", KINDS)
every_shortcut = pytest.mark.parametrize("case", SHORTCUTS, ids=lambda case: case.id)
IDENTITY, PADDED, PROJECTED = SHORTCUTS[:3]
two_shortcuts = pytest.mark.parametrize("case", [IDENTITY, PROJECTED], ids=lambda case: case.id)


# --- fp64 against the formulas ----------------------------------------------------------------------------------------


@every_shortcut
@every_unit
@both_kinds
def test_formula(kind, unit, case):
    """Output, all gradients, running statistics and counters, with norms in training, in eval and mixed."""
    for mode in MODES:
        block = set_mode(build_unit(kind, unit, case), mode)
        state, x = state_of(block), unit_input(case)
        assert_same(run_block(block, x), run_formula(formula_of(block, case), state, x), what=mode)


@pytest.mark.parametrize("case", WIDTHS, ids=lambda case: case.id)
@every_unit
def test_formula_of_wide_bottlenecks(unit, case):
    for mode in MODES:
        block = set_mode(build_unit("bottleneck", unit, case), mode)
        state, x = state_of(block), unit_input(case)
        assert_same(run_block(block, x), run_formula(formula_of(block, case), state, x), what=mode)


@two_shortcuts
@pytest.mark.parametrize("unit", ["relu_preact", "full_preact"])
@both_kinds
def test_formula_behind_a_stem_that_activates(kind, unit, case):
    """The first unit of a network takes its input as it is; in (e) without its first norm."""
    for mode in MODES:
        block = set_mode(build_unit(kind, unit, case, preactivate=False), mode)
        state, x = state_of(block), unit_input(case)
        assert ("bn1.weight" in state) == (unit == "relu_preact")
        assert_same(run_block(block, x), run_formula(formula_of(block, case), state, x), what=mode)


@every_shortcut
@every_unit
@both_kinds
def test_inference(kind, unit, case):
    """Without gradients in eval, for several inputs in turn; nothing is written."""
    block = build_unit(kind, unit, case).eval()
    state = state_of(block)
    for seed, size in ((1, (5, 7)), (2, (5, 7)), (3, (4, 4)), (1, (5, 7))):
        x = randn(2, 4, *size, seed=seed)
        with torch.no_grad():
            assert_close(block(x), formula_of(block, case)(state, x)[0], EXACT)
    assert all(torch.equal(t, state[name]) for name, t in block.state_dict().items())


@two_shortcuts
@every_unit
@both_kinds
def test_steps_of_sgd(kind, unit, case):
    """Parameters and statistics after several steps, and inference with them."""
    fused, plain = unit_pair(kind, unit, case)
    x = unit_input(case)
    optimizers = [torch.optim.SGD(block.parameters(), lr=1e-2, momentum=0.9) for block in (fused, plain)]
    for i in range(3):
        assert_same(*(run_block(block.train(), x + 0.1 * i) for block in (fused, plain)), 1e-9)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            assert_close(fused.eval()(x), plain.eval()(x), 1e-9)


# --- the path ---------------------------------------------------------------------------------------------------------


@every_shortcut
@every_unit
@both_kinds
def test_path(kind, unit, case):
    block, x = build_unit(kind, unit, case), unit_input(case)
    assert path_of(block, x) == ("train", None)
    assert path_of(block.eval(), x) == ("train", None)  # gradients of the parameters are wanted
    with torch.no_grad():
        assert path_of(block, x) == ("infer", None)
    assert path_of(block.requires_grad_(False), x) == ("infer", None)
    assert path_of(block.train(), x) == ("train", None)


@pytest.mark.parametrize("case", WIDTHS, ids=lambda case: case.id)
@every_unit
def test_path_of_wide_bottlenecks(unit, case):
    block, x = build_unit("bottleneck", unit, case), unit_input(case)
    assert path_of(block, x) == ("train", None)
    with torch.no_grad():
        assert path_of(block.eval(), x) == ("infer", None)


@two_shortcuts
@pytest.mark.parametrize("unit", ["relu_preact", "full_preact"])
@both_kinds
def test_path_behind_a_stem_that_activates(kind, unit, case):
    block, x = build_unit(kind, unit, case, preactivate=False), unit_input(case)
    assert path_of(block, x) == ("train", None)
    with torch.no_grad():
        assert path_of(block.eval(), x) == ("infer", None)


# --- finite differences -----------------------------------------------------------------------------------------------


@every_shortcut
@every_unit
@both_kinds
def test_gradcheck(kind, unit, case):
    """Projections of the Jacobian on random vectors; the formula above covers it entry by entry."""
    for mode in ("train", "eval", "frozen"):
        run, parameters = as_function(set_mode(build_unit(kind, unit, case), mode))
        assert torch.autograd.gradcheck(run, (leaf_input(case), *parameters), fast_mode=True), mode


@pytest.mark.parametrize("mode", ["train", "frozen"])
@every_unit
@both_kinds
def test_gradcheck_of_every_entry(kind, unit, mode):
    width = 2 if kind == "basic" else 4
    run, parameters = as_function(set_mode(build_unit(kind, unit, IDENTITY, width=width), mode))
    assert torch.autograd.gradcheck(run, (leaf_input(IDENTITY, width, (2, 3)), *parameters))


@two_shortcuts
@every_unit
@both_kinds
def test_gradgradcheck(kind, unit, case):
    for mode in ("train", "frozen"):
        run, parameters = as_function(set_mode(build_unit(kind, unit, case), mode))
        assert torch.autograd.gradgradcheck(run, (leaf_input(case), *parameters), fast_mode=True, atol=1e-4), mode


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@two_shortcuts
@every_unit
@both_kinds
def test_double_backward(kind, unit, case, training):
    """A gradient penalty: second derivatives as PyTorch's, where they are not zero."""
    found = []
    for block in unit_pair(kind, unit, case):
        x = unit_input(case).requires_grad_()
        out = block.train(training)(x)
        (dx,) = torch.autograd.grad(out, x, randn(*out.shape, seed=9), create_graph=True)
        dx.square().sum().backward()
        leaves = {"x": x} | dict(block.named_parameters())
        found.append({name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()})
    assert_same(*found, 1e-8)


# --- dtypes -----------------------------------------------------------------------------------------------------------


three_shortcuts = pytest.mark.parametrize("case", [IDENTITY, PADDED, PROJECTED], ids=lambda case: case.id)


@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@three_shortcuts
@every_unit
@both_kinds
def test_dtypes(kind, unit, case, dtype, mode):
    """Errors against the formula in fp64 at most twice those of PyTorch's modules, plus a floor."""
    fused, plain = (
        set_mode(conditioned(block, dtype).to(dtype), mode) for block in unit_pair(kind, unit, case, width=16)
    )
    x = conditioned_input(dtype).to(dtype)
    exact = copy.deepcopy(plain).double()
    truth = run_formula(formula_of(exact, case), state_of(exact), x.double())
    assert_no_worse(run_block(fused, x), run_block(plain, x), truth, mode)
    truth = run_formula(formula_of(exact.eval(), case), state_of(exact), x.double())
    with torch.no_grad():
        outs = []
        for block in (fused, plain):
            block.load_state_dict(exact.state_dict())
            outs.append({"out": block.eval()(x)})
        assert_no_worse(*outs, {"out": truth["out"]}, "inference")


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@three_shortcuts
@every_unit
@both_kinds
def test_autocast(kind, unit, case, x_dtype):
    """dtypes of output and gradients are those of PyTorch's modules, and the errors at most twice theirs."""
    fused, plain = (conditioned(block, torch.bfloat16).float() for block in unit_pair(kind, unit, case, width=16))
    x = conditioned_input(torch.bfloat16).to(x_dtype)
    for mode in ("train", "frozen"):
        exact = copy.deepcopy(plain).double()
        truth = run_formula(formula_of(set_mode(exact, mode), case), state_of(exact), x.double())
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (run_block(set_mode(block, mode), x) for block in (fused, plain))
        assert_no_worse(ours, theirs, truth, mode, torch.bfloat16)


# --- the post-activation unit is the package's block ------------------------------------------------------------------


@two_shortcuts
@both_kinds
def test_original_is_the_block(kind, case):
    """The same state_dict, either way, and the same results as BasicBlock or Bottleneck."""
    unit = build_unit(kind, "original", case)
    cls = resnet_fused.BasicBlock if kind == "basic" else resnet_fused.Bottleneck
    down = copy.deepcopy(unit.downsample)
    planes = unit.conv2.out_channels if kind == "basic" else unit.conv3.out_channels // 4
    width = {} if kind == "basic" else {"base_width": 128}
    block = cls(4, planes, case.stride, down, **width).double()
    assert set(block.state_dict()) == set(unit.state_dict())
    assert {name for name, _ in block.named_modules()} == {name for name, _ in unit.named_modules()}
    block.load_state_dict(unit.state_dict())
    other = copy.deepcopy(unit)
    other.load_state_dict(block.state_dict())
    x = unit_input(case)
    for fused in (unit, other):
        assert_same_step(step(fused, x), step(copy.deepcopy(block), x), EXACT)
    assert (unit.expansion, unit.stride) == (block.expansion, block.stride)


# --- constructors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [BasicUnit, BottleneckUnit])
def test_constructor_names_what_is_wrong(cls):
    units = "original, bn_after_add, relu_before_add, relu_preact, full_preact"
    with pytest.raises(ValueError, match=f"{cls.__name__}: expected unit to be one of {units}, got 'preact'"):
        cls(4, 4, unit="preact")
    with pytest.raises(TypeError, match=f"{cls.__name__}: expected mixing to be None or a Mixing module, got Linear"):
        cls(4, 4, mixing=nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected mixing to be None or a Mixing module, got type"):
        cls(4, 4, mixing=mixing.NoShortcut)


def test_basic_refuses_what_basic_block_refuses():
    for options in ({"groups": 2}, {"base_width": 32}):
        with pytest.raises(ValueError, match="BasicUnit: expected groups 1 and base_width 64, got"):
            BasicUnit(4, 4, **options)
    with pytest.raises(NotImplementedError, match="BasicUnit: expected dilation 1, got 2"):
        BasicUnit(4, 4, dilation=2)


@every_unit
@both_kinds
def test_constructor_draws_the_stock_unit(kind, unit):
    """The same initial values from one seed, the same keys and the same text but for the class's name."""
    blocks = []
    for package in (resnet_fused.blocks, Stock):
        torch.manual_seed(3)
        cls = package.BasicUnit if kind == "basic" else package.BottleneckUnit
        blocks.append(cls(8, 8 // cls.expansion, unit=unit, mixing=mixing.ExclusiveGating(8, 8)))
    ours, theirs = (block.state_dict() for block in blocks)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert repr(blocks[0]).partition("(")[2] == repr(blocks[1]).partition("(")[2]


def test_the_stock_unit_is_not_ours():
    """The pairs that these tests compare really are this package's unit and PyTorch's modules."""
    fused, plain = unit_pair("basic", "full_preact", UnitCase("identity", ("sum",), 1, ""))
    assert type(fused) is BasicUnit
    assert type(plain) is Stock.BasicUnit
    assert path_of(plain, unit_input(IDENTITY)) == (None, None)
