"""Residual units of every kind where they are used: layouts, copies, hooks, compilers, exports, changes, edges."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_close, error, randn
from parity import EXACT, SEED, assert_same, formula_of, path_of, run_block, run_formula, state_of
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from units import KINDS, ONE_OF_EACH, RULES, SHORTCUTS, UNITS, UnitCase, build_unit, set_mode, unit_input, unit_pair

import resnet_fused

every_unit = pytest.mark.parametrize("unit", UNITS)
both_kinds = pytest.mark.parametrize("kind", KINDS)
IDENTITY, PADDED, PROJECTED = SHORTCUTS[:3]
# Every unit with the plain sum, every rule on one unit.
EACH = [(unit, case) for unit in UNITS for case in (IDENTITY, PROJECTED)]
EACH += [(UNITS[i % len(UNITS)], case) for i, case in enumerate((*ONE_OF_EACH, PADDED, SHORTCUTS[4]))]
each = pytest.mark.parametrize(("unit", "case"), EACH, ids=lambda value: getattr(value, "id", value))
FEW = [("original", IDENTITY), ("bn_after_add", PROJECTED), ("full_preact", PADDED)]
FEW += [("relu_preact", case) for case in ONE_OF_EACH if case.rule[0] in ("exclusive", "squeeze")]
few = pytest.mark.parametrize(("unit", "case"), FEW, ids=lambda value: getattr(value, "id", value))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


def exact_run(block: nn.Module, case: UnitCase, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return run_formula(formula_of(block, case), state_of(block), x)


def plain_names(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the prefix of a compiled module."""
    return {name.replace("_orig_mod.", ""): t for name, t in found.items()}


# --- copies -----------------------------------------------------------------------------------------------------------


def saved(block: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved], ids=["deepcopy", "pickle", "save"]
)
@each
def test_copies_after_use(unit, case, how):
    """What a call keeps is neither copied nor shared."""
    block, x = build_unit("basic", unit, case).eval(), unit_input(case)
    size = len(pickle.dumps(block))
    with torch.no_grad():
        block(x)
    assert len(pickle.dumps(block)) == size
    other = how(block)
    assert [type(m) for m in other.modules()] == [type(m) for m in block.modules()]
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.8)
        assert_close(other(x), formula_of(other, case)(state_of(other), x)[0], EXACT)
        assert error(other(x), block(x)) > 1e-4
    exact = exact_run(other.train(), case, x)
    assert_same(run_block(other, x), exact)


# --- hooks and other modules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv1", "bn1", "bn2", "relu", "mixing", "mixing.conv", "downsample", "downsample.0"])
@every_unit
def test_hooks_on_inner_modules_run(unit, name):
    """Registered after the block has run, and gone again when removed."""
    case = next(case for case in RULES if case.shortcut == "projection" and case.rule == ("exclusive",))
    block, x = build_unit("basic", unit, case), unit_input(case)
    run_block(block, x)
    exact, seen = exact_run(block, case, x), []
    handle = block.get_submodule(name).register_forward_hook(lambda m, i, out: seen.append(1))
    assert_same(run_block(block, x), exact)
    assert seen
    path = path_of(block, x)
    handle.remove()
    seen.clear()
    block(x)
    assert not seen
    assert path == ("original", "hooks")


@pytest.mark.parametrize("what", ["norm", "activation", "kernel", "weight_norm", "conv bias"])
@every_unit
def test_other_modules_run_as_they_are(unit, what):
    """A module put in after construction: the block computes what its modules say."""
    found = []
    for block in unit_pair("basic", unit, IDENTITY):
        torch.manual_seed(1)
        if what == "norm":
            block.bn2 = nn.GroupNorm(2, 4).double()
        elif what == "activation":
            block.relu = nn.SiLU()
        elif what == "kernel":
            block.conv2 = nn.Conv2d(4, 4, 5, padding=2, bias=False).double()
        elif what == "conv bias":
            block.conv1 = nn.Conv2d(4, 4, 3, padding=1).double()
        else:
            parametrizations.weight_norm(block.conv2)
        found += [run_block(block, unit_input(IDENTITY))]
        with torch.no_grad():
            found[-1]["inference"] = block.eval()(unit_input(IDENTITY))
    assert_same(*found)


