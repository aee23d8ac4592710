"""The autograd functions: finite differences, double backward, what is saved, and gradients exactly where asked."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from cases import BLOCKS, BlockCase
from helpers import assert_close, assert_same_step, block_input, build, pair, rand, randn, randomise, step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional as F
from torchvision.models import resnet

import resnet_fused
from resnet_fused.autograd.layer import NormSpec
from resnet_fused.autograd.stem import StemFunction
from resnet_fused.blocks.paths import recording

# Small enough for finite differences of every input and parameter.
SMALL = [
    BlockCase(
        kind, c, c // (4 if kind == "bottleneck" and shortcut == "identity" else 2), stride, shortcut, {}, (3, 4), ""
    )
    for kind, c in (("basic", 2), ("bottleneck", 4))
    for shortcut, stride in (("identity", 1), ("projection", 2), ("pooled", 2), ("module", 2))
]
SMALL = [
    case._replace(planes=case.inplanes) if case.kind == "basic" and case.shortcut == "identity" else case
    for case in SMALL
]
SMALL = [case._replace(size=(4, 4)) if case.shortcut in ("module", "pooled") else case for case in SMALL]
small = pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.kind}-{case.shortcut}")


def freeze(block: nn.Module, mode: str) -> None:
    """Put none, all, the odd or the even norms in eval mode."""
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    for i, norm in enumerate(norms):
        norm.train({"train": True, "frozen": False, "odd-frozen": i % 2 == 0, "even-frozen": i % 2 == 1}[mode])


MODES = ("train", "frozen", "odd-frozen", "even-frozen")
modes = pytest.mark.parametrize("mode", MODES)


def as_function(block: nn.Module) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The block as a function of its input and parameters, and the parameters."""
    names = [name for name, _ in block.named_parameters()]
    buffers = {name: b.clone() for name, b in block.named_buffers()}

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True)) | {k: v.clone() for k, v in buffers.items()}
        return functional_call(block, state, (x,))

    return run, [p.detach().clone().requires_grad_() for p in block.parameters()]


def small_block(case: BlockCase, mode: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    torch.manual_seed(0)
    block = randomise(build(case, resnet_fused)).double()
    freeze(block, mode)
    run, parameters = as_function(block)
    inputs = [block_input(case, 2).requires_grad_(), *parameters]
    with recording() as calls:
        run(*inputs)
    assert [call.path for call in calls] == ["train"]
    return run, inputs


@small
@modes
def test_gradcheck(case, mode):
    """Every entry of the Jacobian for the input and all parameters."""
    run, inputs = small_block(case, mode)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=False)


@small
@modes
def test_gradgradcheck(case, mode):
    run, inputs = small_block(case, mode)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_gradcheck_stem(frozen, affine):
    y = randn(2, 2, 5, 4).requires_grad_()
    parameters = [randn(2, seed=1).requires_grad_(), randn(2, seed=2).requires_grad_()] if affine else []
    running = (randn(2, seed=3), rand(2, seed=4))

    def run(y, weight=None, bias=None):
        return StemFunction.apply(NormSpec(1e-3, frozen), y, weight, bias, *running)[0]

    assert torch.autograd.gradcheck(run, (y, *parameters))
    assert torch.autograd.gradgradcheck(run, (y, *parameters), atol=1e-4)


@pytest.mark.parametrize("case", [BLOCKS[1], BLOCKS[5]], ids=lambda case: case.id)
def test_second_derivatives_are_pytorchs(case):
    """A gradient penalty, as adversarial training takes it."""
    found = []
    for block in pair(case):
        x = block_input(case).requires_grad_()
        out = block(x)
        (dx,) = torch.autograd.grad(out, x, randn(*out.shape, seed=9), create_graph=True)
        dx.square().sum().backward()
        found.append({"x": x.grad} | {name: p.grad for name, p in block.named_parameters()})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name, exact in theirs.items():
        if exact is None:
            assert ours[name] is None or not ours[name].any(), name
        elif exact.abs().max() > 1e-8:
            assert_close(ours[name], exact, 1e-8, name)


