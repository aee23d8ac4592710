"""What a choice for a 3x3 convolution depends on: the key that its backends share in the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from resnet_fused.kernels._launch import SHORT


class Convolution(NamedTuple):
    """Which implementation is fastest depends on the whole geometry, so a problem has all of it."""

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


def _fprop(x, scale, shift, slope, weight, *rest) -> Convolution:
    *geometry, statistics = rest
    return _convolution(x, weight, geometry, _input(scale, slope), statistics=statistics)


def _infer(x, scale, shift, slope, weight, bias, residual, *rest) -> Convolution:
    *geometry, relu, out_slope = rest
    return _convolution(x, weight, geometry, _input(scale, slope), residual=residual, relu=relu, prelu=out_slope)


def _dgrad(
    dz, sign, y, a, b, c, weight, x, scale, shift, slope, mean, rstd, skip, skip_sign, skip_scale, *geometry
) -> Convolution:
    reads = f"{_input(scale, slope)},{_gradient(sign, y)}"
    return _convolution(x, weight, geometry[:3], reads, sums=mean, skip=skip)


def _wgrad(dz, sign, y, a, b, c, weight, x, scale, shift, slope, *rest) -> Convolution:
    return _convolution(x, weight, rest[:3], f"{_input(scale, slope)},{_gradient(sign, y)}")


_CONVOLUTIONS: dict[str, Callable[..., Convolution]] = {
    "conv3x3_fprop": _fprop,
    "conv3x3_infer": _infer,
    "conv3x3_dgrad": _dgrad,
    "conv3x3_wgrad": _wgrad,
    "conv3x3_bprop": _dgrad,
}


def convolution(op: str, *args: Any) -> Convolution:
    """The key of a call of ``op`` with these flat arguments."""
    return _CONVOLUTIONS[op](*args)
