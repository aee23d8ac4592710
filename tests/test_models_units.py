"""Networks of every unit, shortcut option and mixing rule: the papers' sequences, rules by place, initial values."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from model_helpers import assert_computes_the_same, assert_same_state, on_meta, seeded
from torch import nn
from torch.overrides import TorchFunctionMode

import resnet_fused
from resnet_fused import models
from resnet_fused.blocks import BasicBlock, BasicUnit, Bottleneck, BottleneckUnit, NormReLU
from resnet_fused.blocks import mixing as modules
from resnet_fused.blocks.plain import PlainBasicBlock
from resnet_fused.models import mixing

# arXiv 1603.05027, figure 4; a bottleneck has one more convolution with what stands around it
SEQUENCES = {
    "original": "conv bn relu conv bn add relu",
    "bn_after_add": "conv bn relu conv add bn relu",
    "relu_before_add": "conv bn relu conv bn relu add",
    "relu_preact": "relu conv bn relu conv bn add",
    "full_preact": "bn relu conv bn relu conv add",
}
every_unit = pytest.mark.parametrize("unit", SEQUENCES)
every_shortcut = pytest.mark.parametrize("shortcut", ["A", "B", "C"])
both_blocks = pytest.mark.parametrize("bottleneck", [False, True], ids=["basic", "bottleneck"])
PREACTIVATED = ("relu_preact", "full_preact")
RULES = {
    "none": mixing.no_shortcut(),
    "scaling": mixing.constant_scaling(shortcut=0.5, branch=0.25),
    "exclusive": mixing.exclusive_gating(bias=-6),
    "shortcut-gate": mixing.shortcut_gating(bias=-7),
    "dropout": mixing.dropout_shortcut(0.3),
    "depth": mixing.stochastic_depth(0.6),
    "learned": mixing.learned_scaling(0.5),
    "learned-channels": mixing.learned_scaling(per_channel=True),
    "squeeze": mixing.squeeze_excitation(reduction=2),
}
every_rule = pytest.mark.parametrize("rule", RULES)


def sequence(unit: str, bottleneck: bool) -> list[str]:
    words = SEQUENCES[unit].split()
    second = [i for i, word in enumerate(words) if word == "conv"][1]
    middle = words[words.index("conv") : second]  # from one convolution to the next
    return words[:second] + middle + words[second:] if bottleneck else words


def units_of(model: nn.Module) -> list[nn.Module]:
    stages = [getattr(model, f"layer{i}") for i in range(1, 5) if hasattr(model, f"layer{i}")]
    return [unit for stage in stages for unit in stage]


def tiny(bottleneck: bool = False, units: int = 1, **options) -> models.CifarResNet:
    return seeded(
        models.cifar_resnet, (9 if bottleneck else 6) * units + 2, num_classes=5, bottleneck=bottleneck, **options
    )


# ---- the papers' sequences -------------------------------------------------------------------------------------------


WORDS = {"conv2d": "conv", "batch_norm": "bn", "relu": "relu", "add": "add", "add_": "add"}
OTHERS = ("adaptive_avg_pool2d", "linear", "max_pool2d")


class Recorder(TorchFunctionMode):
    """The functions that a forward calls, by the papers' words."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        if name in WORDS or name in OTHERS:
            self.seen.append(WORDS.get(name, name))
        return function(*args, **(kwargs or {}))


def recorded(module: nn.Module, x: torch.Tensor) -> list[str]:
    with resnet_fused.disabled(), torch.no_grad(), Recorder() as recorder:
        module.eval()(x)
    return recorder.seen


@every_unit
@both_blocks
def test_a_unit_is_the_papers_sequence(unit, bottleneck):
    model = tiny(bottleneck, 2, unit=unit)
    second = model.layer1[1]  # whose shortcut is the identity
    assert recorded(second, torch.randn(1, second.conv1.in_channels, 4, 4)) == sequence(unit, bottleneck)


