"""What people do with PyTorch models, done with fused ones and compared with PyTorch's result on an unfused copy."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from contextlib import nullcontext

import numpy
import onnx
import onnxruntime
import pytest
import timm
import torch
from helpers import assert_close, assert_same_buffers, assert_same_step, error, randn, step
from networks import paths_of, randomise, reasons_of, tiny, tiny_timm
from torch import nn
from torch._dynamo.testing import CompileCounter, EagerAndRecordGraphs
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.feature_extraction import create_feature_extractor

import resnet_fused
from resnet_fused import disabled, fuse, models, unfuse

TOLERANCE = 1e-10  # fp64
FUSED_OPS = "torch.ops.resnet_fused"


@pytest.fixture
def x() -> torch.Tensor:
    return randn(2, 3, 32, 32)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


def pair(kind: str = "bottleneck", **options) -> tuple[nn.Module, nn.Module]:
    """(fused, plain) with the same state."""
    plain = tiny(kind, **options)
    return fuse(copy.deepcopy(plain)), plain


def short_pair(kind: str = "bottleneck") -> tuple[nn.Module, nn.Module]:
    """(fused, plain) of the stem and one block: compiling takes its time."""
    plain = tiny(kind)
    plain.layer1, plain.layer2 = nn.Sequential(plain.layer1[0]), nn.Sequential()
    if kind == "basic":
        plain.fc = nn.Linear(4, 5).double()
    return fuse(copy.deepcopy(plain)), plain


def same_inference(ours, theirs, x: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    with torch.no_grad():
        assert_close(ours(x), theirs(x), tolerance)


def refreshed(model: nn.Module, x: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """What the model computes without gradients now is what its original modules compute now."""
    with torch.no_grad():
        ours = model(x)
        with disabled():
            assert_close(ours, model(x), tolerance)
        assert set(paths_of(model, x)) == {"infer"}  # last: explain() runs on copies of the buffers


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


# --- what inference keeps is made anew --------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd-for-loop": lambda p: torch.optim.SGD(p, lr=0.05, foreach=False),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.05, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_of_an_optimizer_step_are_used(name, x):
    """Fine-tuning in eval mode, looked at without gradients between the steps."""
    fused, _ = pair()
    fused.eval()
    optimizer = OPTIMIZERS[name](fused.parameters())
    refreshed(fused, x)
    for _ in range(2):
        loss = fused(x).square().mean()
        refreshed(fused, x)  # between forward and step
        loss.backward()
        with torch.no_grad():
            before = fused(x)
        optimizer.step()
        with torch.no_grad():
            assert error(fused(x), before) > 1e-4
        refreshed(fused, x)


def _swap_storages(model: nn.Module) -> None:
    """Give each parameter other storage, at the old one's address if the allocator hands that out again."""
    for p in model.parameters():
        shape, address = p.shape, p.data_ptr()
        p.data = torch.empty(0, dtype=p.dtype)
        offered = [torch.full(shape, 0.1, dtype=p.dtype) for _ in range(64)]
        p.data = next((t for t in offered if t.data_ptr() == address), offered[0])


CHANGES = {
    "load_state_dict": lambda m: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}),
    "load_state_dict-assign": lambda m: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}, assign=True),
    "in-place": lambda m: [p.mul_(0.5) for p in m.parameters()],
    "detached": lambda m: [p.detach().mul_(0.5) for p in m.parameters()],
    "foreach": lambda m: torch._foreach_mul_(list(m.parameters()), 0.5),
    "running statistics": lambda m: [b.mul_(2) for n, b in m.named_buffers() if n.endswith("running_var")],
    "data": _swap_storages,
    "new parameter": lambda m: setattr(m.layer1[0].conv2, "weight", nn.Parameter(randn(4, 4, 3, 3, seed=8))),
    "new norm": lambda m: setattr(m.layer1[0], "bn2", randomise(nn.BatchNorm2d(4).double(), seed=8).eval()),
    "new convolution": lambda m: setattr(m.layer1[0], "conv2", nn.Conv2d(4, 4, 3, 1, 1, bias=False).double()),
    "eps": lambda m: [setattr(n, "eps", 0.1) for n in m.modules() if isinstance(n, nn.BatchNorm2d)],
    "stride": lambda m: (
        [setattr(b, "stride", (2, 2)) for b in (m.layer2[0].conv1, m.layer2[0].downsample[0])]
        and setattr(m.layer2[0].conv2, "stride", (1, 1))
    ),
    "train a batch, then eval": lambda m: (m.train()(randn(2, 3, 32, 32, seed=4)), m.eval()),
    "copy through data, then eval": lambda m: [p.data.mul_(0.5) for p in m.parameters()] and m.eval(),
    "optimizer under compile": lambda m: _compiled_step(m),
}