def test_the_reason_is_shown():
    block = build_unit("basic", "full_preact", IDENTITY)
    block.bn2 = nn.GroupNorm(2, 4).double()
    (step,) = resnet_fused.explain(block, unit_input(IDENTITY)).steps
    assert (step.path, step.reason) == ("original", "norm")
    assert "GroupNorm" in step.detail


@each
def test_disabled(unit, case):
    """Within the context the stock forward runs; its result is the modules' bit for bit."""
    fused, plain = unit_pair("basic", unit, case)
    with resnet_fused.disabled():
        assert_same(run_block(fused, unit_input(case)), run_block(plain, unit_input(case)), 0.0)


# --- compilers and exports --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "case"), [pair for pair in EACH if pair[1] is not PROJECTED], ids=lambda value: getattr(value, "id", value)
)
def test_compile(unit, case):
    """One graph, with the random factors of eager PyTorch."""
    block, x = build_unit("basic", unit, case), unit_input(case)
    exact = exact_run(block, case, x)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert_same(plain_names(run_block(compiled, x)), exact)


@few
def test_compiled_inference(unit, case):
    block, x = build_unit("basic", unit, case).eval(), unit_input(case)
    exact = exact_run(block, case, x)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), exact["out"], EXACT)


@pytest.mark.parametrize("unit", ["bn_after_add", "full_preact"])
def test_compile_bottlenecks_with_frozen_norms(unit):
    block, x = set_mode(build_unit("bottleneck", unit, PROJECTED), "frozen"), unit_input(PROJECTED)
    exact = exact_run(block, PROJECTED, x)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert_same(plain_names(run_block(compiled, x)), exact)


@each
@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_script(unit, case):
    for training in (True, False):
        block, x = build_unit("basic", unit, case).train(training), unit_input(case)
        exact = exact_run(block, case, x)
        scripted = torch.jit.script(block)
        assert_same(run_block(scripted, x), exact)
        assert "resnet_fused::" not in str(scripted.graph)


@each
def test_export(unit, case):
    """A program of PyTorch's own operators with the same numbers."""
    for training in (True, False):
        block, x = build_unit("basic", unit, case).train(training), unit_input(case)
        exact = exact_run(block, case, x)
        program = torch.export.export(block, (x,))
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert not any("resnet_fused" in target for target in targets)
        found = run_block(program.module(), x)
        assert_same({"out": found["out"], "x": found["x"]}, {"out": exact["out"], "x": exact["x"]})


# --- where gradients are asked for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["x", "weights", "norms", "x and norms", "all of them", "nothing"])
@pytest.mark.parametrize("case", [IDENTITY, PADDED, PROJECTED], ids=lambda case: case.id)
@every_unit
@both_kinds
def test_gradients_exactly_where_asked(kind, unit, case, asked):
    for mode in ("train", "frozen", "odd-frozen"):
        block = set_mode(build_unit(kind, unit, case), mode)
        for p in block.parameters():
            p.requires_grad_(asked == "all of them" or ("norms" if p.dim() == 1 else "weights") in asked)
        state, x, need_dx = state_of(block), unit_input(case), asked.startswith("x")
        ours = run_block(block, x, need_dx=need_dx)
        assert_same(ours, run_formula(formula_of(block, case), state, x, need_dx=need_dx), what=mode)


@pytest.mark.parametrize("reentrant", [True, False])
@each
def test_checkpointing(unit, case, reentrant):
    """Gradients as without; random factors are those of the first forward."""
    block, x = build_unit("basic", unit, case), unit_input(case).requires_grad_()
    exact = exact_run(block, case, x)
    torch.manual_seed(SEED)
    out = checkpoint(block, x, use_reentrant=reentrant)
    out.backward(randn(*out.shape, seed=9))
    found = {"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in block.named_parameters()}
    exact = {name: t for name, t in exact.items() if not name.startswith("buffer")}
    assert_same({name: t for name, t in found.items() if t is not None}, exact)