@every_unit
def test_a_network_is_the_papers_sequence(unit):
    """Stem, three units with option A, and the end: BN and ReLU behind the last addition of (d) and (e)."""
    words = sequence(unit, False)
    first = words[words.index("conv") :]  # the stem has activated
    end = ["bn", "relu"] if unit in PREACTIVATED else []
    expected = ["conv", "bn", "relu", *first, *words, *words, *end, "adaptive_avg_pool2d", "linear"]
    assert recorded(tiny(unit=unit), torch.randn(1, 3, 8, 8)) == expected
    model = models.ResNet(BasicBlock, [1, 1, 1, 1], unit=unit, shortcut="A", num_classes=5)
    expected = ["conv", "bn", "relu", "max_pool2d", *first, *words * 3, *end, "adaptive_avg_pool2d", "linear"]
    assert recorded(model, torch.randn(1, 3, 32, 32)) == expected


def walk(unit: nn.Module, bottleneck: bool, preactivate: bool, x: torch.Tensor) -> torch.Tensor:
    """The papers' sequence, word for word, on the modules of ``unit``."""
    words = sequence(unit.unit if hasattr(unit, "unit") else "original", bottleneck)
    if not preactivate:
        words = words[words.index("conv") :]
    convs, norms = (
        iter([getattr(unit, f"{kind}{i}") for i in (1, 2, 3) if hasattr(unit, f"{kind}{i}")]) for kind in ("conv", "bn")
    )
    h, read = x, None
    for word in words:
        if word == "conv":
            read = h if read is None else read
            h = next(convs)(h)
        elif word == "bn":
            norm = next(norms)
            h = (next(norms) if isinstance(norm, nn.Identity) else norm)(h)
        elif word == "relu":
            h = torch.relu(h)
        elif unit.downsample is None:
            h = h + x
        else:
            h = h + unit.downsample(read)
    return h


class ByHand(nn.Module):
    def __init__(self, model: nn.Module, bottleneck: bool) -> None:
        super().__init__()
        self.model, self.bottleneck = model, bottleneck

    def forward(self, x):
        model = self.model
        x = torch.relu(model.bn1(model.conv1(x)))
        for i, unit in enumerate(units_of(model)):
            x = walk(unit, self.bottleneck, i > 0 or unit.unit not in PREACTIVATED, x)
        if model.head_norm is not None:
            x = torch.relu(model.head_norm.bn(x))
        return model.fc(x.mean((2, 3)))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@every_unit
@pytest.mark.parametrize(
    ("bottleneck", "shortcut"), [(False, "A"), (False, "C"), (True, "B")], ids=["basic-A", "basic-C", "bottleneck-B"]
)
def test_forward_and_backward_are_the_papers(unit, bottleneck, shortcut, train):
    """Every unit and the head take part in the fused paths; the odd size goes through padding and subsampling."""
    ours = tiny(bottleneck, 2, unit=unit, shortcut=shortcut, mixing=lambda site: None)
    by_hand = ByHand(copy.deepcopy(ours), bottleneck)
    fused = 6 + (unit in PREACTIVATED)
    assert_computes_the_same(ours, by_hand, torch.randn(4, 3, 17, 17), train, fused=fused)


# ---- every combination -----------------------------------------------------------------------------------------------


