"""The command line: what it prints, what it answers to wrong input, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused import cli, config
from resnet_fused.cli import compare, models, output, photos, timing

SMALL = ("resnet_fused.models:cifar_resnet20", "--size", "16", "--batch", "4")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command line."""
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- info -----------------------------------------------------------------------------------------------------------


def test_info_as_a_process_prints_json_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "resnet_fused", "info", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["versions"]["resnet_fused"] == resnet_fused.__version__
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0] or found["versions"]["torch"]
    assert found["extension"]["loaded"] is (found["extension"]["reason"] is None)
    assert bool(found["gpus"]) is torch.cuda.is_available()


def test_info_tells_of_every_operation_what_runs_it_and_why_not_the_others(capsys) -> None:
    code, text, _ = call(capsys, "info", "--json")
    assert code == 0
    found = json.loads(text)["backends"]
    assert set(found) == set(resnet_fused.backends.operations())
    for entries in found.values():
        assert [e["status"] for e in entries.values()].count("chosen") == 1
        assert all(e["reason"] for e in entries.values() if e["status"] == "unavailable")


def test_info_prints_tables(capsys) -> None:
    code, text, _ = call(capsys, "info")
    assert code == 0
    assert "conv3x3_fprop" in text
    assert "Extension resnet_fused._C" in text


# --- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("chek",), "invalid choice: 'chek'"),
        (("check",), "the following arguments are required: MODEL"),
        (("check", "resnet5O"), "did you mean resnet50"),
        (("check", "timm:resnet5O"), "expected MODEL to be a model of timm"),
        (("check", "no_such_module_:build"), "a module that can be imported"),
        (("check", "resnet_fused.models:cifar_resnet2O"), "; did you mean cifar_resnet"),
        (("check", "resnet_fused.models:__doc__"), "a function of that module"),
        (("check", "resnet_fused.models:cifar_resnet"), "to be built without arguments"),
        (("check", "torch:seed"), "to return an nn.Module, got int"),
        (("check", "alexnet", "--size", "64", "--batch", "2"), "to have residual blocks"),
        (("check", "resnet18", "--dtype", "fp8"), "invalid choice: 'fp8'"),
        (("check", "resnet18", "--batch", "1"), "expected an integer of at least 2, got '1'"),
        (("check", "resnet18", "--size", "big"), "expected an integer of at least 8, got 'big'"),
        (("check", "resnet18", "--device", "tpu"), "expected cpu, cuda or cuda:N, got 'tpu'"),
        (("bench", "resnet18", "--peers", "eager,jax"), "expected names of eager, channels_last, compile"),
        (("bench", "resnet18", "--rounds", "0"), "expected an integer of at least 1, got '0'"),
        (("check", *SMALL, "--backend", "cuda"), "use --backend auto"),
        (("check", "resnet18", "--memory", "swap"), "invalid choice: 'swap'"),
        (("bench", "resnet18", "--memory", "swap"), "invalid choice: 'swap'"),
        (("demo", "--out", "/dev/null/x"), "expected a folder that can be written"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_wrong_input_is_answered_in_one_line(capsys, arguments, expected) -> None:
    code, text, error = call(capsys, *arguments)
    assert code == 2
    assert text == ""
    assert expected in error
    assert len([line for line in error.splitlines() if line.strip()]) == 1


def test_unknown_backend_in_the_environment(capsys, monkeypatch) -> None:
    monkeypatch.setenv("RESNET_FUSED_BACKEND", "fastest")
    config.backend.cache_clear()
    try:
        code, _, error = call(capsys, "info")
    finally:
        config.backend.cache_clear()
    assert code == 2
    assert "RESNET_FUSED_BACKEND: expected one of auto" in error


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_missing_package_is_answered_with_what_to_install(capsys, monkeypatch, module, package) -> None:
    def absent(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    real = output.importlib.import_module
    monkeypatch.setattr(output.importlib, "import_module", lambda n: absent(n) if n == module else real(n))
    code, _, error = call(capsys, "demo")
    assert code == 2
    assert f"expected {package} to be installed" in error
    assert 'pip install "resnet_fused[demo]"' in error


def test_missing_torchvision_and_timm_is_answered_with_what_to_install(capsys, monkeypatch) -> None:
    def absent(package: str):
        def find(name, known):
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)

        return find

    monkeypatch.setattr(models, "_FINDERS", {name: absent(name) for name in ("torchvision", "timm")})
    code, _, error = call(capsys, "check", "resnet18")
    assert code == 2
    assert "pip install torchvision timm" in error


@pytest.mark.parametrize("command", [(), ("info",), ("demo",), ("check",), ("bench",)], ids=" ".join)
def test_help_has_examples(capsys, command) -> None:
    code, text, _ = call(capsys, *command, "--help")
    assert code == 0
    assert "examples:" in text


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("resnet18", "torchvision"),
        ("timm:resnet18", "timm"),
        ("torchvision:resnet18", "torchvision"),
        ("resnet26", "timm"),
        ("resnet_fused.models:resnet18", "resnet_fused.models"),
    ],
)
def test_where_a_name_is_found(name, source) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    assert models.find(name).source == source


