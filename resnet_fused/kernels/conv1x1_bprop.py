"""Both gradients of a narrow 1x1 convolution in one kernel: what the two products share is read and formed once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels._device import arrives_last, sum_partials
from resnet_fused.kernels._launch import SHORT, cdiv, counters, is_wide, launch, multiprocessors, rows, vector
from resnet_fused.kernels._operands import load_mask, load_tile, load_vector, read_gradient, within
from resnet_fused.kernels._product import mask_words, matrix, padded, parts_at_once
from resnet_fused.kernels.conv1x1_wgrad import (
    empty_weight,
    load_columns,
    merge,
    read_columns,
)
from resnet_fused.tuning import ProductConfig


@triton.jit
def _fold(v, ROWS: tl.constexpr):
    """(BM, C) to (ROWS, C): the sums over rows that one thread holds, where ROWS is less than BM."""
    if ROWS < v.shape[0]:
        v = tl.sum(tl.reshape(v, (v.shape[0] // ROWS, ROWS, v.shape[1])), axis=0)
    return v


@triton.jit
def bprop_kernel(
    dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd, skip, skip_sign,
    dx, part_dw, part_sums, arrivals, dbeta, dgamma, dslope,
    M, K, C, programs, skip_scale,
    STAGES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr, FOLDED: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_K: tl.constexpr, EVEN_C: tl.constexpr, WIDE: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """``dx = dy @ weight + skip_scale * skip'``, back through ``act(x * scale + shift)``; ``dw = dy.T @ act(...)``.

    dz, y, sign if it is values: (M, K). x, skip, dx: (M, C). weight: (K, C). Packed masks: (M, channels / 8) uint8 or
    (M, channels / 32) int32. Vectors fp32. ``dy = a * dz' + b * y + c``. part_dw: (programs, K, C) fp32. part_sums:
    (3, programs, C) fp32. dbeta, dgamma, dslope: (C,), of the rounded dx, dx and the unrounded gradient.

    A program walks over tiles of BM rows, ``program, program + programs, ...``. It holds the whole weight in shared
    memory and the whole of its share of dW in registers. dy is formed once and lies in shared memory for both products:
    they are taken transposed (dx.T = weight.T dy.T, dW.T = x.T dy), so that dy is the second operand of each. The last
    program to arrive merges the sums; dW is merged by a kernel of its own, by all multiprocessors.

    Bytes: dz, y, sign, x, skip, skip_sign once, dx once, part_dw once. A deferred x comes twice, once transposed, the
    second time from the caches.
    """
    program = tl.program_id(0)
    k, n = tl.arange(0, BK), tl.arange(0, BC)
    k_there, n_there = within(k, K, EVEN_K), within(n, C, EVEN_C)
    own_a = load_vector(a, k, k_there)
    own_b = load_vector(b, k, k_there)
    own_c = load_vector(c, k, k_there)
    own_slope = load_vector(slope, n, n_there)
    own_scale = load_vector(scale, n, n_there)
    own_shift = load_vector(shift, n, n_there)
    own_mean = load_vector(mean, n, n_there)
    own_rstd = load_vector(rstd, n, n_there)
    w = load_tile(weight, k, n, C, k_there, n_there)
    dw = tl.zeros((BC, BK), tl.float32)
    sum_beta = tl.zeros((FOLDED, BC), tl.float32)
    sum_gamma = tl.zeros((FOLDED, BC), tl.float32)
    sum_slope = tl.zeros((FOLDED, BC), tl.float32)
    # The number of stages is asked for here, so that all loads are pipelined, not only those of the products.
    for tile in tl.range(program, tl.cdiv(M, BM), programs, num_stages=STAGES):
        m = tile * BM + tl.arange(0, BM)
        m_there = within(m, M, EVEN_M)
        row = m.to(tl.int64) if WIDE else m
        own_dz = load_tile(dz, row, k, K, m_there, k_there)
        passed = load_mask(sign, row, 0, K, m_there, BK, EVEN_K)
        own_y = None if y is None else load_tile(y, row, k, K, m_there, k_there)
        dy = read_gradient(own_dz, passed, own_y, own_a, own_b, own_c, w.dtype)
        if not EVEN_M:
            dy = tl.where(m_there[:, None], dy, 0.0)
        act = read_columns(load_columns(x, row, n, C, m_there, n_there), own_scale, own_shift, own_slope)
        grad = tl.trans(tl.dot(tl.trans(w), tl.trans(dy)))
        dw = tl.dot(act, dy, dw)

        if skip is not None:
            added = load_tile(skip, row, n, C, m_there, n_there).to(tl.float32)
            skip_passed = load_mask(skip_sign, row, 0, C, m_there, BC, EVEN_C)
            if skip_passed is not None:
                added = tl.where(skip_passed, added, 0.0)
            grad = grad + skip_scale * added
        if scale is not None:
            own_x = load_tile(x, row, n, C, m_there, n_there).to(tl.float32)
            z = own_x * own_scale[None, :] + own_shift[None, :]
            if slope is None:
                grad = tl.where(z <= 0, 0.0, grad)
            else:
                sum_slope += _fold(tl.where(z > 0, 0.0, grad * z), FOLDED)
                grad = tl.where(z > 0, grad, own_slope[None, :] * grad)
        out = grad.to(dx.dtype.element_ty)
        tl.store(dx + row[:, None] * C + n[None, :], out, mask=m_there[:, None] & n_there[None, :])
        if mean is not None:
            stored = out.to(tl.float32)
            sum_beta += _fold(stored, FOLDED)
            sum_gamma += _fold(stored * ((own_x - own_mean[None, :]) * own_rstd[None, :]), FOLDED)

    at = program * K * C + k[:, None] * C + n[None, :]
    tl.store(part_dw + at, tl.trans(dw), mask=k_there[:, None] & n_there[None, :])
    if mean is not None or slope is not None:
        own = program * C + n
        if mean is not None:
            tl.store(part_sums + own, tl.sum(sum_beta, axis=0), mask=n_there)
            tl.store(part_sums + programs * C + own, tl.sum(sum_gamma, axis=0), mask=n_there)
        if slope is not None:
            tl.store(part_sums + 2 * programs * C + own, tl.sum(sum_slope, axis=0), mask=n_there)
        if arrives_last(arrivals, programs):
            if mean is not None:
                tl.store(dbeta + n, sum_partials(part_sums, programs, C, n, n < C, PARTS), mask=n < C)
                total = sum_partials(part_sums + programs * C, programs, C, n, n < C, PARTS)
                tl.store(dgamma + n, total, mask=n < C)
            if slope is not None:
                total = sum_partials(part_sums + 2 * programs * C, programs, C, n, n < C, PARTS)
                tl.store(dslope + n, total, mask=n < C)


# --- the host side ----------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What a configuration of both gradients depends on, and whether they are taken at once."""

    rows: int  # N * H * W
    k: int
    c: int
    stride: int
    dtype: str
    y: bool  # dy is formed from two tensors
    sign: str  # none, bits, values
    skip: str  # none, or the mask of the skip gradient: plain, bits, values
    deferred: bool
    slope: bool
    sums: bool


