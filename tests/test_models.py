"""Whole networks: identity with torchvision's, weights, names, and that a model is an ordinary module."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from model_helpers import assert_computes_the_same, assert_same_state, on_meta, seeded
from torch import nn

import resnet_fused
from resnet_fused import models
from resnet_fused.blocks import BasicBlock, BasicUnit, Bottleneck, NormReLU
from resnet_fused.blocks.plain import PlainBasicBlock, PlainBottleneck
from resnet_fused.blocks.plain_units import PlainBasicUnit, PlainBottleneckUnit, PlainNormReLU
from resnet_fused.models.resnet import PlainResNet

IMAGENET = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
)
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


@pytest.fixture
def tv():
    return pytest.importorskip("torchvision.models")


def variant_pair(tv, name: str) -> tuple[nn.Module, nn.Module]:
    """(ours, torchvision's) network of one entry of VARIANTS, each built from seed 0."""
    block, layers, kwargs = VARIANTS[name]
    ours = seeded(models.ResNet, {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}[block], layers, **kwargs)
    return ours, seeded(tv.ResNet, getattr(tv.resnet, block), layers, **kwargs)


# ---- identity with torchvision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGENET)
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
    positional = [p for p in ours.values() if p.kind is not p.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs.values()]


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


@pytest.mark.parametrize("name", IMAGENET)
def test_every_factory_knows_its_enum(tv, name, monkeypatch):
    class Reached(Exception):
        pass

    def get_state_dict(member, **kwargs):
        raise Reached(repr(member))

    monkeypatch.setattr(tv.WeightsEnum, "get_state_dict", get_state_dict)
    enum = tv.get_model_weights(name)
    for weights in (*enum, *(f"{enum.__name__}.{member}" for member in enum.__members__)):
        member = enum[weights.rpartition(".")[2]] if isinstance(weights, str) else weights
        with pytest.raises(Reached, match=f"^{re.escape(repr(member))}$"), torch.device("meta"):
            getattr(models, name)(weights=weights)


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
    with pytest.raises(ValueError, match=r"^resnet18 with weights: expected unit to be 'original', got 'relu_preact'$"):
        models.resnet18(weights="DEFAULT", unit="relu_preact")
    with pytest.raises(ValueError, match=r"^preact_resnet18: expected unit to be 'full_preact', got 'original'$"):
        models.preact_resnet18(unit="original")
    with pytest.raises(ValueError, match=r"^plain18: expected mixing to be no_shortcut\(\), got None$"):
        models.plain18(mixing=None)
    with pytest.raises(
        ValueError, match=r"^plain18: expected weights to be None, torchvision has no such network, got 'DEFAULT'$"
    ):
        models.plain18(weights="DEFAULT")
    assert not stored.calls


# ---- a model is an ordinary module -----------------------------------------------------------------------------------

SMALL = {
    "basic": lambda: models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5),
    "bottleneck": lambda: models.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5),
    "cifar-A": lambda: models.cifar_resnet(8, num_classes=5),
    "cifar-B": lambda: models.cifar_resnet(8, num_classes=5, shortcut="B"),
    "preact": lambda: models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5, unit="full_preact"),
    "preact-bottleneck": lambda: models.cifar_preact_resnet(11, num_classes=5, bottleneck=True),
    "plain": lambda: models.cifar_resnet(8, num_classes=5, mixing=models.mixing.no_shortcut()),
    "gated": lambda: models.cifar_resnet(8, num_classes=5, unit="relu_preact", mixing=models.mixing.exclusive_gating()),
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


@pytest.mark.parametrize(
    ("name", "fused", "plain"),
    [("bottleneck", Bottleneck, PlainBottleneck), ("preact", BasicUnit, PlainBasicUnit)],
    ids=["bottleneck", "preact"],
)
def test_unfuse_and_fuse_swap_the_classes(name, fused, plain):
    model = SMALL[name]().eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        assert type(resnet_fused.unfuse(model)) is PlainResNet
        assert type(model.layer1[0]) is plain
        assert type(model.head_norm) in (type(None), PlainNormReLU)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert type(resnet_fused.fuse(model)) is models.ResNet
        assert type(model.layer1[0]) is fused
        assert type(model.head_norm) in (type(None), NormReLU)
        assert torch.equal(model(x), expected)


def test_plain_network_from_the_same_seed():
    plain = seeded(PlainResNet, PlainBasicBlock, [1, 1, 1, 1], zero_init_residual=True)
    assert_same_state(plain, seeded(models.ResNet, BasicBlock, [1, 1, 1, 1], zero_init_residual=True))
    plain = seeded(PlainResNet, PlainBottleneck, [1, 1, 1, 1], unit="full_preact")
    assert_same_state(plain, seeded(models.ResNet, Bottleneck, [1, 1, 1, 1], unit="full_preact"))
    assert {type(plain.layer1[0]), type(plain.head_norm)} == {PlainBottleneckUnit, PlainNormReLU}


@pytest.mark.parametrize("name", SMALL)
def test_disabled_gives_the_same(name):
    model = SMALL[name]().eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        fused = model(x)
        with resnet_fused.disabled():
            torch.testing.assert_close(fused, model(x), rtol=1e-4, atol=1e-5)


def test_public_names():
    assert len(set(models.__all__)) == len(models.__all__)
    assert set(models.__all__) == {*models.resnet.__all__, *models.cifar.__all__, "mixing"}
    assert all(hasattr(models, name) for name in models.__all__)


FACTORIES = [name for name in models.__all__ if inspect.isfunction(getattr(models, name))]


@pytest.mark.parametrize("name", FACTORIES)
def test_a_factory_is_an_ordinary_function(name):
    factory = getattr(models, name)
    assert pickle.loads(pickle.dumps(factory)) is factory
    assert factory.__qualname__ == factory.__name__ in (name, f"cifar_{name}", f"cifar_preact_{name}")
    assert factory.__module__ == (
        "resnet_fused.models.resnet" if name in models.resnet.__all__ else "resnet_fused.models.cifar"
    )
    summary, *rest = inspect.getdoc(factory).splitlines()
    assert summary.endswith(".")
    assert not rest or not rest[0]


def test_names_are_in_every_list():
    assert models.preact_resnet110 is models.cifar_preact_resnet110
    assert models.preact_resnet164 is models.cifar_preact_resnet164
    assert models.preact_resnet1001 is models.cifar_preact_resnet1001 is models.resnet1001
