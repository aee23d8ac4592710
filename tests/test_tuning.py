"""Tables of measured choices: what is read, found and followed; and the tuner that writes them, with a false timer."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import time
from typing import NamedTuple

import pytest
import torch
from kernel_helpers import DEVICE, maker
from test_ops import samples
from torch import nn

import resnet_fused
from resnet_fused import backends, cli, tuning
from resnet_fused.cli import tune
from resnet_fused.cli.output import Output, UsageError
from resnet_fused.kernels import module_of
from resnet_fused.tuning import (
    ConvConfig,
    Materialised,
    ProductConfig,
    RowsConfig,
    calls,
    choice,
    configs,
    measure,
    tables,
)
from resnet_fused.tuning.calls import Call

SMALL, LARGE, ODD = (RowsConfig(rows, 64, 4, 2) for rows in (8, 16, 24))
METADATA = dict.fromkeys(tables.METADATA, "?")
GPU = torch.device("cuda", 0)


class Rows(NamedTuple):
    """A problem such as kernels have."""

    images: int
    channels: int
    form: str = "plain"


def candidates(problem: Rows) -> tuple[RowsConfig, ...]:
    return SMALL, LARGE


def entry(problem: Rows, config: tuning.Config | None = LARGE, op: str = "bn_add_relu_mask") -> tables.Entry:
    backend = "aten" if config is None else "triton"
    return tables.Entry(op, problem._asdict(), backend, config, {"aten": 2.5, configs.label(LARGE): 1.25})


def table(*entries: tables.Entry) -> tables.Table:
    return tables.Table(METADATA, list(entries))


def chosen(problem: Rows, op: str = "bn_add_relu_mask") -> tuning.Config:
    return tuning.choose(op, problem, torch.device(DEVICE), candidates)


# --- configurations and files ---------------------------------------------------------------------------------------


CONV = ConvConfig("hopper", 256, 128, "halo")


@pytest.mark.parametrize(
    "config", [SMALL, ProductConfig(128, 64, 32, 4, 3, descriptors=True), Materialised(), CONV], ids=str
)
def test_a_configuration_survives_a_file(config):
    assert configs.from_json(json.loads(json.dumps(configs.to_json(config)))) == config


def test_labels_tell_configurations_apart():
    found = [SMALL, LARGE, ProductConfig(64, 64, 32, 4, 3), ProductConfig(64, 64, 32, 4, 3, 2), Materialised(), CONV]
    assert len({configs.label(config) for config in found}) == len(found)
    assert configs.label(SMALL) == "rows rows=8 channels=64 warps=4 programs=2"
    assert configs.label(CONV) == "conv chip=hopper rows=256 columns=128 feed=halo"


def test_a_table_survives_a_file(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(table(entry(Rows(4, 8)), entry(Rows(4, 16), None)).dumps(), encoding="utf-8")
    found = tables.load(path)
    assert found.metadata == METADATA
    assert found.entries == [entry(Rows(4, 8)), entry(Rows(4, 16), None)]
    assert sum("bn_add_relu_mask" in line for line in path.read_text().splitlines()) == 2, "an entry a line"


GOOD = entry(Rows(4, 8)).to_json()
BROKEN = {
    "no JSON": ("{", "gpu.json: expected a JSON object with gpu, driver"),
    "no metadata": ('{"entries": []}', "gpu.json: expected a JSON object with gpu, driver"),
    "a list": ("[]", "gpu.json: expected a JSON object"),
}
WRONG = {
    "a field too many": (GOOD | {"speed": 1}, "entry 1: expected the fields op, problem, backend, config, us, got"),
    "a backend": (GOOD | {"backend": "metal"}, "entry 1: expected backend to be one of cuda, triton, aten"),
    "a kind": (GOOD | {"config": {"kind": "cubes"}}, "entry 1: expected a configuration of kind rows, product"),
    "a field of the configuration": (
        GOOD | {"config": GOOD["config"] | {"depth": 1}}, "entry 1: expected the fields of a rows configuration, got"
    ),
    "a time": (GOOD | {"us": {"aten": 0}}, "entry 1: expected times, images and rows above 0, got"),
    "a problem": (GOOD | {"problem": "small"}, "entry 1: expected op, problem and us to be text and objects, got"),
}  # fmt: skip


def document(*entries: dict) -> str:
    return json.dumps({**METADATA, "entries": [*entries]})


@pytest.mark.parametrize("what", [*BROKEN, *WRONG])
def test_what_cannot_be_used_is_named(tmp_path, what):
    text, sentence = BROKEN[what] if what in BROKEN else (document(GOOD, WRONG[what][0]), WRONG[what][1])
    path = tmp_path / "gpu.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^gpu\.json") as error:
        tables.load(path)
    assert sentence in str(error.value)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """Where the table of a GPU that is not there is looked for."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 80-GB")
    tables._read.cache_clear()
    yield tmp_path / "NVIDIA_Test_80_GB.json"
    tables._read.cache_clear()


