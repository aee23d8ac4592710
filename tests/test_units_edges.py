"""Residual units of every kind at the edges: layouts, inference after changes, norms' options, odd inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import LAYOUTS, assert_close, error, is_channels_last, randn, randomise
from parity import EXACT, SEED, assert_same, formula_of, path_of, run_block, run_formula, state_of
from torch import nn
from torchvision.ops import FrozenBatchNorm2d
from units import KINDS, ONE_OF_EACH, SHORTCUTS, UNITS, Stock, UnitCase, build_unit, set_mode, unit_input, unit_pair

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


def exact_run(block: nn.Module, case: UnitCase, x: torch.Tensor) -> dict[str, torch.Tensor]:
    return run_formula(formula_of(block, case), state_of(block), x)


# --- layouts ----------------------------------------------------------------------------------------------------------


# Dropout apart: the order in which elements are dropped is that of memory.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("unit", "case"),
    [pair for pair in EACH if pair[1].rule[0] != "dropout"],
    ids=lambda value: getattr(value, "id", value),
)
def test_layouts(unit, case, layout):
    """Inputs and incoming gradients of any strides."""
    block = build_unit("basic", unit, case)
    state, formula = state_of(block), formula_of(block, case)
    x = LAYOUTS[layout](unit_input(case))
    ours, theirs = x.detach().requires_grad_(), x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
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


# --- norms with options -----------------------------------------------------------------------------------------------

NORM_LAYERS = {
    "momentum-none": lambda channels: nn.BatchNorm2d(channels, momentum=None),
    "untracked": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "not-affine": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "bare": lambda channels: nn.BatchNorm2d(channels, affine=False, track_running_stats=False),
    "eps": lambda channels: nn.BatchNorm2d(channels, eps=0.1),
    "frozen": FrozenBatchNorm2d,
}


@pytest.mark.parametrize("layer", NORM_LAYERS)
@every_unit
@both_kinds
def test_norm_options(kind, unit, layer):
    fused, plain = unit_pair(kind, unit, IDENTITY, norm_layer=NORM_LAYERS[layer])
    x = unit_input(IDENTITY)
    for training in (True, False):
        assert_same(*(run_block(block.train(training), x) for block in (fused, plain)), what=f"{training}")
    for block in (fused, plain):
        run_block(block.train(), x + 1)
    with torch.no_grad():
        assert_close(fused.eval()(x), plain.eval()(x), EXACT)
    expected = ("train", None) if layer in ("untracked", "bare") else ("infer", None)
    with torch.no_grad():
        assert path_of(fused, x) == expected


# --- shortcuts of other shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [IDENTITY, *(case for case in ONE_OF_EACH if case.rule != ("none",))], ids=lambda case: case.rule[0]
)
@pytest.mark.parametrize("unit", ["original", "full_preact"])
def test_shortcut_that_broadcasts(unit, case):
    """One value a channel added to every pixel, as a sum in PyTorch broadcasts it."""
    for mode in ("train", "frozen", "eval"):
        found = []
        for block in unit_pair("basic", unit, case):
            block.downsample = nn.AdaptiveAvgPool2d(1)
            found.append(run_block(set_mode(block, mode), unit_input(case)))
        assert_same(*found, what=mode)


@pytest.mark.parametrize("unit", ["original", "bn_after_add", "full_preact"])
def test_identity_that_broadcasts_or_does_not_fit_is_pytorchs(unit):
    found = []
    for package in (resnet_fused.blocks, Stock):
        torch.manual_seed(0)
        block = randomise(package.BasicUnit(1, 6, unit=unit)).double()
        found.append(run_block(block, randn(2, 1, 5, 6)))
        with pytest.raises(RuntimeError, match="size of tensor"):
            package.BasicUnit(4, 6, unit=unit).double()(randn(2, 4, 5, 5))
    assert_same(*found)


# --- other ways to run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aten", "reference"])
@each
def test_backends(unit, case, backend):
    """The definition of correct and PyTorch's own kernels, forced for the whole block."""
    for mode in ("train", "frozen"):
        block, x = set_mode(build_unit("basic", unit, case), mode), unit_input(case)
        exact = exact_run(block, case, x)
        with resnet_fused.use_backend(backend):
            assert_same(run_block(block, x), exact, what=mode)
    exact = exact_run(block.eval(), case, x)["out"]
    with resnet_fused.use_backend(backend), torch.no_grad():
        assert_close(block(x), exact, EXACT)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "subclass"])
@few
def test_transforms_run_the_original(unit, case, transform):
    fused, plain = (block.eval() for block in unit_pair("basic", unit, case))
    x = unit_input(case)
    v, found = randn(*x.shape, seed=11), []
    for block in (fused, plain):
        if transform == "vmap":
            found.append(torch.func.vmap(block)(torch.stack([x, v])))
        elif transform == "grad":
            found.append(torch.func.grad(lambda t, block=block: block(t).square().sum())(x))
        elif transform == "jvp":
            found.append(torch.func.jvp(block, (x,), (v,))[1])
        else:
            found.append(block(x.as_subclass(type("Image", (torch.Tensor,), {}))).as_subclass(torch.Tensor))
    assert_close(*found, EXACT)
