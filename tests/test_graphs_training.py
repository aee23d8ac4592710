"""Training steps in CUDA graphs: nothing in a step asks for a tensor's value, and replays are the steps themselves."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from graph_helpers import EXACT, exact, image
from helpers import assert_close, assert_same_buffers, randn
from networks import tiny
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import resnet_fused
from resnet_fused.blocks import paths


class Unasked(TorchFunctionMode):
    """No value of a tensor may reach the host: a graph could not hold what is decided by it."""

    ASKING = (
        "item", "tolist", "numpy", "cpu", "is_nonzero", "nonzero", "equal", "allclose", "masked_select", "unique",
        "__bool__", "__int__", "__float__", "__index__", "__contains__", "tensor", "as_tensor",
    )  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in self.ASKING, name
        if name == "__getitem__":
            assert not any(isinstance(index, torch.Tensor) for index in tree_leaves(args[1])), "indexed by a tensor"
        return func(*args, **(kwargs or {}))


def test_the_guard_of_the_next_test_sees_what_it_should():
    x = torch.ones(2)
    for ask in (
        lambda: x[0].item(), lambda: bool(x[0]), lambda: float(x[0]), lambda: x[x > 0], lambda: torch.tensor(1.0),
        lambda: x.sum() in x, lambda: x.nonzero(),
    ):  # fmt: skip
        with pytest.raises(AssertionError), Unasked():
            ask()


STEPS = {
    "plain": {},
    "momentum-none": {"norm_layer": lambda channels: nn.BatchNorm2d(channels, momentum=None)},
    "basic": {"kind": "basic"},
}


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("options", STEPS)
def test_a_training_step_never_asks_for_a_value(options, half):
    """Forward, loss, backward, a scaled step of a fused optimizer: nothing stands in the way of a capture."""
    model = resnet_fused.fuse(tiny(dtype=torch.float32, **STEPS[options]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=half)
    x, labels = image().float(), torch.zeros(2, dtype=torch.int64)
    for guard in (contextlib.nullcontext(), Unasked()):
        optimizer.zero_grad(set_to_none=True)
        with guard:
            with torch.autocast("cpu", torch.bfloat16, enabled=half), paths.recording() as calls:
                loss = F.cross_entropy(model(x), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert {call.path for call in calls} == {"train"}
    assert model.layer1[0].bn1.num_batches_tracked == 2


# --- on a GPU ---------------------------------------------------------------------------------------------------------


class Training:
    """A model with what a step needs."""

    def __init__(self, model, x, *, scaled=False):
        self.model, self.x = model, x
        self.labels = torch.zeros(len(x), dtype=torch.int64, device="cuda")
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
        self.scaler = torch.amp.GradScaler("cuda", enabled=scaled)

    def step(self):
        loss = F.cross_entropy(self.model(self.x), self.labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    def graph(self):
        """As docs/graphs.md has it, after 3 steps; also the loss that a replay writes."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.optimizer.zero_grad(set_to_none=True)
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.step()
        return graph, loss


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("options", STEPS)
def test_training_steps_in_a_graph(options, backend, scaled):
    """Beside the same steps without: parameters, statistics and counters."""
    dtype, tolerance = (torch.float64, 1e-8) if backend == "auto" else (torch.float32, 1e-3)
    model = resnet_fused.fuse(tiny(dtype=dtype, **STEPS[options]).cuda(), backend=backend)
    x = image("cuda").to(dtype)
    eager, graphed = (Training(m, x, scaled=scaled) for m in (model, copy.deepcopy(model)))
    graph, captured = graphed.graph()
    for seed in range(8):
        if seed >= 3:
            x.copy_(image("cuda", seed))
            graph.replay()
        eager.optimizer.zero_grad(set_to_none=True)
        loss = eager.step()
    assert_close(captured, loss, tolerance)
    for (name, ours), theirs in zip(graphed.model.named_parameters(), eager.model.parameters(), strict=True):
        assert_close(ours, theirs, tolerance, name)
    assert_same_buffers(graphed.model, eager.model, tolerance)
    assert graphed.model.layer1[0].bn1.num_batches_tracked == 8


@pytest.mark.gpu
def test_captured_inference_after_replayed_steps():
    """Nobody counts their writes: ``eval()`` tells of them."""
    training = Training(resnet_fused.fuse(tiny().cuda()), image("cuda"))
    model = training.model
    replay = resnet_fused.capture(model.eval(), training.x)
    model.train()
    graph, _ = training.graph()
    for _ in range(2):
        graph.replay()
        model.eval()
        plain = resnet_fused.unfuse(copy.deepcopy(model))
        assert_close(replay(training.x), exact(plain, training.x), EXACT)
        model.train()
    assert replay.recaptures == 2


@pytest.mark.gpu
def test_parts_by_make_graphed_callables():
    """Gradients of a fused stage whose forward and backward are graphs of PyTorch's making."""
    eager = resnet_fused.fuse(tiny().cuda())
    graphed = copy.deepcopy(eager)
    sample = randn(2, 4, 4, 3, device="cuda").requires_grad_()
    graphed.layer1 = torch.cuda.make_graphed_callables(graphed.layer1, (sample,))
    labels = torch.zeros(2, dtype=torch.int64, device="cuda")
    for model in (eager, graphed):
        F.cross_entropy(model(image("cuda")), labels).backward()
    for (name, ours), theirs in zip(graphed.named_parameters(), eager.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, 1e-8, name)
