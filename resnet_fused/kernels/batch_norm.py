"""``batch_norm``: statistics of a tensor, tiles merged into a norm, and the coefficients of its backward.

All but the statistics work on vectors of C numbers and cost what a launch costs: one launch each, few arguments, the
results as rows of one tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused import tuning
from resnet_fused.kernels._device import arrives_last, merge_statistics
from resnet_fused.kernels._launch import (
    SHORT,
    cdiv,
    counters,
    is_wide,
    launch,
    multiprocessors,
    rows,
    unsupported,
    vector,
)
from resnet_fused.kernels.bn_add_relu_tiles import add_rows, merge_rows
from resnet_fused.tuning import RowsConfig

# --- statistics -----------------------------------------------------------------------------------------------------


@triton.jit
def statistics_kernel(
    y, part_mean, part_m2, arrivals, count, mean, m2, M, C, programs,
    ROWS: tl.constexpr, KEPT: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``mean[c] = sum_m y[m, c] / M``, ``m2[c] = sum_m (y[m, c] - mean[c])^2``.

    y: (M, C). part_mean, part_m2: (programs, C) fp32. arrivals: a counter for each block of channels. count: (1,)
    int32. mean, m2: (C,) fp32. A program: one block of channels, the tiles ``program, program + programs, ...``; KEPT
    threads side by side each merge the rows they hold, and the last program of a block merges all.

    Bytes: y once. Deviations are from a tile's own mean and merged as in Chan, Golub & LeVeque, so that a mean of many
    deviations costs no digits of M2.
    """
    blocks = tl.cdiv(C, CHANNELS)
    block = tl.program_id(0) % blocks
    program = tl.program_id(0) // blocks
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    there_c = c < C
    own_mean = tl.zeros((KEPT, CHANNELS), tl.float32)
    own_m2 = tl.zeros((KEPT, CHANNELS), tl.float32)
    seen = tl.zeros((KEPT, 1), tl.float32)
    for tile in range(program, tl.cdiv(M, ROWS), programs):
        m = tile * ROWS + tl.arange(0, ROWS)
        row = m.to(tl.int64) if WIDE else m
        there = (m < M)[:, None] & there_c[None, :]
        values = tl.load(y + row[:, None] * C + c[None, :], mask=there, other=0.0).to(tl.float32)
        own_mean, own_m2, seen = add_rows(own_mean, own_m2, seen, values, M - tile * ROWS, ROWS, KEPT, CHANNELS)
    program_mean, program_m2 = merge_rows(own_mean, own_m2, seen)
    tl.store(part_mean + program * C + c, program_mean, mask=there_c)
    tl.store(part_m2 + program * C + c, program_m2, mask=there_c)
    if arrives_last(arrivals + block, programs):
        merge_statistics(part_mean, part_m2, mean, m2, programs, M, C, c, there_c, ROWS, PARTS)
        if block == 0:
            tl.store(count, M)


# --- from tiles to a norm -------------------------------------------------------------------------------------------