def test_a_table_that_is_wrong_crashes_nobody(gpu, caplog):
    gpu.write_text(document(GOOD, WRONG["a kind"][0], WRONG["a time"][0]), encoding="utf-8")
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        found = [tables.of_device(GPU) for _ in range(3)]
    assert found[0].entries == [entry(Rows(4, 8))]
    assert len(caplog.records) == 1
    assert "NVIDIA_Test_80_GB.json, entry 1: expected" in caplog.text
    assert "(and 1 more); the built-in rule is followed there" in caplog.text


def test_a_gpu_without_a_table_follows_the_rule(gpu, caplog):
    assert tables.of_device(GPU).entries == []
    assert not caplog.records


def test_the_package_s_tables_are_known_to_the_code():
    for path in tables.FOLDER.glob("*.json"):
        found = tables.load(path)
        assert path == tables.path_of(found.metadata["gpu"])
        assert [(i, measure.unknown(e)) for i, e in enumerate(found.entries) if measure.unknown(e) is not None] == []


# --- the choice -----------------------------------------------------------------------------------------------------


def test_forced_then_measured_then_the_rule():
    assert chosen(Rows(4, 8)) == SMALL
    with tuning.measured(table(entry(Rows(4, 8)))):
        assert chosen(Rows(4, 8)) == LARGE
        assert chosen(Rows(4, 9)) == SMALL
        assert chosen(Rows(4, 8, "masked")) == SMALL
        assert chosen(Rows(4, 8), op="bn_add_relu_pool") == SMALL
        with tuning.use("bn_add_relu_mask", ODD):
            assert chosen(Rows(4, 8)) == ODD
    assert chosen(Rows(4, 8)) == SMALL


@pytest.mark.parametrize(("images", "expected"), [(31, SMALL), (32, LARGE), (64, LARGE), (128, LARGE), (129, SMALL)])
def test_the_nearest_batch_within_a_factor_of_2(images, expected):
    with tuning.measured(table(entry(Rows(64, 8)))):
        assert chosen(Rows(images, 8)) == expected


def test_the_nearest_of_several():
    with tuning.measured(table(entry(Rows(60, 8), SMALL), entry(Rows(90, 8)), entry(Rows(70, 9)))):
        assert [chosen(Rows(images, 8)) for images in (59, 60, 73, 74, 180)] == [SMALL, SMALL, SMALL, LARGE, LARGE]


def test_a_configuration_that_the_kernel_no_longer_offers_is_not_taken():
    with tuning.measured(table(entry(Rows(4, 8), ODD))):
        assert chosen(Rows(4, 8)) == SMALL


def test_only_what_a_gpu_can_run_is_offered(monkeypatch):
    big = dataclasses.replace(LARGE, shared=200)
    bulk = ProductConfig(64, 64, 32, 4, 3, descriptors=True)
    monkeypatch.setattr(choice, "_limits", lambda device: (80, 163))
    assert tuning.fitting((big, bulk, SMALL), GPU) == (SMALL,)
    assert tuning.fitting((big,), GPU) == (big,), "what needs least is all there is"
    monkeypatch.setattr(choice, "_limits", lambda device: (90, 227))
    assert tuning.fitting((big, bulk, SMALL), GPU) == (big, bulk, SMALL)


def test_the_rule_leaves_out_what_a_gpu_cannot_run(monkeypatch):
    monkeypatch.setattr(choice, "_limits", lambda device: (86, 99))
    big = dataclasses.replace(SMALL, shared=163)
    where = torch.device("meta")
    assert tuning.choose("bn_add_relu_mask", Rows(3, 3), where, lambda problem: (big, LARGE)) == LARGE