def _compiled_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    with torch.enable_grad():
        model(randn(2, 3, 32, 32, seed=4)).square().mean().backward()
    torch.compile(optimizer.step, backend="eager")()


@pytest.mark.parametrize("change", CHANGES)
def test_inference_follows_a_change(change, x):
    """Seen at once, without a call of eval() unless the name says so."""
    fused, _ = pair()
    fused.eval()
    refreshed(fused, x)
    with torch.no_grad():
        before = fused(x)
        CHANGES[change](fused)
        after = fused(x)
        assert error(after, before) > 1e-4
        with disabled():
            assert_close(after, fused(x), TOLERANCE)
    refreshed(fused, x)


def test_checkpoint_of_another_dtype(x):
    fused, plain = pair()
    fused.eval(), plain.eval()
    for dtype, tolerance in (
        (torch.float32, 1e-4),
        (torch.bfloat16, 0.1),
        (torch.float32, 0.02),
        (torch.float64, 0.02),
    ):
        fused.to(dtype)
        with torch.no_grad():
            out = fused(x.to(dtype))
        assert out.dtype == dtype
        with torch.no_grad():
            assert_close(out, plain(x), tolerance)
        refreshed(fused, x.to(dtype), 0.1 if dtype == torch.bfloat16 else 1e-4 if dtype == torch.float32 else TOLERANCE)


def test_reloaded_after_folding(x):
    """Statistics and weights of a checkpoint that is loaded into a model that has been used for inference."""
    fused, _ = pair()
    other = randomise(tiny(), seed=40).eval()
    fused.eval()
    with torch.no_grad():
        fused(x)
    fused.load_state_dict(other.state_dict())
    same_inference(fused, other, x)


def test_inference_mode(x):
    fused, plain = pair()
    fused.eval(), plain.eval()
    with torch.inference_mode():
        assert_close(fused(x), plain(x), TOLERANCE)
        assert paths_of(fused, x) == ["infer"] * 4
    assert_same_step(step(fused, x), step(plain, x), TOLERANCE)  # nothing that was kept is an inference tensor
    with torch.inference_mode():  # a model made of inference tensors, which have no versions
        made, theirs = fuse(tiny()).eval(), tiny().eval()
        assert_close(made(x), theirs(x), TOLERANCE)
        for model in (made, theirs):
            for p in model.parameters():
                p.mul_(0.5)
        assert_close(made(x), theirs(x), TOLERANCE)
    with torch.no_grad():
        assert_close(made(x), theirs(x), TOLERANCE)
    with torch.inference_mode():
        moved = fuse(tiny(dtype=torch.float32)).double().eval()
        assert_close(moved(x), tiny(dtype=torch.float32).double().eval()(x), TOLERANCE)


