"""BasicBlock and Bottleneck on any memory layout, and on odd inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from block_helpers import BASIC, EXACT, IDENTITY, NORM_LAYERS, PROJECTION, assert_same_inference, some_cases
from cases import BLOCKS
from helpers import (
    LAYOUTS,
    assert_close,
    assert_no_worse,
    assert_same_step,
    block_input,
    is_channels_last,
    pair,
    randn,
    step,
)
from torch import nn

# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dout_layout", ["nchw", "sliced", "expanded", "scalar"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [BLOCKS[0], PROJECTION], ids=lambda case: case.id)
def test_layouts(case, layout, dout_layout):
    """Inputs and incoming gradients of any strides; values as torchvision's."""
    fused, plain = pair(case)
    found = []
    for block in (fused, plain):
        x = LAYOUTS[layout](block_input(case)).requires_grad_()
        out = block(x)
        dout = randn(*out.shape, seed=9)
        dout = torch.ones(()).double().expand_as(out) if dout_layout == "scalar" else LAYOUTS[dout_layout](dout)
        out.backward(dout)
        found.append({"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in block.named_parameters()})
    assert_same_step(*found, EXACT)
    with torch.no_grad():
        x = LAYOUTS[layout](block_input(case))
        assert_close(fused.eval()(x), plain.eval()(x), EXACT)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("weights", ["nchw", "channels_last"])
@pytest.mark.parametrize("inputs", ["nchw", "channels_last", "sliced"])
@pytest.mark.parametrize("size", [(6, 5), (1, 1)], ids=["image", "pixel"])
@some_cases
def test_memory_format_of_the_output_is_pytorchs(case, inputs, weights, training, size):
    strides = []
    for block in pair(case, dtype=torch.float32):
        if weights == "channels_last":
            block.to(memory_format=torch.channels_last)
        x = LAYOUTS[inputs](randn(4, case.inplanes, *size, dtype=torch.float32))
        with torch.no_grad():
            strides.append(block.train(training)(x))
    ours, theirs = strides
    assert is_channels_last(ours) == is_channels_last(theirs)
    assert ours.is_contiguous() == theirs.is_contiguous()


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [BASIC, IDENTITY, PROJECTION], ids=lambda case: case.id)
def test_one_value_per_channel(case):
    """PyTorch's error and text, before any running statistic moves."""
    fused, plain = pair(case)
    x = randn(1, case.inplanes, 1, 1)
    before = copy.deepcopy(fused.state_dict())
    with pytest.raises(ValueError) as theirs:
        plain(x)
    with pytest.raises(ValueError) as ours:
        fused(x)
    assert str(ours.value) == str(theirs.value)
    assert "Expected more than 1 value per channel when training, got input size" in str(ours.value)
    assert all(torch.equal(value, before[key]) for key, value in fused.state_dict().items())
    assert_same_inference(fused, plain, x)


def test_one_value_per_channel_behind_the_stride_alone():
    """The first norm sees four values, the second one: PyTorch raises at the second, and so do we."""
    fused, plain = pair(PROJECTION)
    for block in (fused, plain):
        with pytest.raises(ValueError, match=r"got input size torch.Size\(\[1, 3, 1, 1\]\)"):
            block(randn(1, 6, 2, 2))
    assert fused.bn1.num_batches_tracked == 0


def test_one_value_per_channel_without_running_statistics_in_eval():
    """Without running statistics eval() takes the batch's, and PyTorch refuses one value there too."""
    fused, plain = pair(BLOCKS[0], NORM_LAYERS["untracked"])
    for block in (fused.eval(), plain.eval()):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            block(randn(1, 5, 1, 1))


@some_cases
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_batch(case, training):
    """Works; running statistics stay, counters count, gradients are zeros: what torchvision's block does."""
    found, blocks = [], pair(case)
    before = copy.deepcopy(blocks[0].state_dict())
    for block in blocks:
        found.append(step(block.train(training), block_input(case)[:0]))
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert ours["out"].shape == theirs["out"].shape
    assert all(not gradient.any() for gradient in ours.values())
    for name, value in blocks[0].state_dict().items():
        expected = before[name] + (1 if "num_batches" in name and training else 0)
        assert torch.equal(value, expected), name


def test_wrong_inputs_raise_pytorchs_errors():
    fused, plain = pair(BLOCKS[0])
    for x in (randn(2, 4, 5, 5), randn(2, 5, 5), torch.ones(2, 5, 4, 4, dtype=torch.int64), randn(2, 5, 4, 4).float()):
        errors = []
        for block in (fused, plain):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                block(x)
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]


@some_cases
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nan_propagates(case, training):
    """One NaN in, the same NaNs out; in training it spoils statistics and gradients, as in PyTorch."""
    fused, plain = pair(case)
    x = block_input(case)
    x[1, 0, 2, 2] = float("nan")
    ours, theirs = (step(block.train(training), x) for block in (fused, plain))
    assert theirs["out"].isnan().any()
    for name, exact in theirs.items():
        torch.testing.assert_close(
            ours[name], exact, rtol=1e-9, atol=1e-9, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    for (name, buffer), exact in zip(fused.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, exact, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(x), plain.eval()(x), equal_nan=True)


def test_large_mean():
    """A batch whose mean is 1e4 deviations away, in fp32: no worse than PyTorch."""
    fused, plain = pair(BLOCKS[0], dtype=torch.float32)
    for block in (fused, plain):
        nn.init.dirac_(block.conv1.weight)
    exact = copy.deepcopy(plain).double()
    x = (block_input(BLOCKS[0]) + 1e4).float()
    with torch.no_grad():
        outs = [block(t) for block, t in ((fused, x), (plain, x), (exact, x.double()))]
    assert_no_worse(*outs, floor=1e-5)
    assert_no_worse(fused.bn1.running_var, plain.bn1.running_var, exact.bn1.running_var, floor=1e-5)
