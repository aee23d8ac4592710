"""The benchmarks' harness: the protocol on fake implementations and clocks, the tables, the peers, the rows."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import NETWORKS
from harness import cudnn_graphs, eager, jax_peer, kernels, networks, onnx_peer, plan, protocol, rows, session, verify
from harness.protocol import Prepared, Settings, Unavailable
from helpers import assert_close, randn, shell_environment
from torch import nn
from torchvision import models

from resnet_fused import traffic
from resnet_fused.cli import timing
from resnet_fused.cli.ceilings import Rates
from resnet_fused.ops._op import ops as registered

TESTS = Path(__file__).parent
ROOT = TESTS.parent
CPU = torch.device("cpu")

# --- the protocol ---------------------------------------------------------------------------------------------------


class FakeBench:
    """Implementations whose results are given; the exact one is 1 everywhere."""

    floor = 0.1
    worst = 0.3
    device_only = True

    def __init__(self, **values):
        self.values = values
        self.calls = Counter()

    def exact(self):
        return {"y": torch.ones(4, dtype=torch.float64)}

    def prepare(self, impl):
        value = self.values[impl]
        if isinstance(value, Exception):
            raise value
        if isinstance(value, tuple):
            return Prepared(lambda: 1.0, self.read, "elsewhere", value)

        def call():
            self.calls[impl] += 1
            return value

        return Prepared(call, self.read, f"config of {impl}")

    @staticmethod
    def read(value):
        return {"y": torch.full((4,), value)}


def measured(bench, *impls, **settings):
    """The results, and the order in which implementations were timed: each takes its own number of seconds."""
    order = []

    def clock(call, device, before):
        counted = bench.calls.copy()
        call()
        (impl,) = bench.calls - counted
        order.append(impl)
        return float(len(order))

    case = SimpleNamespace(open=lambda device: bench)
    settings = {"min_rounds": 3, "max_s": 0.0, "warm_s": 0.0} | settings
    return protocol.measure(case, impls, Settings(CPU, **settings), clock), order


def test_implementations_take_turns_and_keep_their_own_samples():
    results, order = measured(FakeBench(eager=1.0, fused=1.05, compile=1.0), "fused", "eager", "compile")
    assert order == ["fused", "eager", "compile", "eager", "compile", "fused", "compile", "fused", "eager"]
    assert {name: result.samples for name, result in results.items()} == {
        "fused": (1.0, 6.0, 8.0), "eager": (2.0, 4.0, 9.0), "compile": (3.0, 5.0, 7.0)
    }  # fmt: skip
    assert results["fused"].error == pytest.approx(0.05)
    assert results["fused"].error_torch == 0.0
    assert results["fused"].config == "config of fused"


def test_a_wrong_result_has_no_time():
    results, order = measured(FakeBench(eager=1.0, fused=1.0, compile=1.2), "fused", "compile", "eager")
    assert set(order) == {"fused", "eager"}
    assert results["compile"].samples == ()
    assert results["compile"].failure is None
    assert results["compile"].unmeasured == "WrongResult: y is off by 2.0e-01 of its norm, 1.0e-01 allowed"


def test_a_wrong_fused_result_fails_its_row():
    results, order = measured(FakeBench(eager=1.0, fused=1.5), "fused", "eager")
    assert results["fused"].failure.strip().endswith("WrongResult: y is off by 5.0e-01 of its norm, 1.0e-01 allowed")
    assert set(order) == {"eager"}


def test_eagers_own_error_widens_the_bound():
    results, _ = measured(FakeBench(eager=1.2, fused=1.45), "fused")
    assert results["fused"].failure is None  # 0.45 <= 2 * 0.2 + 0.1
    assert results["fused"].error_torch == pytest.approx(0.2)


def test_an_eager_sequence_of_something_else_is_no_measure():
    results, order = measured(FakeBench(eager=1.4, fused=1.0), "fused", "eager")
    text = "PyTorch's own y is off by 4.0e-01 of its norm, 0.3 allowed"
    assert text in results["fused"].failure
    assert results["eager"].unmeasured == f"WrongResult: {text}"
    assert order == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Unavailable("jax is not installed"), "jax is not installed"),
        (RuntimeError("\n  no kernel image\nmore"), "RuntimeError: no kernel image"),
        (ValueError(), "ValueError: no text"),
    ],
)
def test_what_cannot_run_says_why_and_the_others_run(error, reason):
    results, order = measured(FakeBench(eager=1.0, fused=1.0, jax=error), "jax", "fused", "eager")
    assert results["jax"].unmeasured == reason
    assert results["jax"].failure is None
    assert set(order) == {"fused", "eager"}


@pytest.mark.parametrize("impl", ["fused", "fused+graph"])
def test_a_fused_implementation_that_breaks_fails_its_row(impl):
    broken = FakeBench(eager=1.0, **{impl: RuntimeError("misaligned address")})
    results, _ = measured(broken, impl, "eager")
    assert "RuntimeError: misaligned address" in results[impl].failure


def test_a_failed_row_keeps_no_tensors():
    class Breaking(FakeBench):
        def prepare(self, impl):
            operand = torch.ones(3)
            self.seen = weakref.ref(operand)
            raise ValueError(f"no {impl} of {operand.shape}") from KeyError(operand)

    bench = Breaking()
    owner = weakref.ref(bench)
    results, _ = measured(bench, "fused")
    seen = bench.seen
    del bench
    gc.collect()
    assert owner() is None
    assert seen() is None
    assert "in prepare" in results["fused"].failure


def test_a_case_that_breaks_as_a_whole_is_measured_once():
    """Without memory for its operands, say: its rows say why, and ``fused`` fails."""
    opened = []

    def opening(device):
        opened.append(device)
        raise RuntimeError("CUDA out of memory")

    results = protocol.measure(SimpleNamespace(open=opening), iter(("fused", "eager")), Settings(CPU))
    assert opened == [CPU]
    assert {name: result.unmeasured for name, result in results.items()} == dict.fromkeys(
        ("fused", "eager"), "RuntimeError: CUDA out of memory"
    )
    assert results["eager"].failure is None
    assert "in opening" in results["fused"].failure


def test_times_from_another_process_are_taken_as_they_are():
    results, order = measured(FakeBench(eager=1.0, jax=(0.5, 0.7)), "jax", "eager")
    assert results["jax"].samples == (0.5, 0.7)
    assert results["jax"].config == "elsewhere"
    assert set(order) == {"eager"}


def test_without_timing_each_is_verified_once():
    bench = FakeBench(eager=1.0, fused=1.0)
    results, order = measured(bench, "fused", "eager", timed=False)
    assert order == []
    assert bench.calls["fused"] == 1
    assert results["fused"].samples == ()
    assert results["fused"].error == 0.0


def test_cudnns_search_is_on_while_measuring():
    seen = []
    bench = FakeBench(eager=1.0)
    bench.read = lambda value: seen.append(torch.backends.cudnn.benchmark) or FakeBench.read(value)
    assert not torch.backends.cudnn.benchmark
    measured(bench, "eager")
    assert all(seen)
    assert seen
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("device_only", "lead"), [(True, 1.5), (False, 0.0)])
def test_on_a_gpu(monkeypatch, device_only, lead):
    """Memory and host time of each, none of memory in a graph; kernels wait until the slowest host is ahead."""
    made = []
    monkeypatch.setattr(protocol.timing, "synchronize", lambda device: None)
    monkeypatch.setattr(protocol.timing, "peak_memory", lambda call, device: 7)
    monkeypatch.setattr(protocol, "_host_time", lambda call, device: 1.0 if call() == 1.1 else 0.5)
    monkeypatch.setattr(protocol, "ColdCache", lambda device, lead_s: made.append((device.type, lead_s)) or made.append)
    bench = FakeBench(**{"eager": 1.1, "fused": 1.0, "fused+graph": 1.0})
    bench.device_only = device_only
    case = SimpleNamespace(open=lambda device: bench)
    settings = Settings(torch.device("cuda"), min_rounds=2, max_s=0.0, warm_s=0.0)
    results = protocol.measure(case, bench.values, settings, lambda call, device, before: call() and before is not None)
    assert made == [("cuda", lead)]
    assert {name: result.peak_bytes for name, result in results.items()} == {
        "eager": 7,
        "fused": 7,
        "fused+graph": None,
    }
    assert {name: result.host_s for name, result in results.items()} == {"eager": 1.0, "fused": 0.5, "fused+graph": 0.5}
    assert all(result.samples == (True, True) for result in results.values())


@pytest.mark.parametrize(("slowest", "rounds"), [(1e-6, 100), (0.02, 50), (3.0, 5)])
def test_rounds_fit_the_time(slowest, rounds):
    assert Settings(CPU, min_rounds=5, max_s=1.0).rounds(slowest) == rounds


@pytest.mark.parametrize(("lead", "passes"), [(0.0, 1), (99e-6, 2), (150e-6, 3), (1.0, 64)])
def test_the_device_is_kept_busy_until_the_host_is_ahead(lead, passes):
    assert protocol.passes_for(lead, 50e-6) == passes


def test_the_cache_is_written_over_before_every_call():
    cache = protocol.ColdCache(CPU)
    cache._buffer.fill_(7)
    cache()
    assert cache._buffer.count_nonzero() == 0
    assert cache._buffer.numel() > 128 * 2**20  # no GPU has such an L2


def test_the_clock_leaves_out_what_comes_before():
    order = []
    spent = timing.clock(lambda: order.append("call"), CPU, lambda: torch.ones(2**22).sort() and order.append("before"))
    assert order == ["before", "call"]
    assert spent < timing.clock(lambda: torch.ones(2**22).sort(), CPU)


def test_before_runs_outside_of_the_time_of_every_call():
    order = []

    def clock(call, device, before):
        before()
        return call()

    calls = {"a": lambda: order.append("a") or 1.0, "b": lambda: order.append("b") or 2.0}
    found = timing.interleave(calls, 2, CPU, before=lambda: order.append("-"), clock=clock)
    assert order == ["-", "a", "-", "b", "-", "b", "-", "a"]
    assert found["a"].samples == (1.0, 1.0)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_the_error_of_a_mask_is_the_share_of_wrong_bits():
    exact = torch.tensor([0b1111_0000, 0], dtype=torch.uint8)
    found = torch.tensor([0b1111_0001, 0b1000_0000], dtype=torch.uint8)
    assert verify.relative(found, exact) == 2 / 16


def test_a_wrong_tile_is_not_lost_in_a_batch():
    exact = randn(256, 8, 16, 16).double()
    found = exact.bfloat16()
    eager = {"y": found.clone()}
    floor = kernels.FLOORS[torch.bfloat16]
    assert verify.check({"y": found}, {"y": exact}, eager, floor, 0.1)[0] < 3e-3
    found[7, :, 0, :2] = 0
    assert verify.relative(found, exact) < floor
    with pytest.raises(verify.Beyond, match="y is off by"):
        verify.check({"y": found}, {"y": exact}, eager, floor, 0.1)


@pytest.mark.parametrize("bad", [torch.tensor([1.0, float("nan")]), torch.tensor([1.0]), torch.tensor([1.0, math.inf])])
def test_nan_and_other_shapes_are_wrong(bad):
    with pytest.raises(verify.Beyond, match="y is off by inf of its norm"):
        verify.check({"y": bad}, {"y": torch.ones(2, dtype=torch.float64)}, {}, 1.0, 1.0)


def test_a_result_without_a_known_tensor_is_wrong():
    with pytest.raises(verify.Beyond, match="expected some of y, got z"):
        verify.check({"z": torch.ones(2)}, {"y": torch.ones(2)}, {}, 1.0, 1.0)


# --- cases of kernels -----------------------------------------------------------------------------------------------


def convolutions(name):
    """(kernel, C, H, W, K, stride) of the convolutions of torchvision's network after the stem, from its own run."""
    found = set()

    def note(module, args):
        c, h, w = args[0].shape[1:]
        found.add((module.kernel_size[0], c, h, w, module.out_channels, module.stride[0]))

    with torch.device("meta"):
        model = models.get_model(name)
        for key, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and key != "conv1":
                module.register_forward_pre_hook(note)
        model(torch.empty(1, 3, 224, 224))
    return found


