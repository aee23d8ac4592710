"""What inference folds and keeps follows every change of the block."""

from __future__ import annotations

import pytest
import torch
from block_helpers import EXACT, IDENTITY, PROJECTION, assert_same_inference, assert_same_training, norms_of
from cases import BLOCKS
from helpers import LAYOUTS, assert_close, assert_same_step, block_input, error, pair, randn, step
from torch import nn
from torch.func import functional_call

import resnet_fused
from resnet_fused.blocks import inference


def scale_in_place(block):
    with torch.no_grad():
        block.conv2.weight.mul_(1.5)


def scale_norm(block):
    with torch.no_grad():
        block.bn1.weight.add_(0.3)


def move_statistics(block):
    block.bn2.running_mean.add_(0.5)


def load(block):
    block.load_state_dict({key: value * 1.25 for key, value in block.state_dict().items()})


def replace_parameter(block):
    block.conv1.weight = nn.Parameter(block.conv1.weight.detach() * 2)


def replace_buffer(block):
    block.bn1.running_var = block.bn1.running_var * 2


def change_eps(block):
    block.bn1.eps = 0.5


def change_stride(block):
    """Same weights, other geometry."""
    block.conv2.stride = (1, 1)
    block.conv1.stride = (2, 2)


def change_dilation(block):
    block.conv2.dilation = block.conv2.padding = (2, 2)


def swap_norm(block):
    norm = nn.BatchNorm2d(block.bn1.num_features).double()
    norm.eval()
    block.bn1 = norm


def data_swap(block):
    block.conv1.weight.data = block.conv1.weight.data * 3
    block.eval()


def data_write(block):
    block.conv1.weight.data.mul_(3)
    block.eval()


CHANGES = [
    scale_in_place, scale_norm, move_statistics, load, replace_parameter, replace_buffer, change_eps, change_stride,
    change_dilation, swap_norm, data_swap, data_write,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_inference_follows_every_change(change):
    """What is folded and kept is made anew when something it was made from changes."""
    fused, plain = (block.eval() for block in pair(PROJECTION))
    x = block_input(PROJECTION)
    with torch.no_grad():
        before = fused(x).clone()
        assert torch.equal(fused(x), before)
        for block in (fused, plain):
            change(block)
        assert_close(fused(x), plain(x), EXACT)
        assert error(plain(x), before) > 1e-3


def test_inference_follows_training_and_the_optimizer():
    fused, plain = pair(PROJECTION)
    x = block_input(PROJECTION)
    for _ in range(2):
        assert_same_inference(fused, plain, x)
        fused.train()
        plain.train()
        assert_same_training(fused, plain, x)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_inference_follows_an_optimizer_without_train(options):
    """Fused optimizers write parameters without giving them a new version."""
    fused, plain = (block.eval() for block in pair(PROJECTION))
    x = block_input(PROJECTION)
    optimizers = [torch.optim.SGD(block.parameters(), lr=0.1, **options) for block in (fused, plain)]
    for _ in range(2):
        with torch.no_grad():
            assert_close(fused(x), plain(x), EXACT)
        for block, optimizer in zip((fused, plain), optimizers, strict=True):
            for p in block.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
    with torch.no_grad():
        assert_close(fused(x), plain(x), EXACT)


def test_inference_follows_statistics_that_pytorchs_batch_norm_moved():
    fused, plain = (block.eval() for block in pair(PROJECTION))
    x = block_input(PROJECTION)
    with torch.no_grad():
        fused(x)
        for norm in (*norms_of(fused), *norms_of(plain)):
            norm.train()
        with resnet_fused.disabled():
            fused(x)
        plain(x)
        for norm in (*norms_of(fused), *norms_of(plain)):
            norm.eval()
        assert_close(fused(x), plain(x), EXACT)


def test_functional_call():
    """Other tensors in the parameters' place, in training and inference, and the module's own afterwards."""
    fused, plain = pair(PROJECTION)
    x = block_input(PROJECTION)
    state = {name: value * 1.5 for name, value in plain.state_dict().items() if value.is_floating_point()}
    for training in (True, False):
        with torch.no_grad():
            own = [block.train(training)(x) for block in (fused, plain)]
            ours, theirs = (
                functional_call(block, {key: value.clone() for key, value in state.items()}, (x,))
                for block in (fused, plain)
            )
            assert_close(ours, theirs, EXACT)
            assert error(ours, own[0]) > 1e-3
            assert_close(fused(x), plain(x), EXACT)


@pytest.mark.parametrize("make_inside", [False, True], ids=["model-outside", "model-inside"])
def test_inference_mode(make_inside):
    """Inside inference mode, then outside it with gradients; also a model whose parameters are inference tensors."""
    x = block_input(PROJECTION)
    with torch.inference_mode(make_inside):
        fused, plain = pair(PROJECTION)
    fused.eval()
    plain.eval()
    with torch.inference_mode():
        assert_close(fused(x), plain(x), EXACT)
        scale_in_place(fused)
        scale_in_place(plain)
        assert_close(fused(x), plain(x), EXACT)
    if not make_inside:
        assert_same_step(step(fused, x), step(plain, x), EXACT)


def test_inference_of_many_sizes():
    fused, plain = (block.eval() for block in pair(PROJECTION))
    with torch.no_grad():
        for _ in range(2):
            for n, size in ((1, 5), (2, 5), (2, 8), (3, 3), (1, 9), (2, 1)):
                x = randn(n, PROJECTION.inplanes, size, size + 1, seed=size)
                assert_close(fused(x), plain(x), EXACT)


def test_inference_gives_the_same_bits_twice_and_leaves_its_input_alone():
    for case in (BLOCKS[0], IDENTITY, PROJECTION):
        fused = pair(case, dtype=torch.float32)[0].eval()
        for layout in ("nchw", "channels_last"):
            x = LAYOUTS[layout](block_input(case, dtype=torch.float32))
            kept = x.clone()
            with torch.no_grad():
                first = fused(x)
                value = first.clone()
                assert torch.equal(fused(x), value)
            assert torch.equal(first, value)
            assert torch.equal(x, kept)


@pytest.fixture
def folds(monkeypatch):
    """The convolutions folded so far."""
    found, fold = [], inference.fold
    monkeypatch.setattr(inference, "fold", lambda conv, *args: found.append(conv) or fold(conv, *args))
    return found


@pytest.mark.parametrize("backend", ["auto", "aten", "reference"])
def test_weights_are_folded_once(backend, folds):
    """Whatever backend the model asks for, and anew where another one is forced."""
    fused = resnet_fused.fuse(pair(PROJECTION)[1].eval(), backend=backend)
    x = block_input(PROJECTION)
    with torch.no_grad():
        for _ in range(3):
            fused(x)
        assert len(folds) == 4
        with resnet_fused.use_backend("reference"):
            for _ in range(2):
                fused(x)
    assert len(folds) == (8 if backend == "auto" else 4)


def test_memory_of_a_gpu_is_not_taken_for_shared(folds, monkeypatch):
    """PyTorch calls all CUDA memory shared; on the CPU another process may write to what is."""
    fused = pair(PROJECTION)[0].eval()
    x = block_input(PROJECTION)
    monkeypatch.setattr(torch.Tensor, "is_shared", lambda t: True)
    for on_cpu, count in ((True, 8), (False, 4)):
        monkeypatch.setattr(torch.Tensor, "is_cpu", on_cpu)
        folds.clear()
        with torch.no_grad():
            for _ in range(2):
                fused(x)
        assert len(folds) == count
