"""Shapes that tests and benchmarks share, each with the reason why it is here."""

from __future__ import annotations

from typing import NamedTuple


class ConvCase(NamedTuple):
    """One convolution without bias; padding is ``dilation * (kernel - 1) // 2``."""

    kernel: int
    n: int
    c: int
    h: int
    w: int
    k: int
    stride: int
    dilation: int
    groups: int
    why: str

    @property
    def id(self) -> str:
        return self.why.replace(" ", "-").replace(",", "")

    @property
    def geometry(self) -> tuple[int, int, int]:
        return self.stride, self.dilation, self.groups

    @property
    def padding(self) -> int:
        return self.dilation * (self.kernel - 1) // 2

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.k, self.c // self.groups, self.kernel, self.kernel

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        p, q = ((size - 1) // self.stride + 1 for size in (self.h, self.w))
        return self.n, self.k, p, q


# Small enough for fp64 autograd in milliseconds, and each wrong in its own way if a kernel is.
CONVS = (
    #        R  N  C  H  W  K  s  d  g
    ConvCase(1, 2, 5, 4, 6, 3, 1, 1, 1, "1x1"),
    ConvCase(1, 2, 4, 5, 7, 6, 2, 1, 1, "1x1 stride 2 of odd sizes"),
    ConvCase(1, 3, 4, 1, 1, 5, 1, 1, 1, "1x1 on one pixel"),
    ConvCase(3, 2, 3, 5, 4, 4, 1, 1, 1, "3x3"),
    ConvCase(3, 2, 4, 6, 6, 3, 2, 1, 1, "3x3 stride 2, even: the last tap column reads no padding"),
    ConvCase(3, 1, 4, 7, 5, 3, 2, 1, 1, "3x3 stride 2, odd"),
    ConvCase(3, 2, 3, 2, 1, 2, 1, 1, 1, "3x3 on an image smaller than the kernel"),
    ConvCase(3, 1, 3, 7, 6, 4, 1, 2, 1, "3x3 dilation 2"),
    ConvCase(3, 2, 6, 5, 5, 4, 1, 1, 2, "3x3 two groups, unlike widths"),
    ConvCase(3, 2, 4, 6, 5, 4, 2, 1, 4, "3x3 depthwise stride 2"),
    ConvCase(3, 1, 4, 8, 9, 6, 2, 3, 2, "3x3 everything at once"),
    ConvCase(3, 2, 1, 4, 4, 1, 1, 1, 1, "3x3 one channel: both memory formats have the same strides"),
)


class BlockCase(NamedTuple):
    """A residual block.

    ``shortcut`` is identity, projection, pooled (timm's "d" form) or module (PyTorch runs all of it). ``options`` go to
    the constructor, but for ``v1``: the stride is moved from ``conv2`` to ``conv1``.
    """

    kind: str  # basic, bottleneck
    inplanes: int
    planes: int
    stride: int
    shortcut: str
    options: dict
    size: tuple[int, int]
    why: str

    @property
    def id(self) -> str:
        return self.why.replace(" ", "-").replace(",", "")


BLOCKS = (
    BlockCase("basic", 5, 5, 1, "identity", {}, (5, 6), "basic identity"),
    BlockCase("basic", 4, 6, 2, "projection", {}, (7, 6), "basic projection"),
    BlockCase("basic", 4, 6, 2, "pooled", {}, (6, 8), "basic pooled projection"),
    BlockCase("basic", 4, 6, 2, "module", {}, (6, 6), "basic module shortcut"),
    BlockCase("bottleneck", 8, 2, 1, "identity", {}, (5, 4), "bottleneck identity"),
    BlockCase("bottleneck", 4, 2, 1, "projection", {}, (4, 5), "bottleneck projection"),
    BlockCase("bottleneck", 6, 3, 2, "projection", {}, (7, 5), "bottleneck stride 2, odd sizes"),
    BlockCase("bottleneck", 6, 2, 2, "pooled", {}, (6, 6), "bottleneck pooled projection"),
    BlockCase("bottleneck", 6, 2, 2, "module", {}, (6, 6), "bottleneck module shortcut"),
    BlockCase("bottleneck", 8, 2, 1, "identity", {"groups": 2, "base_width": 64}, (5, 5), "bottleneck groups"),
    BlockCase("bottleneck", 8, 2, 1, "identity", {"base_width": 128}, (4, 4), "bottleneck wide"),
    BlockCase("bottleneck", 8, 2, 1, "identity", {"dilation": 2}, (7, 7), "bottleneck dilation"),
    BlockCase("bottleneck", 6, 2, 2, "projection", {"v1": True}, (6, 7), "bottleneck v1, stride in conv1"),
)


class Stage(NamedTuple):
    """The block that a stage of an ImageNet ResNet repeats, at 224x224."""

    name: str
    kind: str  # basic, bottleneck
    inplanes: int
    planes: int
    stride: int
    size: int  # height and width of the block's input
    why: str


STAGES = (
    Stage("resnet50.layer1.1", "bottleneck", 256, 64, 1, 56, "bound by memory, the fusion's best case"),
    Stage("resnet50.layer2.0", "bottleneck", 256, 128, 2, 56, "stride 2 and projection"),
    Stage("resnet50.layer2.1", "bottleneck", 512, 128, 1, 28, "the usual block"),
    Stage("resnet50.layer3.1", "bottleneck", 1024, 256, 1, 14, "most blocks of the deeper networks"),
    Stage("resnet50.layer4.1", "bottleneck", 2048, 512, 1, 7, "bound by arithmetic, odd size"),
    Stage("resnet18.layer1.0", "basic", 64, 64, 1, 56, "every tensor of the block is large"),
    Stage("resnet18.layer2.0", "basic", 64, 128, 2, 56, "BasicBlock with stride 2 and projection"),
    Stage("resnet18.layer4.1", "basic", 512, 512, 1, 7, "3x3 alone, bound by arithmetic"),
)


class Network(NamedTuple):
    """A network of torchvision that is timed."""

    name: str
    why: str


# The kernels are timed on every call that these make.
NETWORKS = (
    Network("resnet50", "Bottlenecks: 1x1 and 3x3, wide sums at the block's end"),
    Network("resnet18", "BasicBlocks: 3x3 alone, every tensor of a block has the same size"),
)

MODELS = (
    Network("resnet50", "the usual yardstick"),
    Network("resnet18", "BasicBlocks"),
    Network("resnet34", "BasicBlocks, deeper"),
    Network("resnet101", "most of its blocks in stage 3"),
    Network("resnet152", "the deepest: host time and memory"),
    Network("resnext50_32x4d", "grouped 3x3 convolutions"),
    Network("wide_resnet50_2", "inner tensors twice as wide: bound by arithmetic"),
)
