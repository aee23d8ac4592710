"""Swapping the blocks of whole models, and what is told about it."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import timm
import torch
from helpers import assert_close, assert_same_buffers, assert_same_step, randn, step
from networks import paths_of, randomise, reasons_of, tiny
from torch import nn
from torchvision.models import detection, resnet, segmentation
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import resnet_fused
from resnet_fused import disabled, explain, fuse, models, report, unfuse
from resnet_fused.adapters import timm as timm_adapter
from resnet_fused.adapters import torchvision as torchvision_adapter
from resnet_fused.models.resnet import PlainResNet

TOLERANCE = 1e-10  # fp64


def on_meta(build, *args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return build(*args, **kwargs)


@pytest.fixture
def x() -> torch.Tensor:
    return randn(2, 3, 32, 32)


def assert_same_model(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """The same training step, buffers and inference, in fp64."""
    assert_same_step(step(ours.train(), x), step(theirs.train(), x), TOLERANCE)
    assert_same_buffers(ours, theirs, TOLERANCE)
    with torch.no_grad():
        assert_close(ours.eval()(x), theirs.eval()(x), TOLERANCE)


# --- which models ---------------------------------------------------------------------------------------------------

FOUND = [  # model, kind of its blocks, how many
    (resnet.resnet18, "basic", 8),
    (resnet.resnet50, "bottleneck", 16),
    (resnet.resnext50_32x4d, "bottleneck", 16),
    (resnet.wide_resnet50_2, "bottleneck", 16),
    (timm.models.resnet.resnet18, "basic", 8),
    (timm.models.resnet.resnet26, "bottleneck", 8),
    (timm.models.resnet.resnet50d, "bottleneck", 16),
    (models.resnet18, "basic", 8),
    (models.resnext50_32x4d, "bottleneck", 16),
    (models.cifar_resnet20, "basic", 9),
]


@pytest.mark.parametrize(
    ("build", "kind", "blocks"),
    FOUND,
    ids=[f"{build.__module__.split('.')[0]}-{build.__name__}" for build, *_ in FOUND],
)
def test_every_block_and_the_stem_are_found(build, kind, blocks):
    rows = report(fuse(on_meta(build), strict=True)).rows
    assert {row.status for row in rows} == {"fused"}
    assert [row.kind for row in rows if row.kind != "stem"] == [kind] * blocks
    stems = [row.name for row in rows if row.kind == "stem"]
    assert stems == ([] if build is models.cifar_resnet20 else [""])


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_torchvision(kind, x):
    plain = tiny(kind)
    fused = fuse(copy.deepcopy(plain))
    assert paths_of(fused, x) == ["train"] * 4
    assert_same_model(fused, plain, x)
    assert paths_of(fused, x) == ["train"] * 4  # eval with gradients
    with torch.no_grad():
        assert paths_of(fused, x) == ["infer"] * 4


def test_other_networks_are_not_claimed():
    model = on_meta(timm.create_model, "resnet33ts")  # timm's other builder
    kept = [type(m) for m in model.modules()]
    found = report(fuse(model))
    assert found.rows == ()
    assert str(found) == "no residual block of torchvision, timm or resnet_fused found"
    assert [type(m) for m in model.modules()] == kept


def test_detection_backbone(x):
    plain = randomise(resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3)).double()
    assert isinstance(plain.body.bn1, FrozenBatchNorm2d)
    fused = fuse(copy.deepcopy(plain), strict=True)
    assert type(fused.body) is torchvision_adapter.Backbone
    assert paths_of(fused, x) == ["infer"] * 3 + ["train"] * 6  # the stem and the first stage are frozen
    gradients = []
    for model in (fused, plain):
        out = model(x)
        assert list(out) == ["0", "1", "2", "3", "pool"]
        sum((level * randn(*level.shape)).sum() for level in out.values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | out)
    assert_same_step(*gradients, TOLERANCE)


def test_detection_model_trains_and_detects():
    options = {"weights": None, "weights_backbone": None, "num_classes": 3, "min_size": 64, "max_size": 64}
    plain = detection.fasterrcnn_resnet50_fpn(**options)
    fused = fuse(copy.deepcopy(plain), strict=True)
    found = report(fused)
    assert len(found.fused) == 17
    images = [randn(3, 64, 64, dtype=torch.float32)]
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    losses = []
    for model in (fused, plain):
        torch.manual_seed(0)  # the samplers draw
        losses.append(model.train()(images, targets))
    assert losses[0].keys() == losses[1].keys()
    for name, loss in losses[1].items():
        assert_close(losses[0][name], loss, 1e-3, name)
    with torch.no_grad():
        ours, theirs = (model.eval()(images)[0] for model in (fused, plain))
    assert_close(ours["scores"], theirs["scores"], 1e-3)
    assert_close(ours["boxes"], theirs["boxes"], 1e-3)
    assert torch.equal(ours["labels"], theirs["labels"])


def test_segmentation(x):
    for build in (segmentation.deeplabv3_resnet50, segmentation.fcn_resnet101):
        model = fuse(on_meta(build, weights=None, weights_backbone=None), strict=True)
        assert {row.status for row in report(model).rows} == {"fused"}
    mobile = on_meta(segmentation.deeplabv3_mobilenet_v3_large, weights=None, weights_backbone=None)
    assert report(fuse(mobile)).rows == ()  # an IntermediateLayerGetter that is no ResNet
    plain = segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
    plain = randomise(plain).double().eval()
    fused = fuse(copy.deepcopy(plain))
    with torch.no_grad():
        assert paths_of(fused, x) == ["infer"] * 17  # dilated convolutions among them
        ours, theirs = fused(x), plain(x)
    assert list(ours) == ["out", "aux"]
    for name, exact in theirs.items():
        assert_close(ours[name], exact, TOLERANCE, name)


def test_backbone_that_returns_a_part_of_the_stem_is_not_swapped(x):
    getter = type(resnet_fpn_backbone(backbone_name="resnet18", weights=None).body)
    plain = getter(tiny("basic"), {"relu": "a", "layer1": "b"})
    fused = fuse(copy.deepcopy(plain))
    assert type(fused) is getter
    assert [row.kind for row in report(fused).rows] == ["basic"] * 2
    for name, exact in plain(x).items():
        assert_close(fused(x)[name], exact, TOLERANCE, name)


def test_a_block_alone():
    plain = randomise(resnet.BasicBlock(4, 4)).double()
    fused = fuse(copy.deepcopy(plain))
    assert type(fused) is torchvision_adapter.BasicBlock
    assert report(fused).rows[0].name == ""
    assert "(model)" in str(report(fused))
    y = randn(2, 4, 5, 5)
    assert_same_step(step(fused, y), step(plain, y), TOLERANCE)


class OwnForward(resnet.Bottleneck):
    """Somebody's block: torchvision's with another forward."""

    def forward(self, x):
        return super().forward(x) * 2


class SameForward(resnet.Bottleneck):
    """Somebody's block: nothing but a name."""


