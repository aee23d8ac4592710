"""``conv1x1`` forward, in training and inference: one matrix product, everything pending applied on the way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resnet_fused.kernels._device import arrives_last, fold_all, fold_tile, merge_statistics, prelu, relu
from resnet_fused.kernels._launch import cdiv, counters, is_wide, launch, rows, vector
from resnet_fused.kernels._operands import fetch_tile, input_rows, load_tile, load_vector, read_input, within
from resnet_fused.kernels._product import (
    Product,
    describable,
    described,
    empty_activation,
    fit,
    matrix,
    parts_at_once,
    precision,
    walkers,
)
from resnet_fused.reference import output_size
from resnet_fused.tuning import ProductConfig


@triton.jit
def _finish(acc, tile, column, c, c_there, bias, residual, out_slope, y, mean, m2, seen, M, N, RELU: tl.constexpr,
            STATISTICS: tl.constexpr, EVEN_M: tl.constexpr, WIDE: tl.constexpr, DESCRIPTORS: tl.constexpr,
            DTYPE: tl.constexpr):  # fmt: skip
    """Store ``act(acc + bias + residual)`` as the tile's rows of ``y``; its statistics join the program's."""
    ROWS: tl.constexpr = acc.shape[0]
    m = tile * ROWS + tl.arange(0, ROWS)
    m_there = within(m, M, EVEN_M)
    row = m.to(tl.int64) if WIDE else m
    if bias is not None:
        acc += bias[None, :]
    if residual is not None:
        acc += load_tile(residual, row, c, N, m_there, c_there).to(tl.float32)
    if out_slope is not None:
        acc = prelu(acc, out_slope[None, :])
    elif RELU:
        acc = relu(acc)
    out = acc.to(DTYPE)
    if DESCRIPTORS:
        y.store([tile * ROWS, column * acc.shape[1]], out)
    else:
        tl.store(y + row[:, None] * N + c[None, :], out, mask=m_there[:, None] & c_there[None, :])
    if STATISTICS:
        mean, m2, seen = fold_tile(mean, m2, seen, out.to(tl.float32), m_there[:, None], EVEN_M)
    return mean, m2, seen


@triton.jit
def fprop_kernel(
    x, scale, shift, slope, weight, bias, residual, out_slope, y,
    part_mean, part_m2, arrivals, counts, mean, m2,
    M, K, N, programs, P, Q, H, W,
    STRIDE: tl.constexpr, RELU: tl.constexpr, STATISTICS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
    ONE_STEP: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``y[m, n] = act_out(sum_k act(x[row(m), k] * scale[k] + shift[k]) * weight[n, k] + bias[n] + residual[m, n])``.

    x: (N*H*W, K). weight: (N, K). y, residual: (M, N), M = images * P * Q. Vectors fp32. part_mean, part_m2:
    (programs, N), arrivals: a counter for each column of tiles; counts: (1,) int32; mean, m2: (N,).

    A program owns one column of tiles and walks over its rows: tile ``p, p + programs, ...``. So its part of the weight
    stays in the first-level cache (in shared memory where one step takes all of K), its vectors and statistics in
    registers. Programs of one row of tiles run side by side and share x through the second-level cache.

    Bytes: x and residual once (and once more from the second-level cache for each further column), y once.
    The activated input is rounded to the dtype of x as it would be if it were written; sums are fp32.
    """
    columns = tl.cdiv(N, BN)
    column = tl.program_id(0) % columns
    program = tl.program_id(0) // columns
    if EVEN_K:
        K = K // BK * BK  # tells the compiler how rows are aligned
    c = column * BN + tl.arange(0, BN)
    c_there = within(c, N, EVEN_N)
    biases = load_vector(bias, c, c_there)
    slopes = load_vector(out_slope, c, c_there)
    own_mean = tl.zeros((WARPS, 8, BN), tl.float32)
    own_m2 = tl.zeros((WARPS, 8, BN), tl.float32)
    seen = tl.zeros((WARPS, 8, 1), tl.float32)
    tiles = tl.cdiv(M, BM)

    if ONE_STEP:
        k = tl.arange(0, BK)
        k_there = within(k, K, EVEN_K)
        scales = load_vector(scale, k, k_there)
        shifts = load_vector(shift, k, k_there)
        in_slopes = load_vector(slope, k, k_there)
        w = fetch_tile(weight, c, column * BN, k, 0, K, c_there, k_there, DESCRIPTORS)
        for tile in tl.range(program, tiles, programs, num_stages=STAGES):
            m = tile * BM + tl.arange(0, BM)
            row = input_rows(m, P, Q, H, W, STRIDE)
            row = row.to(tl.int64) if WIDE else row
            a = fetch_tile(x, row, tile * BM, k, 0, K, within(m, M, EVEN_M), k_there, DESCRIPTORS)
            acc = tl.dot(read_input(a, scales, shifts, in_slopes), tl.trans(w), input_precision=PRECISION)
            own_mean, own_m2, seen = _finish(
                acc, tile, column, c, c_there, biases, residual, slopes, y, own_mean, own_m2, seen, M, N,
                RELU, STATISTICS, EVEN_M, WIDE, DESCRIPTORS, a.dtype,
            )  # fmt: skip
    else:
        # One loop over all steps of all tiles, so that the loads of the next tile are under way while one is finished.
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
            row = input_rows(m, P, Q, H, W, STRIDE)
            row = row.to(tl.int64) if WIDE else row
            k = step * BK + tl.arange(0, BK)
            k_there = within(k, K, EVEN_K)
            a = fetch_tile(x, row, tile * BM, k, step * BK, K, within(m, M, EVEN_M), k_there, DESCRIPTORS)
            w = fetch_tile(weight, c, column * BN, k, step * BK, K, c_there, k_there, DESCRIPTORS)
            scales = load_vector(scale, k, k_there)
            shifts = load_vector(shift, k, k_there)
            in_slopes = load_vector(slope, k, k_there)
            a = read_input(a, scales, shifts, in_slopes)
            acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
            if step == steps - 1:
                own_mean, own_m2, seen = _finish(
                    acc, tile, column, c, c_there, biases, residual, slopes, y, own_mean, own_m2, seen, M, N,
                    RELU, STATISTICS, EVEN_M, WIDE, DESCRIPTORS, a.dtype,
                )  # fmt: skip
                acc = tl.zeros((BM, BN), tl.float32)

    if STATISTICS:
        own_mean, own_m2 = fold_all(own_mean, own_m2, seen)
        tl.store(part_mean + program * N + c, own_mean, mask=c_there)
        tl.store(part_m2 + program * N + c, own_m2, mask=c_there)
        if arrives_last(arrivals + column, programs):
            merge_statistics(part_mean, part_m2, mean, m2, programs, M, N, c, c < N, BM, PARTS)
            if column == 0:
                tl.store(counts, M)


