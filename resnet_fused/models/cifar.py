"""The CIFAR residual networks of "Deep Residual Learning for Image Recognition" (arXiv 1512.03385, section 4.2).

Depth 6n + 2: a 3x3 convolution, three stages of n basic blocks with 16, 32 and 64 channels at 32x32, 16x16 and 8x8,
global average pooling and one linear layer. The shortcut of a block is one of the paper's options:

    A   parameter-free: every ``stride``-th pixel, zero channels appended (the paper's choice for CIFAR)
    B   1x1 convolution + norm where the size changes, identity elsewhere
    C   1x1 convolution + norm in every block

Parameters are counted with option A and 10 classes, multiply-adds for one 32x32 image, errors are the paper's (table 6,
CIFAR-10 test set).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_fused.blocks import BasicBlock

__all__ = [
    "CifarResNet",
    "PadShortcut",
    "cifar_resnet",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_resnet110",
    "cifar_resnet1202",
]

SHORTCUTS = ("A", "B", "C")


def _check_count(owner: str, name: str, value: int, minimum: int) -> None:
    """Raises unless ``value`` is an int of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{owner}: expected {name} to be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{owner}: expected {name} to be at least {minimum}, got {value}")


class PadShortcut(nn.Module):
    """Option A: subsample, and append zero channels; no parameters.

    Equivalent: ``F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 0, out_channels - in_channels))``.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, at least ``in_channels``; the added ones come last and are zero.
        stride: distance in pixels between the pixels that are kept; H becomes ceil(H / stride), as in a 3x3 convolution
            with padding 1.

    Raises:
        TypeError, ValueError: an argument is not an int, or out of range.

    Source: arXiv 1512.03385, section 3.3, option (A).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        _check_count("PadShortcut", "in_channels", in_channels, 1)
        _check_count("PadShortcut", "out_channels", out_channels, 1)
        _check_count("PadShortcut", "stride", stride, 1)
        if out_channels < in_channels:
            raise ValueError(
                f"PadShortcut: expected out_channels to be at least in_channels = {in_channels}, got {out_channels}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Shortcut (N, out_channels, ceil(H / stride), ceil(W / stride)) of ``x`` (N, in_channels, H, W), any dtype.

        Raises ValueError for another shape.
        """
        # While tracing, a comparison of sizes would be baked in; a symbolic tracer's stand-in is no Tensor at all.
        if not torch.jit.is_tracing() and isinstance(x, Tensor) and (x.dim() != 4 or x.size(1) != self.in_channels):
            raise ValueError(
                f"PadShortcut: expected x to have shape (N, {self.in_channels}, H, W), got {list(x.shape)}"
            )
        if self.stride != 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.out_channels != self.in_channels:
            x = F.pad(x, (0, 0, 0, 0, 0, self.out_channels - self.in_channels))
        return x

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


class CifarResNet(nn.Module):
    """A residual network for 32x32 images.

    Args:
        depth: number of layers with weights, 6n + 2 with n >= 1.
        num_classes: outputs of the final linear layer.
        shortcut: "A", "B" or "C"; see the top of this file.
        norm_layer: callable from a number of channels to a norm; None means ``nn.BatchNorm2d``.

    Convolutions start He-normal (fan out), norms at gamma = 1 and beta = 0, the linear layer at PyTorch's default.

    Raises:
        TypeError, ValueError: ``depth`` is not of the form 6n + 2, ``num_classes`` is not positive, or ``shortcut`` is
            unknown.

    Source: arXiv 1512.03385, section 4.2; initialisation arXiv 1502.01852.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        shortcut: str = "A",
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        _check_count("cifar_resnet", "depth", depth, 8)
        _check_count("cifar_resnet", "num_classes", num_classes, 1)
        if depth % 6 != 2:
            raise ValueError(f"cifar_resnet: expected depth to be 6n + 2 (20, 32, 44, 56, 110, 1202, ...), got {depth}")
        if shortcut not in SHORTCUTS:
            raise ValueError(f"cifar_resnet: expected shortcut to be one of {', '.join(SHORTCUTS)}, got {shortcut!r}")
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        self._norm_layer = norm_layer
        self.depth = depth
        self.shortcut = shortcut

        blocks = (depth - 2) // 6
        self.inplanes = 16
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=3, padding=1, bias=False)
        self.bn1 = norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(16, blocks, stride=1)
        self.layer2 = self._make_layer(32, blocks, stride=2)
        self.layer3 = self._make_layer(64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64 * BasicBlock.expansion, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.weight is not None:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)

    def _make_layer(self, planes: int, blocks: int, stride: int) -> nn.Sequential:
        """One stage: the first block changes resolution and width, the others keep both."""
        layers = []
        for step in [stride] + [1] * (blocks - 1):
            shortcut = self._make_shortcut(self.inplanes, planes, step)
            layers.append(BasicBlock(self.inplanes, planes, step, shortcut, norm_layer=self._norm_layer))
            self.inplanes = planes
        return nn.Sequential(*layers)

    def _make_shortcut(self, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
        """What a block applies to its input before the addition; None is the identity."""
        changes = stride != 1 or in_channels != out_channels
        if self.shortcut == "C" or (self.shortcut == "B" and changes):
            return nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                self._norm_layer(out_channels),
            )
        return PadShortcut(in_channels, out_channels, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images ``x`` (N, 3, H, W), in the dtype of the parameters or of autocast."""
        x = self.relu(self.bn1(self.conv1(x)))

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)

        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)


