"""Captured inference: what it computes and what it refuses.

On the CPU the same questions are put twice: to a tape in the place of a CUDA graph, and to a model that is only called.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torchvision
from graph_helpers import DEVICES, EXACT, SHAPE, Tape, TapeRecorder, exact, image, networks
from helpers import LAYOUTS, assert_close, randn
from networks import tiny
from torch import nn

import resnet_fused
from resnet_fused import backends, graphs
from resnet_fused.blocks import paths


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """A device whose captures are recorded."""
    monkeypatch.setitem(graphs._RECORDERS, "cpu", TapeRecorder)
    return request.param


@pytest.fixture(params=["called", *DEVICES])
def anywhere(request, monkeypatch):
    """A device where captures are recorded, and one where the model is called."""
    if request.param == "cpu":
        monkeypatch.setitem(graphs._RECORDERS, "cpu", TapeRecorder)
    return "cuda" if request.param == "cuda" else "cpu"


# --- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_replay_is_the_model(anywhere, kind, layout):
    fused, plain = networks(anywhere, kind)
    replay = resnet_fused.capture(fused, LAYOUTS[layout](image(anywhere)))
    for seed in (0, 1, 2):
        x = LAYOUTS[layout](image(anywhere, seed))
        out = replay(x)
        assert not out.requires_grad
        assert_close(out, exact(plain, x), EXACT)
    assert replay.recaptures == 0


@pytest.mark.parametrize("backend", ["aten", "reference"])
def test_a_backend_that_is_forced_for_the_blocks(device, backend):
    plain = networks(device)[1]
    fused = resnet_fused.fuse(copy.deepcopy(plain), backend=backend)
    replay = resnet_fused.capture(fused, image(device))
    assert_close(replay(image(device, 1)), exact(plain, image(device, 1)), EXACT)


def test_fp32_with_weights_laid_out(device):
    """oneDNN's convolutions on the CPU, which hold weights in a layout of their own."""
    fused, plain = networks(device)
    truth = exact(plain, image(device, 1))
    replay = resnet_fused.capture(fused.float(), image(device).float())
    assert_close(replay(image(device, 1).float()), truth, 1e-5)


def test_models_that_are_partly_or_not_fused(device):
    plain = networks(device)[1]
    for chosen in ("layer2", "none"):
        model = resnet_fused.fuse(
            copy.deepcopy(plain), filter_fn=lambda name, _, chosen=chosen: name.startswith(chosen)
        )
        replay = resnet_fused.capture(model, image(device))
        assert_close(replay(image(device, 1)), exact(plain, image(device, 1)), EXACT)


class Several(nn.Module):
    """Two inputs; a dict with a tuple, None and a number."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, x, y):
        return {"sum": (self.trunk(x) + y, y * 2), "none": None, "classes": 5}


def test_inputs_and_outputs_of_any_structure(anywhere):
    fused, plain = (Several(model).eval() for model in networks(anywhere))
    x, y = image(anywhere), randn(2, 5, device=anywhere)
    replay = resnet_fused.capture(fused, x, y)
    found, truth = replay(x + 1, y * 3), exact(plain, x + 1, y * 3)
    assert found.keys() == truth.keys()
    assert (found["none"], found["classes"]) == (None, 5)
    for ours, theirs in zip(found["sum"], truth["sum"], strict=True):
        assert_close(ours, theirs, EXACT)


def test_outputs_are_copies_unless_the_graphs_own_are_wanted(device):
    fused, plain = networks(device)
    x, y = image(device), image(device, 1)
    replay = resnet_fused.capture(fused, x)
    first = replay(x)
    replay(y)
    assert_close(first, exact(plain, x), EXACT)
    replay = resnet_fused.capture(fused, x, clone_outputs=False)
    first = replay(x)
    assert replay(y) is first
    assert_close(first, exact(plain, y), EXACT)


def test_an_input_that_is_the_graphs_own_is_not_copied(anywhere):
    fused, plain = networks(anywhere)
    replay = resnet_fused.capture(fused, LAYOUTS["channels_last"](image(anywhere)))
    (held,) = replay.inputs
    assert held.stride() == LAYOUTS["channels_last"](image(anywhere)).stride()
    held.copy_(image(anywhere, 1))
    version = held._version
    assert_close(replay(held), exact(plain, image(anywhere, 1)), EXACT)
    assert held._version == version


def test_examples_and_inputs_stay_as_they_are(anywhere):
    x = image(anywhere).requires_grad_()
    replay = resnet_fused.capture(networks(anywhere)[0], x)
    replay(x)
    assert torch.equal(x, image(anywhere))
    assert x._version == 0
    assert replay.inputs[0] is not x


def test_inside_and_outside_inference_mode(anywhere):
    fused, plain = networks(anywhere)
    with torch.inference_mode():
        x = image(anywhere, 1)
        replay = resnet_fused.capture(fused, x)
        assert_close(replay(x), exact(plain, image(anywhere, 1)), EXACT)
    assert not replay.inputs[0].is_inference()
    assert_close(replay(image(anywhere, 2)), exact(plain, image(anywhere, 2)), EXACT)


class Probe(nn.Module):
    """Notes how it is called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        kind = x.device.type
        self.calls.append(
            SimpleNamespace(
                grad=torch.is_grad_enabled(),
                inference=torch.is_inference_mode_enabled(),
                autocast=torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
                cached=torch.is_autocast_cache_enabled(),
                backend=backends.forced(),
                disabled=paths.transformed(x) is not None,
            )
        )
        return x * 2


