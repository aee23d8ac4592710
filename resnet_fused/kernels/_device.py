"""What the kernels share on the device: activations, packed masks, sums that are the same at every run."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def relu(z):
    """``max(z, 0)`` that keeps NaN."""
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def prelu(z, slope):
    """``z`` where ``z > 0``, else ``slope * z``."""
    return tl.where(z > 0, z, slope * z)


@triton.jit
def unpack_bits(bits, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """(ROWS, CHANNELS / 8) bytes as (ROWS, CHANNELS) booleans: channel ``8 * j + i`` is bit ``i`` of byte ``j``."""
    each = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :].to(tl.uint8)) & 1
    return tl.reshape(each, (ROWS, CHANNELS)) != 0


@triton.jit
def pack_bits(positive, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """The inverse of :func:`unpack_bits`."""
    each = tl.reshape(positive.to(tl.int32), (ROWS, CHANNELS // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(each, axis=2).to(tl.uint8)


@triton.jit
def arrives_last(counter, programs):
    """Count this program's arrival at ``counter``; True in the last of ``programs``, which leaves the counter at 0.

    What the others stored before they arrived can be read then, past the first-level cache.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


# --- partial results of programs that walk over tiles: program p of P takes the tiles p, p + P, p + 2P, ... -----------


@triton.jit
def rows_of(program, programs, rows, ROWS: tl.constexpr):
    """How many of ``rows`` rows, in tiles of ROWS, ``program`` walks over."""
    tiles = tl.cdiv(rows, ROWS)
    walked = (tiles - program + programs - 1) // programs * ROWS
    missing = tiles * ROWS - rows  # of the last tile
    return tl.where((tiles - 1) % programs == program, walked - missing, walked)


@triton.jit
def merge_statistics(
    part_mean, part_m2, mean, m2, programs, rows, channels, c, valid, ROWS: tl.constexpr, PARTS: tl.constexpr
):
    """The last program's work: partial (programs, channels) means and M2 to (channels,), in a fixed order.

    c: this program's channels, ``valid`` where they exist. ROWS: of a tile; PARTS: partials read at once.
    """
    first = tl.load(part_mean + c, mask=valid, other=0.0, cache_modifier=".cg")
    total = rows * 1.0  # rows is a constant of the compiler where it is 1
    shift = tl.zeros_like(first)
    for p in range(0, programs, PARTS):
        program = p + tl.arange(0, PARTS)
        there = (program < programs)[:, None] & valid[None, :]
        share = rows_of(program, programs, rows, ROWS).to(tl.float32)[:, None] / total
        at = program[:, None] * channels + c[None, :]
        delta = tl.load(part_mean + at, mask=there, other=0.0, cache_modifier=".cg") - first[None, :]
        shift += tl.sum(tl.where(there, delta * share, 0.0), axis=0)
    merged = first + shift
    deviation = tl.zeros_like(first)
    for p in range(0, programs, PARTS):
        program = p + tl.arange(0, PARTS)
        there = (program < programs)[:, None] & valid[None, :]
        count = rows_of(program, programs, rows, ROWS).to(tl.float32)[:, None]
        at = program[:, None] * channels + c[None, :]
        delta = tl.load(part_mean + at, mask=there, other=0.0, cache_modifier=".cg") - merged[None, :]
        own = tl.load(part_m2 + at, mask=there, other=0.0, cache_modifier=".cg")
        deviation += tl.sum(tl.where(there, own + count * delta * delta, 0.0), axis=0)
    tl.store(mean + c, merged, mask=valid)
    tl.store(m2 + c, deviation, mask=valid)


@triton.jit
def sum_partials(part, programs, channels, c, valid, PARTS: tl.constexpr):
    """The last program's work: (programs, channels) partial sums to the sums of channels ``c``, in a fixed order."""
    total = tl.zeros_like(c).to(tl.float32)
    for p in range(0, programs, PARTS):
        program = p + tl.arange(0, PARTS)
        there = (program < programs)[:, None] & valid[None, :]
        at = program[:, None] * channels + c[None, :]
        total += tl.sum(tl.load(part + at, mask=there, other=0.0, cache_modifier=".cg"), axis=0)
    return total


# --- per-channel results of a product's tiles ------------------------------------------------------------------------
#
# A program adds up what its threads hold once, at its end; while it walks over its tiles every thread keeps its own.
#
# In the layout of a product's result a thread holds, of 16 rows of its warp, the rows r and r + 8. Sums over these (and
# over the warp's other 16-row parts) need no exchange between threads: partial results are (WARPS, 8, COLUMNS).
# In the layout of loads and stores a thread has 16 bytes of every GROUPS-th row: partial results are (GROUPS, COLUMNS).


@triton.jit
def fold(v, WARPS: tl.constexpr):
    """(ROWS, COLUMNS) to (WARPS, 8, COLUMNS): the sums over the rows that one thread holds."""
    PARTS: tl.constexpr = v.shape[0] // (16 * WARPS)
    v = tl.reshape(v, (PARTS, WARPS, 2, 8, v.shape[1]))
    return tl.sum(tl.sum(v, axis=2), axis=0)


@triton.jit
def fold_rows(v, GROUPS: tl.constexpr):
    """(ROWS, COLUMNS) to (GROUPS, COLUMNS): the sums over every GROUPS-th row."""
    return tl.sum(tl.reshape(v, (v.shape[0] // GROUPS, GROUPS, v.shape[1])), axis=0)


@triton.jit
def unfold(v, ROWS: tl.constexpr):
    """(WARPS, 8, COLUMNS) to (ROWS, COLUMNS): every row gets what its thread holds."""
    PARTS: tl.constexpr = ROWS // (16 * v.shape[0])
    each = tl.broadcast_to(v[None, :, None, :, :], (PARTS, v.shape[0], 2, 8, v.shape[2]))
    return tl.reshape(each, (ROWS, v.shape[2]))


@triton.jit
def fold_tile(mean, m2, seen, values, valid, ALL: tl.constexpr):
    """Merge a tile into the threads' own statistics (Chan, Golub & LeVeque).

    mean, m2: (WARPS, 8, COLUMNS). seen: rows so far, (WARPS, 8, 1). values: (ROWS, COLUMNS) fp32. valid: (ROWS, 1),
    read unless ALL rows are there.
    """
    ROWS: tl.constexpr = values.shape[0]
    WARPS: tl.constexpr = mean.shape[0]
    if ALL:
        count = tl.full((WARPS, 8, 1), ROWS // (8 * WARPS), tl.float32)
    else:
        values = tl.where(valid, values, 0.0)
        count = fold(valid.to(tl.float32), WARPS)
    tile_mean = fold(values, WARPS) / tl.maximum(count, 1.0)
    deviation = values - unfold(tile_mean, ROWS)
    if not ALL:
        deviation = tl.where(valid, deviation, 0.0)
    delta = tile_mean - mean
    share = count / tl.maximum(seen + count, 1.0)
    m2 += fold(deviation * deviation, WARPS) + delta * delta * (seen * share)
    return mean + delta * share, m2, seen + count


@triton.jit
def fold_all(mean, m2, seen):
    """The threads' statistics as the program's: (COLUMNS,) mean and M2."""
    share = seen / tl.sum(tl.sum(seen, axis=1, keep_dims=True), axis=0, keep_dims=True)
    merged = tl.sum(tl.sum(mean * share, axis=1), axis=0)
    delta = mean - merged[None, None, :]
    return merged, tl.sum(tl.sum(m2 + delta * delta * seen, axis=1), axis=0)
