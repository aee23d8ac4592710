"""Shortcuts without parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PadShortcut", "check_count"]


def check_count(owner: str, name: str, value: int, minimum: int) -> None:
    """Raises TypeError or ValueError unless ``value`` is an int of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{owner}: expected {name} to be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{owner}: expected {name} to be at least {minimum}, got {value}")


class PadShortcut(nn.Module):
    """Option A: subsample, and append zero channels; no parameters.

    Equivalent: ``F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, out_channels - in_channels))``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, at least ``in_channels``; the added ones come last and are zero.
        stride: distance in pixels between the pixels that are kept; H becomes ceil(H / stride), as in a 3x3 convolution
            with padding 1.

    Raises:
        TypeError, ValueError: an argument is not an int, or out of range.

    Source: arXiv 1512.03385, section 3.3, option (A).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        check_count("PadShortcut", "in_channels", in_channels, 1)
        check_count("PadShortcut", "out_channels", out_channels, 1)
        check_count("PadShortcut", "stride", stride, 1)
        if out_channels < in_channels:
            raise ValueError(
                f"PadShortcut: expected out_channels to be at least in_channels = {in_channels}, got {out_channels}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Shortcut (N, out_channels, ceil(H / stride), ceil(W / stride)) of ``x`` (N, in_channels, H, W), any dtype.

        Raises ValueError for another shape.
        """
        # While tracing, a comparison of sizes would be baked in; a symbolic tracer's stand-in is no Tensor at all.
        if not torch.jit.is_tracing() and isinstance(x, Tensor) and (x.dim() != 4 or x.size(1) != self.in_channels):
            raise ValueError(
                f"PadShortcut: expected x to have shape (N, {self.in_channels}, H, W), got {list(x.shape)}"
            )
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.out_channels != self.in_channels:
            x = F.pad(x, (0, 0, 0, 0, 0, self.out_channels - self.in_channels))
        return x

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"
