"""ImageNet ResNet, ResNeXt and Wide ResNet: torchvision's networks, built from this package's fused blocks.

Constructors, attributes, module order, state_dict keys and the order of the random draws are torchvision's, so
checkpoints load in both directions and one seed gives the same bits. torchvision itself is imported only when a factory
is asked for its weights.

Every factory takes torchvision's arguments, by name:
    weights: None (random), a member of the factory's enum in ``torchvision.models``, or its name: "DEFAULT",
        "IMAGENET1K_V1", "ResNet50_Weights.IMAGENET1K_V1". Needs torchvision; downloads the file unless it is cached.
    progress: show the progress of the download.
    **kwargs: arguments of :class:`ResNet`.
and raises ImportError where weights need a torchvision that is not there, TypeError and ValueError for weights that are
not the network's own, and ValueError for an argument that contradicts the weights or the factory's name.
Multiply-adds (GMAC) are for one 224x224 image and include the final linear layer.

Sources: "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), with the stride of a downsampling bottleneck
in its 3x3 convolution ("v1.5"); "Aggregated Residual Transformations" (arXiv 1611.05431); "Wide Residual Networks"
(arXiv 1605.07146).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused.blocks import BasicBlock, Bottleneck
from resnet_fused.blocks.plain import PlainBasicBlock, PlainBottleneck, conv1x1
from resnet_fused.blocks.stem import FusedStem

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

__all__ = [
    "ResNet",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]


class PlainResNet(nn.Module):
    """The network in stock PyTorch, module by module; arguments, errors and source as :class:`ResNet`."""

    def __init__(
        self,
        block: type[PlainBasicBlock | PlainBottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        self._norm_layer = norm_layer

        self.inplanes = 64
        self.dilation = 1
        if replace_stride_with_dilation is None:
            replace_stride_with_dilation = [False, False, False]
        if len(replace_stride_with_dilation) != 3:
            raise ValueError(
                "ResNet: expected replace_stride_with_dilation to be None or to have 3 entries, "
                f"got {replace_stride_with_dilation}"
            )
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=replace_stride_with_dilation[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=replace_stride_with_dilation[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=replace_stride_with_dilation[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)

        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        """He-normal convolutions (fan out), unit norms; the order of the random draws is torchvision's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) and module.weight is not None:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, (PlainBottleneck, PlainBasicBlock)):
                    last = module.bn3 if isinstance(module, PlainBottleneck) else module.bn2
                    if isinstance(last.weight, Tensor):
                        nn.init.zeros_(last.weight)

    def _make_layer(
        self,
        block: type[PlainBasicBlock | PlainBottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        """One stage: the first block changes resolution and width, the others keep both."""
        norm_layer = self._norm_layer
        out_channels = planes * block.expansion
        previous_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        # Made before the block that owns it: the random draws of torchvision come in this order.
        downsample = None
        if stride != 1 or self.inplanes != out_channels:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, out_channels, stride),
                norm_layer(out_channels),
            )

        layers = [
            block(
                self.inplanes, planes, stride, downsample, self.groups, self.base_width, previous_dilation, norm_layer
            )
        ]
        self.inplanes = out_channels
        for _ in range(1, blocks):
            layers.append(
                block(
                    self.inplanes,
                    planes,
                    groups=self.groups,
                    base_width=self.base_width,
                    dilation=self.dilation,
                    norm_layer=norm_layer,
                )
            )
        return nn.Sequential(*layers)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)

        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images ``x`` (N, 3, H, W), in the dtype of the parameters or of autocast."""
        return self._forward_impl(x)


class ResNet(FusedStem, PlainResNet):
    """A residual network for images of ImageNet size, with fused stem and, from ``block``, fused blocks.

    Equivalent: ``torchvision.models.ResNet`` with the same arguments.

    Args:
        block: class of the residual blocks, with the constructor and ``expansion`` of :class:`BasicBlock`.
        layers: number of blocks in each of the four stages.
        num_classes: outputs of the final linear layer.
        zero_init_residual: start the last norm of every block at gamma = 0, so that each block is first an identity
            (arXiv 1706.02677).
        groups: groups of the 3x3 convolutions of a bottleneck.
        width_per_group: channels per group at 64 planes; the inner width is ``planes * width_per_group / 64 * groups``.
        replace_stride_with_dilation: for stages 2, 3 and 4, whether dilation takes the place of the stride.
        norm_layer: callable from a number of channels to a norm; None means ``nn.BatchNorm2d``.

    Raises:
        ValueError: ``replace_stride_with_dilation`` does not have 3 entries.

    Source: arXiv 1512.03385, table 1; bottlenecks have their stride in the 3x3 convolution ("v1.5").
    """


def _resolve_weights(factory: str, enum_name: str, weights: WeightsEnum | str | None) -> WeightsEnum | None:
    """The member of ``torchvision.models.<enum_name>`` that ``weights`` is or names; None stays None."""
    if weights is None:
        return None
    try:
        import torchvision.models
    except ImportError as error:
        raise ImportError(
            f"{factory}: expected torchvision to be installed for weights={weights!r}, got {error}; "
            "`pip install torchvision`, or pass weights=None and load a state_dict"
        ) from error
    enum = getattr(torchvision.models, enum_name)
    if isinstance(weights, enum):
        return weights
    names = ", ".join(enum.__members__)
    expected = f"{factory}: expected weights to be None, a member of {enum_name} ({names}) or the name of one"
    if not isinstance(weights, str):
        raise TypeError(f"{expected}, got {weights!r} ({type(weights).__name__})")
    name = weights.removeprefix(f"{enum_name}.")
    if name not in enum.__members__:
        raise ValueError(f"{expected}, got {weights!r}")
    return enum[name]


class _Network(NamedTuple):
    block: type[PlainBasicBlock | PlainBottleneck]
    layers: tuple[int, int, int, int]
    weights: str  # the enum in torchvision.models
    fixed: dict[str, int]  # constructor arguments that the name stands for


_NETWORKS = {
    "resnet18": _Network(BasicBlock, (2, 2, 2, 2), "ResNet18_Weights", {}),
    "resnet34": _Network(BasicBlock, (3, 4, 6, 3), "ResNet34_Weights", {}),
    "resnet50": _Network(Bottleneck, (3, 4, 6, 3), "ResNet50_Weights", {}),
    "resnet101": _Network(Bottleneck, (3, 4, 23, 3), "ResNet101_Weights", {}),
    "resnet152": _Network(Bottleneck, (3, 8, 36, 3), "ResNet152_Weights", {}),
    "resnext50_32x4d": _Network(
        Bottleneck, (3, 4, 6, 3), "ResNeXt50_32X4D_Weights", {"groups": 32, "width_per_group": 4}
    ),
    "resnext101_32x8d": _Network(
        Bottleneck, (3, 4, 23, 3), "ResNeXt101_32X8D_Weights", {"groups": 32, "width_per_group": 8}
    ),
    "resnext101_64x4d": _Network(
        Bottleneck, (3, 4, 23, 3), "ResNeXt101_64X4D_Weights", {"groups": 64, "width_per_group": 4}
    ),
    "wide_resnet50_2": _Network(Bottleneck, (3, 4, 6, 3), "Wide_ResNet50_2_Weights", {"width_per_group": 128}),
    "wide_resnet101_2": _Network(Bottleneck, (3, 4, 23, 3), "Wide_ResNet101_2_Weights", {"width_per_group": 128}),
}


def _build(factory: str, weights: WeightsEnum | str | None, progress: bool, kwargs: dict[str, Any]) -> ResNet:
    """The network that ``factory`` names, with its weights; ``kwargs`` are arguments of :class:`ResNet`."""
    block, layers, enum_name, fixed = _NETWORKS[factory]
    if "pretrained" in kwargs:
        raise TypeError(f"{factory}: expected weights= (None or 'DEFAULT'), got pretrained={kwargs['pretrained']!r}")
    member = _resolve_weights(factory, enum_name, weights)
    for name, value in fixed.items():
        if kwargs.setdefault(name, value) != value:
            raise ValueError(f"{factory}: expected {name} to be {value}, got {kwargs[name]}")
    if member is not None:
        num_classes = len(member.meta["categories"])
        if kwargs.setdefault("num_classes", num_classes) != num_classes:
            raise ValueError(
                f"{factory}: expected num_classes to be {num_classes} with weights={member!r}, "
                f"got {kwargs['num_classes']}; for another number replace model.fc afterwards"
            )
    model = ResNet(block, layers, **kwargs)
    if member is not None:
        model.load_state_dict(member.get_state_dict(progress=progress, check_hash=True))
    return model


def resnet18(*, weights: WeightsEnum | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18: 11,689,512 parameters, 1.814 GMAC at 224x224.

    Equivalent: ``torchvision.models.resnet18``; weights of ``torchvision.models.ResNet18_Weights``.
    Arguments and errors: see the top of this file. Source: arXiv 1512.03385, table 1.
    """
    return _build("resnet18", weights, progress, kwargs)


