"""What this machine's memory and matrix units reach, measured in the run that is held against it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from resnet_fused.cli import timing

_ROUNDS = 10
_COPY_BYTES = {"cuda": 2 * 2**30, "cpu": 64 * 2**20}  # far beyond the caches
_MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}


class Rates(NamedTuple):
    """Ceilings of one device for one dtype."""

    bytes_per_s: float  # of a copy, read and written bytes counted
    flop_per_s: float  # of a square matrix product of random values

    def bound_s(self, moved: int, flops: int) -> float:
        """The least time for ``moved`` bytes and ``flops``, each perfectly overlapped with the other."""
        return max(moved / self.bytes_per_s, flops / self.flop_per_s)


@functools.cache
def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a device-to-device copy: the median of several, in steady state."""
    source = torch.randint(256, (_COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median(lambda: target.copy_(source), device)


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product; fp32 as PyTorch's convolutions run it, so in TF32 where that is allowed."""
    size = _MATMUL_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        return 2 * size**3 / _median(lambda: a @ b, device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = kept


def rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Both ceilings, measured when first asked for."""
    return Rates(copy_rate(device), matmul_rate(device, dtype))


def _median(call: timing.Call, device: torch.device) -> float:
    for _ in range(3):
        call()
    return timing.interleave({"call": call}, _ROUNDS, device)["call"].median
