"""Rules of adding branch and shortcut: constants, gates and random factors, on every unit, against their formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close, dtype_id, randn
from parity import (
    EXACT,
    SEED,
    as_function,
    assert_no_worse,
    assert_same,
    formula_of,
    path_of,
    run_block,
    run_formula,
    state_of,
)
from units import (
    KINDS,
    MODES,
    ONE_OF_EACH,
    RULES,
    UNITS,
    build_unit,
    conditioned,
    conditioned_input,
    leaf_input,
    set_mode,
    unit_input,
    unit_pair,
)

from resnet_fused.operands import Mix

every_unit = pytest.mark.parametrize("unit", UNITS)
both_kinds = pytest.mark.parametrize("kind", KINDS)
every_rule = pytest.mark.parametrize("case", RULES, ids=lambda case: case.id)
one_of_each = pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.rule[0])


# --- fp64 against the formulas ----------------------------------------------------------------------------------------


@every_rule
@every_unit
@both_kinds
def test_formula(kind, unit, case):
    """Output, all gradients (the gates' too), running statistics and counters, in every state of the norms."""
    for mode in MODES:
        block = set_mode(build_unit(kind, unit, case), mode)
        state, x = state_of(block), unit_input(case)
        assert_same(run_block(block, x), run_formula(formula_of(block, case), state, x), what=mode)


@pytest.mark.parametrize("unit", ["relu_preact", "full_preact"])
@one_of_each
def test_formula_behind_a_stem_that_activates(unit, case):
    for mode in ("train", "frozen"):
        block = set_mode(build_unit("basic", unit, case, preactivate=False), mode)
        state, x = state_of(block), unit_input(case)
        assert_same(run_block(block, x), run_formula(formula_of(block, case), state, x), what=mode)


@every_rule
@every_unit
@both_kinds
def test_inference(kind, unit, case):
    block = build_unit(kind, unit, case).eval()
    state = state_of(block)
    for seed, size in ((1, (5, 7)), (2, (5, 7)), (3, (4, 4)), (1, (5, 7))):
        x = randn(2, 4, *size, seed=seed)
        with torch.no_grad():
            assert_close(block(x), formula_of(block, case)(state, x)[0], EXACT)


@every_rule
@every_unit
@both_kinds
def test_path(kind, unit, case):
    block, x = build_unit(kind, unit, case), unit_input(case)
    assert path_of(block, x) == ("train", None)
    assert path_of(block.eval(), x) == ("train", None)
    with torch.no_grad():
        assert path_of(block, x) == ("infer", None)


# --- finite differences -----------------------------------------------------------------------------------------------


@every_rule
@every_unit
def test_gradcheck(unit, case):
    for kind, mode in (("basic", "train"), ("basic", "eval"), ("basic", "frozen"), ("bottleneck", "train")):
        run, parameters = as_function(set_mode(build_unit(kind, unit, case), mode))
        assert torch.autograd.gradcheck(run, (leaf_input(case), *parameters), fast_mode=True), (kind, mode)


@one_of_each
def test_gradcheck_of_every_entry(case):
    for unit in ("original", "full_preact"):
        run, parameters = as_function(build_unit("basic", unit, case, width=2))
        assert torch.autograd.gradcheck(run, (leaf_input(case, 2, (2, 3)), *parameters)), unit


@every_rule
def test_gradgradcheck(case):
    for mode in ("train", "frozen"):
        run, parameters = as_function(set_mode(build_unit("basic", "original", case), mode))
        assert torch.autograd.gradgradcheck(run, (leaf_input(case), *parameters), fast_mode=True, atol=1e-4), mode


@one_of_each
@every_unit
def test_double_backward(unit, case):
    """Second derivatives as PyTorch's, with the random factors of the first forward."""
    found = []
    for block in unit_pair("basic", unit, case):
        x = unit_input(case).requires_grad_()
        torch.manual_seed(SEED)
        out = block(x)
        gradients = torch.autograd.grad(out, [x, *block.parameters()], randn(*out.shape, seed=9), create_graph=True)
        sum(g.square().sum() for g in gradients).backward()
        leaves = {"x": x} | dict(block.named_parameters())
        found.append({name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()})
    assert_same(*found, 1e-8)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@one_of_each
@pytest.mark.parametrize("unit", ["original", "full_preact"])
def test_dtypes(unit, case, dtype):
    """Errors against the formula in fp64 at most twice those of PyTorch's modules, plus a floor."""
    fused, plain = (conditioned(block, dtype).to(dtype) for block in unit_pair("basic", unit, case, width=16))
    x = conditioned_input(dtype).to(dtype)
    for mode in ("train", "frozen"):
        exact = copy.deepcopy(plain).double()
        truth = run_formula(formula_of(set_mode(exact, mode), case), state_of(exact), x.double())
        assert_no_worse(*(run_block(set_mode(block, mode), x) for block in (fused, plain)), truth, mode)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@one_of_each
@pytest.mark.parametrize("unit", ["original", "full_preact"])
def test_autocast(unit, case, x_dtype):
    """dtypes of output and gradients are those of PyTorch's modules, and the errors at most twice theirs."""
    fused, plain = (conditioned(block, torch.bfloat16).float() for block in unit_pair("basic", unit, case, width=16))
    x = conditioned_input(torch.bfloat16).to(x_dtype)
    exact = copy.deepcopy(plain).double()
    truth = run_formula(formula_of(exact, case), state_of(exact), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run_block(fused, x), run_block(plain, x)
    assert_no_worse(ours, theirs, truth, "autocast", torch.bfloat16)


# --- where gradients are asked for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["x", "weights", "norms", "gates", "x and gates", "all but gates", "nothing"])
@every_rule
def test_gradients_exactly_where_asked(case, asked):
    for unit in UNITS:
        for mode in ("train", "frozen"):
            block = set_mode(build_unit("basic", unit, case), mode)
            for name, p in block.named_parameters():
                part = "gates" if name.startswith("mixing") else "norms" if p.dim() == 1 else "weights"
                p.requires_grad_(part in asked if asked != "all but gates" else part != "gates")
            state, x, need_dx = state_of(block), unit_input(case), asked[0] in "xa"
            ours = run_block(block, x, need_dx=need_dx)
            assert_same(ours, run_formula(formula_of(block, case), state, x, need_dx=need_dx), what=f"{unit}, {mode}")
            assert ("x" in ours) == need_dx


# --- the formula of the fused end -------------------------------------------------------------------------------------


@every_rule
def test_constants_and_gate_are_what_forward_computes(case):
    """``(b + b' * gate) * F + (s + s' * gate) * S`` with the rule's constants and gate is its own forward."""
    module = build_unit("basic", "original", case).mixing
    channels = 8 if case.stride == 2 else 4
    x = randn(3, 4, 6, 6)
    branch, shortcut = (randn(3, channels, 6 // case.stride, 6 // case.stride, seed=seed) for seed in (1, 2))
    for training in (True, False):
        torch.manual_seed(SEED)
        exact = module.train(training)(x, branch, shortcut)
        torch.manual_seed(SEED)
        source = branch.mean((2, 3), keepdim=True) if module.reads_branch else x
        gate = module.gate(source, torch.empty_like(branch))
        mix = module.mix()
        assert (gate is not None) == (mix.branch_gate != 0 or mix.shortcut_gate != 0)
        g = 0.0 if gate is None else gate
        added = (mix.shortcut + mix.shortcut_gate * g) * shortcut if case.rule != ("none",) else 0.0
        assert_close((mix.branch + mix.branch_gate * g) * branch + added, exact, EXACT)
        assert isinstance(mix, Mix)
