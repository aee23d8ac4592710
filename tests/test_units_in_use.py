"""Residual units of every kind where they are used: layouts, copies, hooks, compilers, exports, changes, edges."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import LAYOUTS, assert_close, error, is_channels_last, randn, randomise
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from units import (
    EXACT,
    KINDS,
    ONE_OF_EACH,
    RULES,
    SEED,
    SHORTCUTS,
    UNITS,
    UnitCase,
    assert_same,
    build_unit,
    formula_of,
    path_of,
    run_block,
    run_formula,
    set_mode,
    state_of,
    unit_input,
    unit_pair,
)

import resnet_fused

every_unit = pytest.mark.parametrize("unit", UNITS)
both_kinds = pytest.mark.parametrize("kind", KINDS)
IDENTITY, PADDED, PROJECTED = SHORTCUTS[:3]
# Every unit with the plain sum, every rule on one unit.
EACH = [(unit, case) for unit in UNITS for case in (IDENTITY, PROJECTED)]
EACH += [(UNITS[i % len(UNITS)], case) for i, case in enumerate((*ONE_OF_EACH, PADDED, SHORTCUTS[4]))]
each = pytest.mark.parametrize(("unit", "case"), EACH, ids=lambda value: getattr(value, "id", value))
FEW = [("original", IDENTITY), ("bn_after_add", PROJECTED), ("full_preact", IDENTITY)]
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


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@each
def test_layouts(unit, case, layout):
    """Inputs and incoming gradients of any strides."""
    block = build_unit("basic", unit, case)
    state, formula = state_of(block), formula_of(block, case)
    x = LAYOUTS[layout](unit_input(case))
    ours, theirs = x.detach().requires_grad_(), x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    if layout != "nchw" and case.rule[0] == "dropout":
        pytest.skip("the order in which elements are dropped is that of memory")
    torch.manual_seed(SEED)
    out = block(ours)
    torch.manual_seed(SEED)
    exact, _ = formula(state, theirs)
    assert_close(out, exact, EXACT)
    dout = LAYOUTS[layout](randn(*out.shape, seed=9))
    out.backward(dout)
    exact.backward(dout)
    assert_close(ours.grad, theirs.grad, EXACT)
    for name, p in block.named_parameters():
        if p.grad is not None:
            assert_same({name: p.grad}, {name: state[name].grad})


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("weights", ["nchw", "channels_last"])
@pytest.mark.parametrize("inputs", ["nchw", "channels_last"])
@each
def test_memory_format_of_the_output_is_pytorchs(unit, case, inputs, weights, training):
    outs = []
    for block in unit_pair("basic", unit, case):
        if weights == "channels_last":
            block.to(memory_format=torch.channels_last)
        x = LAYOUTS[inputs](unit_input(case))
        with torch.no_grad():
            outs.append(block.train(training)(x))
            outs.append(block(x.clone()))
    for ours, theirs in zip(outs[:2], outs[2:], strict=True):
        assert is_channels_last(ours) == is_channels_last(theirs)
        assert ours.is_contiguous() == theirs.is_contiguous()


@few
def test_the_input_is_left_alone(unit, case):
    for training in (True, False):
        block, x = build_unit("basic", unit, case).train(training), unit_input(case)
        for layout in (torch.contiguous_format, torch.channels_last):
            y = x.clone(memory_format=layout)
            with torch.no_grad():
                block(y)
            block(y).sum().backward()
            assert torch.equal(x, y)


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


@each
def test_compile(unit, case):
    """One graph in training and in inference, with the random factors of eager PyTorch."""
    for training in (True, False):
        block, x = build_unit("basic", unit, case).train(training), unit_input(case)
        exact = exact_run(block, case, x)
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        if training:
            assert_same(plain_names(run_block(compiled, x)), exact)
        else:
            with torch.no_grad():
                assert_close(compiled(x), exact["out"], EXACT)


@every_unit
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


# --- what inference keeps ---------------------------------------------------------------------------------------------


def scale_weights(block):
    with torch.no_grad():
        for p in block.parameters():
            p.mul_(1.2)


def move_statistics(block):
    for name, b in block.named_buffers():
        if "running_mean" in name:
            b.add_(0.5)


def load(block):
    block.load_state_dict({name: t * 1.25 for name, t in block.state_dict().items()})


def replace_first_norm(block):
    block.bn1 = randomise(nn.BatchNorm2d(4), seed=40).double().eval()


def replace_weight(block):
    block.conv2.weight = nn.Parameter(block.conv2.weight.detach() * 2)


def change_eps(block):
    block.bn1.eps = 0.5


def train_a_batch(block):
    block.train()(unit_input(IDENTITY, seed=6))
    block.eval()


def one_norm_in_training(block):
    block.bn2.train()


CHANGES = [
    scale_weights, move_statistics, load, replace_first_norm, replace_weight, change_eps, train_a_batch,
    one_norm_in_training,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@every_unit
def test_inference_follows_every_change(unit, change):
    fused, plain = (block.eval() for block in unit_pair("basic", unit, IDENTITY))
    x = unit_input(IDENTITY)
    with torch.no_grad():
        for _ in range(3):
            before = fused(x).clone()
        for block in (fused, plain):
            change(block)
        for _ in range(2):
            assert_close(fused(x), plain(x), EXACT)
        assert error(plain(x), before) > 1e-3


@each
def test_inference_of_many_inputs(unit, case):
    """Sizes, memory formats, dtypes and inference mode in turn: what one call keeps serves no other."""
    block = build_unit("basic", unit, case).eval()
    single = copy.deepcopy(block).float()
    formula, state = formula_of(block, case), state_of(block)
    shapes = [(1, 5, 5), (2, 5, 5), (2, 8, 3), (1, 1, 1), (2, 5, 5)]
    for context in (torch.no_grad, torch.inference_mode, torch.no_grad):
        for n, *size in shapes:
            for layout in (torch.contiguous_format, torch.channels_last):
                x = randn(n, 4, *size, seed=n).contiguous(memory_format=layout)
                with context():
                    assert_close(block(x), formula(state, x)[0], EXACT)
                    assert_close(single(x.float()), formula(state, x)[0], 1e-4)


# --- edges ------------------------------------------------------------------------------------------------------------


@each
def test_empty_batch(unit, case):
    """Works as in PyTorch: counters count, running statistics stay, gradients are zeros."""
    for training in (True, False):
        fused, plain = (block.train(training) for block in unit_pair("basic", unit, case))
        assert_same(run_block(fused, unit_input(case)[:0]), run_block(plain, unit_input(case)[:0]))


@each
def test_one_value_per_channel(unit, case):
    """PyTorch's error and text before any running statistic moves; in eval it is an input like others."""
    messages, outs, x = [], [], randn(1, 4, 1, 1)
    for block in unit_pair("basic", unit, case):
        before = copy.deepcopy(block.state_dict())
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as caught:
            block(x)
        messages.append(str(caught.value))
        moved = {name for name, t in block.state_dict().items() if not torch.equal(t, before[name])}
        assert all("num_batches_tracked" in name for name in moved)
        with torch.no_grad():
            outs.append(block.eval()(x))
    assert messages[0] == messages[1]
    assert_close(*outs, EXACT)