def forward(
    config: ProductConfig,
    found: Product,
    x,
    scale,
    shift,
    slope,
    weight,
    bias,
    residual,
    stride,
    relu,
    out_slope,
    statistics,
):
    """``(y, counts, mean, m2)``, the last three None unless asked for, in one launch."""
    h, w = x.shape[2:]
    p, q = (output_size(size, 1, stride, 0, 1) for size in (h, w))
    m, columns, k = found.rows, found.columns, found.depth
    bm, bn, bk = fit(config, columns, k)
    of_columns = cdiv(columns, bn)
    programs = walkers(x.device, config, cdiv(m, bm), of_columns)
    y = empty_activation(x, columns, p, q)
    x_rows, kernel, y_rows = rows(x), matrix(weight), rows(y)
    descriptors = stride == 1 and describable(config, x_rows, kernel, y_rows)
    if descriptors:
        x_rows, kernel = described(x_rows, (bm, bk)), described(kernel, (bn, bk))
        y_rows = described(y_rows, (bm, bn))
    counts = part_mean = part_m2 = arrivals = mean = m2 = None
    if statistics:
        counts = torch.empty(1, dtype=torch.int32, device=x.device)
        part_mean, part_m2 = torch.empty((2, programs, columns), dtype=torch.float32, device=x.device).unbind()
        mean, m2 = torch.empty((2, 1, columns), dtype=torch.float32, device=x.device).unbind()
        arrivals = counters(x.device, of_columns)
    launch(
        fprop_kernel,
        (of_columns * programs,),
        warps=config.warps,
        stages=config.stages,
        x=x_rows,
        scale=vector(scale),
        shift=vector(shift),
        slope=vector(slope),
        weight=kernel,
        bias=vector(bias),
        residual=None if residual is None else rows(residual),
        out_slope=vector(out_slope),
        y=y_rows,
        part_mean=part_mean,
        part_m2=part_m2,
        arrivals=arrivals,
        counts=counts,
        mean=mean,
        m2=m2,
        M=m, K=k, N=columns, programs=programs, P=p, Q=q, H=h, W=w,
        STRIDE=stride, RELU=relu, STATISTICS=statistics, PRECISION=precision(x.dtype),
        BM=bm, BN=bn, BK=bk, WARPS=config.warps, STAGES=config.stages, ONE_STEP=bk >= k,
        EVEN_M=m % bm == 0, EVEN_N=columns % bn == 0, EVEN_K=k % bk == 0, WIDE=is_wide(x, y), DESCRIPTORS=descriptors,
        PARTS=parts_at_once(config.warps, programs, bn),
    )  # fmt: skip
    return y, counts, mean, m2
