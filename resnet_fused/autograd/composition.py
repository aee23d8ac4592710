"""The units in PyTorch's own operators, differentiable any number of times: what double backward differentiates.

The parts have the arguments of their namesakes in :mod:`branch`, :mod:`end` and :mod:`norm_relu`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from resnet_fused.autograd.layer import NormSpec, Parameters

if TYPE_CHECKING:
    from resnet_fused.autograd.branch import BranchSpec
    from resnet_fused.autograd.end import EndSpec


def norm(spec: NormSpec | None, y: Tensor, parameters: Parameters) -> Tensor:
    """``bn(y)``; ``y`` has its convolution's bias already."""
    if spec is None:
        return y
    gamma, beta, mean, var = parameters.norm
    if not spec.frozen:
        mean = var = None
    return F.batch_norm(y, mean, var, gamma, beta, not spec.frozen, 0.0, spec.eps)


def branch(
    spec: BranchSpec, x: Tensor, shortcut: Tensor | None, slope: Tensor | None, parameters: Sequence[Parameters]
) -> tuple[Tensor, Tensor]:
    """The outputs of the chain and of the shortcut, norms included."""

    def layer(i: int, h: Tensor) -> Tensor:
        kernel, conv, own = spec.layers[i]
        weight, bias, _ = parameters[i]
        assert weight is not None
        bias = None if bias is None else bias.to(spec.dtype)
        padding = conv.dilation * (kernel - 1) // 2
        y = F.conv2d(h.to(spec.dtype), weight.to(spec.dtype), bias, conv.stride, padding, conv.dilation, conv.groups)
        return norm(own, y, parameters[i])

    source = x
    if spec.pre is not None:
        source = norm(spec.pre, x, parameters[-1])
    if spec.pre is not None or spec.pre_relu:
        source = F.relu(source)
    h = source
    for i in range(len(spec.chain)):
        if i > 0:
            h = F.relu(h) if slope is None else F.prelu(h, slope.to(h.dtype))
        h = layer(i, h)
    if spec.projection is not None:
        return h, layer(spec.last + 1, source if shortcut is None else shortcut)
    return h, x if shortcut is None else shortcut


def end(
    spec: EndSpec,
    branch: Tensor,
    shortcut: Tensor | None,
    gate: Tensor | None,
    slope: Tensor | None,
    post: Parameters | None,
) -> Tensor:
    """The unit's end, from the norms' outputs."""
    mix, dtype = spec.mix, branch.dtype
    branch = F.relu(branch) if spec.branch_relu else branch
    total = branch * (mix.branch if gate is None else mix.branch + mix.branch_gate * gate)
    if spec.shortcut and shortcut is not None:
        total = total + shortcut * (mix.shortcut if gate is None else mix.shortcut + mix.shortcut_gate * gate)
    total = total.to(dtype)
    if post is not None:
        total = norm(spec.post, total, post)
    if slope is not None:
        return F.prelu(total, slope.to(dtype))
    return F.relu(total) if spec.relu else total
