"""Comparisons of this package's blocks with torchvision's, and the cases that tests of blocks pick."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import BLOCKS
from helpers import assert_close, assert_same_buffers, assert_same_step, step
from torch import Tensor, nn

from resnet_fused.blocks.paths import recording

EXACT = 1e-10
IDENTITY, PROJECTION = BLOCKS[4], BLOCKS[6]
BASIC = BLOCKS[1]
every_case = pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.id)
some_cases = pytest.mark.parametrize("case", [BLOCKS[0], BASIC, IDENTITY, PROJECTION], ids=lambda case: case.id)


def paths_of(block: nn.Module, x: Tensor) -> list[tuple[str, str | None]]:
    """Path and reason's code of every call that one forward makes."""
    with recording() as calls:
        block(x)
    return [(call.path, call.reason and call.reason.code) for call in calls]


def norms_of(block: nn.Module) -> list[nn.Module]:
    return [m for m in block.modules() if hasattr(m, "running_mean")]


def assert_same_training(
    fused: nn.Module, plain: nn.Module, x: Tensor, steps: int = 1, tolerance: float = EXACT
) -> None:
    """Outputs, gradients, parameters and buffers over several steps of SGD; the fused path was taken."""
    assert [path for path, _ in paths_of(copy.deepcopy(fused), x)] == ["train"]
    optimizers = [torch.optim.SGD(block.parameters(), lr=1e-3, momentum=0.9) for block in (fused, plain)]
    for i in range(steps):
        assert_same_step(*(step(block, x + 0.1 * i) for block in (fused, plain)), tolerance)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_buffers(fused, plain, tolerance)
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert_close(ours, theirs, tolerance, name)


def assert_same_inference(fused: nn.Module, plain: nn.Module, x: Tensor, path: str = "infer") -> None:
    fused.eval()
    plain.eval()
    before = copy.deepcopy(fused.state_dict())
    with torch.no_grad():
        assert [found for found, _ in paths_of(fused, x)] == [path]
        assert_close(fused(x), plain(x), EXACT)
    assert all(torch.equal(value, before[key]) for key, value in fused.state_dict().items())


NORM_LAYERS = {
    "momentum-none": lambda channels: nn.BatchNorm2d(channels, momentum=None),
    "momentum-1": lambda channels: nn.BatchNorm2d(channels, momentum=1.0),
    "momentum-0": lambda channels: nn.BatchNorm2d(channels, momentum=0.0),
    "untracked": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
    "not-affine": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "eps": lambda channels: nn.BatchNorm2d(channels, eps=0.1),
    "bare": lambda channels: nn.BatchNorm2d(channels, affine=False, track_running_stats=False),
    "sync": nn.SyncBatchNorm,
}
