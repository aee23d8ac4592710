"""Residual blocks with torchvision's constructors, attributes and state_dict keys, run by fused operations."""

from __future__ import annotations

from resnet_fused.blocks.parts import FusedBasic, FusedBottleneck
from resnet_fused.blocks.plain import PlainBasicBlock, PlainBottleneck
from resnet_fused.blocks.plain_units import PlainBasicUnit, PlainBottleneckUnit, PlainPReLUBlock
from resnet_fused.blocks.residual import renamed

__all__ = ["BasicBlock", "BasicUnit", "Bottleneck", "BottleneckUnit", "PReLUBlock"]


class BasicBlock(FusedBasic, PlainBasicBlock):
    """``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``, both convolutions 3x3, fused.

    The same constructor and state_dict as ``torchvision.models.resnet.BasicBlock``. Input (N, inplanes, H, W), output
    (N, planes, ceil(H / stride), ceil(W / stride)) in the memory format that PyTorch's block would give.

    Args:
        inplanes, planes: channels of input and output.
        stride: of the first convolution.
        downsample: module on the shortcut, needed where shape changes; 1x1 convolution + batch norm is fused too.
        groups, base_width, dilation: 1, 64 and 1, as in torchvision.
        norm_layer: callable from channels to a norm, default ``nn.BatchNorm2d``; others run PyTorch's modules.
    Raises:
        ValueError, NotImplementedError: groups, base_width or dilation are others.

    Source: He et al., arXiv 1512.03385, Fig. 5 left.
    """

    _original_forward = renamed(PlainBasicBlock.forward, "_original_forward")


class Bottleneck(FusedBottleneck, PlainBottleneck):
    """``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x))))))) + shortcut(x))``, 1x1, 3x3, 1x1, fused.

    The same constructor and state_dict as ``torchvision.models.resnet.Bottleneck``. Input (N, inplanes, H, W), output
    (N, 4 * planes, ceil(H / stride), ceil(W / stride)) in the memory format that PyTorch's block would give.

    Args:
        inplanes: channels of the input; the output has ``4 * planes``.
        stride, dilation, groups: of the 3x3 convolution; a stride in ``conv1`` (the paper's form) is honoured too.
        base_width: width of the 3x3 convolution is ``int(planes * base_width / 64) * groups``.
        downsample: module on the shortcut, needed where shape changes; 1x1 convolution + batch norm is fused too.
        norm_layer: callable from channels to a norm, default ``nn.BatchNorm2d``; others run PyTorch's modules.

    Source: He et al., arXiv 1512.03385, Fig. 5 right; stride as in torchvision ("v1.5").
    """

    _original_forward = renamed(PlainBottleneck.forward, "_original_forward")


class BasicUnit(PlainBasicUnit):
    """A basic block of any unit of arXiv 1603.05027 with any shortcut, fused."""


class BottleneckUnit(PlainBottleneckUnit):
    """A bottleneck of any unit of arXiv 1603.05027 with any shortcut, fused."""


class PReLUBlock(PlainPReLUBlock):
    """The PReLU block, fused."""
