"""BasicBlock and Bottleneck in every dtype and under autocast, against fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from block_helpers import EXACT, norms_of
from cases import BLOCKS, BlockCase
from helpers import EPS, assert_no_worse, assert_same_step, block_input, dtype_id, error, pair, rand, randn, step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

FLOOR = {torch.float32: 2e-6, torch.float16: 2 * EPS[torch.float16], torch.bfloat16: 2 * EPS[torch.bfloat16]}
WIDE = BlockCase("bottleneck", 32, 8, 1, "identity", {}, (8, 8), "identity")
WIDE_PROJECTION = BlockCase("basic", 16, 24, 2, "projection", {}, (9, 9), "projection")
wide = pytest.mark.parametrize("case", [WIDE, WIDE_PROJECTION], ids=lambda case: case.id)


def gentle(block: nn.Module) -> nn.Module:
    """Norms near their initial values, so that no error is amplified."""
    for i, norm in enumerate(norms_of(block)):
        with torch.no_grad():
            norm.weight.copy_(rand(norm.weight.numel(), seed=i))
            norm.bias.copy_(randn(norm.bias.numel(), seed=i) * 0.2)
    return block


def compare_dtypes(fused, plain, x, floor, autocast=None, training=True):
    """Output and gradients: dtypes as PyTorch's, errors against fp64 at most twice PyTorch's plus the floor."""
    exact = copy.deepcopy(plain).double()
    exact_step = step(exact.train(training), x.double())
    with autocast or torch.autocast("cpu", enabled=False):
        ours, theirs = (step(block.train(training), x) for block in (fused, plain))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert_no_worse(ours[name], value, exact_step[name], floor, name)
    for (name, buffer), other, truth in zip(fused.named_buffers(), plain.buffers(), exact.buffers(), strict=True):
        assert_no_worse(buffer, other, truth, floor, name)
    fused.eval()
    plain.eval()
    with torch.no_grad(), autocast or torch.autocast("cpu", enabled=False):
        outs = fused(x), plain(x)
    with torch.no_grad():
        assert_no_worse(*outs, exact.eval()(x.double()), floor, "inference")


@wide
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_dtypes(case, dtype, training):
    fused, plain = (gentle(block).to(dtype) for block in pair(case, dtype=dtype))
    compare_dtypes(fused, plain, block_input(case, 4, dtype=dtype), FLOOR[dtype], training=training)


@wide
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_half_model_with_float_norms(case, dtype):
    fused, plain = (gentle(block).to(dtype) for block in pair(case, dtype=dtype))
    for block in (fused, plain):
        for norm in norms_of(block):
            norm.float()
    compare_dtypes(fused, plain, block_input(case, 4, dtype=dtype), FLOOR[dtype])


@wide
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast(case, dtype, x_dtype):
    """Input in fp32 or in autocast's dtype; the output's dtype and every gradient's are PyTorch's."""
    if dtype == torch.float16 and x_dtype == torch.bfloat16:
        pytest.skip("PyTorch itself refuses to mix the two half types")
    fused, plain = (gentle(block) for block in pair(case, dtype=torch.float32))
    x = block_input(case, 4, dtype=x_dtype)
    compare_dtypes(fused, plain, x, FLOOR[dtype], torch.autocast("cpu", dtype))


@wide
def test_autocast_disabled_inside_autocast(case):
    fused, plain = (gentle(block) for block in pair(case, dtype=torch.float32))
    x = block_input(case, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        ours, theirs = step(fused, x), step(plain, x)
    assert ours["out"].dtype == theirs["out"].dtype == torch.float32
    assert_same_step(ours, theirs, 1e-4)


def test_autocast_around_forward_alone():
    """backward outside the context, and a forward in eval inside it with gradients wanted."""
    fused, plain = (gentle(block) for block in pair(WIDE, dtype=torch.float32))
    for training in (True, False):
        found = []
        for block in (fused, plain):
            block.zero_grad()
            x = block_input(WIDE, 4, dtype=torch.float32).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                out = block.train(training)(x)
            out.float().square().sum().backward()
            found.append({"x": x.grad} | {name: p.grad for name, p in block.named_parameters()})
        ours, theirs = found
        for name, other in theirs.items():
            assert ours[name].dtype == other.dtype == torch.float32
            assert error(ours[name], other) < 0.1, name


def test_fp64_input_is_not_touched_by_autocast():
    fused, plain = pair(BLOCKS[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(step(fused, block_input(BLOCKS[0])), step(plain, block_input(BLOCKS[0])), EXACT)


class _Casts(TorchDispatchMode):
    """Sizes of the parameters that every operator casts."""

    def __init__(self, parameters) -> None:
        super().__init__()
        self.parameters, self.calls = {p.data_ptr() for p in parameters}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten._foreach_copy_):
            read = args[0] if func.overloadpacket is torch.ops.aten._to_copy else args[1]
            read = read if isinstance(read, (list, tuple)) else [read]
            found = [tuple(t.shape) for t in read if t.data_ptr() in self.parameters]
            self.calls += [found] if found else []
        return func(*args, **(kwargs or {}))


@wide
def test_weights_are_cast_together_and_once_a_step(case):
    fused, plain = pair(case)
    x = block_input(case).float().requires_grad_()
    convolutions = [m for m in fused.modules() if isinstance(m, nn.Conv2d)]
    with _Casts(fused.parameters()) as casts, torch.autocast("cpu", torch.bfloat16):
        fused(x).sum().backward()
    ((*sizes,),) = casts.calls
    assert sorted(sizes) == sorted(tuple(conv.weight.shape) for conv in convolutions)
    assert len(list(plain.parameters())) > len(sizes) > 1
