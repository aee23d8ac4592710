"""timm's ResNet family: blocks with or without squeeze-and-excitation and stochastic depth, and the stem."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, EffectiveSEModule, SEModule
from timm.models import resnet
from torch import Tensor, nn

from resnet_fused.blocks.parts import FusedBasic, FusedBottleneck, activation_reason
from resnet_fused.blocks.paths import Reason
from resnet_fused.blocks.residual import renamed
from resnet_fused.blocks.stem import FusedStem, Stem
from resnet_fused.blocks.structure import Unit
from resnet_fused.operands import Mix


class BranchFactor:
    """What timm multiplies a block's branch with: the gate of an SE module, stochastic depth, or both.

    The attributes are those of :class:`resnet_fused.blocks.mixing.Mixing`.
    """

    has_shortcut = True

    def __init__(self, attention: Any, drop_path: Any) -> None:
        self.attention, self.drop_path = attention, drop_path
        self.reads_branch = attention is not None

    def _drops(self) -> bool:
        drop_path = self.drop_path
        return type(drop_path) is DropPath and drop_path.training and drop_path.drop_prob > 0

    def mix(self) -> Mix:
        return Mix(branch=0.0, branch_gate=1.0) if self.reads_branch or self._drops() else Mix()

    def gate(self, x: Tensor, total: Tensor) -> Tensor | None:
        gate = None
        if self.attention is not None:
            se = self.attention
            gate = se.gate(se.fc2(se.act(se.bn(se.fc1(x)))) if type(se) is SEModule else se.fc(x))
        if self._drops():
            drop = self.drop_path(total.new_ones((total.shape[0], 1, 1, 1)))
            gate = drop if gate is None else gate * drop
        return gate


def factor_reason(attention: Any, drop_path: Any) -> Reason | None:
    """Why these modules are not a factor of the branch."""
    if attention is not None and (type(attention) not in (SEModule, EffectiveSEModule) or attention.add_maxpool):
        return Reason("attention", f"attention {type(attention).__name__} is not squeeze-and-excitation of the mean")
    if drop_path is not None and type(drop_path) not in (nn.Identity, DropPath):
        return Reason("drop-path", f"{type(drop_path).__name__} is not timm's DropPath")
    return None


def _timm_reason(block: Any, *activations: nn.Module) -> Reason | None:
    """Why one of timm's optional modules keeps a block with PyTorch's modules."""
    for name in ("aa", "drop_block"):
        module = getattr(block, name)
        if module is not None and type(module) is not nn.Identity:
            return Reason(
                name.replace("_", "-"),
                f"{name} {type(module).__name__} stands between the norm and the next convolution",
            )
    return factor_reason(block.se, block.drop_path) or activation_reason(*activations)


def _timm_unit(block: Any) -> Unit:
    plain = block.se is None and type(block.drop_path) is not DropPath
    return Unit(mixing=None if plain else BranchFactor(block.se, block.drop_path))


class BasicBlock(FusedBasic, resnet.BasicBlock):
    """``timm.models.resnet.BasicBlock``, fused."""

    _original_forward = renamed(resnet.BasicBlock.forward, "_original_forward")

    def _unit(self) -> Unit:
        return _timm_unit(self)

    def _declined(self: Any) -> Reason | None:
        return _timm_reason(self, self.act1, self.act2)


class Bottleneck(FusedBottleneck, resnet.Bottleneck):
    """``timm.models.resnet.Bottleneck``, fused."""

    _original_forward = renamed(resnet.Bottleneck.forward, "_original_forward")

    def _unit(self) -> Unit:
        return _timm_unit(self)

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
