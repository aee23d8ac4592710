"""Whole networks: counts against the papers, identity with torchvision's, weights, CIFAR shortcuts."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import resnet_fused
from resnet_fused import models
from resnet_fused.blocks import BasicBlock, Bottleneck
from resnet_fused.blocks.paths import recording
from resnet_fused.blocks.plain import PlainBasicBlock, PlainBottleneck
from resnet_fused.models.resnet import PlainResNet

# name, parameters, GMAC for one 224x224 image with 1000 classes (counted from the papers' tables; stride in the 3x3)
IMAGENET = [
    ("resnet18", 11_689_512, 1.814),
    ("resnet34", 21_797_672, 3.664),
    ("resnet50", 25_557_032, 4.089),
    ("resnet101", 44_549_160, 7.801),
    ("resnet152", 60_192_808, 11.514),
    ("resnext50_32x4d", 25_028_904, 4.230),
    ("resnext101_32x8d", 88_791_336, 16.414),
    ("resnext101_64x4d", 83_455_272, 15.460),
    ("wide_resnet50_2", 68_883_240, 11.398),
    ("wide_resnet101_2", 126_886_696, 22.753),
]
# depth, millions of parameters in arXiv 1512.03385 table 6 and the decimals it is printed with, GMAC at 32x32
CIFAR = [
    (20, 0.27, 2, 0.041),
    (32, 0.46, 2, 0.069),
    (44, 0.66, 2, 0.097),
    (56, 0.85, 2, 0.125),
    (110, 1.7, 1, 0.253),
    (1202, 19.4, 1, None),  # not run: the count of the others covers it, and it alone takes seconds
]
# Small networks that cover every constructor argument at the price of a few blocks.
VARIANTS = {
    "basic": ("BasicBlock", [1, 2, 1, 1], {}),
    "basic-zero-init": ("BasicBlock", [1, 1, 1, 1], {"zero_init_residual": True, "num_classes": 7}),
    "bottleneck": ("Bottleneck", [1, 2, 1, 1], {}),
    "bottleneck-zero-init": ("Bottleneck", [1, 1, 1, 1], {"zero_init_residual": True, "num_classes": 7}),
    "dilated": ("Bottleneck", [1, 2, 2, 2], {"replace_stride_with_dilation": [False, True, True]}),
    "grouped": ("Bottleneck", [1, 1, 1, 1], {"groups": 32, "width_per_group": 4}),
    "wide": ("Bottleneck", [1, 1, 1, 1], {"width_per_group": 128}),
    "group-norm": ("Bottleneck", [1, 1, 1, 1], {"norm_layer": lambda channels: nn.GroupNorm(8, channels)}),
}


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_gmac(model: nn.Module, size: int) -> float:
    """Multiply-adds of one image in units of 1e9, counted by PyTorch on the original forward."""
    image = torch.empty(1, 3, size, size, device="meta")
    with resnet_fused.disabled(), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return counter.get_total_flops() / 2e9


def on_meta(build, *args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **kwargs)


def seeded(build, *args, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return build(*args, **kwargs)


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    """Same keys in the same order, and the same bits."""
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


@pytest.fixture
def tv():
    return pytest.importorskip("torchvision.models")


def variant_pair(tv, name: str) -> tuple[nn.Module, nn.Module]:
    """(ours, torchvision's) network of one entry of VARIANTS, each built from seed 0."""
    block, layers, kwargs = VARIANTS[name]
    ours = seeded(models.ResNet, {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}[block], layers, **kwargs)
    return ours, seeded(tv.ResNet, getattr(tv.resnet, block), layers, **kwargs)


# ---- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameters", "gmac"), IMAGENET, ids=[row[0] for row in IMAGENET])
def test_imagenet_counts(name, parameters, gmac):
    factory = getattr(models, name)
    model = on_meta(factory)
    assert count_parameters(model) == parameters
    assert round(count_gmac(model, 224), 3) == gmac
    assert f"{parameters:,} parameters, {gmac:.3f} GMAC" in factory.__doc__


@pytest.mark.parametrize(("depth", "millions", "decimals", "gmac"), CIFAR, ids=[str(row[0]) for row in CIFAR])
def test_cifar_counts(depth, millions, decimals, gmac):
    factory = getattr(models, f"cifar_resnet{depth}")
    model = on_meta(factory)
    parameters = count_parameters(model)
    assert round(parameters / 1e6, decimals) == millions
    assert parameters == cifar_parameters(depth, "A")
    assert f"{parameters:,} parameters" in factory.__doc__
    if gmac is not None:
        assert round(count_gmac(model, 32), 3) == gmac
        assert f"{gmac:.3f} GMAC" in factory.__doc__


def cifar_parameters(depth: int, shortcut: str, num_classes: int = 10) -> int:
    """Closed form of the paper's description; a 3x3 convolution is followed by a norm of 2 parameters per channel."""
    n = (depth - 2) // 6

    def conv(k: int, inner: int, outer: int) -> int:
        return k * k * inner * outer + 2 * outer

    total = conv(3, 3, 16) + 64 * num_classes + num_classes
    for inner, outer in ((16, 16), (16, 32), (32, 64)):
        total += conv(3, inner, outer) + (2 * n - 1) * conv(3, outer, outer)
        if shortcut == "C" or (shortcut == "B" and inner != outer):
            total += conv(1, inner, outer)
        if shortcut == "C":
            total += (n - 1) * conv(1, outer, outer)
    return total


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
@pytest.mark.parametrize("depth", [8, 20])
def test_cifar_shortcut_counts(depth, shortcut):
    model = on_meta(models.cifar_resnet, depth, shortcut=shortcut, num_classes=100)
    assert count_parameters(model) == cifar_parameters(depth, shortcut, num_classes=100)


# ---- identity with torchvision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [row[0] for row in IMAGENET])
def test_factory_matches_torchvision(tv, name):
    ours, theirs = on_meta(getattr(models, name)), on_meta(getattr(tv, name))
    assert [child for child, _ in ours.named_modules()] == [child for child, _ in theirs.named_modules()]
    for (child, mine), (_, other) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        if not list(mine.children()):
            assert repr(mine) == repr(other), child
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    assert set(vars(theirs)) <= set(vars(ours))
    signature = inspect.signature(getattr(models, name)).parameters
    assert [(p.name, p.kind, p.default) for p in signature.values()] == [
        (p.name, p.kind, p.default) for p in inspect.signature(getattr(tv, name)).parameters.values()
    ]


def test_constructor_signature_is_torchvisions(tv):
    ours, theirs = inspect.signature(models.ResNet).parameters, inspect.signature(tv.ResNet).parameters
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_seed_gives_the_same_bits(tv, variant):
    ours, theirs = variant_pair(tv, variant)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_same_seed_gives_the_same_bits_in_a_factory(tv, name):
    assert_same_state(seeded(getattr(models, name)), seeded(getattr(tv, name)))


@pytest.mark.parametrize("variant", ["basic", "bottleneck"])
def test_state_dict_interchange(tv, variant):
    ours, theirs = variant_pair(tv, variant)
    for model in (ours, theirs):
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape))  # buffers too: they must travel as well
    saved = copy.deepcopy(ours.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_state(ours, theirs)
    theirs.load_state_dict(saved, strict=True)
    for key, value in theirs.state_dict().items():
        assert torch.equal(value, saved[key]), key


def test_downsampling_stride_is_in_the_3x3():
    model = on_meta(models.resnet50)
    for stage in (model.layer2, model.layer3, model.layer4):
        assert (stage[0].conv1.stride, stage[0].conv2.stride, stage[0].conv3.stride) == ((1, 1), (2, 2), (1, 1))
        assert stage[0].downsample[0].stride == (2, 2)
        assert all(block.conv2.stride == (1, 1) for block in stage[1:])
        # the paper's placement ("v1") costs less
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    assert round(count_gmac(model, 224), 3) == 3.858


def test_replace_stride_with_dilation():
    model = on_meta(models.resnet50, replace_stride_with_dilation=[False, True, True])
    seen = [(block.conv2.stride[0], block.conv2.dilation[0]) for block in (*model.layer3, *model.layer4)]
    assert seen == [(1, 1)] + [(1, 2)] * 5 + [(1, 2)] + [(1, 4)] * 2
    assert model.layer4[0].downsample[0].stride == (1, 1)
    with pytest.raises(ValueError, match=r"^ResNet: expected replace_stride_with_dilation .* 3 entries, got \[True\]$"):
        models.resnet50(replace_stride_with_dilation=[True])


def test_zero_init_residual():
    for factory, last in ((models.resnet18, "bn2"), (models.resnet50, "bn3")):
        model = factory(zero_init_residual=True)
        stages = (model.layer1, model.layer2, model.layer3, model.layer4)
        assert all(getattr(block, last).weight.eq(0).all() for stage in stages for block in stage)
        assert model.bn1.weight.eq(1).all()


def relative_error(values: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """Root-mean-square error over all elements, relative to the reference's own root mean square."""
    difference = sum(((a.double() - b) ** 2).sum() for a, b in zip(values, reference, strict=True))
    return (difference / sum((b.double() ** 2).sum() for b in reference)).sqrt().item()


def run(model: nn.Module, x: torch.Tensor, train: bool) -> dict[str, list[torch.Tensor]]:
    """What a caller can see of one call: the output, in training also the buffers and gradients."""
    model.train(train)
    if not train:
        with torch.no_grad():
            return {"output": [model(x)]}
    x = x.clone().requires_grad_()
    output = model(x)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    return {
        "output": [output.detach()],
        "buffers": list(model.buffers()),
        "gradients": [x.grad] + [parameter.grad for parameter in model.parameters()],
    }


def assert_computes_the_same(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, train: bool, fused: int) -> None:
    """``ours`` against the stock ``theirs`` with the same weights, in fp64 and in fp32; ``fused`` modules take part.

    fp32 is measured against fp64, and may have twice the error of ``theirs`` plus 4 eps. ``theirs`` runs in
    channels_last, as we do inside: oneDNN's fp32 3x3 convolution has 2 to 5 times the error there that it has in NCHW.
    Gradients of a whole network are no measure of rounding: one activation that changes sides of its ReLU moves them by
    a per cent, in ``theirs`` as in ours. They are compared tightly in fp64 and against a gross error in fp32.
    """
    exact, ours64 = copy.deepcopy(theirs).double(), copy.deepcopy(ours).double()
    with recording() as calls:
        got, got64 = run(ours, x, train), run(ours64, x.double(), train)
    assert [call.path for call in calls] == ["train" if train else "infer"] * (2 * fused)  # none took the original path
    channels_last = torch.channels_last
    eager = run(theirs.to(memory_format=channels_last), x.contiguous(memory_format=channels_last), train)
    for what, expected in run(exact, x.double(), train).items():
        assert relative_error(got64[what], expected) < 1e-11, what
        allowed = 2 * relative_error(eager[what], expected) + 4 * torch.finfo(torch.float32).eps
        assert relative_error(got[what], expected) <= (0.1 if what == "gradients" else allowed), what


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("name", "channels_last"), [("resnet18", False), ("resnet50", True)], ids=["resnet18-nchw", "resnet50-nhwc"]
)
def test_output_is_torchvisions(tv, name, channels_last, train):
    theirs = seeded(getattr(tv, name), num_classes=10)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics and affine of a network that has been trained
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    ours = getattr(models, name)(num_classes=10)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 3, 64, 64)
    if channels_last:
        ours, x = ours.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    blocks = sum(isinstance(module, (BasicBlock, Bottleneck)) for module in ours.modules())
    assert_computes_the_same(ours, theirs, x, train, fused=blocks + 1)


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tv, monkeypatch):
    """Replaces the download by a network drawn from seed 1; the calls are kept in ``stored.calls``."""

    stored = SimpleNamespace(calls=[], model=None)

    def get_state_dict(member, *args, **kwargs):
        stored.calls.append((member, args, kwargs))
        torch.manual_seed(1)
        stored.model = tv.resnet18()
        return stored.model.state_dict()

    monkeypatch.setattr(tv.WeightsEnum, "get_state_dict", get_state_dict)
    return stored


