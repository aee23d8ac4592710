"""``conv1x1`` backward to the input: ``dy`` is formed on the way in, the input's activation undone on the way out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels._device import arrives_last, fold_rows, sum_partials
from resnet_fused.kernels._launch import cdiv, counters, is_wide, launch, rows, vector
from resnet_fused.kernels._operands import fetch_tile, load_mask, load_tile, load_vector, read_gradient, within
from resnet_fused.kernels._product import (
    Product,
    describable,
    described,
    empty_activation,
    fit,
    mask_words,
    matrix,
    parts_at_once,
    precision,
    row_groups,
    walkers,
)
from resnet_fused.tuning import ProductConfig


@triton.jit
def through_input(
    v, row, m_there, c, first, c_there, x, scale, shift, slope, mean, skip, skip_sign, skip_scale, dx,
    dbeta, dgamma, dslope, N, SUMS: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """Add the skip gradient to ``v``, take it back through the input's activation, store it, add to the sums."""
    if skip is not None:
        more = load_tile(skip, row, c, N, m_there, c_there).to(tl.float32)
        if skip_sign is not None:
            passed = load_mask(skip_sign, row, first, N, m_there, v.shape[1], EVEN_N)
            more = tl.where(passed, more, 0.0)
        v += more * skip_scale
    if scale is not None:
        raw = load_tile(x, row, c, N, m_there, c_there).to(tl.float32)
        z = raw * scale[None, :] + shift[None, :]
        if slope is None:
            v = tl.where(z <= 0, 0.0, v)
        else:
            lost = tl.where(z > 0, 0.0, v * z)
            v = tl.where(z > 0, v, v * slope[None, :])
    out = v.to(dx.dtype.element_ty)
    tl.store(dx + row[:, None] * N + c[None, :], out, mask=m_there[:, None] & c_there[None, :])
    GROUPS: tl.constexpr = dbeta.shape[0]
    if SUMS:
        dz = tl.where(m_there[:, None], out.to(tl.float32), 0.0)
        dbeta += fold_rows(dz, GROUPS)
        dgamma += fold_rows(dz * (raw - mean[None, :]), GROUPS)
    if slope is not None:
        dslope += fold_rows(tl.where(m_there[:, None], lost, 0.0), GROUPS)
    return dbeta, dgamma, dslope