@triton.jit
def _merged(count, mean, m2, tiles, C, c, there_c, TILES: tl.constexpr):
    """The number of values (int64), mean and M2 of all tiles, in a fixed order; a tile of count 0 is ignored."""
    number = tl.zeros((), tl.int64)
    merged = tl.zeros_like(c).to(tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        n = tl.load(count + tile, mask=tile < tiles, other=0)
        there = (n > 0)[:, None] & there_c[None, :]
        own = tl.load(mean + tile[:, None] * C + c[None, :], mask=there, other=0.0)
        merged += tl.sum(tl.where(there, own * n.to(tl.float32)[:, None], 0.0), axis=0)
        number += tl.sum(n.to(tl.int64), axis=0)
    merged /= tl.maximum(number, 1).to(tl.float32)
    deviation = tl.zeros_like(merged)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        n = tl.load(count + tile, mask=tile < tiles, other=0)
        there = (n > 0)[:, None] & there_c[None, :]
        at = tile[:, None] * C + c[None, :]
        delta = tl.load(mean + at, mask=there, other=0.0) - merged[None, :]
        own = tl.load(m2 + at, mask=there, other=0.0)
        deviation += tl.sum(tl.where(there, own + n.to(tl.float32)[:, None] * delta * delta, 0.0), axis=0)
    return number, merged, deviation


@triton.jit
def merge_kernel(count, mean, m2, merged_count, merged, tiles, C, TILES: tl.constexpr, CHANNELS: tl.constexpr):
    """``n = sum n_t``, ``mean = sum n_t mean_t / n``, ``M2 = sum M2_t + n_t (mean_t - mean)^2``.

    count: (T,) int32. mean, m2: (T, C) fp32. merged_count: (1,) int32. merged: (2, C) fp32, mean and M2. A program: one
    block of channels. Bytes: the tiles twice, the second time from a cache.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there_c = c < C
    number, mean_all, m2_all = _merged(count, mean, m2, tiles, C, c, there_c, TILES)
    tl.store(merged + c, mean_all, mask=there_c)
    tl.store(merged + C + c, m2_all, mask=there_c)
    if tl.program_id(0) == 0:
        tl.store(merged_count, number.to(tl.int32))


@triton.jit
def finalize_kernel(
    count, mean, m2, weight, bias, norm, eps, tiles, C,
    ONE_TILE: tl.constexpr, TILES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``rstd = (M2 / n + eps)^(-1/2)``, ``scale = weight * rstd``, ``shift = bias - mean * scale``.

    ``var = M2 / (n - 1)`` is unbiased. count: (T,) int32. mean, m2: (T, C) fp32. weight, bias: (C,) or None for
    1 and 0. norm: (5, C) fp32, rows scale, shift, mean, rstd, var. A program: one block of channels. Bytes: the tiles,
    once where there is one.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = c < C
    if ONE_TILE:
        n = tl.load(count).to(tl.float32)
        center = tl.load(mean + c, mask=there, other=0.0)
        deviation = tl.load(m2 + c, mask=there, other=1.0)
    else:
        number, center, deviation = _merged(count, mean, m2, tiles, C, c, there, TILES)
        n = number.to(tl.float32)
    rstd = tl.rsqrt(deviation / n + eps)
    scale = rstd if weight is None else tl.load(weight + c, mask=there, other=0.0).to(tl.float32) * rstd
    shift = -center * scale
    if bias is not None:
        shift += tl.load(bias + c, mask=there, other=0.0).to(tl.float32)
    tl.store(norm + c, scale, mask=there)
    tl.store(norm + C + c, shift, mask=there)
    tl.store(norm + 2 * C + c, center, mask=there)
    tl.store(norm + 3 * C + c, rstd, mask=there)
    tl.store(norm + 4 * C + c, deviation / (n - 1.0), mask=there)


# --- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def affine_coefficients(dbeta, dgamma, weight, mean, rstd, count, out, tiles, C, c, there):
    """Store ``a = weight * rstd``, ``b = -a * rstd * dgamma / n`` and ``c = a * (mean * rstd * dgamma - dbeta) / n``.

    dbeta, dgamma, mean, rstd: of the channels c. weight: (C,) or None. count: (T,) int32, n their sum. out: (3, C).
    """
    number = tl.zeros((), tl.int64)
    for tile in range(0, tiles):
        number += tl.load(count + tile)
    n = number.to(tl.float32)
    a = rstd if weight is None else tl.load(weight + c, mask=there, other=0.0).to(tl.float32) * rstd
    tl.store(out + c, a, mask=there)
    tl.store(out + C + c, -a * rstd * dgamma / n, mask=there)
    tl.store(out + 2 * C + c, a * (mean * rstd * dgamma - dbeta) / n, mask=there)


@triton.jit
def coefficients_kernel(dbeta, dgamma, weight, mean, rstd, count, out, tiles, C, CHANNELS: tl.constexpr):
    """``dy = a * dz + b * y + c`` under batch statistics: see :func:`affine_coefficients`; vectors (C,) fp32."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = c < C
    affine_coefficients(
        tl.load(dbeta + c, mask=there, other=0.0), tl.load(dgamma + c, mask=there, other=0.0), weight,
        tl.load(mean + c, mask=there, other=0.0), tl.load(rstd + c, mask=there, other=0.0),
        count, out, tiles, C, c, there,
    )  # fmt: skip


# --- configurations -------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What a configuration is chosen for: a matrix of values, or of tiles' statistics."""

    dtype: str
    rows: int  # M, or the number of tiles
    channels: int
    vectors: bool  # the work is on vectors: one program for each block of channels


def problem(op: str, *args: Tensor | float | None) -> Problem:
    """Of ``op`` on its arguments."""
    first = args[0]
    assert isinstance(first, Tensor)
    if op == "bn_statistics":
        channels = first.shape[1]
        return Problem(SHORT[first.dtype], first.numel() // channels, channels, False)
    if op == "bn_coefficients":
        return Problem("fp32", 1, first.shape[0], True)
    mean = args[1]
    assert isinstance(mean, Tensor)
    return Problem("fp32", mean.shape[0], mean.shape[1], True)


def _vector(dtype: str) -> int:
    """Elements of a 16-byte access."""
    return 4 if dtype == "fp32" else 8


def candidates(problem: Problem) -> tuple[RowsConfig, ...]:
    """For statistics the first has 24 warps on a multiprocessor, and four 16-byte loads of each thread in flight.

    Several programs, so that some load while others compute; few and large, since the last one merges all.
    """
    if problem.vectors:
        # Little to read and much latency: small blocks of channels, on many multiprocessors.
        return (RowsConfig(rows=1, channels=128, warps=4, programs=1),)
    channels = min(64, triton.next_power_of_2(problem.channels))
    vector = _vector(problem.dtype)
    shapes = ((8, 4, 3), (8, 2, 3), (8, 4, 2), (8, 8, 2), (4, 4, 4), (16, 4, 1))  # warps, loads of a thread, programs
    return tuple(
        RowsConfig(32 * warps * vector * loads // channels, channels, warps, programs)
        for warps, loads, programs in shapes
    )


def _choose(op: str, key: Problem, device: torch.device) -> tuple[RowsConfig, int]:
    """The configuration, and the channels of a program."""
    config = tuning.choose(op, key, device, candidates)
    assert isinstance(config, RowsConfig)
    return config, min(config.channels, triton.next_power_of_2(key.channels))


# --- ops ------------------------------------------------------------------------------------------------------------


def bn_statistics(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and M2 of one tile, all of ``y``."""
    values = rows(y)
    (m, channels), device = values.shape, values.device
    key = problem("bn_statistics", y)
    config, block = _choose("bn_statistics", key, device)
    blocks = cdiv(channels, block)
    programs = min(max(multiprocessors(device) * config.programs // blocks, 1), cdiv(m, config.rows))
    part_mean, part_m2 = torch.empty((2, programs, channels), dtype=torch.float32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    mean, m2 = (torch.empty((1, channels), dtype=torch.float32, device=device) for _ in range(2))
    launch(
        statistics_kernel, (blocks * programs,), warps=config.warps, y=values, part_mean=part_mean, part_m2=part_m2,
        arrivals=counters(device, blocks), count=count, mean=mean, m2=m2, M=m, C=channels, programs=programs,
        ROWS=config.rows, KEPT=min(config.rows, 32 * config.warps * _vector(key.dtype) // block), CHANNELS=block,
        PARTS=64, WIDE=is_wide(values),
    )  # fmt: skip
    return count, mean, m2


def _vectors(op: str, *args: Tensor | float | None) -> tuple[tuple[int], dict[str, int]]:
    """Grid of a kernel on vectors, and what it takes from its configuration."""
    key = problem(op, *args)
    first = args[0]
    assert isinstance(first, Tensor)
    config, block = _choose(op, key, first.device)
    return (cdiv(key.channels, block),), {"warps": config.warps, "C": key.channels, "CHANNELS": block}


_TILES = 16  # tiles read at once where there are several


def bn_merge(count: Tensor, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All tiles as one."""
    grid, sizes = _vectors("bn_merge", count, mean)
    merged_count = count.new_empty(1)
    merged = mean.new_empty((2, 1, mean.shape[1]))
    launch(
        merge_kernel, grid, count=count.contiguous(), mean=mean.contiguous(), m2=m2.contiguous(),
        merged_count=merged_count, merged=merged, tiles=mean.shape[0], TILES=_TILES, **sizes,
    )  # fmt: skip
    return merged_count, merged[0], merged[1]


def bn_finalize(
    count: Tensor, mean: Tensor, m2: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, ...]:
    """``(scale, shift, mean, rstd, var)``: biased variance in ``rstd``, unbiased in ``var``."""
    tiles, channels = mean.shape
    grid, sizes = _vectors("bn_finalize", count, mean)
    norm = mean.new_empty((5, channels))
    launch(
        finalize_kernel, grid, count=count.contiguous(), mean=mean.contiguous(), m2=m2.contiguous(),
        weight=vector(weight), bias=vector(bias), norm=norm, eps=eps, tiles=tiles, ONE_TILE=tiles == 1,
        TILES=_TILES, **sizes,
    )  # fmt: skip
    return norm.unbind()


def bn_coefficients(
    dbeta: Tensor, dgamma: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, count: Tensor
) -> tuple[Tensor, ...]:
    """``(a, b, c)`` of ``dy = a * dz + b * y + c``."""
    grid, sizes = _vectors("bn_coefficients", dbeta)
    out = mean.new_empty((3, mean.shape[0]))
    launch(
        coefficients_kernel, grid, dbeta=dbeta.contiguous(), dgamma=dgamma.contiguous(), weight=vector(weight),
        mean=mean.contiguous(), rstd=rstd.contiguous(), count=count.contiguous(), out=out, tiles=count.shape[0],
        **sizes,
    )  # fmt: skip
    return out.unbind()


def _unsupported(*args: Tensor | float | None) -> str | None:
    return unsupported(*(a for a in args if isinstance(a, Tensor)))


UNSUPPORTED = dict.fromkeys(("bn_statistics", "bn_merge", "bn_finalize", "bn_coefficients"), _unsupported)
