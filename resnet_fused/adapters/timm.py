"""timm's ResNet family: blocks without attention, anti-aliasing or stochastic depth in force, and the stem."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import resnet
from torch import Tensor, nn

from resnet_fused.blocks.parts import FusedBasic, FusedBottleneck, activation_reason
from resnet_fused.blocks.paths import Reason
from resnet_fused.blocks.residual import renamed
from resnet_fused.blocks.stem import FusedStem, Stem


def _timm_reason(block: Any, *activations: nn.Module) -> Reason | None:
    """Why one of timm's optional modules keeps a block with PyTorch's modules."""
    if block.se is not None:
        return Reason("attention", f"attention {type(block.se).__name__} scales the block's output before the sum")
    for name in ("aa", "drop_block"):
        module = getattr(block, name)
        if module is not None and type(module) is not nn.Identity:
            return Reason(
                name.replace("_", "-"),
                f"{name} {type(module).__name__} stands between the norm and the next convolution",
            )
    drop_path = block.drop_path
    if drop_path is not None and type(drop_path) is not nn.Identity:
        probability = getattr(drop_path, "drop_prob", None)
        if probability is None or (probability > 0 and drop_path.training):
            return Reason("drop-path", f"{type(drop_path).__name__} drops the block's output at random")
    return activation_reason(*activations)


class BasicBlock(FusedBasic, resnet.BasicBlock):
    """``timm.models.resnet.BasicBlock``, fused."""

    _original_forward = renamed(resnet.BasicBlock.forward, "_original_forward")

    def _declined(self: Any) -> Reason | None:
        return _timm_reason(self, self.act1, self.act2)


class Bottleneck(FusedBottleneck, resnet.Bottleneck):
    """``timm.models.resnet.Bottleneck``, fused."""

    _original_forward = renamed(resnet.Bottleneck.forward, "_original_forward")

    def _declined(self: Any) -> Reason | None:
        return _timm_reason(self, self.act1, self.act2, self.act3)


class ResNet(FusedStem, resnet.ResNet):
    """``timm.models.resnet.ResNet`` with its stem fused, whatever comes before the stem's last norm."""

    _original_forward_features = renamed(resnet.ResNet.forward_features, "_original_forward_features")

    def _stem_parts(self) -> Stem:
        return Stem(self.conv1, self.bn1, self.act1, self.maxpool)

    def forward_features(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._original_forward_features(x)
        return self._fused_features(x)

    @torch.jit.unused
    def _fused_features(self: Any, x: Tensor) -> Tensor:
        x = self._fused_stem(x)
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        if self.grad_checkpointing:
            return resnet.checkpoint_seq(stages, x, flatten=True)
        for stage in stages:
            x = stage(x)
        return x


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    resnet.BasicBlock: BasicBlock,
    resnet.Bottleneck: Bottleneck,
    resnet.ResNet: ResNet,
}
