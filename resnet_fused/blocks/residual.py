"""The forward of every fused residual block: decide on a path, then train, infer or run the original modules."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused.autograd.layer import Layer, no_autocast
from resnet_fused.autograd.residual import ResidualFunction, ResidualSpec
from resnet_fused.backends import use_backend
from resnet_fused.blocks import inference, norms, paths
from resnet_fused.blocks.paths import Reason
from resnet_fused.operands import Conv
from resnet_fused.ops._conv import output_size

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


ConvNorm = tuple[nn.Conv2d, Any]
"""A convolution and the batch norm that follows it."""


class Structure(NamedTuple):
    """The modules of a residual block by their part in the dataflow."""

    chain: tuple[ConvNorm, ...]  # a ReLU between them and after the sum
    projection: ConvNorm | None  # (convolution, norm) of the shortcut
    before: nn.Module | None  # run by PyTorch on the shortcut: in front of the projection, or all of it

    @property
    def layers(self) -> tuple[ConvNorm, ...]:
        return self.chain if self.projection is None else (*self.chain, self.projection)


class FusedResidual(_Module):
    """Mixin over a residual block's class; :mod:`resnet_fused.adapters` says how to read that class.

    A fused class names, besides the mixin and the original, ``_original_forward`` and ``kind``.
    """

    kind: ClassVar[str]
    _original_forward: ClassVar[Callable[..., Any]]
    _resnet_fused_backend = "auto"  # without annotation: TorchScript cannot read one that is text

    # --- what an adapter tells ---------------------------------------------------------------------------------------

    def _chain(self) -> tuple[ConvNorm, ...]:
        """(convolution, norm) in order."""
        raise NotImplementedError

    def _declined(self) -> Reason | None:
        """Why a part of this block that ``_chain`` does not show cannot be fused."""
        return None

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
            found = read(self) if compiling else _reread(self)
        if isinstance(found, Structure):
            found = _input_reason(found, x) or found
        if isinstance(found, Reason):
            if not compiling:
                paths.take(self, paths.ORIGINAL, found)
            return self._original_forward(x)
        path = _infer if _frozen_without_gradient(self, found, x) else _train
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


# --- reading a block ------------------------------------------------------------------------------------------------


def read(block: Any) -> Structure | Reason:
    """The structure of ``block``, or why it is not one that the fused path computes."""
    reason = block._declined()
    if reason is not None:
        return reason
    if any(paths.has_hooks(module) for module in paths.descendants(block)):
        return Reason("hooks", "a module inside the block has a hook that only its own call runs")
    chain = block._chain()
    before, projection = _read_shortcut(block.downsample)
    if before is not None and any(getattr(module, "inplace", False) for module in before.modules()):
        return Reason("in-place", "the shortcut writes over the block's input, in PyTorch after the convolutions")
    for conv, norm in chain if projection is None else (*chain, projection):
        reason = _conv_reason(conv) or norms.unsupported(norm)
        if reason is not None:
            return reason
    return Structure(chain, projection, before)


_read: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], Structure | Reason]] = weakref.WeakKeyDictionary()


def _reread(block: Any) -> Structure | Reason:
    """:func:`read`, done again only when something that it looks at has changed."""
    signature = paths.signature(paths.descendants(block))
    kept = _read.get(block)
    if kept is None or kept[0] != signature:
        kept = _read[block] = (signature, read(block))
    return kept[1]


def _read_shortcut(downsample: nn.Module | None) -> tuple[nn.Module | None, ConvNorm | None]:
    """The part of a shortcut that PyTorch runs, and the 1x1 convolution with its norm that the block fuses."""
    if downsample is None or type(downsample) is nn.Identity:
        return None, None
    if type(downsample) is not nn.Sequential:
        return downsample, None
    parts: list[Any] = [m for m in downsample if type(m) is not nn.Identity]
    if len(parts) < 2 or type(parts[-2]) is not nn.Conv2d or _conv_reason(parts[-2]) or norms.unsupported(parts[-1]):
        return downsample, None
    if len(parts) == 2:
        return None, (parts[0], parts[1])
    if len(parts) == 3:
        return parts[0], (parts[1], parts[2])
    return downsample, None


def _conv_reason(conv: Any) -> Reason | None:
    """Why ``conv`` is none that the ops compute."""
    if type(conv) is not nn.Conv2d:
        return Reason("conv", f"convolution {type(conv).__name__} is not exactly nn.Conv2d")
    kernel, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
    if kernel not in ((1, 1), (3, 3)) or stride[0] != stride[1] or dilation[0] != dilation[1]:
        return Reason(
            "conv", f"kernel {kernel}, stride {stride}, dilation {dilation} is not a square 1x1 or 3x3 convolution"
        )
    if conv.padding != (dilation[0] * (kernel[0] // 2),) * 2 or conv.padding_mode != "zeros":
        return Reason(
            "conv", f"padding {conv.padding} ({conv.padding_mode}) is not zeros of width dilation * (kernel - 1) / 2"
        )
    if conv.bias is not None:
        return Reason("conv", "the convolution has a bias")
    if kernel == (1, 1) and conv.groups != 1:
        return Reason("conv", f"the 1x1 convolution has {conv.groups} groups")
    return None


def _input_reason(structure: Structure, x: Tensor) -> Reason | None:
    """Why this input takes PyTorch's modules, its errors included."""
    synchronised = x.numel() == 0 and any(norms.spec(norm).group is not None for _, norm in structure.layers)
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
    if structure.before is None:
        added = tuple(x.shape) if structure.projection is None else output_shape(structure.projection[0], x.shape)
        if added != chain_shape(structure, x):
            return Reason(
                "input", f"the sum of {chain_shape(structure, x)} and {added} is PyTorch's to broadcast or refuse"
            )
    return None


