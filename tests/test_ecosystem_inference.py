"""Fused models used for inference while their parameters change."""

from __future__ import annotations

import threading

import pytest
import torch
from ecosystem import TOLERANCE, pair, refreshed, same_inference
from helpers import assert_close, assert_same_step, error, randn, step
from networks import paths_of, randomise, tiny
from torch import nn

from resnet_fused import disabled, fuse


@pytest.fixture
def x() -> torch.Tensor:
    return randn(2, 3, 32, 32)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


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