def check_network(model: nn.Module, x: torch.Tensor) -> None:
    """Runs, every parameter gets a gradient, and state_dict, deepcopy and pickle give the same network."""
    model.train()(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name
    model.eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    for parameter in twins[2].parameters():
        parameter.data.zero_()
    twins[2].load_state_dict(torch.load(file))
    with torch.no_grad():
        expected = model(x)
        for twin in twins:
            assert_same_state(twin, model)
            assert torch.equal(twin(x), expected)


@every_unit
@every_shortcut
@both_blocks
def test_every_unit_with_every_shortcut(unit, shortcut, bottleneck):
    model = tiny(bottleneck, unit=unit, shortcut=shortcut)
    blocks = (BasicUnit, BottleneckUnit) if unit != "original" else (BasicBlock, Bottleneck)
    assert {type(block) for block in units_of(model)} == {blocks[bottleneck]}
    assert (type(model.head_norm) is NormReLU) == (unit in PREACTIVATED)
    emitting = [getattr(block, "emit_statistics", False) for block in units_of(model)]
    assert emitting == [unit == "full_preact"] * 3
    check_network(model, torch.randn(3, 3, 8, 8))


@every_rule
@every_unit
def test_every_rule_in_every_unit(unit, rule):
    check_network(tiny(unit=unit, mixing=RULES[rule]), torch.randn(4, 3, 8, 8))


@every_unit
def test_imagenet_networks(unit):
    options = {"unit": unit, "num_classes": 5, "mixing": RULES["squeeze"], "width_per_group": 8}
    check_network(seeded(models.ResNet, Bottleneck, [1, 1, 1, 1], shortcut="A", **options), torch.randn(2, 3, 64, 64))


def test_groups_and_dilation_reach_the_units():
    options = {"groups": 4, "width_per_group": 16, "replace_stride_with_dilation": [False, True, True]}
    model = on_meta(models.ResNet, Bottleneck, [1, 2, 2, 2], unit="full_preact", **options)
    plain = on_meta(models.ResNet, Bottleneck, [1, 2, 2, 2], **options)
    for ours, theirs in zip(units_of(model), units_of(plain), strict=True):
        assert [repr(ours.get_submodule(f"conv{i}")) for i in (1, 2, 3)] == [
            repr(theirs.get_submodule(f"conv{i}")) for i in (1, 2, 3)
        ]
    assert [unit.conv2.dilation[0] for unit in units_of(model)[3:]] == [1, 2, 2, 4]


def test_norm_layer_reaches_every_norm():
    def norm(channels):
        return nn.GroupNorm(4, channels)

    for unit in SEQUENCES:
        for model in (
            tiny(unit=unit, shortcut="B", norm_layer=norm),
            on_meta(models.ResNet, Bottleneck, [1, 1, 1, 1], unit=unit, norm_layer=norm),
        ):
            assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_units_from_a_unit_class():
    """A block that is a unit already stays as it is, and so does a stock one."""
    for block in (BasicUnit, PlainBasicBlock):
        model = on_meta(models.ResNet, block, [1, 1, 1, 1], unit="full_preact")
        assert all(unit.unit == "full_preact" for unit in units_of(model))
    assert type(on_meta(models.ResNet, BasicUnit, [1, 1, 1, 1]).layer1[0]) is BasicUnit
    assert type(units_of(model)[0]).__name__ == "PlainBasicUnit"


# ---- plain networks --------------------------------------------------------------------------------------------------


@every_unit
def test_plain_networks_have_no_path_past_the_branch(unit):
    """With the branch's convolutions at 0 the output of a unit does not depend on its input; a shortcut's does."""
    x = torch.randn(2, 3, 8, 8)
    for rule, depends in [(mixing.no_shortcut(), False), (None, True)]:
        model = tiny(unit=unit, mixing=rule)
        for block in units_of(model):
            for conv in (block.conv1, block.conv2):
                nn.init.zeros_(conv.weight)
        for block in (model.layer1, model.layer2):  # same size, and another
            channels = block[0].conv1.in_channels
            x = torch.randn(1, channels, 4, 4)
            jacobian = torch.autograd.functional.jacobian(lambda x, block=block: block(x).sum((0, 2, 3)), x)
            assert bool(jacobian.count_nonzero()) == depends


@pytest.mark.parametrize("name", ["plain18", "plain34", "cifar_plain20", "cifar_plain56"])
def test_plain_networks_hold_no_shortcut(name):
    model = on_meta(getattr(models, name))
    assert all(block.downsample is None and type(block.mixing) is modules.NoShortcut for block in units_of(model))
    chain = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(a.out_channels == b.in_channels for a, b in itertools.pairwise(chain))


# ---- mixing rules by place -------------------------------------------------------------------------------------------


def test_sites():
    sites = []
    model = tiny(True, 2, mixing=sites.append)  # which returns None: the plain sum
    assert [site.index for site in sites] == [0, 1, 2, 3, 4, 5]
    assert {site.units for site in sites} == {6}
    seen = [(block.conv1.in_channels, block.conv3.out_channels, block.conv2.stride[0]) for block in units_of(model)]
    assert [(site.inplanes, site.outplanes, site.stride) for site in sites] == seen
    assert seen == [(16, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1)]
    assert all(type(block) is BottleneckUnit and block.mixing is None for block in units_of(model))
    sites.clear()
    on_meta(models.ResNet, BasicBlock, [2, 1, 1, 2], mixing=sites.append)
    assert [(site.index, site.units, site.stride) for site in sites] == [
        (0, 6, 1), (1, 6, 1), (2, 6, 2), (3, 6, 2), (4, 6, 2), (5, 6, 1),
    ]  # fmt: skip


def test_stochastic_depth_decays_linearly():
    """arXiv 1603.09382, equation 4: unit l of L survives with probability 1 - l / L * (1 - p_L)."""
    model = on_meta(models.cifar_resnet, 56, mixing=mixing.stochastic_depth(0.5, mode="batch"))
    blocks = units_of(model)
    survival = [1 - block.mixing.p for block in blocks]
    assert survival == pytest.approx([1 - number / 27 * (1 - 0.5) for number in range(1, 28)])
    assert sum(survival) == pytest.approx((3 * 27 - 1) / 4)  # the paper's expected depth for p_L = 0.5
    assert {block.mixing.mode for block in blocks} == {"batch"}


@pytest.mark.parametrize("bias", [-6, 0])
@pytest.mark.parametrize("rule", [mixing.exclusive_gating, mixing.shortcut_gating])
def test_gates_start_where_they_are_told(rule, bias):
    model = seeded(models.cifar_resnet, 8, mixing=rule(bias))
    for block in units_of(model):
        conv = block.mixing.conv
        assert (conv.in_channels, conv.out_channels) == (block.conv1.in_channels, block.conv2.out_channels)
        assert conv.stride == block.conv1.stride
        assert conv.bias.eq(bias).all()
        assert conv.weight.std().item() == pytest.approx((2 / conv.out_channels) ** 0.5, rel=0.15)


def test_rules_make_modules_of_their_arguments():
    site = mixing.MixingSite(inplanes=8, outplanes=16, stride=2, index=1, units=4)
    made = {name: rule(site) for name, rule in RULES.items()}
    assert {name: repr(module).partition("(")[0] for name, module in made.items()} == {
        "none": "NoShortcut",
        "scaling": "ConstantScaling",
        "exclusive": "ExclusiveGating",
        "shortcut-gate": "ShortcutGating",
        "dropout": "DropoutShortcut",
        "depth": "StochasticDepth",
        "learned": "LearnedScaling",
        "learned-channels": "LearnedScaling",
        "squeeze": "SqueezeExcitation",
    }
    assert (made["scaling"].shortcut, made["scaling"].branch) == (0.5, 0.25)
    assert made["dropout"].p == 0.3
    assert made["depth"].p == pytest.approx(0.3)
    assert made["learned"].weight.tolist() == [0.5]
    assert made["learned-channels"].weight.shape == (16,)
    assert (made["squeeze"].fc1.in_channels, made["squeeze"].fc1.out_channels) == (16, 8)
    assert made["exclusive"].conv.stride == (2, 2)


@every_rule
def test_rules_are_values(rule):
    rule = RULES[rule]
    assert pickle.loads(pickle.dumps(rule)) == rule == eval(repr(rule), vars(mixing))
    assert type(rule).__name__ in mixing.__all__


# ---- initial values and refusals -------------------------------------------------------------------------------------


@every_unit
def test_initial_values(unit):
    model = tiny(True, unit=unit, shortcut="C")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.out_channels * module.kernel_size[0] ** 2)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.2)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()