def operand_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the convolutions read ``x``: autocast's where it is on, ``x``'s otherwise."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _frozen_without_gradient(block: Any, structure: Structure, x: Tensor) -> bool:
    if any(norms.batch_statistics(norm) for _, norm in structure.layers):
        return False
    if x.dtype != operand_dtype(x) and structure.projection is None:
        return False
    if not torch.is_grad_enabled():
        return True
    tensors = (x, *block.parameters(), *_sources(structure))  # a weight may be a plain tensor that requires grad
    return not any(t is not None and t.requires_grad for t in tensors)


# --- the two fused paths --------------------------------------------------------------------------------------------


def geometry(conv: nn.Conv2d) -> Conv:
    """A module's convolution as the ops know it."""
    return Conv(conv.stride[0], conv.dilation[0], conv.groups)


def _layer(conv: nn.Conv2d, norm: Any) -> Layer:
    return Layer(conv.kernel_size[0], geometry(conv), norms.spec(norm))


def _check_batches(structure: Structure, x: Tensor, source: Tensor) -> None:
    """PyTorch's errors before any running statistic moves."""
    for chain, shape in ((structure.chain, tuple(x.shape)), ((structure.projection,), tuple(source.shape))):
        for pair in chain:
            if pair is not None:
                shape = output_shape(pair[0], shape)
                norms.check_batch(pair[1], shape)


def chain_shape(structure: Structure, x: Tensor) -> tuple:
    """Shape of the chain's output."""
    shape = tuple(x.shape)
    for conv, _ in structure.chain:
        shape = output_shape(conv, shape)
    return shape


def output_shape(conv: nn.Conv2d, shape: tuple) -> tuple:
    """Shape of ``conv``'s output for an input of ``shape``."""
    size = (output_size(s, conv.kernel_size[0], conv.stride[0], conv.dilation[0]) for s in shape[2:])
    return (shape[0], conv.out_channels, *size)


def _shortcut(structure: Structure, x: Tensor) -> Tensor:
    """What is added to the chain's output, or what the projection reads."""
    if structure.before is None:
        return x
    shortcut = structure.before(x)
    return shortcut.expand(chain_shape(structure, x)) if structure.projection is None else shortcut  # a sum broadcasts


