"""timm's networks, swapped: which are fused whole, what they compute, and what is declined."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from helpers import assert_close, assert_same_buffers, assert_same_step, randn, step
from networks import paths_of, randomise, reasons_of, tiny_timm
from timm.layers import BatchNormAct2d, DropPath, create_conv2d
from timm.models import resnetv2
from torch import nn

import resnet_fused
from resnet_fused import fuse, report, unfuse
from resnet_fused.adapters import timm as timm_adapter
from resnet_fused.adapters import timm_v2

TOLERANCE = 1e-9  # fp64, through networks whose last norms see few values


def on_meta(name: str, **options: object) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


@pytest.fixture
def x() -> torch.Tensor:
    return randn(2, 3, 32, 32)


def tiny_v2(block: str = "PreActBottleneck", **options: object) -> nn.Module:
    """``timm.models.resnetv2.ResNetV2`` with batch norm: two blocks in the first stage, one in the second."""
    torch.manual_seed(0)
    form = {
        "PreActBottleneck": {},
        "PreActBasic": {"basic": True, "bottle_ratio": 1.0},
        "Bottleneck": {"preact": False},
    }
    model = resnetv2.ResNetV2(
        [2, 1, 1, 1],
        channels=(16, 16, 16, 16),
        stem_chs=8,
        num_classes=5,
        norm_layer=BatchNormAct2d,
        conv_layer=create_conv2d,
        **form[block],
        **options,
    )
    return randomise(model).double()


def random_step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """A step from the same random state each time."""
    torch.manual_seed(3)
    return step(model, x)


def assert_same_model(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """The same training step, buffers, frozen step and inference, in fp64."""
    assert_same_step(random_step(ours.train(), x), random_step(theirs.train(), x), TOLERANCE)
    assert_same_buffers(ours, theirs, TOLERANCE)
    assert_same_step(step(ours.eval(), x), step(theirs.eval(), x), TOLERANCE)
    with torch.no_grad():
        assert_close(ours(x), theirs(x), TOLERANCE)


# --- which models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "blocks", "other"),
    [
        ("seresnet50", "bottleneck", 16, ["stem"]),
        ("seresnet18", "basic", 8, ["stem"]),
        ("resnet50d", "bottleneck", 16, ["stem"]),
        ("ese_resnet50", "bottleneck", 16, ["stem"]),
        ("resnetv2_50", "bottleneck", 16, ["norm"]),
        ("resnetv2_50d", "bottleneck", 16, ["norm"]),
        ("resnetv2_34", "basic", 16, ["norm"]),
    ],
)
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.2])
def test_fused_whole(name, kind, blocks, other, drop_path_rate):
    options = {"drop_path_rate": drop_path_rate}
    if name.startswith("ese_"):
        name, options["block_args"] = name[4:], {"attn_layer": "ese"}
    rows = report(fuse(on_meta(name, **options), strict=True)).rows
    assert {row.status for row in rows} == {"fused"}
    assert [row.kind for row in rows if row.kind not in ("stem", "norm")] == [kind] * blocks
    assert [row.kind for row in rows if row.kind in ("stem", "norm")] == other


@pytest.mark.parametrize(
    ("name", "reasons", "first"),
    [
        ("ecaresnet50d", {"attention"}, "fused"),
        ("resnetaa50", {"aa", "pool"}, "declined"),  # anti-aliased where the stride is 2, in the stem too
        ("resnetrs50", {"pool"}, "declined"),  # the stem has no max-pool
        ("resnetv2_50d_gn", {"norm"}, "declined"),
        ("resnetv2_50x1_bit", {"conv"}, "declined"),
        ("resnetv2_50d_evos", {"norm"}, "declined"),
    ],
)
def test_declined(name, reasons, first):
    found = report(fuse(on_meta(name)))
    if name == "resnetv2_50x1_bit":  # standardised weights, and group norm at the end
        assert {row.reason for row in found.declined} == {"conv", "norm"}
    else:
        assert {row.reason for row in found.declined} == reasons
    assert found.rows[0].kind in ("stem", "norm")
    assert found.rows[0].status == first
    assert all(row.detail and not row.backends for row in found.declined)


def test_the_final_norm_is_told_in_the_summary():
    assert str(report(fuse(on_meta("resnetv2_50")))).endswith(
        "16 of 16 blocks fused; stem: none found; final norm: fused"
    )


# --- what they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("variant", ["plain", "d"])  # d: three convolutions in the stem, a pool in the shortcut
def test_resnet(block, variant, x):
    plain = tiny_timm(block, **({"stem_width": 8, "stem_type": "deep", "avg_down": True} if variant == "d" else {}))
    fused = fuse(copy.deepcopy(plain), strict=True)
    assert paths_of(fused, x) == ["train"] * 5
    assert_same_model(fused, plain, x)


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
@pytest.mark.parametrize("attention", ["se", "ese"])
@pytest.mark.parametrize("drop_path_rate", [0.0, 0.5])
def test_squeeze_and_excitation(block, attention, drop_path_rate, x):
    plain = tiny_timm(block, block_args={"attn_layer": attention}, drop_path_rate=drop_path_rate)
    fused = fuse(copy.deepcopy(plain), strict=True)
    assert paths_of(fused, x) == ["train"] * 5
    assert_same_model(fused, plain, x)
    with torch.no_grad():
        assert paths_of(fused, x) == ["infer"] * 5


def test_attention_with_a_norm_of_its_own(x):
    """The gate's modules are run as they are, running statistics included."""
    plain = tiny_timm("Bottleneck", block_args={"attn_layer": "se"})
    for block in (plain.layer1[0], plain.layer3[0]):
        block.se.bn = nn.BatchNorm2d(block.se.fc1.out_channels).double()
        block.se.fc1.bias.requires_grad_(False)  # in front of a batch norm its gradient is rounding
    fused = fuse(copy.deepcopy(plain), strict=True)
    x = torch.cat([x, 2 * x, -x])
    assert_same_model(fused, plain, x)


