"""``stem``: norm, ReLU and 3x3/2 max-pool after an ImageNet ResNet's first convolution, and its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import tuning
from resnet_fused.kernels._launch import SHORT, cdiv, counters, launch, multiprocessors, rows, unsupported, vector
from resnet_fused.kernels.stem_passes import apply_kernel, forward_kernel, reduce_kernel
from resnet_fused.ops._op import empty_channels_last
from resnet_fused.tuning import Config, Materialised, RowsConfig

# --- configurations -------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What a configuration is chosen for."""

    dtype: str
    images: int
    channels: int
    height: int  # of y
    width: int
    backward: bool


class Inference(NamedTuple):
    """What decides between backends for a stem in inference."""

    dtype: str
    images: int
    channels: int  # of the convolution's output
    height: int  # of its input
    width: int
    kernel: int
    stride: int


# The greatest key of a number: infinity's bits, all codes.
_INFINITY = {torch.float32: 0x7F80_0000_0000_000F, torch.float16: 0x7F80_000F, torch.bfloat16: 0x7F80_000F}


def problem(op: str, *args: Any) -> Problem | Inference:
    """Of ``op`` on its arguments."""
    if op == "stem_infer":
        x, weight, _, stride, _ = args
        images, _, height, width = x.shape
        return Inference(SHORT[x.dtype], images, weight.shape[0], height, width, weight.shape[2], stride)
    backward = op != "stem_forward"
    y = args[1 if backward else 0]
    assert y is not None
    images, channels, height, width = y.shape
    return Problem(SHORT[y.dtype], images, channels, height, width, backward)


