"""Inference: batch norm folded into the convolution's weight and bias, kept until a parameter changes.

The kept tensors live outside the modules (weakly keyed), so a module stays picklable, copyable and of its own size.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused import ops
from resnet_fused.blocks import norms
from resnet_fused.reference import channels_last, compute_dtype


class Folded(NamedTuple):
    """``bn(conv2d(x, w))`` as ``conv2d(x, weight) + bias``."""

    weight: Tensor  # (K, C / groups, R, R), channels_last, the convolution's dtype
    bias: Tensor  # (K,) fp32 (fp64)


class _Kept(NamedTuple):
    tensors: tuple[Tensor | None, ...]  # held, so that none of their identities can be taken over by another tensor
    versions: list[tuple[int, int]]
    dtype: torch.dtype
    eps: float
    folded: Folded

    def valid(self, tensors: tuple[Tensor | None, ...], eps: float, dtype: torch.dtype) -> bool:
        for ours, theirs in zip(self.tensors, tensors, strict=True):
            if ours is not theirs:
                return False
        return self.dtype == dtype and self.eps == eps and self.versions == _versions(tensors)


def _versions(tensors: tuple[Tensor | None, ...]) -> list[tuple[int, int]]:
    return [(t._version, t.data_ptr()) for t in tensors if t is not None]


_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def fold(conv: nn.Module, norm: nn.Module, dtype: torch.dtype) -> Folded:
    """Fold ``norm``'s running statistics into ``conv``'s weight, in fp32 (fp64), rounded once."""
    wide = compute_dtype(dtype)
    gamma, beta, mean, var = norms.parameters(norm)
    resolved = ops.batch_norm.frozen(gamma, beta, mean, var, norm.eps, wide)
    weight = conv.weight.to(wide) * resolved.scale.view(-1, 1, 1, 1)
    return Folded(channels_last(weight.to(dtype)), resolved.shift)


def folded(conv: nn.Module, norm: nn.Module, dtype: torch.dtype) -> Folded:
    """:func:`fold`, done again only when a tensor it reads was replaced or written to in place.

    Writes that PyTorch does not count (through ``.data``) are seen at the next ``eval()`` or ``train()``.
    """
    if torch.compiler.is_compiling():
        return fold(conv, norm, dtype)
    tensors = (conv.weight, *norms.parameters(norm))
    kept = _kept.get(conv)
    if kept is None or not kept.valid(tensors, norm.eps, dtype):
        if any(t is not None and t.is_inference() for t in tensors):  # these have no version to compare
            return fold(conv, norm, dtype)
        with torch.inference_mode(False), torch.no_grad():
            kept = _kept[conv] = _Kept(tensors, _versions(tensors), dtype, norm.eps, fold(conv, norm, dtype))
    return kept.folded


def forget(module: nn.Module) -> None:
    """Drop what is kept for the convolutions within ``module``."""
    for child in module.modules():
        _kept.pop(child, None)
