"""Reading a residual block: its modules by their part in the dataflow, or why it is none that can be fused."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from resnet_fused.blocks import norms, paths
from resnet_fused.blocks.layout import eager_format
from resnet_fused.blocks.paths import Reason
from resnet_fused.operands import Conv, Mix
from resnet_fused.ops._conv import output_size

ConvNorm = tuple[nn.Conv2d, Any]
"""A convolution and the batch norm that follows it, or None."""


class Mixer(Protocol):
    """How branch and shortcut are added, as :class:`resnet_fused.blocks.mixing.Mixing` describes it."""

    has_shortcut: bool
    reads_branch: bool

    def mix(self) -> Mix: ...

    def gate(self, x: Tensor, total: Tensor) -> Tensor | None: ...


class Unit(NamedTuple):
    """What of a residual unit its chain and its shortcut's modules do not show; the default is the original unit."""

    pre: Any = None  # the chain and the projection read relu(pre(x))
    pre_relu: bool = False  # ... or relu(x)
    prelu: nn.PReLU | None = None  # between the convolutions, in the ReLU's place
    branch_relu: bool = False  # a ReLU on the branch before the sum
    mixing: Mixer | None = None  # None is the plain sum
    post: Any = None  # a norm of the sum
    relu: bool = True  # after the sum
    end_prelu: nn.PReLU | None = None  # ... or a PReLU
    promotes: bool = False  # the sum of two dtypes has the wider one; else the branch's, as of an addition in place

    @property
    def preactivated(self) -> bool:
        return self.pre is not None or self.pre_relu

    @property
    def has_shortcut(self) -> bool:
        return self.mixing is None or self.mixing.has_shortcut


class Structure(NamedTuple):
    """The modules of a residual block by their part in the dataflow."""

    chain: tuple[ConvNorm, ...]  # an activation between them
    projection: ConvNorm | None  # (convolution, norm) of the shortcut
    before: Any  # run by PyTorch on the shortcut: in front of the projection, or all of it
    unit: Unit

    @property
    def layers(self) -> tuple[ConvNorm, ...]:
        return self.chain if self.projection is None else (*self.chain, self.projection)

    @property
    def norms(self) -> list[Any]:
        """Of the layers, the input and the sum, None where there is none: the order of ``sources``."""
        extra = [norm for norm in (self.unit.pre, self.unit.post) if norm is not None]
        return [norm for _, norm in self.layers] + extra


def read(block: Any) -> Structure | Reason:
    """The structure of ``block``, or why it is not one that the fused path computes."""
    reason = block._declined()
    if reason is not None:
        return reason
    if any(paths.has_hooks(module) for module in paths.descendants(block)):
        return Reason("hooks", "a module inside the block has a hook that only its own call runs")
    chain, unit = block._chain(), block._unit()
    before, projection = _read_shortcut(block) if unit.has_shortcut else (None, None)
    if before is not None and any(getattr(module, "inplace", False) for module in before.modules()):
        return Reason("in-place", "the shortcut writes over the block's input, in PyTorch after the convolutions")
    structure = Structure(chain, projection, before, unit)
    for conv, norm in structure.layers:
        reason = _conv_reason(conv, norm)
        if reason is not None:
            return reason
    for norm in structure.norms:
        reason = None if norm is None else block._norm_reason(norm)
        if reason is not None:
            return reason
    return structure


_read: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], Structure | Reason]] = weakref.WeakKeyDictionary()


def reread(block: Any) -> Structure | Reason:
    """:func:`read`, done again only when something that it looks at has changed."""
    signature = [*paths.signature(paths.descendants(block)), *block._options()]
    kept = _read.get(block)
    if kept is None or kept[0] != signature:
        kept = _read[block] = (signature, read(block))
    return kept[1]


def _read_shortcut(block: Any) -> tuple[nn.Module | None, ConvNorm | None]:
    """The part of a shortcut that PyTorch runs, and the 1x1 convolution (with its norm) that the block fuses."""
    downsample = block.downsample
    if downsample is None or type(downsample) is nn.Identity:
        return None, None
    found = block._shortcut_modules()
    parts: list[Any] = [] if found is None else [m for m in found if type(m) is not nn.Identity]
    norm = parts.pop() if len(parts) > 1 and block._norm_reason(parts[-1]) is None else None
    if not parts or len(parts) > 2 or _conv_reason(parts[-1], norm):
        return downsample, None
    return (parts[0] if len(parts) == 2 else None), (parts[-1], norm)


