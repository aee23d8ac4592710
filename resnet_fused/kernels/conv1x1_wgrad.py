"""Gradient of a 1x1 convolution's weight: a product over all pixels, split among programs, merged in a fixed order."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels._device import prelu, relu
from resnet_fused.kernels._launch import SHORT, cdiv, is_wide, launch, multiprocessors, rows, vector
from resnet_fused.kernels._operands import input_rows, load_mask, load_tile, load_vector, read_gradient, within
from resnet_fused.kernels._product import mask_words, padded, precision
from resnet_fused.tuning import ProductConfig


@triton.jit
def load_columns(pointer, rows, channels, C, rows_there, channels_there):
    """A transposed tile of a (M, C) matrix: (CHANNELS, ROWS)."""
    at = rows[None, :] * C + channels[:, None]
    return tl.load(pointer + at, mask=rows_there[None, :] & channels_there[:, None], other=0)


@triton.jit
def read_columns(x, scale, shift, slope):
    """``_operands.read_input`` of a transposed tile. x: (CHANNELS, ROWS)."""
    if scale is None:
        read = x
    else:
        z = x.to(tl.float32) * scale[:, None] + shift[:, None]
        if slope is None:
            z = relu(z)
        else:
            z = prelu(z, slope[:, None])
        read = z.to(x.dtype)
    return read


@triton.jit
def wgrad_kernel(
    dz, sign, y, a, b, c, x, scale, shift, slope, out,
    M, K, C, splits, P, Q, H, W,
    DTYPE: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    BC: tl.constexpr, EVEN_M: tl.constexpr, EVEN_K: tl.constexpr, EVEN_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``out[s, k, c] = sum of dy[m, k] * act(x[row(m), c] * scale[c] + shift[c])`` over the rows m of split s.

    dz, y, and sign if it is values: (M, K), M = images * P * Q. sign if packed: (M, K / 8) uint8 or (M, K / 32) int32.
    x: (images * H * W, C). Vectors fp32. ``dy = a * dz' + b * y + c``. out: (splits, K, C), fp32 or, of one split, dW.

    A program owns a (BK, BC) tile of dW and every ``splits``-th step of BM rows. The tiles of one split run side by
    side and share their rows through the second-level cache.

    The accumulator is the transposed tile, and x is read as transposed: then the activated input goes from shared
    memory through registers into the matrix units as their first operand, and only dy, whose tile is the more costly
    one to form, returns to shared memory as the second.

    Bytes: dz, y, sign once for each tile of C, x once for each tile of K (from memory once), out once.
    Both operands are rounded to the weight's dtype, as if they were written; sums are fp32.
    """
    tiles_c = tl.cdiv(C, BC)
    tiles = tl.cdiv(K, BK) * tiles_c
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    first = tile // tiles_c * BK
    k = first + tl.arange(0, BK)
    n = tile % tiles_c * BC + tl.arange(0, BC)
    k_there, n_there = within(k, K, EVEN_K), within(n, C, EVEN_C)
    own_a = load_vector(a, k, k_there)
    own_b = load_vector(b, k, k_there)
    own_c = load_vector(c, k, k_there)
    own_slope = load_vector(slope, n, n_there)
    own_scale = load_vector(scale, n, n_there)
    own_shift = load_vector(shift, n, n_there)
    acc = tl.zeros((BC, BK), tl.float32)
    for step in range(split, tl.cdiv(M, BM), splits):
        m = step * BM + tl.arange(0, BM)
        m_there = within(m, M, EVEN_M)
        row = input_rows(m, P, Q, H, W, STRIDE)
        if WIDE:
            m, row = m.to(tl.int64), row.to(tl.int64)
        own_dz = load_tile(dz, m, k, K, m_there, k_there)
        passed = load_mask(sign, m, first, K, m_there, BK, EVEN_K)
        own_y = None if y is None else load_tile(y, m, k, K, m_there, k_there)
        dy = read_gradient(own_dz, passed, own_y, own_a, own_b, own_c, DTYPE)
        if not EVEN_M:
            dy = tl.where(m_there[:, None], dy, 0.0)
        own_x = load_columns(x, row, n, C, m_there, n_there)
        own_x = read_columns(own_x, own_scale, own_shift, own_slope)
        acc = tl.dot(own_x, dy, acc, input_precision=PRECISION)
    at = split.to(tl.int64) * K * C + k[:, None] * C + n[None, :]
    tl.store(out + at, tl.trans(acc), mask=k_there[:, None] & n_there[None, :])