def resnet34(*, weights: WeightsEnum | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34: 21,797,672 parameters, 3.664 GMAC at 224x224.

    Equivalent: ``torchvision.models.resnet34``; weights of ``torchvision.models.ResNet34_Weights``.
    Arguments and errors: see the top of this file. Source: arXiv 1512.03385, table 1.
    """
    return _build("resnet34", weights, progress, kwargs)


def resnet50(*, weights: WeightsEnum | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 v1.5: 25,557,032 parameters, 4.089 GMAC at 224x224.

    Equivalent: ``torchvision.models.resnet50``; weights of ``torchvision.models.ResNet50_Weights``.
    Arguments and errors: see the top of this file. Source: arXiv 1512.03385, table 1.
    """
    return _build("resnet50", weights, progress, kwargs)


def resnet101(*, weights: WeightsEnum | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 v1.5: 44,549,160 parameters, 7.801 GMAC at 224x224.

    Equivalent: ``torchvision.models.resnet101``; weights of ``torchvision.models.ResNet101_Weights``.
    Arguments and errors: see the top of this file. Source: arXiv 1512.03385, table 1.
    """
    return _build("resnet101", weights, progress, kwargs)


def resnet152(*, weights: WeightsEnum | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152 v1.5: 60,192,808 parameters, 11.514 GMAC at 224x224.

    Equivalent: ``torchvision.models.resnet152``; weights of ``torchvision.models.ResNet152_Weights``.
    Arguments and errors: see the top of this file. Source: arXiv 1512.03385, table 1.
    """
    return _build("resnet152", weights, progress, kwargs)


def resnext50_32x4d(*, weights: WeightsEnum | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50, 32 groups of 4 channels: 25,028,904 parameters, 4.230 GMAC at 224x224.

    Equivalent: ``torchvision.models.resnext50_32x4d``; weights of ``torchvision.models.ResNeXt50_32X4D_Weights``.
    Arguments and errors: see the top of this file. Source: arXiv 1611.05431.
    """
    return _build("resnext50_32x4d", weights, progress, kwargs)


def resnext101_32x8d(*, weights: WeightsEnum | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 32 groups of 8 channels: 88,791,336 parameters, 16.414 GMAC at 224x224.

    Equivalent: ``torchvision.models.resnext101_32x8d``; weights of ``torchvision.models.ResNeXt101_32X8D_Weights``.
    Arguments and errors: see the top of this file. Source: arXiv 1611.05431.
    """
    return _build("resnext101_32x8d", weights, progress, kwargs)


def resnext101_64x4d(*, weights: WeightsEnum | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 64 groups of 4 channels: 83,455,272 parameters, 15.460 GMAC at 224x224.

    Equivalent: ``torchvision.models.resnext101_64x4d``; weights of ``torchvision.models.ResNeXt101_64X4D_Weights``.
    Arguments and errors: see the top of this file. Source: arXiv 1611.05431.
    """
    return _build("resnext101_64x4d", weights, progress, kwargs)


def wide_resnet50_2(*, weights: WeightsEnum | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-50-2: 3x3 convolutions of twice the width: 68,883,240 parameters, 11.398 GMAC at 224x224.

    Equivalent: ``torchvision.models.wide_resnet50_2``; weights of ``torchvision.models.Wide_ResNet50_2_Weights``.
    Arguments and errors: see the top of this file. Source: arXiv 1605.07146.
    """
    return _build("wide_resnet50_2", weights, progress, kwargs)


def wide_resnet101_2(*, weights: WeightsEnum | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """Wide ResNet-101-2: 3x3 convolutions of twice the width: 126,886,696 parameters, 22.753 GMAC at 224x224.

    Equivalent: ``torchvision.models.wide_resnet101_2``; weights of ``torchvision.models.Wide_ResNet101_2_Weights``.
    Arguments and errors: see the top of this file. Source: arXiv 1605.07146.
    """
    return _build("wide_resnet101_2", weights, progress, kwargs)
