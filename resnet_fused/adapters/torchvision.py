"""torchvision's residual blocks, networks and backbones."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models._utils import IntermediateLayerGetter

from resnet_fused.blocks.parts import FusedBasic, FusedBottleneck
from resnet_fused.blocks.residual import renamed
from resnet_fused.blocks.stem import FusedStem


class BasicBlock(FusedBasic, resnet.BasicBlock):
    """``torchvision.models.resnet.BasicBlock``, fused."""

    _original_forward = renamed(resnet.BasicBlock.forward, "_original_forward")


class Bottleneck(FusedBottleneck, resnet.Bottleneck):
    """``torchvision.models.resnet.Bottleneck``, fused."""

    _original_forward = renamed(resnet.Bottleneck.forward, "_original_forward")


class ResNet(FusedStem, resnet.ResNet):
    """``torchvision.models.ResNet`` with its stem fused."""


class Backbone(FusedStem, IntermediateLayerGetter):
    """The ResNet body of torchvision's detection and segmentation models with its stem fused."""

    _STEM = ("conv1", "bn1", "relu", "maxpool")
    _original_forward = renamed(IntermediateLayerGetter.forward, "_original_forward")

    @staticmethod
    def accepts(module: Any) -> bool:
        """Whether the children start with a ResNet's stem of which only the pooled output is returned."""
        names = tuple(name for name, _ in module.named_children())
        return names[:4] == Backbone._STEM and not set(Backbone._STEM[:3]) & set(module.return_layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if torch.jit.is_scripting():
            return self._original_forward(x)
        return self._fused_layers(x)

    @torch.jit.unused
    def _fused_layers(self: Any, x: Tensor) -> dict[str, Tensor]:
        out: OrderedDict[str, Tensor] = OrderedDict()
        x = self._fused_stem(x)
        for name, module in self.items():
            if name not in self._STEM:
                x = module(x)
            if name in self.return_layers:
                out[self.return_layers[name]] = x
        return out


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    resnet.BasicBlock: BasicBlock,
    resnet.Bottleneck: Bottleneck,
    resnet.ResNet: ResNet,
    IntermediateLayerGetter: Backbone,
}
