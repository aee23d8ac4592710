"""``bn_add_relu`` in Triton: the end of a residual block, and its backward.

All of it is bound by memory: a pass reads and writes each tensor once, in 16-byte accesses, and what backward sums is
summed in the pass that forms it. ``bn_add_relu_walk`` tells how the work is shared out.
"""

from __future__ import annotations

from torch import Tensor

from resnet_fused.kernels._launch import unsupported
from resnet_fused.kernels.bn_add_relu_backward import bn_add_relu_backward
from resnet_fused.kernels.bn_add_relu_forward import bn_add_relu_forward
from resnet_fused.kernels.bn_add_relu_gradient import bn_add_relu_apply, bn_add_relu_mask, bn_add_relu_reduce
from resnet_fused.kernels.bn_add_relu_pool import bn_add_relu_pool, bn_add_relu_spread
from resnet_fused.kernels.bn_add_relu_walk import candidates, problem

__all__ = [
    "UNSUPPORTED", "bn_add_relu_apply", "bn_add_relu_backward", "bn_add_relu_forward", "bn_add_relu_mask",
    "bn_add_relu_pool", "bn_add_relu_reduce", "bn_add_relu_spread", "candidates", "problem",
]  # fmt: skip


def _reason(*args, packs: bool = False) -> str | None:
    tensors = [a for a in args if isinstance(a, Tensor)]
    reason = unsupported(*tensors)
    if reason is not None:
        return reason
    channels = tensors[0].shape[1]
    packs = packs or any(t.element_size() == 1 for t in tensors)
    if packs and channels % 8:
        return f"the kernel packs the mask of 8 channels into a byte, and there are {channels} channels"
    if tensors[0].numel() // channels > 2**30:
        return f"the kernel counts up to 2^30 rows, and there are {tensors[0].numel() // channels}"
    return None


def _forward(*args) -> str | None:
    *_, mask, _ = args
    return _reason(*args, packs=mask)


UNSUPPORTED = {
    "bn_add_relu_forward": _forward,
    "bn_add_relu_backward": _reason,
    "bn_add_relu_mask": _reason,
    "bn_add_relu_reduce": _reason,
    "bn_add_relu_apply": _reason,
    "bn_add_relu_pool": _reason,
    "bn_add_relu_spread": _reason,
}
