"""Units in a row that hand the statistics of their sums to the next: the same as without, however they are trained."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close, randn, randomise
from parity import EXACT, FLOOR, SEED, as_function, assert_same, chain_formula, run_block, run_formula, state_of
from torch import nn
from torch.utils.checkpoint import checkpoint
from units import CHAINS, KINDS, MODES, Stock, build_chain, chain_pair, conditioned, set_mode

import resnet_fused
from resnet_fused import ops
from resnet_fused.blocks import NormReLU

both_kinds = pytest.mark.parametrize("kind", KINDS)
every_chain = pytest.mark.parametrize("cases", CHAINS.values(), ids=CHAINS)
X = randn(3, 4, 5, 7, seed=5)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


# --- the same as without ----------------------------------------------------------------------------------------------


@every_chain
@both_kinds
def test_formula(kind, cases):
    for mode in MODES:
        chain = set_mode(build_chain(kind, cases), mode)
        state = state_of(chain)
        assert_same(run_block(chain, X), run_formula(chain_formula(chain, cases), state, X), what=mode)


@every_chain
def test_statistics_change_nothing(cases):
    """In every dtype the numbers are those without, up to the order of a sum."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        with_them, without = (build_chain("basic", cases).to(dtype) for _ in range(2))
        for block in without:
            block.emit_statistics = False
        assert_same(*(run_block(chain, X.to(dtype)) for chain in (with_them, without)), tolerance)


@pytest.mark.parametrize(
    "units",
    [
        ("original", "full_preact", "full_preact"),
        ("bn_after_add", "full_preact", "original"),
        ("relu_before_add", "relu_preact", "full_preact"),
    ],
    ids="-".join,
)
def test_units_of_several_kinds(units):
    """Any unit may emit, and any other may follow."""
    cases = CHAINS["identities"]
    for mode in ("train", "frozen", "odd-frozen"):
        chain = set_mode(build_chain("basic", cases, units=units), mode)
        state = state_of(chain)
        assert_same(run_block(chain, X), run_formula(chain_formula(chain, cases), state, X), what=mode)


def test_the_last_norm_of_a_network():
    """``NormReLU`` behind the last unit reads the statistics too."""
    found = []
    for chain in chain_pair():
        fused = type(chain[0]) is not Stock.BasicUnit
        head = NormReLU(4) if fused else nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
        norm = head.bn if fused else head[0]
        randomise(nn.ModuleList([norm]), seed=30).double()
        for training in (True, False):
            found.append(run_block(nn.Sequential(*chain, head).train(training), X))
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        assert_same({name.replace("3.bn", "3.0"): t for name, t in ours.items()}, theirs)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    """A pass that moves running statistics alone, as after weight averaging."""
    fused, plain = chain_pair()
    with context():
        assert_close(fused(X), plain(X), EXACT)
    for (name, ours), theirs in zip(fused.named_buffers(), plain.buffers(), strict=True):
        assert_same({name: ours}, {name: theirs})


@pytest.mark.parametrize(("emit", "expected"), [(True, 1), (False, 3)])
def test_statistics_are_taken_in_the_addition(emit, expected, monkeypatch):
    """Only the first unit, whose input no unit wrote, takes them in a pass of their own."""
    calls, original = [], ops.batch_norm.statistics
    monkeypatch.setattr(ops.batch_norm, "statistics", lambda y: calls.append(1) or original(y))
    chain = build_chain("basic", CHAINS["identities"])
    for block in chain:
        block.emit_statistics = emit
    chain(X)
    assert len(calls) == expected
    calls.clear()
    with torch.no_grad():
        chain.eval()(X)
    assert not calls


# --- what trains them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("each", [True, False], ids=["each unit", "the whole"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "saved tensors"])
@every_chain
def test_checkpointing(cases, reentrant, each):
    """Outputs and gradients are those without; running statistics move twice, as PyTorch's do."""
    chain = build_chain("basic", cases)
    exact = run_formula(chain_formula(chain, cases), state_of(chain), X)
    x = X.clone().requires_grad_()
    torch.manual_seed(SEED)
    y = x
    for part in chain if each else [chain]:
        y = checkpoint(part, y, use_reentrant=reentrant)
    y.backward(randn(*y.shape, seed=9))
    found = {"out": y.detach(), "x": x.grad} | {name: p.grad for name, p in chain.named_parameters()}
    assert_same(found, {name: t for name, t in exact.items() if not name.startswith("buffer")})


@every_chain
def test_double_backward(cases):
    found = []
    for chain in chain_pair(cases=cases):
        x = X.clone().requires_grad_()
        torch.manual_seed(SEED)
        out = chain(x)
        gradients = torch.autograd.grad(out, [x, *chain.parameters()], randn(*out.shape, seed=9), create_graph=True)
        sum(g.square().sum() for g in gradients).backward()
        leaves = {"x": x} | dict(chain.named_parameters())
        found.append({name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()})
    assert_same(*found, 1e-7)


def test_gradcheck():
    for mode in ("train", "odd-frozen"):
        run, parameters = as_function(set_mode(build_chain("basic", CHAINS["identities"][:2]), mode))
        x = randn(2, 4, 3, 4, seed=8).requires_grad_()
        assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True), mode


def test_compile():
    cases = CHAINS["option B, then identities"]
    for training in (True, False):
        chain = build_chain("basic", cases).train(training)
        exact = run_formula(chain_formula(chain, cases), state_of(chain), X)
        compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
        found = {name.replace("_orig_mod.", ""): t for name, t in run_block(compiled, X).items()}
        assert_same(found, exact)


def test_compiled_and_eager_units_side_by_side():
    """An eager unit's sum read by a compiled unit, and the other way round."""
    found = []
    for chain in chain_pair():
        parts = [torch.compile(block, backend="aot_eager") if i == 1 else block for i, block in enumerate(chain)]
        x = X.clone().requires_grad_()
        y = parts[0](x)
        out = parts[2](parts[1](y))
        out.backward(randn(*out.shape, seed=9))
        found.append({"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in chain.named_parameters()})
    assert_same(*found)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast(x_dtype):
    """Errors against fp64 at most twice PyTorch's, the same dtypes."""
    cases = CHAINS["identities"]
    fused, plain = (build_chain("basic", cases, package=package) for package in (resnet_fused.blocks, Stock))
    for chain in (fused, plain):
        for block in chain:
            conditioned(block, torch.float32)
        chain.float()
    x = randn(4, 4, 8, 9, seed=5).to(x_dtype)
    exact = copy.deepcopy(plain).double()
    truth = run_formula(chain_formula(exact, cases), state_of(exact), x.double())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours, theirs = fused(x), plain(x)
    assert ours.dtype == theirs.dtype
    a, b = ((t.double() - truth["out"]).norm() / truth["out"].norm() for t in (ours, theirs))
    assert a <= 2 * b + FLOOR[torch.bfloat16]
