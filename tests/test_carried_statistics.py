"""The statistics that a unit hands on with its sum, when the sum is changed, copied, freed or read twice.

``emit_statistics`` says where statistics are taken, never of what: the next unit normalises by those of what it reads.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from helpers import assert_close, randn
from parity import EXACT, assert_same, chain_formula, run_block, run_formula, state_of
from torch import nn
from units import CHAINS, build_chain, chain_pair

X = randn(3, 4, 5, 7, seed=5)


# --- what may happen in between ---------------------------------------------------------------------------------------


def add_out(y):
    return torch.add(y, 1.0, out=y)


def write_one(y):
    y[0, 1] = 3.0
    return y


def write_view(y):
    y.view(-1)[::3].mul_(2)
    return y


def write_detached(y):
    y.detach().mul_(2)
    return y


def foreach(y):
    torch._foreach_mul_([y], 2.0)
    return y


IN_PLACE = {
    "mul_": lambda y: y.mul_(1.5),
    "relu_": torch.relu_,
    "foreach": foreach,
    "index": write_one,
    "view": write_view,
    "detached": write_detached,
    "out": add_out,
    "copy_": lambda y: y.copy_(y.detach().flip(0) + 1),
}
DERIVED = {
    "clone": lambda y: y.clone(),
    "detach": lambda y: y.detach(),
    "scaled": lambda y: y * 2,
    "shifted": lambda y: y + 1,
    "images": lambda y: y[:2],
    "pixels": lambda y: y[:, :, 1:, 1:],
    "channels": lambda y: y[:, [1, 0, 3, 2]],
    "flipped": lambda y: y.flip(0, 2),
    "channels_last": lambda y: y.contiguous(memory_format=torch.channels_last),
    "nchw": lambda y: y.contiguous(),
    "fp32 and back": lambda y: y.float().double(),
    "parameter": lambda y: nn.Parameter(y.detach() * 2),
    "concatenated": lambda y: torch.cat([y, y + 1]),
    "expanded": lambda y: y[:1].expand_as(y),
}


@pytest.mark.parametrize(
    ("grad", "how"),
    [
        (grad, how)
        for grad in ("grad", "no_grad", "inference_mode")
        for how in IN_PLACE
        if (grad, how) != ("grad", "out")
    ],
)
def test_modified_in_place(grad, how):
    """The statistics of the tensor as it is now, and its gradients."""
    found = []
    for first, second, _ in chain_pair():
        x = X.clone().requires_grad_(grad == "grad")
        with {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[grad]():
            out = second(IN_PLACE[how](first(x)))
        found.append({"out": out.detach().clone()})
        if grad == "grad":
            out.backward(randn(*out.shape, seed=9))
            found[-1] |= {"x": x.grad}
            found[-1] |= {f"{i}.{n}": p.grad for i, b in enumerate((first, second)) for n, p in b.named_parameters()}
        found[-1] |= {f"{name} of the second": b.clone() for name, b in second.named_buffers()}
    assert_same(*found)


@pytest.mark.parametrize("how", DERIVED)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_made_into_another(how, layout):
    found = []
    for first, second, _ in chain_pair():
        x = X.clone(memory_format=layout).requires_grad_()
        out = second(DERIVED[how](first(x)))
        out.backward(randn(*out.shape, seed=9))
        found.append({"out": out.detach()} | ({} if x.grad is None else {"x": x.grad}))
        found[-1] |= {name: p.grad for name, p in second.named_parameters()}
        found[-1] |= {f"buffer {name}": b.clone() for name, b in second.named_buffers()}
    assert_same(*found, 1e-6 if how == "fp32 and back" else EXACT)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_modified_after_it_was_read(layout):
    """PyTorch's error, or where backward has a copy the gradient of what was read; never one of other numbers."""
    first, second, _ = build_chain("basic", CHAINS["identities"]).to(memory_format=layout)
    expected = run_block(nn.Sequential(copy.deepcopy(first), copy.deepcopy(second)), X)["x"]
    x = X.clone(memory_format=layout).requires_grad_()
    y = first(x)
    out = second(y)
    y.mul_(2)
    refused = ""
    try:
        out.backward(randn(*out.shape, seed=9))
    except RuntimeError as error:
        refused = str(error)
    if refused or layout == torch.channels_last:
        assert "modified by an inplace operation" in refused
    else:
        assert_close(x.grad, expected, EXACT)


def test_each_tensor_has_its_own():
    """Several calls of one unit before the first result is read, and one result read twice."""
    found = []
    for first, second, third in chain_pair():
        x = X.clone().requires_grad_()
        a, b = first(x), first(2 * x + 1)
        out = torch.stack([second(a), second(b), third(a), third(second(b))])
        out.backward(randn(*out.shape, seed=9))
        found.append({"out": out.detach(), "x": x.grad})
        found[-1] |= {f"{i}.{n}": p.grad for i, m in enumerate((first, second, third)) for n, p in m.named_parameters()}
        found[-1] |= {f"buffer {i} {n}": t for i, m in enumerate((second, third)) for n, t in m.named_buffers()}
    assert_same(*found)


def test_a_tensor_in_the_place_of_a_dead_one():
    """Nothing of a freed sum is found again under its address or its identity."""
    fused, plain = chain_pair()
    with torch.no_grad():
        for i in range(30):
            y = fused[0](X)
            del y
            z = torch.empty_like(X).copy_(randn(*X.shape, seed=50 + i))
            assert_close(fused[1](z), plain[1](z), EXACT)


def test_nothing_is_kept_alive():
    chain = build_chain("basic", CHAINS["identities"])
    y = chain[0](X.clone().requires_grad_())
    out = chain[1](y)
    references = [weakref.ref(y), weakref.ref(out)]
    del y, out
    gc.collect()
    assert [reference() for reference in references] == [None, None]


# --- copies of the tensor and of the units ----------------------------------------------------------------------------


def test_the_sum_is_a_plain_tensor():
    """Saved, pickled and copied it is what it is without; a copy read by a unit gives PyTorch's result."""
    fused, plain = chain_pair()
    with torch.no_grad():
        y = fused[0](X)
        size = len(pickle.dumps(y.clone()))
        assert len(pickle.dumps(y)) == size
        assert not y.__dict__
        assert type(y) is torch.Tensor
        file = io.BytesIO()
        torch.save(y, file)
        file.seek(0)
        expected = plain[1](plain[0](X))
        for other in (copy.deepcopy(y), pickle.loads(pickle.dumps(y)), torch.load(file), copy.copy(y)):
            assert torch.equal(other, y)
            assert_close(fused[1](other), expected, EXACT)
            other.mul_(2)
            assert_close(fused[1](other), plain[1](2 * plain[0](X)), EXACT)
            other.div_(2)
        assert_close(fused[1](y), expected, EXACT)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_the_units(how):
    chain = build_chain("basic", CHAINS["identities"])
    chain(X)
    other = how(chain)
    assert all(block.emit_statistics for block in other)
    state = state_of(other)
    assert_same(run_block(other, X), run_formula(chain_formula(other, CHAINS["identities"]), state, X))
