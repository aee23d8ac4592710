"""Plans: a planned call is the call as written, for other values too, and only where nothing that decides changed."""

from __future__ import annotations

import copy
import ctypes
import gc
import threading
import weakref

import pytest
import torch
from helpers import randn
from kernel_helpers import DEVICE
from test_kernels_blocks import BLOCKS, block_channels, pair
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import ops, plans, tuning, use_backend
from resnet_fused.cuda._device import run
from resnet_fused.kernels import _launch
from resnet_fused.operands import Conv, Deferred
from resnet_fused.ops._op import observed


@pytest.fixture(autouse=True)
def _planning():
    plans.forget()
    with plans.everywhere():
        yield
    plans.forget()


def kept() -> list[str]:
    """Sources of the plans that were made."""
    return [plan.source for plan in plans.plans() if plan.run is not None]


def reasons() -> list[str | None]:
    return [plan.reason for plan in plans.plans()]


def compare(function, static, *rounds) -> None:
    """Every round planned, bit for bit as written: the first two teach, the rest replay."""
    for tensors in rounds:
        copies = [None if t is None else t.clone() for t in tensors]
        expected = function(static, *copies)
        found = plans.call(function, static, tensors)
        assert len(found) == len(expected)
        for f, e in zip(found, expected, strict=True):
            assert (f is None) == (e is None)
            if f is not None:
                assert (f.dtype, f.shape, f.stride()) == (e.dtype, e.shape, e.stride())
                assert torch.equal(f, e)
        for t, changed in zip(tensors, copies, strict=True):  # what the function writes to, the plan writes to
            assert t is None or torch.equal(t, changed)


def draw(*shape: int, rounds: int = 4, **options) -> list[Tensor]:
    return [randn(*shape, seed=seed, device=DEVICE, **options) for seed in range(rounds)]


# --- functions of PyTorch's operators ---------------------------------------------------------------------------------


def _mixed(static, x, weight, bias):
    """Views, allocations, a row of a computed tensor, results that nobody reads, something written to in place."""
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    torch.empty(1000, device=x.device).fill_(1.0)
    _ = rows.exp()
    product = rows @ weight.t()
    moments = torch.empty(2, product.shape[1], device=x.device)
    mean, square = moments.unbind()
    mean.copy_(product.mean(0))
    square.copy_((product * product).mean(0))
    out = product - mean
    if bias is not None:
        out.add_(bias, alpha=static)
    return out.view(x.shape[0], -1), mean, square, None, x, out[1:, ::2]


def test_a_function_of_operators():
    xs = [x.to(memory_format=torch.channels_last) for x in draw(2, 6, 3, 5)]
    weight, bias = draw(4, 6, rounds=1)[0], draw(4, rounds=1)[0]
    compare(_mixed, 0.5, *[(x, weight, bias) for x in xs])
    (source,) = kept()
    assert "def replay(stream, t0, t1, t2):" in source
    compare(_mixed, 0.5, *[(x, weight, None) for x in xs])
    compare(_mixed, 2.0, *[(x, weight, bias) for x in xs])
    assert len(kept()) == 3


def _twice(static, x, y):
    return (torch.mul(x, 2.0).add_(y),)


def test_nothing_that_nobody_reads_is_done():
    def function(static, x):
        _ = torch.exp(x), torch.zeros_like(x), torch.empty_like(x)
        return (torch.mul(x, static),)

    for x in draw(8):
        plans.call(function, 3.0, [x])
    (source,) = kept()
    assert len(source.splitlines()) == 3  # def, mul, return


def test_memory_is_freed_after_its_last_use():
    def function(static, x):
        a = torch.exp(x)
        b = torch.sin(a)
        del a
        return (torch.cos(b),)

    for x in draw(8):
        plans.call(function, None, [x])
    (source,) = kept()
    assert [line.strip() for line in source.splitlines() if "del " in line] == ["del t1", "del t2"]
    assert source.index("del t1") < source.index("t3 = ")


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: (x.double(), y.double()),
        lambda x, y: (x[:, :3], y[:, :3]),
        lambda x, y: (x[1:], y[1:]),
        lambda x, y: (x.t().contiguous().t(), y),
        lambda x, y: (x, x),
        lambda x, y: (torch.cat([x.flatten(), x.flatten()])[1 : x.numel() + 1].view_as(x), y),
    ],
    ids=["dtype", "strides", "rows", "order", "same tensor twice", "alignment"],
)
def test_another_kind_of_tensors_is_another_plan(change):
    pairs = list(zip(draw(4, 6), draw(4, 6, dtype=torch.float32), strict=True))
    compare(_twice, None, *pairs)
    before = len(kept())
    compare(_twice, None, *[change(x, y) for x, y in pairs])
    assert before == 1
    assert len(kept()) == 2
    compare(_twice, None, *pairs)
    assert len(kept()) == 2


