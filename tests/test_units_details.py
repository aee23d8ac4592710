"""Details in which a fused unit could come to differ from PyTorch's modules, each against those modules."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from helpers import LAYOUTS, assert_close, randn
from torch import nn

from resnet_fused import disabled, explain, ops
from resnet_fused.blocks import BasicBlock, BasicUnit, Bottleneck, BottleneckUnit, NormReLU, PReLUBlock, mixing
from resnet_fused.blocks.shortcuts import PadShortcut

EXACT = 1e-10
SHAPE = (3, 4, 5, 6)


@pytest.fixture
def x() -> torch.Tensor:
    return randn(*SHAPE, seed=1)


def by_modules(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with disabled():
        return block(x)


def projection(stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 8, 1, stride, bias=False), nn.BatchNorm2d(8))


# --- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_x", [False, True])
def test_second_derivatives_through_a_gate_that_reads_the_branch(need_x, x):
    """The identity shortcut's half of the graph may need no gradient at all."""
    block = BasicUnit(4, 4, mixing=mixing.SqueezeExcitation(4, 2)).double()
    x.requires_grad_(need_x)

    def penalty(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [*block.parameters(), *([x] if need_x else [])]
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for ours, exact in zip(penalty(block(x)), penalty(by_modules(block, x)), strict=True):
        assert_close(ours, exact, 1e-8)


def test_gradients_are_tensors_of_their_own(x):
    """The last norm's and the projection norm's biases have the same gradient: a write to one leaves the other."""
    block = BasicUnit(4, 8, 2, projection(2)).double()
    pair = [block.bn2.bias, block.downsample[1].bias]
    ours = torch.autograd.grad(block(x).square().sum(), pair)
    theirs = torch.autograd.grad(by_modules(block, x).square().sum(), pair)
    for found in (ours, theirs):
        found[0].mul_(0.5)
    for mine, exact in zip(ours, theirs, strict=True):
        assert_close(mine, exact, EXACT)


@pytest.mark.parametrize(
    "block",
    [
        NormReLU(4),
        BasicUnit(4, 4, unit="relu_before_add", mixing=mixing.SqueezeExcitation(4, 2)),
        BasicUnit(4, 4, unit="bn_after_add"),
    ],
    ids=["norm", "gated", "unit"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nothing_is_prepared_for_backward_without_gradients(block, training, x):
    block.double().train(training)
    real, asked = ops.bn_add_relu.forward, []

    def forward(*args, sign, **options):
        asked.append(sign)
        return real(*args, sign=sign, **options)

    with torch.no_grad(), mock.patch.object(ops.bn_add_relu, "forward", forward):
        block(x)
    assert asked
    assert not any(asked)


# --- what decides ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize(
    ("block", "name", "value"),
    [
        (PReLUBlock(4), "final_activation", False),
        (BasicUnit(4, 4, unit="full_preact"), "preactivate", False),
        (BasicUnit(4, 4, unit="relu_preact"), "unit", "original"),
    ],
    ids=["final_activation", "preactivate", "unit"],
)
def test_attributes_of_the_block_may_change_after_a_call(block, name, value, grad, x):
    block.double().eval()
    before = getattr(block, name)
    with torch.set_grad_enabled(grad):
        first = block(x)
        setattr(block, name, value)
        ours, theirs = block(x), by_modules(block, x)
    setattr(block, name, before)
    assert_close(ours, theirs, EXACT)
    assert (ours - first).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["attribute", "replaced", "shared"])
def test_inference_follows_slopes_that_pytorch_does_not_count(how, x):
    block = PReLUBlock(4).double().eval()
    slope = block.prelu.weight.detach().clone()
    if how == "shared":
        block.prelu.weight.data.share_memory_()
    else:
        del block.prelu.weight
        block.prelu.weight = slope
    with torch.no_grad():
        assert_close(block(x), by_modules(block, x), EXACT)
        if how == "attribute":
            slope.fill_(3.0)
        elif how == "replaced":
            block.prelu.weight = torch.full((1,), -2.0, dtype=torch.float64)
        else:
            block.prelu.weight.data.fill_(2.0)
        assert_close(block(x), by_modules(block, x), EXACT)


class Minus(mixing.Mixing):
    """A rule of somebody's own that says what it does in ``forward`` alone."""

    def forward(self, x, branch, shortcut):
        return branch - shortcut


class Half(mixing.ConstantScaling):
    def forward(self, x, branch, shortcut):
        return branch + 0.5 * shortcut


class Blend(mixing.Mixing):
    """A rule of somebody's own that says it in both ways: half of each."""

    def mix(self):
        return mixing.Mix(branch=0.5, shortcut=0.5)

    def forward(self, x, branch, shortcut):
        return 0.5 * branch + 0.5 * shortcut


@pytest.mark.parametrize(("rule", "reason"), [(Minus, "mixing"), (Half, "mixing"), (Blend, None)])
def test_rules_of_ones_own(rule, reason, x):
    block = BasicUnit(4, 4, mixing=rule()).double()
    (step,) = explain(block, x).steps
    assert step.reason == reason
    assert_close(block(x), by_modules(block, x), EXACT)


# --- formats, dtypes, order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("shortcut", ["identity", "padded", "projected"])
@pytest.mark.parametrize("path", ["train", "frozen", "infer"])
@pytest.mark.parametrize("unit", ["original", "full_preact"])
def test_dropout_draws_in_the_order_of_the_shortcuts_memory(layout, shortcut, path, unit, x):
    """With channels_last weights, as swapped models have them, the sum has another order than its shortcut."""
    down = {"identity": None, "padded": PadShortcut(4, 8, 2), "projected": projection(2)}[shortcut]
    block = BasicUnit(4, 8 if down else 4, 2 if down else 1, down, unit=unit, mixing=mixing.DropoutShortcut(0.5))
    block = block.double().to(memory_format=torch.channels_last)
    if path != "train":
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
    x = LAYOUTS[layout](x)
    with torch.set_grad_enabled(path != "infer"):
        torch.manual_seed(1)
        ours = block(x)
        torch.manual_seed(1)
        assert_close(ours, by_modules(block, x), EXACT)
        assert explain(block, x).steps[0].path == ("infer" if path == "infer" else "train")


class ToFloat(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_shortcut_of_a_wider_dtype_widens_the_sum(training, x):
    block = BasicUnit(4, 4, downsample=ToFloat()).bfloat16().train(training)
    x = x.bfloat16()
    with torch.set_grad_enabled(training):
        ours, theirs = block(x), by_modules(block, x)
    assert ours.dtype == theirs.dtype == torch.float32
    assert_close(ours, theirs, 0.05)


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inputs", [torch.contiguous_format, torch.channels_last])
def test_prelu_block_keeps_pytorchs_memory_format(inputs, weights, x):
    block = PReLUBlock(4).double().to(memory_format=weights)
    x = x.contiguous(memory_format=inputs)
    assert block(x).stride() == by_modules(block, x).stride()


@pytest.mark.parametrize(("unit", "block"), [(BasicUnit, BasicBlock), (BottleneckUnit, Bottleneck)])
def test_the_original_unit_lists_its_parameters_as_the_block_does(unit, block):
    """Optimizers number parameters in this order: their checkpoints fit both."""
    planes = 8 // block.expansion
    assert [n for n, _ in unit(4, planes, 1, projection()).named_parameters()] == [
        n for n, _ in block(4, planes, 1, projection()).named_parameters()
    ]
    assert list(unit(4, planes, 1, projection()).state_dict()) == list(block(4, planes, 1, projection()).state_dict())


def test_a_shortcut_weighed_with_nothing_is_not_read(x):
    """0 times infinity is NaN in PyTorch's modules; here the shortcut counts for nothing."""
    block = BasicUnit(4, 4, mixing=mixing.ConstantScaling(0.0)).double().eval()
    plain = BasicUnit(4, 4, mixing=mixing.NoShortcut()).double().eval()
    plain.load_state_dict(block.state_dict())
    with torch.no_grad():
        assert_close(block(x), by_modules(plain, x), EXACT)


def test_tied_convolutions_compile(x):
    torch._dynamo.reset()
    block = BasicUnit(4, 4).double()
    block.conv2.weight = block.conv1.weight
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (compiled, lambda x: by_modules(block, x)):
        block.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in block.parameters()])
    for ours, exact in zip(*grads, strict=True):
        assert_close(ours, exact, 1e-9)
    torch._dynamo.reset()