@pytest.mark.parametrize("unit", ["original", "relu_preact"])
@both_blocks
def test_zero_init_residual(unit, bottleneck):
    for rule in (None, mixing.stochastic_depth()):
        for model in (
            tiny(bottleneck, unit=unit, mixing=rule, zero_init_residual=True),
            models.ResNet(Bottleneck if bottleneck else BasicBlock, [1, 1, 1, 1], 5, True, unit=unit, mixing=rule),
        ):
            for block in units_of(model):
                norms = [norm for name, norm in block.named_children() if name.startswith("bn")]
                zero = [bool(norm.weight.eq(0).all()) for norm in norms]
                assert zero == [False] * (len(norms) - 1) + [True]
            if model.head_norm is not None:
                assert model.head_norm.bn.weight.eq(1).all()


@pytest.mark.parametrize(
    ("unit", "why"),
    [
        ("bn_after_add", "whose branch does not end in a norm"),
        ("full_preact", "whose branch does not end in a norm"),
        ("relu_before_add", "whose branch ends in a ReLU, which passes no gradient at 0 and would never learn"),
    ],
)
def test_zero_init_residual_needs_a_last_norm(unit, why):
    text = f"expected zero_init_residual to be False with unit {unit!r}, {why}, got True"
    with pytest.raises(ValueError) as caught:
        models.cifar_resnet(8, unit=unit, zero_init_residual=True)
    assert str(caught.value) == f"cifar_resnet: {text}"
    with pytest.raises(ValueError) as caught, torch.device("meta"):
        models.resnet18(unit=unit, zero_init_residual=True)
    assert str(caught.value) == f"ResNet: {text}"


