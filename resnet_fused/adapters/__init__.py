"""Fused classes for other packages' models: one module-level subclass per class, so that pickle finds them by name.

An adapter is imported only when its package has been imported already: a model of that package cannot exist otherwise.
"""

from __future__ import annotations

import importlib
import sys

from torch import nn

_ADAPTERS = {
    "torchvision": ("resnet_fused.adapters.torchvision",),
    "timm": ("resnet_fused.adapters.timm", "resnet_fused.adapters.timm_v2"),
}


def fused_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Original class -> fused subclass, for this package's blocks and every package imported so far."""
    from resnet_fused import blocks, models
    from resnet_fused.blocks import plain, plain_units
    from resnet_fused.models.resnet import PlainResNet

    classes: dict[type[nn.Module], type[nn.Module]] = {
        plain.PlainBasicBlock: blocks.BasicBlock,
        plain.PlainBottleneck: blocks.Bottleneck,
        plain_units.PlainBasicUnit: blocks.BasicUnit,
        plain_units.PlainBottleneckUnit: blocks.BottleneckUnit,
        plain_units.PlainPReLUBlock: blocks.PReLUBlock,
        plain_units.PlainNormReLU: blocks.NormReLU,
        PlainResNet: models.ResNet,
    }
    for package, adapters in _ADAPTERS.items():
        if package in sys.modules:
            for adapter in adapters:
                classes.update(importlib.import_module(adapter).FUSED)
    return classes