@triton.jit
def merge_kernel(part, out, splits, SIZE, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """``out[i] = sum over s of part[s, i]``, in a fixed order. part: (splits, SIZE) fp32. out: (SIZE,).

    A program sums BLOCK values, PARTS splits at once. Bytes: part once, from the second-level cache.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, splits, PARTS):
        s = first + tl.arange(0, PARTS)
        at = s.to(tl.int64)[:, None] * SIZE + i[None, :]
        total += tl.sum(tl.load(part + at, mask=(s < splits)[:, None] & (i < SIZE)[None, :], other=0.0), axis=0)
    tl.store(out + i, total, mask=i < SIZE)


# --- the host side ----------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What a configuration of the weight's gradient depends on."""

    rows: int  # N * P * Q
    k: int
    c: int
    stride: int
    dtype: str
    y: bool  # dy is formed from two tensors
    sign: str  # none, bits, values
    deferred: bool
    slope: bool


def problem(dz, sign, y, a, b, c, weight, x, scale, shift, slope, stride, dilation, groups, dtype) -> Problem:
    """The key of :func:`candidates` for the arguments of :func:`wgrad`."""
    form = "none" if sign is None else "bits" if sign.dtype == torch.uint8 else "values"
    k, c = weight.shape[:2]
    m = dz.numel() // k
    return Problem(m, k, c, stride, SHORT[weight.dtype], y is not None, form, scale is not None, slope is not None)


# The accumulators of a large tile take half of the registers: one program fills a multiprocessor. Several programs of a
# small one overlap one's products with another's loads. Of one tile the shallow step comes first: it fits into the
# shared memory of every GPU, and two steps in flight already cover the memory's latency.
_CONFIGS = (
    #             K    C    rows warps stages programs
    ProductConfig(128, 256, 32, 8, 3, since=90),
    ProductConfig(128, 256, 64, 8, 3, since=90),
    ProductConfig(256, 128, 32, 8, 3, since=90),
    ProductConfig(128, 128, 32, 8, 3, 2),
    ProductConfig(128, 128, 64, 8, 3),
    ProductConfig(256, 64, 32, 8, 3),
    ProductConfig(256, 64, 64, 8, 3),
    ProductConfig(64, 256, 32, 8, 3, 2),
    ProductConfig(64, 256, 64, 8, 3),
    ProductConfig(64, 64, 64, 4, 3, 3),
    ProductConfig(64, 64, 32, 4, 3, 4),
)
# Elements are twice as large, and three products of TF32 keep two parts of each operand.
_CONFIGS_FP32 = (
    ProductConfig(128, 128, 16, 8, 3),
    ProductConfig(256, 64, 16, 8, 3),
    ProductConfig(64, 256, 16, 8, 3),
    ProductConfig(64, 64, 32, 4, 3, 3),
    ProductConfig(64, 64, 16, 4, 3, 3),
)


def candidates(problem: Problem) -> tuple[ProductConfig, ...]:
    """The tiles that read least come first: dy once for each tile of C, x once for each tile of K."""
    k, c = max(64, problem.k), max(64, problem.c)
    tensors, single = 1 + problem.y + (problem.sign == "values"), problem.dtype == "fp32"

    def traffic(config: ProductConfig) -> int:
        return tensors * k * cdiv(c, config.n) + c * cdiv(k, config.m)

    def sized(config: ProductConfig) -> ProductConfig:
        """With the loads of all stages but one, and the formed dy; a plain x is read in place, two parts are formed."""
        size = 4 if single else 2
        loaded = size * (tensors * config.m + config.n) + config.m // 8
        formed = size * (config.m * (1 + single) + (0 if problem.deferred and not single else config.n))
        shared = config.k * ((config.stages - 1) * loaded + formed)
        return dataclasses.replace(config, shared=cdiv(shared, 1024) + 1)

    offered = _CONFIGS_FP32 if single else _CONFIGS
    fitting = (config for config in offered if config.m < 2 * k and config.n < 2 * c)
    return tuple(sized(config) for config in sorted(fitting, key=traffic)[:8])


def empty_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the weight's gradient, in the weight's memory format; for 1x1 both are a (K, C) matrix."""
    memory_format = torch.contiguous_format if weight.is_contiguous() else torch.channels_last
    return torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=memory_format)


def merge(part: Tensor, out: Tensor) -> None:
    """The sum of the (splits, K * C) partial results into ``out``; enough programs to share the work evenly."""
    block = 64 if out.numel() <= 2**16 else 256
    launch(
        merge_kernel, (cdiv(out.numel(), block),), warps=4, part=part, out=out, splits=part.shape[0], SIZE=out.numel(),
        BLOCK=block, PARTS=4096 // block,  # 32 values a thread
    )  # fmt: skip


def wgrad(
    config: ProductConfig, dz, sign, y, a, b, c, weight, x, scale, shift, slope, stride, dilation, groups, dtype
) -> Tensor:
    """Gradient of the weight in ``dtype``: the op ``conv1x1_wgrad``."""
    k, channels = weight.shape[:2]
    m = dz.numel() // k
    bk, bc = (min(tile, padded(n)) for tile, n in ((config.m, k), (config.n, channels)))
    tiles = cdiv(k, bk) * cdiv(channels, bc)
    splits = max(1, multiprocessors(dz.device) * config.programs // tiles)
    splits = min(splits, cdiv(m, config.k))
    dw = empty_weight(weight, dtype)
    part = dw if splits == 1 else torch.empty((splits, k * channels), dtype=torch.float32, device=dz.device)
    launch(
        wgrad_kernel, (tiles * splits,), warps=config.warps, stages=config.stages,
        dz=rows(dz), sign=mask_words(sign, k, bk), y=None if y is None else rows(y),
        a=vector(a), b=vector(b), c=vector(c),
        x=rows(x), scale=vector(scale), shift=vector(shift), slope=vector(slope), out=part,
        M=m, K=k, C=channels, splits=splits, P=dz.shape[2], Q=dz.shape[3], H=x.shape[2], W=x.shape[3],
        DTYPE=getattr(tl, str(weight.dtype).removeprefix("torch.")), STRIDE=stride, PRECISION=precision(weight.dtype),
        BM=config.k, BK=bk, BC=bc, EVEN_M=m % config.k == 0, EVEN_K=k % bk == 0, EVEN_C=channels % bc == 0,
        WIDE=is_wide(dz, x),
    )  # fmt: skip
    if splits > 1:
        merge(part, dw)
    return dw