def test_settings_that_decide_are_part_of_the_kind():
    xs = draw(4)
    compare(_twice, None, *[(x, x) for x in xs])
    with use_backend("reference"):
        compare(_twice, None, *[(x, x) for x in xs])
    with torch.inference_mode():
        for x in xs:
            plans.call(_twice, None, [x, x])
    assert len(kept()) == 3


# --- what cannot be planned, and when nothing is ----------------------------------------------------------------------

_constant = torch.ones(4)


def _reads_a_number(static, x):
    return (x * float(x.sum()),)


def _from_nowhere(static, x):
    return (x + _constant.to(x.device),)


@pytest.mark.parametrize(
    ("function", "reason"),
    [(_reads_a_number, "aten._local_scalar_dense.default returns numbers"), (_from_nowhere, "came from nowhere")],
    ids=["a number", "a tensor from nowhere"],
)
def test_what_cannot_be_planned_runs_as_written(function, reason):
    if DEVICE == "cuda" and function is _from_nowhere:
        pytest.skip("copied to the device within the function")
    for x in draw(4):
        assert torch.equal(plans.call(function, None, [x])[0], function(None, x)[0])
    assert kept() == []
    (found,) = reasons()
    assert reason in found


def test_arguments_that_overlap_are_not_planned():
    buffers = draw(12)
    for b in buffers:
        assert torch.equal(plans.call(_twice, None, [b[:8], b[4:]])[0], _twice(None, b[:8], b[4:])[0])
    assert reasons() == ["arguments overlap in memory"]


def test_a_failing_call_leaves_no_plan():
    def function(static, x):
        raise ValueError("no")

    for x in draw(4):
        with pytest.raises(ValueError, match="no"):
            plans.call(function, None, [x])
    assert plans.recorder() is None
    assert kept() == []
    compare(_twice, None, *[(x, x) for x in draw(4)])
    assert len(kept()) == 1


class _Quiet(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context",
    [
        plans.suspended,
        _launch.recording,
        _Quiet,
        lambda: tuning.use("conv1x1_fprop", tuning.Materialised()),
        lambda: observed(lambda name, args: torch.no_grad()),
    ],
    ids=["suspended", "recording", "dispatch mode", "configuration", "observer"],
)
def test_nothing_is_planned_while_somebody_looks(context):
    with context():
        for x in draw(4):
            plans.call(_twice, None, [x, x])
    assert plans.plans() == []
    compare(_twice, None, *[(x, x) for x in draw(4)])
    assert len(kept()) == 1
    with context():
        compare(_twice, None, *[(x, x) for x in draw(4)])


def test_the_oldest_go_first(monkeypatch):
    monkeypatch.setattr(plans, "_KEPT", 4)
    for n in range(1, 8):
        compare(_twice, n, *[(x, x) for x in draw(4)])
    assert len(kept()) == 4
    compare(_twice, 7, *[(x, x) for x in draw(4)])
    assert len(kept()) == 4


def test_a_plan_holds_no_tensor():
    xs = draw(64)
    alive = []
    for x in xs:
        outs = plans.call(_mixed_small, None, [x])
        alive += [weakref.ref(t) for t in (x, *outs)]
    assert len(kept()) == 1
    del xs, x, outs
    gc.collect()
    assert all(ref() is None for ref in alive)


def _mixed_small(static, x):
    a = torch.exp(x)
    return a, torch.stack([a, a]).unbind()[1]