@pytest.mark.parametrize("cls", [OwnForward, SameForward])
def test_subclass_is_left_alone(cls, x):
    plain = tiny("bottleneck")
    plain.layer1[1].__class__ = cls
    fused = fuse(copy.deepcopy(plain))
    assert type(fused.layer1[1]) is cls
    assert [row.name for row in report(fused).rows] == ["", "layer1.0", "layer2.0"]
    assert_same_model(fused, plain, x)


def test_group_norm_is_declined(x):
    plain = tiny("basic", norm_layer=lambda channels: nn.GroupNorm(2, channels))
    fused = fuse(copy.deepcopy(plain))
    found = report(fused)
    assert not found.fused
    assert {(row.reason, row.detail) for row in found.declined} == {
        ("norm", "norm layer GroupNorm is not BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d")
    }
    assert reasons_of(fused, x) == {"norm"}
    assert torch.equal(fused(x), plain(x))  # not even the memory format differs


def test_shared_block(x):
    """One block that is called twice: its statistics move twice, its gradients add up."""
    block = randomise(resnet.BasicBlock(3, 3)).double()
    plain = nn.Sequential(block, nn.ReLU(), block)
    fused = fuse(copy.deepcopy(plain))
    assert fused[0] is fused[2]
    assert len(report(fused).rows) == 1
    assert [s.name for s in explain(fused, x).steps] == ["0", "0"]
    assert_same_model(fused, plain, x)
    assert fused[0].bn1.num_batches_tracked == 2


