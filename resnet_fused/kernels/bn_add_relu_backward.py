"""``bn_add_relu_backward``: the gradients of the general sum, materialised."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels._device import arrives_last
from resnet_fused.kernels._launch import counters, is_wide, launch, rows, vector
from resnet_fused.kernels.bn_add_relu_tiles import (
    fold,
    gate_of,
    keep_sum,
    load_vector,
    masked,
    merge_sum,
    normed,
    offsets,
    read,
    weighed,
)
from resnet_fused.kernels.bn_add_relu_walk import Walk, read_gate, sign_rows, terms_read, walk, weights
from resnet_fused.reference import store

SUMS = ("dbeta", "dgamma", "shortcut_dbeta", "shortcut_dgamma", "dslope")


@triton.jit(do_not_specialize=["rows", "pixels", "length"])
def backward_kernel(
    dout, sign, y, scale, shift, mean, rstd, shortcut, shortcut_scale, shortcut_shift, shortcut_mean, shortcut_rstd,
    gate, slope, branch, branch_gate, identity, identity_gate,
    dz, dshortcut, dgate, part, dbeta, dgamma, shortcut_dbeta, shortcut_dgamma, dslope, counter,
    rows, channels, pixels, length,
    BRANCH_RELU: tl.constexpr, ADDS: tl.constexpr, PER: tl.constexpr, GATE_SUM: tl.constexpr,
    ROWS: tl.constexpr, KEPT: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """With ``g`` the gradient of the sum, ``dout`` back through its ReLU (sign) or PReLU (slope)::

        dz = (branch + branch_gate * gate) * g                   where F passed its ReLU (BRANCH_RELU)
        dshortcut = (identity + identity_gate * gate) * g
        dgate = sum of g * (branch_gate * F + identity_gate * S) over what the gate is broadcast to
        dbeta = sum dz, dgamma = sum dz * xhat, both norms; dslope = sum of dout * sum where the sum is not positive

    Full-size tensors: (rows, channels). sign: see ``masked``. Vectors: (channels,) fp32. gate: see ``gate_of``.
    ADDS: whether the shortcut was added. dgate, fp32, by GATE_SUM: "row" (rows, channels), each element's; "image"
    (programs, channels), each program's sum, which is over ``length`` pixels of one image; "all" (channels,).
    part: (6, programs, channels). A program takes CHANNELS channels and every programs-th tile of ROWS rows, or its
    part of an image. Each full-size tensor that is needed is read or written once.
    Arithmetic in fp32; sums are of the rounded gradients, merged by the last program in a fixed order.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    block, program, programs = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    channels_there = c < channels
    own_scale = load_vector(scale, c, channels_there)
    own_shift = load_vector(shift, c, channels_there)
    other_scale = load_vector(shortcut_scale, c, channels_there)
    other_shift = load_vector(shortcut_shift, c, channels_there)
    own_mean = load_vector(mean, c, channels_there)
    other_mean = load_vector(shortcut_mean, c, channels_there)
    slopes = load_vector(slope, c, channels_there)
    sum_dz = tl.zeros([KEPT, CHANNELS], tl.float32)
    sum_dz_y = tl.zeros([KEPT, CHANNELS], tl.float32)
    sum_ds = tl.zeros([KEPT, CHANNELS], tl.float32)
    sum_ds_s = tl.zeros([KEPT, CHANNELS], tl.float32)
    sum_slope = tl.zeros([KEPT, CHANNELS], tl.float32)
    sum_gate = tl.zeros([KEPT, CHANNELS], tl.float32)
    first, stop, step = program * ROWS, rows, programs * ROWS
    if GATE_SUM == "image":
        splits = tl.cdiv(pixels, length)
        first = program // splits * pixels + program % splits * length
        stop = tl.minimum(first + length, (program // splits + 1) * pixels)
        step = ROWS
    for begin in range(first, stop, step):
        row = begin + tl.arange(0, ROWS)
        there = (row < stop)[:, None] & channels_there[None, :]
        at = offsets(row, c, channels, WIDE)
        gates = gate_of(gate, row, stop, c, channels_there, channels, pixels, PER, WIDE)
        g = masked(read(dout, at, there), sign, at, there, row, stop, block * CHANNELS, channels, ROWS, CHANNELS, WIDE)
        if y is not None:
            own = read(y, at, there)
        if shortcut is not None:
            other = read(shortcut, at, there)
            s = normed(other, other_scale, other_shift)
        if y is not None:
            z = normed(own, own_scale, own_shift)
            f = z
            if BRANCH_RELU:
                f = tl.where(z <= 0, 0.0, z)
        if slope is not None:
            total = weighed(f, branch, branch_gate, gates)
            if ADDS:
                total += weighed(s, identity, identity_gate, gates)
            sum_slope += fold(tl.where(total > 0, 0.0, g * total), ROWS, KEPT, CHANNELS)
            g = tl.where(total > 0, g, slopes * g)
        df = weighed(g, branch, branch_gate, gates)
        if BRANCH_RELU:
            df = tl.where(z <= 0, 0.0, df)
        rounded = df.to(dz.dtype.element_ty)
        tl.store(dz + at, rounded, mask=there)
        if mean is not None:
            df = rounded.to(tl.float32)
            sum_dz += fold(df, ROWS, KEPT, CHANNELS)
            sum_dz_y += fold(df * (own - own_mean), ROWS, KEPT, CHANNELS)
        if dshortcut is not None:
            ds = weighed(g, identity, identity_gate, gates).to(dshortcut.dtype.element_ty)
            tl.store(dshortcut + at, ds, mask=there)
        if shortcut_mean is not None:
            # Rounded to the shortcut's dtype whether it is stored or not.
            ds = weighed(g, identity, identity_gate, gates).to(shortcut.dtype.element_ty).to(tl.float32)
            sum_ds += fold(ds, ROWS, KEPT, CHANNELS)
            sum_ds_s += fold(ds * (other - other_mean), ROWS, KEPT, CHANNELS)
        if dgate is not None:
            product = tl.zeros([ROWS, CHANNELS], tl.float32)
            if branch_gate is not None:
                product += branch_gate * f
            if ADDS and identity_gate is not None:
                product += identity_gate * s
            if GATE_SUM == "row":
                tl.store(dgate + at, g * product, mask=there)
            else:
                sum_gate += fold(g * product, ROWS, KEPT, CHANNELS)
    if GATE_SUM == "image":
        keep_sum(dgate, 0, sum_gate, program, programs, channels, c, channels_there)
    if counter is not None:
        if mean is not None:
            keep_sum(part, 0, sum_dz, program, programs, channels, c, channels_there)
            keep_sum(part, 1, sum_dz_y, program, programs, channels, c, channels_there)
        if shortcut_mean is not None:
            keep_sum(part, 2, sum_ds, program, programs, channels, c, channels_there)
            keep_sum(part, 3, sum_ds_s, program, programs, channels, c, channels_there)
        if slope is not None:
            keep_sum(part, 4, sum_slope, program, programs, channels, c, channels_there)
        if GATE_SUM == "all":
            keep_sum(part, 5, sum_gate, program, programs, channels, c, channels_there)
        if arrives_last(counter + block, programs):
            if mean is not None:
                merge_sum(part, 0, dbeta, None, programs, channels, c, channels_there, PARTS)
                merge_sum(part, 1, dgamma, rstd, programs, channels, c, channels_there, PARTS)
            if shortcut_mean is not None:
                merge_sum(part, 2, shortcut_dbeta, None, programs, channels, c, channels_there, PARTS)
                merge_sum(part, 3, shortcut_dgamma, shortcut_rstd, programs, channels, c, channels_there, PARTS)
            if slope is not None:
                merge_sum(part, 4, dslope, None, programs, channels, c, channels_there, PARTS)
            if GATE_SUM == "all":
                merge_sum(part, 5, dgate, None, programs, channels, c, channels_there, PARTS)


def bn_add_relu_backward(
    dout, sign, y, scale, shift, mean, rstd, shortcut, shortcut_scale, shortcut_shift, shortcut_mean, shortcut_rstd,
    gate, mix, branch_relu, slope, need_shortcut, need_gate,
):  # fmt: skip
    """The op: one launch, and passes over the gate's gradient where the gate varies over neither image nor channel."""
    taken = walk(
        "bn_add_relu_backward",
        (
            dout, sign, y, scale, shift, mean, rstd, shortcut, shortcut_scale, shortcut_shift, shortcut_mean,
            shortcut_rstd, gate, mix, branch_relu, slope, need_shortcut, need_gate,
        ),
    )  # fmt: skip
    reads_y, reads_shortcut = terms_read(mean, shortcut, shortcut_mean, mix, branch_relu, slope, need_gate)
    dz = torch.empty_like(y, memory_format=torch.channels_last)
    dshortcut = torch.empty_like(shortcut, memory_format=torch.channels_last) if need_shortcut else y.new_empty((0,))
    asked = (mean, rstd, shortcut_mean, shortcut_rstd, slope)
    sums = {
        name: y.new_empty((0 if given is None else taken.channels,), dtype=torch.float32)
        for name, given in zip(SUMS, asked, strict=True)
    }
    gate_values, per = read_gate(gate, y)
    gate_sum = per.removesuffix("_channel") if need_gate else ""
    dgate = _gate_sums(y, gate_sum, taken)
    written: dict[str, Any] = {name: out if out.numel() else None for name, out in sums.items()}
    merges = gate_sum == "all" or any(given is not None for given in asked)
    branch, branch_gate, identity, identity_gate = weights(mix)
    launch(
        backward_kernel,
        taken.grid,
        warps=taken.warps,
        dout=rows(dout), sign=sign_rows(sign), y=rows(y) if reads_y else None, scale=vector(scale), shift=vector(shift),
        mean=vector(mean), rstd=vector(rstd), shortcut=rows(shortcut) if reads_shortcut else None,
        shortcut_scale=vector(shortcut_scale), shortcut_shift=vector(shortcut_shift),
        shortcut_mean=vector(shortcut_mean), shortcut_rstd=vector(shortcut_rstd),
        gate=gate_values, slope=vector(slope),
        branch=branch, branch_gate=branch_gate, identity=identity, identity_gate=identity_gate,
        dz=dz, dshortcut=dshortcut if need_shortcut else None, dgate=dgate,
        part=dz.new_empty((6, taken.programs, taken.channels), dtype=torch.float32) if merges else None,
        **written,
        counter=counters(y.device, taken.blocks) if merges else None,
        rows=taken.rows, channels=taken.channels, pixels=taken.pixels, length=taken.length,
        BRANCH_RELU=branch_relu, ADDS=bool(mix[2] or mix[3]) and shortcut is not None, PER=per, GATE_SUM=gate_sum,
        KEPT=taken.kept, PARTS=taken.parts, WIDE=is_wide(y), **taken.tile,
    )  # fmt: skip
    if dgate is None:
        dgate = y.new_empty((0,), dtype=torch.float32)
    elif dgate.shape != gate.shape:
        dgate = store(dgate.sum_to_size(gate.shape), torch.float32)
    *norm_sums, dslope = sums.values()
    return dz, dshortcut, *norm_sums, dgate, dslope


def _gate_sums(y: Tensor, gate_sum: str, taken: Walk) -> Tensor | None:
    """What the kernel writes of the gate's gradient, a tensor that sums to the gate's shape; None without a gate."""
    n, channels, *_ = y.shape
    shapes = {"row": y.shape, "image": (n, channels, taken.programs // n, 1), "all": (1, channels, 1, 1)}
    if not gate_sum:
        return None
    return torch.empty(shapes[gate_sum], dtype=torch.float32, device=y.device, memory_format=torch.channels_last)