@pytest.fixture(scope="module")
def table():
    return kernels.table()


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize("name", [network.name for network in NETWORKS])
def test_the_table_has_every_convolution_of_the_networks(table, name, mode):
    directions = ("fprop", "dgrad", "wgrad", "bprop") if mode == "train" else ("infer",)
    for direction in directions:
        found = set()
        for case in table:
            kernel = 1 if case.op.startswith("conv1x1") else 3
            if case.op.startswith("conv") and kernels.direction(case.op) == direction and name in case.models:
                a = kernels.arguments(case.op, case.args)
                found.add((kernel, *a.x.shape[1:], a.weight.shape[0], a.stride))
        assert found == convolutions(name), direction


def test_the_table_has_every_op(table):
    assert {case.op for case in table} == set(registered)
    assert {case.op for case in kernels.smoke()} == set(registered)


def test_rows_have_ids_of_their_own(table):
    for cases in (table, kernels.smoke(), networks.networks(torch.device("cuda")), networks.blocks(CPU)):
        counted = Counter(case.id for case in cases)
        assert counted.most_common(1)[0][1] == 1


def test_the_table_is_in_the_order_of_interest(table):
    assert list(dict.fromkeys(case.info["dtype"] for case in table)) == ["bf16", "fp16", "fp32"]
    assert table[0].batch == 256