def test_double_backward_through_a_block_used_twice():
    """The second use's input depends on the same weights; each use must count its own share alone."""
    found = []
    for block in pair(BLOCKS[0]):
        x = block_input(BLOCKS[0]).requires_grad_()
        out = block(block(x))
        gradients = torch.autograd.grad(out, [x, *block.parameters()], randn(*out.shape, seed=9), create_graph=True)
        found.append(gradients)
        sum(g.square().sum() for g in gradients).backward()
        found[-1] += (x.grad, *(p.grad for p in block.parameters()))
    for i, (ours, theirs) in enumerate(zip(*found, strict=True)):
        assert_close(ours, theirs, 1e-8, f"gradient {i}")


def test_backward_twice():
    for block in pair(BLOCKS[5])[:1]:
        x = block_input(BLOCKS[5]).requires_grad_()
        out = block(x)
        out.sum().backward(retain_graph=True)
        once = [x.grad.clone(), *(p.grad.clone() for p in block.parameters())]
        out.sum().backward()
        for g, first in zip([x.grad, *(p.grad for p in block.parameters())], once, strict=True):
            assert torch.equal(g, 2 * first)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            out.sum().backward()


# --- what is saved --------------------------------------------------------------------------------------------------


def saved_by(block: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and each distinct tensor that backward keeps."""
    kept: dict[tuple, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr(), t.numel(), t.dtype] = t
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        out = block(x)
    return out, list(kept.values())


def chain_outputs(plain: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of all convolutions, and of norms and ReLUs, of torchvision's block."""
    convolutions, rest = [], []
    handles = [
        module.register_forward_hook(
            lambda m, _, out: (convolutions if isinstance(m, nn.Conv2d) else rest).append(out.detach().clone())
        )
        for module in plain.modules()
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.ReLU))
    ]
    plain(x)
    for handle in handles:
        handle.remove()
    return convolutions, rest


@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("case", [BLOCKS[i] for i in (0, 1, 4, 5, 6)], ids=lambda case: case.id)
def test_saved_are_input_outputs_of_convolutions_and_the_sign(case, mode):
    """No normalised activation is kept: x, every y, and one tensor (or one bit an element) for the sign of the sum."""
    fused, plain = pair(case)
    freeze(fused, mode)
    freeze(plain, mode)
    x = block_input(case).contiguous(memory_format=torch.channels_last).requires_grad_()
    out, saved = saved_by(fused, x)
    convolutions, rest = chain_outputs(plain, x)
    parameters = {p.data_ptr() for p in (*fused.parameters(), *fused.buffers())}
    images = [t for t in saved if t.dim() == 4 and t.data_ptr() not in parameters]
    small = [t for t in saved if t.dim() != 4]

    def holds(tensors: list[Tensor], value: Tensor) -> bool:
        return any(t.shape == value.shape and torch.allclose(t, value, atol=1e-10) for t in tensors)

    sign_is_bits = any(t.dtype == torch.uint8 for t in saved)
    expected = [x, *convolutions] if sign_is_bits else [x, *convolutions, out]
    assert len(images) == len(expected)
    assert all(holds(images, value) for value in expected)
    assert sum(t.numel() for t in images) == sum(t.numel() for t in expected)
    assert not any(holds(images, activation) for activation in rest[:-1])
    assert all(t.dim() == 1 and t.numel() <= max(v.shape[1] for v in expected) for t in small if t.dtype != torch.uint8)


def test_a_block_saves_less_than_torchvisions():
    """An identity bottleneck keeps two tensors less: the activations between its convolutions."""
    fused, plain = pair(BLOCKS[4])
    x = block_input(BLOCKS[4]).contiguous(memory_format=torch.channels_last).requires_grad_()
    ours, theirs = (sum(t.nbytes for t in saved_by(block, x)[1] if t.dim() == 4) for block in (fused, plain))
    inner = x[:, :2].nbytes
    assert theirs - ours == 2 * inner


def test_nothing_is_saved_without_gradients():
    fused, _ = pair(BLOCKS[4])
    with torch.no_grad():
        out, saved = saved_by(fused, block_input(BLOCKS[4]))
    assert saved == []
    assert not out.requires_grad
    assert out.grad_fn is None


