"""BasicBlock and Bottleneck against torchvision's: training, inference, state, initialisation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from block_helpers import IDENTITY, assert_same_inference, assert_same_training, every_case, some_cases
from helpers import block_input, build, error, pair
from torch import nn
from torchvision.models import resnet

import resnet_fused


@every_case
def test_training(case):
    assert_same_training(*pair(case), block_input(case), steps=3)


@every_case
def test_inference(case):
    assert_same_inference(*pair(case), block_input(case))


@every_case
def test_frozen_with_gradients(case):
    """eval() with gradients wanted: the same as torchvision's, and nothing is written."""
    fused, plain = pair(case)
    assert_same_training(fused.eval(), plain.eval(), block_input(case), steps=2)


@some_cases
def test_state_and_initialisation_are_torchvisions(case):
    blocks = []
    for package in (resnet_fused, resnet):
        torch.manual_seed(3)
        blocks.append(build(case, package))
    ours, theirs = (block.state_dict() for block in blocks)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert repr(blocks[0]) == repr(blocks[1])
    assert blocks[0].expansion == blocks[1].expansion
    assert blocks[0].stride == blocks[1].stride


@pytest.mark.parametrize("options", [{"groups": 2}, {"base_width": 32}, {"dilation": 2}], ids=str)
def test_basic_refuses_what_torchvisions_refuses(options):
    for package in (resnet_fused, resnet):
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            package.BasicBlock(4, 4, **options)
        assert caught.type is (NotImplementedError if "dilation" in options else ValueError)


@some_cases
def test_zero_initialised_gamma(case):
    """With gamma 0 at the end the block is relu(shortcut), and that norm's weight still gets its gradient."""
    fused, plain = pair(case)
    for block in (fused, plain):
        nn.init.zeros_((block.bn3 if case.kind == "bottleneck" else block.bn2).weight)
    x = block_input(case)
    assert_same_training(fused, plain, x, steps=2)
    assert (fused.bn3 if case.kind == "bottleneck" else fused.bn2).weight.grad.any()


def test_copies_and_pickles_after_use():
    fused, plain = pair(IDENTITY)
    x = block_input(IDENTITY)
    with torch.no_grad():
        fused.eval()(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_same_inference(other, plain, x)
        with torch.no_grad():
            other.conv1.weight.mul_(2)
            assert error(other(x), fused(x)) > 1e-3