def cifar_resnet(
    depth: int,
    *,
    num_classes: int = 10,
    shortcut: str = "A",
    norm_layer: Callable[..., nn.Module] | None = None,
) -> CifarResNet:
    """CIFAR ResNet of any depth 6n + 2; arguments, errors and source as :class:`CifarResNet`."""
    return CifarResNet(depth, num_classes=num_classes, shortcut=shortcut, norm_layer=norm_layer)


def cifar_resnet20(
    num_classes: int = 10, shortcut: str = "A", *, norm_layer: Callable[..., nn.Module] | None = None
) -> CifarResNet:
    """CIFAR ResNet-20: 269,722 parameters, 0.041 GMAC at 32x32; test error in the paper 8.75%."""
    return CifarResNet(20, num_classes=num_classes, shortcut=shortcut, norm_layer=norm_layer)


def cifar_resnet32(
    num_classes: int = 10, shortcut: str = "A", *, norm_layer: Callable[..., nn.Module] | None = None
) -> CifarResNet:
    """CIFAR ResNet-32: 464,154 parameters, 0.069 GMAC at 32x32; test error in the paper 7.51%."""
    return CifarResNet(32, num_classes=num_classes, shortcut=shortcut, norm_layer=norm_layer)


def cifar_resnet44(
    num_classes: int = 10, shortcut: str = "A", *, norm_layer: Callable[..., nn.Module] | None = None
) -> CifarResNet:
    """CIFAR ResNet-44: 658,586 parameters, 0.097 GMAC at 32x32; test error in the paper 7.17%."""
    return CifarResNet(44, num_classes=num_classes, shortcut=shortcut, norm_layer=norm_layer)


def cifar_resnet56(
    num_classes: int = 10, shortcut: str = "A", *, norm_layer: Callable[..., nn.Module] | None = None
) -> CifarResNet:
    """CIFAR ResNet-56: 853,018 parameters, 0.125 GMAC at 32x32; test error in the paper 6.97%."""
    return CifarResNet(56, num_classes=num_classes, shortcut=shortcut, norm_layer=norm_layer)


def cifar_resnet110(
    num_classes: int = 10, shortcut: str = "A", *, norm_layer: Callable[..., nn.Module] | None = None
) -> CifarResNet:
    """CIFAR ResNet-110: 1,727,962 parameters, 0.253 GMAC at 32x32; test error in the paper 6.43%, after a warm-up."""
    return CifarResNet(110, num_classes=num_classes, shortcut=shortcut, norm_layer=norm_layer)


def cifar_resnet1202(
    num_classes: int = 10, shortcut: str = "A", *, norm_layer: Callable[..., nn.Module] | None = None
) -> CifarResNet:
    """CIFAR ResNet-1202: 19,421,274 parameters, 2.829 GMAC at 32x32; test error in the paper 7.93%."""
    return CifarResNet(1202, num_classes=num_classes, shortcut=shortcut, norm_layer=norm_layer)