@triton.jit
def _finish(
    acc, tile, c, first, c_there, x, scale, shift, slope, mean, skip, skip_sign, skip_scale, dx,
    dbeta, dgamma, dslope, M, N, P, Q, H, W,
    STRIDE: tl.constexpr, SUMS: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The epilogue for every input pixel of the tile's output pixels: one, or STRIDE * STRIDE of which one was read."""
    m = tile * acc.shape[0] + tl.arange(0, acc.shape[0])
    m_there = within(m, M, EVEN_M)
    if STRIDE == 1:
        row = m.to(tl.int64) if WIDE else m
        dbeta, dgamma, dslope = through_input(
            acc, row, m_there, c, first, c_there, x, scale, shift, slope, mean, skip, skip_sign, skip_scale, dx,
            dbeta, dgamma, dslope, N, SUMS, EVEN_N,
        )  # fmt: skip
    else:
        image, pixel = m // (P * Q), m % (P * Q)
        for i in tl.static_range(STRIDE):
            for j in tl.static_range(STRIDE):
                h, w = pixel // Q * STRIDE + i, pixel % Q * STRIDE + j
                row = (image * H + h) * W + w
                row = row.to(tl.int64) if WIDE else row
                v = acc if i + j == 0 else tl.zeros_like(acc)
                dbeta, dgamma, dslope = through_input(
                    v, row, (m < M) & (h < H) & (w < W), c, first, c_there, x, scale, shift, slope, mean, skip,
                    skip_sign, skip_scale, dx, dbeta, dgamma, dslope, N, SUMS, EVEN_N,
                )  # fmt: skip
    return dbeta, dgamma, dslope


@triton.jit
def dgrad_kernel(
    dz, sign, y, a, b, c0, weight, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale, dx,
    part_dbeta, part_dgamma, part_dslope, arrivals, dbeta, dgamma, dslope,
    M, K, N, programs, P, Q, H, W,
    STRIDE: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr,
    ONE_STEP: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``dx[row(m), n] = act'(sum_k dy[m, k] * weight[k, n] + skip_scale * skip'[row(m), n])``.

    ``dy = a * dz' + b * y + c0``. dz, y: (M, K), M = images * P * Q. weight: (K, N). x, skip, dx: (images*H*W, N).
    sign, skip_sign: packed, (M, channels / 8) uint8 or (M, channels / 32) int32, else values of the ReLU's output.
    ``act'`` of a deferred input: where ``!(x * scale + shift <= 0)``. With SUMS the sums of the rounded dx and of
    ``dx * (x - mean) * rstd`` go to dbeta and dgamma (N,); with a slope those of ``v * z`` over the values not above 0
    to dslope.

    The walk is fprop's: a program owns one column of tiles, keeps its vectors and sums in registers and stores the sums
    once. The pixels between a strided convolution's are written by the program of the pixel before them.

    Bytes: dz, y and x or skip once, dx once. dy is rounded to the weight's dtype as it would be if it were written.
    """
    columns = tl.cdiv(N, BN)
    column = tl.program_id(0) % columns
    program = tl.program_id(0) // columns
    if EVEN_K:
        K = K // BK * BK  # tells the compiler how rows are aligned
    if EVEN_N:
        N = N // BN * BN
    n = column * BN + tl.arange(0, BN)
    n_there = within(n, N, EVEN_N)
    scales = load_vector(scale, n, n_there)
    shifts = load_vector(shift, n, n_there)
    slopes = load_vector(slope, n, n_there)
    means = load_vector(mean, n, n_there)
    sum_dz = tl.zeros((GROUPS, BN), tl.float32)
    sum_dzx = tl.zeros((GROUPS, BN), tl.float32)
    sum_lost = tl.zeros((GROUPS, BN), tl.float32)
    tiles = tl.cdiv(M, BM)

    if ONE_STEP:
        k = tl.arange(0, BK)
        k_there = within(k, K, EVEN_K)
        va = load_vector(a, k, k_there)
        vb = load_vector(b, k, k_there)
        vc = load_vector(c0, k, k_there)
        w = fetch_tile(weight, k, 0, n, column * BN, N, k_there, n_there, DESCRIPTORS)
        for tile in tl.range(program, tiles, programs, num_stages=STAGES):
            m = tile * BM + tl.arange(0, BM)
            m_there = within(m, M, EVEN_M)
            row = m.to(tl.int64) if WIDE else m
            g = fetch_tile(dz, row, tile * BM, k, 0, K, m_there, k_there, DESCRIPTORS)
            passed = load_mask(sign, row, 0, K, m_there, BK, EVEN_K)
            values = None
            if y is not None:
                values = fetch_tile(y, row, tile * BM, k, 0, K, m_there, k_there, DESCRIPTORS)
            dy = read_gradient(g, passed, values, va, vb, vc, w.dtype)
            acc = tl.dot(dy, w, input_precision=PRECISION)
            sum_dz, sum_dzx, sum_lost = _finish(
                acc, tile, n, column * BN, n_there, x, scales, shifts, slopes, means, skip, skip_sign, skip_scale, dx,
                sum_dz, sum_dzx, sum_lost, M, N, P, Q, H, W, STRIDE, SUMS, EVEN_M, EVEN_N, WIDE,
            )  # fmt: skip
    else:
        steps = tl.cdiv(K, BK)
        mine = (tiles - program + programs - 1) // programs
        acc = tl.zeros((BM, BN), tl.float32)
        tile = program - programs
        step = steps - 1
        for _ in tl.range(0, mine * steps, num_stages=STAGES):
            step = tl.where(step == steps - 1, 0, step + 1)
            if step == 0:
                tile += programs
            m = tile * BM + tl.arange(0, BM)
            m_there = within(m, M, EVEN_M)
            row = m.to(tl.int64) if WIDE else m
            k = step * BK + tl.arange(0, BK)
            k_there = within(k, K, EVEN_K)
            g = fetch_tile(dz, row, tile * BM, k, step * BK, K, m_there, k_there, DESCRIPTORS)
            passed = load_mask(sign, row, step * BK, K, m_there, BK, EVEN_K)
            values = None
            if y is not None:
                values = fetch_tile(y, row, tile * BM, k, step * BK, K, m_there, k_there, DESCRIPTORS)
            w = fetch_tile(weight, k, step * BK, n, column * BN, N, k_there, n_there, DESCRIPTORS)
            va = load_vector(a, k, k_there)
            vb = load_vector(b, k, k_there)
            vc = load_vector(c0, k, k_there)
            dy = read_gradient(g, passed, values, va, vb, vc, w.dtype)
            acc = tl.dot(dy, w, acc, input_precision=PRECISION)
            if step == steps - 1:
                sum_dz, sum_dzx, sum_lost = _finish(
                    acc, tile, n, column * BN, n_there, x, scales, shifts, slopes, means, skip, skip_sign, skip_scale,
                    dx, sum_dz, sum_dzx, sum_lost, M, N, P, Q, H, W,
                    STRIDE, SUMS, EVEN_M, EVEN_N, WIDE,
                )  # fmt: skip
                acc = tl.zeros((BM, BN), tl.float32)

    if SUMS or slope is not None:
        at = program * N + n
        if SUMS:
            tl.store(part_dbeta + at, tl.sum(sum_dz, axis=0), mask=n_there)
            tl.store(part_dgamma + at, tl.sum(sum_dzx, axis=0), mask=n_there)
        if slope is not None:
            tl.store(part_dslope + at, tl.sum(sum_lost, axis=0), mask=n_there)
        if arrives_last(arrivals + column, programs):
            if SUMS:
                tl.store(dbeta + n, sum_partials(part_dbeta, programs, N, n, n < N, PARTS), mask=n_there)
                total = sum_partials(part_dgamma, programs, N, n, n < N, PARTS)
                tl.store(dgamma + n, total * load_vector(rstd, n, n_there), mask=n_there)
            if slope is not None:
                tl.store(dslope + n, sum_partials(part_dslope, programs, N, n, n < N, PARTS), mask=n_there)


def dgrad(
    config: ProductConfig, found: Product, dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd,
    skip, skip_sign, skip_scale, stride, dilation, groups,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dx, dbeta, dgamma, dslope)`` in one launch."""
    h, w = x.shape[2:]
    p, q = dz.shape[2:]
    m, columns, k = found.rows, found.columns, found.depth
    bm, bn, bk = fit(config, columns, k)
    of_columns = cdiv(columns, bn)
    programs = walkers(x.device, config, cdiv(m, bm), of_columns)
    dz_rows, y_rows, kernel = rows(dz), None if y is None else rows(y), matrix(weight)
    descriptors = describable(config, dz_rows, y_rows, kernel)
    if descriptors:
        dz_rows, kernel = described(dz_rows, (bm, bk)), described(kernel, (bk, bn))
        y_rows = None if y_rows is None else described(y_rows, (bm, bk))
    dx = empty_activation(x, columns, h, w)
    sums, parts = [], []
    for given in (mean, mean, slope):
        shape = (columns,) if given is not None else (0,)
        sums.append(torch.empty(shape, dtype=torch.float32, device=x.device))
        parts.append(sums[-1].new_empty((programs, columns)) if given is not None else None)
    launch(
        dgrad_kernel,
        (of_columns * programs,),
        warps=config.warps,
        stages=config.stages,
        dz=dz_rows,
        sign=mask_words(sign, k, bk),
        y=y_rows,
        a=vector(a),
        b=vector(b),
        c0=vector(c),
        weight=kernel,
        x=rows(x) if scale is not None else None,
        scale=vector(scale),
        shift=vector(shift),
        slope=vector(slope),
        mean=vector(mean),
        rstd=vector(rstd),
        skip=None if skip is None else rows(skip),
        skip_sign=mask_words(skip_sign, columns, bn) if skip is not None else None,
        skip_scale=float(skip_scale),
        dx=rows(dx),
        part_dbeta=parts[0], part_dgamma=parts[1], part_dslope=parts[2],
        arrivals=counters(x.device, of_columns) if mean is not None or slope is not None else None,
        dbeta=sums[0] if mean is not None else None,
        dgamma=sums[1] if mean is not None else None,
        dslope=sums[2] if slope is not None else None,
        M=m, K=k, N=columns, programs=programs, P=p, Q=q, H=h, W=w,
        STRIDE=stride,   SUMS=mean is not None,
        PRECISION=precision(weight.dtype),
        BM=bm, BN=bn, BK=bk, GROUPS=row_groups(config.warps, bm, bn, x.dtype), STAGES=config.stages, ONE_STEP=bk >= k,
        EVEN_M=m % bm == 0, EVEN_N=columns % bn == 0, EVEN_K=k % bk == 0, WIDE=is_wide(x, dz), DESCRIPTORS=descriptors,
        PARTS=parts_at_once(config.warps, programs, bn),
    )  # fmt: skip
    return dx, sums[0], sums[1], sums[2]