def test_a_budget_is_spent_on_the_headline_first():
    def item(file, *marks):
        return SimpleNamespace(path=Path(f"{file}.py"), get_closest_marker=lambda name: name if name in marks else None)

    items = {
        "smoke": item("bench_models", "smoke"), "block": item("bench_blocks", "headline"), "rest": item("bench_models"),
        "kernel": item("bench_kernels", "headline"), "network": item("bench_models", "headline"),
    }  # fmt: skip
    assert sorted(items, key=lambda name: plan.order(items[name])) == ["network", "kernel", "block", "rest", "smoke"]


def test_the_headline_is_one_network_with_its_blocks_and_kernels(table):
    gpu = torch.device("cuda")
    found = [case for case in (*networks.networks(gpu), *networks.blocks(gpu)) if case.headline]
    assert {(case.kind, case.info["model"].partition(".")[0]) for case in found} == {
        ("network", "resnet50"), ("block", "resnet50")
    }  # fmt: skip
    assert {case.info["mode"] for case in found} == {"train", "infer"}
    for impl in protocol.LESS_MEMORY:
        assert {(case.kind, case.info["mode"]) for case in found if impl in case.impls} == {("network", "train")}
    assert "jax" in next(case for case in found if case.kind == "network").impls
    assert all("resnet50" in case.models and case.dtype == torch.bfloat16 for case in table if case.headline)
    assert not any(case.headline for case in kernels.smoke())


