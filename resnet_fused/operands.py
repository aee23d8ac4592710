"""The operands that blocks, autograd functions and ops exchange.

All activations are 4-d ``(N, C, H, W)`` tensors in the channels_last memory format; ``M = N*H*W``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Deferred(NamedTuple):
    """A tensor with its pending normalisation: it stands for ``act(y * scale + shift)``.

    ``act`` is the ReLU, or with ``slope`` the PReLU: ``z`` where ``z > 0``, else ``slope * z``.
    """

    y: Tensor  # (N, C, H, W), a convolution's output
    scale: Tensor  # (C,) fp32 (fp64 for an fp64 y)
    shift: Tensor  # (C,) as scale
    slope: Tensor | None = None  # (C,) as scale


class TileStatistics(NamedTuple):
    """Per-tile mean and sum of squared deviations of a convolution's output; a tile of count 0 is ignored."""

    counts: Tensor  # (T,) int32, values per channel in each tile
    mean: Tensor  # (T, C) fp32 (fp64 for an fp64 output)
    m2: Tensor  # (T, C) as mean


class Norm(NamedTuple):
    """A batch norm resolved to numbers: ``bn(y) = y * scale + shift``, ``xhat = (y - mean) * rstd``."""

    scale: Tensor  # (C,) gamma * rstd
    shift: Tensor  # (C,) beta - mean * scale
    mean: Tensor  # (C,)
    rstd: Tensor  # (C,)


class Gradient(NamedTuple):
    """The gradient of a convolution's output: ``dy = a * dz' + b * y + c``, never written to memory.

    ``dz'`` is ``dz`` where the ReLU after the block's sum let the value through, else 0; ``sign`` says where. It is
    None (``dz`` is masked already), the packed 1-bit mask (uint8), or the block's output itself (its sign is the mask).
    Batch statistics: all of a, b, c. Frozen statistics: ``b``, ``c`` and ``y`` are None.
    """

    dz: Tensor  # (N, K, P, Q)
    sign: Tensor | None = None  # (ceil(M*K/8),) uint8, or (N, K, P, Q) floating
    y: Tensor | None = None  # (N, K, P, Q)
    a: Tensor | None = None  # (K,) fp32 (fp64)
    b: Tensor | None = None  # (K,)
    c: Tensor | None = None  # (K,)


class Mix(NamedTuple):
    """The weights of a block's sum: ``(branch + branch_gate * gate) * F + (shortcut + shortcut_gate * gate) * S``.

    ``gate`` is a tensor that broadcasts against the sum; it is read where one of the two gate weights is not 0. A
    shortcut whose two weights are 0 is not read: an infinite value in it counts for nothing.
    """

    branch: float = 1.0
    branch_gate: float = 0.0
    shortcut: float = 1.0
    shortcut_gate: float = 0.0

    @property
    def gated(self) -> bool:
        return self.branch_gate != 0 or self.shortcut_gate != 0


class Conv(NamedTuple):
    """Geometry of a square convolution without bias; padding is ``dilation * (kernel - 1) // 2``."""

    stride: int = 1
    dilation: int = 1
    groups: int = 1
