"""Dtypes and memory formats: what the ops take, and what PyTorch's modules would give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def operand_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the convolutions read ``x``: autocast's where it is on, ``x``'s otherwise."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def is_channels_last(t: Tensor) -> bool:
    """Whether the strides say channels_last (and not both formats at once)."""
    return t.stride(1) == 1 and t.stride(3) == t.shape[1] and t.shape[1] > 1


def eager_format(x: Tensor, chain: Any) -> torch.memory_format:
    """The memory format of PyTorch's convolutions: channels_last as soon as input or a weight is."""
    if is_channels_last(x) or any(is_channels_last(conv.weight) for conv, _ in chain):
        return torch.channels_last
    return torch.contiguous_format


def like_eager(out: Tensor, x: Tensor, chain: Any) -> Tensor:
    """``out``, which is channels_last, in the memory format of PyTorch's convolutions."""
    return out if eager_format(x, chain) == torch.channels_last else out.contiguous()
