"""The Triton kernels of ``batch_norm``: shapes at their edges, counts, parameters of other dtypes, launches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import assert_close, dtype_id, randn
from kernel_helpers import DEVICE, DTYPES, compare, maker, run

pytest.importorskip("triton")

from resnet_fused import backends, reference, use_backend
from resnet_fused.kernels import _launch, batch_norm
from resnet_fused.kernels._launch import recording
from resnet_fused.ops._op import ops
from resnet_fused.tuning import RowsConfig

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)

# Small tiles: several blocks of channels, and in the interpreter 3 programs that walk over several tiles.
SMALL = RowsConfig(rows=32, channels=16, warps=1, programs=1)
VECTORS = RowsConfig(rows=1, channels=4, warps=1, programs=1)


def counts(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


# --- statistics -----------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("config", [None, SMALL], ids=["default", "small"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 5, 1, 1), (2, 3, 5, 7), (3, 24, 9, 11), (2, 72, 8, 8), (1, 16, 1, 33)], ids=str
)
def test_statistics(shape, config, dtype):
    compare("bn_statistics", (maker(dtype).activation(*shape),), config)


@pytest.mark.parametrize("config", [None, SMALL], ids=["default", "small"])
def test_statistics_under_a_large_mean(config):
    """Mean 1e4 deviations from 0; some images with a mean of their own."""
    y = maker(torch.float32).activation(8, 16, 7, 9) + 1e4
    y[::2] += 3
    compare("bn_statistics", (y,), config, tolerance=1e-3)
    _, mean, m2 = run("bn_statistics", (y,), config)
    assert_close(m2[0], ((y.double() - y.double().mean((0, 2, 3), keepdim=True)) ** 2).sum((0, 2, 3)), 1e-3)
    assert_close(mean[0], y.double().mean((0, 2, 3)), 1e-7)


@every_dtype
def test_statistics_keep_nan_in_its_channel(dtype):
    y = maker(dtype).activation(2, 20, 9, 9)
    y[1, 17, 3, 4] = float("nan")
    _, mean, m2 = run("bn_statistics", (y,), SMALL)
    for t in (mean, m2):
        assert t.isnan()[0].nonzero().flatten().tolist() == [17]


# --- tiles to a norm ------------------------------------------------------------------------------------------------


def tiles(m, number: int, channels: int) -> tuple:
    mean = torch.stack([m.vector(channels) for _ in range(number)])
    m2 = torch.stack([m.vector(channels, positive=True) for _ in range(number)])
    return counts(*(7 * i % 5 for i in range(1, number + 1))), mean, m2


@pytest.mark.parametrize("config", [None, VECTORS], ids=["default", "small"])
@pytest.mark.parametrize("number", [1, 2, 16, 37])
def test_merge_and_finalize(number, config):
    m, channels = maker(torch.float32), 7
    given = tiles(m, number, channels)
    compare("bn_merge", given, config)
    for weight, bias in ((None, None), (m.vector(channels), None), (None, m.vector(channels))):
        compare("bn_finalize", (*given, weight, bias, 1e-5), config)


@every_dtype
def test_parameters_of_any_dtype(dtype):
    m = maker(torch.float32)
    weight, bias = m.vector(6).to(dtype), m.vector(12).to(dtype)[::2]
    found = compare("bn_finalize", (*tiles(m, 3, 6), weight, bias, 1e-3), VECTORS, tolerance=1e-5)
    assert all(t.dtype == torch.float32 for t in found)
    args = (m.vector(6), m.vector(6), weight, *m.norm(6), counts(3, 4))
    compare("bn_coefficients", args, VECTORS, tolerance=1e-5)


def test_counts_that_add_up_past_int32():
    m, many = maker(torch.float32), counts(2**31 - 1, 2**31 - 1, 2)
    _, mean, m2 = tiles(m, 3, 4)
    compare("bn_finalize", (many, mean, m2 * 1e9, None, None, 1e-5), tolerance=1e-5)
    compare("bn_coefficients", (m.vector(4), m.vector(4), None, *m.norm(4), many), tolerance=1e-5)


@pytest.mark.parametrize("given", [(1,), (0,), (1, 0), (0, 0), ()], ids=str)
def test_one_value_or_none(given):
    """What the reference gives, inf and NaN included."""
    m, count, number = maker(torch.float32), counts(*given), len(given)
    mean = torch.stack([m.vector(3) for _ in given]) if given else torch.empty(0, 3, device=DEVICE)
    args = (count, mean, torch.zeros_like(mean), m.vector(3), m.vector(3), 1e-5)
    for found, expected in zip(run("bn_finalize", args), reference.bn_finalize(*args), strict=True):
        assert torch.allclose(found, expected, equal_nan=True), number
    for found, expected in zip(run("bn_merge", args[:3]), reference.bn_merge(*args[:3]), strict=True):
        assert torch.allclose(found, expected, equal_nan=True), number


def test_tiles_of_any_strides():
    m = maker(torch.float32)
    count, mean, m2 = tiles(m, 4, 6)
    given = count[::2], mean.t().contiguous().t()[::2], m2[::2].flip(1)
    compare("bn_merge", given)
    compare("bn_finalize", (*given, None, None, 1e-5))


# --- launches -------------------------------------------------------------------------------------------------------


def test_counters_of_a_capture(monkeypatch):
    """One buffer for what a stream does in one capture; nothing is shared with another stream or capture."""
    device, capture = torch.device("cpu"), [7]
    monkeypatch.setattr(_launch, "_captured", {})
    monkeypatch.setattr(_launch, "_capture_id", lambda stream: capture[0])
    first = _launch._counters_of_capture(1, device, 3)
    assert first.dtype == torch.int32
    assert not first.any()
    assert _launch._counters_of_capture(1, device, _launch._COUNTERS) is first
    assert _launch._counters_of_capture(2, device, 3) is not first
    capture[0] = 8
    second = _launch._counters_of_capture(1, device, 3)
    assert second is not first
    assert _launch._counters_of_capture(1, device, 3) is second
    capture[0] = None  # the driver's function is missing
    assert _launch._counters_of_capture(1, device, 3) is not _launch._counters_of_capture(1, device, 3)


def test_compiled_code_keeps_no_counters(monkeypatch):
    """What the dispatcher runs may allocate from a graph's pool, where nothing of ours may stay."""
    held = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    gpu, counters, given = SimpleNamespace(type="cuda", index=0), _launch.counters, []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(_launch.plans, "captures", lambda device: False)
    monkeypatch.setattr(_launch, "_counters_of", lambda stream, device: held)
    monkeypatch.setattr(_launch, "_zeros", lambda device, needed: torch.zeros(needed, dtype=torch.int32, device=DEVICE))
    monkeypatch.setattr(batch_norm, "counters", lambda device, needed: given.append(counters(gpu, needed)) or given[-1])
    y = randn(2, 4, 3, 3, dtype=torch.float32, device=DEVICE)
    with use_backend("triton"):
        for call in (ops["bn_statistics"], torch.ops.resnet_fused.bn_statistics, ops["bn_statistics"]):
            assert call(y)[0].item() == 18
    assert [found is held for found in given] == [True, False, True]