def test_a_row_says_what_it_measures(table):
    case = next(c for c in table if c.id == "conv1x1-dgrad-resnet50-train-64x56x56-k256-deferred-masked-bf16-b256")
    row = rows.identity(case, "fused")
    known = {key: value for key, value in row.items() if value is not None}
    assert known == {
        "kind": "kernel", "op": "conv1x1", "direction": "dgrad", "model": "resnet50", "mode": "train", "batch": 256,
        "shape": "64x56x56 k256 deferred masked", "dtype": "bf16", "layout": "channels_last", "impl": "fused",
    }  # fmt: skip
    # dz and y of 256 channels with dz's 1-bit mask, x and dx of 64, the weight.
    pixels = 256 * 56 * 56
    assert case.traffic.bytes == 2 * pixels * (2 * 256 + 2 * 64) + pixels * 256 // 8 + 2 * 64 * 256
    assert case.traffic.flops == 2 * pixels * 64 * 256


def test_operands_are_as_recorded_and_random():
    for case in kernels.smoke():
        first = kernels.realise(case.op, case.args, CPU)
        for like, t in zip(case.args, first, strict=True):
            if isinstance(like, torch.Tensor):
                assert (t.shape, t.stride(), t.dtype, t.device) == (like.shape, like.stride(), like.dtype, CPU)
                assert t.dtype == torch.int32 or t.numel() < 16 or len(t.unique()) > 8
        again = kernels.realise(case.op, case.args, CPU)
        pairs = zip(first, again, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs if isinstance(a, torch.Tensor))


def test_statistics_are_merged_before_they_are_compared():
    y = randn(6, 3, 5, 5)
    counts = torch.tensor([50, 100], dtype=torch.int32)
    tiles = [(t.mean((0, 2, 3)), t.var((0, 2, 3), correction=0) * t[:, 0].numel()) for t in (y[:2], y[2:])]
    found = kernels.named("conv1x1_fprop", (y, counts, *(torch.stack(pair) for pair in zip(*tiles, strict=True))))
    assert found.keys() == {"y", "mean", "var"}
    assert_close(found["mean"], y.mean((0, 2, 3)), 1e-12)
    assert_close(found["var"], y.var((0, 2, 3), correction=0), 1e-12)


def test_a_fused_kernel_row_names_backend_and_configuration(monkeypatch):
    case = next(case for case in kernels.smoke() if case.op == "conv1x1_fprop")
    assert kernels.chosen(case.op, kernels.realise(case.op, case.args, CPU)) == "aten"

    def choosing(op, args):
        kernels.tuning.choose("conv1x1_fprop", None, CPU, lambda problem: (config,))
        return SimpleNamespace(backend="triton")

    config = kernels.tuning.RowsConfig(*range(1, 1 + len(kernels.tuning.RowsConfig.__dataclass_fields__)))
    monkeypatch.setattr(kernels.tuning.choice, "choose", lambda *problem: config)
    monkeypatch.setitem(registered, "conv1x1_fprop", lambda *args: choosing("conv1x1_fprop", args))
    monkeypatch.setattr(kernels.backends, "choose", lambda op, *args: SimpleNamespace(backend="triton"))
    assert kernels.chosen("conv1x1_fprop", ()) == f"triton, {kernels.tuning.configs.label(config)}"


