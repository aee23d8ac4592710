"""``bn_add_relu_forward``: a residual block's end in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resnet_fused.kernels._device import arrives_last, merge_statistics, pack_bits, prelu, relu
from resnet_fused.kernels._launch import counters, is_wide, launch, rows, vector
from resnet_fused.kernels.bn_add_relu_tiles import (
    add_rows,
    bytes_of,
    gate_of,
    load_vector,
    merge_rows,
    normed,
    offsets,
    read,
    weighed,
)
from resnet_fused.kernels.bn_add_relu_walk import read_gate, walk, weights
from resnet_fused.reference import no_statistics


@triton.jit(do_not_specialize=["rows", "pixels"])
def forward_kernel(
    y, scale, shift, shortcut, shortcut_scale, shortcut_shift, gate, slope,
    branch, branch_gate, identity, identity_gate,
    out, bits, part_mean, part_m2, counts, mean, m2, counter,
    rows, channels, pixels,
    BRANCH_RELU: tl.constexpr, RELU: tl.constexpr, PER: tl.constexpr,
    ROWS: tl.constexpr, KEPT: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``out = act((branch + branch_gate * gate) * F + (identity + identity_gate * gate) * S)``.

    ``F = y * scale + shift`` (ReLU'd with BRANCH_RELU), ``S`` likewise from ``shortcut``; what is None plays no part.

    y, shortcut, out: (rows, channels). Vectors: (channels,) fp32. gate: see ``gate_of``. bits: (rows, channels / 8)
    bytes, bit i of byte j tells ``!(out <= 0)`` of channel 8 j + i. part_mean, part_m2: (programs, channels) fp32.
    A program takes CHANNELS channels and every programs-th tile of ROWS rows; per-channel vectors stay in registers.
    Moves y, shortcut, out and 1/8 byte of bits an element once.
    Arithmetic in fp32, rounded once; statistics are of the rounded values, merged by Chan's rule in a fixed order.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    block, program, programs = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    channels_there = c < channels
    own_scale = load_vector(scale, c, channels_there)
    own_shift = load_vector(shift, c, channels_there)
    other_scale = load_vector(shortcut_scale, c, channels_there)
    other_shift = load_vector(shortcut_shift, c, channels_there)
    slopes = load_vector(slope, c, channels_there)
    own_mean, own_m2 = tl.zeros([KEPT, CHANNELS], tl.float32), tl.zeros([KEPT, CHANNELS], tl.float32)
    seen = tl.zeros([KEPT, 1], tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & channels_there[None, :]
        at = offsets(row, c, channels, WIDE)
        gates = gate_of(gate, row, rows, c, channels_there, channels, pixels, PER, WIDE)
        own = read(y, at, there)
        if shortcut is not None:
            other = read(shortcut, at, there)
        f = normed(own, own_scale, own_shift)
        if BRANCH_RELU:
            f = relu(f)
        total = weighed(f, branch, branch_gate, gates)
        if shortcut is not None:
            s = normed(other, other_scale, other_shift)
            total += weighed(s, identity, identity_gate, gates)
        if slope is not None:
            total = prelu(total, slopes)
        elif RELU:
            total = relu(total)
        rounded = total.to(out.dtype.element_ty)
        tl.store(out + at, rounded, mask=there)
        if bits is not None:
            byte, byte_there = bytes_of(row, rows, block * CHANNELS, channels, CHANNELS, WIDE)
            positive = tl.where(rounded.to(tl.float32) <= 0, 0, 1)
            tl.store(bits + byte, pack_bits(positive, ROWS, CHANNELS), mask=byte_there)
        if mean is not None:
            t = rounded.to(tl.float32)
            left = rows - tile * ROWS
            own_mean, own_m2, seen = add_rows(own_mean, own_m2, seen, t, left, ROWS, KEPT, CHANNELS)
    if mean is not None:
        own = program.to(tl.int64) * channels + c
        program_mean, program_m2 = merge_rows(own_mean, own_m2, seen)
        tl.store(part_mean + own, program_mean, mask=channels_there)
        tl.store(part_m2 + own, program_m2, mask=channels_there)
        if arrives_last(counter + block, programs):
            merge_statistics(
                part_mean, part_m2, mean, m2, programs, rows, channels, c, channels_there, ROWS, PARTS
            )  # fmt: skip
            if block == 0:
                tl.store(counts, rows)


def bn_add_relu_forward(
    y, scale, shift, shortcut, shortcut_scale, shortcut_shift, gate, mix, branch_relu, relu, slope, mask, statistics
):
    """The op, in one launch."""
    taken = walk(
        "bn_add_relu_forward",
        (
            y, scale, shift, shortcut, shortcut_scale, shortcut_shift, gate, mix, branch_relu, relu, slope, mask,
            statistics,
        ),
    )  # fmt: skip
    if not (mix[2] or mix[3]):
        shortcut = shortcut_scale = shortcut_shift = None
    out = torch.empty_like(y, memory_format=torch.channels_last)
    bits = y.new_empty(((y.numel() + 7) // 8 if mask else 0,), dtype=torch.uint8)
    found = no_statistics(y)
    merging: dict = dict.fromkeys(("part_mean", "part_m2", "counts", "mean", "m2", "counter"))
    if statistics:
        found = y.new_empty((1,), dtype=torch.int32), *y.new_empty((2, 1, y.shape[1]), dtype=torch.float32).unbind()
        parts = y.new_empty((2, taken.programs, y.shape[1]), dtype=torch.float32)
        merging = {
            "part_mean": parts[0], "part_m2": parts[1], "counts": found[0], "mean": found[1], "m2": found[2],
            "counter": counters(y.device, taken.blocks),
        }  # fmt: skip
    branch, branch_gate, identity, identity_gate = weights(mix)
    gate_values, per = read_gate(gate, y)
    launch(
        forward_kernel,
        taken.grid,
        warps=taken.warps,
        y=rows(y), scale=vector(scale), shift=vector(shift),
        shortcut=None if shortcut is None else rows(shortcut),
        shortcut_scale=vector(shortcut_scale), shortcut_shift=vector(shortcut_shift),
        gate=gate_values, slope=vector(slope),
        branch=branch, branch_gate=branch_gate, identity=identity, identity_gate=identity_gate,
        out=out, bits=bits if mask else None, **merging,
        rows=taken.rows, channels=taken.channels, pixels=taken.pixels,
        BRANCH_RELU=branch_relu, RELU=relu, PER=per, KEPT=taken.kept, PARTS=taken.parts, WIDE=is_wide(y), **taken.tile,
    )  # fmt: skip
    return out, bits, *found
