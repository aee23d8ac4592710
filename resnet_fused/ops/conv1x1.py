"""``conv1x1``: the contract of ``ops/_conv.py`` for 1x1 convolutions (stride 1 or more, one group)."""

from __future__ import annotations

from resnet_fused.ops._conv import ConvOps

conv1x1 = ConvOps("conv1x1", 1)
