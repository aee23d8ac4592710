"""Fused models under torch.compile."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from ecosystem import FUSED_OPS, TOLERANCE, pair, same_inference, short_pair
from helpers import assert_close, assert_same_buffers, assert_same_step, randn, step
from networks import randomise, tiny_timm
from torch import nn
from torch._dynamo.testing import CompileCounter, EagerAndRecordGraphs
from torchvision.models import resnet

import resnet_fused
from resnet_fused import disabled, fuse, models, unfuse


@pytest.fixture
def x() -> torch.Tensor:
    return randn(2, 3, 32, 32)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("kind", "dynamic"), [("basic", False), ("bottleneck", False), ("bottleneck", True)])
def test_compile(kind, dynamic):
    fused, plain = short_pair(kind) if dynamic else pair(kind)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in ((2, 3, 32, 32), (3, 3, 40, 48)) if dynamic else ((2, 3, 32, 32),):
        y = randn(*shape)
        ours = step(compiled, y)
        assert_same_step({k.removeprefix("_orig_mod."): v for k, v in ours.items()}, step(plain, y), TOLERANCE)
    assert_same_buffers(fused, plain, TOLERANCE)
    same_inference(compiled.eval(), plain.eval(), y)


@pytest.mark.parametrize(
    "build", [tiny_timm, lambda: randomise(models.cifar_resnet(8, num_classes=5)).double()], ids=["timm", "cifar"]
)
def test_compile_of_other_models(build, x):
    plain = unfuse(build())
    fused = fuse(copy.deepcopy(plain))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    ours = step(compiled, x)
    assert_same_step({k.removeprefix("_orig_mod."): v for k, v in ours.items()}, step(plain, x), TOLERANCE)
    assert_same_buffers(fused, plain, TOLERANCE)


def test_inductor(x):
    fused, plain = short_pair("basic")
    compiled = torch.compile(fused, fullgraph=True)
    ours = step(compiled, x)
    assert_same_step({k.removeprefix("_orig_mod."): v for k, v in ours.items()}, step(plain, x), TOLERANCE)
    assert_same_buffers(fused, plain, TOLERANCE)
    same_inference(compiled.eval(), plain.eval(), x)


def graph_ops(model: nn.Module, *args) -> str:
    """The code of the graphs that torch.compile makes of a call."""
    backend = EagerAndRecordGraphs()
    torch.compile(model, backend=backend, fullgraph=True)(*args)
    return "\n".join(graph.code for graph in backend.graphs)


def test_compiled_inference_holds_the_fused_ops(x):
    fused, _ = short_pair()
    with torch.no_grad():
        code = graph_ops(fused.eval(), x)
    for op in ("conv1x1_infer", "conv3x3_infer", "stem_infer"):
        assert f"{FUSED_OPS}.{op}" in code
    assert "batch_norm" not in code


def test_compile_heeds_disabled_on_every_call(x):
    fused, plain = short_pair()
    backend = EagerAndRecordGraphs()
    compiled = torch.compile(fused.eval(), backend=backend, fullgraph=True)
    with torch.no_grad():
        for context in (disabled(), nullcontext(), disabled()):
            with context:
                assert_close(compiled(x), plain.eval()(x), TOLERANCE)
        assert [FUSED_OPS in graph.code for graph in backend.graphs] == [False, True]


def test_compile_heeds_hooks_and_swaps(x):
    fused, plain = short_pair()
    fused.eval(), plain.eval()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    same_inference(compiled, plain, x)
    for model in (fused, plain):
        model.layer1[0].bn2.register_forward_hook(lambda m, args, out: out * 1.5)
    torch._dynamo.reset()  # PyTorch does not guard on hooks either
    same_inference(compiled, plain, x)
    unfuse(fused)
    same_inference(compiled, plain, x)
    fuse(fused)
    same_inference(compiled, plain, x)


def test_compile_compiles_as_often_as_the_original():
    counts = []
    for model in short_pair("basic"):
        count = CompileCounter()
        compiled = torch.compile(model, backend=count, fullgraph=True)
        seen = []
        for n in (2, 3, 4):
            compiled(randn(n, 3, 32, 32))
            seen.append(count.frame_count)
        model.eval()
        with torch.no_grad():
            for n, size in ((2, 32), (3, 32), (4, 64), (2, 96)):
                compiled(randn(n, 3, size, size))
                seen.append(count.frame_count)
        counts.append(seen)
        torch._dynamo.reset()
    assert all(ours <= theirs for ours, theirs in zip(*counts, strict=True)), counts


def test_compile_block_by_block():
    """Regional compilation: equal blocks share their code, as the original's do."""
    counts = []
    plain = nn.Sequential(*(resnet.BasicBlock(4, 4) for _ in range(4)))
    for model in (fuse(copy.deepcopy(plain)), plain):
        count = CompileCounter()
        for block in model.modules():
            if isinstance(block, resnet.BasicBlock):
                block.compile(backend=count, fullgraph=True)
        model(randn(2, 4, 8, 8, dtype=torch.float32))
        counts.append(count.frame_count)
        torch._dynamo.reset()
    assert counts[0] <= counts[1]


def test_explain_of_a_compiled_model(x):
    fused, _ = pair()
    compiled = torch.compile(fused, backend="eager")
    compiled(x)
    found = resnet_fused.explain(compiled, x)
    assert [(s.name, s.path) for s in found.steps] == [
        ("_orig_mod", "train"),
        ("_orig_mod.layer1.0", "train"),
        ("_orig_mod.layer1.1", "train"),
        ("_orig_mod.layer2.0", "train"),
    ]