class OnGpu(SimpleNamespace):
    """A stand-in for a CUDA tensor."""

    is_cuda = True
    device = "cpu"


def test_gpu_form_of_the_output_gradient(monkeypatch):
    """PyTorch's kernel, by the formula of its synchronised batch norm, is handed what gives ``a * dz + b * y + c``."""

    def kernel(dz, y, mean, rstd, weight, total, product, count):
        n = count.sum()
        v = {"mean": mean, "rstd": rstd, "weight": weight, "total": total / n, "product": product / n}
        v = {name: t.view(1, -1, 1, 1) for name, t in v.items()}
        xhat = (y.values - v["mean"]) * v["rstd"].square()
        return (dz - v["total"] - xhat * v["product"]) * v["rstd"] * v["weight"]

    monkeypatch.setattr(torch, "batch_norm_backward_elemt", kernel)
    dz, y = randn(2, 3, 4, 5, seed=1), randn(2, 3, 4, 5, seed=2)
    a, b, c = (randn(3, seed=seed).abs() + 0.5 for seed in (3, 4, 5))
    found = eager.output_gradient(SimpleNamespace(y=OnGpu(values=y), a=a, b=b, c=c))(dz)
    assert_close(found, a.view(1, -1, 1, 1) * dz + b.view(1, -1, 1, 1) * y + c.view(1, -1, 1, 1), 1e-12)


# --- peers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "given", "reason"),
    [
        ("conv3x3_infer", {"relu": False}, "its inference kernels have a ReLU on the output and nothing on the input"),
        ("conv3x3_dgrad", {}, "its Python frontend has no graph for dgrad with a ReLU and a norm's sums"),
        ("conv1x1_fprop", {"slope": 1}, "its graphs have no PReLU"),
        ("conv1x1_infer", {}, None),
    ],
)
def test_what_cudnn_does_not_have(op, given, reason):
    a = SimpleNamespace(**{"x": OnGpu(), "scale": None, "slope": None, "out_slope": None, "relu": True} | given)
    assert cudnn_graphs.unavailable(op, a) == reason


def test_a_missing_frontend_is_named(monkeypatch):
    def missing(name):
        raise cudnn_graphs.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cudnn_graphs.importlib.metadata, "version", missing)
    a = SimpleNamespace(x=OnGpu(), slope=None)
    assert cudnn_graphs.unavailable("conv1x1_wgrad", a) == "nvidia-cudnn-frontend is not installed"


@pytest.mark.parametrize(("groups", "relu"), [(1, True), (1, False)])
def test_onnx_runtime_gives_the_networks_output(groups, relu):
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False, groups=groups), nn.BatchNorm2d(4), *([nn.ReLU()] * relu))
    setting = networks.Setting("infer", torch.float32, 2, 8)
    bench = networks.NetworkBench("small", module, randn(2, 3, 8, 8, dtype=torch.float32), setting)
    prepared = onnx_peer.prepare(bench)
    expected = bench.exact()["output"]
    assert_close(prepared.read(prepared.call())["output"], expected, 1e-5)


def test_onnx_runtime_is_an_inference_peer_on_the_cpu_alone():
    setting = networks.Setting("train", torch.float32, 2, 8)
    bench = networks.NetworkBench("small", nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8), setting)
    with pytest.raises(Unavailable, match="is compared in fp32 inference on the CPU alone"):
        onnx_peer.prepare(bench)


def test_graphs_need_a_gpu():
    bench = networks.smoke_blocks(CPU, quick=True)[0].open(CPU)
    if not torch.cuda.is_available():
        with pytest.raises(Unavailable, match="needs a CUDA GPU"):
            bench.prepare("eager+graph")


@pytest.mark.skipif(jax_peer.importlib.util.find_spec("jax") is None, reason="jax is not installed")
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_jax_computes_the_same_network(mode):
    case = networks.ModuleCase("network", "smoke_bottleneck", networks.Setting(mode, torch.float32, 2, 64), ("jax",))
    result = protocol.measure(case, ("jax",), Settings(CPU, timed=False))["jax"]
    assert result.unmeasured is None
    assert result.error < 1e-4
    assert len(result.samples) > 1
    assert min(result.samples) > 0


