"""Tiles of activations, and the two operands of a convolution's products formed from them.

A tile is (ROWS, CHANNELS) of a (M, C) matrix, NHWC. Its rows and channels come as index vectors, ``rows_there`` and
``channels_there`` say which exist. A per-channel vector is the tile's part of it, fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resnet_fused.kernels._device import prelu, relu


@triton.jit
def within(index, size, ALL: tl.constexpr):
    """Which of the indices exist; a constant where ALL do, so that the compiler drops the mask."""
    if ALL:
        there = tl.full(index.shape, True, tl.int1)
    else:
        there = index < size
    return there


@triton.jit
def load_vector(pointer, channels, channels_there):
    """A tile's part of a per-channel vector."""
    return tl.load(pointer + channels, mask=channels_there, other=0.0)


@triton.jit
def load_tile(pointer, rows, channels, C, rows_there, channels_there):
    """A tile of a (M, C) matrix. rows: int64 where offsets need it."""
    at = rows[:, None] * C + channels[None, :]
    return tl.load(pointer + at, mask=rows_there[:, None] & channels_there[None, :], other=0.0)


@triton.jit
def fetch_tile(matrix, rows, first_row, channels, first, C, rows_there, channels_there, DESCRIPTORS: tl.constexpr):
    """:func:`load_tile`, or the same tile through a tensor descriptor, which fills with zeros by itself."""
    if DESCRIPTORS:
        tile = matrix.load([first_row, first])
    else:
        tile = load_tile(matrix, rows, channels, C, rows_there, channels_there)
    return tile


@triton.jit
def load_bits(pointer, rows, first, C, rows_there, ALL: tl.constexpr, CHANNELS: tl.constexpr):
    """A tile of a packed mask as booleans: CHANNELS channels from ``first`` on (multiples of 8, as C is)."""
    byte = first // 8 + tl.arange(0, CHANNELS // 8)
    there = rows_there[:, None] & within(byte, C // 8, ALL)[None, :]
    packed = tl.load(pointer + rows[:, None] * (C // 8) + byte[None, :], mask=there, other=0)
    each = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :].to(tl.uint8)) & 1
    return tl.reshape(each, (packed.shape[0], CHANNELS)) != 0


@triton.jit
def load_passed(sign, rows, channels, first, C, rows_there, channels_there, BITS: tl.constexpr, ALL: tl.constexpr,
                CHANNELS: tl.constexpr):  # fmt: skip
    """Where a ReLU let values through: from its packed mask (BITS), or from the sign of its output."""
    if BITS:
        passed = load_bits(sign, rows, first, C, rows_there, ALL, CHANNELS)
    else:
        passed = ~(load_tile(sign, rows, channels, C, rows_there, channels_there).to(tl.float32) <= 0)
    return passed


@triton.jit
def input_rows(rows, P, Q, H, W, STRIDE: tl.constexpr):
    """The input's rows that a 1x1 convolution reads for the output's ``rows``: pixel (p, q) reads (p, q) * STRIDE."""
    if STRIDE == 1:
        found = rows
    else:
        image, pixel = rows // (P * Q), rows % (P * Q)
        found = (image * H + pixel // Q * STRIDE) * W + pixel % Q * STRIDE
    return found


@triton.jit
def read_input(x, scale, shift, slope):
    """``act(x * scale + shift)`` rounded to the dtype of ``x``; ``x`` itself without a scale."""
    if scale is None:
        read = x
    else:
        z = x.to(tl.float32) * scale[None, :] + shift[None, :]
        if slope is None:
            z = relu(z)
        else:
            z = prelu(z, slope[None, :])
        read = z.to(x.dtype)
    return read


@triton.jit
def read_gradient(dz, passed, y, a, b, c, DTYPE: tl.constexpr):
    """``a * dz' + b * y + c`` rounded to DTYPE; ``dz'`` is ``dz`` where ``passed``, else 0."""
    dy = dz.to(tl.float32)
    if passed is not None:
        dy = tl.where(passed, dy, 0.0)
    if a is not None:
        dy = dy * a[None, :]
    if b is not None:
        dy = dy + (y.to(tl.float32) * b[None, :] + c[None, :])
    return dy.to(DTYPE)
