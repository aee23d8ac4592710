"""Residual units with any order of norm and ReLU, and any shortcut, in stock PyTorch: what the fused ones compute.

The five units of "Identity Mappings in Deep Residual Networks" (arXiv 1603.05027, fig. 4), by name:

===================  ====  =====================================================  =============================
original             (a)   conv BN ReLU conv BN **add** ReLU
bn_after_add         (b)   conv BN ReLU conv **add** BN ReLU
relu_before_add      (c)   conv BN ReLU conv BN ReLU **add**
relu_preact          (d)   ReLU conv BN ReLU conv BN **add**
full_preact          (e)   BN ReLU conv BN ReLU conv **add**
===================  ====  =====================================================  =============================

A bottleneck has one convolution more. In (d) and (e) ``downsample`` reads the pre-activated tensor, the identity the
unit's input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from resnet_fused.blocks.mixing import Mixing
from resnet_fused.blocks.plain import conv1x1, conv3x3

UNITS = ("original", "bn_after_add", "relu_before_add", "relu_preact", "full_preact")
PREACTIVATED = ("relu_preact", "full_preact")
NORM_BEFORE_CONV = ("full_preact",)


def check_unit(owner: str, unit: str) -> str:
    """``unit`` if there is one of that name; raises ValueError otherwise."""
    if unit not in UNITS:
        raise ValueError(f"{owner}: expected unit to be one of {', '.join(UNITS)}, got {unit!r}")
    return unit


class PlainUnit(nn.Module):
    """What :class:`PlainBasicUnit` and :class:`PlainBottleneckUnit` share."""

    expansion: ClassVar[int]
    if TYPE_CHECKING:  # TorchScript cannot read annotations that are text
        conv1: nn.Module
        conv2: nn.Module
        conv3: nn.Module
        bn1: nn.Module
        bn2: nn.Module
        bn3: nn.Module

    def __init__(
        self,
        unit: str,
        preactivate: bool,
        convs: Sequence[nn.Conv2d],
        norm_layer: Callable[..., nn.Module] | None,
        downsample: nn.Module | None,
        mixing: Mixing | None,
    ) -> None:
        """Modules in the order of their calls: that of the parameters."""
        super().__init__()
        name = type(self).__name__
        self.unit = check_unit(name, unit)
        if mixing is not None and not isinstance(mixing, Mixing):
            raise TypeError(f"{name}: expected mixing to be None or a Mixing module, got {type(mixing).__name__}")
        if downsample is not None and mixing is not None and not mixing.has_shortcut:
            raise ValueError(f"{name}: expected downsample to be None without a shortcut, got {downsample}")
        self.preactivate = preactivate and unit in PREACTIVATED
        before = unit in NORM_BEFORE_CONV
        norm_layer = norm_layer or nn.BatchNorm2d
        for i, conv in enumerate(convs, 1):
            wanted = i > 1 or not before or self.preactivate
            norm = norm_layer(conv.in_channels if before else conv.out_channels) if wanted else nn.Identity()
            pair = (("bn", norm), ("conv", conv)) if before else (("conv", conv), ("bn", norm))
            for kind, module in pair:
                setattr(self, f"{kind}{i}", module)
        self.relu = nn.ReLU()
        self.downsample = downsample
        self.mixing = mixing

    def _start(self, x: Tensor) -> Tensor:
        """What the first convolution reads."""
        if self.preactivate:
            x = self.relu(self.bn1(x) if self.unit == "full_preact" else x)
        return x

    def _sum(self, x: Tensor, h: Tensor, branch: Tensor) -> Tensor:
        """Branch and shortcut together; ``h`` is what the convolutions read."""
        if self.unit == "relu_before_add":
            branch = self.relu(branch)
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(h)
        if self.mixing is not None:
            return self.mixing(x, branch, shortcut)
        return branch + shortcut

    def extra_repr(self) -> str:
        activated = self.unit in PREACTIVATED and not self.preactivate
        return f"unit={self.unit!r}" + (", preactivate=False" if activated else "")


class PlainBasicUnit(PlainUnit):
    """Two 3x3 convolutions and a shortcut; see the top of this file."""

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        unit: str = "original",
        mixing: Mixing | None = None,
        preactivate: bool = True,
    ) -> None:
        if groups != 1 or base_width != 64:
            raise ValueError(f"BasicUnit: expected groups 1 and base_width 64, got {groups} and {base_width}")
        if dilation > 1:
            raise NotImplementedError(f"BasicUnit: expected dilation 1, got {dilation}")
        convs = [conv3x3(inplanes, planes, stride), conv3x3(planes, planes)]
        super().__init__(unit, preactivate, convs, norm_layer, downsample, mixing)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        h = self._start(x)
        branch = self.conv1(h)
        if self.unit == "full_preact":
            branch = self.conv2(self.relu(self.bn2(branch)))
        else:
            branch = self.conv2(self.relu(self.bn1(branch)))
        if self.unit in ("original", "relu_before_add", "relu_preact"):
            branch = self.bn2(branch)
        total = self._sum(x, h, branch)
        if self.unit == "bn_after_add":
            total = self.bn2(total)
        if self.unit in ("original", "bn_after_add"):
            total = self.relu(total)
        return total


class PlainBottleneckUnit(PlainUnit):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, stride in the 3x3 one; see the top of this file."""

    expansion: ClassVar[int] = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        unit: str = "original",
        mixing: Mixing | None = None,
        preactivate: bool = True,
    ) -> None:
        width = int(planes * (base_width / 64.0)) * groups
        convs = [
            conv1x1(inplanes, width),
            conv3x3(width, width, stride, groups, dilation),
            conv1x1(width, planes * self.expansion),
        ]
        super().__init__(unit, preactivate, convs, norm_layer, downsample, mixing)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        h = self._start(x)
        branch = self.conv1(h)
        if self.unit == "full_preact":
            branch = self.conv2(self.relu(self.bn2(branch)))
            branch = self.conv3(self.relu(self.bn3(branch)))
        else:
            branch = self.conv2(self.relu(self.bn1(branch)))
            branch = self.conv3(self.relu(self.bn2(branch)))
        if self.unit in ("original", "relu_before_add", "relu_preact"):
            branch = self.bn3(branch)
        total = self._sum(x, h, branch)
        if self.unit == "bn_after_add":
            total = self.bn3(total)
        if self.unit in ("original", "bn_after_add"):
            total = self.relu(total)
        return total


class PlainPReLUBlock(nn.Module):
    """``conv3x3, BN, PReLU, conv3x3, BN, add`` and, with ``final_activation``, the same PReLU again."""

    def __init__(
        self,
        channels: int,
        *,
        bias: bool = True,
        num_parameters: int = 1,
        final_activation: bool = True,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if num_parameters not in (1, channels):
            raise ValueError(
                f"PReLUBlock: expected num_parameters to be 1 or the {channels} channels, got {num_parameters}"
            )
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.bn1 = norm_layer(channels)
        self.prelu = nn.PReLU(num_parameters)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.bn2 = norm_layer(channels)
        self.final_activation = final_activation

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.prelu(self.bn1(self.conv1(x)))))
        total = residual + x
        return self.prelu(total) if self.final_activation else total


class PlainNormReLU(nn.Module):
    """``relu(bn(x))``."""

    def __init__(self, channels: int, norm_layer: Callable[..., nn.Module] | None = None) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        self.bn = norm_layer(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(x))
