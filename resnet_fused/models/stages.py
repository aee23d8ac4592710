"""How a network is made of residual units: stages, shortcut options, mixing rules, end and initialisation.

The shortcut of a unit is one of the options of arXiv 1512.03385, section 3.3:

    A   parameter-free where the size changes: every ``stride``-th pixel, zero channels appended; identity elsewhere
    B   1x1 convolution where the size changes, identity elsewhere
    C   1x1 convolution in every unit

The convolution is followed by a norm where the branch ends in one: in the units original, relu_before_add and
relu_preact. A unit whose sum has no shortcut gets none, whatever the option.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resnet_fused.blocks import BasicBlock, BasicUnit, Bottleneck, BottleneckUnit, NormReLU
from resnet_fused.blocks.plain import PlainBasicBlock, PlainBottleneck, conv1x1
from resnet_fused.blocks.plain_units import (
    PREACTIVATED,
    PlainBasicUnit,
    PlainBottleneckUnit,
    PlainNormReLU,
    PlainUnit,
    check_unit,
)
from resnet_fused.blocks.residual import FusedResidual
from resnet_fused.blocks.shortcuts import PadShortcut
from resnet_fused.models.mixing import MixingRule, MixingSite

SHORTCUTS = ("A", "B", "C")

Block = type[PlainBasicBlock | PlainBottleneck | PlainUnit]

# The class of the units where something else than the original unit with the plain sum is asked for.
_UNITS: dict[type[nn.Module], type[PlainUnit]] = {
    BasicBlock: BasicUnit,
    Bottleneck: BottleneckUnit,
    PlainBasicBlock: PlainBasicUnit,
    PlainBottleneck: PlainBottleneckUnit,
}

_NO_LAST_NORM = {  # why the last norm of a unit cannot start at gamma = 0
    "bn_after_add": "whose branch does not end in a norm",
    "relu_before_add": "whose branch ends in a ReLU, which passes no gradient at 0 and would never learn",
    "full_preact": "whose branch does not end in a norm",
}


class StageBuilder:
    """Builds the units of one network, in order.

    Args:
        owner: the network's name in error texts.
        block: class of the units, with the constructor and ``expansion`` of :class:`BasicBlock`. For another unit than
            "original", or with a mixing rule, BasicBlock and Bottleneck stand for BasicUnit and BottleneckUnit.
        layers: number of units in each stage.
        inplanes: channels of the stem's output, which is activated.
        norm_layer: callable from a number of channels to a norm.
        unit: one of UNITS.
        shortcut: "A", "B" or "C".
        mixing: None, or a function of a :class:`MixingSite` that returns a fresh :class:`Mixing` module or None.
        groups, base_width: of the 3x3 convolutions of a bottleneck.

    Raises:
        TypeError, ValueError: an argument is none of these.
    """

    def __init__(
        self,
        owner: str,
        block: Block,
        layers: Sequence[int],
        inplanes: int,
        norm_layer: Callable[..., nn.Module],
        *,
        unit: str,
        shortcut: str,
        mixing: MixingRule | None,
        groups: int = 1,
        base_width: int = 64,
    ) -> None:
        check_unit(owner, unit)
        if shortcut not in SHORTCUTS:
            raise ValueError(f"{owner}: expected shortcut to be one of {', '.join(SHORTCUTS)}, got {shortcut!r}")
        if mixing is not None and (isinstance(mixing, (type, nn.Module)) or not callable(mixing)):
            raise TypeError(
                f"{owner}: expected mixing to be None or a function of a MixingSite that returns a Mixing module, "
                f"such as models.mixing.no_shortcut(), got {mixing!r}"
            )
        self.options: dict[str, Any] = {}
        if unit != "original" or mixing is not None:
            self.options["unit"] = unit
            if not issubclass(block, PlainUnit):
                if block not in _UNITS:
                    raise ValueError(
                        f"{owner}: expected block to be BasicBlock or Bottleneck with unit {unit!r} or a mixing, "
                        f"got {block.__name__}"
                    )
                block = _UNITS[block]
        self.block: Any = block
        self.inplanes = inplanes
        self.norm_layer = norm_layer
        self.unit = unit
        self.shortcut = shortcut
        self.mixing = mixing
        self.groups = groups
        self.base_width = base_width
        self.dilation = 1
        self.index = 0
        self.units = sum(max(count, 1) for count in layers)

    def stage(self, planes: int, count: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        """``count`` units: the first changes resolution and width, the others keep both.

        ``dilate`` puts dilation in the place of the stride, for the units behind the first one on.
        """
        dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        units = [self._unit(planes, stride, dilation)]  # as in torchvision, no stage is empty
        units += [self._unit(planes, 1, self.dilation) for _ in range(1, count)]
        return nn.Sequential(*units)

    def head_norm(self) -> PlainNormReLU | None:
        """The norm and ReLU behind the last unit, which pre-activated units need; fused as the units are."""
        if self.unit not in PREACTIVATED:
            return None
        return (NormReLU if issubclass(self.block, FusedResidual) else PlainNormReLU)(self.inplanes, self.norm_layer)

    def _unit(self, planes: int, stride: int, dilation: int) -> nn.Module:
        outplanes = planes * self.block.expansion
        options = dict(self.options)
        if self.mixing is not None:
            site = MixingSite(self.inplanes, outplanes, stride, self.index, self.units)
            options["mixing"] = self.mixing(site)
        if self.unit in PREACTIVATED:
            options["preactivate"] = self.index > 0  # the stem has activated what the first unit reads
        has_shortcut = getattr(options.get("mixing"), "has_shortcut", True)
        # Made before the unit that owns it: the random draws of torchvision come in this order.
        downsample = self._downsample(outplanes, stride) if has_shortcut else None
        made = self.block(
            self.inplanes,
            planes,
            stride,
            downsample,
            self.groups,
            self.base_width,
            dilation,
            self.norm_layer,
            **options,
        )
        if self.unit == "full_preact":
            made.emit_statistics = True  # the next module starts with a norm
        self.inplanes = outplanes
        self.index += 1
        return made

    def _downsample(self, outplanes: int, stride: int) -> nn.Module | None:
        """What the unit applies to its input before the addition; None is the identity."""
        changes = stride != 1 or self.inplanes != outplanes
        if not changes and self.shortcut != "C":
            return None
        if self.shortcut == "A":
            return PadShortcut(self.inplanes, outplanes, stride)
        projection = conv1x1(self.inplanes, outplanes, stride)
        if self.unit in ("bn_after_add", "full_preact"):
            return projection
        return nn.Sequential(projection, self.norm_layer(outplanes))


class ResidualNetwork(nn.Module):
    """What the networks share: the end of their forward, and the initialisation."""

    if TYPE_CHECKING:  # TorchScript cannot read annotations that are text
        head_norm: nn.Module | None
        avgpool: nn.Module
        fc: nn.Module

    def _head(self, x: Tensor) -> Tensor:
        """Logits from the last unit's output."""
        if self.head_norm is not None:
            x = self.head_norm(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    def _initialise(self, owner: str, unit: str, zero_init_residual: bool) -> None:
        """He-normal convolutions (fan out), unit norms; the order of the random draws is torchvision's.

        The biases of gates stay as their rule has set them.
        """
        if zero_init_residual and unit in _NO_LAST_NORM:
            raise ValueError(
                f"{owner}: expected zero_init_residual to be False with unit {unit!r}, {_NO_LAST_NORM[unit]}, got True"
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.weight is not None:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, (PlainBottleneck, PlainBottleneckUnit, PlainBasicBlock, PlainBasicUnit)):
                    mixing = getattr(module, "mixing", None)
                    if mixing is not None and not mixing.has_shortcut:
                        raise ValueError(
                            f"{owner}: expected zero_init_residual to be False without shortcuts, "
                            "where every output would be 0, got True"
                        )
                    last: Any = module.bn3 if hasattr(module, "bn3") else module.bn2
                    if isinstance(last.weight, Tensor):
                        nn.init.zeros_(last.weight)
