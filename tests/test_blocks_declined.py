"""Blocks that are not fused, or not wholly: other norms, hooks, rewritten modules, transforms, unusual shortcuts."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from block_helpers import BASIC, EXACT, IDENTITY, PROJECTION, assert_same_training, paths_of
from cases import BLOCKS
from helpers import assert_close, assert_same_buffers, assert_same_step, block_input, build, pair, randn, step
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.models import resnet

import resnet_fused


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (lambda c: nn.GroupNorm(1, c), "GroupNorm"),
        (lambda c: nn.InstanceNorm2d(c, affine=True), "InstanceNorm2d"),
        (lambda c: nn.Identity(), "Identity"),
        (type("MyNorm", (nn.BatchNorm2d,), {"forward": lambda self, x: 2 * x}), "MyNorm"),
    ],
    ids=["group", "instance", "identity", "subclass"],
)
def test_other_norms_run_the_original_and_say_so(layer, name, caplog):
    case = IDENTITY
    torch.manual_seed(0)
    plain = build(case, resnet, layer).double()
    fused = build(case, resnet_fused, layer).double()
    fused.load_state_dict(plain.state_dict())
    with caplog.at_level(logging.INFO, logger="resnet_fused"):
        assert paths_of(fused, block_input(case)) == [("original", "norm")]
    x = block_input(case)
    assert_same_step(step(fused, x), step(plain, x), 0.0)
    (row,) = resnet_fused.explain(fused, x).steps
    assert (row.path, row.reason) == ("original", "norm")
    assert name in row.detail
    (row,) = resnet_fused.report(fused).declined
    assert name in row.detail


def test_disabled():
    fused, plain = pair(BASIC)
    x = block_input(BASIC)
    with resnet_fused.disabled():
        assert paths_of(copy.deepcopy(fused), x) == [("original", "disabled")]
        assert_same_step(step(fused, x), step(plain, x), 0.0)
    assert paths_of(fused, x) == [("train", None)]


HOOKS = {
    "forward": lambda m, seen: m.register_forward_hook(lambda m, i, out: seen.append(1)),
    "forward-pre": lambda m, seen: m.register_forward_pre_hook(lambda m, i: seen.append(1)),
    "full-backward": lambda m, seen: m.register_full_backward_hook(lambda m, i, o: seen.append(1)),
    "full-backward-pre": lambda m, seen: m.register_full_backward_pre_hook(lambda m, o: seen.append(1)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["conv1", "bn2", "relu", "downsample", "downsample.1"])
def test_hooks_on_inner_modules_run(kind, name):
    """Registered after the block has run fused, and gone again when removed."""
    fused, plain = pair(PROJECTION)
    x = block_input(PROJECTION)
    assert paths_of(copy.deepcopy(fused), x) == [("train", None)]
    step(fused, x)
    step(plain, x)
    counts = []
    for block in (fused, plain):
        seen: list[int] = []
        module = block.get_submodule(name)
        block.relu.inplace = False  # backward hooks refuse what is written to in place
        handle = HOOKS[kind](module, seen)
        step(block, x)
        counts.append(len(seen))
        handle.remove()
    assert counts[0] == counts[1] > 0
    assert paths_of(fused, x) == [("train", None)]


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_the_block_itself_stay_fused(kind):
    fused, _ = pair(PROJECTION)
    seen: list[int] = []
    HOOKS[kind](fused, seen)
    x = block_input(PROJECTION)
    assert paths_of(copy.deepcopy(fused), x) == [("train", None)]
    seen.clear()
    step(fused, x)
    assert seen == [1]


def test_gradient_hooks_on_parameters_and_input_run():
    fused, _ = pair(PROJECTION)
    seen = []
    fused.conv2.weight.register_hook(lambda g: seen.append("weight") or 2 * g)
    fused.bn1.bias.register_post_accumulate_grad_hook(lambda p: seen.append("bias"))
    expected = step(pair(PROJECTION)[1], block_input(PROJECTION))
    found = step(fused, block_input(PROJECTION))
    assert sorted(seen) == ["bias", "weight"]
    assert_close(found["conv2.weight"], 2 * expected["conv2.weight"], EXACT)


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
def test_convolutions_with_bias(mode):
    """The norm behind takes it out of batches; the running mean has it, and frozen statistics give it a gradient."""
    blocks = pair(PROJECTION)
    for block in blocks:
        torch.manual_seed(1)
        width = block.conv2.in_channels
        block.conv2 = nn.Conv2d(width, width, 3, block.conv2.stride, 1).double()
        block.downsample[0].bias = nn.Parameter(randn(block.downsample[0].out_channels, seed=3))
        block.train(mode == "train")
    fused, plain = blocks
    x = block_input(PROJECTION)
    if mode == "eval":
        with torch.no_grad():
            assert paths_of(fused, x) == [("infer", None)]
            assert_close(fused(x), plain(x), EXACT)
        return
    assert paths_of(fused, x) == [("train", None)]
    plain(x)
    ours, theirs = step(fused, x), step(plain, x)
    if mode == "train":  # 0 but for PyTorch's rounding
        for name in ("conv2.bias", "downsample.0.bias"):
            assert ours.pop(name).abs().max() == 0
            assert theirs.pop(name).abs().max() < 1e-12
    assert_same_step(ours, theirs, EXACT)
    assert_same_buffers(fused, plain, EXACT)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm", "old-weight_norm", "prune"])
def test_parametrized_convolutions(how):
    """What computes the weight at each call still does."""
    blocks = pair(PROJECTION)
    for block in blocks:
        torch.manual_seed(1)
        if how == "prune":
            prune.l1_unstructured(block.conv2, "weight", 0.5)
        elif how == "old-weight_norm":
            torch.nn.utils.weight_norm(block.conv2)
        else:
            getattr(parametrizations, how)(block.conv2)
    fused, plain = blocks
    x = block_input(PROJECTION)
    ((path, _),) = paths_of(fused, x)
    plain(x)
    assert path == "original"
    assert_same_step(step(fused, x), step(plain, x), EXACT)
    assert_same_buffers(fused, plain, EXACT)
    if how == "prune":
        for block in blocks:
            prune.remove(block.conv2, "weight")
        assert_same_training(fused, plain, x)


@pytest.mark.parametrize("what", ["activation", "padding", "kernel", "grouped-1x1", "padding-mode"])
def test_other_modules_run_the_original(what):
    """A module put in after construction: the block computes what its modules say."""
    blocks = pair(IDENTITY)
    for block in blocks:
        torch.manual_seed(1)
        width = block.conv2.in_channels
        if what == "activation":
            block.relu = nn.SiLU()
        elif what == "grouped-1x1":
            block.conv1 = nn.Conv2d(8, width, 1, groups=2, bias=False).double()
        else:
            options = {
                "padding": {"padding": 1, "kernel_size": 3, "padding_mode": "zeros", "dilation": 1},
                "padding-mode": {"padding": 1, "padding_mode": "reflect"},
                "kernel": {"kernel_size": 5, "padding": 2},
            }[what]
            options = {"kernel_size": 3, "bias": False} | options
            block.conv2 = nn.Conv2d(width, width, **options).double()
        if what == "padding":
            block.conv2.padding, block.conv1.padding, block.conv3.padding = (0, 0), (1, 1), (0, 0)
    fused, plain = blocks
    x = block_input(IDENTITY)
    assert [path for path, _ in paths_of(copy.deepcopy(fused), x)] == ["original"]
    assert_same_step(step(fused, x), step(plain, x), EXACT)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "subclass"])
def test_transforms_run_the_original(transform):
    fused, plain = (block.eval() for block in pair(BASIC))
    x, v = block_input(BASIC), randn(*block_input(BASIC).shape, seed=11)
    if transform == "vmap":
        found = [torch.func.vmap(block)(torch.stack([x, v])) for block in (fused, plain)]
    elif transform == "grad":
        found = [torch.func.grad(lambda t, block=block: block(t).sum())(x) for block in (fused, plain)]
    elif transform == "jvp":
        found = [torch.func.jvp(block, (x,), (v,))[1] for block in (fused, plain)]
    else:
        subclass = type("Image", (Tensor,), {})
        found = [block(x.as_subclass(subclass)) for block in (fused, plain)]
        assert type(found[0]) is type(found[1])
    assert_close(found[0], found[1], EXACT)


def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    fused, plain = pair(PROJECTION)
    found = []
    for block in (fused, plain):
        x = block_input(PROJECTION).requires_grad_()
        out = checkpoint(block, x, use_reentrant=False)
        out.backward(randn(*out.shape, seed=9))
        found.append({"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in block.named_parameters()})
    assert_same_step(*found, EXACT)  # how often the running statistics move depends on where the recomputation stops


def test_training_gives_the_same_bits_twice():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = block_input(PROJECTION, dtype=dtype)
        runs = [step(pair(PROJECTION, dtype=dtype)[0], x) for _ in range(2)]
        assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_shortcut_of_identities():
    """timm pads its shortcuts with nn.Identity."""
    fused, plain = pair(PROJECTION)
    for block in (fused, plain):
        block.downsample = nn.Sequential(nn.Identity(), *block.downsample)
    assert_same_training(fused, plain, block_input(PROJECTION))
    fused, plain = pair(BLOCKS[0])
    for block in (fused, plain):
        block.downsample = nn.Identity()
    assert_same_training(fused, plain, block_input(BLOCKS[0]))


def test_shortcut_that_broadcasts():
    fused, plain = pair(BLOCKS[0])
    x = block_input(BLOCKS[0])
    for block in (fused, plain):
        block.downsample = nn.AdaptiveAvgPool2d(1)
    assert_same_training(fused, plain, x)
    with torch.no_grad():
        assert_close(fused.eval()(x), plain.eval()(x), EXACT)


def test_identity_that_broadcasts_or_does_not_fit_is_pytorchs():
    fused, plain = resnet_fused.BasicBlock(1, 8).double(), resnet.BasicBlock(1, 8).double()
    plain.load_state_dict(fused.state_dict())
    x = randn(2, 1, 6, 6)
    assert_close(fused(x), plain(x), EXACT)
    with pytest.raises(RuntimeError, match="size of tensor"):
        resnet_fused.BasicBlock(4, 8).double()(randn(2, 4, 6, 6))


def test_in_place_shortcut_is_declined():
    fused, plain = pair(BLOCKS[0])
    x = block_input(BLOCKS[0])
    for block in (fused, plain):
        block.downsample = nn.ReLU(inplace=True)
    with torch.no_grad():
        assert_close(fused.eval()(x.clone()), plain.eval()(x.clone()), EXACT)
    assert [s.reason for s in resnet_fused.explain(fused.eval(), x.clone().requires_grad_(False)).steps] == ["in-place"]


def test_weights_that_are_plain_attributes():
    fused, plain = (block.eval() for block in pair(BLOCKS[0]))
    x = block_input(BLOCKS[0])
    first, second = (randn(*fused.conv1.weight.shape, seed=seed) for seed in (21, 22))
    for block in (fused, plain):
        del block.conv1.weight
    with torch.no_grad():
        for weight in (first, second):
            for block in (fused, plain):
                block.conv1.weight = weight
            assert_close(fused(x), plain(x), EXACT)
        second.mul_(2)
        assert_close(fused(x), plain(x), EXACT)
    for block in (fused, plain):
        block.requires_grad_(False)
        block.conv1.weight = (first * 2).requires_grad_()
        assert block(x).requires_grad


def test_refresh_after_an_uncounted_write():
    fused, plain = (block.eval() for block in pair(BLOCKS[0]))
    x = block_input(BLOCKS[0])
    with torch.no_grad():
        fused(x)
        for block in (fused, plain):
            block.conv1.weight.data.mul_(3)
        resnet_fused.refresh(fused)
        assert_close(fused(x), plain(x), EXACT)


def test_infinite_running_variance_stays_infinite():
    fused, plain = pair(BLOCKS[0])
    for block in (fused, plain):
        block.bn1.running_var[0] = float("inf")
        block(block_input(BLOCKS[0]))
    assert fused.bn1.running_var[0] == plain.bn1.running_var[0] == float("inf")


def test_fp64_input_with_fp32_weights_under_autocast_raises_pytorchs_error():
    fused, plain = pair(BLOCKS[0], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for block in (plain, fused):
            with pytest.raises(RuntimeError, match=r"Double|double|Float|type"):
                block(block_input(BLOCKS[0]))