def test_another_backend_goes_first_where_it_was_faster(monkeypatch):
    op = "bn_add_relu_mask"
    args = samples(op, maker(torch.float32))[1]
    key = module_of(op).problem(op, *args)
    triton = dataclasses.replace(backends.implementations(op)["triton"], default=True)
    monkeypatch.setitem(backends.implementations(op), "triton", triton)
    backends.fallbacks.clear()
    assert backends.choose(op, *args).backend == "triton"
    lost = tables.Entry(op, key._asdict(), "aten", None, {"aten": 1.0})
    with tuning.measured(table(lost)):
        assert backends.choose(op, *args).backend == "aten"
        assert backends.fallbacks[f"{op}[triton]", backends.SLOWER] == 1
        with backends.use_backend("triton"):
            assert backends.choose(op, *args).backend == "triton"
        other = samples("bn_add_relu_reduce", maker(torch.float32))[0]
        assert not tuning.contested("bn_add_relu_reduce", other[0].device)
    assert backends.choose(op, *args).backend == "triton"


# --- what the kernels offer -----------------------------------------------------------------------------------------

TUNED = [op for op in backends.operations() if "triton" in backends.implementations(op)]


@pytest.mark.parametrize("op", TUNED)
def test_problems_are_keys_of_tables(op):
    """Every call has a problem that survives a file, and candidates that are told apart."""
    found = 0
    for args in samples(op, maker(torch.float16)):
        if backends.unavailable(op, "triton", *args) is None:
            key = module_of(op).problem(op, *args)
            offered = module_of(op).candidates(key)
            first = tables.Entry(op, key._asdict(), "triton", offered[0], {configs.label(offered[0]): 1.0})
            read, wrong = tables.parse(table(first).dumps(), "gpu.json")
            assert not wrong
            assert read.find(op, key) == first
            assert measure.unknown(first) is None
            assert len({configs.label(config) for config in offered}) == len(offered)
            found += 1
    assert found


def test_what_the_code_does_not_know_is_told():
    op = "bn_add_relu_reduce"
    args = samples(op, maker(torch.float16))[0]
    key = module_of(op).problem(op, *args)
    good = tables.Entry(op, key._asdict(), "triton", module_of(op).candidates(key)[0], {})
    assert measure.unknown(good) is None
    assert "expected op to have a Triton kernel, got 'relu'" in measure.unknown(good._replace(op="relu"))
    assert "expected problem to have the fields" in measure.unknown(good._replace(problem={"images": 1}))
    assert "expected config to be a candidate" in measure.unknown(good._replace(config=ODD))
    assert "expected a configuration for triton" in measure.unknown(good._replace(config=None))
    assert "expected a configuration for triton" in measure.unknown(good._replace(backend="aten"))


@pytest.mark.parametrize("direction", ["fprop", "infer", "dgrad", "wgrad", "bprop"])
def test_an_entry_of_the_extension_has_a_configuration_where_there_is_a_choice(direction):
    op = f"conv3x3_{direction}"
    key = module_of(op).problem(op, *samples(op, maker(torch.float16))[0])
    chosen = None if direction == "bprop" else CONV
    good = tables.Entry(op, key._asdict(), "cuda", chosen, {"cuda": 1.0})
    assert measure.unknown(good) is None
    assert measure.unknown(good._replace(config=CONV if chosen is None else None)) is not None
    assert measure.unknown(good._replace(config=SMALL)) is not None


# --- the calls of a model -------------------------------------------------------------------------------------------


