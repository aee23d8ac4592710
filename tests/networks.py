"""Small whole networks, built from the classes of torchvision, timm and this package."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import rand, randn
from torch import nn
from torchvision.models import resnet

import resnet_fused

BLOCKS = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}


def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Norms as training leaves them: every channel alive, the first gamma negative, statistics of their own."""
    norms = [m for m in model.modules() if hasattr(m, "running_mean") or isinstance(m, nn.GroupNorm)]
    for i, norm in enumerate(norms, seed):
        shape = norm.weight.shape
        with torch.no_grad():
            norm.weight.copy_(rand(*shape, seed=4 * i))
            norm.weight[0].neg_()
            norm.bias.copy_(randn(*shape, seed=4 * i + 1) * 0.2)
            if hasattr(norm, "running_mean"):
                norm.running_mean.copy_(randn(*shape, seed=4 * i + 2) * 0.2)
                norm.running_var.copy_(rand(*shape, seed=4 * i + 3))
    return model


def tiny(
    kind: str = "bottleneck",
    *,
    dtype: torch.dtype = torch.float64,
    norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
) -> nn.Module:
    """``torchvision.models.ResNet`` with a stem, three blocks (4 x 4 channels at most) and random norm parameters.

    Among the blocks are an identity shortcut, a projection of stride 2 and, of bottlenecks, one of stride 1.
    """
    torch.manual_seed(0)
    cls = BLOCKS[kind]
    with torch.device("meta"):
        model = resnet.ResNet(cls, [1, 1, 1, 1])
    width = 4 * cls.expansion
    model.conv1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
    model.bn1 = norm_layer(4)
    model.layer1 = nn.Sequential(
        cls(4, 4, 1, _projection(4, width, 1, norm_layer) if width != 4 else None, norm_layer=norm_layer),
        cls(width, 4, norm_layer=norm_layer),
    )
    model.layer2 = nn.Sequential(cls(width, 4, 2, _projection(width, width, 2, norm_layer), norm_layer=norm_layer))
    model.layer3, model.layer4 = nn.Sequential(), nn.Sequential()
    model.fc = nn.Linear(width, 5)
    return randomise(model).to(dtype)


def _projection(inplanes: int, planes: int, stride: int, norm_layer: Callable[..., nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), norm_layer(planes))


def tiny_timm(block: str = "Bottleneck", *, dtype: torch.dtype = torch.float64, **options: object) -> nn.Module:
    """``timm.models.resnet.ResNet`` with one narrow block a stage; ``options`` are its constructor's."""
    import timm.models.resnet as timm_resnet

    torch.manual_seed(0)
    cls = getattr(timm_resnet, block)
    model = timm_resnet.ResNet(cls, (1, 1, 1, 1), channels=(4, 4, 8, 8), num_classes=5, zero_init_last=False, **options)
    return randomise(model).to(dtype)


def paths_of(model: nn.Module, *args: object) -> list[str]:
    """The path of every call of a fused module."""
    return [step.path for step in resnet_fused.explain(model, *args).steps]


def reasons_of(model: nn.Module, *args: object) -> set[str | None]:
    """Why fused modules took their original forward; {None} if none did."""
    return {step.reason for step in resnet_fused.explain(model, *args).steps}
