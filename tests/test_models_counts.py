"""Parameters and multiply-adds of every network: counted, in closed form, as the papers print them, in docstrings."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from model_helpers import count_gmac, count_parameters, on_meta
from torch import nn

from resnet_fused import models


class Network(NamedTuple):
    """What the papers say about a network."""

    name: str
    layers: tuple[int, ...]  # units in each stage
    bottleneck: bool = False
    unit: str = "original"
    shortcut: str | None = "B"  # None: a plain network
    groups: int = 1
    base_width: int = 64
    parameters: float | None = None  # known from elsewhere, exactly or in millions as printed
    gmac: float | None = None


def cifar(name: str, depth: int, parameters: float | None = None, gmac: float | None = None, **options) -> Network:
    bottleneck = options.get("bottleneck", False)
    options.setdefault("shortcut", "B" if bottleneck else "A")
    return Network(name, ((depth - 2) // (9 if bottleneck else 6),) * 3, parameters=parameters, gmac=gmac, **options)


L18, L34, L101, L152, L200 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3), (3, 24, 36, 3)
NETWORKS = [
    # counted from arXiv 1512.03385, table 1, arXiv 1611.05431 and arXiv 1605.07146; stride in the 3x3 convolution
    Network("resnet18", L18, parameters=11_689_512, gmac=1.814),
    Network("resnet34", L34, parameters=21_797_672, gmac=3.664),
    Network("resnet50", L34, True, parameters=25_557_032, gmac=4.089),
    Network("resnet101", L101, True, parameters=44_549_160, gmac=7.801),
    Network("resnet152", L152, True, parameters=60_192_808, gmac=11.514),
    Network("resnext50_32x4d", L34, True, groups=32, base_width=4, parameters=25_028_904, gmac=4.230),
    Network("resnext101_32x8d", L101, True, groups=32, base_width=8, parameters=88_791_336, gmac=16.414),
    Network("resnext101_64x4d", L101, True, groups=64, base_width=4, parameters=83_455_272, gmac=15.460),
    Network("wide_resnet50_2", L34, True, base_width=128, parameters=68_883_240, gmac=11.398),
    Network("wide_resnet101_2", L101, True, base_width=128, parameters=126_886_696, gmac=22.753),
    # arXiv 1512.03385, section 3.3: 3.6 billion multiply-adds for 34 layers, plain and residual
    Network("plain18", L18, shortcut=None, gmac=1.8),
    Network("plain34", L34, shortcut=None, gmac=3.6),
    Network("preact_resnet18", L18, unit="full_preact"),
    Network("preact_resnet34", L34, unit="full_preact"),
    Network("preact_resnet50", L34, True, "full_preact"),
    Network("preact_resnet101", L101, True, "full_preact"),
    Network("preact_resnet152", L152, True, "full_preact"),
    Network("preact_resnet200", L200, True, "full_preact"),
    # arXiv 1512.03385, table 6
    cifar("cifar_resnet20", 20, 0.27, 0.041),
    cifar("cifar_resnet32", 32, 0.46, 0.069),
    cifar("cifar_resnet44", 44, 0.66, 0.097),
    cifar("cifar_resnet56", 56, 0.85, 0.125),
    cifar("cifar_resnet110", 110, 1.7, 0.253),
    cifar("cifar_resnet1202", 1202, 19.4),
    cifar("cifar_plain20", 20, 0.27, shortcut=None),
    cifar("cifar_plain32", 32, 0.46, shortcut=None),
    cifar("cifar_plain44", 44, 0.66, shortcut=None),
    cifar("cifar_plain56", 56, 0.85, shortcut=None),
    # arXiv 1603.05027, table 4
    cifar("cifar_resnet164", 164, 1.7, bottleneck=True),
    cifar("cifar_preact_resnet20", 20, unit="full_preact"),
    cifar("cifar_preact_resnet56", 56, unit="full_preact"),
    cifar("preact_resnet110", 110, 1.7, unit="full_preact"),
    cifar("preact_resnet164", 164, 1.7, unit="full_preact", bottleneck=True),
    cifar("resnet1001", 1001, unit="full_preact", bottleneck=True),  # printed without norms: see below
]
SLOW = ("cifar_resnet1202", "resnet1001")  # whose forward on the meta device takes seconds


class Counts(NamedTuple):
    parameters: int
    macs: int
    weights: int  # of convolutions and the linear layer


def closed_form(network: Network, num_classes: int | None = None) -> Counts:
    """The papers' description in numbers; a norm has 2 parameters per channel, a multiply-add is one of a product's."""
    imagenet = len(network.layers) == 4
    planes, size = (64, 224 // 2) if imagenet else (16, 32)
    weights = (7 * 7 if imagenet else 3 * 3) * 3 * planes
    macs = weights * size**2
    norms = planes
    size, inplanes = (size // 2 if imagenet else size), planes  # the max-pool
    preactivated = network.unit in ("relu_preact", "full_preact")

    def conv(kernel: int, inner: int, outer: int, groups: int = 1) -> None:
        nonlocal weights, macs
        weights += kernel**2 * inner * outer // groups
        macs += kernel**2 * inner * outer // groups * size**2

    for stage, count in enumerate(network.layers):
        for position in range(count):
            stride = 2 if stage and not position else 1
            outplanes = planes * (4 if network.bottleneck else 1)
            width = planes * network.base_width // 64 * network.groups
            changed = stride != 1 or inplanes != outplanes
            if network.bottleneck:
                conv(1, inplanes, width)
                size //= stride
                conv(3, width, width, network.groups)
                conv(1, width, outplanes)
                widths = [inplanes, width, width, outplanes]
            else:
                size //= stride
                conv(3, inplanes, planes)
                conv(3, planes, planes)
                widths = [inplanes, planes, planes]
            if network.unit == "full_preact":
                first_of_all = not stage and not position  # reads what the stem has activated
                norms += sum(widths[first_of_all:-1])
            else:
                norms += sum(widths[1:])
            if network.shortcut == "C" or (network.shortcut == "B" and changed):
                conv(1, inplanes, outplanes)
                norms += outplanes if network.unit in ("original", "relu_before_add", "relu_preact") else 0
            inplanes = outplanes
        planes *= 2
    norms += inplanes if preactivated else 0
    num_classes = num_classes or (1000 if imagenet else 10)
    weights += inplanes * num_classes
    return Counts(weights + 2 * norms + num_classes, macs + inplanes * num_classes, weights)


def decimals(printed: float) -> int:
    return len(str(printed).partition(".")[2])


@pytest.mark.parametrize("network", NETWORKS, ids=[row.name for row in NETWORKS])
def test_counts(network):
    factory = getattr(models, network.name)
    model = on_meta(factory)
    expected = closed_form(network)
    assert count_parameters(model) == expected.parameters
    gmac = expected.macs / 1e9
    if network.name not in SLOW:
        assert round(count_gmac(model, 224 if len(network.layers) == 4 else 32), 6) == round(gmac, 6)
    assert f"{expected.parameters:,} parameters, {gmac:.3f} GMAC" in factory.__doc__
    if isinstance(network.parameters, int):
        assert expected.parameters == network.parameters
    elif network.parameters is not None:
        assert round(expected.parameters / 1e6, decimals(network.parameters)) == network.parameters
    if network.gmac is not None:
        assert round(gmac, decimals(network.gmac)) == network.gmac


@pytest.mark.parametrize(("name", "millions"), [("preact_resnet164", 1.7), ("preact_resnet1001", 10.2)])
def test_parameters_as_the_paper_counts_them(name, millions):
    """arXiv 1603.05027 prints 10.2M for 1001 layers: the weights, without the norms."""
    model = on_meta(getattr(models, name))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    assert round(weights / 1e6, 1) == millions


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
@pytest.mark.parametrize("unit", ["original", "bn_after_add", "relu_before_add", "relu_preact", "full_preact"])
def test_counts_of_every_unit_and_shortcut(unit, shortcut):
    for bottleneck in (False, True):
        options = {"unit": unit, "bottleneck": bottleneck, "shortcut": shortcut}
        network = cifar("", 29 if bottleneck else 20, **options)
        model = on_meta(models.cifar_resnet, 29 if bottleneck else 20, num_classes=100, **options)
        expected = closed_form(network, num_classes=100)
        assert count_parameters(model) == expected.parameters
        assert round(count_gmac(model, 32) * 1e9) == expected.macs
        imagenet = Network("", (1, 2, 1, 1), bottleneck, unit, shortcut)
        block = models.resnet.Bottleneck if bottleneck else models.resnet.BasicBlock
        model = on_meta(models.ResNet, block, imagenet.layers, unit=unit, shortcut=shortcut)
        assert count_parameters(model) == closed_form(imagenet).parameters


@pytest.mark.parametrize(("name", "gmac"), [("resnet50", 3.858), ("resnet101", 7.570), ("resnet152", 11.282)])
def test_the_papers_placement_of_the_stride_costs_less(name, gmac):
    model = on_meta(getattr(models, name))
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    assert round(count_gmac(model, 224), 3) == gmac


def test_depth_is_the_number_of_layers_with_weights():
    """Option A and plain networks: no convolution on a shortcut."""
    for name, depth in [("cifar_resnet110", 110), ("preact_resnet110", 110), ("cifar_plain56", 56), ("plain34", 34)]:
        model = on_meta(getattr(models, name))
        assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == depth
    for name, depth, projections in [
        ("preact_resnet164", 164, 3),
        ("resnet1001", 1001, 3),
        ("preact_resnet200", 200, 4),
    ]:
        model = on_meta(getattr(models, name))
        assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules()) == depth + projections


def test_resnet200_has_sixteen_units_more_at_28x28():
    """The footnote of arXiv 1603.05027 on ResNet-152 and ResNet-200."""
    small, large = on_meta(models.preact_resnet152), on_meta(models.preact_resnet200)
    more = [len(getattr(large, f"layer{i}")) - len(getattr(small, f"layer{i}")) for i in range(1, 5)]
    assert more == [0, 16, 0, 0]