def test_other_attention_is_declined_and_computes_the_same(x):
    plain = tiny_timm("Bottleneck", block_args={"attn_layer": "eca"})
    fused = fuse(copy.deepcopy(plain))
    assert reasons_of(fused, x) == {None, "attention"}
    assert_same_model(fused, plain, x)
    plain = tiny_timm("Bottleneck", block_args={"attn_layer": "se"})
    plain.layer2[0].se.add_maxpool = True
    fused = fuse(copy.deepcopy(plain))
    assert reasons_of(fused, x) == {None, "attention"}
    assert_same_model(fused, plain, x)


@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_stochastic_depth(block, x):
    plain = tiny_timm(block, drop_path_rate=0.5)
    fused = fuse(copy.deepcopy(plain), strict=True)
    assert paths_of(fused, x) == ["train"] * 5
    assert_same_model(fused, plain, torch.cat([x] * 3))
    # A rate that is set on the way is seen.
    for model in (fused.train(), plain.train()):
        for module in model.modules():
            if isinstance(module, DropPath):
                module.drop_prob, module.scale_by_keep = 0.9, False
    ours, theirs = random_step(fused, x), random_step(plain, x)
    assert_same_step(ours, theirs, TOLERANCE)
    for module in fused.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    assert not torch.equal(ours["out"], random_step(fused, x)["out"])


def test_another_stochastic_depth_is_declined(x):
    class Halved(DropPath):
        pass

    plain = tiny_timm("BasicBlock", drop_path_rate=0.5)
    plain.layer2[0].drop_path = Halved(0.5)
    fused = fuse(copy.deepcopy(plain))
    assert reasons_of(fused, x) == {None, "drop-path"}
    assert_same_model(fused, plain, x)


@pytest.mark.parametrize("block", ["PreActBottleneck", "PreActBasic", "Bottleneck"])
@pytest.mark.parametrize("options", [{}, {"drop_path_rate": 0.5}, {"avg_down": True, "stem_type": "deep"}], ids=str)
def test_resnetv2(block, options, x):
    plain = tiny_v2(block, **options)
    fused = fuse(copy.deepcopy(plain), strict=True)
    end = block != "Bottleneck"  # the others have a norm in every block
    assert paths_of(fused, x) == ["train"] * (5 + end)
    assert_same_model(fused, plain, torch.cat([x] * 2))
    with torch.no_grad():
        assert paths_of(fused, x) == ["infer"] * (5 + end)
    assert [type(m) for m in unfuse(fused).modules()] == [type(m) for m in plain.modules()]
    assert_same_model(fused, plain, torch.cat([x] * 2))


