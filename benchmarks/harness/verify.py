"""Errors against fp64, and when a result is wrong.

**Error.** ``norm(value - exact) / norm(exact)``: of each image of an activation, since in a whole batch a wrong tile
would be lost among roundings, else of a whole tensor; of a packed mask the share of bits that differ. A row reports the
greatest over images and tensors. **Bound.** Twice PyTorch's own error in the same dtype plus a floor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused import reference
from resnet_fused.cli.compare import FACTOR

WEIGHT = "dw"  # the name of a weight's gradient, whose first axis is no batch


class Beyond(Exception):
    """An error beyond its bound."""


def check(
    found: dict[str, Tensor], exact: dict[str, Tensor], eager: dict[str, Tensor], floor: float, worst: float
) -> tuple[float, float]:
    """The greatest error of ``found``, and of ``eager`` over the tensors that it has too.

    Raises:
        Beyond: a tensor is missing, has another shape, or its error is more than twice eager's plus ``floor``; or
            eager's own is more than ``worst``, so that it must have computed something else.
    """
    errors, theirs = {}, {}
    for name in found.keys() & exact.keys():
        error = relative if name == WEIGHT else by_image
        errors[name] = error(found[name], exact[name])
        if name in eager:
            theirs[name] = error(eager[name], exact[name])
            if not theirs[name] <= worst:
                raise Beyond(f"PyTorch's own {name} is off by {theirs[name]:.1e} of its norm, {worst:g} allowed")
        allowed = FACTOR * theirs.get(name, 0.0) + floor
        if not errors[name] <= allowed:
            raise Beyond(f"{name} is off by {errors[name]:.1e} of its norm, {allowed:.1e} allowed")
    if not errors:
        raise Beyond(f"expected some of {', '.join(exact)}, got {', '.join(found) or 'nothing'}")
    return max(errors.values()), max(theirs.values(), default=0.0)


def by_image(value: Tensor, exact: Tensor) -> float:
    """The greatest error of an image of a (N, C, H, W) tensor; of other tensors the error of all."""
    if exact.dim() != 4 or value.shape != exact.shape:
        return relative(value, exact)
    wrong, size = (torch.linalg.vector_norm(t, dim=(1, 2, 3)) for t in (value.double() - exact, exact))
    return _finite((wrong / size.clamp_min(1e-30)).max())


def relative(value: Tensor, exact: Tensor) -> float:
    """The error of one tensor; infinite where the shapes differ or a value is NaN."""
    if value.shape != exact.shape:
        return float("inf")
    if exact.dtype == torch.uint8:
        return (_bits(value) != _bits(exact)).double().mean().item()
    return _finite((value.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def _finite(error: Tensor) -> float:
    return error.item() if torch.isfinite(error) else float("inf")


def _bits(packed: Tensor) -> Tensor:
    return reference.unpack_mask(packed, packed.new_empty((1, 1, 8 * packed.numel(), 1)))
