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
    """A tile's part of a per-channel vector; None of None."""
    if pointer is None:
        values = None
    else:
        values = tl.load(pointer + channels, mask=channels_there, other=0.0)
    return values


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
def load_mask(sign, rows, first, C, rows_there, CHANNELS: tl.constexpr, ALL: tl.constexpr):
    """Where a ReLU let values through: from its packed mask in bytes or int32 words, or from its output's sign.

    CHANNELS channels from ``first`` on. Words are loaded as the other tiles are, ahead of their use; bytes are too
    small for that. None of None.
    """
    if sign is None:
        passed = None
    elif sign.dtype.element_ty.is_int():
        BITS: tl.constexpr = sign.dtype.element_ty.primitive_bitwidth
        word = first // BITS + tl.arange(0, CHANNELS // BITS)
        words = load_tile(sign, rows, word, C // BITS, rows_there, within(word, C // BITS, ALL))
        each = (words[:, :, None] >> tl.arange(0, BITS)[None, None, :].to(words.dtype)) & 1
        passed = tl.reshape(each, (rows.shape[0], CHANNELS)) != 0
    else:
        channels = first + tl.arange(0, CHANNELS)
        values = load_tile(sign, rows, channels, C, rows_there, within(channels, C, ALL))
        passed = (values <= 0) == 0
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
