"""What a pass at the block's end depends on, the configurations it may take, and how it walks over its rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import tuning
from resnet_fused.kernels._launch import SHORT, cdiv, multiprocessors, rows, vector
from resnet_fused.tuning import RowsConfig


class Problem(NamedTuple):
    """A pass over (images * pixels, channels) elements: what it moves, and what it sums."""

    images: int
    pixels: int
    channels: int
    dtype: str  # of the first tensor
    read: int  # bytes an element, of the full-size tensors
    written: int
    bits: bool  # with a packed mask
    sums: int  # per-channel results of all rows, merged by the last program
    gate: str  # how the gate varies: "", "all", "image", "row", each with "_channel" where it varies over channels too
    images_apart: bool  # whether a program's rows are of one image


def problem(op: str, *args: Any) -> Problem:
    """The key of ``op``'s configuration for these arguments."""
    first = args[0]
    n, c, h, w = first.shape
    traffic = _TRAFFIC[op.removeprefix("bn_add_relu_")](*args)
    return Problem(n, h * w, c, SHORT[first.dtype], *traffic)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.element_size() for t in tensors if t is not None and t.dtype != torch.uint8)


def _packed(*signs: Tensor | None) -> bool:
    return any(sign is not None and sign.dtype == torch.uint8 for sign in signs)


def _forward(
    y, scale, shift, shortcut, shortcut_scale, shortcut_shift, gate, mix, branch_relu, relu, slope, mask, statistics
) -> tuple[int, int, bool, int, str, bool]:
    per = gate_per(gate, y)
    read = _bytes(y, shortcut if mix[2] or mix[3] else None, gate if per.startswith("row") else None)
    return read, _bytes(y), mask, 2 if statistics else 0, per, False


def _backward(
    dout, sign, y, scale, shift, mean, rstd, shortcut, shortcut_scale, shortcut_shift, shortcut_mean, shortcut_rstd,
    gate, mix, branch_relu, slope, need_shortcut, need_gate,
) -> tuple[int, int, bool, int, str, bool]:  # fmt: skip
    per = gate_per(gate, y)
    reads_y, reads_shortcut = terms_read(mean, shortcut, shortcut_mean, mix, branch_relu, slope, need_gate)
    read = _bytes(dout, sign, y if reads_y else None, shortcut if reads_shortcut else None)
    written = _bytes(y, shortcut if need_shortcut else None)
    if per.startswith("row"):
        read, written = read + _bytes(gate), written + (4 if need_gate else 0)
    sums = 2 * (mean is not None) + 2 * (shortcut_mean is not None) + (slope is not None)
    sums += need_gate and per.startswith("all")
    return read, written, _packed(sign), sums, per, need_gate and per.startswith("image")


def _reduce(dz, sign, y, mean, rstd, shortcut, shortcut_mean, shortcut_rstd) -> tuple[int, int, bool, int, str, bool]:
    return _bytes(dz, sign, y, shortcut), 0, _packed(sign), 2 if shortcut is None else 3, "", False


def _apply(dz, sign, y, a, b, c, skip, skip_sign, skip_scale) -> tuple[int, int, bool, int, str, bool]:
    read = _bytes(dz, sign, None if b is None else y, skip, None if skip is None else skip_sign)
    return read, _bytes(y), _packed(sign, skip_sign), 0, "", False


def _mask(dout, sign) -> tuple[int, int, bool, int, str, bool]:
    return _bytes(dout, sign), _bytes(dout), _packed(sign), 0, "", False


def _pool(y, scale, shift) -> tuple[int, int, bool, int, str, bool]:
    return _bytes(y), 0, False, 0, "", True


def _spread(dz, dpool) -> tuple[int, int, bool, int, str, bool]:
    return _bytes(dz), _bytes(dz), False, 0, "image_channel", False


_TRAFFIC = {
    function.__name__[1:]: function for function in (_forward, _backward, _reduce, _apply, _mask, _pool, _spread)
}


def terms_read(mean, shortcut, shortcut_mean, mix, branch_relu, slope, need_gate) -> tuple[bool, bool]:
    """Whether backward reads ``y`` and the shortcut."""
    sloped = slope is not None
    added = shortcut is not None and bool(mix[2] or mix[3])
    reads_y = mean is not None or branch_relu or sloped or bool(need_gate and mix[1])
    return reads_y, shortcut_mean is not None or (added and (sloped or bool(need_gate and mix[3])))


# --- configurations -------------------------------------------------------------------------------------------------