def test_a_missing_jax_is_named(monkeypatch):
    monkeypatch.setattr(jax_peer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="jax is not installed"):
        jax_peer.prepare(None)


def test_a_failure_in_the_other_process_is_one_line(monkeypatch, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("import sys; print('noise', file=sys.stderr); raise MemoryError('RESOURCE_EXHAUSTED: 9 GiB')")
    monkeypatch.setattr(jax_peer, "SCRIPT", script)
    with pytest.raises(Unavailable, match=r"^jax failed: MemoryError: RESOURCE_EXHAUSTED: 9 GiB$"):
        jax_peer.run(Path("data"), "train", "fp32", "cpu")
    script.write_text("import os, json; print(json.dumps(os.environ['XLA_PYTHON_CLIENT_PREALLOCATE']))")
    assert jax_peer.run(Path("data"), "train", "fp32", "cpu") == "false"


# --- rows, budget, machine ------------------------------------------------------------------------------------------


def test_derived_figures():
    case = SimpleNamespace(
        info={"kind": "network", "model": "m", "mode": "infer", "batch": 32},
        traffic=traffic.Traffic(8_000_000_000, 4_000_000_000_000),
        bound_s=lambda rates: rates.bound_s(8_000_000_000, 4_000_000_000_000),
    )
    result = protocol.Result(
        samples=(0.01, 0.02, 0.04), error=1e-3, error_torch=2e-3, peak_bytes=3 * 2**20, host_s=1e-4
    )
    row = rows.measured(case, "eager_nchw+graph", result, Rates(4e12, 8e14))
    assert tuple(row) == rows.KEYS
    expected = {
        "gb_per_s": 400, "tflop_per_s": 200, "bound_fraction": 0.25, "images_per_s": 1600, "peak_mib": 3,
        "host_us": 100, "layout": "nchw",
    }  # fmt: skip
    assert {key: row[key] for key in expected} == pytest.approx(expected)
    assert row["op"] is None


def test_a_row_with_an_unknown_key_is_refused():
    with pytest.raises(ValueError, match="expected keys of the rows, got speed"):
        rows.identity(SimpleNamespace(info={"speed": 1}), "fused")


def test_the_budget_begins_with_the_first_case(monkeypatch):
    now = iter([100.0, 100.0, 159.0, 161.0])
    monkeypatch.setattr(session.time, "monotonic", lambda: next(now))
    recorder = session.Recorder(60.0)
    assert [recorder.over() for _ in range(3)] == [None, None, "beyond --benchmark-budget 60"]


def test_the_driver_is_asked_once_for_all_fields(monkeypatch):
    def smi(command, **options):
        assert command[1] == "--query-gpu=driver_version,clocks.sm"
        return SimpleNamespace(stdout="580.159.04, 1980 MHz\n")

    monkeypatch.setattr(session.subprocess, "run", smi)
    assert session._nvidia_smi(("driver_version", "clocks.sm")) == ["580.159.04", "1980 MHz"]
    monkeypatch.setattr(session.subprocess, "run", lambda *args, **options: open("/nowhere/nvidia-smi"))
    assert session._nvidia_smi(("driver_version", "clocks.sm")) == [None, None]


def test_runs_of_one_machine_compare_as_equal():
    now = {
        "name": "H200",
        "gpu": {"clocks.sm": "1980 MHz"},
        "copy_gb_per_s": 4300.0,
        "matmul_tflop_per_s": {"bf16": 780.0},
    }
    then = now | {"gpu": {"clocks.sm": "345 MHz"}, "copy_gb_per_s": 4290.0, "matmul_tflop_per_s": {"bf16": 790.0}}
    then, other = then | {"cpu": {"hz_actual": 1, "count": 2}}, then | {"cpu": {"hz_actual": 1, "count": 4}}
    now = now | {"cpu": {"hz_actual": 3, "count": 2}}
    for compared in (then, other):
        session.settle(now, compared)
    assert then == now
    assert other != now


# --- pytest ---------------------------------------------------------------------------------------------------------


def run_pytest(*arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--benchmark", *arguments]
    return subprocess.run(command, cwd=ROOT, env=shell_environment(), capture_output=True, text=True, check=False)


def test_one_command_times_and_writes_a_document(tmp_path):
    path = tmp_path / "out.json"
    chosen = "smoke and (pool or (conv1x1 and fprop and deferred))"
    found = run_pytest(
        "--benchmark", "-k", chosen, "--benchmark-json", str(path), "benchmarks/bench_kernels.py", "tests"
    )
    assert found.returncode == 0, found.stdout
    document = json.loads(path.read_text())
    benchmarks = document["benchmarks"]
    assert {row["fullname"].partition("::")[0] for row in benchmarks} == {"benchmarks/bench_kernels.py"}
    assert {row["extra_info"]["impl"] for row in benchmarks} == {"fused", "eager"}
    for row in benchmarks:
        assert tuple(row["extra_info"]) == rows.KEYS
        assert row["extra_info"]["bound_fraction"] > 0
        assert row["stats"]["rounds"] == len(row["stats"]["data"]) >= 5
        assert 0 < row["stats"]["min"] <= row["stats"]["median"]
    machine = document["machine_info"]
    assert machine["peers"].keys() == set(session.PEERS)
    assert machine["copy_gb_per_s"] > 0
    if not torch.cuda.is_available():
        (missing,) = document["unmeasured"]
        assert missing["reason"] == "cudnn: needs a CUDA GPU"
        assert missing["extra_info"]["impl"] == "cudnn"


def test_rows_beyond_the_budget_are_skipped_and_say_so():
    found = run_pytest(
        "--benchmark", "--benchmark-budget", "1e-9", "-k", "smoke and spread", "benchmarks/bench_kernels.py"
    )
    assert found.returncode == 0, found.stdout
    assert "beyond --benchmark-budget 1e-09" in found.stdout
    assert "2 skipped" in found.stdout


def test_a_row_without_a_time_is_in_the_document(tmp_path):
    """Wrong ones that failed, and those that an interrupted session did not come to."""
    path = tmp_path / "out.json"
    breaking = tmp_path / "breaking.py"
    breaking.write_text(
        "from harness import kernels\n"
        "known, calls = kernels.named, []\n"
        "def named(op, found):\n"
        "    calls.append(op)\n"
        "    if len(calls) > 2:\n"
        "        raise KeyboardInterrupt\n"
        "    return {name: t if len(calls) > 1 else t + 1 for name, t in known(op, found).items()}\n"
        "kernels.named = named\n"
    )
    chosen = "smoke and (pool or spread)", "--benchmark-json", str(path), "-p", "breaking"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--benchmark", "benchmarks/bench_kernels.py"]
    paths = (tmp_path, ROOT / "benchmarks", ROOT, TESTS)
    environment = shell_environment() | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([*command, "-k", *chosen], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout
    document = json.loads(path.read_text())
    assert [row["extra_info"]["impl"] for row in document["benchmarks"]] == ["eager"]
    reasons = [(row["extra_info"]["impl"], row["reason"].partition(":")[0]) for row in document["unmeasured"]]
    assert reasons == [("fused", "WrongResult")] + [(impl, "the session ended before") for impl in ("fused", "eager")]
    assert all(tuple(row["extra_info"]) == rows.KEYS for row in document["unmeasured"])


def root_conftest():
    spec = importlib.util.spec_from_file_location("root_conftest", ROOT / "conftest.py")
    root = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(root)
    return root


@pytest.mark.parametrize("text", ["0", "-1", "nan", "soon"])
def test_a_budget_is_a_positive_number(text):
    root = root_conftest()
    assert root._seconds("0.5") == 0.5
    with pytest.raises(ValueError):
        root._seconds(text)


@pytest.mark.parametrize(("worker", "lost"), [(True, True), (True, False), (False, True)])
def test_a_test_that_breaks_the_gpu_ends_its_process_alone(monkeypatch, capfd, worker, lost):
    def synchronize():
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    root, left = root_conftest(), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(root.os, "_exit", left.append)
    if worker:
        monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    else:
        monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    failed = SimpleNamespace(excinfo=SimpleNamespace(exconly=lambda: "RuntimeError: illegal"))
    root.pytest_runtest_makereport(SimpleNamespace(nodeid="test_a.py::test_b"), failed)
    root.pytest_runtest_makereport(SimpleNamespace(nodeid="fine"), SimpleNamespace(excinfo=None))
    assert left == ([1] if worker and lost else [])
    told = "breaks the device: test_a.py::test_b: RuntimeError: illegal"
    assert (told in capfd.readouterr().err) == (worker and lost)


# --- tools/on_gpu.sh --------------------------------------------------------------------------------------------------

INTERPRETER = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$CALLS"
case "$*" in
*get_device_capability*) echo 90 ;;
*"-m pytest"*)
    trap 'exit 2' INT
    for _ in $(seq "${TENTHS:-0}"); do sleep 0.1; done
    echo "FAILED tests/test_kernels_x.py::test_y[1-a b] - AssertionError: off"
    echo "1 failed, 2 passed"
    exit 1 ;;
*"report --show"*) echo "a case: fused 1 us" ;;
*convergence.py*) echo "fp32 PASS, bf16 FAIL" && exit 1 ;;
esac
"""


def on_gpu(tmp_path, *arguments, **environment):
    """The script with an interpreter that runs nothing, in a folder with a blank."""
    folder = tmp_path / "a folder"
    folder.mkdir(exist_ok=True)
    for name in ("python", "nvidia-smi", "cmake", "ctest"):
        (folder / name).write_text(INTERPRETER)
        (folder / name).chmod(0o755)
    known = {"PYTHON": str(folder / "python"), "CALLS": str(folder / "calls"), **environment}
    known["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    command = [str(ROOT / "tools" / "on_gpu.sh"), *arguments]
    done = subprocess.run(command, env=shell_environment() | known, capture_output=True, text=True, check=False)
    calls = folder / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


needs_coreutils = pytest.mark.skipif(shutil.which("timeout") is None, reason="the script needs bash and GNU's timeout")


@needs_coreutils
def test_the_gpu_script_sums_up_and_keeps_the_logs(tmp_path):
    out = tmp_path / "results of a GPU"
    done, calls = on_gpu(tmp_path, "test", str(out), "60", "-k", "a and not b")
    assert done.returncode == 1, done.stderr
    assert "tests/test_kernels_x.py::test_y[1-a b] - AssertionError: off" in done.stdout
    assert "kernels: 1 failed, 2 passed" in done.stdout
    kernels, cuda, others = (call for call in calls if "-m pytest" in call)
    assert "tests/test_kernels_conv1x1.py" in kernels
    assert "cuda" not in kernels
    assert "tests/test_cuda_conv3x3.py" in cuda
    assert any("-m pip install" in call for call in calls[: calls.index(cuda)]), "the extension is there by then"
    assert "compiled" not in kernels
    assert "-m gpu tests/test_extension.py" in others
    assert kernels.endswith("-k a and not b")
    with tarfile.open(out / "test.tar.gz") as archive:
        assert {"./kernels.log", "./cuda.log", "./others.log", "./install.log", "./wrappers.log"} <= set(
            archive.getnames()
        )


@needs_coreutils
def test_the_gpu_script_benchmarks_the_headline(tmp_path):
    done, calls = on_gpu(tmp_path, "bench", str(tmp_path / "out"), "100")
    assert "a case: fused 1 us" in done.stdout
    assert any("compile_kernels.py --models resnet50 --targets 90" in call for call in calls)
    (bench,) = (call for call in calls if "-m pytest" in call)
    assert bench.endswith("benchmarks -m headline")
    assert f"--benchmark-json {tmp_path}/out/benchmark.json" in bench


@needs_coreutils
@pytest.mark.parametrize("arguments", [(), ("--seeds", "16")])
def test_the_gpu_script_trains_beside_eager(tmp_path, arguments):
    out = tmp_path / "out of a GPU"
    done, calls = on_gpu(tmp_path, "converge", str(out), "100", *arguments)
    assert done.returncode == 1
    assert "fp32 PASS, bf16 FAIL" in done.stdout
    assert "converge: exit code 1" in done.stdout
    told = " ".join(arguments or ("--size", "32"))
    assert calls[-1] == f"examples/convergence.py --device cuda --out {out}/convergence {told}"
    assert any("-m pip install" in call for call in calls), "the extension is there by then"
    with tarfile.open(out / "converge.tar.gz") as archive:
        assert {"./converge.log", "./info.txt"} <= set(archive.getnames())


@needs_coreutils
def test_the_gpu_script_ends_in_time(tmp_path):
    done, _ = on_gpu(tmp_path, "test", str(tmp_path / "out"), "3", TENTHS="300")
    assert done.returncode == 124
    assert "kernels: out of time" in done.stdout


@needs_coreutils
@pytest.mark.parametrize("arguments", [(), ("test",), ("tests", "out"), ("test", "out", "0")])
def test_the_gpu_script_refuses_other_arguments_in_one_line(tmp_path, arguments):
    done, calls = on_gpu(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "on_gpu.sh: expected test, sanitize, tune, bench, profile or converge, a folder and seconds"
    )
    assert len(done.stderr.splitlines()) == 1
    assert not calls
