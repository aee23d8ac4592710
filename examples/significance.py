"""Tests whether runs of two kinds differ by more than chance; each returns p, and what is below LEVEL is no chance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEVEL = 0.01


def larger(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """p of ``ours`` not being the larger ones (Mann and Whitney's test, exact)."""
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(ours, theirs, alternative="greater", method="exact").pvalue)


def sign_flips(differences: Tensor, allowed: Tensor) -> float:
    """p of pairs that have no favourite sign: the largest mean of a column, against the same with all choices of signs.

    No choice but all of them, hence exact: a column is measured in its root mean square, which no sign changes. A mean
    is lessened by ``allowed`` first, to 0 if it is smaller. NaN, of a run that diverged, gives 0.

    Args:
        differences: (pairs, columns), fp64; the columns of one pair change their signs together.
        allowed: (columns,), what no one minds.
    """
    differences = differences - differences.mean(0).clamp(-allowed, allowed)
    scaled = differences / differences.square().mean(0).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    signs = torch.cartesian_prod(*[differences.new_tensor([1, -1])] * len(differences))  # the first one is +1, +1, ...
    largest = (signs @ scaled).abs().amax(1)
    return (largest >= largest[0] * (1 - 1e-12)).double().mean().item()
