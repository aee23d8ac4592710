"""A small residual network trained on real images twice from one seed, fused and unfused: the demo's last part.

The data are the 1,797 scanned digits of 8x8 pixels that scikit-learn ships (UCI optical recognition of handwritten
digits): 1,347 to train on, 450 to test on.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resnet_fused

DEPTH = 8
EPOCHS = 10
ACCURACY = 0.97
"""What both runs must reach on the test images."""
_BATCH = 64
_RATE = 0.1
_SEED = 0


@dataclass(frozen=True)
class Data:
    """Images (N, 3, 8, 8) fp32 with mean 0 and deviation 1 over the training part, labels (N,)."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Curve:
    """One training run."""

    losses: list[float]  # one a step
    accuracies: list[float]  # on the test images, one an epoch

    @property
    def accuracy(self) -> float:
        return self.accuracies[-1]


def load() -> Data:
    """The digits, one grey channel repeated to three, split by a fixed permutation."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1)
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SEED))
    cut = len(labels) * 3 // 4
    mean, deviation = images[order[:cut]].mean(), images[order[:cut]].std()
    images = ((images - mean) / deviation).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    return Data(images[order[:cut]], labels[order[:cut]], images[order[cut:]], labels[order[cut:]])


def network() -> nn.Module:
    """The CIFAR ResNet of :mod:`resnet_fused.models`, its blocks fused, from a fixed seed."""
    torch.manual_seed(_SEED)
    return resnet_fused.models.cifar_resnet(DEPTH).to(memory_format=torch.channels_last)


def train(model: nn.Module, data: Data, epochs: int, advance: Callable[[], None]) -> Curve:
    """SGD with momentum and one cycle of the learning rate; the same batches in the same order for every model."""
    optimizer = torch.optim.SGD(model.parameters(), _RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = len(data.y) // _BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=epochs * steps)
    generator = torch.Generator().manual_seed(_SEED)
    losses, accuracies = [], []
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(data.y), generator=generator)
        for i in range(steps):
            chosen = order[i * _BATCH : (i + 1) * _BATCH]
            loss = F.cross_entropy(model(data.x[chosen]), data.y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        accuracies.append(accuracy(model, data))
        advance()
    return Curve(losses, accuracies)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Share of the test images that ``model`` names rightly, in eval mode."""
    return (model.eval()(data.test_x).argmax(1) == data.test_y).double().mean().item()


def both(epochs: int, advance: Callable[[str], None]) -> dict[str, Curve]:
    """Train the fused network and its unfused twin: the same weights, batches and schedule, on one thread.

    With images of 8x8 pixels a second thread has nothing to do, and on a busy machine the first one waits for it.
    """
    data = load()
    fused = network()
    unfused = resnet_fused.unfuse(copy.deepcopy(fused))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {
            name: train(model, data, epochs, functools.partial(advance, f"digits: training {name}"))
            for name, model in (("fused", fused), ("unfused", unfused))
        }
    finally:
        torch.set_num_threads(threads)


def draw(curves: dict[str, Curve], path: Path) -> None:
    """Write a PNG with the losses of both runs, and with their test accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    styles: dict[str, dict[str, Any]] = {
        "unfused": {"color": "tab:orange", "linewidth": 3.5, "alpha": 0.6},
        "fused": {"color": "tab:blue", "linewidth": 1.2},
    }
    for name, style in styles.items():
        curve = curves[name]
        epochs = len(curve.accuracies)
        left.plot(range(1, len(curve.losses) + 1), curve.losses, label=name, **style)
        right.plot(
            range(1, epochs + 1), [100 * a for a in curve.accuracies], label=f"{name}: {curve.accuracy:.1%}", **style
        )
    left.set(xlabel="step", ylabel="training loss (cross-entropy)", yscale="log", title="One seed, fused and unfused")
    right.axhline(100 * ACCURACY, color="0.5", linestyle=":", linewidth=1)
    right.set(xlabel="epoch", ylabel="test accuracy, %", title=f"450 test digits; dotted: {ACCURACY:.0%}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"ResNet-{DEPTH} on scikit-learn's 8x8 digits")
    figure.savefig(path, dpi=120)
    plt.close(figure)
