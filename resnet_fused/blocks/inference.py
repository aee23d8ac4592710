"""Inference: norms folded into the convolutions, kernels chosen and weights laid out once per kind of input.

What is kept lives outside the modules (weakly keyed), so a module stays picklable, copyable and of its own size. It is
made anew when a tensor that it was made from was replaced or written to in place, and at every ``eval()``, ``train()``
and ``refresh``; writes that PyTorch does not count (through ``.data``, numpy or a collective) are seen only then.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from resnet_fused import backends, ops
from resnet_fused.blocks import norms, paths
from resnet_fused.operands import Conv
from resnet_fused.reference import channels_last, compute_dtype

Step = Callable[[Tensor, Tensor | None], Tensor]
"""A convolution with folded norm, bound to its kernel: (x, residual) -> out."""


class Folded(NamedTuple):
    """``bn(conv2d(x, w))`` as ``conv2d(x, weight) + bias``."""

    weight: Tensor  # (K, C / groups, R, R), channels_last, the convolution's dtype
    bias: Tensor  # (K,) fp32 (fp64)


def fold(conv: nn.Conv2d, norm: Any, dtype: torch.dtype) -> Folded:
    """Fold ``norm``'s running statistics into ``conv``'s weight, in fp32 (fp64), rounded once."""
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be used outside inference mode
            return fold(conv, norm, dtype)
    wide = compute_dtype(dtype)
    gamma, beta, mean, var = norms.parameters(norm)
    assert mean is not None  # only frozen norms are folded
    assert var is not None
    resolved = ops.batch_norm.frozen(gamma, beta, mean, var, norm.eps, wide)
    weight = conv.weight.to(wide) * resolved.scale.view(-1, 1, 1, 1)
    return Folded(channels_last(weight.to(dtype)), resolved.shift)


def bind(
    conv: nn.Conv2d, norm: Any, x: Tensor, residual: Tensor | None, *, relu: bool, overwrite_residual: bool = False
) -> Step:
    """The convolution with its norm folded, bound to the kernel that runs inputs like ``x`` and ``residual``."""
    weight, bias = fold(conv, norm, x.dtype)
    geometry = Conv(conv.stride[0], conv.dilation[0], conv.groups)
    return ops.conv(conv.kernel_size[0]).bind(
        x, weight, bias, geometry, residual=residual, relu=relu, overwrite_residual=overwrite_residual
    )


# --- what is kept ---------------------------------------------------------------------------------------------------

_KINDS = 4  # kinds of input kept per module


class _Kept(NamedTuple):
    tensors: list[Tensor]  # these and their storages are held, so that neither identity nor address
    storages: list[torch.UntypedStorage]  # can be taken over by another one
    marks: list[Any]
    made: dict[Hashable, Any]  # by kind of input


_kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()


def _tensors(modules: Iterable[nn.Module]) -> list[Tensor]:
    found: list[Tensor | None] = []
    for module in modules:
        found += module._parameters.values()
        found += module._buffers.values()
    return [t for t in found if t is not None]


def _marks(modules: Sequence[nn.Module], tensors: list[Tensor]) -> list[Any]:
    """Equal for equal modules with the same tensors that have not been written to."""
    marks = paths.signature(modules)
    marks += [module.__dict__.get("eps") for module in modules]
    marks += map(id, tensors)
    marks += map(Tensor.data_ptr, tensors)
    marks += map(_version, tensors)  # raises for inference tensors
    return marks


_version = operator.attrgetter("_version")


def kind_of(owner: Any, x: Tensor, dtype: torch.dtype) -> Hashable:
    """What, besides the modules, inference depends on; None where nothing may be kept.

    Work on a CUDA stream is ordered for that stream alone; a graph that is being captured outlives what is kept.
    """
    stream = None
    if x.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return None
        stream = torch.cuda.current_stream(x.device).cuda_stream
    backend = (owner._resnet_fused_backend, backends.forced())
    return (type(x), x.shape, x.stride(), x.dtype, dtype, x.device, stream, backend)


def recall(owner: nn.Module, modules: Sequence[nn.Module], kind: Hashable) -> Callable[[Tensor], Tensor] | None:
    """What :func:`keep` kept for ``owner`` and this kind of input, if ``modules`` and their tensors are unchanged."""
    if torch.compiler.is_compiling() or kind is None:
        return None
    kept = _kept.get(owner)
    if kept is None or kind not in kept.made:
        return None
    try:
        return kept.made[kind] if kept.marks == _marks(modules, _tensors(modules)) else None
    except RuntimeError:  # a tensor was replaced by an inference tensor, which has no version
        return None


def keep(
    owner: nn.Module,
    modules: Sequence[nn.Module],
    sources: Sequence[Tensor | None],
    kind: Hashable,
    made: Callable[[Tensor], Tensor],
) -> None:
    """Keep what was made for ``owner`` from ``sources``, tensors of ``modules``, for this kind of input."""
    if torch.compiler.is_compiling() or kind is None:
        return
    tensors = _tensors(modules)
    known = set(map(id, tensors))
    if any(t is not None and (id(t) not in known or t.is_shared()) for t in sources):
        return  # a plain attribute, or memory that another process may write to: changes could go unseen
    # Inference tensors have no version, so a kept result could go stale unseen; fake ones belong to their mode.
    if torch._C._len_torch_dispatch_stack() or any(t.is_inference() or isinstance(t, FakeTensor) for t in tensors):
        return
    kept, marks = _kept.get(owner), _marks(modules, tensors)
    if kept is None or kept.marks != marks:
        kept = _kept[owner] = _Kept(tensors, [t.untyped_storage() for t in tensors], marks, {})
    for oldest in list(kept.made)[: len(kept.made) - _KINDS + 1]:
        kept.made.pop(oldest, None)
    kept.made[kind] = made


def forget(owner: nn.Module) -> None:
    """Drop what is kept for ``owner``."""
    _kept.pop(owner, None)


def _forget_all(optimizer: Any, args: Any, kwargs: Any) -> None:
    """After a step of an optimizer with ``fused=True``: it writes parameters without giving them a new version."""
    if any(group.get("fused") for group in optimizer.param_groups):
        _kept.clear()


register_optimizer_step_post_hook(_forget_all)
