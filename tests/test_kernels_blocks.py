"""Whole blocks and units with every op in Triton, beside PyTorch's own modules: both in fp32 and fp16, against fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close, assert_no_worse, dtype_id, randn, randomise
from kernel_helpers import DEVICE, DTYPES
from torch import nn

from resnet_fused import (
    BasicBlock,
    BasicUnit,
    Bottleneck,
    BottleneckUnit,
    PReLUBlock,
    disabled,
    fuse,
    models,
    use_backend,
)
from resnet_fused.blocks import mixing
from resnet_fused.ops import bn_add_relu

PRODUCTS = DTYPES if DEVICE == "cuda" else (torch.float32, torch.float16)
FLOOR = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def projection(inplanes: int, planes: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


BLOCKS = {
    "basic": lambda: BasicBlock(16, 16),
    "basic projection": lambda: BasicBlock(16, 24, 2, projection(16, 24, 2)),
    "bottleneck": lambda: Bottleneck(32, 8),
    "bottleneck projection": lambda: Bottleneck(16, 8, 2, projection(16, 32, 2)),
    "bottleneck groups": lambda: Bottleneck(32, 8, groups=2, base_width=64),
    "prelu": lambda: PReLUBlock(16),
    "bn after add": lambda: BasicUnit(16, 16, unit="bn_after_add"),
    "relu before add": lambda: BottleneckUnit(32, 8, unit="relu_before_add"),
    "full pre-activation": lambda: BottleneckUnit(32, 8, unit="full_preact"),
    "full pre-activation, projection": lambda: BottleneckUnit(16, 8, 2, nn.Conv2d(16, 32, 1, 2), unit="full_preact"),
    "squeeze and excitation": lambda: BottleneckUnit(32, 8, mixing=mixing.SqueezeExcitation(32)),
}
BITS = ("basic projection", "bottleneck", "squeeze and excitation")


def pair(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The block in ``dtype`` with fp32 parameters of the norms, and its copy in fp64."""
    torch.manual_seed(0)
    exact = randomise(BLOCKS[name]()).double().to(DEVICE)
    block = copy.deepcopy(exact).to(dtype)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    return block, copy.deepcopy(block).double()


def step(block: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of a training step."""
    block.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    out = block(x)
    out.backward(randn(*out.shape, seed=9, dtype=out.dtype, device=DEVICE))
    grads = {name: p.grad for name, p in block.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **grads}


@pytest.fixture
def packed(monkeypatch):
    """The packed mask, as on a GPU."""
    monkeypatch.setattr(bn_add_relu, "_packs", lambda y: y.shape[1] % 8 == 0)


def compare_step(name: str, dtype: torch.dtype) -> None:
    block, exact = pair(name, dtype)
    x = randn(3, block_channels(name), 6, 7, seed=5, dtype=dtype, device=DEVICE)
    stock = copy.deepcopy(block)
    with use_backend("triton"):
        ours = step(block, x)
    with disabled():
        theirs, truth = step(stock, x), step(exact, x.double())
    assert ours.keys() == theirs.keys()
    for what, value in truth.items():
        assert_no_worse(ours[what], theirs[what], value, FLOOR[dtype], what)
    for (what, ours_), truth_ in zip(block.named_buffers(), exact.buffers(), strict=True):
        assert_close(ours_, truth_, FLOOR[dtype], what)


def block_channels(name: str) -> int:
    return next(m for m in BLOCKS[name]().modules() if isinstance(m, nn.Conv2d)).in_channels


@pytest.mark.parametrize("dtype", PRODUCTS, ids=dtype_id)
@pytest.mark.parametrize("name", BLOCKS)
def test_training_step(name, dtype):
    compare_step(name, dtype)


@pytest.mark.parametrize("name", BITS)
def test_training_step_with_packed_masks(name, packed):
    compare_step(name, torch.float16)


@pytest.mark.parametrize("dtype", PRODUCTS, ids=dtype_id)
@pytest.mark.parametrize("name", BLOCKS)
def test_inference(name, dtype):
    block, exact = pair(name, dtype)
    block.eval(), exact.eval()
    x = randn(2, block_channels(name), 5, 6, seed=5, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        with use_backend("triton"):
            ours = block(x)
        with disabled():
            theirs, truth = block(x), exact(x.double())
    assert_no_worse(ours, theirs, truth, FLOOR[dtype])


# --- whole networks ---------------------------------------------------------------------------------------------------


def network() -> tuple[nn.Module, nn.Module]:
    """A network with the stem, both shortcuts and a stride, fused, and its copy in fp64."""
    torch.manual_seed(0)
    model = models.ResNet(Bottleneck, [2, 1, 1, 1], width_per_group=8)
    model.layer3, model.layer4, model.fc = nn.Sequential(), nn.Sequential(), nn.Linear(512, 5)
    model = randomise(model).to(DEVICE)
    return fuse(model), copy.deepcopy(model).double()


def test_training_step_of_a_network():
    model, exact = network()
    x = randn(3, 3, 24, 33, seed=5, dtype=torch.float32, device=DEVICE)
    stock = copy.deepcopy(model)
    with use_backend("triton"):
        ours = step(model, x)
    with disabled():
        theirs, truth = step(stock, x), step(exact, x.double())
    for what, value in truth.items():
        assert_no_worse(ours[what], theirs[what], value, 1e-4, what)


def test_inference_of_a_network():
    model, exact = network()
    model.eval(), exact.eval()
    x = randn(2, 3, 24, 33, seed=5, dtype=torch.float32, device=DEVICE)
    with torch.no_grad():
        with use_backend("triton"):
            ours = model(x)
        with disabled():
            assert_no_worse(ours, model(x), exact(x.double()), 1e-5)
