"""PReLUBlock against its formula: shared and separate slopes, biases, zeros, inference, dtypes."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close, dtype_id, randn, randomise
from parity import (
    EXACT,
    as_function,
    assert_no_worse,
    assert_same,
    path_of,
    prelu_formula_of,
    run_block,
    run_formula,
    state_of,
)
from torch import nn
from torch.nn import functional as F
from units import MODES, build_prelu, conditioned, conditioned_input, prelu_input, prelu_pair, set_mode

from resnet_fused.blocks import PReLUBlock

C = 4
bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
slopes = pytest.mark.parametrize("slopes", [1, C], ids=["one-slope", "slopes"])
final = pytest.mark.parametrize("final", [True, False], ids=["final", "linear"])


def assert_formula(block: nn.Module, x: torch.Tensor, what: str = "block", need_dx: bool = True) -> dict:
    state = state_of(block)
    found = run_block(block, x, need_dx=need_dx)
    assert_same(found, run_formula(prelu_formula_of(block), state, x, need_dx=need_dx), what=what)
    return found


# --- fp64 against the formula -----------------------------------------------------------------------------------------


@final
@slopes
@bias
def test_formula(bias, slopes, final):
    """Output, all gradients, running statistics and counters, with norms in training, in eval and mixed."""
    for mode in MODES:
        assert_formula(set_mode(build_prelu(bias, slopes, final), mode), prelu_input(), mode)


@pytest.mark.parametrize("slope", [-0.3, 0.0, 1.0, 2.0])
@final
def test_any_slope(slope, final):
    """Negative slopes turn the order of values around: the sign of the output is not that of the sum."""
    for mode in ("train", "frozen"):
        block = build_prelu(final=final)
        nn.init.constant_(block.prelu.weight, slope)
        assert_formula(set_mode(block, mode), prelu_input(), mode)


@final
@slopes
def test_zeros_in_front_of_the_activation(slopes, final):
    """At exactly 0 PyTorch multiplies the gradient by the slope, and the slope itself gets nothing."""
    block, x = build_prelu(True, slopes, final), prelu_input()
    with torch.no_grad():
        for norm in (block.bn1, block.bn2):
            norm.weight[1:3] = 0
            norm.bias[1:3] = 0
        x[:, 1:3] = 0
        x[0, 1, 2, 3] = 1.0
        assert not copy.deepcopy(block.bn1)(block.conv1(x))[:, 1:3].any()  # the case is what it says
    for mode in ("train", "frozen"):
        found = assert_formula(set_mode(copy.deepcopy(block), mode), x, mode)
        assert found["bn1.bias"][1].abs() > 1e-3


def test_the_shared_slope_gets_both_uses():
    """Its gradient is the sum of those of two separate slopes; without the final activation the first alone is left."""
    block, x = build_prelu(), prelu_input()
    shared = run_block(copy.deepcopy(block), x)["prelu.weight"]
    state = {name: t.detach() for name, t in block.state_dict().items()}
    first, second = (state["prelu.weight"].clone().requires_grad_() for _ in range(2))
    h = F.conv2d(x, state["conv1.weight"], state["conv1.bias"], padding=1)
    h = F.prelu(F.batch_norm(h, None, None, state["bn1.weight"], state["bn1.bias"], True), first)
    h = F.conv2d(h, state["conv2.weight"], state["conv2.bias"], padding=1)
    h = x + F.batch_norm(h, None, None, state["bn2.weight"], state["bn2.bias"], True)
    F.prelu(h, second).backward(randn(*h.shape, seed=9))
    assert_close(shared, first.grad + second.grad, EXACT)
    assert first.grad.abs() > 1e-3
    assert second.grad.abs() > 1e-3


@final
def test_bias_of_a_convolution_in_front_of_a_norm(final):
    """Under batch statistics its gradient is rounding alone, and it moves the running mean; frozen, it counts."""
    block = build_prelu(final=final)
    found = assert_formula(block, prelu_input())
    for name in ("conv1.bias", "conv2.bias"):
        assert found[name].abs().max() < 1e-10
    without = build_prelu(final=final)
    with torch.no_grad():
        without.conv1.bias.zero_()
    without = run_block(without, prelu_input())
    assert_close(found["out"], without["out"], EXACT)
    moved = found["buffer bn1.running_mean"] - without["buffer bn1.running_mean"]
    assert_close(moved, 0.1 * build_prelu(final=final).conv1.bias, EXACT)
    frozen = assert_formula(set_mode(build_prelu(final=final), "frozen"), prelu_input())
    assert min(frozen[name].abs().max() for name in ("conv1.bias", "conv2.bias")) > 1e-3


@final
@slopes
@bias
def test_inference(bias, slopes, final):
    """In eval without gradients, for several inputs in turn, in both memory formats; nothing is written."""
    block = build_prelu(bias, slopes, final).eval()
    state = state_of(block)
    for seed, size in ((1, (5, 7)), (2, (5, 7)), (3, (4, 4)), (1, (5, 7))):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = prelu_input(2, size=size, seed=seed).contiguous(memory_format=layout)
            kept = x.clone()
            with torch.no_grad():
                out = block(x)
                assert_close(out, prelu_formula_of(block)(state, x)[0], EXACT)
            assert torch.equal(x, kept)
            assert out.is_contiguous(memory_format=layout)
    assert all(torch.equal(t, state[name]) for name, t in block.state_dict().items())


@final
def test_steps_of_sgd(final):
    fused, plain = prelu_pair(final=final)
    optimizers = [torch.optim.SGD(block.parameters(), lr=1e-2, momentum=0.9) for block in (fused, plain)]
    for i in range(3):
        assert_same(*(run_block(block.train(), prelu_input(seed=i)) for block in (fused, plain)), 1e-9)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            assert_close(fused.eval()(prelu_input()), plain.eval()(prelu_input()), 1e-9)


@final
@slopes
@bias
def test_path(bias, slopes, final):
    block, x = build_prelu(bias, slopes, final), prelu_input()
    assert path_of(block, x) == ("train", None)
    assert path_of(block.eval(), x) == ("train", None)
    with torch.no_grad():
        assert path_of(block, x) == ("infer", None)
    assert path_of(block.requires_grad_(False), x) == ("infer", None)


# --- finite differences -----------------------------------------------------------------------------------------------


@final
@slopes
@bias
def test_gradcheck(bias, slopes, final):
    for mode in ("train", "eval", "odd-frozen"):
        run, parameters = as_function(set_mode(build_prelu(bias, slopes, final), mode))
        x = prelu_input(2, size=(3, 4), seed=8).requires_grad_()
        assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True), mode


@pytest.mark.parametrize("mode", ["train", "frozen"])
@final
def test_gradcheck_of_every_entry(final, mode):
    torch.manual_seed(0)
    block = randomise(PReLUBlock(2, num_parameters=2, final_activation=final)).double()
    run, parameters = as_function(set_mode(block, mode))
    x = prelu_input(2, 2, (2, 3), seed=8).requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *parameters))


@final
@slopes
def test_gradgradcheck(slopes, final):
    for mode in ("train", "frozen"):
        run, parameters = as_function(set_mode(build_prelu(True, slopes, final), mode))
        x = prelu_input(2, size=(3, 4), seed=8).requires_grad_()
        assert torch.autograd.gradgradcheck(run, (x, *parameters), fast_mode=True, atol=1e-4), mode


@final
@slopes
@bias
def test_double_backward(bias, slopes, final):
    found = []
    for block in prelu_pair(bias, slopes, final):
        x = prelu_input().requires_grad_()
        out = block(x)
        gradients = torch.autograd.grad(out, [x, *block.parameters()], randn(*out.shape, seed=9), create_graph=True)
        sum(g.square().sum() for g in gradients).backward()
        leaves = {"x": x} | dict(block.named_parameters())
        found.append({name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()})
    assert_same(*found, 1e-8)


@pytest.mark.parametrize("asked", ["x", "weights", "norms", "biases", "slope", "x and slope", "nothing"])
@final
def test_gradients_exactly_where_asked(asked, final):
    parts = {"conv1.weight": "weights", "conv2.weight": "weights", "conv1.bias": "biases", "conv2.bias": "biases"}
    for mode in ("train", "frozen"):
        block = set_mode(build_prelu(final=final), mode)
        for name, p in block.named_parameters():
            p.requires_grad_(parts.get(name, "slope" if name == "prelu.weight" else "norms") in asked)
        found = assert_formula(block, prelu_input(), mode, need_dx=asked.startswith("x"))
        assert ("prelu.weight" in found) == ("slope" in asked)


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@final
@slopes
def test_dtypes(slopes, final, dtype, mode):
    """Errors against the formula in fp64 at most twice those of PyTorch's modules, plus a floor."""
    blocks = prelu_pair(True, 16 if slopes == C else 1, final, channels=16)
    fused, plain = (set_mode(conditioned(block, dtype).to(dtype), mode) for block in blocks)
    x = conditioned_input(dtype).to(dtype)
    exact = copy.deepcopy(plain).double()
    truth = run_formula(prelu_formula_of(exact), state_of(exact), x.double())
    assert_no_worse(run_block(fused, x), run_block(plain, x), truth, mode)
    truth = run_formula(prelu_formula_of(exact.eval()), state_of(exact), x.double())
    outs = []
    with torch.no_grad():
        for block in (fused, plain):
            block.load_state_dict(exact.state_dict())
            outs.append({"out": block.eval()(x)})
    assert_no_worse(*outs, {"out": truth["out"]}, "inference")


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@final
def test_autocast(final, x_dtype):
    """dtypes of output and gradients are those of PyTorch's modules, and the errors at most twice theirs."""
    fused, plain = (conditioned(block, torch.bfloat16).float() for block in prelu_pair(final=final, channels=16))
    x = conditioned_input(torch.bfloat16).to(x_dtype)
    exact = copy.deepcopy(plain).double()
    truth = run_formula(prelu_formula_of(exact), state_of(exact), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run_block(fused, x), run_block(plain, x)
    assert_no_worse(ours, theirs, truth, "autocast", torch.bfloat16)