@pytest.mark.parametrize("form", ["member", "DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"])
def test_weights_are_loaded(tv, stored, form):
    weights = tv.ResNet18_Weights.IMAGENET1K_V1 if form == "member" else form
    model = models.resnet18(weights=weights, progress=False)
    assert stored.calls == [(tv.ResNet18_Weights.IMAGENET1K_V1, (), {"progress": False, "check_hash": True})]
    assert_same_state(model, stored.model)
    assert model.fc.out_features == 1000


def test_weights_report_progress_by_default(stored):
    models.resnet18(weights="DEFAULT", num_classes=1000)
    assert stored.calls[0][2]["progress"] is True


def test_default_is_the_newest(tv, monkeypatch):
    class Reached(Exception):
        pass

    def get_state_dict(member, **kwargs):
        raise Reached(repr(member))

    monkeypatch.setattr(tv.WeightsEnum, "get_state_dict", get_state_dict)
    with pytest.raises(Reached, match=r"^ResNet50_Weights\.IMAGENET1K_V2$"):
        models.resnet50(weights="DEFAULT")


@pytest.mark.parametrize("name", [row[0] for row in IMAGENET])
def test_every_factory_knows_its_enum(tv, name):
    enum = tv.get_model_weights(name)
    resolve = models.resnet._resolve_weights
    for member in enum.__members__:
        assert resolve(name, models.resnet._NETWORKS[name].weights, f"{enum.__name__}.{member}") is enum[member]
        assert resolve(name, models.resnet._NETWORKS[name].weights, enum[member]) is enum[member]