def test_tied_weights(x):
    plain = nn.Sequential(*(randomise(resnet.BasicBlock(3, 3)) for _ in range(2))).double()
    plain[1].conv2.weight = plain[0].conv1.weight
    fused = fuse(copy.deepcopy(plain))
    assert fused[1].conv2.weight is fused[0].conv1.weight
    assert_same_model(fused, plain, x)


# --- what a swap keeps ----------------------------------------------------------------------------------------------


def test_parameters_and_buffers_stay_the_same_objects():
    model = tiny()
    tensors = {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    values = {name: t.clone() for name, t in model.state_dict().items()}
    fuse(model)
    assert {name: id(t) for name, t in (*model.named_parameters(), *model.named_buffers())} == tensors
    assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())
    convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizer_made_before(optimizer, x):
    """Momentum gathered before the swap is used after it, and the other way round after unfuse."""
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    plain = tiny("basic")
    model = copy.deepcopy(plain)
    optimizers = [optimizer(m.parameters(), lr=1e-3, **options) for m in (model, plain)]
    for change in (lambda m: m, fuse, unfuse):
        change(model)
        for m, o in zip((model, plain), optimizers, strict=True):
            o.zero_grad()
            m(x).square().sum().backward()
            o.step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(ours, theirs, 1e-9, name)
    assert_same_buffers(model, plain, 1e-9)


def test_state_dict_both_ways(x):
    plain, fused = tiny(), fuse(tiny())
    assert list(fused.state_dict()) == list(plain.state_dict())
    randomise(plain, seed=50)
    fused.load_state_dict(plain.state_dict(), strict=True)
    with torch.no_grad():
        assert_close(fused.eval()(x), plain.eval()(x), TOLERANCE)
    randomise(fused, seed=70)
    plain.load_state_dict(fused.state_dict(), strict=True)
    with torch.no_grad():
        assert_close(fused(x), plain(x), TOLERANCE)


def test_hooks_on_blocks_survive(x):
    seen: dict[str, list[torch.Tensor]] = {}
    found = []
    for swap in (False, True):
        model = tiny()
        kept = seen[str(swap)] = []
        block = model.layer1[1]
        block.register_forward_pre_hook(lambda m, args, kept=kept: kept.append(args[0].detach()))
        block.register_forward_hook(lambda m, args, out, kept=kept: kept.append(out.detach()) or out * 1.5)
        block.register_full_backward_hook(lambda m, gi, go, kept=kept: kept.extend((gi[0], go[0])))
        if swap:
            fuse(model)
            assert paths_of(model, x) == ["train"] * 4
            kept.clear()
        found.append(step(model, x))
    assert_same_step(found[1], found[0], TOLERANCE)
    assert len(seen["True"]) == len(seen["False"]) == 4
    for ours, theirs in zip(seen["True"], seen["False"], strict=True):
        assert_close(ours, theirs, TOLERANCE)


def test_attributes_and_isinstance_survive():
    model = tiny()
    model.layer1[0].note = "mine"
    fuse(model)
    assert model.layer1[0].note == "mine"
    assert isinstance(model.layer1[0], resnet.Bottleneck)
    assert isinstance(model, resnet.ResNet)
    assert type(model).__name__ == "ResNet"
    assert repr(model) == repr(tiny())


def test_idempotent(x):
    model = fuse(tiny())
    kinds = [type(m) for m in model.modules()]
    out = model(x)
    assert fuse(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(x), out)


def test_an_added_block_is_swapped_by_the_next_fuse():
    model = fuse(tiny())
    model.layer2.append(resnet.Bottleneck(16, 4))
    assert [(row.name, row.reason) for row in report(model).declined] == [("layer2.1", "not-swapped")]
    assert not report(fuse(model)).declined


