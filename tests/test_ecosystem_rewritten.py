"""Fused models with tensors and modules that are not plain ones."""

from __future__ import annotations

import copy

import pytest
import torch
from ecosystem import TOLERANCE, pair, same_inference
from helpers import assert_close, assert_same_step, randn, step
from networks import paths_of, reasons_of, tiny
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet

import resnet_fused
from resnet_fused import fuse


@pytest.fixture
def x() -> torch.Tensor:
    return randn(2, 3, 32, 32)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


# --- tensors that are not plain ---------------------------------------------------------------------------------------


def test_tensor_subclass_of_the_input(x):
    fused, plain = (m.eval() for m in pair())
    y = TwoTensor(x, 2 * x)
    with torch.no_grad():
        ours = fused(y)
        assert_close(ours.a, plain(x), TOLERANCE)
        assert_close(ours.b, plain(2 * x), TOLERANCE)
        assert reasons_of(fused, y) == {"subclass"}


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("which", ["conv2.weight", "bn2.weight"])
def test_tensor_subclass_of_a_parameter(which, train, x):
    """A subclass that changes what an operator does is asked."""

    class Doubling(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            out = super().__torch_function__(func, types, args, kwargs)
            if func in (torch.conv2d, nn.functional.batch_norm):
                return out.as_subclass(torch.Tensor) * 2
            return out

    found = []
    for model in pair():
        module = model.train(train).layer1[0].get_submodule(which.split(".")[0])
        module.weight = nn.Parameter(module.weight.detach().as_subclass(Doubling))
        assert type(module.weight) is Doubling
        with torch.no_grad():
            found.append(model(x))
    assert_close(*found, TOLERANCE)


def test_fake_tensors(x):
    with FakeTensorMode():
        for train in (True, False):
            plain = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5).train(train)
            fused = fuse(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)).train(train)
            y = torch.empty(2, 3, 32, 32)
            out, expected = fused(y), plain(y)
            assert (out.shape, out.dtype, out.stride()) == (expected.shape, expected.dtype, expected.stride())
            out.sum().backward()
            assert all(p.grad.shape == p.shape for p in fused.parameters())
            with torch.no_grad():
                assert fused(y).shape == (2, plain.fc.out_features)
    fused, plain = (m.eval() for m in pair())
    with torch.no_grad():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            assert fused(mode.from_tensor(x)).shape == (2, 5)
    same_inference(fused, plain, x)  # nothing fake was kept


def test_meta_device(x):
    model = fuse(tiny().to("meta"))
    y = x.to("meta")
    assert model(y).shape == (2, 5)
    assert reasons_of(model, y) == {"device"}
    model.to_empty(device="cpu").load_state_dict(tiny().state_dict())
    model.eval()
    same_inference(model, tiny().eval(), x)
    with torch.no_grad():
        assert paths_of(model, x) == ["infer"] * 4


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_flop_counter(train, x):
    counts = []
    for model in pair():
        model.train(train)
        with FlopCounterMode(display=False) as counter:
            out = model(x)
            if train:
                out.sum().backward()
        counts.append(counter.get_flop_counts())
    assert counts[0] == counts[1]  # module by module
    assert counts[0]["Global"]


@pytest.mark.parametrize("layout", ["weights", "input", "both", "neither"])
@pytest.mark.parametrize("grad", [True, False])
def test_memory_format_is_as_eagers(layout, grad, x):
    plain = resnet.BasicBlock(3, 3).double()
    fused = fuse(nn.ModuleList([copy.deepcopy(plain)]))[0]
    for model in (fused, plain):
        model.to(memory_format=torch.channels_last if layout in ("weights", "both") else torch.contiguous_format)
    y = x.to(memory_format=torch.channels_last if layout in ("input", "both") else torch.contiguous_format)
    with torch.set_grad_enabled(grad):
        for train in (True, False):
            ours, theirs = (m.train(train)(y) for m in (fused, plain))
            assert ours.stride() == theirs.stride()
            assert_close(ours, theirs, TOLERANCE)


# --- modules that are not plain ---------------------------------------------------------------------------------------


def _hooked_weight_norm(module: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module)


class Halve(nn.Module):
    def forward(self, w):
        return w / 2


REWRITES = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": _hooked_weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", Halve()),
    "prune": lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
}


@pytest.mark.parametrize("first", ["rewritten, then fused", "fused, then rewritten"])
@pytest.mark.parametrize("name", REWRITES)
def test_rewritten_weights(name, first, x):
    found = []
    for swap in (True, False):
        model = tiny()
        if swap and first.startswith("fused"):
            fuse(model)
        model.to(memory_format=torch.contiguous_format)  # torch's pruning takes no other
        for conv in (model.conv1, model.layer1[1].conv2):
            torch.manual_seed(1)
            REWRITES[name](conv)
        if swap and first.startswith("rewritten"):
            fuse(model)
        found.append(model)
    fused, plain = found
    assert_same_step(step(fused, x), step(plain, x), 1e-8)
    assert paths_of(fused, x)[2] == "original"
    assert paths_of(fused, x)[1] == "train"
    same_inference(fused.eval(), plain.eval(), x)
    if name == "prune":
        for model in found:
            prune.remove(model.layer1[1].conv2, "weight")
        assert_same_step(step(fused, x), step(plain, x), TOLERANCE)
        assert paths_of(fused, x)[2] == "train"


def test_fused_conv_bn_of_torch(x):
    """Folding done beforehand by torch's own tool: a convolution with a bias, an Identity for a norm."""
    fused, plain = (m.eval() for m in pair())
    for model in (fused, plain):
        block = model.layer1[1]
        block.conv1 = nn.utils.fusion.fuse_conv_bn_eval(block.conv1, block.bn1)
        block.bn1 = nn.Identity()
    same_inference(fused, plain, x)
    with torch.no_grad():
        assert [s.reason for s in resnet_fused.explain(fused, x).steps][2] in ("conv", "norm")


def test_quantised_weights_are_declined(x):
    model = fuse(tiny(dtype=torch.float32)).eval()
    block = model.layer1[1]
    block.conv1 = torch.ao.nn.quantized.Conv2d(16, 4, 1, bias=False)
    with torch.no_grad():
        assert resnet_fused.report(model).rows[2].reason == "conv"


def test_errors_are_torchs(x):
    """What PyTorch refuses is refused with PyTorch's sentence, and no statistics have moved."""
    fused, plain = pair()
    for y in (x[:, :2], x.float(), x[0, 0], x.long(), randn(1, 3, 1, 1), randn(0, 3, 32, 32)[:, :2]):
        messages = []
        for model in (fused, plain):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                model(y)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    block, plain_block = fused.layer1[1], plain.layer1[1]
    before = {name: b.clone() for name, b in block.named_buffers()}
    for y in (
        randn(1, 16, 1, 1),
        randn(2, 15, 4, 4),
        randn(2, 16, 4, 4, dtype=torch.float32),
        randn(16, 4, 4),
        randn(2, 16),
    ):
        messages = []
        for model in (block, plain_block):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                model(y)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    assert all(torch.equal(b, before[name]) for name, b in block.named_buffers() if name.startswith("bn1"))