R50_EXPECTED = (
    "resnet50: expected weights to be None, a member of ResNet50_Weights "
    "(IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT) or the name of one, got "
)


@pytest.mark.parametrize(
    ("weights", "error", "got"),
    [
        ("IMAGENET1K_V3", ValueError, "'IMAGENET1K_V3'"),
        ("ResNet18_Weights.DEFAULT", ValueError, "'ResNet18_Weights.DEFAULT'"),
        (True, TypeError, "True (bool)"),  # the legacy form resnet50(pretrained)
    ],
)
def test_wrong_weights(tv, weights, error, got):
    with pytest.raises(error) as caught:
        models.resnet50(weights=weights)
    assert str(caught.value) == R50_EXPECTED + got


def test_weights_of_another_network(tv):
    with pytest.raises(TypeError) as caught:
        models.resnet50(weights=tv.ResNet18_Weights.DEFAULT)
    assert str(caught.value) == R50_EXPECTED + "ResNet18_Weights.IMAGENET1K_V1 (ResNet18_Weights)"


def test_weights_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(
        ImportError, match=r"^resnet50: expected torchvision to be installed.*`pip install torchvision`"
    ):
        models.resnet50(weights="DEFAULT")


def test_import_needs_no_torchvision():
    code = (
        "import sys; sys.modules['torchvision'] = None; import resnet_fused.models as m; "
        "assert m.cifar_resnet(8).fc.out_features == 10"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_arguments_that_contradict(stored):
    with pytest.raises(ValueError, match=r"^resnet18: expected num_classes to be 1000 with weights=.*V1, got 10; "):
        models.resnet18(weights="DEFAULT", num_classes=10)
    assert not stored.calls  # refused before anything is downloaded
    with pytest.raises(ValueError, match=r"^resnext50_32x4d: expected groups to be 32, got 16$"):
        models.resnext50_32x4d(groups=16)
    with pytest.raises(ValueError, match=r"^wide_resnet50_2: expected width_per_group to be 128, got 64$"):
        models.wide_resnet50_2(width_per_group=64)
    with pytest.raises(TypeError, match=r"^resnet18: expected weights= \(None or 'DEFAULT'\), got pretrained=True$"):
        models.resnet18(pretrained=True)


# ---- CIFAR -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (1, 5, 7, 9), (2, 5, 1, 1), (0, 5, 4, 4)], ids=str)
@pytest.mark.parametrize(("out_channels", "stride"), [(5, 1), (8, 1), (5, 2), (10, 2), (6, 3)])
def test_pad_shortcut(shape, out_channels, stride):
    x = torch.randn(shape, requires_grad=True)
    n, c, h, w = shape
    expected = torch.zeros(n, out_channels, -(-h // stride), -(-w // stride))
    expected[:, :c] = x.detach()[:, :, 0::stride, 0::stride]
    got = models.PadShortcut(c, out_channels, stride)(x)
    assert torch.equal(got, expected)
    # as large as what a 3x3 convolution of the same stride gives
    assert (
        got.shape[2:]
        == nn.functional.conv2d(torch.empty(1, 1, h, w), torch.empty(1, 1, 3, 3), None, stride, 1).shape[2:]
    )

    weight = torch.randn(expected.shape)
    got.backward(weight)
    gradient = torch.zeros(shape)
    gradient[:, :, ::stride, ::stride] = weight[:, :c]
    assert torch.equal(x.grad, gradient)


def test_pad_shortcut_keeps_dtype_and_layout():
    x = torch.randn(2, 4, 6, 6).to(torch.bfloat16, memory_format=torch.channels_last)
    got = models.PadShortcut(4, 8, 2)(x)
    assert got.dtype == torch.bfloat16
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_pad_shortcut_is_a_plain_module():
    shortcut = models.PadShortcut(16, 32, 2)
    assert repr(shortcut) == "PadShortcut(16, 32, stride=2)"
    assert not shortcut.state_dict()
    x = torch.randn(1, 16, 5, 5)
    for twin in (pickle.loads(pickle.dumps(shortcut)), copy.deepcopy(shortcut), torch.jit.script(shortcut)):
        assert torch.equal(twin(x), shortcut(x))
    assert torch.equal(torch.fx.symbolic_trace(shortcut)(x), shortcut(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((16, 8), ValueError, "PadShortcut: expected out_channels to be at least in_channels = 16, got 8"),
        ((0, 8), ValueError, "PadShortcut: expected in_channels to be at least 1, got 0"),
        ((16, 32, 0), ValueError, "PadShortcut: expected stride to be at least 1, got 0"),
        ((16, 32.0), TypeError, "PadShortcut: expected out_channels to be an int, got 32.0"),
        ((16, 32, (2, 2)), TypeError, "PadShortcut: expected stride to be an int, got (2, 2)"),
    ],
)
def test_pad_shortcut_refuses(arguments, error, message):
    with pytest.raises(error) as caught:
        models.PadShortcut(*arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (16, 4, 4)])
def test_pad_shortcut_refuses_input(shape):
    with pytest.raises(ValueError) as caught:
        models.PadShortcut(16, 32, 2)(torch.empty(shape))
    assert str(caught.value) == f"PadShortcut: expected x to have shape (N, 16, H, W), got {list(shape)}"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"depth": 21}, ValueError, "expected depth to be 6n + 2 (20, 32, 44, 56, 110, 1202, ...), got 21"),
        ({"depth": 2}, ValueError, "expected depth to be at least 8, got 2"),
        ({"depth": 20.0}, TypeError, "expected depth to be an int, got 20.0"),
        ({"depth": 20, "shortcut": "a"}, ValueError, "expected shortcut to be one of A, B, C, got 'a'"),
        ({"depth": 20, "num_classes": 0}, ValueError, "expected num_classes to be at least 1, got 0"),
    ],
)
def test_cifar_refuses(arguments, error, message):
    with pytest.raises(error) as caught:
        models.cifar_resnet(**arguments)
    assert str(caught.value) == f"cifar_resnet: {message}"


