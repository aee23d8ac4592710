"""Reading batch norm modules: which are known, what they normalise with, and their running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_fused.autograd.layer import NormParameters, NormSpec
from resnet_fused.blocks.paths import Reason

_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# FrozenBatchNorm2d is known by name, so that torchvision stays optional.
_FROZEN = {("torchvision.ops.misc", "FrozenBatchNorm2d")}
# Batch norms that hold an activation besides; an adapter that knows which one belongs where accepts them.
_ACTIVATED = {("timm.layers.norm_act", "BatchNormAct2d")}


def is_frozen_class(norm: Any) -> bool:
    return (type(norm).__module__, type(norm).__qualname__) in _FROZEN


def is_activated_class(norm: Any) -> bool:
    return (type(norm).__module__, type(norm).__qualname__) in _ACTIVATED


def unsupported(norm: Any) -> Reason | None:
    """Why ``norm`` is no batch norm that the fused path knows; exact types only, a subclass may do anything."""
    if type(norm) in _BATCH_NORMS:
        return unsupported_buffers(norm)
    if is_frozen_class(norm):
        return None
    return Reason("norm", f"norm layer {type(norm).__name__} is not BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d")


def unsupported_buffers(norm: Any) -> Reason | None:
    """Why a batch norm's running statistics are none that PyTorch keeps."""
    if (norm.running_mean is None) != (norm.running_var is None):
        return Reason("norm", "one of running_mean and running_var is None, the other is not")
    return None


def unsupported_activated(norm: Any, activation: type) -> Reason | None:
    """Why ``norm`` is no batch norm with exactly this activation (``nn.Identity`` for none)."""
    if not is_activated_class(norm):
        return Reason("norm", f"norm layer {type(norm).__name__} is not BatchNormAct2d")
    if type(norm.act) is not activation:
        found = type(norm.act).__name__
        return Reason("activation", f"the norm's activation {found} is not nn.{activation.__name__}")
    if type(norm.drop) is not nn.Identity:
        return Reason("drop-block", f"{type(norm.drop).__name__} stands between the norm and its activation")
    return unsupported_buffers(norm)


def batch_statistics(norm: Any) -> bool:
    """Whether ``norm`` normalises with the batch's statistics, as ``_BatchNorm.forward`` decides it."""
    if type(norm) not in _BATCH_NORMS and not is_activated_class(norm):
        return False
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def spec(norm: Any) -> NormSpec:
    """What is fixed about ``norm`` in this call."""
    return NormSpec(norm.eps, not batch_statistics(norm), _group(norm))


def parameters(norm: Any) -> NormParameters:
    """The tensors of ``norm``."""
    # Straight from the dictionaries of an nn.Module: attribute look-up there costs as much as a small kernel's launch.
    own, buffers = norm._parameters, norm._buffers
    if "weight" in own and "running_mean" in buffers:
        return NormParameters(own["weight"], own["bias"], buffers["running_mean"], buffers["running_var"])
    return NormParameters(norm.weight, norm.bias, norm.running_mean, norm.running_var)


def _group(norm: Any):
    if type(norm) is not nn.SyncBatchNorm or not norm.training or not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group if norm.process_group is not None else dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def check_batch(norm: Any, shape: tuple) -> None:
    """PyTorch's error for batch statistics over a single value per channel.

    Raises:
        ValueError: ``norm`` takes batch statistics of one value.
    """
    if shape[0] * shape[2] * shape[3] == 1 and batch_statistics(norm) and _group(norm) is None:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}")


@torch.no_grad()
def update_running(moved: Sequence[tuple[Any, Tensor, Tensor]]) -> None:
    """Move the running estimates of norms towards a batch's mean and unbiased variance, as ``_BatchNorm.forward`` does.

    Args:
        moved: norm, mean (C,) and variance (C,) of each.
    """
    moved = [each for each in moved if each[0].training and each[0].track_running_stats]
    if torch.compiler.is_compiling() or _shared(moved):
        for each in moved:  # a norm that comes twice moves twice; a compiler fuses by itself
            _move([each])
    elif moved:
        _move(moved)


def _shared(moved: Sequence[tuple[Any, Tensor, Tensor]]) -> bool:
    """Whether two of the norms have an estimate in common."""
    buffers = [id(b) for norm, _, _ in moved for b in _estimates(norm) if b is not None]
    return len(set(buffers)) < len(buffers)


def _estimates(norm: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Running mean and variance, and the number of batches behind them."""
    buffers = norm._buffers
    if "running_mean" in buffers:  # attribute look-up is slow, as above
        return buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    return norm.running_mean, norm.running_var, norm.num_batches_tracked


def _move(moved: Sequence[tuple[Any, Tensor, Tensor]]) -> None:
    """The same of different norms, all of them in a few launches."""
    estimates = [_estimates(norm) for norm, _, _ in moved]
    counters = [number for _, _, number in estimates if number is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    together: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for (norm, *batch), (*running, number) in zip(moved, estimates, strict=True):
        for estimate, moment in zip(running, batch, strict=True):
            if estimate is None:
                continue
            moment = moment.to(estimate.dtype)
            if norm.momentum is not None:
                into, found = together.setdefault(norm.momentum, ([], []))
                into.append(estimate)
                found.append(moment)
            elif number is not None:  # the mean of all batches
                weight = (1.0 / number.to(batch[0].dtype)).to(estimate.dtype)
                estimate.mul_(1 - weight).add_(moment * weight)
    for momentum, (into, found) in together.items():
        torch._foreach_mul_(into, 1 - momentum)
        torch._foreach_add_(into, found, alpha=momentum)