def _conv_reason(conv: Any, norm: Any) -> Reason | None:
    """Why ``conv``, followed by ``norm``, is none that the ops compute."""
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
    if conv.bias is not None and norm is None:
        return Reason("conv", "the convolution has a bias and no norm behind it")
    if kernel == (1, 1) and conv.groups != 1:
        return Reason("conv", f"the 1x1 convolution has {conv.groups} groups")
    return None


# --- what it is made of ---------------------------------------------------------------------------------------------


def sources(structure: Structure) -> list[Tensor | None]:
    """For every norm of ``structure.norms`` its convolution's weight and bias (None, None without) and its tensors."""
    none = (None,) * 4
    found: list[Tensor | None] = []
    for conv, norm in structure.layers:
        own = conv._parameters  # attribute look-up is slow, as in norms.parameters
        pair = (own["weight"], own["bias"]) if "weight" in own and "bias" in own else (conv.weight, conv.bias)
        found += (*pair, *(none if norm is None else norms.parameters(norm)))
    for norm in (structure.unit.pre, structure.unit.post):
        if norm is not None:
            found += (None, None, *norms.parameters(norm))
    return found


def tensors(structure: Structure) -> list[Tensor | None]:
    """All that the fused path reads: the sources and the PReLUs' slopes."""
    prelus = (structure.unit.prelu, structure.unit.end_prelu)
    return [*sources(structure), *(prelu.weight for prelu in prelus if prelu is not None)]


def geometry(conv: nn.Conv2d) -> Conv:
    """A module's convolution as the ops know it."""
    return Conv(conv.stride[0], conv.dilation[0], conv.groups)


def chain_shape(structure: Structure, shape: tuple) -> tuple:
    """Shape of the chain's output, and of the sum."""
    for conv, _ in structure.chain:
        shape = output_shape(conv, shape)
    return shape


def output_shape(conv: nn.Conv2d, shape: tuple) -> tuple:
    """Shape of ``conv``'s output for an input of ``shape``."""
    if conv.stride[0] == 1:
        return (shape[0], conv.out_channels, *shape[2:])  # what is fused has its padding
    size = (output_size(s, conv.kernel_size[0], conv.stride[0], conv.dilation[0]) for s in shape[2:])
    return (shape[0], conv.out_channels, *size)


def check_batches(structure: Structure, shape: tuple) -> None:
    """PyTorch's errors for the chain's and the sum's norms before any running statistic moves."""
    if shape[0] > 1:
        return  # no norm sees a single value per channel
    unit, inner = structure.unit, shape
    if unit.pre is not None:
        norms.check_batch(unit.pre, shape)
    for conv, norm in structure.chain:
        inner = output_shape(conv, inner)
        if norm is not None:
            norms.check_batch(norm, inner)
    if unit.post is not None:
        norms.check_batch(unit.post, inner)


def check_projection(structure: Structure, shape: tuple) -> None:
    """The same for the projection, which reads a tensor of ``shape``."""
    if structure.projection is not None and structure.projection[1] is not None:
        norms.check_batch(structure.projection[1], output_shape(structure.projection[0], shape))


# --- branch and shortcut together -------------------------------------------------------------------------------------


class Mixture(NamedTuple):
    """A unit's rule for one call."""

    mix: Mix
    gate: Tensor | None  # None: the rule has none, or computes it from the branch
    total: Tensor | None  # what ``Mixer.gate`` takes besides


def mixture(structure: Structure, x: Tensor, outside: Tensor | None, dtype: torch.dtype) -> Mixture:
    """The constants and the gate for the input ``x``; ``outside`` is the output of ``structure.before``."""
    mixing = structure.unit.mixing
    mix = Mix() if mixing is None else mixing.mix()
    if mixing is None or not mix.gated:
        return Mixture(mix, None, None)
    total = _shortcut_like(structure, x, outside, dtype)
    return Mixture(mix, None if mixing.reads_branch else mixing.gate(x, total), total)


def _shortcut_like(structure: Structure, x: Tensor, outside: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A tensor as PyTorch's shortcut would be, strides included (random numbers are drawn in their order)."""
    source = x if outside is None else outside
    if structure.projection is None:
        return source if source.dtype == dtype else torch.empty_like(source, dtype=dtype)
    shape = output_shape(structure.projection[0], tuple(source.shape))
    layout = eager_format(source, [structure.projection])
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)


def promoted(structure: Structure, out: Tensor, outside: Tensor | None) -> Tensor:
    """``out`` in the dtype of PyTorch's sum, where a module gave a shortcut of another one."""
    if outside is None or structure.projection is not None or not structure.unit.promotes:
        return out
    return out.to(torch.promote_types(out.dtype, outside.dtype))
