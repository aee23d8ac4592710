"""ImageNet ResNet, ResNeXt and Wide ResNet: torchvision's networks, built from this package's fused blocks; and the
same with any unit of arXiv 1603.05027, shortcut option and mixing rule.

With default arguments constructors, attributes, module order, state_dict keys and the order of the random draws are
torchvision's, so checkpoints load in both directions and one seed gives the same bits. torchvision itself is imported
only when a factory is asked for its weights.

Every factory takes torchvision's arguments, by name:
    weights: None (random), a member of the factory's enum in ``torchvision.models``, or its name: "DEFAULT",
        "IMAGENET1K_V1", "ResNet50_Weights.IMAGENET1K_V1". Needs torchvision; downloads the file unless it is cached.
        Networks that torchvision does not have take None only.
    progress: show the progress of the download.
    **kwargs: arguments of :class:`ResNet`.
and raises ImportError where weights need a torchvision that is not there, TypeError and ValueError for weights that are
not the network's own, and ValueError for an argument that contradicts the weights or the factory's name.
Multiply-adds (GMAC) are for one 224x224 image and include the final linear layer.

Sources: "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), with the stride of a downsampling bottleneck
in its 3x3 convolution ("v1.5"); "Identity Mappings in Deep Residual Networks" (arXiv 1603.05027); "Aggregated Residual
Transformations" (arXiv 1611.05431); "Wide Residual Networks" (arXiv 1605.07146).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from resnet_fused.blocks import BasicBlock, Bottleneck
from resnet_fused.blocks.stem import FusedStem
from resnet_fused.models import factories
from resnet_fused.models.mixing import MixingRule, no_shortcut
from resnet_fused.models.stages import Block, ResidualNetwork, StageBuilder
from resnet_fused.models.weights import resolve_weights

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

__all__ = [
    "ResNet",
    "plain18",
    "plain34",
    "preact_resnet18",
    "preact_resnet34",
    "preact_resnet50",
    "preact_resnet101",
    "preact_resnet152",
    "preact_resnet200",
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


class PlainResNet(ResidualNetwork):
    """The network in stock PyTorch, module by module; arguments, errors and source as :class:`ResNet`."""

    def __init__(
        self,
        block: Block,
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
        *,
        unit: str = "original",
        shortcut: str = "B",
        mixing: MixingRule | None = None,
    ) -> None:
        super().__init__()
        if norm_layer is None:
            norm_layer = nn.BatchNorm2d
        self._norm_layer = norm_layer
        if replace_stride_with_dilation is None:
            replace_stride_with_dilation = [False, False, False]
        if len(replace_stride_with_dilation) != 3:
            raise ValueError(
                "ResNet: expected replace_stride_with_dilation to be None or to have 3 entries, "
                f"got {replace_stride_with_dilation}"
            )
        self.groups = groups
        self.base_width = width_per_group
        build = StageBuilder(
            "ResNet",
            block,
            layers,
            64,
            norm_layer,
            unit=unit,
            shortcut=shortcut,
            mixing=mixing,
            groups=groups,
            base_width=width_per_group,
        )
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = build.stage(64, layers[0])
        self.layer2 = build.stage(128, layers[1], stride=2, dilate=replace_stride_with_dilation[0])
        self.layer3 = build.stage(256, layers[2], stride=2, dilate=replace_stride_with_dilation[1])
        self.layer4 = build.stage(512, layers[3], stride=2, dilate=replace_stride_with_dilation[2])
        self.head_norm = build.head_norm()
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.inplanes, self.dilation = build.inplanes, build.dilation
        self.fc = nn.Linear(self.inplanes, num_classes)
        self._initialise("ResNet", unit, zero_init_residual)

    def _stages(self, x: Tensor) -> Tensor:
        """Logits from the stem's output."""
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        return self._head(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        return self._stages(self.maxpool(self.relu(self.bn1(self.conv1(x)))))

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
        unit: order of norm and ReLU in the units, one of ``resnet_fused.blocks.plain_units.UNITS``. Networks of
            relu_preact and full_preact end in a norm and a ReLU, ``head_norm``.
        shortcut: option "A", "B" or "C"; see :mod:`resnet_fused.models.stages`.
        mixing: rule for the sum of branch and shortcut, from :mod:`resnet_fused.models.mixing` or one's own.

    Another unit, or a mixing rule, makes BasicUnit of a ``block`` BasicBlock and BottleneckUnit of Bottleneck.

    Raises:
        ValueError: ``replace_stride_with_dilation`` does not have 3 entries; ``unit`` or ``shortcut`` is unknown;
            ``block`` is neither BasicBlock nor Bottleneck where units are asked for; ``zero_init_residual`` with a unit
            whose branch does not end in a norm, or without shortcuts.
        TypeError: ``mixing`` is not a rule.

    Source: arXiv 1512.03385, table 1; bottlenecks have their stride in the 3x3 convolution ("v1.5"). Units:
    arXiv 1603.05027, figure 4.
    """

    def _forward_impl(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        else:
            x = self._fused_stem(x)
        return self._stages(x)


class Factory(Protocol):
    """The functions below."""

    __name__: str

    def __call__(self, *, weights: WeightsEnum | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet: ...


def _factory(
    name: str,
    block: Block,
    layers: tuple[int, int, int, int],
    text: str,
    *,
    weights: str = "",
    source: str = "arXiv 1512.03385, table 1",
    **fixed: Any,
) -> Factory:
    """The function ``name``.

    Args:
        block, layers, **fixed: arguments of :class:`ResNet` that the name stands for.
        text: what the network is.
        weights: the enum in ``torchvision.models``.
        source: of the network.
    """

    enum = weights

    def build(*, weights: WeightsEnum | str | None = None, progress: bool = True, **kwargs: Any) -> ResNet:
        if "pretrained" in kwargs:
            raise TypeError(f"{name}: expected weights= (None or 'DEFAULT'), got pretrained={kwargs['pretrained']!r}")
        if not enum and weights is not None:
            raise ValueError(f"{name}: expected weights to be None, torchvision has no such network, got {weights!r}")
        member = resolve_weights(name, enum, weights)
        factories.fix(name, kwargs, fixed)
        if member is not None:
            num_classes = len(member.meta["categories"])
            if kwargs.setdefault("num_classes", num_classes) != num_classes:
                raise ValueError(
                    f"{name}: expected num_classes to be {num_classes} with weights={member!r}, "
                    f"got {kwargs['num_classes']}; for another number replace model.fc afterwards"
                )
            factories.fix(f"{name} with weights", kwargs, {"unit": "original", "shortcut": "B", "mixing": None})
        model = ResNet(block, layers, **kwargs)
        if member is not None:
            model.load_state_dict(member.get_state_dict(progress=progress, check_hash=True))
        return model

    origin = (
        f"Equivalent: ``torchvision.models.{name}``; weights of ``torchvision.models.{enum}``.\n    " if enum else ""
    )
    doc = f"{text} at 224x224.\n\n    {origin}Arguments and errors: see the top of this file. Source: {source}.\n    "
    return factories.named(build, name, __name__, doc)


_18, _34, _101, _152, _200 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3), (3, 24, 36, 3)

resnet18 = _factory(
    "resnet18", BasicBlock, _18, "ResNet-18: 11,689,512 parameters, 1.814 GMAC", weights="ResNet18_Weights"
)
resnet34 = _factory(
    "resnet34", BasicBlock, _34, "ResNet-34: 21,797,672 parameters, 3.664 GMAC", weights="ResNet34_Weights"
)
resnet50 = _factory(
    "resnet50", Bottleneck, _34, "ResNet-50 v1.5: 25,557,032 parameters, 4.089 GMAC", weights="ResNet50_Weights"
)
resnet101 = _factory(
    "resnet101", Bottleneck, _101, "ResNet-101 v1.5: 44,549,160 parameters, 7.801 GMAC", weights="ResNet101_Weights"
)
resnet152 = _factory(
    "resnet152", Bottleneck, _152, "ResNet-152 v1.5: 60,192,808 parameters, 11.514 GMAC", weights="ResNet152_Weights"
)

resnext50_32x4d = _factory(
    "resnext50_32x4d",
    Bottleneck,
    _34,
    "ResNeXt-50, 32 groups of 4 channels: 25,028,904 parameters, 4.230 GMAC",
    weights="ResNeXt50_32X4D_Weights",
    source="arXiv 1611.05431",
    groups=32,
    width_per_group=4,
)
resnext101_32x8d = _factory(
    "resnext101_32x8d",
    Bottleneck,
    _101,
    "ResNeXt-101, 32 groups of 8 channels: 88,791,336 parameters, 16.414 GMAC",
    weights="ResNeXt101_32X8D_Weights",
    source="arXiv 1611.05431",
    groups=32,
    width_per_group=8,
)
resnext101_64x4d = _factory(
    "resnext101_64x4d",
    Bottleneck,
    _101,
    "ResNeXt-101, 64 groups of 4 channels: 83,455,272 parameters, 15.460 GMAC",
    weights="ResNeXt101_64X4D_Weights",
    source="arXiv 1611.05431",
    groups=64,
    width_per_group=4,
)
wide_resnet50_2 = _factory(
    "wide_resnet50_2",
    Bottleneck,
    _34,
    "Wide ResNet-50-2, 3x3 convolutions of twice the width: 68,883,240 parameters, 11.398 GMAC",
    weights="Wide_ResNet50_2_Weights",
    source="arXiv 1605.07146",
    width_per_group=128,
)
wide_resnet101_2 = _factory(
    "wide_resnet101_2",
    Bottleneck,
    _101,
    "Wide ResNet-101-2, 3x3 convolutions of twice the width: 126,886,696 parameters, 22.753 GMAC",
    weights="Wide_ResNet101_2_Weights",
    source="arXiv 1605.07146",
    width_per_group=128,
)

_PREACT: dict[str, Any] = {"source": "arXiv 1603.05027, figure 4(e)", "unit": "full_preact"}

preact_resnet18 = _factory(
    "preact_resnet18", BasicBlock, _18, "Pre-activation ResNet-18: 11,687,720 parameters, 1.814 GMAC", **_PREACT
)
preact_resnet34 = _factory(
    "preact_resnet34", BasicBlock, _34, "Pre-activation ResNet-34: 21,795,880 parameters, 3.664 GMAC", **_PREACT
)
preact_resnet50 = _factory(
    "preact_resnet50", Bottleneck, _34, "Pre-activation ResNet-50: 25,549,352 parameters, 4.089 GMAC", **_PREACT
)
preact_resnet101 = _factory(
    "preact_resnet101", Bottleneck, _101, "Pre-activation ResNet-101: 44,541,480 parameters, 7.801 GMAC", **_PREACT
)
preact_resnet152 = _factory(
    "preact_resnet152",
    Bottleneck,
    _152,
    "Pre-activation ResNet-152 (top-1 error in the paper 21.1% at 320x320): 60,185,128 parameters, 11.514 GMAC",
    **_PREACT,
)
preact_resnet200 = _factory(
    "preact_resnet200",
    Bottleneck,
    _200,
    "Pre-activation ResNet-200 (top-1 error in the paper 20.7% at 320x320): 64,666,152 parameters, 15.007 GMAC",
    **_PREACT,
)

_PLAIN: dict[str, Any] = {"source": "arXiv 1512.03385, figure 3 and table 2", "mixing": no_shortcut()}

plain18 = _factory(
    "plain18",
    BasicBlock,
    _18,
    "Plain-18, no shortcuts (top-1 error in the paper 27.94%): 11,515,688 parameters, 1.795 GMAC",
    **_PLAIN,
)
plain34 = _factory(
    "plain34",
    BasicBlock,
    _34,
    "Plain-34, no shortcuts (top-1 error in the paper 28.54%): 21,623,848 parameters, 3.644 GMAC",
    **_PLAIN,
)
