"""The rules of mixing as modules: random factors, changes between calls, subclasses, constructors."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, error, randn
from parity import EXACT, SEED, assert_same, formula_of, run_block, run_formula, state_of
from torch import nn
from units import ONE_OF_EACH, UNITS, UnitCase, build_unit, set_mode, unit_input, unit_pair

from resnet_fused.blocks import BasicUnit, mixing

RANDOM = ("dropout", "depth-row", "depth-batch")
random_rules = pytest.mark.parametrize("case", [c for c in ONE_OF_EACH if c.rule[0] in RANDOM], ids=lambda c: c.rule[0])


def rule_case(*rule: object) -> UnitCase:
    return UnitCase("identity", rule, 1, str(rule[0]))


# --- random factors ---------------------------------------------------------------------------------------------------


@random_rules
def test_random_factors_are_drawn_anew(case):
    """Each training call draws; evaluation draws nothing."""
    block, x = build_unit("basic", "original", case), unit_input(case, 8)
    torch.manual_seed(0)
    first, second = block(x), block(x)
    assert error(first, second) > 1e-3
    torch.manual_seed(0)
    assert torch.equal(block(x), first)
    before = torch.get_rng_state()
    with torch.no_grad():
        block.eval()(x)
    assert torch.equal(torch.get_rng_state(), before)


@random_rules
def test_random_factors_with_frozen_norms_and_no_gradient(case):
    """A rule in training around norms in eval: what inference keeps must not hold the factors of the first call."""
    block, x = set_mode(build_unit("basic", "original", case), "frozen"), unit_input(case, 8)
    formula, state, found = formula_of(block, case), state_of(block), []
    for seed in (1, 2, 1):
        with torch.no_grad():
            torch.manual_seed(seed)
            found.append(block(x))
            torch.manual_seed(seed)
            assert_close(found[-1], formula(state, x)[0], EXACT)
    assert error(found[0], found[1]) > 1e-3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@random_rules
def test_random_factors_are_eagers_in_both_memory_formats(case, layout):
    """One seed drops the same elements as PyTorch's modules do, whose order is that of memory."""
    found = []
    for block in unit_pair("basic", "original", case):
        block.to(memory_format=layout)
        torch.manual_seed(SEED)
        found.append(block(unit_input(case).contiguous(memory_format=layout)))
    assert_close(*found, EXACT)


@pytest.mark.parametrize("p", [0.0, 1.0, 0, 1])
@pytest.mark.parametrize("name", RANDOM)
def test_certain_probabilities(name, p):
    """p = 0 is the plain sum; p = 1 is the branch alone (dropout) or the shortcut alone (stochastic depth)."""
    case = rule_case(name, p)
    for unit in UNITS:
        block = build_unit("basic", unit, case)
        state, x = state_of(block), unit_input(case)
        found = run_block(block, x)
        assert_same(found, run_formula(formula_of(block, case), state, x), what=unit)
        assert all(t.isfinite().all() for t in found.values())
        if unit == "relu_preact" and name != "dropout" and p == 1:
            assert torch.equal(found["out"], x)


def test_stochastic_depth_drops_rows():
    """By row some samples pass as they are while others do not; by batch all do or none."""
    x = unit_input(ONE_OF_EACH[0], 64)
    for name, expected in (("depth-row", {True, False}), ("depth-batch", {True})):
        block = build_unit("basic", "full_preact", rule_case(name, 0.5))
        torch.manual_seed(1 if name == "depth-row" else 0)
        while True:
            passed = (block(x) == x).flatten(1).all(1)
            if passed.any():
                break
        assert set(passed.tolist()) == expected


# --- changes that inference has to follow -----------------------------------------------------------------------------


def scale_gate(block):
    with torch.no_grad():
        for p in block.mixing.parameters():
            p.mul_(1.7).add_(0.2)


def change_constants(block):
    block.mixing.branch, block.mixing.shortcut = 0.3, -1.5


def other_rule(block):
    block.mixing = mixing.ConstantScaling(shortcut=0.25)


def no_rule(block):
    block.mixing = None


def new_rule_after_none(block):
    block.mixing = None
    with torch.no_grad():
        block(unit_input(ONE_OF_EACH[0]))
    block.mixing = mixing.NoShortcut()


FOLLOWED = [
    (case, scale_gate) for case in ONE_OF_EACH if case.rule[0] in ("exclusive", "shortcut-gate", "learned", "squeeze")
]
FOLLOWED += [(rule_case("scaling", 0.5, 0.5), change_constants)]
FOLLOWED += [(rule_case(*rule), f) for rule in (("scaling", 0.5, 0.5), ("learned", 1)) for f in (other_rule, no_rule)]
FOLLOWED += [(rule_case("learned", 1), new_rule_after_none)]


@pytest.mark.parametrize(("case", "change"), FOLLOWED, ids=lambda value: getattr(value, "__name__", None) or value.why)
@pytest.mark.parametrize("unit", ["original", "relu_preact"])
def test_inference_follows_every_change(unit, case, change):
    """A change of gates or of constants is seen by the next call, which has kept what the last one made."""
    fused, plain = (block.eval() for block in unit_pair("basic", unit, case))
    x = unit_input(case)
    with torch.no_grad():
        for _ in range(3):
            before = fused(x).clone()
        for block in (fused, plain):
            change(block)
        for _ in range(2):
            assert_close(fused(x), plain(x), EXACT)
        assert error(plain(x), before) > 1e-3
    assert_same(*(run_block(block.train(), x) for block in (fused, plain)))