def test_an_input_written_to_in_place_is_noticed():
    fused, _ = pair(BLOCKS[0])
    x = block_input(BLOCKS[0]).contiguous(memory_format=torch.channels_last).requires_grad_()
    h = x * 1
    out = fused(h)
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_running_statistics_may_move_between_forward_and_backward():
    """Two forwards before the first backward: the buffers change, the first one's gradients do not."""
    fused, plain = pair(BLOCKS[5])
    first, second = block_input(BLOCKS[5]), block_input(BLOCKS[5], seed=6)
    expected = step(plain, first)
    x = first.clone().requires_grad_()
    out = fused(x)
    fused(second)
    out.backward(randn(*out.shape, seed=9))
    assert_close(x.grad, expected["x"], 1e-10)
    for name, p in fused.named_parameters():
        assert_close(p.grad, expected[name], 1e-9, name)


# --- where gradients are asked for ----------------------------------------------------------------------------------

SUBSET_CASES = {
    (case.kind, case.shortcut): pair(case)
    for case in SMALL
    if (case.kind, case.shortcut) in itertools.product(("basic", "bottleneck"), ("identity", "projection", "module"))
}


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("shortcut", ["identity", "projection", "module"])
@settings(max_examples=25)
@given(data=st.data(), mode=st.sampled_from(MODES), need_dx=st.booleans())
def test_gradients_exactly_where_asked(kind, shortcut, data, mode, need_dx):
    """Any subset of parameters frozen, any norms in eval: gradients exist where torchvision's do, and agree."""
    case = next(case for case in SMALL if (case.kind, case.shortcut) == (kind, shortcut))
    fused, plain = SUBSET_CASES[kind, shortcut]
    names = [name for name, _ in plain.named_parameters()]
    asked = data.draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names)))
    x = block_input(case)
    found = []
    for block in (fused, plain):
        freeze(block, mode)
        for p, needed in zip(block.parameters(), asked, strict=True):
            p.requires_grad_(needed)
        if any(asked) or need_dx:
            found.append(step(block, x, need_dx=need_dx))
            continue
        out = block(x)
        assert not out.requires_grad
        found.append({"out": out})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name, exact in theirs.items():
        assert ours[name].shape == exact.shape, name
        assert (ours[name] - exact).abs().max() <= 1e-9 * exact.abs().max().clamp_min(1), name


@pytest.mark.parametrize("need", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
def test_stem_gradients_exactly_where_asked(need, frozen):
    running = (randn(3, seed=3), rand(3, seed=4))
    found = []
    for fused in (True, False):
        y, weight, bias = (
            t.requires_grad_(n)
            for t, n in zip((randn(2, 3, 6, 5), randn(3, seed=1), randn(3, seed=2)), need, strict=True)
        )
        if fused:
            out = StemFunction.apply(NormSpec(1e-3, frozen), y, weight, bias, *running)[0]
        else:
            statistics = running if frozen else (None, None)
            out = F.max_pool2d(F.relu(F.batch_norm(y, *statistics, weight, bias, not frozen, 0.0, 1e-3)), 3, 2, 1)
        assert out.requires_grad == any(need)
        if any(need):
            out.backward(randn(*out.shape, seed=5))
        found.append((y.grad, weight.grad, bias.grad))
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert_close(ours, theirs, 1e-10)


def test_a_gradient_that_never_arrives():
    """An output that the loss does not use: no gradient, no error."""
    fused, _ = pair(BLOCKS[0])
    x = block_input(BLOCKS[0]).requires_grad_()
    fused(x)
    (x * 2).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))
    assert all(p.grad is None for p in fused.parameters())


def test_grad_accumulates_into_given_gradients():
    """Parameters' gradients have the parameters' strides, so that accumulation copies nothing."""
    for layout in (torch.contiguous_format, torch.channels_last):
        fused, _ = pair(BLOCKS[0])
        fused.to(memory_format=layout)
        step(fused, block_input(BLOCKS[0]))
        for name, p in fused.named_parameters():
            assert p.grad.stride() == p.stride(), name


def test_torchvision_is_the_yardstick():
    """The pairs that these tests compare really are this package's block and torchvision's."""
    fused, plain = pair(BLOCKS[0])
    assert type(fused) is resnet_fused.BasicBlock
    assert type(plain) is resnet.BasicBlock
    assert_same_step(step(fused, block_input(BLOCKS[0])), step(plain, block_input(BLOCKS[0])), 1e-10)
