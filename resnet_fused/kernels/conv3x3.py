"""``conv3x3`` for Triton: the materialised form, in which Triton has the passes and cuDNN the convolution.

Which of it and the stock form is faster depends on the whole geometry, so a problem here has all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from resnet_fused.kernels import materialised
from resnet_fused.kernels._launch import SHORT
from resnet_fused.kernels.materialised import bprop, dgrad, fprop, infer, wgrad
from resnet_fused.tuning import Materialised


class Convolution(NamedTuple):
    """What a choice for a 3x3 convolution depends on."""

    images: int
    height: int  # of the input
    width: int
    depth: int  # channels of the input
    columns: int  # channels of the output
    stride: int
    dilation: int
    groups: int
    dtype: str
    reads: str  # the input: "plain", "deferred", "prelu"; after a comma the gradient: "plain", "masked", "affine"
    ends: str  # what is asked for beside the convolution: "plain", or names joined by "+"


def _convolution(x: Tensor, weight: Tensor, geometry: Sequence[int], reads: str, **ends: Any) -> Convolution:
    stride, dilation, groups = geometry
    n, c, h, w = x.shape
    asked = "+".join(name for name, value in ends.items() if value is not None and value is not False) or "plain"
    return Convolution(n, h, w, c, weight.shape[0], stride, dilation, groups, SHORT[x.dtype], reads, asked)


def _input(scale, slope) -> str:
    return "plain" if scale is None else "deferred" if slope is None else "prelu"


def _gradient(sign, y) -> str:
    return "affine" if y is not None else "plain" if sign is None else "masked"


def _fprop_problem(x, scale, shift, slope, weight, *rest) -> Convolution:
    *geometry, statistics = rest
    return _convolution(x, weight, geometry, _input(scale, slope), statistics=statistics)


def _infer_problem(x, scale, shift, slope, weight, bias, residual, *rest) -> Convolution:
    *geometry, relu, out_slope = rest
    return _convolution(x, weight, geometry, _input(scale, slope), residual=residual, relu=relu, prelu=out_slope)


def _dgrad_problem(
    dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale, *geometry
) -> Convolution:
    reads = f"{_input(scale, slope)},{_gradient(sign, y)}"
    return _convolution(x, weight, geometry[:3], reads, sums=mean, skip=skip)


def _wgrad_problem(dz, sign, y, a, b, c, weight, x, scale, shift, slope, *rest) -> Convolution:
    return _convolution(x, weight, rest[:3], f"{_input(scale, slope)},{_gradient(sign, y)}")


_PROBLEMS: dict[str, Callable[..., Convolution]] = {
    "conv3x3_fprop": _fprop_problem,
    "conv3x3_infer": _infer_problem,
    "conv3x3_dgrad": _dgrad_problem,
    "conv3x3_wgrad": _wgrad_problem,
    "conv3x3_bprop": _dgrad_problem,
}


def problem(op: str, *args: Any) -> Convolution:
    """The key of a call in the tables."""
    return _PROBLEMS[op](*args)


def candidates(problem: Convolution) -> tuple[Materialised, ...]:
    """One: what is left to choose is whether it beats another backend."""
    return (Materialised(),)


conv3x3_fprop, conv3x3_infer, conv3x3_dgrad, conv3x3_wgrad, conv3x3_bprop = fprop, infer, dgrad, wgrad, bprop
UNSUPPORTED = {f"conv3x3_{direction}": predicate for direction, predicate in materialised.UNSUPPORTED.items()}