def problem(
    dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale,
    stride, dilation, groups, dtype,
) -> Problem:  # fmt: skip
    """The key of :func:`candidates` and :func:`narrow` for the op's arguments."""

    def form(sign: Tensor | None, without: str) -> str:
        return without if sign is None else "bits" if sign.dtype == torch.uint8 else "values"

    k, channels = weight.shape[:2]
    skip_form = "none" if skip is None else form(skip_sign, "plain")
    terms = (y is not None, form(sign, "none"), skip_form, scale is not None, slope is not None, mean is not None)
    return Problem(dz.numel() // k, k, channels, stride, SHORT[weight.dtype], *terms)


def narrow(problem: Problem) -> bool:
    """Whether a program can hold the whole weight and its gradient, and reads every pixel of the input."""
    k, c = padded(problem.k), padded(problem.c)
    return problem.stride == 1 and problem.dtype != "fp32" and max(k, c) <= 256 and k * c <= 64 * 256


def candidates(problem: Problem) -> tuple[ProductConfig, ...]:
    """Tiles of all of K and C. A deeper one has room only where both are small; then two programs have too."""
    k, c = padded(problem.k), padded(problem.c)
    of_k = 1 + problem.y + (problem.sign == "values")
    of_c = 1 + problem.deferred + (problem.skip != "none") + (problem.skip == "values")
    row = 2 * k * of_k + 2 * c * of_c + (k + c) // 8

    def config(depth: int, stages: int) -> ProductConfig:
        shared = depth * ((stages - 1) * row + 2 * (k + c)) + 2 * k * c
        since = 80 if k * c <= 64 * 64 else 90  # before Hopper products take both operands from registers
        programs = 2 if k + c <= 128 else 1
        return ProductConfig(k, c, depth, 8, stages, programs, shared=cdiv(shared, 1024) + 8, since=since)

    return tuple(config(*chosen) for chosen in ((32, 3), (64, 3), (32, 4)) if k + c <= 256 or chosen[0] == 32)


def bprop_narrow(
    config: ProductConfig, key: Problem, dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd,
    skip, skip_sign, skip_scale: float, stride, dilation, groups, dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dx, dbeta, dgamma, dslope, dw)``: the op ``conv1x1_bprop`` where :func:`narrow` holds for ``key``."""
    m, k, channels, device = key.rows, key.k, key.c, dz.device
    bk, bc = padded(k), padded(channels)
    programs = min(multiprocessors(device) * config.programs, cdiv(m, config.k))
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dw = empty_weight(weight, dtype)

    def sums(given: Tensor | None) -> Tensor:
        return torch.empty(0 if given is None else channels, dtype=torch.float32, device=device)

    found = sums(mean), sums(rstd), sums(slope)
    part_dw = torch.empty((programs, k * channels), dtype=torch.float32, device=device)
    summed = mean is not None or slope is not None
    launch(
        bprop_kernel, (programs,), warps=config.warps, stages=config.stages,
        dz=rows(dz), sign=mask_words(sign, k, bk), y=None if y is None else rows(y),
        a=vector(a), b=vector(b), c=vector(c),
        weight=matrix(weight), x=rows(x), scale=vector(scale), shift=vector(shift), slope=vector(slope),
        mean=vector(mean), rstd=vector(rstd), skip=None if skip is None else rows(skip),
        skip_sign=mask_words(skip_sign, channels, bc), dx=rows(dx), part_dw=part_dw,
        part_sums=torch.empty((3, programs, channels), dtype=torch.float32, device=device) if summed else None,
        arrivals=counters(device, 1) if summed else None, dbeta=found[0], dgamma=found[1], dslope=found[2],
        M=m, K=k, C=channels, programs=programs, skip_scale=float(skip_scale),
        STAGES=config.stages, BM=config.k, BK=bk, BC=bc, FOLDED=config.k if bc <= 64 else 2048 // bc,
        EVEN_M=m % config.k == 0, EVEN_K=k == bk, EVEN_C=channels == bc, WIDE=is_wide(dz, x),
        PARTS=parts_at_once(config.warps, programs, bc),
    )  # fmt: skip
    merge(part_dw, dw)
    return (dx, *found, dw)
