"""``conv3x3``: the contract of ``ops/_conv.py`` for 3x3 convolutions, padding equal to the dilation, any groups.

A deferred input is padded *after* its activation, with zeros: ``relu(shift) != 0`` at the border.
"""

from __future__ import annotations

from resnet_fused.ops._conv import ConvOps

conv3x3 = ConvOps("conv3x3", 3)
