"""Pairs of a fused and an unfused whole model, and the comparison of what they infer."""

from __future__ import annotations

import copy

import torch
from helpers import assert_close
from networks import paths_of, tiny
from torch import nn

from resnet_fused import disabled, fuse

TOLERANCE = 1e-10  # fp64
FUSED_OPS = "torch.ops.resnet_fused"


def pair(kind: str = "bottleneck", **options) -> tuple[nn.Module, nn.Module]:
    """(fused, plain) with the same state."""
    plain = tiny(kind, **options)
    return fuse(copy.deepcopy(plain)), plain


def short_pair(kind: str = "bottleneck") -> tuple[nn.Module, nn.Module]:
    """(fused, plain) of the stem and one block: compiling takes its time."""
    plain = tiny(kind)
    plain.layer1, plain.layer2 = nn.Sequential(plain.layer1[0]), nn.Sequential()
    if kind == "basic":
        plain.fc = nn.Linear(4, 5).double()
    return fuse(copy.deepcopy(plain)), plain


def same_inference(ours, theirs, x: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    with torch.no_grad():
        assert_close(ours(x), theirs(x), tolerance)


def refreshed(model: nn.Module, x: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """What the model computes without gradients now is what its original modules compute now."""
    with torch.no_grad():
        ours = model(x)
        with disabled():
            assert_close(ours, model(x), tolerance)
        assert set(paths_of(model, x)) == {"infer"}  # last: explain() runs on copies of the buffers