def test_unfuse(x):
    """Class identity back, and the bits of PyTorch's model in the same memory format."""
    plain = tiny()
    model = fuse(copy.deepcopy(plain))
    with torch.no_grad():
        model.eval()(x)
    model.train()
    assert unfuse(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [set(vars(m)) for m in model.modules()] == [set(vars(m)) for m in plain.modules()]
    plain.to(memory_format=torch.channels_last)
    ours, theirs = step(model, x), step(plain, x)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert unfuse(model) is model
    assert {row.reason for row in report(model).rows} == {"not-swapped"}


def test_unfuse_our_own_and_back(x):
    torch.manual_seed(0)
    model = models.cifar_resnet(8).double().eval()
    with torch.no_grad():
        before = model(x)
        unfuse(model)
        assert not report(model).fused
        assert_close(model(x), before, TOLERANCE)
        assert_close(fuse(model)(x), before, TOLERANCE)
    assert type(unfuse(on_meta(models.resnet18))) is PlainResNet


def test_sync_batch_norm_before_and_after(x):
    """In one process a SyncBatchNorm is a BatchNorm2d, in training and in eval."""
    plain = tiny()
    before = fuse(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain)), strict=True)
    after = nn.SyncBatchNorm.convert_sync_batchnorm(fuse(copy.deepcopy(plain)))
    for model in (before, after):
        assert type(model.layer1[0].bn1) is nn.SyncBatchNorm
        assert type(model.layer1[0]) is torchvision_adapter.Bottleneck
        assert not report(model).declined
        assert paths_of(model, x) == ["train"] * 4
        assert_same_model(model, copy.deepcopy(plain), x)


def test_nothing_outside_keeps_a_model_alive(x):
    model = fuse(tiny()).eval()
    with torch.no_grad():
        model(x)
    alive = weakref.ref(model), weakref.ref(model.layer1[0]), weakref.ref(model.layer1[0].conv1)
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None, None, None]


# --- arguments ------------------------------------------------------------------------------------------------------


def test_filter(x):
    plain = tiny()
    model = copy.deepcopy(plain)
    asked = []

    def wanted(name: str, module: nn.Module) -> bool:
        asked.append((name, type(module)))
        return name.startswith("layer1")

    fuse(model, filter_fn=wanted, strict=True)
    assert asked == [
        ("", resnet.ResNet),
        *((name, resnet.Bottleneck) for name in ("layer1.0", "layer1.1", "layer2.0")),
    ]
    assert [row.name for row in report(model).fused] == ["layer1.0", "layer1.1"]
    assert [row.name for row in report(model).declined] == ["", "layer2.0"]
    assert type(model) is resnet.ResNet
    assert model.layer2[0].conv1.weight.stride() == plain.layer2[0].conv1.weight.stride()
    assert_same_model(model, plain, x)


def state_of(model: nn.Module) -> list[object]:
    strides = [p.stride() for p in model.parameters()]
    return [(type(m), sorted(vars(m))) for m in model.modules()] + strides


def test_strict_changes_nothing_when_it_raises():
    model = tiny()
    model.layer1[1].relu = nn.GELU()
    model.layer2[0].bn3 = nn.GroupNorm(2, 16)
    before = state_of(model)
    with pytest.raises(ValueError) as caught:
        fuse(model, strict=True)
    assert str(caught.value) == (
        "fuse: expected every chosen block to be fusible, got 2 that are not: "
        "layer1.1: activation GELU is not nn.ReLU; "
        "layer2.0: norm layer GroupNorm is not BatchNorm2d, SyncBatchNorm or FrozenBatchNorm2d"
    )
    assert state_of(model) == before
    fuse(model)
    assert [row.reason for row in report(model).rows] == [None, None, "activation", "norm"]
    assert not model.layer1[1].conv2.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("filter_fn", [None, lambda name, module: False])
def test_strict_wants_a_block(filter_fn):
    model = nn.Linear(2, 2) if filter_fn is None else tiny()
    before = state_of(model)
    with pytest.raises(ValueError) as caught:
        fuse(model, filter_fn=filter_fn, strict=True)
    assert str(caught.value) == (
        "fuse: expected at least one residual block of torchvision, timm or resnet_fused, got none"
    )
    assert state_of(model) == before
    assert fuse(model, filter_fn=filter_fn) is model


@pytest.mark.parametrize("function", [fuse, unfuse, report, explain])
def test_wrong_type(function):
    with pytest.raises(TypeError) as caught:
        function([tiny()])
    assert str(caught.value) == f"{function.__name__}: expected model to be an nn.Module, got list"


