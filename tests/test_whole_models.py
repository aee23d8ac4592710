"""Whole networks against PyTorch's: three training steps and inference, in fp64 and in fp32.

fp64 leaves no room for another algorithm: whatever differs by more than rounding is wrong. In fp32 the measure is fp64:
our error may be twice PyTorch's plus a floor.
"""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from helpers import assert_close, assert_same_buffers, randn
from networks import paths_of, randomise
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet

from resnet_fused import fuse, models, report, unfuse

# 64 pixels leave 2 x 2 values in the last stage: with a batch of 4, 16 values per channel behind its statistics.
NETWORKS = {
    "torchvision-resnet18": lambda: resnet.resnet18(num_classes=10),
    "torchvision-resnet50": lambda: resnet.resnet50(num_classes=10),
    "torchvision-resnext": lambda: resnet.ResNet(resnet.Bottleneck, [1, 2, 1, 1], 10, groups=4, width_per_group=16),
    "torchvision-wide": lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], 10, width_per_group=128),
    "timm-resnet50d": lambda: timm.models.resnet.ResNet(
        timm.models.resnet.Bottleneck, (2, 1, 1, 1), 10, stem_width=32, stem_type="deep", avg_down=True
    ),
    "cifar-A": lambda: models.cifar_resnet(14, shortcut="A"),
    "cifar-C": lambda: models.cifar_resnet(8, shortcut="C"),
}
FP64 = 1e-10
FLOOR = 2e-6  # fp32: a few eps of the largest value


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(NETWORKS[name]())


def batch(model: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    size = 32 if isinstance(model, models.CifarResNet) else 64
    return randn(4, 3, size, size, dtype=dtype), torch.tensor([3, 1, 4, 1])


def plain_of(model: nn.Module) -> nn.Module:
    """A copy with the original classes (our own networks are built fused)."""
    return unfuse(copy.deepcopy(model))


def train(model: nn.Module, steps: int, dtype: torch.dtype = torch.float64) -> list[dict[str, torch.Tensor]]:
    """Logits, loss and gradients of every step of SGD with momentum.

    Random labels: at a learning rate of 2e-4 rounding already grows 25 times a step, in PyTorch's network as in ours.
    """
    x, target = batch(model, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-5, momentum=0.9, weight_decay=1e-4)
    seen = []
    for i in range(steps):
        optimizer.zero_grad()
        logits = model(x + 0.1 * i)
        loss = F.cross_entropy(logits, target)
        loss.backward()
        seen.append(
            {"logits": logits.detach(), "loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}
        )
        optimizer.step()
    return seen


@pytest.mark.parametrize("name", NETWORKS)
def test_fp64(name):
    plain = plain_of(network(name)).double()
    fused = fuse(copy.deepcopy(plain), strict=True)
    x, _ = batch(plain)
    assert set(paths_of(fused, x)) == {"train"}
    for i, (ours, theirs) in enumerate(zip(train(fused, 3), train(plain, 3), strict=True)):
        assert ours.keys() == theirs.keys()
        for key, exact in theirs.items():
            assert_close(ours[key], exact, FP64, f"step {i}, {key}")
    for (key, ours), exact in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert_close(ours, exact, FP64, key)
    assert_same_buffers(fused, plain, FP64)
    fused.eval(), plain.eval()
    with torch.no_grad():
        assert set(paths_of(fused, x)) == {"infer"}
        assert_close(fused(x), plain(x), FP64, "eval")
    assert set(paths_of(fused, x)) == {"train"}
    for ours, theirs in zip(train(fused, 1), train(plain, 1), strict=True):
        for key, exact in theirs.items():
            assert_close(ours[key], exact, FP64, f"eval with gradients, {key}")


def norm_error(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Root-mean-square error over all values, relative to the exact values' own."""
    difference = sum((a.double() - b).square().sum() for a, b in zip(ours, exact, strict=True))
    return (difference / sum(b.square().sum() for b in exact)).sqrt().item()


@pytest.mark.parametrize("name", ["torchvision-resnet18", "torchvision-resnet50", "timm-resnet50d"])
def test_fp32(name):
    """Against fp64; PyTorch's network in channels_last too, since memory formats have errors of their own."""
    plain = network(name)
    exact = copy.deepcopy(plain).double()
    plain.to(memory_format=torch.channels_last)
    fused = fuse(copy.deepcopy(plain), strict=True)
    found = {"fused": fused, "plain": plain, "exact": exact}
    results: dict[str, dict[str, list[torch.Tensor]]] = {}
    for key, model in found.items():
        dtype = torch.float64 if key == "exact" else torch.float32
        x, target = batch(model, dtype)
        with torch.no_grad():
            results[key] = {"eval": [model.eval()(x)]}
        # Frozen statistics: through batch statistics of 16 values rounding grows until it measures the network.
        logits = model(x)
        F.cross_entropy(logits, target).backward()
        results[key]["eval with gradients"] = [logits.detach()]
        results[key]["gradients"] = [p.grad for p in model.parameters()]
        with torch.no_grad():
            results[key]["train"] = [model.train()(x)]
        results[key]["statistics"] = [b for b in model.buffers() if b.is_floating_point()]
    for what, expected in results["exact"].items():
        ours, theirs = (norm_error(results[key][what], expected) for key in ("fused", "plain"))
        assert ours <= 2 * theirs + FLOOR, f"{what}: error {ours:.3g}, PyTorch's {theirs:.3g}"


def test_every_network_is_fused_whole():
    for name in NETWORKS:
        assert not report(fuse(network(name))).declined, name
