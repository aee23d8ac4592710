"""Statistics of a unit's output, handed to the unit that reads it.

A pre-activated unit normalises its input, which is the sum that the unit before wrote; the pass that wrote it has taken
its statistics already. They are kept beside the tensor, not on it: a tensor that is saved or copied knows nothing of
them. A write in place makes them void; one that PyTorch does not count, through ``.data`` or numpy, is not seen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from resnet_fused.operands import TileStatistics

_carried = WeakTensorKeyDictionary()


def hand_on(out: Tensor, tiles: TileStatistics) -> None:
    """Keep the statistics of ``out`` for as long as it lives."""
    if not out.is_inference():  # those have no version, so a write could not be told
        _carried[out] = (out._version, tiles)


def received(x: Tensor) -> TileStatistics | None:
    """The statistics of ``x`` if they were handed on and ``x`` is unchanged."""
    if torch.compiler.is_compiling() or x.is_inference():
        return None
    found = _carried.get(x)
    return None if found is None or found[0] != x._version else found[1]
