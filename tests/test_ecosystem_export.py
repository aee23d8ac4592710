"""Fused models exported, scripted and traced: programs of PyTorch's own operators."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy
import onnx
import onnxruntime
import pytest
import torch
from ecosystem import TOLERANCE, pair, same_inference
from helpers import assert_close, assert_same_buffers, assert_same_step, error, randn, step
from networks import paths_of, randomise, tiny, tiny_timm
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.feature_extraction import create_feature_extractor

from resnet_fused import fuse


@pytest.fixture
def x() -> torch.Tensor:
    return randn(2, 3, 32, 32)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(train, strict, tmp_path):
    """A program of PyTorch's own operators, which runs where this package is not installed."""
    fused, plain = pair()
    fused.train(train), plain.train(train)
    y = randn(4, 3, 32, 32)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(fused, (y[:3],), dynamic_shapes=({0: batch},), strict=strict)
    kinds = {str(node.target).partition(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert kinds == {"aten"}
    ours = program.module()
    assert_close(ours(y), plain(y), TOLERANCE)
    if train:
        return
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save((y, plain(y).detach()), tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "x, y = torch.load(sys.argv[2])\n"
        "assert (torch.export.load(sys.argv[1]).module()(x) - y).abs().max() < 1e-10\n"
        "assert 'resnet_fused' not in sys.modules\n"
    )
    if not strict:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            code,
            str(tmp_path / "model.pt2"),
            str(tmp_path / "expected.pt"),
        ]
        subprocess.run(command, check=True, timeout=120)


def test_trained_export_is_torchs(x):
    """Gradients and running statistics of the exported training program."""
    fused, plain = pair()
    program = torch.export.export(fused, (x,)).module()
    assert_same_step(step(program, x), step(plain, x), TOLERANCE)
    assert_same_buffers(program, plain, TOLERANCE)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("build", [tiny, tiny_timm], ids=["torchvision", "timm"])
@pytest.mark.filterwarnings("ignore")
def test_onnx(dynamo, build, tmp_path):
    plain = build(dtype=torch.float32).eval()
    fused = fuse(copy.deepcopy(plain))
    y = randn(2, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        fused(y)
    torch.onnx.export(
        fused, (y,), tmp_path / "model.onnx", dynamo=dynamo, input_names=["x"], output_names=["y"], verbose=False
    )
    stored = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(stored)
    assert {node.domain for node in stored.graph.node} <= {"", "ai.onnx"}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {"x": numpy.asarray(y)})
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(y.double())
        assert_close(torch.from_numpy(out), exact, 2 * error(plain(y), exact) + 1e-5)


# --- script, trace, fx ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny, lambda: tiny("basic"), tiny_timm], ids=["bottleneck", "basic", "timm"])
@pytest.mark.parametrize(
    "how", [torch.jit.script, lambda m: torch.jit.trace(m, randn(2, 3, 32, 32))], ids=["script", "trace"]
)
@pytest.mark.filterwarnings("ignore")
def test_torchscript(build, how, x, tmp_path):
    plain = build().eval()
    fused = fuse(copy.deepcopy(plain))
    same_inference(fused, plain, x)
    other = how(fused)
    same_inference(other, plain, x)
    assert "resnet_fused::" not in str(other.graph)
    other.save(tmp_path / "model.ts")
    same_inference(torch.jit.load(tmp_path / "model.ts"), plain, x)


@pytest.mark.filterwarnings("ignore")
def test_scripted_training(x):
    fused, plain = pair()
    scripted = torch.jit.script(fused)
    assert_same_step(step(scripted, x), step(plain, x), TOLERANCE)
    assert_same_buffers(fused, plain, TOLERANCE)


@pytest.mark.filterwarnings("ignore")
def test_scripted_backbone(x):
    plain = randomise(resnet_fpn_backbone(backbone_name="resnet18", weights=None)).double().eval()
    scripted = torch.jit.script(fuse(copy.deepcopy(plain)))
    with torch.no_grad():
        ours, theirs = scripted(x), plain(x)
    assert list(ours) == list(theirs)
    for name, exact in theirs.items():
        assert_close(ours[name], exact, TOLERANCE, name)


def test_fx_sees_the_original_modules(x):
    fused, plain = pair()
    ours, theirs = torch.fx.symbolic_trace(fused), torch.fx.symbolic_trace(plain)
    assert [str(node.target) for node in ours.graph.nodes] == [str(node.target) for node in theirs.graph.nodes]
    assert_same_step(step(ours, x), step(plain, x), TOLERANCE)


def test_feature_extractor(x):
    fused, plain = pair()
    fused.eval(), plain.eval()
    wanted = ["relu", "layer1.0", "layer1.1.relu_1", "layer2"]
    theirs = create_feature_extractor(plain, wanted)(x)
    ours = create_feature_extractor(fused, wanted)(x)
    assert list(ours) == list(theirs)
    for name, exact in theirs.items():
        assert_close(ours[name], exact, TOLERANCE, name)


def test_feature_extractor_with_fused_blocks(x):
    """Blocks that are leaves of the trace stay fused."""
    fused, plain = pair()
    fused.eval(), plain.eval()
    leaves = {"leaf_modules": [type(fused.layer1[0])]}
    extractor = create_feature_extractor(fused, ["layer1", "layer2"], tracer_kwargs=leaves)
    theirs = create_feature_extractor(plain, ["layer1", "layer2"])(x)
    with torch.no_grad():
        assert paths_of(extractor, x) == ["infer"] * 3
        for name, found in extractor(x).items():
            assert_close(found, theirs[name], TOLERANCE, name)
