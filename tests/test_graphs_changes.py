"""A captured model that changes is captured anew, and what its graph reads lives as long as the graph."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
from graph_helpers import DEVICES, EXACT, SHAPE, TapeRecorder, exact, image, networks
from helpers import assert_close, randn
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import resnet_fused
from resnet_fused import graphs
from resnet_fused.blocks import inference, pinned


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """A device whose captures are recorded."""
    monkeypatch.setitem(graphs._RECORDERS, "cpu", TapeRecorder)
    return request.param


# --- what it follows --------------------------------------------------------------------------------------------------


def replace_parameter(model):
    model.layer1[0].conv1.weight = nn.Parameter(model.layer1[0].conv1.weight.detach() * 2)


def replace_by_an_alias(model):
    """The version of the new parameter, over the same memory, is the old one's."""
    conv = model.layer1[0].conv1
    version = conv.weight._version
    with torch.no_grad():
        conv.weight.mul_(2)
    conv.weight = nn.Parameter(conv.weight.data)
    with torch.no_grad():
        while conv.weight._version < version:
            conv.weight.mul_(1)
    assert conv.weight._version == version


def replace_buffer(model):
    model.layer2[0].bn1.running_var = model.layer2[0].bn1.running_var * 2


def remove_bias(model):
    model.fc.bias = None


def write_in_place(model):
    with torch.no_grad():
        model.layer1[1].conv2.weight.mul_(1.5)


def write_buffer(model):
    model.layer1[1].bn1.running_mean.add_(0.5)


def write_stem(model):
    with torch.no_grad():
        model.bn1.bias.add_(0.5)


def load(model):
    model.load_state_dict({key: value * 1.25 for key, value in model.state_dict().items()})


def assign(model):
    model.load_state_dict({key: value * 1.25 for key, value in model.state_dict().items()}, assign=True)


def swap_data(model):
    model.layer1[0].conv1.weight.data = model.layer1[0].conv1.weight.data * 3


def swap_data_of_the_classifier(model):
    model.fc.weight.data = model.fc.weight.data * 3


def write_data_and_refresh(model):
    model.layer1[0].conv1.weight.data.mul_(3)
    resnet_fused.refresh(model)


def write_data_and_eval(model):
    model.layer1[0].conv1.weight.data.mul_(3)
    model.eval()


def train_and_eval(model):
    model.layer1[0].conv1.weight.data.mul_(3)
    model.train().eval()


def replace_module(model):
    model.fc = nn.Linear(model.fc.in_features, 5).to(model.fc.weight)
    nn.init.constant_(model.fc.weight, 0.1)
    nn.init.constant_(model.fc.bias, 0.2)
    model.fc.eval()


def replace_block(model):
    model.layer1[0] = copy.deepcopy(model.layer1[0])
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(2)


def remove_block(model):
    del model.layer1[1]


def add_module(model):
    model.layer4.append(nn.Softplus().eval())


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def swap_class(model):
    model.fc.__class__ = Doubled