def test_every_call_is_made_as_the_capture_was(anywhere):
    """Autocast, the forced backend and ``disabled()``, also of a capture that is made anew."""
    probe, x = Probe().eval(), image(anywhere)
    with torch.autocast(anywhere, torch.bfloat16), resnet_fused.use_backend("reference"), resnet_fused.disabled():
        replay = resnet_fused.capture(probe, x)
    replay(x)
    resnet_fused.refresh(probe)
    with torch.inference_mode(), torch.autocast(anywhere, torch.float16), resnet_fused.use_backend("aten"):
        replay(x)
    expected = SimpleNamespace(
        grad=False, inference=False, autocast=torch.bfloat16, cached=False, backend="reference", disabled=True
    )
    assert len(probe.calls) > 2
    assert all(call == expected for call in probe.calls)
    assert torch.is_autocast_cache_enabled()


def test_autocast_of_the_capture_decides(anywhere):
    fused, plain = networks(anywhere)
    fused, plain, x = fused.float(), plain.float(), image(anywhere).float()
    with torch.autocast(anywhere, torch.bfloat16):
        replay = resnet_fused.capture(fused, x)
    out = replay(x)
    assert out.dtype == torch.bfloat16
    assert_close(out, exact(plain, x), 0.05)
    replay = resnet_fused.capture(fused, x)
    with torch.autocast(anywhere, torch.bfloat16):
        assert replay(x).dtype == torch.float32


def test_several_graphs_in_one_memory(device):
    """Replayed in any order, with copied outputs."""
    fused, plain = networks(device)
    shapes = [(n, *SHAPE[1:]) for n in (1, 2, 5)]
    pool, replays = None, {}
    for shape in shapes:
        replays[shape] = resnet_fused.capture(fused, image(device, shape=shape), pool=pool)
        pool = replays[shape].pool
        assert pool is not None
    assert len({replay.pool for replay in replays.values()}) == 1
    found = {shape: replays[shape](image(device, 7, shape)) for shape in (*reversed(shapes), shapes[1])}
    for shape, out in found.items():
        assert_close(out, exact(plain, image(device, 7, shape)), EXACT)
    assert resnet_fused.capture(fused, image(device)).pool != pool


def test_where_nothing_is_recorded_there_is_no_memory_to_share():
    assert resnet_fused.capture(networks()[0], image()).pool is None


# --- what it refuses ------------------------------------------------------------------------------------------------


def training(model):
    model.train()


def training_inside(model):
    model.layer1[1].bn2.train()


def inference_tensor(model):
    with torch.inference_mode():
        model.layer2[0].bn1.running_mean = torch.zeros(4, dtype=torch.float64)


