"""How torchvision's attribute names map to the dataflow; :mod:`resnet_fused.blocks` and the adapters mix these in."""

from __future__ import annotations

from typing import Any

from torch import nn

from resnet_fused.blocks.mixing import Mixing
from resnet_fused.blocks.paths import Reason
from resnet_fused.blocks.residual import FusedResidual
from resnet_fused.blocks.structure import Unit


def activation_reason(*activations: nn.Module) -> Reason | None:
    """Why one of the activations is not a ReLU."""
    for activation in activations:
        if type(activation) is not nn.ReLU:
            return Reason("activation", f"activation {type(activation).__name__} is not nn.ReLU")
    return None


class FusedBasic(FusedResidual):
    """A block of ``conv1, bn1, conv2, bn2`` with one ``relu``."""

    kind = "basic"

    def _chain(self: Any):
        return (self.conv1, self.bn1), (self.conv2, self.bn2)

    def _declined(self: Any) -> Reason | None:
        return activation_reason(self.relu)


class FusedBottleneck(FusedResidual):
    """A block of ``conv1, bn1, conv2, bn2, conv3, bn3`` with one ``relu``."""

    kind = "bottleneck"

    def _chain(self: Any):
        return (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)

    def _declined(self: Any) -> Reason | None:
        return activation_reason(self.relu)


class _FusedUnit(FusedResidual):
    """A unit of :mod:`resnet_fused.blocks.plain_units`."""

    emit_statistics = False  # whether the next module normalises this unit's output: it is then handed the statistics

    def _unit(self: Any) -> Unit:
        end = self._last_norm()
        return Unit(
            pre=self.bn1 if self.preactivate and self.unit == "full_preact" else None,
            pre_relu=self.preactivate and self.unit != "full_preact",
            branch_relu=self.unit == "relu_before_add",
            mixing=self.mixing,
            post=end if self.unit == "bn_after_add" else None,
            relu=self.unit in ("original", "bn_after_add"),
            promotes=True,
        )

    def _pairs(self: Any, convs: list[Any], bns: list[Any]):
        """Each convolution with the norm that follows it before the sum."""
        if self.unit == "full_preact":
            bns = [*bns[1:], None]
        elif self.unit == "bn_after_add":
            bns = [*bns[:-1], None]
        return tuple(zip(convs, bns, strict=True))

    def _options(self: Any):
        return self.unit, self.preactivate

    def _declined(self: Any) -> Reason | None:
        mixing = self.mixing
        if mixing is not None and not (isinstance(mixing, Mixing) and mixing.agrees):
            name = type(mixing).__name__
            return Reason("mixing", f"what {name} adds is in its forward alone, not in mix and gate")
        return activation_reason(self.relu)


class FusedBasicUnit(_FusedUnit):
    """A unit of ``conv1, bn1, conv2, bn2``."""

    kind = "basic"

    def _chain(self: Any):
        return self._pairs([self.conv1, self.conv2], [self.bn1, self.bn2])

    def _last_norm(self: Any):
        return self.bn2


class FusedBottleneckUnit(_FusedUnit):
    """A unit of ``conv1, bn1, conv2, bn2, conv3, bn3``."""

    kind = "bottleneck"

    def _chain(self: Any):
        return self._pairs([self.conv1, self.conv2, self.conv3], [self.bn1, self.bn2, self.bn3])

    def _last_norm(self: Any):
        return self.bn3


class FusedPReLU(FusedResidual):
    """A block of ``conv1, bn1, prelu, conv2, bn2`` around an identity shortcut."""

    kind = "prelu"
    downsample = None

    def _chain(self: Any):
        return (self.conv1, self.bn1), (self.conv2, self.bn2)

    def _unit(self: Any) -> Unit:
        end = self.prelu if self.final_activation else None
        return Unit(prelu=self.prelu, relu=False, end_prelu=end, promotes=True)

    def _options(self: Any):
        return (self.final_activation,)

    def _declined(self: Any) -> Reason | None:
        if type(self.prelu) is not nn.PReLU:
            return Reason("activation", f"activation {type(self.prelu).__name__} is not nn.PReLU")
        if self.prelu.weight.numel() not in (1, self.conv1.out_channels):
            return Reason("activation", f"{self.prelu.weight.numel()} slopes for {self.conv1.out_channels} channels")
        return None
