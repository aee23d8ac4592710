"""Residual blocks with torchvision's constructors, attributes and state_dict keys, run by fused operations."""

from __future__ import annotations

from resnet_fused.blocks.norm_relu import FusedNormReLU
from resnet_fused.blocks.parts import FusedBasic, FusedBasicUnit, FusedBottleneck, FusedBottleneckUnit, FusedPReLU
from resnet_fused.blocks.plain import PlainBasicBlock, PlainBottleneck
from resnet_fused.blocks.plain_units import PlainBasicUnit, PlainBottleneckUnit, PlainNormReLU, PlainPReLUBlock
from resnet_fused.blocks.residual import renamed

__all__ = ["BasicBlock", "BasicUnit", "Bottleneck", "BottleneckUnit", "NormReLU", "PReLUBlock"]


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


class BasicUnit(FusedBasicUnit, PlainBasicUnit):
    """A basic block with any order of norm and ReLU and any shortcut, fused.

    Equivalent: :class:`resnet_fused.blocks.plain_units.PlainBasicUnit`, whose module lists the five units of the paper.
    Input (N, inplanes, H, W), output (N, planes, ceil(H / stride), ceil(W / stride)), as PyTorch's modules give it.

    Args:
        inplanes, planes: channels of input and output.
        stride: of the first convolution.
        downsample: module on the shortcut, needed where shape changes; a 1x1 convolution, with a batch norm behind it
            or without, is fused too. In pre-activated units it reads the pre-activated tensor.
        groups, base_width, dilation: 1, 64 and 1.
        norm_layer: callable from channels to a norm, default ``nn.BatchNorm2d``; others run PyTorch's modules.
        unit: "original", "bn_after_add", "relu_before_add", "relu_preact" or "full_preact".
        mixing: a :class:`resnet_fused.blocks.mixing.Mixing` for scaled, gated and random shortcuts; None is ``F + S``.
        preactivate: False leaves out the first norm and ReLU of a pre-activated unit, for an input that has had them.
    Raises:
        ValueError, TypeError, NotImplementedError: an argument is another.

    Source: He et al., arXiv 1603.05027, Fig. 2 and 4.
    """

    _original_forward = renamed(PlainBasicUnit.forward, "_original_forward")


class BottleneckUnit(FusedBottleneckUnit, PlainBottleneckUnit):
    """A bottleneck with any order of norm and ReLU and any shortcut, fused.

    Arguments, errors and source as :class:`BasicUnit`; the output has ``4 * planes`` channels, the inner width is
    ``int(planes * base_width / 64) * groups``, and stride, dilation and groups are the 3x3 convolution's.
    """

    _original_forward = renamed(PlainBottleneckUnit.forward, "_original_forward")


class PReLUBlock(FusedPReLU, PlainPReLUBlock):
    """``prelu(x + bn2(conv2(prelu(bn1(conv1(x))))))`` with 3x3 convolutions and one PReLU module, fused.

    Equivalent: :class:`resnet_fused.blocks.plain_units.PlainPReLUBlock`. Input and output (N, channels, H, W).

    Args:
        channels: of input, output and between.
        bias: whether the convolutions have one.
        num_parameters: slopes of the PReLU, 1 or ``channels``.
        final_activation: whether the PReLU follows the sum, too; False is the block of SRGAN.
        norm_layer: callable from channels to a norm, default ``nn.BatchNorm2d``; others run PyTorch's modules.
    Raises:
        ValueError: another number of slopes.

    Source: PReLU arXiv 1502.01852; SRGAN arXiv 1609.04802, Fig. 4.
    """

    _original_forward = renamed(PlainPReLUBlock.forward, "_original_forward")


class NormReLU(FusedNormReLU, PlainNormReLU):
    """``relu(bn(x))``, fused: the end of a pre-activated network (arXiv 1603.05027, section 3.1).

    Equivalent: ``F.relu(norm_layer(channels)(x))``. Input and output (N, channels, H, W).

    Args:
        channels: of the input.
        norm_layer: callable from channels to a norm, default ``nn.BatchNorm2d``; others run PyTorch's modules.
    """

    _original_forward = renamed(PlainNormReLU.forward, "_original_forward")
