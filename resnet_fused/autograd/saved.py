"""What autograd functions keep for backward, as flat lists of tensors and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from resnet_fused.autograd.layer import TENSORS, NormResult, NormSpec
from resnet_fused.operands import Norm, TileStatistics

RESULT = 5  # tensors kept of a NormResult
TILES = len(TileStatistics._fields)


def known(counts: Tensor | None, mean: Tensor | None, m2: Tensor | None) -> TileStatistics | None:
    """Statistics that came with an input, if they did."""
    return None if counts is None or mean is None or m2 is None else TileStatistics(counts, mean, m2)


def keep_parameters(norms: Sequence[NormSpec | None], flat: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Parameters for backward; running statistics that this batch is about to change play no part in it."""
    frozen = [norm is not None and norm.frozen for norm in norms]
    return [t if i % TENSORS < TENSORS - 2 or frozen[i // TENSORS] else None for i, t in enumerate(flat)]


def keep_results(results: Sequence[NormResult | None]) -> list[Tensor | None]:
    """RESULT tensors each: the norm and its counts."""
    return [t for r in results for t in ((None,) * RESULT if r is None else (*r.norm, r.counts))]


def found_results(flat: Sequence[Any]) -> list[NormResult | None]:
    """The inverse of :func:`keep_results`, without the variance."""
    return [
        None if flat[i] is None else NormResult(Norm(*flat[i : i + 4]), flat[i + 4], None)
        for i in range(0, len(flat), RESULT)
    ]
