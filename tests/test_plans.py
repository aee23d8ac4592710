"""Plans: a planned call is the call as written, for other values too, and only where nothing that decides changed."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from helpers import randn
from kernel_helpers import DEVICE
from plan_helpers import compare, draw, kept, reasons
from test_kernels_blocks import BLOCKS, block_channels, pair
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import plans, tuning, use_backend
from resnet_fused.blocks import inference
from resnet_fused.kernels import _launch
from resnet_fused.ops._op import observed

pytestmark = pytest.mark.usefixtures("planning")


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
    xs = draw(4, dtype=torch.float32)
    compare(_twice, None, *[(x, x) for x in xs])
    with use_backend("reference"):
        compare(_twice, None, *[(x, x) for x in xs])
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        compare(_twice, None, *[(x, x) for x in xs])
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    with torch.inference_mode():
        for x in xs:
            plans.call(_twice, None, [x, x])
    assert len(kept()) == 4


def test_views_without_elements_and_what_is_returned_twice():
    def function(static, x, y):
        part = torch.exp(x)[1:, 1:]
        empty = torch.cat([part[:0], y[:0, 1:], x[:0, 5:6].expand(0, part.shape[1])])
        return part, empty, part, y[:0], part[:, 0], x.new_empty(0, 3)

    rounds = [(x, y) for x, y in zip(draw(4, 6), draw(4, 6), strict=True)]
    compare(function, None, *rounds)
    assert len(kept()) == 1, reasons()
    outs = plans.call(function, None, rounds[0])
    assert outs[0] is outs[2]


# --- what cannot be planned, and when nothing is ----------------------------------------------------------------------

_constant = torch.ones(4)


def _reads_a_number(static, x):
    return (x * float(x.sum()),)


def _from_nowhere(static, x):
    return (x + _constant,)


def _view_from_nowhere(static, x):
    return (x + _constant.view(2, 2).t().reshape(4),)


def _made_from_values(static, x):
    return (x * torch.tensor(2.0),)


def _without_address(static, x):
    return ((2 * x).to_sparse().to_dense(),)


@pytest.mark.skipif(DEVICE != "cpu", reason="the constants lie on the CPU")
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_reads_a_number, "aten._local_scalar_dense.default returns numbers"),
        (_from_nowhere, "came from nowhere"),
        (_view_from_nowhere, "came from nowhere"),
        (_made_from_values, "came from nowhere"),
        (_without_address, "Cannot access data pointer"),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_what_cannot_be_planned_runs_as_written(function, reason):
    for x in draw(4):
        assert torch.equal(plans.call(function, None, [x])[0], function(None, x)[0])
    assert kept() == []
    (found,) = reasons()
    assert reason in found


def test_an_exception_while_it_is_recorded_is_no_plan_and_does_not_come_again():
    def function(static, x):
        if plans.recorder() is not None:
            raise torch.OutOfMemoryError("recording needs more")
        return (2 * x,)

    xs = draw(8)
    plans.call(function, None, [xs[0]])
    with pytest.raises(torch.OutOfMemoryError, match="recording needs more"):
        plans.call(function, None, [xs[1]])
    for x in xs[2:]:
        assert torch.equal(plans.call(function, None, [x])[0], 2 * x)
    assert reasons() == ["failed while it was recorded"]
    assert plans.recorder() is None


def test_tensors_without_memory_are_never_planned():
    """Neither a fake tensor's call nor a real one's by what a fake one did."""
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in draw(4)]
    for x in fake:
        (found,) = plans.call(_twice, None, [x, x])
        assert found.shape == x.shape
    assert plans.plans() == []
    compare(_twice, None, *[(x, x) for x in draw(4)])
    assert len(kept()) == 1


def test_recording_frees_memory_when_the_function_does():
    counts = []

    def counting(static, x):
        made = []
        for _ in range(4):
            x = torch.exp(x)
            made.append(StorageWeakRef(x.untyped_storage()))
        counts.append(sum(not storage.expired() for storage in made))
        return (x,)

    for x in draw(64):
        plans.call(counting, None, [x])
    assert counts == [1, 1]  # as written, and recorded
    assert len(kept()) == 1


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


# --- inference --------------------------------------------------------------------------------------------------------


def _infer(block: torch.nn.Module, backend: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and that of the calls as they are written."""
    with torch.no_grad(), use_backend(backend):
        found = block(x)
        with plans.suspended():
            return found, block(x)


def _own(block: torch.nn.Module) -> list[plans.Plan]:
    """The plans of what is kept for a block's inference."""
    found = [program._plans for program in inference._kept[block].made.values()]
    return [plan for own in found if own is not None for plan in own.plans()]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    ("backend", "dtype"), [("triton", torch.float16), ("reference", torch.float64)], ids=["triton", "reference"]
)
def test_inference_of_a_block(name, backend, dtype):
    block, _ = pair(name, dtype)
    block.eval()
    for seed in range(4):
        x = randn(3, block_channels(name), 6, 7, seed=seed, dtype=dtype, device=DEVICE)
        found, written = _infer(block, backend, x.to(memory_format=torch.channels_last))
        assert torch.equal(found, written), seed
    # What PyTorch's modules compute is not planned; nor is a gate.
    planned = name not in (GATED, "full pre-activation, projection")
    assert [plan.reason for plan in _own(block)] == [None] * planned
    assert kept() == []


def test_inference_follows_its_weights():
    """Folded anew, a block's inference is planned anew; what it had is freed with its plans."""
    block, _ = pair("bottleneck projection", torch.float32)
    block.eval()
    x = randn(2, 16, 5, 5, dtype=torch.float32, device=DEVICE).to(memory_format=torch.channels_last)
    folded = []
    for value in (0.5, 2.0):
        with torch.no_grad():
            block.conv3.weight.mul_(value)
        for _ in range(4):
            found, written = _infer(block, "triton", x)
            assert torch.equal(found, written)
        assert len(_own(block)) == 1
        (program,) = inference._kept[block].made.values()
        folded.append(weakref.ref(program._folded[0]))
        del program
    assert folded[0]() is None
    assert folded[1]() is not None
    assert kept() == []


def test_inference_under_autocast():
    """What is repeated has operands of autocast's dtype already; autocast must not come between."""
    block, _ = pair("bottleneck projection", torch.float32)
    block.eval()
    x = randn(2, 16, 5, 5, dtype=torch.float32, device=DEVICE).to(memory_format=torch.channels_last)
    for _ in range(4):
        with torch.autocast(DEVICE, torch.float16):
            found, written = _infer(block, "reference", x)
        assert found.dtype == torch.float16
        assert torch.equal(found, written)
    assert [plan.reason for plan in _own(block)] == [None]


def test_inference_with_another_alignment_and_in_inference_mode():
    block, _ = pair("bottleneck", torch.float16)
    block.eval()
    x = randn(2, 32, 5, 5, dtype=torch.float16, device=DEVICE).to(memory_format=torch.channels_last)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].as_strided(x.shape, x.stride()).copy_(x)
    for given in (x, shifted, x, shifted):
        for _ in range(2):
            found, written = _infer(block, "triton", given)
            assert torch.equal(found, written)
    with torch.inference_mode():
        for _ in range(3):
            found, written = _infer(block, "triton", x)
            assert found.is_inference()
            assert torch.equal(found, written)
    assert len(_own(block)) == 3