def test_scripted_model_is_refused():
    with pytest.raises(TypeError) as caught:
        fuse(torch.jit.script(nn.ReLU()))
    assert str(caught.value) == "fuse: expected model before scripting, got a ScriptModule; fuse first, then script"


def test_unknown_backend_is_refused_first():
    model = tiny()
    before = state_of(model)
    with pytest.raises(ValueError) as caught:
        fuse(model, backend="cudnn")
    assert (
        str(caught.value)
        == "fuse: expected one of auto, cuda, triton, aten, reference, or several with commas, got 'cudnn'"
    )
    assert state_of(model) == before


@pytest.mark.parametrize("memory", ["recomputed", "", None, ["save"]])
def test_unknown_memory_is_refused_first(memory):
    for model in (tiny(), fuse(tiny(), memory="recompute")):
        before = state_of(model)
        with pytest.raises(ValueError) as caught:
            fuse(model, backend="reference", memory=memory)
        assert str(caught.value) == f"fuse: expected memory one of save, projections, recompute, got {memory!r}"
        assert state_of(model) == before


def memory_of(model: nn.Module) -> list[str]:
    return [row.memory for row in report(model).rows]


def test_memory_is_that_of_the_last_fuse():
    model = fuse(tiny(), memory="projections")
    projections = [row.name for row in report(model).rows if row.memory == "projections"]
    assert projections == [name for name, m in model.named_modules() if getattr(m, "downsample", None) is not None]
    fuse(model, memory="recompute")
    assert memory_of(model) == ["save", *["recompute"] * 3]  # a stem has nothing to recompute
    fuse(model, filter_fn=lambda name, module: name == "layer1.1")
    assert memory_of(model) == ["save", "recompute", "save", "recompute"]
    assert memory_of(fuse(model)) == ["save"] * 4
    before = [set(vars(m)) for m in tiny().modules()]
    assert [set(vars(m)) for m in unfuse(fuse(model, memory="recompute")).modules()] == before
    assert memory_of(fuse(model)) == ["save"] * 4


def test_memory_of_our_own_blocks():
    block = resnet_fused.Bottleneck(16, 4)
    assert memory_of(block) == ["save"]
    assert memory_of(fuse(block, memory="recompute")) == ["recompute"]
    assert memory_of(fuse(unfuse(block))) == ["save"]


def test_strict_leaves_memory_alone_when_it_raises():
    model = fuse(tiny(), memory="recompute")
    model.layer1[1].relu = nn.GELU()
    with pytest.raises(ValueError, match="to be fusible, got 1"):
        fuse(model, memory="save", strict=True)
    assert memory_of(model) == ["save", "recompute", "save", "recompute"]  # what is declined recomputes nothing


def test_forced_backend(x, monkeypatch):
    plain = tiny()
    fused = fuse(copy.deepcopy(plain), backend="reference")
    assert {name for row in report(fused).rows for name in row.backends.values()} == {"reference"}
    chosen = []
    choose = resnet_fused.backends.choose
    monkeypatch.setattr(resnet_fused.backends, "choose", lambda *a: chosen.append(choose(*a).backend) or choose(*a))
    assert_same_model(fused, plain, x)
    assert set(chosen) == {"reference"}  # backward too
    with pytest.raises(NotImplementedError, match=r"forced backend cuda supports"):
        fuse(fused, backend="cuda")(x)


# --- report, explain, disabled --------------------------------------------------------------------------------------


def test_report_rows():
    model = fuse(tiny("basic"))
    model.layer2[0].relu = nn.SiLU()
    rows = report(model).to_dict()
    assert [(row["name"], row["kind"], row["status"], row["reason"]) for row in rows] == [
        ("", "stem", "fused", None),
        ("layer1.0", "basic", "fused", None),
        ("layer1.1", "basic", "fused", None),
        ("layer2.0", "basic", "declined", "activation"),
    ]
    assert all(list(row) == ["name", "kind", "status", "reason", "detail", "backends", "memory"] for row in rows)
    assert rows[3]["detail"] == "activation SiLU is not nn.ReLU"
    assert rows[3]["backends"] == {}
    assert rows[0]["backends"].keys() >= {"stem_forward", "stem_infer", "stem_backward"}
    assert rows[1]["backends"].keys() >= {"conv3x3_fprop", "conv3x3_bprop", "bn_add_relu_forward"}
    assert not [op for op in rows[1]["backends"] if op.startswith("conv1x1")]
    assert all(op in resnet_fused.backends.operations() for row in rows for op in row["backends"])
    found = report(model)
    assert [row.name for row in found.fused] == ["", "layer1.0", "layer1.1"]
    assert [row.name for row in found.declined] == ["layer2.0"]


