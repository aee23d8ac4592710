"""timm's ResNetV2 family with batch norm: pre-activated blocks, the V1.5 bottleneck, and the final norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import resnetv2
from torch import Tensor, nn

from resnet_fused.adapters.timm import BranchFactor, factor_reason
from resnet_fused.blocks import norms
from resnet_fused.blocks.norm_relu import FusedNorm
from resnet_fused.blocks.parts import activation_reason
from resnet_fused.blocks.paths import Reason, has_hooks
from resnet_fused.blocks.residual import FusedResidual, renamed
from resnet_fused.blocks.structure import ConvNorm, Unit


def _factor(block: Any) -> BranchFactor | None:
    drop_path = block.drop_path
    return None if type(drop_path) is nn.Identity else BranchFactor(None, drop_path)


class _FusedV2(FusedResidual):
    """What the blocks of this family share: norms that hold their activation, sums that promote."""

    def _shortcut_modules(self: Any) -> Sequence[nn.Module] | None:
        downsample = self.downsample
        if type(downsample) is resnetv2.DownsampleConv:
            return [downsample.conv, downsample.norm]
        if type(downsample) is resnetv2.DownsampleAvg:
            return [downsample.pool, downsample.conv, downsample.norm]
        return None

    def _declined(self: Any) -> Reason | None:
        return factor_reason(None, self.drop_path)


class _FusedPreAct(_FusedV2):
    # Every block's output goes to a norm: the next block's, or the one that ends the network.
    emit_statistics = True

    def _unit(self: Any) -> Unit:
        return Unit(pre=self.norm1, mixing=_factor(self), relu=False, promotes=True)

    def _norm_reason(self, norm: Any) -> Reason | None:
        return norms.unsupported_activated(norm, nn.ReLU)


class PreActBasic(_FusedPreAct, resnetv2.PreActBasic):
    """``timm.models.resnetv2.PreActBasic``, fused."""

    kind = "basic"
    _original_forward = renamed(resnetv2.PreActBasic.forward, "_original_forward")

    def _chain(self: Any) -> tuple[ConvNorm, ...]:
        return (self.conv1, self.norm2), (self.conv2, None)


class PreActBottleneck(_FusedPreAct, resnetv2.PreActBottleneck):
    """``timm.models.resnetv2.PreActBottleneck``, fused."""

    kind = "bottleneck"
    _original_forward = renamed(resnetv2.PreActBottleneck.forward, "_original_forward")

    def _chain(self: Any) -> tuple[ConvNorm, ...]:
        return (self.conv1, self.norm2), (self.conv2, self.norm3), (self.conv3, None)


class Bottleneck(_FusedV2, resnetv2.Bottleneck):
    """``timm.models.resnetv2.Bottleneck``, fused."""

    kind = "bottleneck"
    _original_forward = renamed(resnetv2.Bottleneck.forward, "_original_forward")

    def _chain(self: Any) -> tuple[ConvNorm, ...]:
        return (self.conv1, self.norm1), (self.conv2, self.norm2), (self.conv3, self.norm3)

    def _unit(self: Any) -> Unit:
        return Unit(mixing=_factor(self), promotes=True)

    def _norm_reason(self: Any, norm: Any) -> Reason | None:
        inner = norm is self.norm1 or norm is self.norm2
        return norms.unsupported_activated(norm, nn.ReLU if inner else nn.Identity)

    def _declined(self: Any) -> Reason | None:
        return factor_reason(None, self.drop_path) or activation_reason(self.act3)


class ResNetV2(FusedNorm, resnetv2.ResNetV2):
    """``timm.models.resnetv2.ResNetV2`` with its final norm and ReLU fused."""

    _original_forward_features = renamed(resnetv2.ResNetV2.forward_features, "_original_forward_features")

    @staticmethod
    def accepts(module: Any) -> bool:
        """Whether the network ends in a norm at all."""
        return type(module.norm) is not nn.Identity

    def _norm(self: Any) -> Any:
        return self.norm

    def _original_norm(self: Any, x: Tensor) -> Tensor:
        return self.norm(x)

    def _restrided(self: Any) -> nn.Module:
        return self.stem

    def _declined(self: Any) -> Reason | None:
        if any(has_hooks(module) for module in self.norm.modules()):
            return Reason("hooks", "the final norm has a hook that only its own call runs")
        return norms.unsupported_activated(self.norm, nn.ReLU)

    def forward_features(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._original_forward_features(x)
        return self._fused_features(x)

    @torch.jit.unused
    def _fused_features(self: Any, x: Tensor) -> Tensor:
        return self._fused_norm(self.stages(self.stem(x)))


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    resnetv2.PreActBasic: PreActBasic,
    resnetv2.PreActBottleneck: PreActBottleneck,
    resnetv2.Bottleneck: Bottleneck,
    resnetv2.ResNetV2: ResNetV2,
}
