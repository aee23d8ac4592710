"""The kernels of ``stem``: norm, ReLU and 3x3/2 max-pool in one pass, and the two passes of its backward.

The convolution's output is the largest tensor of the network, so every kernel reads it once. Columns of windows are cut
into strips of STRIP windows; a tile is as many neighbouring strips as a program has threads for, times a block of
channels, and goes down row by row: what it found in row ``2p + 1`` of the image, the last of window row p, it keeps as
the first of window row ``p + 1``. Of the three columns of a window one is also the next window's; that second read
comes from the first-level cache, and the row above a strip from the second-level cache.

Backward finds the winners again in the pass that sums ``dbeta`` and ``dgamma``, and notes for the second pass one byte
for each window. Finding them anew in the second pass would cost more instructions than these bytes cost time: the
gradient of a pixel needs the winners of up to four windows, so each would be found by several threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resnet_fused.kernels._device import arrives_last, relu, sum_partials
from resnet_fused.kernels.batch_norm import affine_coefficients

NO_WINNER = tl.constexpr(15)  # the code of a window that passes no gradient


@triton.jit
def _strips(tile, P, Q, STRIPS: tl.constexpr, STRIP: tl.constexpr):
    """Image (int64), first row and column of windows of each of a tile's strips; neighbours are next to each other."""
    strip = tile * STRIPS + tl.arange(0, STRIPS)
    down = tl.cdiv(P, STRIP)
    return (strip // (down * Q)).to(tl.int64), strip // Q % down * STRIP, strip % Q


@triton.jit
def _normalised(image, h, w, there, W, C, scale, shift):
    """``y`` and ``y * scale + shift`` of one pixel for each strip."""
    y = tl.load(image + ((h * W + w) * C)[:, None], mask=there, other=0.0).to(tl.float32)
    return y, y * scale[None, :] + shift[None, :]


@triton.jit
def _greater(a, b):
    """``max(a, b)`` that keeps NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


# --- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _row_maximum(image, h, q, there, W, C, scale, shift):
    """The maximum over a window's three columns. One outside repeats its neighbour, which is in the window too."""
    _, left = _normalised(image, h, tl.maximum(2 * q - 1, 0), there, W, C, scale, shift)
    _, middle = _normalised(image, h, 2 * q, there, W, C, scale, shift)
    _, right = _normalised(image, h, tl.minimum(2 * q + 1, W - 1), there, W, C, scale, shift)
    return _greater(_greater(left, middle), right)


@triton.jit
def forward_kernel(
    y, scale, shift, out, N, H, W, P, Q, C, programs,
    STRIP: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``out[n, p, q] = max over i, j in -1..1 of relu(y[n, 2p + i, 2q + j] * scale + shift)``.

    y: (N, H, W, C). out: (N, P, Q, C). scale, shift: (C,) fp32. A program: one block of channels, the tiles ``program,
    program + programs, ...``.

    Bytes: y and out once. The maximum is taken before ReLU and rounding, which keep the order: the same values.
    """
    blocks = tl.cdiv(C, CHANNELS)
    c = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    there_c = (c < C)[None, :]
    scales = tl.load(scale + c, mask=c < C, other=0.0)
    shifts = tl.load(shift + c, mask=c < C, other=0.0)
    for tile in range(tl.program_id(0) // blocks, tl.cdiv(N * tl.cdiv(P, STRIP) * Q, STRIPS), programs):
        n, p, q = _strips(tile, P, Q, STRIPS, STRIP)
        image = y + n[:, None] * (H * W * C) + c[None, :]
        pooled = out + n[:, None] * (P * Q * C) + c[None, :]
        there = (n < N)[:, None] & there_c
        above = _row_maximum(image, tl.maximum(2 * p - 1, 0), q, there, W, C, scales, shifts)
        for _ in range(STRIP):
            there = ((n < N) & (p < P))[:, None] & there_c
            inside = _row_maximum(image, 2 * p, q, there, W, C, scales, shifts)
            below = _row_maximum(image, tl.minimum(2 * p + 1, H - 1), q, there, W, C, scales, shifts)
            best = relu(_greater(_greater(above, inside), below))
            tl.store(pooled + ((p * Q + q) * C)[:, None], best.to(out.dtype.element_ty), mask=there)
            above = below
            p += 1


# --- backward: winners and sums -------------------------------------------------------------------------------------


@triton.jit
def _order(z, DTYPE: tl.constexpr):
    """What the pool compares, ``relu(z)`` in DTYPE, as an unsigned integer of the same order that ends in zero bits.

    These are the bits of a float that is not negative; NaN is above all. (Rounding first lets two values share the
    instructions, and does not change the result.)
    """
    rounded = _greater(z.to(DTYPE).to(tl.float32), 0.0).to(tl.uint32, bitcast=True)
    return rounded if DTYPE.primitive_bitwidth == 16 else rounded.to(tl.uint64) << 32


@triton.jit
def _later(key, y, later_key, later_y, INFINITY: tl.constexpr):
    """The winner of two, the second later in the window: PyTorch's pool keeps the first of equals, of NaNs the last."""
    wins = (later_key > key) | (later_key > INFINITY)
    return tl.where(wins, later_key, key), tl.where(wins, later_y, y)


@triton.jit
def _row_winner(image, h, q, there, W, C, scale, shift, INFINITY: tl.constexpr):
    """Key and ``y`` of the winner among a window's three columns.

    A key: what the pool compares in the upper bits, then the column, 2, 1, 0 from the left. A column outside repeats
    its neighbour, key and all.
    """
    DTYPE: tl.constexpr = image.dtype.element_ty
    first = tl.where(q > 0, 2, 1).to(tl.uint32)[:, None]
    last = tl.where(2 * q + 1 < W, 0, 1).to(tl.uint32)[:, None]
    y, z = _normalised(image, h, tl.maximum(2 * q - 1, 0), there, W, C, scale, shift)
    key, won = _order(z, DTYPE) | first, y
    y, z = _normalised(image, h, 2 * q, there, W, C, scale, shift)
    key, won = _later(key, won, _order(z, DTYPE) | 1, y, INFINITY)
    y, z = _normalised(image, h, tl.minimum(2 * q + 1, W - 1), there, W, C, scale, shift)
    return _later(key, won, _order(z, DTYPE) | last, y, INFINITY)


@triton.jit
def reduce_kernel(
    dout, y, scale, shift, mean, rstd, weight, count, winners, partials, arrivals, sums, coefficients,
    N, H, W, P, Q, C, counts, programs,
    STRIP: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, INFINITY: tl.constexpr,
):  # fmt: skip
    """``dbeta = sum dz``, ``dgamma = sum dz * (y_w - mean) * rstd`` over all windows, w a window's winner.

    ``dz = dout`` where the ReLU passes at the winner, else 0: a pixel that wins twice counts twice, so no scattering.

    dout: (N, P, Q, C). y: (N, H, W, C). Vectors: (C,) fp32. winners, if given: (N, P, Q, C) uint8, ``8 - tap`` with the
    tap in row-major order, NO_WINNER where dz is 0. dout None: the winners alone. partials: (2, programs, C). sums:
    (2, C), dbeta and dgamma. coefficients, if given: (3, C), those of dy for ``sum(count)`` values, count (counts,).

    A program has one block of channels and walks over tiles, sums in registers; the last one adds up the partials.
    Bytes: y and dout once, winners once. Order and ties as PyTorch's: of the rounded values after the ReLU.
    """
    blocks = tl.cdiv(C, CHANNELS)
    block = tl.program_id(0) % blocks
    program = tl.program_id(0) // blocks
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    valid = c < C
    scales = tl.load(scale + c, mask=valid, other=0.0)
    shifts = tl.load(shift + c, mask=valid, other=0.0)
    if dout is not None:
        own_dbeta = tl.zeros((STRIPS, CHANNELS), tl.float32)
        own_dgamma = tl.zeros((STRIPS, CHANNELS), tl.float32)
    for tile in range(program, tl.cdiv(N * tl.cdiv(P, STRIP) * Q, STRIPS), programs):
        n, p, q = _strips(tile, P, Q, STRIPS, STRIP)
        image = y + n[:, None] * (H * W * C) + c[None, :]
        pooled = n[:, None] * (P * Q * C) + c[None, :]
        there = (n < N)[:, None] & valid[None, :]
        above, above_y = _row_winner(image, tl.maximum(2 * p - 1, 0), q, there, W, C, scales, shifts, INFINITY)
        for _ in range(STRIP):
            there = ((n < N) & (p < P))[:, None] & valid[None, :]
            h = tl.minimum(2 * p + 1, H - 1)
            inside, inside_y = _row_winner(image, 2 * p, q, there, W, C, scales, shifts, INFINITY)
            below, below_y = _row_winner(image, h, q, there, W, C, scales, shifts, INFINITY)
            # Codes of the window's rows: 6, 3, 0 from above; a row outside repeats the middle one, key and all.
            first, last = tl.where(p > 0, 6, 3).to(tl.uint32), tl.where(h > 2 * p, 0, 3).to(tl.uint32)
            key, won = _later(above + first[:, None], above_y, inside + 3, inside_y, INFINITY)
            key, won = _later(key, won, below + last[:, None], below_y, INFINITY)
            passes = ~(won * scales[None, :] + shifts[None, :] <= 0)
            at = pooled + ((p * Q + q) * C)[:, None]
            if winners is not None:
                code = tl.where(passes, (key & 15).to(tl.int32), NO_WINNER)
                tl.store(winners + at, code.to(tl.uint8), mask=there)
            if dout is not None:
                g = tl.load(dout + at, mask=there, other=0.0).to(tl.float32)
                dz = tl.where(passes, g, 0.0)
                own_dbeta += dz
                own_dgamma += dz * (won - tl.load(mean + c, mask=valid, other=0.0)[None, :])  # not kept: registers
            above, above_y = below, below_y
            p += 1
    if dout is not None:
        part = partials + program * C + c
        tl.store(part, tl.sum(own_dbeta, axis=0), mask=valid)
        tl.store(part + programs * C, tl.sum(own_dgamma, axis=0), mask=valid)
        if arrives_last(arrivals + block, programs):
            means, rstds = tl.load(mean + c, mask=valid, other=0.0), tl.load(rstd + c, mask=valid, other=0.0)
            dbeta = sum_partials(partials, programs, C, c, valid, PARTS)
            dgamma = sum_partials(partials + programs * C, programs, C, c, valid, PARTS) * rstds
            tl.store(sums + c, dbeta, mask=valid)
            tl.store(sums + C + c, dgamma, mask=valid)
            if coefficients is not None:
                affine_coefficients(dbeta, dgamma, weight, means, rstds, count, coefficients, counts, C, c, valid)


# --- backward: the gradient of the convolution's output -------------------------------------------------------------


@triton.jit
def _window(dout, winners, there, p, q, P, Q, C):
    """Gradients and winners' codes of the windows (p, q); no winner where there is no window."""
    exists = there & ((p < P) & (q < Q))[:, None]
    at = ((p * Q + q) * C)[:, None]
    g = tl.load(dout + at, mask=exists, other=0.0).to(tl.float32)
    return g, tl.load(winners + at, mask=exists, other=NO_WINNER)


@triton.jit
def _put(dz, there, h, w, y, a, b, c, dy, H, W, C):
    """Store ``a * dz + b * y + c`` of the pixels (h, w)."""
    exists = there & ((h < H) & (w < W))[:, None]
    at = ((h * W + w) * C)[:, None]
    dz = dz * a[None, :]
    if y is not None:
        dz += tl.load(y + at, mask=exists, other=0.0).to(tl.float32) * b[None, :] + c[None, :]
    tl.store(dy + at, dz.to(dy.dtype.element_ty), mask=exists)


@triton.jit
def apply_kernel(
    dout, winners, y, a, b, c, dy, N, H, W, P, Q, C, programs,
    STRIP: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``dy = a * dz + b * y + c``, ``dz`` of a pixel the sum of ``dout`` over the windows that it won.

    dout, winners: (N, P, Q, C), winners as :func:`reduce_kernel` writes them. y, dy: (N, H, W, C). a, b, c: (C,) fp32;
    b, c and y None for frozen statistics. With window (p, q) go the pixels (2p, 2p + 1) x (2q, 2q + 1), which lie in
    the windows (p, p + 1) x (q, q + 1). The lower two are kept for the next row.

    Bytes: y, dout and winners once, dy once.
    """
    blocks = tl.cdiv(C, CHANNELS)
    k = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    va = tl.load(a + k, mask=k < C, other=0.0)
    vb = None if b is None else tl.load(b + k, mask=k < C, other=0.0)
    vc = None if c is None else tl.load(c + k, mask=k < C, other=0.0)
    for tile in range(tl.program_id(0) // blocks, tl.cdiv(N * tl.cdiv(P, STRIP) * Q, STRIPS), programs):
        n, p, q = _strips(tile, P, Q, STRIPS, STRIP)
        there = (n < N)[:, None] & (k < C)[None, :]
        pooled, image = n[:, None] * (P * Q * C) + k[None, :], n[:, None] * (H * W * C) + k[None, :]
        g, won, to = dout + pooled, winners + pooled, dy + image
        read = None if y is None else y + image
        own, own_code = _window(g, won, there, p, q, P, Q, C)
        right, right_code = _window(g, won, there, p, q + 1, P, Q, C)
        for _ in range(STRIP):
            low, low_code = _window(g, won, there, p + 1, q, P, Q, C)
            corner, corner_code = _window(g, won, there, p + 1, q + 1, P, Q, C)
            dz = tl.where(own_code == 4, own, 0.0)
            _put(dz, there, 2 * p, 2 * q, read, va, vb, vc, to, H, W, C)
            dz = tl.where(own_code == 3, own, 0.0) + tl.where(right_code == 5, right, 0.0)
            _put(dz, there, 2 * p, 2 * q + 1, read, va, vb, vc, to, H, W, C)
            dz = tl.where(own_code == 1, own, 0.0) + tl.where(low_code == 7, low, 0.0)
            _put(dz, there, 2 * p + 1, 2 * q, read, va, vb, vc, to, H, W, C)
            dz = tl.where(own_code == 0, own, 0.0) + tl.where(right_code == 2, right, 0.0)
            dz += tl.where(low_code == 6, low, 0.0) + tl.where(corner_code == 8, corner, 0.0)
            _put(dz, there, 2 * p + 1, 2 * q + 1, read, va, vb, vc, to, H, W, C)
            own, own_code, right, right_code = low, low_code, corner, corner_code
            p += 1