def test_report_is_a_table():
    model = fuse(tiny("basic"), backend="reference", filter_fn=lambda name, module: name != "layer1.1")
    model.layer2[0].relu = nn.SiLU()
    assert str(report(model)) == (
        "name      kind   status    backends   detail\n"
        "--------  -----  --------  ---------  -----------------------------------\n"
        "(model)   stem   fused     reference\n"
        "layer1.0  basic  fused     reference\n"
        "layer1.1  basic  declined             not swapped: call resnet_fused.fuse\n"
        "layer2.0  basic  declined             activation SiLU is not nn.ReLU\n"
        "1 of 3 blocks fused; stem: fused"
    )


def test_report_tells_how_many_recompute():
    model = fuse(tiny("basic"), memory="recompute", filter_fn=lambda name, module: name != "layer1.1")
    fuse(model, filter_fn=lambda name, module: name == "layer1.1")
    assert str(report(model)).splitlines()[-1] == "3 of 3 blocks fused (2 recompute in backward); stem: fused"


def test_explain(x):
    model = fuse(tiny("basic"))
    model.layer1[1].conv1.register_forward_hook(lambda *a: None)
    found = explain(model, x)
    assert [list(row) for row in found.to_dict()] == [["name", "kind", "path", "reason", "detail"]] * 4
    assert [(s.name, s.kind, s.path, s.reason) for s in found.steps] == [
        ("", "stem", "train", None),
        ("layer1.0", "basic", "train", None),
        ("layer1.1", "basic", "original", "hooks"),
        ("layer2.0", "basic", "train", None),
    ]
    assert str(found).splitlines()[4] == (
        "layer1.1  basic  original  hooks   a module inside the block has a hook that only its own call runs"
    )
    with torch.no_grad():
        assert paths_of(model.eval(), x) == ["infer", "infer", "original", "infer"]
    assert str(explain(tiny(), x)) == "no fused block was called"


