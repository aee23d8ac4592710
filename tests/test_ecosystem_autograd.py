"""Fused models under autograd's own tools: checkpointing, transforms, second derivatives, freezing, scaling."""

from __future__ import annotations

import pytest
import torch
from ecosystem import TOLERANCE, pair, same_inference, short_pair
from helpers import assert_close, assert_same_buffers, assert_same_step, error, randn, step
from networks import paths_of, tiny
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


@pytest.fixture
def x() -> torch.Tensor:
    return randn(2, 3, 32, 32)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


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