@pytest.mark.gpu
def test_a_capture_has_its_own_counters():
    side = torch.cuda.Stream()
    outside = _launch.counters(torch.device("cuda", 0), 3)
    found = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            found.append(_launch.counters(torch.device("cuda", 0), 3))
            assert _launch.counters(torch.device("cuda", 0), 3) is found[-1]
    assert outside is not found[0]
    assert found[0] is not found[1]


def test_one_launch_each():
    m = maker(torch.float32)
    calls = {
        "bn_statistics": (m.activation(2, 3, 4, 5),),
        "bn_merge": tiles(m, 3, 4),
        "bn_finalize": (*tiles(m, 3, 4), m.vector(4), m.vector(4), 1e-5),
        "bn_coefficients": (m.vector(4), m.vector(4), None, *m.norm(4), counts(3)),
    }
    for op, args in calls.items():
        with recording() as found:
            getattr(batch_norm, op)(*args)
        assert len(found) == 1, op


@every_dtype
@pytest.mark.parametrize("channels", [1, 3, 64, 100, 2048])
def test_candidates_fit_their_problem(channels, dtype):
    y = torch.empty(2, channels, 9, 9, dtype=dtype, device="meta")
    found = batch_norm.candidates(batch_norm.problem("bn_statistics", y))
    assert len(set(found)) == len(found)
    assert all(c.rows * c.channels >= 32 * c.warps for c in found)


def test_declined():
    wide = torch.ones(1, 3, device=DEVICE, dtype=torch.float64)
    args = (counts(3), wide, wide, None, None, 1e-5)
    assert "not torch.float64" in str(backends.unavailable("bn_finalize", "triton", *args))
    empty = torch.empty(0, 3, 4, 4, device=DEVICE)
    assert backends.unavailable("bn_statistics", "triton", empty) == "a tensor is empty"