def subclass(model):
    class Own(torch.Tensor):
        pass

    model.layer2[0].bn1.running_mean = torch.zeros(4, dtype=torch.float64).as_subclass(Own)


def elsewhere(model):
    model.fc.bias = nn.Parameter(torch.zeros(5, device="meta"))


def compiled_inside(model):
    model.layer1[0].compile(backend="eager")


def scripted_inside(model):
    model.fc = torch.jit.script(model.fc)


BAD_MODELS = {
    training: (ValueError, "expected model in eval mode, got training=True at the model itself"),
    training_inside: (ValueError, "expected model in eval mode, got training=True at layer1.1.bn2"),
    inference_tensor: (
        ValueError,
        "expected layer2.0.bn1.running_mean to be made outside inference mode, got an inference tensor",
    ),
    subclass: (TypeError, "expected layer2.0.bn1.running_mean to be a plain tensor, got a Own"),
    elsewhere: (ValueError, "expected fc.bias on the examples' device cpu, got meta"),
    compiled_inside: (TypeError, "expected an eager model, got a compiled module at layer1.0"),
    scripted_inside: (TypeError, "expected an eager model, got a scripted module at fc"),
}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("change", BAD_MODELS, ids=lambda f: f.__name__)
def test_models_that_cannot_be_captured(change, recorded, monkeypatch):
    """And those that become so: no call answers then."""
    if recorded:
        monkeypatch.setitem(graphs._RECORDERS, "cpu", TapeRecorder)
    kind, text = BAD_MODELS[change]
    model = networks()[0]
    replay = resnet_fused.capture(model, image())
    change(model)
    statistics = {name: t.clone() for name, t in model.named_buffers() if type(t) is torch.Tensor}
    with pytest.raises(kind, match=f"^capture: {text}$"):
        resnet_fused.capture(model, image())
    seen = set(BAD_MODELS) - {compiled_inside} if recorded else {training, training_inside}
    for _ in range(2 if change in seen else 0):
        with pytest.raises(kind, match=f"^capture: {text}$"):
            replay(image())
    assert replay.recaptures == 0
    for name, before in statistics.items():
        assert torch.equal(model.get_buffer(name), before), name


def test_compiled_models():
    with pytest.raises(
        TypeError, match=r"^capture: expected an eager model, got a compiled module at the model itself$"
    ):
        resnet_fused.capture(torch.compile(networks()[0]), image())


@pytest.mark.parametrize(
    ("model", "examples", "kind", "text"),
    [
        (lambda x: x, [image()], TypeError, "expected model to be an nn.Module, got function"),
        (nn.Identity(), [], ValueError, "expected at least one example, got none"),
        (nn.Identity(), [[image()]], TypeError, "expected example 0 to be a tensor, got list"),
        (nn.Identity(), [image(), image("meta")], ValueError, "expected examples on one device, got cpu and meta"),
        (
            nn.Identity(),
            [torch.zeros(1, 3, 4, 4).expand(2, 3, 4, 4)],
            ValueError,
            r"expected example 0 to have an element at each address, got strides \(0, 16, 4, 1\)",
        ),
    ],
)
def test_arguments_of_capture(model, examples, kind, text):
    with pytest.raises(kind, match=f"^capture: {text}$"):
        resnet_fused.capture(model, *examples)


class Opaque(nn.Module):
    def forward(self, x):
        return SimpleNamespace(x=x)


def test_outputs_of_unknown_types(anywhere):
    """A tensor inside could not be copied, nor be told from one that does not change."""
    with pytest.raises(
        TypeError, match=r"^capture: expected model to return tensors in tuples, .*got SimpleNamespace$"
    ):
        resnet_fused.capture(Opaque().eval(), image(anywhere))


class Centring(nn.Module):
    def forward(self, x, y):
        return x + y.sub_(1)


def test_models_that_write_to_their_input(anywhere):
    """The calls before a capture would have it written several times."""
    x = image(anywhere)
    text = "expected model to leave its inputs as they are, got a write to input 1"
    with pytest.raises(ValueError, match=f"^capture: {text}$"):
        resnet_fused.capture(Centring().eval(), x, x)
    assert torch.equal(x, image(anywhere))


