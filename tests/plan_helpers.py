"""Planned calls beside the same calls as they are written."""

from __future__ import annotations

import torch
from helpers import randn
from kernel_helpers import DEVICE
from torch import Tensor

from resnet_fused import plans


def kept() -> list[str]:
    """Sources of the plans that were made."""
    return [plan.source for plan in plans.plans() if plan.run is not None]


def reasons() -> list[str | None]:
    return [plan.reason for plan in plans.plans()]


def compare(function, static, *rounds) -> None:
    """Every round planned, bit for bit as written: the first two teach, the rest replay."""
    for tensors in rounds:
        copies = [None if t is None else t.clone() for t in tensors]
        expected = function(static, *copies)
        found = plans.call(function, static, tensors)
        assert len(found) == len(expected)
        for f, e in zip(found, expected, strict=True):
            assert (f is None) == (e is None)
            if f is not None:
                assert (f.dtype, f.shape, f.stride()) == (e.dtype, e.shape, e.stride())
                assert torch.equal(f, e)
        for t, changed in zip(tensors, copies, strict=True):  # what the function writes to, the plan writes to
            assert t is None or torch.equal(t, changed)


def draw(*shape: int, rounds: int = 4, **options) -> list[Tensor]:
    return [randn(*shape, seed=seed, device=DEVICE, **options) for seed in range(rounds)]
