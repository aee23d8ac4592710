"""``bn_add_relu_reduce``, ``bn_add_relu_apply`` and ``bn_add_relu_mask``: the gradient of the plain sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resnet_fused.kernels._device import arrives_last
from resnet_fused.kernels._launch import counters, is_wide, launch, rows, vector
from resnet_fused.kernels.bn_add_relu_tiles import fold, keep_sum, load_vector, masked, merge_sum, offsets, read
from resnet_fused.kernels.bn_add_relu_walk import sign_rows, walk


@triton.jit(do_not_specialize=["rows"])
def reduce_kernel(
    dz, sign, y, mean, rstd, shortcut, shortcut_mean, shortcut_rstd,
    part, dbeta, dgamma, shortcut_dgamma, counter, rows, channels,
    ROWS: tl.constexpr, KEPT: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``dbeta = sum dz'``, ``dgamma = rstd * sum dz' * (y - mean)``, and the latter for the shortcut's norm.

    dz, y, shortcut: (rows, channels). sign: see ``masked``. Vectors: (channels,) fp32. part: (3, programs, channels).
    A program takes CHANNELS channels and every programs-th tile of ROWS rows; each thread adds up what it holds, the
    threads' sums are added once. Reads each tensor and 1/8 byte of mask an element once; writes next to nothing.
    fp32 sums, merged by the last program in a fixed order; rstd is common to all terms and multiplied at the end.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    block, program, programs = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    channels_there = c < channels
    own_mean = load_vector(mean, c, channels_there)
    other_mean = load_vector(shortcut_mean, c, channels_there)
    sum_dz = tl.zeros([KEPT, CHANNELS], tl.float32)
    sum_y = tl.zeros([KEPT, CHANNELS], tl.float32)
    sum_shortcut = tl.zeros([KEPT, CHANNELS], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & channels_there[None, :]
        at = offsets(row, c, channels, WIDE)
        # All loads first: what is read later waits for what was read before.
        own = read(y, at, there)
        if shortcut is not None:
            other = read(shortcut, at, there)
        g = masked(read(dz, at, there), sign, at, there, row, rows, block * CHANNELS, channels, ROWS, CHANNELS, WIDE)
        sum_dz += fold(g, ROWS, KEPT, CHANNELS)
        sum_y += fold(g * (own - own_mean), ROWS, KEPT, CHANNELS)
        if shortcut is not None:
            sum_shortcut += fold(g * (other - other_mean), ROWS, KEPT, CHANNELS)
    keep_sum(part, 0, sum_dz, program, programs, channels, c, channels_there)
    keep_sum(part, 1, sum_y, program, programs, channels, c, channels_there)
    if shortcut is not None:
        keep_sum(part, 2, sum_shortcut, program, programs, channels, c, channels_there)
    if arrives_last(counter + block, programs):
        merge_sum(part, 0, dbeta, None, programs, channels, c, channels_there, PARTS)
        merge_sum(part, 1, dgamma, rstd, programs, channels, c, channels_there, PARTS)
        if shortcut is not None:
            merge_sum(part, 2, shortcut_dgamma, shortcut_rstd, programs, channels, c, channels_there, PARTS)


def bn_add_relu_reduce(dz, sign, y, mean, rstd, shortcut, shortcut_mean, shortcut_rstd):
    """The op, in one launch."""
    taken = walk("bn_add_relu_reduce", (dz, sign, y, mean, rstd, shortcut, shortcut_mean, shortcut_rstd))
    two = shortcut is not None
    dbeta, dgamma = torch.empty_like(mean), torch.empty_like(mean)
    shortcut_dgamma = torch.empty_like(mean) if two else mean.new_empty((0,))
    launch(
        reduce_kernel,
        taken.grid,
        warps=taken.warps,
        dz=rows(dz), sign=sign_rows(sign), y=rows(y), mean=vector(mean), rstd=vector(rstd),
        shortcut=rows(shortcut) if two else None,
        shortcut_mean=vector(shortcut_mean), shortcut_rstd=vector(shortcut_rstd),
        part=mean.new_empty((3, taken.programs, taken.channels)),
        dbeta=dbeta, dgamma=dgamma, shortcut_dgamma=shortcut_dgamma if two else None,
        counter=counters(dz.device, taken.blocks),
        rows=taken.rows, channels=taken.channels,
        KEPT=taken.kept, PARTS=taken.parts, WIDE=is_wide(dz), **taken.tile,
    )  # fmt: skip
    return dbeta, dgamma, shortcut_dgamma


@triton.jit(do_not_specialize=["rows"])
def apply_kernel(
    dz, sign, y, a, b, c, skip, skip_sign, skip_scale, out, rows, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``out = a * dz' + b * y + c + skip_scale * skip'``, without what is None (``a`` and ``skip_scale``: 1).

    dz, y, skip, out: (rows, channels). sign, skip_sign: see ``masked``. a, b, c: (channels,) fp32.
    A program takes CHANNELS channels and every programs-th tile of ROWS rows. Reads each tensor and its mask once,
    writes out once. Arithmetic in fp32, rounded once.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    block, program, programs = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    first = block * CHANNELS
    channel = first + tl.arange(0, CHANNELS)
    channels_there = channel < channels
    a_ = load_vector(a, channel, channels_there)
    b_ = load_vector(b, channel, channels_there)
    c_ = load_vector(c, channel, channels_there)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & channels_there[None, :]
        at = offsets(row, channel, channels, WIDE)
        dy = read(dz, at, there)
        if b is not None:
            own = read(y, at, there)
        if skip is not None:
            added = read(skip, at, there)
            added = masked(added, skip_sign, at, there, row, rows, first, channels, ROWS, CHANNELS, WIDE)
        dy = masked(dy, sign, at, there, row, rows, first, channels, ROWS, CHANNELS, WIDE)
        if a is not None:
            dy = dy * a_
        if b is not None:
            dy = dy + (own * b_ + c_)
        if skip is not None:
            if skip_scale is not None:
                added = added * skip_scale
            dy = dy + added
        tl.store(out + at, dy.to(out.dtype.element_ty), mask=there)


def bn_add_relu_apply(dz, sign, y, a, b, c, skip, skip_sign, skip_scale):
    """The op, in one launch."""
    taken = walk("bn_add_relu_apply", (dz, sign, y, a, b, c, skip, skip_sign, skip_scale))
    out = torch.empty_like(y, memory_format=torch.channels_last)
    launch(
        apply_kernel,
        taken.grid,
        warps=taken.warps,
        dz=rows(dz), sign=sign_rows(sign), y=None if b is None else rows(y), a=vector(a), b=vector(b), c=vector(c),
        skip=None if skip is None else rows(skip), skip_sign=None if skip is None else sign_rows(skip_sign),
        skip_scale=None if skip is None or skip_scale == 1 else float(skip_scale), out=out,
        rows=taken.rows, channels=taken.channels, WIDE=is_wide(dz), **taken.tile,
    )  # fmt: skip
    return out


def bn_add_relu_mask(dout, sign):
    """The op, in one launch of :func:`apply_kernel`."""
    taken = walk("bn_add_relu_mask", (dout, sign))
    out = torch.empty_like(dout, memory_format=torch.channels_last)
    launch(
        apply_kernel,
        taken.grid,
        warps=taken.warps,
        dz=rows(dout), sign=sign_rows(sign), y=None, a=None, b=None, c=None, skip=None, skip_sign=None, skip_scale=None,
        out=out, rows=taken.rows, channels=taken.channels, WIDE=is_wide(dout), **taken.tile,
    )  # fmt: skip
    return out
