"""PReLUBlock in use: changes between calls, copies, hooks, compilers, odd inputs, its constructor."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import assert_close, error, randn
from parity import EXACT, assert_same, path_of, prelu_formula_of, run_block, run_formula, state_of
from torch import nn
from units import Stock, build_prelu, prelu_input, prelu_pair, set_mode

import resnet_fused
from resnet_fused.blocks import PReLUBlock

C = 4
final = pytest.mark.parametrize("final", [True, False], ids=["final", "linear"])


# --- changes, copies, edges -------------------------------------------------------------------------------------------


def scale_slope(block):
    with torch.no_grad():
        block.prelu.weight.mul_(-2)


def scale_bias(block):
    with torch.no_grad():
        block.conv1.bias.add_(1)


def replace_slope(block):
    block.prelu.weight = nn.Parameter(torch.full((C,), 0.7, dtype=torch.float64))


def drop_final(block):
    block.final_activation = False


def drop_bias(block):
    block.conv2.bias = None


def scale_weight(block):
    with torch.no_grad():
        block.conv2.weight.mul_(1.5)


CHANGES = [scale_slope, scale_bias, replace_slope, drop_final, drop_bias, scale_weight]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_inference_follows_every_change(change):
    fused, plain = (block.eval() for block in prelu_pair())
    x = prelu_input()
    with torch.no_grad():
        for _ in range(3):
            before = fused(x).clone()
        for block in (fused, plain):
            change(block)
        for _ in range(2):
            assert_close(fused(x), plain(x), EXACT)
        assert error(plain(x), before) > 1e-3
    assert_same(*(run_block(block.train(), x) for block in (fused, plain)))


def test_other_activation_runs_the_original():
    """Put in after construction: the block computes what its modules say."""
    found = []
    for block in prelu_pair():
        block.prelu = nn.LeakyReLU(0.1)
        found.append(run_block(block, prelu_input()))
    assert_same(*found)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["deepcopy", "pickle"])
def test_copies_after_use(how):
    block, x = build_prelu().eval(), prelu_input()
    with torch.no_grad():
        block(x)
        other = how(block)
        other.prelu.weight.mul_(3)
        assert_close(other(x), prelu_formula_of(other)(state_of(other), x)[0], EXACT)
        assert error(other(x), block(x)) > 1e-3


def test_nan_propagates():
    x = prelu_input()
    x[1, 0, 2, 2] = float("nan")
    for final in (True, False):
        fused, plain = (block.eval() for block in prelu_pair(final=final))
        ours, theirs = run_block(fused, x), run_block(plain, x)
        assert theirs["out"].isnan().any()
        for name, exact in theirs.items():
            torch.testing.assert_close(ours[name], exact, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def test_edges_are_pytorchs():
    """An empty batch works; one value per channel is refused with PyTorch's sentence, and nothing has moved."""
    for mode in ("train", "eval"):
        fused, plain = (set_mode(block, mode) for block in prelu_pair())
        assert_same(run_block(fused, prelu_input()[:0]), run_block(plain, prelu_input()[:0]))
    messages = []
    for block in prelu_pair():
        before = copy.deepcopy(block.state_dict())
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as caught:
            block(randn(1, C, 1, 1))
        messages.append(str(caught.value))
        moved = {name for name, t in block.state_dict().items() if not torch.equal(t, before[name])}
        assert moved <= {"bn1.num_batches_tracked"}
        block.eval()(randn(1, C, 1, 1))
    assert messages[0] == messages[1]
    for x in (randn(2, C + 1, 3, 3), randn(C, 3), prelu_input().float()):
        messages = []
        for block in prelu_pair():
            with pytest.raises((RuntimeError, ValueError)) as caught:
                block(x)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_hooks_run_and_send_the_block_to_its_modules():
    block, x = build_prelu(), prelu_input()
    seen = []
    handle = block.prelu.register_forward_hook(lambda m, i, out: seen.append(1))
    block(x)
    assert len(seen) == 2
    assert path_of(block, x) == ("original", "hooks")
    handle.remove()
    assert path_of(block, x) == ("train", None)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
@final
def test_compile_script_and_export(final):
    """The whole block in one graph, in training and in eval; scripted and exported programs are PyTorch's."""
    for training in (True, False):
        block, x = build_prelu(final=final).train(training), prelu_input()
        exact = run_formula(prelu_formula_of(block), state_of(block), x)
        compiled = torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True)
        ours = {name.replace("_orig_mod.", ""): t for name, t in run_block(compiled, x).items()}
        assert_same(ours, exact, what="compiled")
        torch._dynamo.reset()
        assert_same(run_block(torch.jit.script(copy.deepcopy(block)), x), exact, what="scripted")
        program = torch.export.export(copy.deepcopy(block), (x,))
        assert "resnet_fused" not in str(program.graph)
        exported = run_block(program.module(), x)
        assert_close(exported["out"], exact["out"], EXACT)


# --- constructor ------------------------------------------------------------------------------------------------------


def test_constructor():
    with pytest.raises(ValueError, match="PReLUBlock: expected num_parameters to be 1 or the 8 channels, got 3"):
        PReLUBlock(8, num_parameters=3)
    blocks = []
    for package in (resnet_fused.blocks, Stock):
        torch.manual_seed(3)
        blocks.append(package.PReLUBlock(8))
    ours, theirs = (block.state_dict() for block in blocks)
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["prelu.weight"].shape == (1,)
    assert "conv1.bias" in ours
    assert "conv1.bias" not in PReLUBlock(8, bias=False).state_dict()
    assert type(PReLUBlock(4, norm_layer=lambda c: nn.GroupNorm(1, c)).bn1) is nn.GroupNorm
