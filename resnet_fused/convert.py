"""Swap the residual blocks of a model for fused ones, in place, and back.

A swap assigns ``module.__class__``: parameters and buffers stay the same objects, hooks and attributes are not touched;
the convolutions' weights take other strides, and the block notes the backend and the use of memory that were asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from resnet_fused import config
from resnet_fused.adapters import fused_classes
from resnet_fused.blocks import inference
from resnet_fused.blocks.norm_relu import FusedNorm
from resnet_fused.blocks.paths import Reason
from resnet_fused.blocks.residual import FusedResidual
from resnet_fused.blocks.stem import FusedStem, stem_reason
from resnet_fused.blocks.structure import read

Model = TypeVar("Model", bound=nn.Module)
Filter = Callable[[str, nn.Module], bool]

FUSED = (FusedResidual, FusedStem, FusedNorm)
"""Mixins of all that :func:`fuse` makes."""

MEMORY = ("save", "projections", "recompute")
"""What :func:`fuse` takes as ``memory``."""


def reason_to_decline(module: Any) -> Reason | None:
    """Why ``module``, of a fused class, runs its original forward whatever the input; None if it is fused."""
    if isinstance(module, FusedResidual):
        found = read(module)
        return found if isinstance(found, Reason) else None
    if isinstance(module, FusedNorm):
        return module._declined()
    return stem_reason(module._stem_parts())


def fuse(
    model: Model,
    *,
    backend: str = "auto",
    memory: str = "save",
    filter_fn: Filter | None = None,
    strict: bool = False,
) -> Model:
    """Swap every residual block, stem and final norm that a fused class exists for, in place; idempotent.

    The convolutions of fused blocks take the channels_last memory format (the same Parameters, other strides), so that
    activations stay in it from the stem on, as they do in PyTorch with channels_last weights.

    Args:
        model: any module; blocks of torchvision, timm and this package are found at any depth.
        backend: force one backend on these blocks in eager mode; "auto" chooses per op.
        memory: what a block keeps for backward: "save" its input and every convolution's output; "projections" all but
            the output of the shortcut's projection; "recompute" neither that nor the last convolution's output, both as
            large as the block's. Backward computes what is missing once more from the same operands. Under
            torch.compile the compiler has the last word. Stems and norms have nothing to recompute; nor has a block
            whose gate is computed from the branch (squeeze-and-excitation), for the gate keeps it.
        filter_fn: called with (qualified name, module); only those for which it returns True are swapped.
        strict: raise instead of leaving a candidate unfused or finding none.
    Returns:
        ``model`` itself.
    Raises:
        ValueError: unknown backend or memory; with ``strict``, nothing or not everything asked for can be fused
            (nothing is changed then).
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: expected model to be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("fuse: expected model before scripting, got a ScriptModule; fuse first, then script")
    config.check_backend(backend, "fuse")
    if memory not in MEMORY:
        raise ValueError(f"fuse: expected memory one of {', '.join(MEMORY)}, got {memory!r}")
    chosen = [(name, module) for name, module in candidates(model) if filter_fn is None or filter_fn(name, module)]
    classes = fused_classes()
    declined: list[tuple[str, Reason]] = []
    swapped: list[tuple[nn.Module, type[nn.Module]]] = []
    for name, module in chosen:
        original = type(module)
        if original in classes:
            swapped.append((module, original))
            module.__class__ = classes[original]
        reason = reason_to_decline(module)
        if reason is not None:
            declined.append((name, reason))
    if strict and (declined or not chosen):
        for module, original in swapped:
            module.__class__ = original
        if not chosen:
            raise ValueError(
                "fuse: expected at least one residual block of torchvision, timm or resnet_fused, got none"
            )
        listing = "; ".join(f"{name or 'the model itself'}: {reason.detail}" for name, reason in declined)
        raise ValueError(
            f"fuse: expected every chosen block to be fusible, got {len(declined)} that are not: {listing}"
        )
    kept_out = {name for name, _ in declined}
    for name, module in chosen:
        module._resnet_fused_backend = backend
        if isinstance(module, FusedResidual):
            module._resnet_fused_memory = memory
        if name not in kept_out:
            _to_channels_last(module)
    return model


def unfuse(model: Model) -> Model:
    """Give every swapped block and stem its original class back; memory formats stay as they are.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse: expected model to be an nn.Module, got {type(model).__name__}")
    originals = {fused: original for original, fused in fused_classes().items()}
    for module in model.modules():
        original = originals.get(type(module))
        if original is not None:
            inference.forget(module)
            module.__class__ = original
            for name in ("_resnet_fused_backend", "_resnet_fused_memory"):
                module.__dict__.pop(name, None)
    return model


def refresh(model: Model) -> Model:
    """Drop the folded weights that inference keeps, after a write that PyTorch does not count.

    Those are writes through ``.data``, a numpy view or a collective to a model that stays in eval.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"refresh: expected model to be an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        inference.forget(module)
    return model


def candidates(model: nn.Module) -> list[tuple[str, Any]]:
    """``(qualified name, module)`` of every block and stem that is fused or has a fused class."""
    classes = fused_classes()
    found = []
    for name, module in model.named_modules():
        fused = classes.get(type(module))
        if isinstance(module, FUSED):
            found.append((name, module))
        elif fused is not None and getattr(fused, "accepts", lambda _: True)(module):
            found.append((name, module))
    return found


def _to_channels_last(module: nn.Module) -> None:
    """Restride the convolutions of a block, or of a network's stem; weights in shared or partial storages are left."""
    owned: Any = module
    for conv in owned._restrided().modules():
        if type(conv) is nn.Conv2d and type(conv.weight) is nn.Parameter:
            weight = conv.weight.data
            whole = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
            if whole and not weight.is_shared():
                conv.weight.data = weight.contiguous(memory_format=torch.channels_last)
