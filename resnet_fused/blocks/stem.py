"""The stem of an ImageNet ResNet: PyTorch's convolution, then batch norm + ReLU + max-pool in one op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused import ops
from resnet_fused.autograd.layer import no_autocast
from resnet_fused.autograd.stem import StemFunction
from resnet_fused.backends import use_backend
from resnet_fused.blocks import inference, norms, paths
from resnet_fused.blocks.layout import is_channels_last, operand_dtype
from resnet_fused.blocks.parts import activation_reason
from resnet_fused.blocks.paths import Reason

if TYPE_CHECKING:  # the mixin stands in front of an nn.Module and relies on it
    _Module = nn.Module
else:
    _Module = object


class Stem(NamedTuple):
    """The four modules in front of the first stage."""

    conv: Any  # any module
    norm: Any
    activation: Any
    pool: Any


class FusedStem(_Module):
    """Mixin over a network's class; the class tells its four modules in ``_stem_parts``."""

    kind: ClassVar[str] = "stem"
    _resnet_fused_backend = "auto"  # without annotation: TorchScript cannot read one that is text

    def _stem_parts(self: Any) -> Stem:
        return Stem(self.conv1, self.bn1, self.relu, self.maxpool)

    def _restrided(self: Any) -> nn.Module:
        """The module whose convolutions take the channels_last memory format when it is swapped."""
        return self._stem_parts().conv

    @torch.jit.unused
    def _fused_stem(self: Any, x: Tensor) -> Tensor:
        parts = self._stem_parts()
        compiling = torch.compiler.is_compiling()
        reason = paths.transformed(x) or stem_reason(parts) or _input_reason(parts, x)
        if reason is not None:
            if not compiling:
                paths.take(self, paths.ORIGINAL, reason)
            return parts.pool(parts.activation(parts.norm(parts.conv(x))))
        if compiling or self._resnet_fused_backend == "auto":
            return _stem(self, parts, x)
        with use_backend(self._resnet_fused_backend):
            return _stem(self, parts, x)

    def _forward_impl(self: Any, x: Tensor) -> Tensor:
        """The forward of torchvision's ResNet."""
        if torch.jit.is_scripting():
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        else:
            x = self._fused_stem(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    @torch.jit.unused
    def train(self, mode: bool = True):
        """As ``nn.Module.train``; what inference keeps is made anew."""
        inference.forget(self)
        return super().train(mode)


def stem_reason(parts: Stem) -> Reason | None:
    """Why the four modules are not a stem that the fused path computes."""
    pool = parts.pool
    if type(pool) is not nn.MaxPool2d or (
        [_pair(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
        != [(3, 3), (2, 2), (1, 1), (1, 1)]
        or pool.ceil_mode
        or pool.return_indices
    ):
        return Reason("pool", f"the stem's pool {pool} is not a 3x3 max-pool of stride 2 and padding 1")
    reason = norms.unsupported(parts.norm) or activation_reason(parts.activation)
    if reason is None and any(paths.has_hooks(m) for m in (parts.norm, parts.activation, parts.pool)):
        reason = Reason("hooks", "norm, activation or pool of the stem has a hook that only its own call runs")
    return reason


def _pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _input_reason(parts: Stem, x: Tensor) -> Reason | None:
    return paths.input_reason(x, x.numel() == 0 and norms.spec(parts.norm).group is not None)


def _foldable(conv: Any, x: Tensor) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.bias is None
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and conv.stride[0] == conv.stride[1]
        and conv.padding[0] == conv.padding[1]
        and conv.weight.dtype == x.dtype == operand_dtype(x)
        and not paths.has_hooks(conv)
    )


def _stem(owner: Any, parts: Stem, x: Tensor) -> Tensor:
    frozen = not norms.batch_statistics(parts.norm)
    own = norms.parameters(parts.norm)
    plain = vars(parts.conv).get("weight")  # a parametrization would compute the attribute
    tensors = (x, plain, *parts.conv.parameters(), *own)
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if frozen and not gradient and _foldable(parts.conv, x):
        if not torch.compiler.is_compiling():
            paths.take(owner, paths.INFER)
        kind = None if torch.compiler.is_compiling() else inference.kind_of(owner, x, x.dtype)
        step = inference.recall(owner, parts, kind)
        if step is None:
            weight, bias = inference.fold(parts.conv, parts.norm, x.dtype)
            step = ops.stem.bind(x, weight, bias, stride=parts.conv.stride[0], padding=parts.conv.padding[0])
            inference.keep(owner, parts, (parts.conv.weight, *own), kind, step)
        out = step(x)
        return out if is_channels_last(x) or is_channels_last(parts.conv.weight) else out.contiguous()
    y = parts.conv(x)
    reason = _input_reason(parts, y)
    if reason is not None:
        if not torch.compiler.is_compiling():
            paths.take(owner, paths.ORIGINAL, reason)
        return parts.pool(parts.activation(parts.norm(y)))
    if not torch.compiler.is_compiling():
        paths.take(owner, paths.TRAIN if gradient or not frozen else paths.INFER)
    norms.check_batch(parts.norm, tuple(y.shape))
    with no_autocast(y):
        operand = y.contiguous(memory_format=torch.channels_last)
        out, *moments = StemFunction.apply(norms.spec(parts.norm), operand, *norms.parameters(parts.norm))
    if moments:
        norms.update_running([(parts.norm, *moments)])
    return out if is_channels_last(y) else out.contiguous()
