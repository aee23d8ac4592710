"""Argument checks with one sentence for every op: ``<op>: expected <argument> <requirement>, got <value>``."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fail(op: str, argument: str, requirement: str, got: Any, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{op}: expected {argument} {requirement}, got {got}")


def activation(op: str, name: str, t: Tensor) -> None:
    """4-d and floating."""
    if t.dim() != 4:
        fail(op, name, "of 4 dimensions (N, C, H, W)", f"shape {tuple(t.shape)}")
    if t.dtype not in FLOATING:
        fail(op, name, "of dtype float32, float16, bfloat16 or float64", t.dtype, TypeError)


def same(op: str, name: str, t: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """The shape, device and (unless told otherwise) dtype of ``other``."""
    if t.shape != other.shape:
        fail(op, name, f"of {other_name}'s shape {tuple(other.shape)}", f"shape {tuple(t.shape)}")
    device(op, name, t, other_name, other)
    if dtype and t.dtype != other.dtype:
        fail(op, name, f"of {other_name}'s dtype {other.dtype}", t.dtype, TypeError)


def device(op: str, name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """The device of ``other``."""
    if t.device != other.device:
        fail(op, name, f"on {other_name}'s device {other.device}", f"device {t.device}")


def floating(op: str, name: str, dtype: torch.dtype) -> None:
    """A dtype that activations may have."""
    if dtype not in FLOATING:
        fail(op, name, "floating", dtype, TypeError)


def mix(op: str, weights: Any, gate: Tensor | None, total: Tensor) -> None:
    """Four weights of a block's sum, and the gate exactly where they use one."""
    weights = tuple(weights)
    if len(weights) != 4:
        fail(op, "mix", "of 4 weights (branch, branch_gate, shortcut, shortcut_gate)", weights)
    used = weights[1] != 0 or weights[3] != 0
    if gate is None:
        if used:
            fail(op, "gate", f"with mix {weights}", None)
        return
    if not used:
        fail(op, "gate", f"None with mix {weights}", f"shape {tuple(gate.shape)}")
    activation(op, "gate", gate)
    if any(size != 1 and size != full for size, full in zip(gate.shape, total.shape, strict=True)):
        fail(op, "gate", f"to broadcast against {tuple(total.shape)}", f"shape {tuple(gate.shape)}")
    if gate.device != total.device:
        fail(op, "gate", f"on device {total.device}", f"device {gate.device}")


def parameters(op: str, mean: Tensor, **vectors: Tensor | None) -> None:
    """Each of a norm's parameters that is given has the channels and device of ``mean``; any dtype."""
    for name, v in vectors.items():
        if v is not None:
            if v.shape != mean.shape[-1:]:
                fail(op, name, f"of shape {tuple(mean.shape[-1:])}", f"shape {tuple(v.shape)}")
            device(op, name, v, "mean", mean)


def count(op: str, count: Tensor, mean: Tensor) -> None:
    """Tile counts: int32, on the device of ``mean``."""
    if count.dtype != torch.int32:
        fail(op, "count", "of dtype int32", count.dtype, TypeError)
    device(op, "count", count, "mean", mean)


def channels(op: str, like: Tensor, size: Any, **vectors: Tensor | None) -> None:
    """Each vector that is given has ``size`` elements of the accumulation dtype on ``like``'s device."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    for name, v in vectors.items():
        if v is None:
            continue
        if v.dim() != 1 or v.shape[0] != size:
            fail(op, name, f"of shape ({size},)", f"shape {tuple(v.shape)}")
        if v.device != like.device:
            fail(op, name, f"on device {like.device}", f"device {v.device}")
        if v.dtype != dtype:
            fail(op, name, f"of dtype {dtype}", v.dtype, TypeError)


def together(op: str, **group: Any) -> bool:
    """All of a group of optional arguments or none of them; True when given."""
    given = [name for name, value in group.items() if value is not None]
    if given and len(given) != len(group):
        missing = ", ".join(name for name in group if name not in given)
        fail(op, " and ".join(group), "all given or all None", f"None for {missing}")
    return bool(given)


def sign(op: str, name: str, mask: Tensor | None, dz: Tensor) -> None:
    """A packed 1-bit mask for ``dz``, or a tensor of its shape whose sign is the mask."""
    if mask is None:
        return
    if mask.dtype == torch.uint8:
        need = (dz.numel() + 7) // 8
        if mask.dim() != 1 or mask.shape[0] != need:
            fail(op, name, f"of shape ({need},), one bit an element of the gradient", f"shape {tuple(mask.shape)}")
        if mask.device != dz.device:
            fail(op, name, f"on device {dz.device}", f"device {mask.device}")
    else:
        same(op, name, mask, "dz", dz, dtype=False)
