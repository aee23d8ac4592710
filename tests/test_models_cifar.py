"""CIFAR networks: the zero-padding shortcut, shortcut options, depths, and the forward against the description."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from model_helpers import assert_computes_the_same, on_meta, seeded
from torch import nn

from resnet_fused import models


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (1, 5, 7, 9), (2, 5, 1, 1), (0, 5, 4, 4)], ids=str)
@pytest.mark.parametrize(("out_channels", "stride"), [(5, 1), (8, 1), (5, 2), (10, 2), (6, 3)])
def test_pad_shortcut(shape, out_channels, stride):
    x = torch.randn(shape, requires_grad=True)
    n, c, h, w = shape
    expected = torch.zeros(n, out_channels, -(-h // stride), -(-w // stride))
    expected[:, :c] = x.detach()[:, :, 0::stride, 0::stride]
    got = models.PadShortcut(c, out_channels, stride)(x)
    assert torch.equal(got, expected)
    # as large as what a 3x3 convolution of the same stride gives
    assert (
        got.shape[2:]
        == nn.functional.conv2d(torch.empty(1, 1, h, w), torch.empty(1, 1, 3, 3), None, stride, 1).shape[2:]
    )

    weight = torch.randn(expected.shape)
    got.backward(weight)
    gradient = torch.zeros(shape)
    gradient[:, :, ::stride, ::stride] = weight[:, :c]
    assert torch.equal(x.grad, gradient)


def test_pad_shortcut_keeps_dtype_and_layout():
    x = torch.randn(2, 4, 6, 6).to(torch.bfloat16, memory_format=torch.channels_last)
    got = models.PadShortcut(4, 8, 2)(x)
    assert got.dtype == torch.bfloat16
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_pad_shortcut_is_a_plain_module():
    shortcut = models.PadShortcut(16, 32, 2)
    assert repr(shortcut) == "PadShortcut(16, 32, stride=2)"
    assert not shortcut.state_dict()
    x = torch.randn(1, 16, 5, 5)
    for twin in (pickle.loads(pickle.dumps(shortcut)), copy.deepcopy(shortcut), torch.jit.script(shortcut)):
        assert torch.equal(twin(x), shortcut(x))
    assert torch.equal(torch.fx.symbolic_trace(shortcut)(x), shortcut(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((16, 8), ValueError, "PadShortcut: expected out_channels to be at least in_channels = 16, got 8"),
        ((0, 8), ValueError, "PadShortcut: expected in_channels to be at least 1, got 0"),
        ((16, 32, 0), ValueError, "PadShortcut: expected stride to be at least 1, got 0"),
        ((16, 32.0), TypeError, "PadShortcut: expected out_channels to be an int, got 32.0"),
        ((16, 32, (2, 2)), TypeError, "PadShortcut: expected stride to be an int, got (2, 2)"),
    ],
)
def test_pad_shortcut_refuses(arguments, error, message):
    with pytest.raises(error) as caught:
        models.PadShortcut(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (16, 4, 4)])
def test_pad_shortcut_refuses_input(shape):
    with pytest.raises(ValueError) as caught:
        models.PadShortcut(16, 32, 2)(torch.empty(shape))
    assert str(caught.value) == f"PadShortcut: expected x to have shape (N, 16, H, W), got {list(shape)}"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depth": 21}, ValueError, "expected depth to be 6n + 2 (20, 32, 44, 56, 110, 1202, ...), got 21"),
        ({"depth": 2}, ValueError, "expected depth to be at least 8, got 2"),
        ({"depth": 20.0}, TypeError, "expected depth to be an int, got 20.0"),
        ({"depth": 20, "shortcut": "a"}, ValueError, "expected shortcut to be one of A, B, C, got 'a'"),
        ({"depth": 20, "num_classes": 0}, ValueError, "expected num_classes to be at least 1, got 0"),
        (
            {"depth": 20, "shortcut": "D", "bottleneck": True},
            ValueError,
            "expected shortcut to be one of A, B, C, got 'D'",
        ),
        (
            {"depth": 1000, "bottleneck": True},
            ValueError,
            "expected depth to be 9n + 2 with bottlenecks (164, 1001, ...), got 1000",
        ),
        ({"depth": 8, "bottleneck": True}, ValueError, "expected depth to be at least 11, got 8"),
    ],
)
def test_cifar_refuses(arguments, error, message):
    with pytest.raises(error) as caught:
        models.cifar_resnet(**arguments)
    assert str(caught.value) == f"cifar_resnet: {message}"


def test_cifar_structure():
    model = on_meta(models.cifar_resnet110)
    assert model.depth == 110
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == [18, 18, 18]
    assert [stage[-1].conv2.out_channels for stage in (model.layer1, model.layer2, model.layer3)] == [16, 32, 64]
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == 110  # option A: no convolution on a shortcut
    assert repr(model.layer2[0].downsample) == "PadShortcut(16, 32, stride=2)"
    assert model.layer1[0].downsample is None
    assert model.layer2[1].downsample is None


def test_cifar_bottlenecks():
    model = on_meta(models.preact_resnet164)
    stages = (model.layer1, model.layer2, model.layer3)
    assert [len(stage) for stage in stages] == [18, 18, 18]
    widths = [[conv.out_channels for conv in (stage[-1].conv1, stage[-1].conv2, stage[-1].conv3)] for stage in stages]
    assert widths == [[16, 16, 64], [32, 32, 128], [64, 64, 256]]
    assert [stage[0].conv2.stride[0] for stage in stages] == [1, 2, 2]
    assert (model.head_norm.bn.num_features, model.fc.in_features) == (256, 256)


def test_cifar_shortcuts():
    def kinds(model):
        blocks = [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
        return "".join("-" if b.downsample is None else type(b.downsample).__name__[0] for b in blocks)

    assert kinds(models.cifar_resnet(14, shortcut="A")) == "--P-P-"
    assert kinds(models.cifar_resnet(14, shortcut="B")) == "--S-S-"
    assert kinds(models.cifar_resnet(14, shortcut="C")) == "SSSSSS"
    assert kinds(models.cifar_resnet(14)) == kinds(models.cifar_preact_resnet(14)) == "--P-P-"
    assert kinds(models.cifar_resnet(20, bottleneck=True)) == "S-S-S-"
    assert kinds(models.cifar_preact_resnet(20, bottleneck=True)) == "C-C-C-"  # the convolution without a norm
    assert kinds(models.cifar_resnet(20, bottleneck=True, shortcut="A")) == "P-P-P-"
    assert kinds(models.cifar_resnet(14, unit="bn_after_add", shortcut="C")) == "CCCCCC"
    assert kinds(models.cifar_resnet(14, mixing=models.mixing.no_shortcut(), shortcut="C")) == "------"


def test_cifar_initialisation():
    model = seeded(models.cifar_resnet, 8)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()


def cifar_by_hand(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The paper's network written as one expression after another, on the modules of ``model``."""
    x = torch.relu(model.bn1(model.conv1(x)))
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            shortcut = x if block.downsample is None else block.downsample(x)
            x = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
            x = torch.relu(x + shortcut)
    return model.fc(x.mean((2, 3)))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_cifar_forward(shortcut, train):
    """Against the paper's description written out; the odd size goes through padding and subsampling."""

    class ByHand(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return cifar_by_hand(self.model, x)

    ours = seeded(models.cifar_resnet, 14, shortcut=shortcut)
    assert_computes_the_same(ours, ByHand(copy.deepcopy(ours)), torch.randn(4, 3, 33, 33), train, fused=6)