def _train(block: nn.Module, structure: Structure, x: Tensor) -> Tensor:
    """The deferred algorithm with its gradients: batch statistics, frozen ones, or a mixture."""
    dtype = operand_dtype(x)
    shortcut = _shortcut(structure, x)
    _check_batches(structure, x, shortcut)
    # The identity is the block's own input unless autocast gives the convolutions another dtype.
    outside = None if structure.before is None and (structure.projection is not None or x.dtype == dtype) else shortcut
    if outside is not None:
        outside = outside.to(dtype if structure.projection is not None else outside.dtype)
        outside = outside.contiguous(memory_format=torch.channels_last)
    spec = ResidualSpec(
        tuple(_layer(*pair) for pair in structure.chain),
        None if structure.projection is None else _layer(*structure.projection),
        dtype,
        torch.is_grad_enabled(),
    )
    flat = _sources(structure)
    with no_autocast(x):
        operand = x.to(dtype).contiguous(memory_format=torch.channels_last)
        out, *moments = ResidualFunction.apply(spec, operand, outside, *flat)
    remaining = iter(moments)
    for _, norm in structure.layers:
        if norms.batch_statistics(norm):
            norms.update_running(norm, next(remaining), next(remaining))
    return like_eager(out, x, structure.chain)


def _infer(block: Any, structure: Structure, x: Tensor) -> Tensor:
    """Folded norms: one convolution with bias, ReLU and residual per layer."""
    modules, kind = paths.descendants(block), _kind(block, x)
    program = inference.recall(block, modules, kind)
    if program is not None:
        return program(x)
    program, out = _program(block, structure, x)
    inference.keep(block, modules, _sources(structure), kind, program)
    return out


def _kind(block: Any, x: Tensor) -> Hashable:
    return None if torch.compiler.is_compiling() else inference.kind_of(block, x, operand_dtype(x))


def _sources(structure: Structure) -> list[Tensor | None]:
    """For every layer its convolution's weight and its norm's tensors."""
    return [t for conv, norm in structure.layers for t in (conv.weight, *norms.parameters(norm))]


def _program(block: Any, structure: Structure, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The block's inference for inputs like ``x``, every convolution bound by running it; and the output for ``x``."""
    dtype, last = operand_dtype(x), structure.chain[-1]
    shortcut = _shortcut(structure, x)
    with no_autocast(x):
        h, residual = _operand(x, dtype), _operand(shortcut, dtype)
        projection = None
        if structure.projection is not None:
            projection = inference.bind(*structure.projection, residual, None, relu=False)
            residual = projection(residual, None)
        chain = []
        for conv, norm in structure.chain[:-1]:
            chain.append(inference.bind(conv, norm, h, None, relu=True))
            h = chain[-1](h, None)
        scratch = projection is not None  # nobody else has the projection's output
        end = inference.bind(*last, h, residual, relu=True, overwrite_residual=scratch)
        out = end(h, residual)
    plain = like_eager(out, x, structure.chain) is not out

    def run(x: Tensor) -> Tensor:
        shortcut = _shortcut(structure, x)
        with no_autocast(x):
            h, residual = _operand(x, dtype), _operand(shortcut, dtype)
            if projection is not None:
                residual = projection(residual, None)
            for step in chain:
                h = step(h, None)
            h = end(h, residual)
        return h.contiguous() if plain else h

    return (run if block._resnet_fused_backend == "auto" else _under(block._resnet_fused_backend, run)), (
        out.contiguous() if plain else out
    )


def _under(backend: str, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def forced(x: Tensor) -> Tensor:
        with use_backend(backend):
            return run(x)

    return forced


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def like_eager(out: Tensor, x: Tensor, chain: Any) -> Tensor:
    """``out`` in the memory format of PyTorch's convolutions: channels_last as soon as input or a weight is."""
    if is_channels_last(x) or any(is_channels_last(conv.weight) for conv, _ in chain):
        return out
    return out.contiguous()


def is_channels_last(t: Tensor) -> bool:
    """Whether the strides say channels_last (and not both formats at once)."""
    return t.stride(1) == 1 and t.stride(3) == t.shape[1] and t.shape[1] > 1