@every_unit
def test_wrong_inputs_raise_pytorchs_errors(unit):
    fused, plain = unit_pair("basic", unit, IDENTITY)
    for x in (randn(2, 5, 4, 4), randn(4, 4, 4), randn(2, 4), torch.ones(2, 4, 3, 3).long(), randn(2, 4, 4, 4).float()):
        for training in (True, False):
            messages = []
            for block in (fused, plain):
                with pytest.raises((RuntimeError, ValueError)) as caught:
                    block.train(training)(x)
                messages.append(str(caught.value))
            assert messages[0] == messages[1]


@each
def test_nan_propagates(unit, case):
    fused, plain = unit_pair("basic", unit, case)
    x = unit_input(case)
    x[1, 0, 2, 2] = float("nan")
    for training in (True, False):
        ours, theirs = (run_block(block.train(training), x) for block in (fused, plain))
        assert ours.keys() == theirs.keys()
        assert theirs["out"].isnan().any()
        for name, exact in theirs.items():
            torch.testing.assert_close(
                ours[name], exact, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )
        with torch.no_grad():
            torch.manual_seed(SEED)
            out = fused(x)
            torch.manual_seed(SEED)
            torch.testing.assert_close(out, plain(x), equal_nan=True)


@each
def test_training_gives_the_same_bits_twice(unit, case):
    for dtype in (torch.float64, torch.float32):
        runs = [run_block(build_unit("basic", unit, case).to(dtype), unit_input(case).to(dtype)) for _ in range(2)]
        assert_same(*runs, 0.0)
