"""What people do with PyTorch models, done with fused ones: copies, averages, timm's interface."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from ecosystem import TOLERANCE, pair, same_inference
from helpers import assert_close, assert_same_buffers, assert_same_step, randn, step
from networks import paths_of, randomise, tiny, tiny_timm
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from resnet_fused import fuse


@pytest.fixture
def x() -> torch.Tensor:
    return randn(2, 3, 32, 32)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


# --- copies ---------------------------------------------------------------------------------------------------------


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("build", [tiny, tiny_timm], ids=["torchvision", "timm"])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved], ids=["deepcopy", "pickle", "save"]
)
def test_copies(build, how, x):
    plain = build().eval()
    fused = fuse(copy.deepcopy(plain))
    size = len(pickle.dumps(fused))
    same_inference(fused, plain, x)  # whatever this call keeps must neither be copied nor shared
    assert len(pickle.dumps(fused)) == size
    twin = how(fused)
    assert [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()]
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.9)
    same_inference(fused, plain, x)
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(0.9)
    same_inference(twin, plain, x)
    assert_same_step(step(twin.train(), x), step(plain.train(), x), TOLERANCE)


def test_load_in_a_fresh_process(tmp_path, x):
    """``torch.load`` of a whole model imports what it needs by itself."""
    fused, plain = pair()
    fused.eval(), plain.eval()
    same_inference(fused, plain, x)
    torch.save({"model": fused, "x": x, "y": plain(x).detach()}, tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "assert 'resnet_fused' not in sys.modules\n"
        "found = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): out = found['model'](found['x'])\n"
        "assert (out - found['y']).abs().max() < 1e-10\n"
        "from resnet_fused import explain\n"
        "with torch.no_grad(): assert {s.path for s in explain(found['model'], found['x']).steps} == {'infer'}\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model.pt")], check=True, timeout=120)


def test_weights_only_state_dict(tmp_path, x):
    fused, plain = pair()
    torch.save(fused.state_dict(), tmp_path / "state.pt")
    other = tiny()
    randomise(other, seed=90)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    same_inference(other.eval(), plain.eval(), x)


@pytest.mark.parametrize("how", ["swa", "ema"])
def test_averaged_model(how, x):
    averaged, results = [], []
    for model in pair():
        average = AveragedModel(model, **({"multi_avg_fn": get_ema_multi_avg_fn(0.9)} if how == "ema" else {}))
        averaged.append(average)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for i in range(3):
            optimizer.zero_grad()
            model(x + i).square().sum().backward()
            optimizer.step()
            average.update_parameters(model)
            with torch.no_grad():
                results.append(average.eval()(x) if i == 0 else average(x))  # no eval() after the later updates
        update_bn([x, x + 1], average)
        with torch.no_grad():
            results.append(average.eval()(x))
    for ours, theirs in zip(results[:4], results[4:], strict=True):
        assert_close(ours, theirs, TOLERANCE)
    assert_same_buffers(*averaged, TOLERANCE)
    assert paths_of(averaged[0], x) == ["train"] * 4


# --- timm -------------------------------------------------------------------------------------------------------------


def test_timm_features_only(x):
    torch.manual_seed(0)
    plain = timm.create_model("resnet18", features_only=True, out_indices=(1, 2)).double().eval()
    fused = fuse(copy.deepcopy(plain))
    with torch.no_grad():
        assert paths_of(fused, x) == ["infer"] * 4  # of a feature list the stem is none of the network's own
        for ours, theirs in zip(fused(x), plain(x), strict=True):
            assert_close(ours, theirs, TOLERANCE)


def test_timm_forward_intermediates_and_friends(x):
    plain = tiny_timm().eval()
    fused = fuse(copy.deepcopy(plain))
    with torch.no_grad():
        (last, found), (exact_last, exact) = (m.forward_intermediates(x) for m in (fused, plain))
        for ours, theirs in zip([last, *found], [exact_last, *exact], strict=True):
            assert_close(ours, theirs, TOLERANCE)
        assert_close(
            fused.forward_head(fused.forward_features(x), pre_logits=True),
            plain.forward_head(exact_last, pre_logits=True),
            TOLERANCE,
        )
    for model in (fused, plain):
        model.reset_classifier(7)
        torch.manual_seed(0)
        nn.init.normal_(model.get_classifier().double().weight)
        nn.init.zeros_(model.get_classifier().bias)
    same_inference(fused, plain, x)


def test_timm_gradient_checkpointing(x):
    plain = tiny_timm()
    fused = fuse(copy.deepcopy(plain))
    for model in (fused, plain):
        model.set_grad_checkpointing()
    assert_same_step(step(fused, x), step(plain, x), TOLERANCE)