def test_threads(x):
    """Several threads share one model; the first calls race for what is kept."""
    fused, plain = pair()
    fused.eval(), plain.eval()
    inputs = [x + i for i in range(4)]
    found: list[torch.Tensor | None] = [None] * 4
    barrier = threading.Barrier(4)

    def work(i: int) -> None:
        with torch.no_grad():
            barrier.wait()
            for _ in range(5):
                found[i] = fused(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    with torch.no_grad():
        for out, y in zip(found, inputs, strict=True):
            assert_close(out, plain(y), TOLERANCE)


# --- torch.compile ----------------------------------------------------------------------------------------------------


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


# --- autograd ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, x):
    """Same gradients; the same statistics too where PyTorch runs the whole of the second forward.

    PyTorch's early stop ends the recomputation at the last tensor that backward needs. Ours is reached before the last
    block's statistics are touched a second time (a known side effect of checkpointing), so that is left out.
    """

    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            x = self.inner.maxpool(self.inner.relu(self.inner.bn1(self.inner.conv1(x))))
            x = checkpoint(self.inner.layer1, x, use_reentrant=reentrant)
            x = checkpoint(self.inner.layer2, x, use_reentrant=reentrant)
            return self.inner.fc(torch.flatten(self.inner.avgpool(x), 1))

    for early in (False, True):
        ours, theirs = (Checkpointed(m) for m in pair())
        with set_checkpoint_early_stop(early):
            assert_same_step(step(ours, x), step(theirs, x), TOLERANCE)
        if reentrant or not early:
            assert_same_buffers(ours, theirs, TOLERANCE)
            assert ours.inner.layer1[0].bn1.num_batches_tracked == 2
        else:
            assert ours.inner.layer1[1].bn1.num_batches_tracked == 1


def test_functional_call(x):
    fused, plain = pair()
    other = {name: (p.detach() * 0.9).requires_grad_() for name, p in plain.named_parameters()}
    found = []
    for model in (fused, plain):
        inputs = {name: p.detach().clone().requires_grad_() for name, p in other.items()}
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        out = torch.func.functional_call(model, {**inputs, **buffers}, (x,))
        gradients = torch.autograd.grad(out.square().sum(), list(inputs.values()))
        found.append(
            {
                "out": out,
                **dict(zip(inputs, gradients, strict=True)),
                **{k: b for k, b in buffers.items() if b.is_floating_point()},
            }
        )
    assert_same_step(*found, TOLERANCE)
    assert_same_buffers(fused, plain, 0.0)  # their own statistics have not moved
    fused.eval(), plain.eval()
    with torch.no_grad():
        fused(x)
        ours, theirs = (torch.func.functional_call(m, other, (x,)) for m in (fused, plain))
    assert_close(ours, theirs, TOLERANCE)
    same_inference(fused, plain, x)


def transforms() -> dict[str, object]:
    def loss(model, parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    def parameters_of(model):
        return {name: p.detach() for name, p in model.named_parameters()}

    return {
        "grad": lambda m, x: torch.func.grad(lambda p: loss(m, p, x))(parameters_of(m)),
        "per-sample": lambda m, x: torch.func.vmap(
            lambda p, y: torch.func.grad(lambda q: loss(m, q, y[None]))(p), in_dims=(None, 0)
        )(parameters_of(m), x),
        "vmap": lambda m, x: torch.func.vmap(m)(x[:, None]),
        "jvp": lambda m, x: torch.func.jvp(m, (x,), (torch.ones_like(x),)),
        "vjp": lambda m, x: torch.func.vjp(m, x)[1](torch.ones(2, 5, dtype=x.dtype)),
        "jacrev": lambda m, x: torch.func.jacrev(m)(x),
        "jacfwd-of-jvp": lambda m, x: torch.func.jvp(
            torch.func.grad(lambda y: m(y).sum()), (x,), (torch.ones_like(x),)
        ),
        "ensemble": lambda m, x: torch.func.vmap(
            lambda s, y: torch.func.functional_call(m, s, (y,)), in_dims=(0, None)
        )(
            {
                k: torch.stack([v, v * 1.1])
                for k, v in {**parameters_of(m), **dict(m.named_buffers())}.items()
                if v.is_floating_point()
            },
            x,
        ),
    }


def flattened(result: object) -> dict[str, torch.Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(result)
    return {str(i): leaf for i, leaf in enumerate(leaves)}


@pytest.mark.parametrize("name", transforms())
def test_function_transforms(name, x):
    fused, plain = (m.eval() for m in pair())
    transform = transforms()[name]
    assert_same_step(flattened(transform(fused, x)), flattened(transform(plain, x)), TOLERANCE)


@pytest.mark.parametrize(
    "name", ["grad", "vmap"]
)  # PyTorch 2.14 does not always compile a jvp, of its own model either
def test_function_transforms_under_compile(name, x):
    """A graph that was made for a transform is not used outside it, and the other way round."""
    fused, plain = (m.eval() for m in short_pair("basic"))
    transform = transforms()[name]
    compiled = torch.compile(lambda y: transform(fused, y), backend="aot_eager")
    assert_same_step(flattened(compiled(x)), flattened(transform(plain, x)), TOLERANCE)
    same_inference(torch.compile(fused, backend="aot_eager"), plain, x)


def test_forward_mode(x):
    for mode in (True, False):
        found = []
        for model in pair():
            model.train(mode)
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
                found.append(torch.autograd.forward_ad.unpack_dual(model(dual)))
        assert_close(found[0].primal, found[1].primal, TOLERANCE)
        assert_close(found[0].tangent, found[1].tangent, TOLERANCE)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_double_backward(train, x):
    """The gradient of a gradient penalty, in every parameter and the input."""
    found = []
    for model in pair():
        model.train(train)
        y = x.clone().requires_grad_()
        inputs = [y, *model.parameters()]
        gradients = torch.autograd.grad(model(y).square().sum(), inputs, create_graph=True)
        sum(g.square().sum() for g in gradients).backward()
        names = ["x", *(name for name, _ in model.named_parameters())]
        found.append({name: t.grad for name, t in zip(names, inputs, strict=True)})
    assert paths_of(pair()[0].train(train), x) == ["train"] * 4
    assert_same_step(*found, TOLERANCE)


@pytest.mark.parametrize(
    "frozen",
    [
        lambda m: m.conv1.weight,
        lambda m: [p for n, p in m.named_parameters() if "bn" in n],
        lambda m: m.layer1.parameters(),
        lambda m: [p for n, p in m.named_parameters() if "conv" in n],
        lambda m: [p for n, p in m.named_parameters() if not n.startswith("fc")],
    ],
    ids=["stem", "norms", "first stage", "convolutions", "all but the head"],
)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_freezing(frozen, train, x):
    """Gradients exactly where they are asked for."""
    found = []
    for model in pair():
        tensors = frozen(model.train(train))
        for p in [tensors] if isinstance(tensors, torch.Tensor) else tensors:
            p.requires_grad_(False)
        found.append(step(model, x, need_dx=False))
    assert_same_step(*found, TOLERANCE)
    assert not found[0].keys() & {"x"}


def test_retain_graph_and_accumulation(x):
    found = []
    for model in pair():
        out = model(x).square().sum()
        out.backward(retain_graph=True)
        out.backward()
        model(x + 1).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_same_step(*found, TOLERANCE)


def test_autocast_and_grad_scaler(x):
    """bf16 autocast on the CPU: errors against fp64 at most twice PyTorch's, the same dtypes, fp32 master weights."""
    exact = tiny()
    found = []
    for model in pair(dtype=torch.float32):
        model.to(memory_format=torch.channels_last)
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(x.float())
        scaler.scale(out.float().square().mean()).backward()
        scaler.unscale_(optimizer)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        assert {g.dtype for g in gradients.values()} == {torch.float32}
        scaler.step(optimizer)
        scaler.update()
        found.append({"out": out, **gradients})
    exact_out = exact(x)
    exact_out.square().mean().backward()
    assert found[0]["out"].dtype == found[1]["out"].dtype == torch.bfloat16
    ours, theirs = (error(f["out"].double(), exact_out) for f in found)
    assert ours <= 2 * theirs + 0.02
    flat = [torch.cat([f[n].double().flatten() for n, _ in exact.named_parameters()]) for f in found]
    reference = torch.cat([p.grad.flatten() for p in exact.parameters()])
    ours, theirs = ((f - reference).norm() / reference.norm() for f in flat)
    assert ours <= 2 * theirs + 0.02


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