def test_explain_leaves_no_trace(x):
    model = nn.Sequential(nn.Dropout(0.5), fuse(tiny()))
    buffers = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    explain(model, x)
    assert torch.equal(torch.rand(3), expected)
    versions = [b._version for b in model.eval().buffers()]
    explain(model, x)
    assert [b._version for b in model.buffers()] == versions  # a graph that holds them can still go backward
    model.train()
    assert all(id(b) == buffers[name][0] and torch.equal(b, buffers[name][1]) for name, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        explain(model, x[:1, :, :4, :4])
    assert all(torch.equal(b, buffers[name][1]) for name, b in model.named_buffers())


def test_disabled(x):
    plain = tiny().to(memory_format=torch.channels_last)
    fused = fuse(copy.deepcopy(plain))
    with disabled():
        ours = step(fused, x)
        assert reasons_of(fused, x) == {"disabled"}
        with disabled():
            pass
        assert reasons_of(fused, x) == {"disabled"}
    theirs = step(plain, x)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(KeyError), disabled():
        raise KeyError
    assert reasons_of(fused, x) == {None}


def test_disabled_holds_for_its_own_thread(x):
    model = fuse(tiny())
    found = []
    with disabled():
        thread = threading.Thread(target=lambda: found.append(reasons_of(model, x)))
        thread.start()
        thread.join()
    assert found == [{None}]


# --- what would make a silent difference ----------------------------------------------------------------------------


def test_children_may_change_after_the_swap(x):
    plain = tiny().eval()  # in training the bias of a convolution has no gradient but noise
    fused = fuse(copy.deepcopy(plain))
    step(fused, x), step(plain, x)
    changes = [
        lambda m: setattr(m.layer1[0], "bn2", nn.Identity()),
        lambda m: setattr(m.layer1[1], "relu", nn.ReLU6()),
        lambda m: setattr(m.layer1[1].conv2, "padding_mode", "circular"),
        lambda m: m.layer2[0].downsample.append(nn.Tanh()),
        lambda m: setattr(m, "maxpool", nn.AvgPool2d(3, 2, 1)),
        lambda m: setattr(m.layer2[0].conv3, "bias", nn.Parameter(randn(16))),
    ]
    for change in changes:
        for model in (fused, plain):
            torch.manual_seed(1)
            change(model.train()), model.eval()
        assert_same_step(step(fused, x), step(plain, x), TOLERANCE)
    assert {s.reason for s in explain(fused, x).steps} == {"norm", "activation", "pool", None}


def test_forward_of_one_instance(x):
    """``module.forward = ...``, as accelerate and others do it."""

    def doubled(model: nn.Module) -> nn.Module:
        conv = model.layer1[1].conv2
        original = conv.forward
        conv.forward = lambda x: 2 * original(x)
        norm = model.bn1
        scaled = norm.forward
        norm.forward = lambda x: 1.5 * scaled(x)
        return model

    plain, fused = doubled(tiny()), doubled(fuse(tiny()))
    assert [s.reason for s in explain(fused, x).steps] == ["hooks", None, "hooks", None]
    assert_same_step(step(fused, x), step(plain, x), TOLERANCE)


@pytest.mark.parametrize("where", ["conv1", "bn1", "relu", "downsample", "stem"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_inner_modules_run(where, kind, x):
    found = []
    for swap in (False, True):
        model = tiny()
        if swap:
            fuse(model)
        module = model.bn1 if where == "stem" else getattr(model.layer1[0], where)
        calls = []
        register = getattr(module, f"register_{kind}_hook")
        if kind == "forward":
            register(lambda m, args, out, calls=calls: calls.append(1) or out * 1.25)
        elif kind == "forward_pre":
            register(lambda m, args, calls=calls: calls.append(1) or args[0] * 1.25)
        elif kind == "full_backward":
            register(lambda m, gi, go, calls=calls: calls.append(1) or tuple(g * 1.25 for g in gi))
        else:
            register(lambda m, go, calls=calls: calls.append(1) or tuple(g * 1.25 for g in go))
        # In-place ReLU and full backward hooks exclude one another in PyTorch too.
        for m in model.modules():
            if isinstance(m, nn.ReLU):
                m.inplace = False
        found.append((step(model, x), len(calls)))
    assert found[1][1] == found[0][1] > 0
    assert_same_step(found[1][0], found[0][0], TOLERANCE)


def test_a_global_hook_sees_every_module(x):
    model = fuse(tiny())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m)))
    try:
        model(x)
        assert reasons_of(model, x) == {"hooks"}
    finally:
        handle.remove()
    assert seen.count(nn.Conv2d) >= 12
    assert reasons_of(model, x) == {None}


def test_timm_adapter_covers_subclasses_by_name_only():
    assert set(timm_adapter.FUSED) == {
        timm.models.resnet.BasicBlock,
        timm.models.resnet.Bottleneck,
        timm.models.resnet.ResNet,
    }


def test_fuse_leaves_shared_and_partial_storages_alone():
    model = resnet.resnet18(num_classes=4)
    model.conv1.weight.share_memory_()
    weight = model.layer1[0].conv1.weight
    flat = torch.zeros(2 * weight.numel())
    weight.data = flat[: weight.numel()].view_as(weight)
    resnet_fused.fuse(model)
    flat.fill_(3.0)
    assert model.conv1.weight.is_shared()
    assert torch.equal(weight, torch.full_like(weight, 3.0))


def test_another_backend_takes_effect_at_once():
    model = resnet_fused.fuse(resnet.resnet18(num_classes=4)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model(x)
        resnet_fused.fuse(model, backend="cuda")
        with pytest.raises(NotImplementedError, match="forced backend cuda"):
            model(x)


@pytest.mark.parametrize("function", ["refresh", "unfuse", "report"])
def test_a_module_is_expected(function):
    with pytest.raises(TypeError, match=f"{function}: expected model to be an nn.Module, got int"):
        getattr(resnet_fused, function)(3)