def test_statistics_are_handed_from_block_to_block(x, monkeypatch):
    """Only the first block takes the statistics of its input: the others get them from the sum that they read."""
    fused = fuse(tiny_v2("PreActBottleneck"))
    seen = []
    real = resnet_fused.ops.batch_norm.statistics
    monkeypatch.setattr(resnet_fused.ops.batch_norm, "statistics", lambda y: seen.append(y.shape) or real(y))
    fused.train()(x)
    assert [tuple(shape) for shape in seen] == [(2, 8, 8, 8)]


@pytest.mark.parametrize("change", ["activation", "dropped", "norm"])
def test_norms_with_another_activation_are_declined(change, x):
    plain = tiny_v2("PreActBottleneck")
    if change == "activation":
        plain.stages[1].blocks[0].norm2.act = nn.SiLU()
    elif change == "dropped":
        plain.stages[1].blocks[0].norm2.drop = nn.Dropout2d(0.0)
    else:
        plain.stages[1].blocks[0].norm2 = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()).double()
    fused = fuse(copy.deepcopy(plain))
    assert reasons_of(fused, x) == {None, {"activation": "activation", "dropped": "drop-block", "norm": "norm"}[change]}
    assert_same_model(fused, plain, x)


def test_final_norm_with_a_hook_is_run_by_pytorch(x):
    fused = fuse(tiny_v2())
    called = []
    fused.norm.register_forward_hook(lambda *_: called.append(1))
    assert paths_of(fused, x)[-1] == "original"
    assert called


@pytest.mark.parametrize("block", ["PreActBottleneck", "Bottleneck"])
def test_resnetv2_in_half_precision_under_autocast(block, x):
    """Against fp64, no worse than twice eager's error."""
    plain = tiny_v2(block).float()
    exact = copy.deepcopy(plain).double().train()(x)
    fused = fuse(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused(x.float()), plain(x.float())
    assert ours.dtype == theirs.dtype
    errors = [(out.double() - exact).abs().max() for out in (ours, theirs)]
    assert errors[0] <= 2 * errors[1] + 1e-3
    # A block alone gets fp32 there: the sum of two dtypes is PyTorch's.
    y = randn(2, 16, 5, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused.stages[0].blocks[1](y), plain.stages[0].blocks[1](y)
        assert reasons_of(fused.stages[0].blocks[1], y) == {"input"}
    assert ours.dtype == theirs.dtype == torch.float32


@pytest.mark.parametrize("build", [lambda: tiny_timm("BasicBlock", block_args={"attn_layer": "se"}), tiny_v2])
def test_compiled(build, x):
    plain = build()
    fused = fuse(copy.deepcopy(plain))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_same_step(
        {name.removeprefix("_orig_mod."): v for name, v in step(compiled, x).items()}, step(plain, x), TOLERANCE
    )
    assert_same_buffers(fused, plain, TOLERANCE)


def test_forward_intermediates_and_checkpointing(x):
    plain = tiny_v2()
    fused = fuse(copy.deepcopy(plain))
    plain.eval(), fused.eval()
    ours, theirs = fused.forward_intermediates(x, norm=True), plain.forward_intermediates(x, norm=True)
    assert_close(ours[0], theirs[0], TOLERANCE)
    for mine, exact in zip(ours[1], theirs[1], strict=True):
        assert_close(mine, exact, TOLERANCE)
    for model in (fused, plain):
        model.train().set_grad_checkpointing()
    assert_same_step(step(fused, x), step(plain, x), TOLERANCE)


def test_classes():
    assert set(timm_v2.FUSED) == {
        resnetv2.PreActBasic,
        resnetv2.PreActBottleneck,
        resnetv2.Bottleneck,
        resnetv2.ResNetV2,
    }
    for original, fused in {**timm_adapter.FUSED, **timm_v2.FUSED}.items():
        assert issubclass(fused, original)