def test_seeded_norms_are_the_same_for_the_same_seed_and_leave_no_block_switched_off() -> None:
    pytest.importorskip("timm")
    first, second = (models.load("timm:resnet18", seed=3, batch=2, size=32).model for _ in range(2))
    other = dict(second.state_dict())
    assert all(torch.equal(value, other[key]) for key, value in first.state_dict().items())
    assert all((m.weight.abs() > 0.1).all() for m in first.modules() if isinstance(m, nn.BatchNorm2d))
    assert not resnet_fused.report(first).fused  # the model itself stays eager
    assert all(m.momentum == 0.1 for m in first.modules() if isinstance(m, nn.BatchNorm2d))


def test_ones_own_model_keeps_its_values(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_net_for_cli.py").write_text(
        "import resnet_fused\n\ndef build():\n    net = resnet_fused.models.cifar_resnet(8)\n"
        "    net.bn1.weight.data.fill_(0.5)\n    return net\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    loaded = models.load("my_net_for_cli:build", seed=0, batch=2, size=16)
    assert (loaded.model.bn1.weight == 0.5).all()
    assert loaded.source == "my_net_for_cli"


# --- check ----------------------------------------------------------------------------------------------------------


def test_check_reports_every_output_gradient_and_buffer(capsys) -> None:
    code, text, _ = call(capsys, "check", *SMALL, "--json")
    assert code == 0
    found = json.loads(text)
    assert found["passed"] is True
    assert found["paths"] == {"train": {"train": 9}, "eval": {"infer": 9}}
    net = resnet_fused.models.cifar_resnet20()
    for mode in ("train", "eval"):
        names = {(row["kind"], row["name"]) for row in found["tensors"] if row["mode"] == mode}
        assert {("gradient", name) for name, _ in net.named_parameters()} <= names
        assert ("input gradient", "images") in names
        assert ("output", "with gradient") in names
        assert (("output", "without gradient") in names) == (mode == "eval")
        assert (("buffer", "bn1.running_mean") in names) == (mode == "train")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_check_of_a_torchvision_model(capsys, dtype) -> None:
    pytest.importorskip("torchvision")
    code, text, _ = call(capsys, "check", "resnet18", "--size", "64", "--dtype", dtype, "--mode", "train")
    assert code == 0
    assert "8 of 8 blocks fused; stem: fused" in text
    assert "layer4.1.conv2.weight" in text
    assert "passed: all" in text


@pytest.mark.parametrize(
    "command", [("check", "--brief"), ("bench", "--rounds", "1", "--peers", "eager")], ids=lambda command: command[0]
)
def test_memory_of_the_fused_model(capsys, monkeypatch, command) -> None:
    asked = []
    real = resnet_fused.fuse

    def spied(model, **options):
        asked.append(options["memory"])
        return real(model, **options)

    monkeypatch.setattr(resnet_fused, "fuse", spied)
    arguments = (command[0], *SMALL, *command[1:], "--mode", "train", "--memory", "recompute")
    code, text, _ = call(capsys, *arguments)
    assert code == 0
    assert "9 of 9 blocks fused (9 recompute in backward)" in text
    assert set(asked) == {"recompute"}
    code, text, _ = call(capsys, *arguments, "--json")
    assert code == 0
    assert json.loads(text)["memory"] == "recompute"


def test_check_names_why_blocks_are_declined(capsys) -> None:
    pytest.importorskip("timm")
    code, text, _ = call(capsys, "check", "ecaresnet26t", "--size", "32", "--batch", "2", "--mode", "eval", "--brief")
    assert code == 0
    assert "declined, 8 times: attention EcaModule" in text
    assert "layer4" not in text.partition("Nearest")[0]


def test_check_finds_a_wrong_gradient(capsys, monkeypatch) -> None:
    real = compare.resnet_fused.fuse

    def broken(model, **options):
        model = real(model, **options)
        model.layer2[0].bn2.weight.register_hook(lambda grad: grad * 1.001)
        return model

    monkeypatch.setattr(compare.resnet_fused, "fuse", broken)
    code, text, _ = call(capsys, "check", *SMALL, "--mode", "train", "--draws", "2", "--json")
    assert code == 1
    found = json.loads(text)
    assert found["failed"] == ["train: gradient layer2.0.bn2.weight"]
    assert found["passed"] is False


def test_check_passes_where_one_draw_alone_is_beyond_the_bound(monkeypatch) -> None:
    real, draws = compare.rows, []

    def once(*arguments):
        found = real(*arguments)
        if not draws:
            found[-1].fused = 1.0
        draws.append(len(found))
        return found

    monkeypatch.setattr(compare, "rows", once)
    net = resnet_fused.unfuse(resnet_fused.models.cifar_resnet(8))
    found = compare.compare(net, lambda draw: models.images(2, 16, draw), modes=("train",), dtype=torch.float32)
    assert len(draws) == 2
    assert not any(row.failed for row in found)
    assert max(row.draws for row in found) == 2


def test_errors_are_relative_and_zero_gradients_have_a_size() -> None:
    truth = {
        ("gradient", "w"): torch.full((4,), 2.0),
        ("gradient", "v"): torch.full((4,), 2.0),
        ("gradient", "b"): torch.full((4,), 1e-17),
        ("output", ""): torch.ones(2),
    }
    off = {key: value + 1e-3 for key, value in truth.items()}
    nchw = dict(truth)
    found = {row.name or row.kind: row for row in compare.rows(truth, nchw, nchw, off, "train", 1e-6)}
    assert found["w"].fused == pytest.approx(5e-4, rel=1e-3)
    assert found["b"].fused == pytest.approx(5e-4, rel=1e-3)  # not against its own vanishing size
    assert found["output"].fused == pytest.approx(1e-3, rel=1e-2)
    assert found["w"].share > 1


@pytest.mark.parametrize("value", [None, torch.ones(3), torch.full((2,), float("nan"))], ids=["absent", "shape", "nan"])
def test_a_tensor_that_is_absent_or_not_finite_is_beyond_the_bound(value) -> None:
    truth = {("output", ""): torch.ones(2)}
    fused = {} if value is None else {("output", ""): value}
    (row,) = compare.rows(truth, truth, truth, fused, "eval", 1e-6)
    assert not row.share <= 1


# --- bench ----------------------------------------------------------------------------------------------------------


def test_bench_times_every_peer(capsys) -> None:
    code, text, _ = call(capsys, "bench", *SMALL, "--rounds", "3", "--peers", "eager,channels_last", "--json")
    assert code == 0
    results = json.loads(text)["results"]
    for mode in ("infer", "train"):
        assert list(results[mode]["peers"]) == ["eager", "channels_last", "fused"]
        assert results[mode]["unavailable"] == {}
        for known in results[mode]["peers"].values():
            assert len(known["samples_s"]) == 3
            assert known["q1_s"] <= known["median_s"] <= known["q3_s"]
            assert known["peak_memory_bytes"] is None or known["peak_memory_bytes"] >= 0


def test_bench_says_why_compile_is_missing(capsys, monkeypatch) -> None:
    def absent(model):
        raise RuntimeError("No working C++ compiler found\nsecond line")

    monkeypatch.setattr(torch, "compile", absent)
    code, text, _ = call(capsys, "bench", *SMALL, "--rounds", "1", "--mode", "infer", "--peers", "compile")
    assert code == 0
    assert "compile was not timed: RuntimeError: No working C++ compiler found" in text
    assert "resnet_fused, channels_last" in text


def test_bench_gives_a_wrong_result_no_time(capsys, monkeypatch) -> None:
    from resnet_fused.cli import bench

    real = bench.resnet_fused.fuse

    def broken(model, **options):
        model = real(model, **options)
        model.fc.weight.data.mul_(1.5)
        return model

    monkeypatch.setattr(bench.resnet_fused, "fuse", broken)
    code, text, _ = call(capsys, "bench", *SMALL, "--rounds", "1", "--mode", "infer", "--peers", "eager")
    assert code == 1
    assert "fused was not timed: wrong result" in text


def test_quartiles_and_paired_speedups() -> None:
    slow, fast = timing.Times((2.0, 4.0, 8.0, 4.0)), timing.Times((1.0, 2.0, 4.0, 1.0))
    assert slow.median == 4.0
    assert fast.speedup(slow) == 2.0
    assert slow.speedup(fast) == 0.5


def test_rounds_rotate_the_order() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = timing.interleave(calls, 3, torch.device("cpu"), lambda text: None)
    assert order == list("abc" + "bca" + "cab")
    assert all(len(found.samples) == 3 for found in times.values())


def test_peak_memory_counts_what_a_call_allocates() -> None:
    found = timing.peak_memory(lambda: torch.ones(64 << 18), torch.device("cpu"))
    if found is None:
        pytest.skip("the system does not tell the peak of the resident set")
    assert 60 << 20 <= found <= 128 << 20


# --- demo -----------------------------------------------------------------------------------------------------------


def test_demo_fuses_all_of_resnet50() -> None:
    torchvision = pytest.importorskip("torchvision")
    report = resnet_fused.report(resnet_fused.fuse(torchvision.models.resnet50(weights=None)))
    assert [(stage["name"], stage["fused"], stage["count"]) for stage in photos.stages(report)] == [
        ("stem", 1, 1),
        ("layer1", 3, 3),
        ("layer2", 4, 4),
        ("layer3", 6, 6),
        ("layer4", 3, 3),
    ]


@pytest.fixture
def small_demo(monkeypatch, tmp_path) -> None:
    """The demo with resnet18 in resnet50's place, and an empty hub cache."""
    for package in ("sklearn", "matplotlib"):
        pytest.importorskip(package)
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torchvision.models, "resnet50", torchvision.models.resnet18)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.mark.usefixtures("small_demo")
def test_demo_in_its_quick_form(capsys, tmp_path) -> None:
    code, text, error = call(capsys, "demo", "--quick", "--out", str(tmp_path / "out"), "--json")
    found = json.loads(text)
    assert code == 0, error
    assert found["passed"] is True
    assert [row["status"] for row in found["blocks"]] == ["fused"] * 9
    assert sorted(answer["photo"] for answer in found["photographs"]) == ["china.jpg", "flower.jpg"]
    assert all(answer["same"] and len(answer["classes"]) == 5 for answer in found["photographs"])
    assert found["parameters"]["pretrained"] is False
    first = (found["training"][name]["losses"][0] for name in ("fused", "unfused"))
    assert next(first) == pytest.approx(next(first), rel=1e-5)
    assert (tmp_path / "out" / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small_demo")
def test_demo_takes_pretrained_weights_from_the_hub_cache(tmp_path) -> None:
    from torchvision.models import ResNet50_Weights, resnet18

    file = tmp_path / "hub" / "checkpoints" / ResNet50_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    kept = resnet18(weights=None)
    torch.save(kept.state_dict(), file)
    network = photos.network(photos.load(), 0)
    assert network.pretrained
    assert str(file) in network.origin
    assert torch.equal(network.model.fc.weight, kept.fc.weight)
