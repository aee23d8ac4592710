"""BasicBlock and Bottleneck with frozen norms, norms' options and parameters without gradient."""

from __future__ import annotations

import pytest
import torch
from block_helpers import (
    BASIC,
    EXACT,
    NORM_LAYERS,
    PROJECTION,
    assert_same_inference,
    assert_same_training,
    norms_of,
    some_cases,
)
from cases import BLOCKS
from helpers import assert_close, assert_same_buffers, assert_same_step, block_input, pair, randn, step
from torch import nn
from torchvision.ops import FrozenBatchNorm2d


@some_cases
@pytest.mark.parametrize("which", ["all", "first", "last"])
def test_norms_in_eval_inside_a_training_block(case, which):
    fused, plain = pair(case)
    for block in (fused, plain):
        norms = norms_of(block)
        for norm in {"all": norms, "first": norms[:1], "last": norms[-1:]}[which]:
            norm.eval()
    assert_same_training(fused, plain, block_input(case), steps=2)


@some_cases
@pytest.mark.parametrize("what", ["norms", "weights", "everything"])
def test_parameters_without_gradient(case, what):
    fused, plain = pair(case)
    for block in (fused, plain):
        for module in block.modules():
            if what == "everything" or isinstance(module, nn.BatchNorm2d if what == "norms" else nn.Conv2d):
                for p in module.parameters(recurse=False):
                    p.requires_grad_(False)
    assert_same_step(step(fused, block_input(case)), step(plain, block_input(case)), EXACT)
    assert_same_buffers(fused, plain, EXACT)


@some_cases
def test_frozen_batch_norm(case):
    """torchvision's FrozenBatchNorm2d: buffers in place of parameters, the same in train() and eval()."""
    fused, plain = pair(case, FrozenBatchNorm2d)
    x = block_input(case)
    assert_same_training(fused, plain, x, steps=2)
    assert_same_inference(fused, plain, x)


def test_frozen_batch_norm_takes_one_value_per_channel():
    fused, plain = pair(BLOCKS[0], FrozenBatchNorm2d)
    x = randn(1, 5, 1, 1)
    assert_same_step(step(fused, x), step(plain, x), EXACT)


@pytest.mark.parametrize("layer", NORM_LAYERS)
@pytest.mark.parametrize("case", [BASIC, PROJECTION], ids=lambda case: case.id)
def test_norm_options(layer, case):
    """Training and then inference; without running statistics inference takes the batch's."""
    fused, plain = pair(case, NORM_LAYERS[layer])
    x = block_input(case)
    assert_same_training(fused, plain, x, steps=3)
    assert_same_inference(fused, plain, x, "train" if layer in ("untracked", "bare") else "infer")


def toggle_off(norm):
    norm.track_running_stats = False


def drop_statistics(norm):
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def drop_counter(norm):
    norm.num_batches_tracked = None


@pytest.mark.parametrize("change", [toggle_off, drop_statistics, drop_counter], ids=lambda f: f.__name__)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_toggled_after_construction(change, momentum):
    fused, plain = pair(PROJECTION)
    for block in (fused, plain):
        for norm in norms_of(block):
            norm.momentum = momentum
            change(norm)
    x = block_input(PROJECTION)
    assert_same_training(fused, plain, x, steps=2)
    assert_same_inference(fused, plain, x, "train" if change is drop_statistics else "infer")


def test_bias_free_batch_norm():
    fused, plain = pair(PROJECTION)
    for block in (fused, plain):
        for norm in norms_of(block):
            norm.bias = None
    assert_same_training(fused, plain, block_input(PROJECTION))
    assert_same_inference(fused, plain, block_input(PROJECTION))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_running_statistics_move_without_gradients(context):
    """A forward in train() to recompute the statistics, as after weight averaging."""
    fused, plain = pair(PROJECTION)
    x = block_input(PROJECTION)
    with context():
        assert_close(fused(x), plain(x), EXACT)
    assert_same_buffers(fused, plain, EXACT)
    assert_same_training(fused, plain, x)


def test_counters_keep_their_type_and_identity():
    fused, _ = pair(PROJECTION)
    buffers = dict(fused.named_buffers())
    step(fused, block_input(PROJECTION))
    assert all(buffer is buffers[name] for name, buffer in fused.named_buffers())
    assert fused.bn1.num_batches_tracked.tolist() == 1
