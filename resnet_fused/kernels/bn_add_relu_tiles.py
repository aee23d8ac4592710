"""What the kernels of the block's end share on the device: tiles of the operands, gates, sums kept in registers.

A tile is (ROWS, CHANNELS) of a (M, C) matrix, NHWC. A thread holds runs of 8 consecutive channels of 16 bits: one
16-byte access, and one byte of a packed mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resnet_fused.kernels._device import sum_partials, unpack_bits


@triton.jit
def load_vector(v, c, there):
    """Channels ``c`` of a per-channel vector as a (1, CHANNELS) row; None of None (Triton 3.6 cannot unpack those)."""
    if v is None:
        values = None
    else:
        values = tl.load(v + c, mask=there, other=0.0).to(tl.float32)[None, :]
    return values


@triton.jit
def offsets(row, c, channels, WIDE: tl.constexpr):
    """Of a tile of a matrix of ``channels`` columns."""
    if WIDE:
        at = row.to(tl.int64)[:, None] * channels + c[None, :]
    else:
        at = row[:, None] * channels + c[None, :]
    return at


@triton.jit
def read(t, at, there):
    """fp32 values, 0 where nothing is there."""
    return tl.load(t + at, mask=there, other=0.0).to(tl.float32)


@triton.jit
def bytes_of(row, stop, first, channels, CHANNELS: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of the packed mask's bytes of a tile whose channels begin at ``first``, and which of them are there."""
    byte = first // 8 + tl.arange(0, CHANNELS // 8)
    if WIDE:
        row_at = row.to(tl.int64)[:, None] * (channels // 8)
    else:
        row_at = row[:, None] * (channels // 8)
    # Told that no wider access is possible, the compiler gives each byte to the thread that has its 8 channels: packing
    # and unpacking stay within a thread, and the threads of a warp still share 32-byte sectors. The hint belongs to the
    # sum itself; on the result of a function it would be lost.
    at = tl.multiple_of(row_at + byte[None, :], [1, 1])
    return at, (row < stop)[:, None] & (byte < channels // 8)[None, :]


@triton.jit
def masked(
    dz, sign, at, there, row, stop, first, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr
):
    """``dz`` where the ReLU passed, else 0. sign: None, a packed mask, or values whose sign is the mask."""
    if sign is None:
        values = dz
    elif sign.dtype.element_ty == tl.uint8:
        byte, byte_there = bytes_of(row, stop, first, channels, CHANNELS, WIDE)
        bits = tl.load(sign + byte, mask=byte_there, other=0)
        values = tl.where(unpack_bits(bits, ROWS, CHANNELS), dz, 0.0)
    else:
        values = tl.where(read(sign, at, there) <= 0, 0.0, dz)
    return values


@triton.jit
def gate_of(gate, row, stop, c, channels_there, channels, pixels, PER: tl.constexpr, WIDE: tl.constexpr):
    """The gate's values for a tile, in a shape that broadcasts against it; None of None.

    PER: "all", "image" or "row" (of the matrix), with "_channel" where each channel has a value of its own.
    """
    if gate is None:
        values = None
    elif PER == "all":
        values = tl.load(gate).to(tl.float32)
    elif PER == "all_channel":
        values = load_vector(gate, c, channels_there)
    else:
        if PER == "image" or PER == "image_channel":
            index = row // pixels
        else:
            index = row
        if PER == "image" or PER == "row":
            values = read(gate, index, row < stop)[:, None]
        else:
            there = (row < stop)[:, None] & channels_there[None, :]
            values = read(gate, offsets(index, c, channels, WIDE), there)
    return values


@triton.jit
def normed(t, scale, shift):
    """``t * scale + shift``; ``t`` without a scale."""
    if scale is None:
        z = t
    else:
        z = t * scale + shift
    return z


@triton.jit
def weighed(t, constant, factor, gate):
    """``(constant + factor * gate) * t``. factor None: 0; constant None as well: 1."""
    if factor is not None:
        product = (constant + factor * gate) * t
    elif constant is not None:
        product = constant * t
    else:
        product = t
    return product


@triton.jit
def fold(t, ROWS: tl.constexpr, KEPT: tl.constexpr, CHANNELS: tl.constexpr):
    """A tile's rows summed down to KEPT. With as many as all threads cover at once, each adds what it holds itself."""
    return tl.sum(tl.reshape(t, (ROWS // KEPT, KEPT, CHANNELS)), axis=0)


@triton.jit
def add_rows(mean, m2, seen, t, left, ROWS: tl.constexpr, KEPT: tl.constexpr, CHANNELS: tl.constexpr):
    """The first ``left`` rows of a tile merged into ``mean, m2`` (KEPT, CHANNELS), those of ``seen`` (KEPT, 1) rows.

    As in :func:`fold` each thread merges what it holds itself (Chan, Golub & LeVeque).
    """
    values = tl.reshape(t, (ROWS // KEPT, KEPT, CHANNELS))
    kept = tl.arange(0, KEPT)
    there = tl.arange(0, ROWS // KEPT)[:, None, None] * KEPT + kept[None, :, None] < left
    count = tl.minimum(tl.maximum((left - kept + KEPT - 1) // KEPT, 0), ROWS // KEPT).to(tl.float32)[:, None]
    # From the mean so far, which is close: the tile's own mean would be rounded at the size of the values.
    delta = tl.sum(tl.where(there, values - mean[None, :, :], 0.0), axis=0) / tl.maximum(count, 1.0)
    deviation = tl.where(there, values - (mean + delta)[None, :, :], 0.0)
    share = count / tl.maximum(seen + count, 1.0)
    m2 += tl.sum(deviation * deviation, axis=0) + delta * delta * (seen * share)
    return mean + delta * share, m2, seen + count


@triton.jit
def merge_rows(mean, m2, seen):
    """The statistics of all rows, (CHANNELS,), from those of KEPT sets of them; at least one row."""
    first = tl.sum(tl.where((tl.arange(0, seen.shape[0]) == 0)[:, None], mean, 0.0), axis=0)
    merged = first + tl.sum((mean - first[None, :]) * seen, axis=0) / tl.sum(seen)
    deviation = mean - merged[None, :]
    return merged, tl.sum(m2 + seen * deviation * deviation, axis=0)


@triton.jit
def keep_sum(part, slot: tl.constexpr, kept, program, programs, channels, c, there):
    """Store this program's (KEPT, CHANNELS) sums as its row of table ``slot``; part: (slots, programs, channels)."""
    at = (slot * programs + program).to(tl.int64) * channels + c
    tl.store(part + at, tl.sum(kept, axis=0), mask=there)


@triton.jit
def merge_sum(part, slot: tl.constexpr, out, factor, programs, channels, c, there, PARTS: tl.constexpr):
    """The last program's work: the sums of all programs, times the vector ``factor`` if given, to ``out``."""
    table = part + (slot * programs).to(tl.int64) * channels
    total = sum_partials(table, programs, channels, c, there, PARTS)
    if factor is not None:
        total = total * tl.load(factor + c, mask=there, other=0.0)
    tl.store(out + c, total, mask=there)