def model() -> nn.Module:
    block = resnet_fused.Bottleneck
    down = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), block(16, 8, 2, down), block(32, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def test_the_calls_of_a_training_step():
    found = calls.of_model(model, batch=512, size=66, dtype=torch.bfloat16, train=True)
    assert all(a.is_meta for call in found for a in call.args if isinstance(a, torch.Tensor))
    by_op = {call.op: call for call in found}
    assert {"conv1x1_fprop", "conv1x1_bprop", "conv3x3_fprop", "conv3x3_bprop", "bn_add_relu_reduce"} <= set(by_op)
    x, scale, *_, weight, _, _, _, statistics = by_op["conv3x3_fprop"].args
    assert (x.shape, x.dtype) == ((512, 8, 32, 32), torch.bfloat16)
    assert (scale.dtype, weight.shape, statistics) == (torch.float32, (8, 8, 3, 3), True)
    assert by_op["conv3x3_bprop"].args[-1] == torch.float32, "the gradient of an fp32 parameter under autocast"
    assert by_op["bn_add_relu_reduce"].args[1].dtype == torch.uint8, "a GPU's packed mask"
    assert len(calls.unique(found)) == len(found)


def test_the_calls_of_an_inference():
    found = calls.of_model(model, batch=2, size=66, dtype=torch.float16, train=False)
    assert {call.op for call in found} == {"conv1x1_infer", "conv3x3_infer"}
    assert {call.args[0].dtype for call in found} == {torch.float16}


def test_a_convolution_stands_for_its_directions_and_passes():
    found = calls.of_model(model, batch=2, size=18, dtype=torch.float16, train=True)
    bprop = next(call for call in found if call.op == "conv3x3_bprop")
    parts = calls.parts(bprop)
    assert [part.op for part in parts[:2]] == ["conv3x3_dgrad", "conv3x3_wgrad"]
    assert {part.op for part in parts[2:]} == {"bn_add_relu_apply", "bn_add_relu_forward", "bn_add_relu_backward"}
    assert calls.parts(parts[-1]) == []


# --- the tuner ------------------------------------------------------------------------------------------------------


def small(op: str, dtype: torch.dtype = torch.float16) -> list[measure.Problem]:
    """Every form of ``op`` on small tensors."""
    return measure.problems(Call(op, args) for args in samples(op, maker(dtype)))


class FakeTimer:
    """Gives each candidate a time, and runs each once."""

    def __init__(self, **us: float) -> None:
        self.us, self.seen = us, []

    def __call__(self, runs):
        for run in runs.values():
            run()
        self.seen.append(list(runs))
        return {name: self.us.get(name, 100.0 + i) for i, name in enumerate(runs)}


def tuned(found, timer, *, known=None, deadline=math.inf):
    told, saved = [], []
    entries = measure.tune(
        found,
        torch.device(DEVICE),
        timer,
        known or table(),
        deadline=deadline,
        report=told.append,
        save=lambda entries: saved.append(len(entries)),
    )
    return entries, told, saved


@pytest.mark.parametrize("op", ["bn_add_relu_reduce", "conv3x3_fprop", "bn_finalize"])
def test_the_fastest_candidate_gets_the_entry(op):
    found = small(op)
    offered = module_of(op).candidates(found[0].key)
    fastest = configs.label(offered[-1])
    entries, _, saved = tuned(found, timer := FakeTimer(**{fastest: 7.0}))
    assert [e.problem for e in entries] == [p.key._asdict() for p in found]
    assert (entries[0].backend, entries[0].config, entries[0].us[fastest]) == ("triton", offered[-1], 7.0)
    assert timer.seen[0] == ["aten", *map(configs.label, offered)]
    assert saved == list(range(1, len(found) + 1))
    assert all(measure.unknown(e) is None for e in entries)

    entries, _, _ = tuned(found, FakeTimer(aten=1.0))
    assert {(e.backend, e.config) for e in entries} == {("aten", None)}


def test_a_wrong_candidate_is_told_and_never_chosen(monkeypatch):
    op = "bn_add_relu_reduce"
    triton = backends.implementations(op)["triton"]
    wrong = dataclasses.replace(triton, run=lambda *args: tuple(2 * t for t in triton.run(*args)))
    monkeypatch.setitem(backends.implementations(op), "triton", wrong)
    found = small(op)[:1]
    entries, told, _ = tuned(found, FakeTimer())
    assert (entries[0].backend, list(entries[0].us)) == ("aten", ["aten"])
    assert sum("output 0 is wrong in 100.00% of its values" in text for text in told) == len(
        module_of(op).candidates(found[0].key)
    )


def test_what_a_candidate_does_not_write_is_no_result_of_the_last(monkeypatch):
    """The allocator gives the memory of the one before to the next."""
    expected = torch.arange(8.0), torch.arange(8, dtype=torch.uint8)
    memory = {t.dtype: torch.zeros_like(t) for t in expected}
    monkeypatch.setattr(torch, "empty_like", lambda t: memory[t.dtype])
    assert measure._wrong(lambda: [torch.empty_like(t).copy_(t) for t in expected], expected, 0.1) is None
    told = measure._wrong(lambda: [torch.empty_like(t) for t in expected], expected, 0.1)
    assert told == "output 0 is wrong in 100.00% of its values"
    assert "output 1" in measure._wrong(lambda: [expected[0], torch.empty_like(expected[1])], expected, 0.1)


def test_a_candidate_that_fails_is_told(monkeypatch):
    op = "bn_add_relu_mask"

    def fails(*args):
        raise RuntimeError("out of resource: shared memory")

    broken = dataclasses.replace(backends.implementations(op)["triton"], run=fails)
    monkeypatch.setitem(backends.implementations(op), "triton", broken)
    entries, told, _ = tuned(small(op)[:1], FakeTimer())
    assert entries[0].backend == "aten"
    assert "RuntimeError: out of resource: shared memory" in told[0]


def test_what_was_measured_before_stays_and_comes_last():
    found = small("bn_add_relu_mask")
    old = tables.Entry("bn_add_relu_pool", {"images": 1}, "aten", None, {"aten": 1.0})
    known = table(old, tables.Entry("bn_add_relu_mask", found[0].key._asdict(), "aten", None, {"aten": 1.0}))
    entries, told, _ = tuned(found, FakeTimer(), known=known, deadline=time.monotonic())
    assert entries == known.entries
    assert told == [f"out of time: {len(found)} of {len(found)} problems are not measured"]
    entries, told, _ = tuned(found, FakeTimer(aten=3.0), known=known)
    assert entries[0] == old
    assert entries[1].us["aten"] == 3.0
    assert told[-1].startswith(f"{len(found)}/{len(found)} bn_add_relu_mask")


def test_a_bprop_comes_after_what_it_is_made_of():
    bprop = Call("conv3x3_bprop", samples("conv3x3_bprop", maker(torch.float16))[0])
    ops = [p.call.op for p in measure.problems([bprop, *calls.parts(bprop)])]
    assert ops[-1] == "conv3x3_bprop"
    assert set(ops[-3:-1]) == {"conv3x3_dgrad", "conv3x3_wgrad"}


def test_operands_have_the_shapes_strides_and_dtypes_of_the_call():
    expanded = torch.empty(2, 4, 1, 1, device="meta").expand(2, 4, 3, 3)
    call = Call("bn_add_relu_mask", (expanded, torch.empty(9, dtype=torch.uint8, device="meta")))
    dout, sign = measure.operands(call, torch.device("cpu"))
    assert (dout.stride(), dout.shape) == (expanded.stride(), expanded.shape)
    assert (sign.shape, sign.dtype) == ((9,), torch.uint8)
    again = measure.operands(call, torch.device("cpu"))
    assert torch.equal(dout, again[0])
    counts = measure.operands(
        Call("bn_finalize", (torch.empty(4, dtype=torch.int32, device="meta"), None, None, None, None, 1e-5)),
        torch.device("cpu"),
    )[0]
    assert counts.min() > 0


def test_the_difference_from_the_reference():
    exact = torch.randn(64, 64, 40, 40)
    assert measure.difference(exact.half(), exact.half(), 0) is None
    assert measure.difference(exact + 1e-3, exact, 1e-3) is None
    assert "output 0 is wrong in 100.00% of its values" in measure.difference(exact + 1e-3, exact, 1e-5)
    flipped = exact.clone()
    flipped.view(-1)[:60] += 10  # of 6.5 million values: signs of values that round to 0
    assert measure.difference(flipped, exact, 1e-3) is None
    flipped[-1, :, -1] += 10  # a row of a tile
    assert "output 0 is wrong in" in measure.difference(flipped, exact, 1e-3)
    gap = exact.clone()
    gap[-1, :, -1] = math.nan
    assert "output 0 is wrong in" in measure.difference(gap, exact, 1e-3)
    vector = torch.ones(8)
    off = vector.clone()
    off[3] = 1.01
    assert "output 1 is wrong in 12.50%" in measure.difference((exact, off), (exact, vector), 1e-3)
    assert "output 0 is (8,) torch.float32, not (8,) torch.float16" in measure.difference(vector, vector.half(), 1)
    assert measure.difference(torch.ones(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), 1) is not None


def test_results_are_as_exact_as_their_operands(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    single, half = torch.ones(1), torch.ones(1, dtype=torch.float16)
    assert measure.tolerance((single, None, 1.0)) < measure.tolerance((single, half)) == measure.tolerance((half,))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert measure.tolerance((single, None, 1.0)) == measure.tolerance((half,))


@pytest.mark.gpu
def test_the_gpu_s_timer_tells_a_slow_candidate_from_a_fast_one():
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(2**26, device=device)
    us = measure.CudaTimer(device)({"once": lambda: x.add_(1), "twice": lambda: x.add_(1).add_(1)})
    assert 1.5 < us["twice"] / us["once"] < 2.5
    assert 50 < us["once"] < 5000


# --- the command ----------------------------------------------------------------------------------------------------


def test_without_a_gpu_the_command_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 2
    assert "expected a GPU that torch can use, got none; --check works without" in capsys.readouterr().err


def test_a_folder_that_does_not_exist_is_told_before_anything_is_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune.config, "triton_interprets", lambda: False)
    assert cli.main(["tune", "--out", str(tmp_path / "none" / "gpu.json")]) == 2
    assert "expected a file in a folder that exists, got" in capsys.readouterr().err


def test_the_command_measures_a_model_and_writes_its_table(tmp_path, capsys, monkeypatch):
    """All of it but the compiler, the clock and the GPU's name."""
    timer = FakeTimer(aten=1.0)
    monkeypatch.setattr(measure, "compile_ahead", lambda *args: None)
    monkeypatch.setattr(measure, "CudaTimer", lambda device: timer)
    monkeypatch.setattr(tune, "_metadata", lambda device: METADATA)
    monkeypatch.setattr(tune, "_builder", lambda name: model)
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    path = tmp_path / "gpu.json"

    def run(*options: str) -> tables.Table:
        shape = ("--model", "small", "--batch", "2", "--size", "10", "--dtype", "fp16")
        args = parser.parse_args([*shape, *options])
        assert tune._tune(args, Output(), torch.device(DEVICE), path, math.inf) == 0
        return tables.load(path)

    first = run("--ops", "conv3x3,bn_finalize", "--mode", "train")
    assert {e.op for e in first.entries} == {
        "bn_finalize", "conv3x3_fprop", "conv3x3_dgrad", "conv3x3_wgrad", "conv3x3_bprop"
    }  # fmt: skip
    assert f"problems measured; {path} has {len(first.entries)} entries" in capsys.readouterr().out
    second = run("--ops", "bn_statistics")
    assert second.entries[: len(first.entries)] == first.entries
    assert {e.op for e in second.entries[len(first.entries) :]} == {"bn_statistics"}
    assert cli.main(["tune", "--check", "--out", str(path)]) == 0
    with pytest.raises(UsageError, match="conv5x5"):
        run("--ops", "conv5x5")
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=r"delete .*gpu\.json or correct it"):
        run("--ops", "bn_statistics")


def test_check_accepts_what_the_code_knows(tmp_path, capsys):
    assert cli.main(["tune", "--check"]) == 0
    op = "bn_add_relu_reduce"
    key = module_of(op).problem(op, *samples(op, maker(torch.float16))[0])
    good = tables.Entry(op, key._asdict(), "triton", module_of(op).candidates(key)[0], {"aten": 1.0})
    path = tmp_path / "gpu.json"
    path.write_text(table(good).dumps(), encoding="utf-8")
    assert cli.main(["tune", "--check", "--out", str(path)]) == 0
    path.write_text(table(good, good._replace(config=ODD)).dumps(), encoding="utf-8")
    assert cli.main(["tune", "--check", "--out", str(path)]) == 1
    assert "gpu.json, entry 1: expected config to be a candidate of bn_add_relu_reduce" in capsys.readouterr().out
    assert cli.main(["tune", "--check", "--out", str(tmp_path / "none.json")]) == 2
