"""The CIFAR residual networks of arXiv 1512.03385, section 4.2, and arXiv 1603.05027.

A 3x3 convolution, three stages of n units with 16, 32 and 64 channels at 32x32, 16x16 and 8x8, global average pooling
and one linear layer. Depth is 6n + 2 with basic units, 9n + 2 with bottlenecks, whose outputs have 64, 128 and 256
channels. Shortcut options, units and mixing rules: :mod:`resnet_fused.models.stages`.

Every factory of one depth takes, by name or the first two by position:
    num_classes: outputs of the final linear layer, 10.
    shortcut: "A", "B" or "C"; basic units have "A", bottlenecks "B".
    **kwargs: arguments of :class:`CifarResNet`; ValueError for one that contradicts the factory's name.
Parameters are counted with 10 classes, multiply-adds (GMAC) for one 32x32 image, errors are the papers' on the CIFAR-10
test set (1512.03385, table 6; 1603.05027, tables 2 and 4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from resnet_fused.blocks import BasicBlock, Bottleneck
from resnet_fused.blocks.shortcuts import PadShortcut, check_count
from resnet_fused.models import factories
from resnet_fused.models.mixing import MixingRule, no_shortcut
from resnet_fused.models.stages import ResidualNetwork, StageBuilder

__all__ = [
    "CifarResNet",
    "PadShortcut",
    "cifar_plain20",
    "cifar_plain32",
    "cifar_plain44",
    "cifar_plain56",
    "cifar_preact_resnet",
    "cifar_preact_resnet20",
    "cifar_preact_resnet56",
    "cifar_preact_resnet110",
    "cifar_preact_resnet164",
    "cifar_preact_resnet1001",
    "cifar_resnet",
    "cifar_resnet20",
    "cifar_resnet32",
    "cifar_resnet44",
    "cifar_resnet56",
    "cifar_resnet110",
    "cifar_resnet164",
    "cifar_resnet1202",
    "preact_resnet110",
    "preact_resnet164",
    "preact_resnet1001",
    "resnet1001",
]


class CifarResNet(ResidualNetwork):
    """A residual network for 32x32 images.

    Args:
        depth: number of layers with weights, 6n + 2 with n >= 1, of bottlenecks 9n + 2.
        num_classes: outputs of the final linear layer.
        shortcut: "A", "B" or "C"; None means "A" for basic units and "B" for bottlenecks, as in the papers.
        norm_layer: callable from a number of channels to a norm; None means ``nn.BatchNorm2d``.
        unit: order of norm and ReLU in the units, one of ``resnet_fused.blocks.plain_units.UNITS``. Networks of
            relu_preact and full_preact end in a norm and a ReLU, ``head_norm``.
        mixing: rule for the sum of branch and shortcut, from :mod:`resnet_fused.models.mixing` or one's own.
        bottleneck: units of 1x1, 3x3 and 1x1 convolutions, stride in the 3x3 one.
        zero_init_residual: start the last norm of every unit at gamma = 0.

    Convolutions start He-normal (fan out), norms at gamma = 1 and beta = 0, the linear layer at PyTorch's default.

    Raises:
        TypeError, ValueError: ``depth`` is not of that form, ``num_classes`` is not positive, ``shortcut`` or ``unit``
            is unknown, ``mixing`` is not a rule, or ``zero_init_residual`` with a unit whose branch does not end in a
            norm or without shortcuts.

    Source: arXiv 1512.03385, section 4.2; arXiv 1603.05027; initialisation arXiv 1502.01852.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        shortcut: str | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        unit: str = "original",
        mixing: MixingRule | None = None,
        bottleneck: bool = False,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        layers = 9 if bottleneck else 6
        check_count("cifar_resnet", "depth", depth, layers + 2)
        check_count("cifar_resnet", "num_classes", num_classes, 1)
        if depth % layers != 2:
            form = "9n + 2 with bottlenecks (164, 1001" if bottleneck else "6n + 2 (20, 32, 44, 56, 110, 1202"
            raise ValueError(f"cifar_resnet: expected depth to be {form}, ...), got {depth}")
        if shortcut is None:
            shortcut = "B" if bottleneck else "A"
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        self._norm_layer = norm_layer
        self.depth = depth
        self.shortcut = shortcut

        units = (depth - 2) // layers
        build = StageBuilder(
            "cifar_resnet",
            Bottleneck if bottleneck else BasicBlock,
            [units] * 3,
            16,
            norm_layer,
            unit=unit,
            shortcut=shortcut,
            mixing=mixing,
        )
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = norm_layer(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = build.stage(16, units)
        self.layer2 = build.stage(32, units, stride=2)
        self.layer3 = build.stage(64, units, stride=2)
        self.head_norm = build.head_norm()
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.inplanes = build.inplanes
        self.fc = nn.Linear(self.inplanes, num_classes)
        self._initialise("cifar_resnet", unit, zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images ``x`` (N, 3, H, W), in the dtype of the parameters or of autocast."""
        x = self.relu(self.bn1(self.conv1(x)))

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        return self._head(x)


def cifar_resnet(
    depth: int,
    *,
    num_classes: int = 10,
    shortcut: str | None = None,
    norm_layer: Callable[..., nn.Module] | None = None,
    unit: str = "original",
    mixing: MixingRule | None = None,
    bottleneck: bool = False,
    zero_init_residual: bool = False,
) -> CifarResNet:
    """CIFAR ResNet of any depth 6n + 2 or 9n + 2; arguments, errors and source as :class:`CifarResNet`."""
    return CifarResNet(
        depth,
        num_classes=num_classes,
        shortcut=shortcut,
        norm_layer=norm_layer,
        unit=unit,
        mixing=mixing,
        bottleneck=bottleneck,
        zero_init_residual=zero_init_residual,
    )


def cifar_preact_resnet(
    depth: int,
    *,
    num_classes: int = 10,
    shortcut: str | None = None,
    norm_layer: Callable[..., nn.Module] | None = None,
    mixing: MixingRule | None = None,
    bottleneck: bool = False,
) -> CifarResNet:
    """CIFAR ResNet of full pre-activation units, of any depth; arguments, errors and source as :class:`CifarResNet`."""
    return CifarResNet(
        depth,
        num_classes=num_classes,
        shortcut=shortcut,
        norm_layer=norm_layer,
        unit="full_preact",
        mixing=mixing,
        bottleneck=bottleneck,
    )


class Factory(Protocol):
    """The functions below."""

    __name__: str

    def __call__(self, num_classes: int = 10, shortcut: str = ..., **kwargs: Any) -> CifarResNet: ...


def _factory(name: str, depth: int, text: str, **fixed: Any) -> Factory:
    """The function ``name``; ``fixed`` are arguments of :class:`CifarResNet` that the name stands for."""
    default = "B" if fixed.get("bottleneck") else "A"

    def build(num_classes: int = 10, shortcut: str = default, **kwargs: Any) -> CifarResNet:
        factories.fix(name, kwargs, fixed)
        return CifarResNet(depth, num_classes=num_classes, shortcut=shortcut, **kwargs)

    doc = f"{text}.\n\n    Arguments and errors: see the top of this file, and :class:`CifarResNet`.\n    "
    return factories.named(build, name, __name__, doc)


cifar_resnet20 = _factory("cifar_resnet20", 20, "CIFAR ResNet-20: 269,722 parameters, 0.041 GMAC, error 8.75%")
cifar_resnet32 = _factory("cifar_resnet32", 32, "CIFAR ResNet-32: 464,154 parameters, 0.069 GMAC, error 7.51%")
cifar_resnet44 = _factory("cifar_resnet44", 44, "CIFAR ResNet-44: 658,586 parameters, 0.097 GMAC, error 7.17%")
cifar_resnet56 = _factory("cifar_resnet56", 56, "CIFAR ResNet-56: 853,018 parameters, 0.125 GMAC, error 6.97%")
cifar_resnet110 = _factory(
    "cifar_resnet110", 110, "CIFAR ResNet-110: 1,727,962 parameters, 0.253 GMAC, error 6.43%, after a warm-up"
)
cifar_resnet1202 = _factory(
    "cifar_resnet1202", 1202, "CIFAR ResNet-1202: 19,421,274 parameters, 2.829 GMAC, error 7.93%"
)
cifar_resnet164 = _factory(
    "cifar_resnet164",
    164,
    "CIFAR ResNet-164, bottlenecks: 1,704,154 parameters, 0.248 GMAC, error 5.93%",
    bottleneck=True,
)

_PREACT: dict[str, Any] = {"unit": "full_preact"}

cifar_preact_resnet20 = _factory(
    "cifar_preact_resnet20", 20, "CIFAR pre-activation ResNet-20: 269,722 parameters, 0.041 GMAC", **_PREACT
)
cifar_preact_resnet56 = _factory(
    "cifar_preact_resnet56", 56, "CIFAR pre-activation ResNet-56: 853,018 parameters, 0.125 GMAC", **_PREACT
)
cifar_preact_resnet110 = preact_resnet110 = _factory(
    "cifar_preact_resnet110",
    110,
    "CIFAR pre-activation ResNet-110: 1,727,962 parameters, 0.253 GMAC, error 6.37%",
    **_PREACT,
)
cifar_preact_resnet164 = preact_resnet164 = _factory(
    "cifar_preact_resnet164",
    164,
    "CIFAR pre-activation ResNet-164, bottlenecks: 1,703,258 parameters, 0.248 GMAC, error 5.46%",
    bottleneck=True,
    **_PREACT,
)
cifar_preact_resnet1001 = preact_resnet1001 = resnet1001 = _factory(
    "cifar_preact_resnet1001",
    1001,
    "CIFAR pre-activation ResNet-1001, bottlenecks: 10,327,706 parameters, 1.491 GMAC, error 4.92%",
    bottleneck=True,
    **_PREACT,
)

_PLAIN: dict[str, Any] = {"mixing": no_shortcut()}

cifar_plain20 = _factory(
    "cifar_plain20", 20, "CIFAR plain network of 20 layers, no shortcuts: 269,722 parameters, 0.041 GMAC", **_PLAIN
)
cifar_plain32 = _factory(
    "cifar_plain32", 32, "CIFAR plain network of 32 layers, no shortcuts: 464,154 parameters, 0.069 GMAC", **_PLAIN
)
cifar_plain44 = _factory(
    "cifar_plain44", 44, "CIFAR plain network of 44 layers, no shortcuts: 658,586 parameters, 0.097 GMAC", **_PLAIN
)
cifar_plain56 = _factory(
    "cifar_plain56", 56, "CIFAR plain network of 56 layers, no shortcuts: 853,018 parameters, 0.125 GMAC", **_PLAIN
)