def candidates(problem: Problem | Inference) -> tuple[Config, ...]:
    """One 16-byte access of each tensor a thread; the loads of a row of windows are 64 to 112 bytes in flight.

    ``rows`` are strips. Programs are as many as registers leave room for, 128 of a thread in backward; where sums are
    merged, few large programs are better than many small ones.
    """
    if isinstance(problem, Inference):
        return (Materialised(),)  # its pass has the configuration of stem_forward
    channels = min(64, triton.next_power_of_2(problem.channels))
    strips = 32 * (4 if problem.dtype == "fp32" else 8) // channels  # of a warp
    resident = 16 if problem.backward else 24  # warps of a multiprocessor
    # Warps of a program, and what part of the warps to use.
    shapes: tuple[tuple[int, int], ...] = ((4, 1), (8, 1), (4, 2), (8, 2))
    if problem.dtype == "fp32" and not problem.backward:
        shapes = shapes[1::2]  # ptxas spills a register of four warps
    return tuple(RowsConfig(strips * warps, channels, warps, resident // (warps * part)) for warps, part in shapes)


STRIP = 8  # one row of the image in 17 is read twice, and a pass has strips enough for a full last round


class _Walk(NamedTuple):
    """How the programs of a launch share the strips."""

    grid: tuple[int]
    warps: int
    blocks: int  # of channels
    sizes: dict[str, int]  # arguments of a kernel


def _walk(op: str, *args: Tensor | None) -> _Walk:
    key = problem(op, *args)
    first = args[0]
    assert first is not None
    config = tuning.choose(op, key, first.device, candidates)
    assert isinstance(config, RowsConfig)
    assert isinstance(key, Problem)
    p, q = cdiv(key.height, 2), cdiv(key.width, 2)
    block = min(config.channels, triton.next_power_of_2(key.channels))
    blocks = cdiv(key.channels, block)
    tiles = cdiv(key.images * cdiv(p, STRIP) * q, config.rows)
    programs = min(max(multiprocessors(first.device) * config.programs // blocks, 1), tiles)
    sizes = {"N": key.images, "H": key.height, "W": key.width, "P": p, "Q": q, "C": key.channels, "programs": programs}
    constants = {"STRIP": STRIP, "STRIPS": config.rows, "CHANNELS": block}
    return _Walk((blocks * programs,), config.warps, blocks, {**sizes, **constants})


# --- ops ------------------------------------------------------------------------------------------------------------


def stem_forward(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``max_pool2d(relu(y * scale + shift), 3, 2, 1)``."""
    walk = _walk("stem_forward", y)
    out = empty_channels_last(y, y.shape[0], y.shape[1], walk.sizes["P"], walk.sizes["Q"])
    launch(
        forward_kernel, walk.grid, warps=walk.warps,
        y=rows(y), scale=scale.contiguous(), shift=shift.contiguous(), out=out, **walk.sizes,
    )  # fmt: skip
    return out


def stem_infer(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """PyTorch's convolution; bias, ReLU and pool in one pass."""
    return stem_forward(F.conv2d(x, weight, None, stride, padding), torch.ones_like(bias), bias)


def _reduce(
    walk: _Walk, dout: Tensor | None, y: Tensor, norm: tuple[Tensor, ...], *, winners: Tensor | None = None,
    weight: Tensor | None = None, count: Tensor | None = None, coefficients: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """``dbeta`` and ``dgamma`` (2, C) unless dout is None; winners and coefficients where there is a tensor for them.

    norm: scale, shift, and where there is dout mean and rstd.
    """
    channels, programs, needed = walk.sizes["C"], walk.sizes["programs"], dout is not None
    sums = y.new_empty((2, channels), dtype=torch.float32) if needed else None
    launch(
        reduce_kernel, walk.grid, warps=walk.warps, y=y, dout=dout,
        scale=norm[0], shift=norm[1], mean=norm[2] if needed else None, rstd=norm[3] if needed else None,
        weight=weight, count=count, winners=winners, sums=sums, coefficients=coefficients,
        partials=y.new_empty((2, programs, channels), dtype=torch.float32) if needed else None,
        arrivals=counters(y.device, walk.blocks) if needed else None,
        counts=0 if count is None else count.shape[0], PARTS=64, INFINITY=_INFINITY[y.dtype], **walk.sizes,
    )  # fmt: skip
    return sums


def _apply(walk: _Walk, dout: Tensor, winners: Tensor, y: Tensor, a: Tensor, b, c, shape: torch.Size) -> Tensor:
    dy = torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
    launch(
        apply_kernel, walk.grid, warps=walk.warps,
        dout=dout, winners=winners, y=None if b is None else y, a=a, b=b, c=c, dy=dy, **walk.sizes,
    )  # fmt: skip
    return dy


def _winners(dout: Tensor) -> Tensor:
    return torch.empty_like(dout, dtype=torch.uint8)


def stem_reduce(
    dout: Tensor, y: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """``(dbeta, dgamma)`` of the stem's norm."""
    norm = tuple(v.contiguous() for v in (scale, shift, mean, rstd))
    sums = _reduce(_walk("stem_reduce", dout, y), rows(dout), rows(y), norm)
    assert sums is not None
    return sums[0], sums[1]


def stem_apply(
    dout: Tensor, y: Tensor, scale: Tensor, shift: Tensor, a: Tensor, b: Tensor | None, c: Tensor | None
) -> Tensor:
    """The gradient of the stem convolution's output, ``dy = a * dz + b * y + c``; one pass more to find the winners."""
    walk, g, values = _walk("stem_apply", dout, y), rows(dout), rows(y)
    winners = _winners(g)
    _reduce(walk, None, values, (scale.contiguous(), shift.contiguous()), winners=winners)
    return _apply(walk, g, winners, values, a.contiguous(), vector(b), vector(c), y.shape)


def stem_backward(
    dout: Tensor, y: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``(dy, dbeta, dgamma)`` in two launches; ``count`` None for frozen statistics."""
    walk, g, values = _walk("stem_backward", dout, y), rows(dout), rows(y)
    winners, norm = _winners(g), tuple(v.contiguous() for v in (scale, shift, mean, rstd))
    if count is None:
        sums = _reduce(walk, g, values, norm, winners=winners)
        a, b, c = norm[0], None, None
    else:
        batch = scale.new_empty((3, scale.shape[0]))
        sums = _reduce(
            walk, g, values, norm, winners=winners, weight=vector(weight), count=count.contiguous(), coefficients=batch
        )
        a, b, c = batch.unbind()
    assert sums is not None
    return _apply(walk, g, winners, values, a, b, c, y.shape), sums[0], sums[1]


def _unsupported(*args: Tensor | None) -> str | None:
    reason = unsupported(*args)
    if reason is None and any(t is not None and t.dim() == 4 and t[0].numel() >= 2**31 for t in args):
        return "an image has 2^31 elements or more"
    return reason


def _infer_unsupported(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int) -> str | None:
    return _unsupported(x, weight, bias)


UNSUPPORTED: dict[str, Callable[..., str | None]] = {
    **dict.fromkeys(("stem_forward", "stem_reduce", "stem_apply", "stem_backward"), _unsupported),
    "stem_infer": _infer_unsupported,
}