def test_cifar_structure():
    model = on_meta(models.cifar_resnet110)
    assert model.depth == 110
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == [18, 18, 18]
    assert [stage[-1].conv2.out_channels for stage in (model.layer1, model.layer2, model.layer3)] == [16, 32, 64]
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == 110  # option A: no convolution on a shortcut
    assert repr(model.layer2[0].downsample) == "PadShortcut(16, 32, stride=2)"
    assert model.layer1[0].downsample is None
    assert model.layer2[1].downsample is None


def test_cifar_shortcuts():
    def kinds(model):
        blocks = [block for stage in (model.layer1, model.layer2, model.layer3) for block in stage]
        return "".join("-" if b.downsample is None else type(b.downsample).__name__[0] for b in blocks)

    assert kinds(models.cifar_resnet(14, shortcut="A")) == "--P-P-"
    assert kinds(models.cifar_resnet(14, shortcut="B")) == "--S-S-"
    assert kinds(models.cifar_resnet(14, shortcut="C")) == "SSSSSS"


def test_cifar_initialisation():
    model = seeded(models.cifar_resnet, 8)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()


def cifar_by_hand(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The paper's network written as one expression after another, on the modules of ``model``."""
    x = torch.relu(model.bn1(model.conv1(x)))
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            shortcut = x if block.downsample is None else block.downsample(x)
            x = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
            x = torch.relu(x + shortcut)
    return model.fc(x.mean((2, 3)))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_cifar_forward(shortcut, train):
    """Against the paper's description written out; the odd size goes through padding and subsampling."""

    class ByHand(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return cifar_by_hand(self.model, x)

    ours = seeded(models.cifar_resnet, 14, shortcut=shortcut)
    assert_computes_the_same(ours, ByHand(copy.deepcopy(ours)), torch.randn(4, 3, 33, 33), train, fused=6)


# ---- a model is an ordinary module -----------------------------------------------------------------------------------

SMALL = {
    "basic": lambda: models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5),
    "bottleneck": lambda: models.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5),
    "cifar-A": lambda: models.cifar_resnet(8, num_classes=5),
    "cifar-B": lambda: models.cifar_resnet(8, num_classes=5, shortcut="B"),
}