def test_a_branch_that_ends_in_relu_would_never_learn():
    """Why the above is refused."""
    model = tiny(unit="relu_before_add")
    for block in units_of(model):
        nn.init.zeros_(block.bn2.weight)
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    for block in units_of(model):
        for parameter in (block.bn2.weight, block.bn2.bias, block.conv1.weight, block.conv2.weight):
            assert parameter.grad.count_nonzero() == 0


class Custom(BasicBlock):
    pass


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"unit": "preact"},
            ValueError,
            "expected unit to be one of original, bn_after_add, relu_before_add, relu_preact, full_preact, "
            "got 'preact'",
        ),
        ({"shortcut": None}, ValueError, "expected shortcut to be one of A, B, C, got None"),
        (
            {"mixing": mixing.no_shortcut},
            TypeError,
            "expected mixing to be None or a function of a MixingSite that returns a Mixing module, such as "
            f"models.mixing.no_shortcut(), got {mixing.no_shortcut!r}",
        ),
        (
            {"mixing": modules.NoShortcut()},
            TypeError,
            "expected mixing to be None or a function of a MixingSite that returns a Mixing module, such as "
            "models.mixing.no_shortcut(), got NoShortcut()",
        ),
        (
            {"mixing": "stochastic_depth"},
            TypeError,
            "expected mixing to be None or a function of a MixingSite that returns a Mixing module, such as "
            "models.mixing.no_shortcut(), got 'stochastic_depth'",
        ),
        (
            {"block": Custom, "unit": "full_preact"},
            ValueError,
            "expected block to be BasicBlock or Bottleneck with unit 'full_preact' or a mixing, got Custom",
        ),
        (
            {"mixing": mixing.no_shortcut(), "zero_init_residual": True},
            ValueError,
            "expected zero_init_residual to be False without shortcuts, where every output would be 0, got True",
        ),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error) as caught, torch.device("meta"):
        models.ResNet(**{"block": BasicBlock, "layers": [1, 1, 1, 1], **arguments})
    assert str(caught.value) == f"ResNet: {message}"


def test_a_rule_must_return_a_mixing_module():
    with pytest.raises(TypeError, match=r"^BasicUnit: expected mixing to be None or a Mixing module, got Dropout$"):
        tiny(mixing=lambda site: nn.Dropout())
    with pytest.raises(ValueError, match=r"^StochasticDepth: expected p to be a probability from 0 to 1, got 1\.5$"):
        models.cifar_resnet(8, mixing=lambda site: mixing.stochastic_depth(1.5)(mixing.MixingSite(1, 1, 1, 0, 1)))