def test_threads_plan_for_themselves():
    xs = draw(256, rounds=24)
    failures = []

    def work(own):
        try:
            for x in own:
                (found,) = plans.call(_twice, None, [x, x])
                assert torch.equal(found, _twice(None, x, x)[0])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(xs[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# --- launches ---------------------------------------------------------------------------------------------------------


def _add(x: int, y: int, out: int, count: int, stream: int) -> None:
    """``out = x + y`` of ``count`` floats on the CPU, from addresses as a kernel gets them."""
    a, b, c = ((ctypes.c_float * count).from_address(at) for at in (x, y, out))
    c[:] = [i + j for i, j in zip(a, b, strict=True)]


def _launched(static, x):
    """x + 2 x + 3 x, by way of tensors that are allocated for launches alone and one for PyTorch's operators."""
    none, twice, both = x.new_empty(0), torch.empty_like(x), x.new_empty(3, *x.shape)
    for a, b, out in ((x, x, twice), (twice, x, both[1]), (both[1], twice, both[0]), (both[0], x, both[2])):
        run(_called_with(none), x.device, a, b, out, x.numel())
    return both[0] + both[2].neg(), none


def _called_with(none: Tensor):
    assert none.numel() == 0
    return _add


@pytest.mark.skipif(DEVICE != "cpu", reason="the launches run on the CPU")
def test_launches_by_address():
    xs = [(8 * x).round() for x in draw(5, 7, dtype=torch.float32)]  # sums are exact
    compare(_launched, None, *[(x,) for x in xs])
    for x in xs:
        assert torch.equal(plans.call(_launched, None, [x])[0], -x)


@pytest.mark.skipif(DEVICE != "cpu", reason="the launches run on the CPU")
@pytest.mark.parametrize(
    ("count", "allocations"), [(40, ["1024", None]), (1 << 17, [None] * 4)], ids=["small", "large"]
)
def test_small_memory_of_launches_is_allocated_together(count, allocations):
    def function(static, x):
        a, b, wide, out = (torch.empty(n * count, device=x.device) for n in (1, 1, 2, 1))
        for source, to in ((x, a), (a, b), (b, wide[count:]), (wide[count:], out)):
            run(_add, x.device, source, source, to, count)
        return (out,)

    for x in draw(count, dtype=torch.float32):
        assert torch.equal(plans.call(function, None, [x])[0], 16 * x)
    (source,) = kept()
    found = [line for line in source.splitlines() if "dtype=" in line]
    assert len(found) == len(allocations)
    # In it 160, 160 and 320 bytes begin at multiples of 256.
    assert all(nbytes is None or f"({nbytes}, " in line for line, nbytes in zip(found, allocations, strict=True))


def _convolutions(backend, x, scale, shift, weight, next_weight):
    """Two ops, one of which reads what the other wrote."""
    with use_backend(backend):
        y, tiles = ops.conv(weight.shape[-1]).fprop(Deferred(x, scale, shift), weight, Conv(), statistics=True)
        norm, var = ops.batch_norm.finalize(tiles, None, None, 1e-5)
        z, _ = ops.conv(next_weight.shape[-1]).fprop(
            Deferred(y, norm.scale, norm.shift), next_weight, Conv(), statistics=False
        )
    return y, *norm, var, z


@pytest.mark.parametrize("backend", ["triton", "aten", "reference"])
def test_launches_of_kernels(backend):
    rounds = []
    for seed in range(4):
        x = randn(2, 16, 5, 7, seed=seed, device=DEVICE, dtype=torch.float16).to(memory_format=torch.channels_last)
        scale, shift = randn(16, seed=seed + 10, device=DEVICE), randn(16, seed=seed + 20, device=DEVICE)
        weights = [randn(k, c, 1, 1, seed=seed + k, device=DEVICE, dtype=torch.float16) for k, c in ((24, 16), (8, 24))]
        rounds.append((x, scale.float(), shift.float(), *weights))
    compare(_convolutions, backend, *rounds)
    assert len(kept()) == 1, reasons()


# --- blocks -----------------------------------------------------------------------------------------------------------


def _train(block: torch.nn.Module, x: Tensor, seed: int) -> dict[str, Tensor]:
    """Output, gradients and running statistics of a training step."""
    block.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    out = block(x)
    out.backward(randn(*out.shape, seed=seed, dtype=out.dtype, device=DEVICE))
    found = {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}
    return {**found, **{name: b.clone() for name, b in block.named_buffers()}}


def _compare_blocks(block: torch.nn.Module, channels: int, dtype: torch.dtype, backend: str) -> None:
    planned, written = block, copy.deepcopy(block)
    for seed in range(4):
        x = randn(3, channels, 6, 7, seed=seed, dtype=dtype, device=DEVICE).to(memory_format=torch.channels_last)
        with use_backend(backend):
            ours = _train(planned, x, seed + 50)
            with plans.suspended():
                theirs = _train(written, x, seed + 50)
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), f"{name} in round {seed}"


GATED = "squeeze and excitation"  # its two functions are not planned


@pytest.mark.parametrize("name", [name for name in BLOCKS if name != GATED])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("triton", torch.float16), ("aten", torch.float32), ("reference", torch.float64)],
    ids=["triton", "aten", "reference"],
)
def test_training_steps_of_a_block(name, backend, dtype):
    block, _ = pair(name, dtype)
    _compare_blocks(block, block_channels(name), dtype, backend)
    assert len(kept()) >= 2  # forward and backward, of a norm alone too where PyTorch's modules read it
    assert set(reasons()) == {None}


def test_blocks_of_one_kind_share_their_plans():
    first, _ = pair("bottleneck", torch.float32)
    second = copy.deepcopy(first)
    x = randn(2, 32, 5, 5, dtype=torch.float32, device=DEVICE).to(memory_format=torch.channels_last)
    for _ in range(2):
        for block in (first, second):
            _train(block, x, 3)
    assert len(kept()) == 2