def candidates(problem: Problem) -> tuple[RowsConfig, ...]:
    """The configurations worth measuring, the conservative one first.

    An H200 reaches its bandwidth with some 40 KB in flight on a multiprocessor. These ask for 64 KB, which is 128 loads
    of 16 bytes by whole warps, with no more warps than fit at once: a persistent program that has to wait for another's
    end is then alone. A tile is ``accesses`` such loads of a thread from each tensor.
    """
    vector = _vector(problem)
    streams = max(1, cdiv(problem.read * vector, 16))  # tensors read
    # A thread has up to 80 registers; sums beside a result or a third operand take up to 128.
    fitting = 16 if problem.sums and (problem.written or streams > 2) else 24

    def config(warps: int, accesses: int, width: int, programs: int | None = None) -> RowsConfig:
        channels = min(width, power_of_2(problem.channels))
        tile = max(1, 32 * warps * vector * accesses // channels)
        if problem.images_apart:
            tile = min(tile, power_of_2(problem.pixels))
        if programs is None:
            programs = max(1, min(128 // (warps * accesses * streams), fitting // warps))
        return RowsConfig(tile, channels, warps, programs)

    # Four accesses of each of several tensors take more registers than ptxas is willing to give: it spills some.
    many = max(1, min(4 if streams == 1 else 2, power_of_2(8 // streams + 1) // 2))
    few = max(1, many // 2)
    found: tuple[RowsConfig, ...]
    if problem.images_apart:
        # An image has few rows and there are many images: small programs, as many as there is work.
        found = config(4, few, 64), config(4, many, 64), config(8, few, 64), config(4, few, 128), config(4, few, 32)
    elif problem.sums and problem.sums + streams + 2 * bool(problem.written) > 6:
        # So many sums and operands that a thread needs some 128 registers: 16 warps are all that fit.
        found = config(8, 1, 64, 2), config(8, 2, 64, 1), config(4, 1, 64, 4), config(4, 2, 64, 2), config(8, 1, 128, 2)
    elif problem.sums:
        # The last program reads the sums of all: few programs of many warps; tiles are narrow, so that the channels
        # are merged by several programs at the same time.
        found = (
            config(8, many, 64), config(8, few, 64), config(8, few, 64, 4), config(4, few, 64), config(16, many, 64, 1),
            config(8, few, 128),
        )  # fmt: skip
    else:
        # A warp reads 512 bytes of a row, and 32 of the mask. Persistent programs read the per-channel vectors once;
        # with 0 each tile has a program of its own: the next one starts sooner than a loop turns.
        persistent = config(4, many, 256), config(4, few, 256, 8), config(8, few, 256, 4)
        found = *persistent, config(4, many, 256, 0), config(4, few, 256, 0), config(8, few, 512, 0)
    return tuple(dict.fromkeys(found))


def _vector(problem: Problem) -> int:
    """Elements of a 16-byte access."""
    return 4 if problem.dtype == "fp32" else 8


def power_of_2(n: int) -> int:
    """The next one."""
    return 1 << (n - 1).bit_length()


# --- the walk ---------------------------------------------------------------------------------------------------------


class Walk(NamedTuple):
    """How a launch shares out the (rows, channels) matrix."""

    rows: int
    channels: int
    pixels: int
    tile: dict[str, int]  # ROWS, CHANNELS
    kept: int  # rows of a tile that all threads cover at once, with 16 bytes each
    warps: int
    blocks: int  # of channels
    programs: int  # for each block of channels
    length: int  # rows of a program's part of an image, where a program stays within one

    @property
    def grid(self) -> tuple[int]:
        return (self.programs * self.blocks,)

    @property
    def parts(self) -> int:
        """Programs whose partial sums are read at once: 16 KB of fp32 for each 4 warps."""
        return max(1, min(power_of_2(self.programs), 1024 * self.warps // self.tile["CHANNELS"]))


def walk(op: str, args: tuple) -> Walk:
    """The walk of ``op``, by the configuration chosen for its arguments."""
    key, device = problem(op, *args), args[0].device
    config = tuning.choose(op, key, device, candidates)
    assert isinstance(config, RowsConfig)
    channels = min(config.channels, power_of_2(key.channels))
    blocks = cdiv(key.channels, channels)
    total, wanted = key.images * key.pixels, multiprocessors(device) * config.programs // blocks
    length = key.pixels
    if key.images_apart:
        splits = min(max(wanted // key.images, 1), cdiv(key.pixels, config.rows))
        length = cdiv(cdiv(key.pixels, splits), config.rows) * config.rows
        programs = key.images * cdiv(key.pixels, length)
    else:
        tiles = cdiv(total, config.rows)
        programs = min(tiles, max(wanted, 1)) if config.programs else tiles
    kept = max(1, min(config.rows, 32 * config.warps * _vector(key) // channels))
    tile = {"ROWS": config.rows, "CHANNELS": channels}
    return Walk(total, key.channels, key.pixels, tile, kept, config.warps, blocks, programs, length)


def sign_rows(sign: Tensor | None) -> Tensor | None:
    """A packed mask in contiguous memory, values as a (M, C) matrix."""
    return vector(sign) if sign is None or sign.dtype == torch.uint8 else rows(sign)


# --- gates ------------------------------------------------------------------------------------------------------------


def gate_per(gate: Tensor | None, y: Tensor) -> str:
    """How the gate varies; "row" for every form that is expanded to all pixels first."""
    if gate is None:
        return ""
    n, c, h, w = gate.shape
    if n * h * w == 1:
        per = "all"
    elif (n, h, w) == (y.shape[0], 1, 1) and y.shape[2] * y.shape[3] > 1:
        per = "image"
    else:
        per = "row"
    return per + "_channel" if c > 1 else per


def read_gate(gate: Tensor | None, y: Tensor) -> tuple[Tensor | None, str]:
    """The gate as the kernels read it, a matrix of contiguous rows, and how it varies."""
    per = gate_per(gate, y)
    if gate is not None and per.startswith("row"):
        n, _, h, w = y.shape
        gate = gate.expand(n, gate.shape[1], h, w)
    return None if gate is None else rows(gate), per


def weights(mix) -> tuple[float | None, float | None, float | None, float | None]:
    """``mix`` for the kernels: a factor of the gate is None for 0, and a constant beside it None for 1."""
    branch, branch_gate, shortcut, shortcut_gate = map(float, mix)

    def pair(constant: float, factor: float) -> tuple[float | None, float | None]:
        return (constant, factor) if factor else (None if constant == 1 else constant, None)

    return *pair(branch, branch_gate), *pair(shortcut, shortcut_gate)
