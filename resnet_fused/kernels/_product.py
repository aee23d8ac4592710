"""What the host side of the 1x1 products shares: sizes, flags, arithmetic and the walk over tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_fused.kernels._launch import multiprocessors, rows
from resnet_fused.tuning import ProductConfig


class Product(NamedTuple):
    """What a configuration of a 1x1 product is chosen for: (rows, depth) x (depth, columns)."""

    rows: int
    columns: int
    depth: int
    stride: int
    dtype: str
    # What is formed on the way in: "plain", "deferred"; dgrad: "plain", "masked", "affine" (a * dz' + b * y + c)
    reads: str
    # What happens on the way out: "plain", "statistics", "residual", "sums", "skip", "sums+skip"
    ends: str


def precision(dtype: torch.dtype) -> str:
    """How fp32 operands are multiplied: as TF32 where PyTorch's convolutions may, else as three TF32 products.

    The latter keeps 21 or more of fp32's 24 bits of a product, and the matrix units.
    """
    cudnn: Any = torch.backends.cudnn
    # The precision of convolutions alone: `allow_tf32` raises where it differs from that of recurrent networks.
    if dtype != torch.float32 or cudnn.conv.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3"


def fit(config: ProductConfig, columns: int, depth: int) -> tuple[int, int, int]:
    """The configuration's tile, no wider or deeper than the problem needs (powers of two from 16 on)."""
    return config.m, min(config.n, padded(columns)), min(config.k, padded(depth))


def padded(size: int) -> int:
    """The tile that holds ``size`` channels: a power of two, at least the 16 of a matrix instruction."""
    return max(16, triton.next_power_of_2(size))


def walkers(device: torch.device, config: ProductConfig, tiles: int, columns: int) -> int:
    """Programs that walk over the ``tiles`` of each of ``columns`` columns: all that run at once, no idle one."""
    return min(tiles, max(1, multiprocessors(device) * config.programs // columns))


def matrix(weight: Tensor) -> Tensor:
    """The (K, C) matrix of a (K, C, 1, 1) weight."""
    return weight.flatten(1).contiguous()


def row_groups(warps: int, rows: int, columns: int, dtype: torch.dtype) -> int:
    """How many rows of a (rows, columns) tile a program's threads access at once, 16 bytes each."""
    return min(rows, max(1, 32 * warps * (16 // dtype.itemsize) // columns))


def parts_at_once(warps: int, programs: int, columns: int) -> int:
    """How many programs' partial results of ``columns`` channels the last one reads at once: 32 values a thread."""
    return max(1, min(triton.next_power_of_2(programs), 1024 * warps // columns))


def described(matrix: Tensor, tile: tuple[int, int]) -> TensorDescriptor:
    """A matrix as tiles that the bulk copy engine moves, where the GPU has one."""
    return TensorDescriptor.from_tensor(matrix, list(tile))


def describable(config: ProductConfig, *matrices: Tensor | None) -> bool:
    """Whether the configuration asks for descriptors and these matrices can have them: rows of whole 16 bytes."""
    return config.descriptors and all(
        m is None or (m.shape[1] * m.dtype.itemsize % 16 == 0 and m.data_ptr() % 16 == 0) for m in matrices
    )


def is_bits(sign: Tensor | None) -> bool:
    """Whether a mask is packed."""
    return sign is not None and sign.dtype == torch.uint8


def mask_words(sign: Tensor | None, channels: int, tile: int) -> Tensor | None:
    """A mask as kernels read it, ``tile`` channels at once: bits in words of 32 where these fit, values as (M, C)."""
    if sign is None or not is_bits(sign):
        return None if sign is None else rows(sign)
    sign = sign.contiguous()
    whole = channels % 32 == 0 and tile % 32 == 0 and sign.storage_offset() % 4 == 0
    return sign.view(torch.int32) if whole else sign


def empty_activation(like: Tensor, channels: int, p: int, q: int) -> Tensor:
    """(N, channels, p, q) channels_last, dtype and device of ``like``."""
    shape = (like.shape[0], channels, p, q)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


# --- configurations ---------------------------------------------------------------------------------------------------


def product_candidates(problem: Product) -> tuple[ProductConfig, ...]:
    """Forward and dgrad.

    Two programs of four warps share a multiprocessor, or one of eight has it, with a tile of at most 128 x 128, so
    that accumulators, statistics and formed operands stay in registers; sums of dgrad leave room for 64 columns at
    128 rows. Three or four stages are what shared memory holds. The copy engine needs fewer registers and instructions
    for a tile, pointers reach the first bytes sooner.
    """
    formed = 2 if problem.reads in ("affine", "masked") else 1
    small = (64, 64, 64, 4, 3, 2)
    if problem.columns <= 64 and formed == 1:
        tiles = [(128, 64, 64, 4, 3, 2), (128, 64, 32, 4, 4, 2), small]
    elif problem.columns <= 64:
        tiles = [(128, 64, 64, 8, 3, 1), small, (64, 64, 32, 4, 4, 3)]
    elif "sums" in problem.ends and problem.dtype == "fp32":
        tiles = [(128, 64, 64, 8, 3, 1), small]
    elif "sums" in problem.ends:
        tiles = [(64, 128, 64, 4, 3, 2), (128, 64, 64, 8, 3, 1), (64, 128, 32, 4, 4, 2)]
    else:
        tiles = [(128, 128, 64, 8, 3, 1), (128, 128, 32, 8, 4, 1), (64, 128, 64, 4, 3, 2), small]
        if problem.ends == "plain" and problem.columns > 128 and formed == 1:
            tiles.append((128, 256, 64, 8, 3, 1))  # nothing but accumulators in registers
    descriptors = (False,) if problem.stride > 1 else (False, True)
    return tuple(_config(problem, formed, *tile, use) for tile in tiles for use in descriptors)


def _config(
    problem: Product, formed: int, m: int, n: int, k: int, warps: int, stages: int, programs: int, descriptors: bool
) -> ProductConfig:
    """A candidate with the shared memory that it needs: its stages, the result on its way out, what is added to it."""
    size = 4 if problem.dtype == "fp32" else 2
    k = 2 * k // size
    _, n, depth = fit(ProductConfig(m, n, k, warps, stages), problem.columns, problem.depth)
    added = 2 if problem.ends == "residual" else 1
    shared = stages * (formed * m + n) * depth * size + added * m * n * size
    # From sm_100 on a product's result lies in tensor memory, a row to a thread: sums over rows cross threads.
    crossing = n > 128 or (m * n > 64 * 64 and problem.ends == "statistics") or (m == 64 and formed == 2)
    until = 90 if crossing else 999
    return ProductConfig(m, n, k, warps, stages, programs, descriptors, shared // 1024 + 8, until=until)
