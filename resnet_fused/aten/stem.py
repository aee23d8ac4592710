"""``stem`` in PyTorch's passes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused import backends
from resnet_fused.aten.batch_norm import coefficients
from resnet_fused.aten.conv import bind_bias, conv_bias
from resnet_fused.aten.pointwise import affine, output_gradient, sums
from resnet_fused.reference import POOL, channels_last


def forward(y, scale, shift) -> Tensor:
    """The norm, the pool, and the ReLU on the quarter that is left: it commutes with the maximum."""
    return channels_last(F.max_pool2d(affine(y, scale, shift, relu=False), 3, 2, 1).relu_())


def infer(x, weight, bias, stride, padding) -> Tensor:
    """Convolution with bias and ReLU, then the pool."""
    return channels_last(F.max_pool2d(conv_bias(x, weight, bias, None, stride, padding, 1, 1, True), 3, 2, 1))


def bind_infer(x, weight, bias, stride, padding) -> Callable[[Tensor], Tensor] | None:
    """:func:`infer` with the weight laid out once."""
    conv = bind_bias(x, weight, bias, None, stride, padding, 1, 1, True)
    return None if conv is None else lambda x: channels_last(F.max_pool2d(conv(x), 3, 2, 1))


def _gradient(dout, y, scale, shift) -> Tensor:
    z = affine(y, scale, shift, relu=False)
    pooled, index = torch.ops.aten.max_pool2d_with_indices(z, *POOL)
    # The ReLU's mask on the pooled gradient: where the greatest value of a window is not above 0, nothing passes.
    dout = torch.ops.aten.threshold_backward(channels_last(dout), pooled, 0)
    return channels_last(torch.ops.aten.max_pool2d_with_indices_backward(dout, z, *POOL, index))


def reduce(dout, y, scale, shift, mean, rstd) -> tuple[Tensor, Tensor]:
    """The winners found again, the gradient scattered, one reduction."""
    return sums(_gradient(dout, y, scale, shift), y, mean, rstd)


def apply(dout, y, scale, shift, a, b, c) -> Tensor:
    """The winners found again, the gradient scattered, two passes."""
    return output_gradient(_gradient(dout, y, scale, shift), None, y, a, b, c, y.dtype, consume=True)


def backward(dout, y, scale, shift, mean, rstd, weight, count) -> tuple[Tensor, Tensor, Tensor]:
    """The winners found again once."""
    dz = _gradient(dout, y, scale, shift)
    dbeta, dgamma = sums(dz, y, mean, rstd)
    a, b, c = (scale, None, None) if count is None else coefficients(dbeta, dgamma, weight, mean, rstd, count)
    return output_gradient(dz, None, y, a, b, c, y.dtype, consume=True), dbeta, dgamma


backends.register("stem_infer", "aten", infer, bind=bind_infer)
for _function in (forward, reduce, apply, backward):
    backends.register(f"stem_{_function.__name__}", "aten", _function)