@pytest.mark.parametrize("name", SMALL)
def test_pickle_deepcopy_and_save(name):
    model = SMALL[name]().eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)  # first: whatever a call may cache must survive the copy
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twins = (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.load(file, weights_only=False))
        for twin in twins:
            assert type(twin) is type(model)
            assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("how", ["script", "trace", "fx"])
def test_other_representations(name, how):
    model = SMALL[name]().eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        if how == "script":
            other = torch.jit.script(model)
        elif how == "trace":
            other = torch.jit.trace(model, x)
        else:
            other = torch.fx.symbolic_trace(model)
        torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)


def test_unfuse_and_fuse_swap_the_classes():
    model = SMALL["bottleneck"]().eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        fused = model(x)
        assert type(resnet_fused.unfuse(model)) is PlainResNet
        assert type(model.layer1[0]) is PlainBottleneck
        torch.testing.assert_close(model(x), fused, rtol=1e-4, atol=1e-5)
        assert type(resnet_fused.fuse(model)) is models.ResNet
        assert type(model.layer1[0]) is Bottleneck
        assert torch.equal(model(x), fused)


def test_plain_network_from_the_same_seed():
    plain = seeded(PlainResNet, PlainBasicBlock, [1, 1, 1, 1], zero_init_residual=True)
    assert_same_state(plain, seeded(models.ResNet, BasicBlock, [1, 1, 1, 1], zero_init_residual=True))


@pytest.mark.parametrize("name", SMALL)
def test_disabled_gives_the_same(name):
    model = SMALL[name]().eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        fused = model(x)
        with resnet_fused.disabled():
            torch.testing.assert_close(fused, model(x), rtol=1e-4, atol=1e-5)


def test_public_names():
    expected = {name for name, *_ in IMAGENET} | {f"cifar_resnet{depth}" for depth, *_ in CIFAR}
    assert set(models.__all__) == expected | {"ResNet", "CifarResNet", "PadShortcut", "cifar_resnet"}
    assert all(hasattr(models, name) for name in models.__all__)