def step(**options):
    def change(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    change.__name__ = f"step-{'-'.join(options)}"
    return change


CHANGES = [
    replace_parameter, replace_by_an_alias, replace_buffer, remove_bias, write_in_place, write_buffer, write_stem, load,
    assign, swap_data, swap_data_of_the_classifier, write_data_and_refresh, write_data_and_eval, train_and_eval,
    replace_module, replace_block, remove_block, add_module, swap_class, step(fused=True), step(foreach=True),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_replay_follows_every_change(device, change, caplog):
    """By one capture more, told once."""
    fused, plain = networks(device)
    x = image(device, 1)
    replay = resnet_fused.capture(fused, image(device))
    before = replay(x)
    for model in (fused, plain):
        change(model)
    with caplog.at_level(logging.INFO, "resnet_fused"):
        for _ in range(2):
            assert_close(replay(x), exact(plain, x), EXACT)
    assert not torch.allclose(before, exact(plain, x), rtol=1e-3)
    assert replay.recaptures == 1
    assert caplog.text.count("capture: ResNet was captured anew (1 times so far): ") == 1
    assert caplog.text.count("captured anew") == 1


def test_a_replay_follows_the_removal_of_the_last_module(device):
    model = nn.Sequential(nn.Flatten(), nn.Softplus()).eval()
    replay = resnet_fused.capture(model, image(device))
    del model[1]
    assert torch.equal(replay(image(device)), image(device).flatten(1))


@pytest.mark.parametrize("change", [resnet_fused.unfuse, resnet_fused.fuse], ids=lambda f: f.__name__)
def test_a_replay_follows_a_swap(device, change):
    """Of the classes; the numbers are the same."""
    fused, plain = networks(device)
    model = fused if change is resnet_fused.unfuse else copy.deepcopy(plain)
    replay = resnet_fused.capture(model, image(device))
    change(model)
    assert_close(replay(image(device)), exact(plain, image(device)), EXACT)
    assert replay.recaptures == 1


def write_classifier(model):
    with torch.no_grad():
        model.fc.weight.mul_(3)


def write_data_of_the_classifier(model):
    model.fc.weight.data.mul_(3)


def step_classifier(model):
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.1, fused=True)
    for p in model.fc.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize(
    "change", [write_classifier, write_data_of_the_classifier, step_classifier], ids=lambda f: f.__name__
)
def test_what_nothing_is_folded_of_is_read_where_it_lies(device, change):
    fused, plain = networks(device)
    replay = resnet_fused.capture(fused, image(device))
    before = exact(plain, image(device))
    for model in (fused, plain):
        change(model)
    assert_close(replay(image(device)), exact(plain, image(device)), EXACT)
    assert not torch.allclose(before, exact(plain, image(device)), rtol=1e-3)
    assert replay.recaptures == 0


def test_other_models_are_of_no_concern(device):
    """A captured teacher beside a student in training."""
    teacher, student = networks(device)[0], networks(device)[0]
    replay = resnet_fused.capture(teacher, image(device))
    optimizer = torch.optim.SGD(student.train().parameters(), lr=0.1, fused=True)
    student(image(device)).sum().backward()
    optimizer.step()
    resnet_fused.refresh(student.eval())
    replay(image(device))
    assert replay.recaptures == 0


def test_a_fused_optimizer_that_holds_the_memory_under_another_name(device):
    """Flat parameters: what is stepped is a tensor of which the model's are views."""
    fused, plain = networks(device)
    replay = resnet_fused.capture(fused, image(device))
    for model in (fused, plain):
        conv = model.layer1[0].conv2
        flat = nn.Parameter(conv.weight.data)
        flat.grad = torch.ones_like(flat)
        torch.optim.SGD([flat], lr=0.1, fused=True).step()
    assert_close(replay(image(device)), exact(plain, image(device)), EXACT)
    assert replay.recaptures == 1


def test_training_and_back(device):
    """No answer while the model trains; afterwards the new weights and statistics."""
    fused, plain = networks(device)
    replay = resnet_fused.capture(fused, image(device))
    for model in (fused, plain):
        model.train()(image(device)).sum().backward()
        step(fused=True)(model)
    with pytest.raises(
        ValueError, match=r"^capture: expected model in eval mode, got training=True at the model itself$"
    ):
        replay(image(device))
    assert replay.recaptures == 0
    for model in (fused, plain):
        model.eval()
    assert_close(replay(image(device)), exact(plain, image(device)), EXACT)
    assert replay.recaptures == 1


# --- what is folded, when, and how long it lives ----------------------------------------------------------------------


@pytest.fixture
def folds(monkeypatch):
    """The convolutions folded so far."""
    found, fold = [], inference.fold
    monkeypatch.setattr(inference, "fold", lambda conv, *args: found.append(conv) or fold(conv, *args))
    return found


def test_nothing_is_folded_while_a_graph_is_captured_or_replayed(device, folds, monkeypatch):
    recorder = graphs._RECORDERS[device]
    during = []

    class Recorder(recorder):
        def record(self, run, pool):
            before = len(folds)
            found = super().record(run, pool)
            during.append(len(folds) - before)
            return found

    monkeypatch.setitem(graphs._RECORDERS, device, Recorder)
    fused = networks(device)[0]
    replay = resnet_fused.capture(fused, image(device))
    convolutions = [m for m in fused.modules() if isinstance(m, nn.Conv2d)]
    assert len(folds) == len(convolutions) == len(set(folds))
    replay(image(device, 1))
    assert len(folds) == len(convolutions)
    resnet_fused.refresh(fused)
    replay(image(device, 1))
    assert len(folds) == 2 * len(convolutions)
    assert during == [0, 0]


def test_a_captured_call_finds_what_the_calls_before_made(monkeypatch):
    """In another stream, and while eager inference would keep nothing."""
    block = networks()[0].layer1[0]
    with FakeTensorMode():
        x = torch.empty(1, 4, 4, 4, device="cuda")
    kinds = []
    for capturing, stream in ((False, 1), (False, 2), (True, 2)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, s=stream: SimpleNamespace(cuda_stream=s))
        kinds.append(inference.kind_of(block, x, x.dtype))
        with pinned.pinned(pinned.Pins(block)):
            kinds.append(inference.kind_of(block, x, x.dtype))
    first, held, second, *others = kinds
    assert others == [held, None, held]
    assert len({first, held, second, None}) == 4


def test_what_eager_inference_keeps_is_its_own(device, folds):
    fused, plain = networks(device)
    x = image(device)
    replay = resnet_fused.capture(fused, x)
    folds.clear()
    for _ in range(2):
        assert_close(exact(fused, x), exact(plain, x), EXACT)
    assert len(folds) == len(set(folds)) > 0  # once, by the first call
    folds.clear()
    replay(x)
    for n in range(3, 9):  # more kinds of input than are kept
        exact(fused, image(device, shape=(n, *SHAPE[1:])))
    assert_close(replay(x), exact(plain, x), EXACT)
    assert replay.recaptures == 0


def test_what_a_graph_reads_lives_as_long_as_the_graph(device):
    fused = networks(device)[0]
    replay = resnet_fused.capture(fused, image(device))
    made = [weakref.ref(program) for program in replay._recorded.watch._pins.made.values()]
    memory = [weakref.ref(fused.get_parameter(name).untyped_storage()) for name in ("conv1.weight", "fc.weight")]
    assert len(made) == 4  # three blocks and the stem
    fused.train().eval()
    resnet_fused.refresh(fused)
    fused.conv1.weight = nn.Parameter(fused.conv1.weight.detach() * 2)
    fused.fc.weight.data = fused.fc.weight.data * 2
    step(fused=True)(fused)
    if device == "cpu":
        replay._recorded.graph.calls.clear()  # no graph of CUDA's holds a tensor
    gc.collect()
    assert all(ref() is not None for ref in (*made, *memory))
    replay(image(device))  # captured anew: by the new graph's time the old one is gone
    gc.collect()
    assert all(ref() is None for ref in (*made, *memory))
    last = weakref.ref(replay._recorded.watch._pins)
    del replay
    gc.collect()
    assert last() is None


def test_a_capture_that_fails_leaves_the_last_one(device, monkeypatch):
    """And the next call tries again."""
    fused, plain = networks(device)
    replay = resnet_fused.capture(fused, image(device))
    recorded = replay._recorded
    recorder = type(replay._recorder)
    for model in (fused, plain):
        write_in_place(model)
    with monkeypatch.context() as patch:
        patch.setattr(recorder, "record", lambda self, run, pool: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            replay(image(device))
    assert replay._recorded is recorded
    assert replay.recaptures == 0
    assert_close(replay(image(device)), exact(plain, image(device)), EXACT)


def test_a_capture_goes_into_the_memory_of_the_one_that_it_replaces(device):
    fused = networks(device)[0]
    replay = resnet_fused.capture(fused, image(device))
    pool, graph = replay.pool, replay._recorded.graph
    write_in_place(fused)
    replay(image(device))
    assert replay.pool == pool
    assert replay._recorded.graph is not graph


class Growing(nn.Module):
    """Its block sees another shape in every call."""

    def __init__(self, block):
        super().__init__()
        self.block, self.calls = block, 0

    def forward(self, x):
        self.calls += 1
        return self.block(F.pad(x, (0, self.calls))).mean((2, 3))


def test_a_block_that_would_be_folded_within_the_graph(device):
    fused = networks(device)[0]
    x = randn(2, 16, 4, 4, device=device)
    text = "capture: expected Bottleneck to run as in the calls before the capture, got weights folded within it"
    with pytest.raises(RuntimeError, match=f"^{text}$"):
        resnet_fused.capture(Growing(fused.layer1[1]).eval(), x)


def test_weights_that_are_plain_attributes(device):
    """Nobody would see them replaced."""
    fused = networks(device)[0]
    conv = fused.layer1[1].conv2
    weight = conv.weight.detach()
    del conv.weight
    conv.weight = weight
    text = "capture: expected the tensors of Bottleneck to be parameters and buffers, got a plain attribute"
    with pytest.raises(ValueError, match=f"^{text}$"):
        resnet_fused.capture(fused, image(device))
