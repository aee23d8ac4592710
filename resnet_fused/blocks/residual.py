"""The forward of every fused residual block: decide on a path, then train, infer or run the original modules."""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from resnet_fused.backends import use_backend
from resnet_fused.blocks import inference, norms, paths
from resnet_fused.blocks.layout import operand_dtype
from resnet_fused.blocks.paths import Reason
from resnet_fused.blocks.structure import ConvNorm, Structure, Unit, chain_shape, output_shape, read, reread, tensors
from resnet_fused.blocks.training import train

if TYPE_CHECKING:  # the mixins stand in front of an nn.Module and rely on it
    _Module = nn.Module
else:
    _Module = object


def renamed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A twin of ``function`` called ``name``: TorchScript compiles a method under the name of its function."""
    twin = types.FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    twin.__annotations__, twin.__module__ = function.__annotations__, function.__module__
    return twin


_ORIGINAL = Unit()


class FusedResidual(_Module):
    """Mixin over a residual block's class; :mod:`resnet_fused.adapters` says how to read that class.

    A fused class names, besides the mixin and the original, ``_original_forward`` and ``kind``.
    """

    kind: ClassVar[str]
    _original_forward: ClassVar[Callable[..., Any]]
    _resnet_fused_backend = "auto"  # without annotation: TorchScript cannot read one that is text
    _resnet_fused_memory = "save"  # likewise

    # --- what an adapter tells ---------------------------------------------------------------------------------------

    def _chain(self) -> tuple[ConvNorm, ...]:
        """(convolution, norm or None) in order."""
        raise NotImplementedError

    def _unit(self) -> Unit:
        """Where norms and ReLUs stand, and how branch and shortcut are added."""
        return _ORIGINAL

    def _shortcut_modules(self: Any) -> Sequence[nn.Module] | None:
        """The modules of ``downsample`` in the order of their calls; None if it is no plain sequence."""
        downsample = self.downsample
        if type(downsample) is nn.Conv2d:
            return [downsample]
        return list(downsample) if type(downsample) is nn.Sequential else None

    def _norm_reason(self, norm: Any) -> Reason | None:
        """Why ``norm`` is no batch norm that the fused path knows."""
        return norms.unsupported(norm)

    def _options(self) -> tuple[Hashable, ...]:
        """Attributes of the block itself, besides its modules, that the methods above read."""
        return ()

    def _declined(self) -> Reason | None:
        """Why a part of this block that the methods above do not show cannot be fused."""
        return None

    def _restrided(self) -> nn.Module:
        """The module whose convolutions take the channels_last memory format when it is swapped."""
        return self

    # --- forward ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._original_forward(x)
        return self._fused_forward(x)

    @torch.jit.unused
    def _fused_forward(self, x: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        found: Structure | Reason | None = paths.transformed(x)
        if found is None and not compiling and not torch.is_grad_enabled():
            program = inference.recall(self, paths.descendants(self), _kind(self, x))
            if program is not None:
                paths.take(self, paths.INFER)
                return program(x)
        if found is None:
            found = read(self) if compiling else reread(self)
        if isinstance(found, Structure):
            found = _input_reason(found, x) or found
        if isinstance(found, Reason):
            if not compiling:
                paths.take(self, paths.ORIGINAL, found)
            return self._original_forward(x)
        path = _infer if _frozen_without_gradient(self, found, x) else train
        if not compiling:
            paths.take(self, paths.INFER if path is _infer else paths.TRAIN)
        if compiling or self._resnet_fused_backend == "auto":
            return path(self, found, x)
        with use_backend(self._resnet_fused_backend):
            return path(self, found, x)

    @torch.jit.unused
    def train(self, mode: bool = True):
        """As ``nn.Module.train``; what inference keeps is made anew."""
        inference.forget(self)
        return super().train(mode)


def _input_reason(structure: Structure, x: Tensor) -> Reason | None:
    """Why this input takes PyTorch's modules, its errors included."""
    synchronised = x.numel() == 0 and any(n is not None and norms.spec(n).group is not None for n in structure.norms)
    reason = paths.input_reason(x, synchronised)
    if reason is not None:
        return reason
    dtype, compiling = operand_dtype(x), torch.compiler.is_compiling()
    cast = dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)
    for conv, _ in structure.layers:
        weight = conv.weight
        if type(weight) not in (nn.Parameter, Tensor) and not compiling:
            return Reason("subclass", f"a weight is a {type(weight).__name__}")
        if weight.device != x.device:
            return Reason("input", f"the input is on {x.device}, a weight on {weight.device}")
        if weight.dtype != dtype and not cast:
            return Reason("input", f"the input is {x.dtype}, a weight {weight.dtype}")
    first = structure.chain[0][0]
    if x.shape[1] != first.in_channels:
        return Reason("input", f"the input has {x.shape[1]} channels, the first convolution {first.in_channels}")
    if structure.unit.promotes and x.dtype != dtype:
        return Reason("input", f"the sum of an {x.dtype} input and an {dtype} branch is PyTorch's to promote")
    if structure.before is None and structure.unit.has_shortcut:
        shape = tuple(x.shape)
        total = chain_shape(structure, shape)
        added = shape if structure.projection is None else output_shape(structure.projection[0], shape)
        if added != total:
            return Reason("input", f"the sum of {total} and {added} is PyTorch's to broadcast or refuse")
    return None


def _frozen_without_gradient(block: Any, structure: Structure, x: Tensor) -> bool:
    if any(norm is not None and norms.batch_statistics(norm) for norm in structure.norms):
        return False
    if x.dtype != operand_dtype(x) and structure.projection is None:
        return False
    if not torch.is_grad_enabled():
        return True
    read_too = (x, *block.parameters(), *tensors(structure))  # a weight may be a plain tensor that requires grad
    return not any(t is not None and t.requires_grad for t in read_too)


def _infer(block: Any, structure: Structure, x: Tensor) -> Tensor:
    """Folded norms: one convolution with bias, ReLU and residual per layer."""
    modules, kind = paths.descendants(block), _kind(block, x)
    program = inference.Program(structure, x, block._resnet_fused_backend)
    out = program(x)
    inference.keep(block, modules, tensors(structure), kind, program)
    return out


def _kind(block: Any, x: Tensor) -> Hashable:
    if torch.compiler.is_compiling():
        return None
    kind = inference.kind_of(block, x, operand_dtype(x))
    return None if kind is None else (kind, block._options())