@pytest.mark.parametrize("name", RANDOM)
def test_training_follows_a_changed_probability(name):
    fused, plain = unit_pair("basic", "original", rule_case(name, 0.5))
    x = unit_input(ONE_OF_EACH[0], 6)
    for p in (0.5, 0.2, 0.0, 1.0):
        for block in (fused, plain):
            block.mixing.p = p
        assert_same(*(run_block(block, x) for block in (fused, plain)), what=f"p = {p}")


@random_rules
def test_a_rule_in_eval_inside_a_training_unit(case):
    """The rule alone decides whether it draws, as any module in eval does."""
    found = []
    for block in unit_pair("basic", "original", case):
        block.mixing.eval()
        found.append(run_block(block, unit_input(case)))
    assert_same(*found)
    block = build_unit("basic", "original", case)
    state = state_of(block)
    assert_same(found[0], run_formula(formula_of(block, rule_case("sum")), state, unit_input(case)))


def test_constants_between_forward_and_backward():
    """Backward belongs to the forward that was: constants changed since do not matter."""
    found = []
    for block in unit_pair("basic", "original", rule_case("scaling", 0.5, 0.75)):
        x = unit_input(ONE_OF_EACH[0]).requires_grad_()
        out = block(x)
        block.mixing.branch = block.mixing.shortcut = 9.0
        out.backward(randn(*out.shape, seed=9))
        found.append({"x": x.grad} | {name: p.grad for name, p in block.named_parameters()})
    assert_same(*found)


# --- rules of one's own -----------------------------------------------------------------------------------------------


class Halved(mixing.ExclusiveGating):
    """A user's subclass whose forward alone says what it means."""

    def forward(self, x, branch, shortcut):
        return 0.5 * super().forward(x, branch, shortcut)


class Custom(mixing.Mixing):
    """A user's rule with a gate of its own and no forward of its own: the four constants and the gate say it all."""


def test_a_subclass_computes_its_own_forward():
    """What is not exactly one of the package's rules must not be taken for one."""
    for training in (True, False):
        found = []
        for block in unit_pair("basic", "original", ONE_OF_EACH[0]):
            torch.manual_seed(4)
            block.mixing = Halved(4, 4).double()
            found.append(run_block(block.train(training), unit_input(ONE_OF_EACH[0])))
        assert_same(*found)


def test_the_base_class_is_the_plain_sum():
    found = []
    for block in unit_pair("basic", "original", rule_case("sum")):
        block.mixing = Custom() if type(block) is BasicUnit else None
        found.append(run_block(block, unit_input(ONE_OF_EACH[0])))
    assert_same(*found)


# --- constructors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: mixing.ConstantScaling(shortcut="1"), "ConstantScaling: expected shortcut to be a number, got '1'"),
        (lambda: mixing.ConstantScaling(branch=True), "ConstantScaling: expected branch to be a number, got True"),
        (
            lambda: mixing.ConstantScaling(shortcut=float("nan")),
            "ConstantScaling: expected shortcut to be a number, got nan",
        ),
        (
            lambda: mixing.DropoutShortcut(1.5),
            "DropoutShortcut: expected p to be a probability from 0 to 1, got 1.5",
        ),
        (
            lambda: mixing.DropoutShortcut(-0.1),
            "DropoutShortcut: expected p to be a probability from 0 to 1, got -0.1",
        ),
        (
            lambda: mixing.StochasticDepth(True),
            "StochasticDepth: expected p to be a probability from 0 to 1, got True",
        ),
        (
            lambda: mixing.StochasticDepth("0.5"),
            "StochasticDepth: expected p to be a probability from 0 to 1, got '0.5'",
        ),
        (
            lambda: mixing.StochasticDepth(0.5, "sample"),
            "StochasticDepth: expected mode to be 'row' or 'batch', got 'sample'",
        ),
        (
            lambda: mixing.SqueezeExcitation(8, 0),
            "SqueezeExcitation: expected reduction to be at least 1, got 0",
        ),
        (
            lambda: BasicUnit(4, 8, 2, nn.Conv2d(4, 8, 1, 2), mixing=mixing.NoShortcut()),
            "BasicUnit: expected downsample to be None without a shortcut, got Conv2d",
        ),
    ],
    ids=[
        "text", "bool", "nan", "p above 1", "p below 0", "p bool", "p text", "mode", "reduction", "shortcut of none",
    ],
)  # fmt: skip
def test_errors_name_the_argument_and_its_value(build, text):
    with pytest.raises(ValueError) as caught:
        build()
    assert str(caught.value).startswith(text)


def test_initial_values_are_the_papers():
    gate = mixing.ShortcutGating(4, 8, 2)
    assert torch.equal(gate.conv.bias, torch.full((8,), -6.0))
    assert gate.conv.kernel_size == (1, 1)
    assert gate.conv.stride == (2, 2)
    assert mixing.SqueezeExcitation(8, 16).fc1.out_channels == 1
    assert mixing.SqueezeExcitation(64).fc1.out_channels == 4
    assert mixing.LearnedScaling(3, init=0.0).weight.tolist() == [0.0, 0.0, 0.0]