BAD_INPUTS = {
    "count": (lambda x: (x, x), ValueError, "expected 1 inputs, got 2"),
    "none": (lambda x: (), ValueError, "expected 1 inputs, got 0"),
    "type": (lambda x: (x.tolist(),), TypeError, "expected input 0 to be a tensor, got list"),
    "batch": (lambda x: (x[:1],), ValueError, r"expected input 0 of shape \(2, 3, 16, 12\), got \(1, 3, 16, 12\)"),
    "rank": (lambda x: (x[0],), ValueError, r"expected input 0 of shape \(2, 3, 16, 12\), got \(3, 16, 12\)"),
    "dtype": (lambda x: (x.float(),), ValueError, "expected input 0 of dtype torch.float64, got torch.float32"),
    "device": (lambda x: (x.to("meta"),), ValueError, r"expected input 0 of device \S+, got meta"),
    "strides": (
        lambda x: (LAYOUTS["channels_last"](x),),
        ValueError,
        r"expected input 0 of strides \(576, 192, 12, 1\), got \(576, 1, 36, 3\)",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_inputs_unlike_the_examples(anywhere, case):
    change, kind, text = BAD_INPUTS[case]
    fused, plain = networks(anywhere)
    replay = resnet_fused.capture(fused, image(anywhere))
    held = replay.inputs[0].clone()
    with pytest.raises(kind, match=f"^replay: {text}$"):
        replay(*change(image(anywhere, 1)))
    assert torch.equal(replay.inputs[0], held)
    assert_close(replay(image(anywhere, 1)), exact(plain, image(anywhere, 1)), EXACT)


def test_the_second_of_two_bad_inputs_leaves_the_first_uncopied(anywhere):
    model = Several(nn.Identity()).eval()
    replay = resnet_fused.capture(model, torch.ones(2, device=anywhere), torch.ones(2, device=anywhere))
    with pytest.raises(ValueError, match=r"^replay: expected input 1 of shape \(2,\), got \(3,\)$"):
        replay(torch.zeros(2, device=anywhere), torch.zeros(3, device=anywhere))
    assert replay.inputs[0].tolist() == [1, 1]


def test_the_stride_of_a_single_image_is_no_difference(anywhere):
    fused, plain = networks(anywhere)
    replay = resnet_fused.capture(fused, LAYOUTS["channels_last"](image(anywhere, shape=(1, 3, 16, 12))))
    x = image(anywhere, 1, (16, 12, 3)).permute(2, 0, 1)[None]
    assert x.stride() != replay.inputs[0].stride()
    assert_close(replay(x), exact(plain, x), EXACT)


# --- the order of things on a GPU -------------------------------------------------------------------------------------


def test_the_order_of_a_capture(monkeypatch):
    """In the caller's stream, then twice in the side stream, each after the other, then into the graph."""
    events = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def within(what):
        events.append(f"enter {what}")
        yield
        events.append(f"leave {what}")

    def graph(graph, *, pool, stream, capture_error_mode):
        assert graph == "graph"
        return within(f"capture in {stream.name} into {pool}, {capture_error_mode}")

    monkeypatch.setattr(torch.cuda, "device", lambda device: within(f"{device}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("caller"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: within(stream.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(graphs, "_side_stream", lambda device: Stream("side"))
    recorder = graphs.CudaRecorder(torch.device("cuda", 1))
    recorder.warm_up(lambda: events.append("run"))
    assert events == [
        "enter cuda:1", "run", "side waits for caller",
        "enter side", "run", "run", "leave side", "caller waits for side", "leave cuda:1",
    ]  # fmt: skip
    events.clear()
    assert recorder.record(lambda: events.append("run") or "out", "pool") == ("graph", "out")
    captured = "capture in side into pool, thread_local"
    assert events == ["enter cuda:1", f"enter {captured}", "run", f"leave {captured}", "leave cuda:1"]


def test_one_capture_at_a_time(monkeypatch):
    """All go through one stream, where a second one's calls would land in the first one's graph."""
    inside, met = [], threading.Barrier(2)

    class Recorder(TapeRecorder):
        def warm_up(self, run):
            inside.append(threading.get_ident())
            with contextlib.suppress(threading.BrokenBarrierError):
                met.wait(0.2)
            assert set(inside) == {threading.get_ident()}
            super().warm_up(run)

        def record(self, run, pool):
            found = super().record(run, pool)
            inside.clear()
            return found

    monkeypatch.setitem(graphs._RECORDERS, "cpu", Recorder)
    with ThreadPoolExecutor(2) as threads:
        models = [networks()[0] for _ in range(2)]
        for replay in threads.map(lambda model: resnet_fused.capture(model, image()), models):
            assert replay.recaptures == 0


def test_a_call_replays_first_and_asks_afterwards(monkeypatch):
    """The model is looked at while the GPU works; a stale answer is never given."""
    events = []

    class Recorder(TapeRecorder):
        def warm_up(self, run):
            events.append("warm up")
            super().warm_up(run)

        def record(self, run, pool):
            events.append("record")
            return super().record(run, pool)

    replay_tape, change = Tape.replay, graphs._Watch.change
    monkeypatch.setattr(Tape, "replay", lambda self: events.append("replay") or replay_tape(self))
    monkeypatch.setattr(graphs._Watch, "change", lambda self: events.append("compare") or change(self))
    monkeypatch.setitem(graphs._RECORDERS, "cpu", Recorder)
    fused = networks()[0]
    replay = resnet_fused.capture(fused, image())
    assert events == ["warm up", "record"]
    events.clear()
    replay(image())
    assert events == ["replay", "compare"]
    with torch.no_grad():
        fused.bn1.weight.mul_(2)
    events.clear()
    replay(image())
    assert events == ["replay", "compare", "warm up", "record", "replay"]


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_graph_gives_the_bits_of_eager_calls():
    model = resnet_fused.fuse(tiny(dtype=torch.float32).eval().cuda())
    x = image("cuda").float()
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        replay = resnet_fused.capture(model, x)
        for seed in (1, 2):
            x = image("cuda", seed).float()
            assert torch.equal(replay(x), exact(model, x))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_resnet50_with_cudnns_search(dtype, backend):
    """No worse than PyTorch's eager model, against fp64."""
    plain = torchvision.models.resnet50().cuda().eval().to(memory_format=torch.channels_last)
    x = LAYOUTS["channels_last"](randn(4, 3, 224, 224, device="cuda"))
    truth = exact(copy.deepcopy(plain).double(), x)
    plain, x = plain.to(dtype), x.to(dtype)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False):
        replay = resnet_fused.capture(resnet_fused.fuse(copy.deepcopy(plain), backend=backend), x)
        ours, theirs = replay(x), exact(plain, x)
    error = (theirs.double() - truth).abs().max()
    assert (ours.double() - truth).abs().max() <= 2 * error + 4 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.gpu
def test_a_call_allocates_nothing_but_copies_of_the_outputs():
    replay = resnet_fused.capture(networks("cuda")[0], image("cuda"), clone_outputs=False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        replay(*replay.inputs)
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.gpu
def test_calls_in_a_side_stream():
    fused, plain = networks("cuda")
    truth = exact(plain, image("cuda", 1))
    replay = resnet_fused.capture(fused, image("cuda"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        out = replay(image("cuda", 1))
        with torch.no_grad():
            fused.bn1.weight.mul_(2)
        again = replay(image("cuda", 1))
    torch.cuda.current_stream().wait_stream(side)
    assert_close(out, truth, EXACT)
    assert replay.recaptures == 1
    assert_close(again, exact(fused, image("cuda", 1)), EXACT)


@pytest.mark.gpu
def test_a_capture_beside_a_thread_that_uses_the_gpu():
    """A loader that pins memory and copies, say."""
    done = threading.Event()

    def load():
        while not done.is_set():
            torch.ones(1000).pin_memory().to("cuda", non_blocking=True).add_(1)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        fused, plain = networks("cuda")
        for _ in range(5):
            replay = resnet_fused.capture(fused, image("cuda"))
            assert_close(replay(image("cuda", 1)), exact(plain, image("cuda", 1)), EXACT)
    finally:
        done.set()
        thread.join()
