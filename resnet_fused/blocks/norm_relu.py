"""A batch norm and its ReLU in one pass, where no convolution stands in front of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from resnet_fused.backends import use_backend
from resnet_fused.blocks import norms, paths
from resnet_fused.blocks.parts import activation_reason
from resnet_fused.blocks.paths import Reason
from resnet_fused.blocks.training import norm_relu

if TYPE_CHECKING:  # the mixin stands in front of an nn.Module and relies on it
    _Module = nn.Module
else:
    _Module = object


class FusedNorm(_Module):
    """Mixin over a module that ends in a batch norm and a ReLU; its class tells them in ``_norm`` and ``_declined``."""

    kind: ClassVar[str] = "norm"
    _resnet_fused_backend = "auto"  # without annotation: TorchScript cannot read one that is text

    def _norm(self: Any) -> Any:
        raise NotImplementedError

    def _declined(self: Any) -> Reason | None:
        """Why norm and ReLU are none that the fused path computes."""
        raise NotImplementedError

    def _original_norm(self: Any, x: Tensor) -> Tensor:
        """Norm and ReLU by PyTorch's modules."""
        raise NotImplementedError

    def _restrided(self: Any) -> nn.Module:
        """The module whose convolutions take the channels_last memory format when it is swapped."""
        return nn.Module()

    @torch.jit.unused
    def _fused_norm(self: Any, x: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        norm = self._norm()
        reason = paths.transformed(x) or self._declined() or _input_reason(norm, x)
        if reason is not None:
            if not compiling:
                paths.take(self, paths.ORIGINAL, reason)
            return self._original_norm(x)
        if not compiling:
            gradient = torch.is_grad_enabled() and any(
                t is not None and t.requires_grad for t in (x, *norms.parameters(norm))
            )
            paths.take(self, paths.TRAIN if gradient or norms.batch_statistics(norm) else paths.INFER)
        if compiling or self._resnet_fused_backend == "auto":
            return norm_relu(norm, x)
        with use_backend(self._resnet_fused_backend):
            return norm_relu(norm, x)


def _input_reason(norm: Any, x: Tensor) -> Reason | None:
    reason = paths.input_reason(x, x.numel() == 0 and norms.spec(norm).group is not None)
    if reason is not None:
        return reason
    channels = next((v.shape[0] for v in norms.parameters(norm) if v is not None), x.shape[1])
    if x.shape[1] != channels:
        return Reason("input", f"the input has {x.shape[1]} channels, the norm {channels}")
    return None


class FusedNormReLU(FusedNorm):
    """Mixin over a module of children ``bn`` and ``relu``."""

    _original_forward: ClassVar[Callable[..., Any]]

    def _norm(self: Any) -> Any:
        return self.bn

    def _declined(self: Any) -> Reason | None:
        if any(paths.has_hooks(module) for module in paths.descendants(self)):
            return Reason("hooks", "norm or ReLU has a hook that only its own call runs")
        return norms.unsupported(self.bn) or activation_reason(self.relu)

    def _original_norm(self: Any, x: Tensor) -> Tensor:
        return self._original_forward(x)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._original_forward(x)
        return self._fused_norm(x)
