"""How torchvision's attribute names map to the dataflow; :mod:`resnet_fused.blocks` and the adapters mix these in."""

from __future__ import annotations

from typing import Any

from torch import nn

from resnet_fused.blocks.paths import Reason
from resnet_fused.blocks.residual import FusedResidual


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
