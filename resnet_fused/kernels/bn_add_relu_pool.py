"""``bn_add_relu_pool`` and ``bn_add_relu_spread``: the mean over the pixels, and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from resnet_fused.kernels._launch import is_wide, launch, rows, vector
from resnet_fused.kernels.bn_add_relu_tiles import fold, gate_of, offsets, read
from resnet_fused.kernels.bn_add_relu_walk import walk


@triton.jit(do_not_specialize=["pixels"])
def pool_kernel(
    y, scale, shift, out, channels, pixels,
    ROWS: tl.constexpr, KEPT: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``out = mean of y over an image's pixels, * scale + shift``.

    y: (images * pixels, channels). scale, shift: (channels,) fp32 or None. out: (images, channels).
    A program takes CHANNELS channels of one image. Reads y once. fp32 sums in a fixed order; the mean of the normed
    values is the normed mean.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    block, image = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    channels_there = c < channels
    total = tl.zeros([KEPT, CHANNELS], tl.float32)
    for first in range(0, pixels, ROWS):
        pixel = first + tl.arange(0, ROWS)
        there = (pixel < pixels)[:, None] & channels_there[None, :]
        total += fold(read(y, offsets(image * pixels + pixel, c, channels, WIDE), there), ROWS, KEPT, CHANNELS)
    mean = tl.sum(total, axis=0) / pixels
    if scale is not None:
        factor = tl.load(scale + c, mask=channels_there, other=0.0)
        mean = mean * factor + tl.load(shift + c, mask=channels_there, other=0.0)
    tl.store(out + image.to(tl.int64) * channels + c, mean.to(out.dtype.element_ty), mask=channels_there)


def bn_add_relu_pool(y, scale, shift):
    """The op, in one launch."""
    taken = walk("bn_add_relu_pool", (y, scale, shift))
    n, channels, h, w = y.shape
    out = torch.empty((n, channels, 1, 1), dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    launch(
        pool_kernel,
        (n * taken.blocks,),
        warps=taken.warps,
        y=rows(y), scale=vector(scale), shift=vector(shift), out=out, channels=channels, pixels=h * w,
        KEPT=taken.kept, WIDE=is_wide(y), **taken.tile,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows", "pixels"])
def spread_kernel(
    dz, dpool, share, out, rows, channels, pixels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``out = dz + share * dpool``, share being ``1 / pixels``.

    dz, out: (rows, channels). dpool: (images, channels). A program takes CHANNELS channels and every programs-th tile
    of ROWS rows. Reads dz and writes out once; dpool, read again for each pixel, stays in the caches.
    """
    blocks = tl.cdiv(channels, CHANNELS)
    block, program, programs = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    channels_there = c < channels
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & channels_there[None, :]
        at = offsets(row, c, channels, WIDE)
        mean = gate_of(dpool, row, rows, c, channels_there, channels, pixels, "image_channel", WIDE)
        tl.store(out + at, (read(dz, at, there) + share * mean).to(out.dtype.element_ty), mask=there)


def bn_add_relu_spread(dz, dpool):
    """The op, in one launch."""
    taken = walk("bn_add_relu_spread", (dz, dpool))
    out = torch.empty_like(dz, memory_format=torch.channels_last)
    launch(
        spread_kernel,
        taken.grid,
        warps=taken.warps,
        dz=rows(dz), dpool=rows(dpool), share=1 / taken.pixels, out=out,
        rows=taken.rows, channels=taken.channels, pixels=taken.pixels, WIDE=is_wide(dz), **taken.tile,
    )  # fmt: skip
    return out
