"""The scripts in examples/: files, answers to wrong input, resuming, several processes, and the papers' formulas."""

from __future__ import annotations

import csv
import functools
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from matplotlib import image
from scipy import stats
from torch import nn
from torch.nn import functional as F

from resnet_fused import models, ops
from resnet_fused.cli.output import Output, UsageError, finite

FOLDER = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = ("train_cifar", "degradation", "variants", "signal_propagation", "convergence")

sys.path.insert(0, str(FOLDER))
checkpoints, common, images, trainer = map(importlib.import_module, ("checkpoints", "common", "images", "trainer"))
significance = importlib.import_module("significance")
train_cifar, degradation, variants, signal_propagation, convergence = map(importlib.import_module, SCRIPTS)
sys.path.remove(str(FOLDER))


@pytest.fixture(autouse=True)
def _settings():
    """The scripts ask torch for deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill


def call(script: Any, out: Path, *arguments: str) -> Any:
    """What one script's ``run`` returns."""
    return script.run(script.parse(["--out", str(out), "--device", "cpu", *arguments]), Output())


def process(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A Python process with one thread."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, all of them complete."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(None not in row and None not in row.values() and all(row.values()) for row in rows)
    return rows


def assert_picture(path: Path) -> None:
    """A PNG that shows something."""
    pixels = image.imread(path)
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 400
    assert pixels[..., :3].std() > 0.05


# --- the command lines ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_from_any_folder(name, tmp_path) -> None:
    done = process(str(FOLDER / f"{name}.py"), "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--seed" in done.stdout
    assert f"python examples/{name}.py" in done.stdout


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path) -> None:
    done = process(str(FOLDER / "train_cifar.py"), "--data", str(tmp_path), "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "train_cifar.py: error: argument --data: expected" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--depth", "21"), "expected depth to be 6n + 2"),
        (("--depth", "20", "--bottleneck", "--unit", "full_preact", "--batch", "7"), None),
        (("--model", "cifar_resnet20", "--depth", "20"), "argument --depth: expected --model cifar_resnet or"),
        (("--model", "cifar_preact_resnet20", "--unit", "original"), "expected unit to be 'full_preact'"),
        (("--images", "20", "--batch", "21"), "argument --batch: expected 1 to the 20 training images, got 21"),
        (("--norm", "sync"), "argument --norm: expected a GPU for sync, got cpu"),
        (("--resume",), "argument --resume: expected a checkpoint that can be read, got"),
    ],
)
def test_options_of_train_cifar(arguments, expected, tmp_path) -> None:
    tiny = ("--images", "20", "--epochs", "1", "--stop-after", "1")
    if expected is None:
        call(train_cifar, tmp_path, *tiny, *arguments)
        return
    with pytest.raises(UsageError) as raised:
        call(train_cifar, tmp_path, *tiny, *arguments)
    assert expected in str(raised.value)


def test_mixing_is_a_rule_and_its_values(capsys) -> None:
    assert train_cifar.mixing("no_shortcut") == models.mixing.no_shortcut()
    assert train_cifar.mixing("constant_scaling:0.5, 1") == models.mixing.constant_scaling(0.5, 1)
    assert train_cifar.mixing("stochastic_depth:0.2,'batch'") == models.mixing.stochastic_depth(0.2, "batch")
    for text, expected in (
        ("scaling", "expected one of "),
        ("constant_scaling:a", "expected values that constant_scaling takes, got 'a'"),
        ("dropout_shortcut:2", "a probability from 0 to 1"),
        ("shortcut_gating:1,2", "expected values that shortcut_gating takes"),
    ):
        with pytest.raises(SystemExit):
            train_cifar.parse(["--mixing", text])
        assert expected in capsys.readouterr().err


# --- images ---------------------------------------------------------------------------------------------------------


def write_cifar(folder: Path, counts: tuple[int, ...] = (3, 2, 4, 1, 2, 3)) -> bytes:
    """CIFAR-10's files with a few records; the bytes of the first one."""
    generator = torch.Generator().manual_seed(3)
    for name, count in zip((*images.TRAIN_FILES, *images.TEST_FILES), counts, strict=True):
        records = torch.randint(256, (count, 3073), generator=generator, dtype=torch.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.numpy().tobytes())
    return (folder / images.TRAIN_FILES[0]).read_bytes()


def test_cifar_files_are_read_byte_by_byte(tmp_path) -> None:
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    content = write_cifar(inner)
    for folder in (inner, tmp_path):
        data = images.cifar10(folder)
        assert len(data.train.labels) == 12
        assert len(data.test.labels) == 3
        assert "12 training and 3 test images" in data.name
        record = content[2 * 3073 : 3 * 3073]
        assert data.train.labels[2] == record[0]
        for channel, row, column in ((0, 0, 0), (0, 0, 31), (1, 0, 0), (1, 5, 7), (2, 31, 31)):
            assert data.train.pixels[2, channel, row, column] == record[1 + 1024 * channel + 32 * row + column]
    first_test = (inner / "test_batch.bin").read_bytes()
    assert data.test.pixels[0].flatten().tolist() == list(first_test[1:3073])
    assert data.test.labels[0] == first_test[0]


def test_cifar_files_that_are_missing_or_wrong(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"to hold the binary version of CIFAR-10, got no data_batch_1\.bin"):
        images.cifar10(tmp_path)
    content = write_cifar(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(content[:-5])
    with pytest.raises(UsageError, match=r"to be records of 3073 bytes, .* got 9,214 bytes, 3068 too many"):
        images.cifar10(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"to be records of 3073 bytes, .* got 0 bytes"):
        images.cifar10(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(content[:3073] + b"\x0a" + content[3074:])
    with pytest.raises(UsageError, match=r"labels from 0 to 9 in .*data_batch_1\.bin, got 10 in record 1"):
        images.cifar10(tmp_path)


def test_normalisation_is_that_of_the_training_images(tmp_path) -> None:
    write_cifar(tmp_path)
    for normalise in ("pixel", "channel"):
        data = images.cifar10(tmp_path, normalise)
        raw, test = data.train.pixels.double(), data.test.pixels.double()
        if normalise == "pixel":
            expected = [(part - raw.mean(0)) / 255 for part in (raw, test)]
        else:
            deviation = raw.transpose(0, 1).flatten(1).std(1).view(3, 1, 1)
            expected = [(part - raw.mean((0, 2, 3)).view(3, 1, 1)) / deviation for part in (raw, test)]
        for part, wanted in zip((data.train, data.test), expected, strict=True):
            x, labels = part.batch(torch.arange(len(part.labels)))
            torch.testing.assert_close(x.double(), wanted, rtol=0, atol=1e-5)
            assert torch.equal(labels, part.labels)


def test_crops_are_windows_of_the_padded_image() -> None:
    x = torch.randn(40, 3, 8, 6)
    crops = images.Crops.draw(40, torch.Generator().manual_seed(1))
    assert set(crops.top.tolist()) == set(range(9))
    assert 0 < int(crops.mirrored.sum()) < 40
    found = crops.apply(x)
    padded = F.pad(x, (4, 4, 4, 4))
    for i, (top, left, mirrored) in enumerate(zip(*(t.tolist() for t in crops), strict=True)):
        window = padded[i, :, top : top + 8, left : left + 6]
        assert torch.equal(found[i], window.flip(2) if mirrored else window)
    assert all(torch.equal(a, b[1::2]) for a, b in zip(crops.share(1, 2), crops, strict=True))


# --- training -------------------------------------------------------------------------------------------------------

TINY = ("--depth", "8", "--images", "40", "--batch", "8", "--epochs", "3", "--rate", "0.02")  # 5 steps an epoch


def assert_same(ours: Any, theirs: Any, where: str = "state") -> None:
    """The same keys, and every tensor and value the same bits."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for name in ours:
            assert_same(ours[name], theirs[name], f"{where}.{name}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert ours == theirs or (ours != ours and theirs != theirs), f"{where}: {ours} instead of {theirs}"


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        (("--mixing", "stochastic_depth:0.5"), ("7", "12")),  # in the midst of epochs; draws from torch's generator
        (("--amp", "bf16", "--unit", "full_preact"), ("10",)),
        (("--amp", "fp16", "--warmup", "2", "--images", "24", "--epochs", "1"), ("1",)),  # slow on a CPU
    ],
    ids=["fp32", "bf16", "fp16"],
)
def test_resuming_gives_the_bits_of_one_run(options, stops, tmp_path) -> None:
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    call(train_cifar, straight, *TINY, *options)
    for i, stop in enumerate((*stops, "99")):
        torch.manual_seed(100 + i)  # what the process has drawn before is no part of the run
        call(train_cifar, parts, *TINY, *options, "--stop-after", stop, *(["--resume"] if i else []))
    found, expected = (
        torch.load(folder / "train_cifar.pt", weights_only=True, map_location="cpu") for folder in (parts, straight)
    )
    assert expected["steps"] == (15 if "fp16" not in options else 3)
    assert expected["optimizer"]["state"][0]["momentum_buffer"].any()
    assert_same(found, expected)
    texts = [(folder / "train_cifar.csv").read_bytes() for folder in (parts, straight)]
    assert texts[0] == texts[1]
    rows = rows_of(straight / "train_cifar.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"][: expected["steps"] // 5 or 1]
    assert all(math.isfinite(float(row["train_loss"])) for row in rows)
    assert_picture(parts / "train_cifar.png")
    assert not list(parts.glob(".*")), "temporary files are left"


def test_a_run_that_is_cut_off_continues_from_its_last_checkpoint(tmp_path) -> None:
    """The steps behind the checkpoint are lost, and done again with the same bits."""
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    call(train_cifar, straight, *TINY)
    args = train_cifar.parse(["--out", str(parts), "--device", "cpu", *TINY, "--checkpoint-every", "4"])
    step, done = trainer.Trainer.step, []

    def cut_off(self: Any) -> None:
        if len(done) == 11:
            raise KeyboardInterrupt
        done.append(step(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", cut_off)
        with pytest.raises(KeyboardInterrupt):
            train_cifar.run(args, Output())
    assert torch.load(parts / "train_cifar.pt", weights_only=True)["steps"] == 8
    call(train_cifar, parts, *TINY, "--resume")
    assert_same(
        *(torch.load(folder / "train_cifar.pt", weights_only=True) for folder in (parts, straight)),
    )
    assert (parts / "train_cifar.csv").read_bytes() == (straight / "train_cifar.csv").read_bytes()


def test_checkpoints_that_do_not_fit(tmp_path) -> None:
    call(train_cifar, tmp_path, *TINY, "--stop-after", "2")
    for options, expected in (
        (("--batch", "10"), "a run with recipe batch 10, got 8"),
        (("--seed", "1"), "a run with seed 1, got 0"),
        (("--images", "41"), "a run with data, as crc32"),
        (("--unit", "full_preact"), "a run with unit 'full_preact', got None"),
    ):
        with pytest.raises(UsageError, match=f"argument --resume: expected a checkpoint of {expected}"):
            call(train_cifar, tmp_path, *TINY, *options, "--resume")
    path = tmp_path / "train_cifar.pt"
    for content, expected in ((b"nothing", "of this script"), (path.read_bytes()[:500], "of this script")):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=f"argument --resume: expected a checkpoint {expected}, got"):
            call(train_cifar, tmp_path, *TINY, "--resume")
    torch.save({"network": {}}, path)
    with pytest.raises(UsageError, match="expected a checkpoint of format 1, got None"):
        checkpoints.load(path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with common.replacing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert path.read_text() == "old"
    with common.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_rate_is_the_papers() -> None:
    """/10 at 32k and 48k of 64k steps, and 400 steps of warm-up for 110 layers."""
    data = images.synthetic(20, 10)
    assert [trainer.paper_warmup(depth, 64_000) for depth in (56, 110, 1202)] == [0, 400, 400]
    recipe = trainer.Recipe(epochs=4, batch=2, warmup=3)  # 40 steps
    made = trainer.Trainer(models.cifar_resnet(8), data, recipe, device=torch.device("cpu"), seed=0)
    rates = []
    for _ in range(made.total_steps):
        rates.append(made.optimizer.param_groups[0]["lr"])
        made.optimizer.step()
        made.schedule.step()
    assert rates == pytest.approx([0.01] * 3 + [0.1] * 17 + [0.01] * 10 + [0.001] * 10)


def test_every_image_is_seen_once_an_epoch() -> None:
    """And the row is the mean over what was trained on: a network that always answers 0 is right for the zeros."""
    data = images.synthetic(24, 10)

    class Zero(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen: list[torch.Tensor] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.seen.append(x.flatten(1))
            return torch.eye(10)[0].expand(len(x), 10) + self.weight

    made = trainer.Trainer(Zero(), data, trainer.Recipe(2, 8), device=torch.device("cpu"), seed=0)
    made.run()
    expected = data.train.batch(torch.arange(24))[0].flatten(1)
    for epoch in (made.network.seen[:3], made.network.seen[3:]):
        distances = torch.cdist(torch.cat(epoch), expected)
        assert sorted(distances.argmin(1).tolist()) == list(range(24))
    assert not torch.equal(made.network.seen[0], made.network.seen[3])
    for row in made.rows:
        assert row["train_error"] == pytest.approx(100 * (data.train.labels != 0).double().mean().item())
        assert row["test_error"] == pytest.approx(100 * (data.test.labels != 0).double().mean().item())


WORKER = """
import os, sys, pathlib, torch
sys.path.insert(0, {folder!r})
import train_cifar
from resnet_fused.cli.output import Output
out = pathlib.Path({out!r})
tiny = ["--device", "cpu", "--depth", "8", "--images", "32", "--batch", "8", "--epochs", "2", "--rate", "0.02"]
def run(name, *options):
    trainer = train_cifar.run(train_cifar.parse(["--out", str(out / name), *tiny, *options]), Output())
    torch.save(trainer.network.state_dict(), out / f"{{name}}_{{trainer.world.rank}}_of_{{trainer.world.size}}.pt")
if "WORLD_SIZE" in os.environ:
    torch.distributed.init_process_group("gloo")
run("group", "--norm", "group")
if "WORLD_SIZE" in os.environ:
    run("batch", "--mixing", "stochastic_depth:0.5")
    run("resumed", "--mixing", "stochastic_depth:0.5", "--stop-after", "5")
    run("resumed", "--mixing", "stochastic_depth:0.5", "--resume")
    torch.distributed.destroy_process_group()
"""


def test_two_processes_train_one_network(tmp_path) -> None:
    """Ranks agree bit for bit. With GroupNorm, which knows no batch, they do what one process does."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(folder=str(FOLDER), out=str(tmp_path)))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for launcher in (torchrun, ()):
        done = process(*launcher, str(script))
        assert done.returncode == 0, done.stderr[-3000:]

    def load(name: str) -> dict[str, torch.Tensor]:
        return torch.load(tmp_path / f"{name}.pt", weights_only=True)

    for name in ("group", "batch", "resumed"):
        first, second = load(f"{name}_0_of_2"), load(f"{name}_1_of_2")
        parameters = dict(models.cifar_resnet(8).named_parameters())
        for key in first:
            if key in parameters:
                assert torch.equal(first[key], second[key]), f"{name}: {key}"
    assert_same(load("resumed_0_of_2"), load("batch_0_of_2"))
    for file in ("train_cifar.csv", "train_cifar.pt"):
        assert (tmp_path / "batch" / file).exists()
    assert (tmp_path / "resumed/train_cifar.csv").read_bytes() == (tmp_path / "batch/train_cifar.csv").read_bytes()

    alone, together = load("group_0_of_1"), load("group_0_of_2")
    torch.manual_seed(0)
    start = train_cifar.build(train_cifar.parse(["--depth", "8", "--norm", "group"]), torch.device("cpu")).state_dict()
    for key in start:
        moved = (alone[key] - start[key]).abs().max()
        assert (alone[key] - together[key]).abs().max() <= 1e-3 * moved, key
    assert (alone["conv1.weight"] - start["conv1.weight"]).abs().max() > 1e-3


def test_another_number_of_processes_is_told(tmp_path) -> None:
    data, cpu = images.synthetic(20, 10), torch.device("cpu")
    made = trainer.Trainer(models.cifar_resnet(8), data, trainer.Recipe(1, 4), device=cpu, seed=0)
    state = made.state()
    state["ranks"] *= 2
    with pytest.raises(UsageError, match="expected a checkpoint of 1 processes, got 2"):
        made.load_state(state)
    with pytest.raises(UsageError, match="argument --batch: expected a multiple of the 2 processes, got 5"):
        trainer.Trainer(
            models.cifar_resnet(8), data, trainer.Recipe(1, 5), device=cpu, seed=0, world=trainer.World(0, 2)
        )


# --- degradation ----------------------------------------------------------------------------------------------------


def test_degradation_writes_every_network_whatever_the_number_of_processes(tmp_path) -> None:
    options = ("--depths", "8,14", "--seeds", "1", "--epochs", "1", "--batch", "512")
    verdict = call(degradation, tmp_path / "one", *options, "--processes", "1")
    assert verdict.seeds == 1
    rows = rows_of(tmp_path / "one/degradation.csv")
    keys = {(row["kind"], row["depth"], row["seed"], row["epoch"]) for row in rows}
    assert keys == {(kind, depth, "0", "1") for kind in ("plain", "residual") for depth in ("8", "14")}
    assert all(0 <= float(row["train_error"]) <= 100 for row in rows)
    assert_picture(tmp_path / "one/degradation.png")
    script = str(FOLDER / "degradation.py")
    done = process(script, *options, "--out", str(tmp_path / "two"), "--device", "cpu", "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert "scikit-learn's handwritten digits" in done.stdout
    assert (tmp_path / "two/degradation.csv").read_bytes() == (tmp_path / "one/degradation.csv").read_bytes()


@pytest.mark.parametrize(
    ("plain", "residual", "expected"),
    [
        ((1.0, 60.0), (0.5, 0.6), (1, 1, True)),
        ((1.0, 1.5), (0.5, 0.6), (0, 1, False)),  # within the margin
        ((1.0, 60.0), (0.5, 3.0), (1, 0, False)),
        ((1.0, math.nan), (0.5, 0.5), (1, 1, True)),  # diverged
    ],
)
def test_the_verdict_is_that_of_the_figures(plain, residual, expected) -> None:
    runs = [
        degradation.Run(kind, depth, 0, [{"train_error": error, "train_loss": error / 50}])
        for kind, errors in (("plain", plain), ("residual", residual))
        for depth, error in zip((8, 44), errors, strict=True)
    ]
    found = degradation.judge(runs)
    assert (found.plain, found.residual, found.seen) == expected
    text = "\n".join(degradation._sentences(found, (8, 44)))
    assert ("NOT seen" in text) is not expected[2]


def test_depths_that_no_network_has(capsys) -> None:
    for text in ("8", "8,21", "a,b", "2,8"):
        with pytest.raises(SystemExit):
            degradation.parse(["--depths", text])
        assert "expected two or more depths of the form 6n + 2" in capsys.readouterr().err


# --- variants -------------------------------------------------------------------------------------------------------

# arXiv 1603.05027: on the shortcut, on F, error.
TABLE_1 = [
    ("original", "1", "1", "6.61"),
    ("constant scaling", "0", "1", "fail"),
    ("constant scaling", "0.5", "1", "fail"),
    ("constant scaling", "0.5", "0.5", "12.35"),
    ("exclusive gating, b_g = 0", "1 - g(x)", "g(x)", "fail"),
    ("exclusive gating, b_g = -6", "1 - g(x)", "g(x)", "8.70"),
    ("exclusive gating, b_g = -7", "1 - g(x)", "g(x)", "9.81"),
    ("shortcut-only gating, b_g = 0", "1 - g(x)", "1", "12.86"),
    ("shortcut-only gating, b_g = -6", "1 - g(x)", "1", "6.91"),
    ("1x1 conv shortcut, every unit", "1x1 conv", "1", "12.22"),
    ("dropout shortcut", "dropout 0.5", "1", "fail"),
]
TABLE_2 = {  # ResNet-110, ResNet-164
    "(a) original": ("6.61", "5.93"),
    "(b) BN after addition": ("8.17", "6.50"),
    "(c) ReLU before addition": ("7.84", "6.14"),
    "(d) ReLU-only pre-activation": ("6.71", "5.91"),
    "(e) full pre-activation": ("6.37", "5.46"),
}


def test_variants_has_the_papers_tables_and_a_run_of_every_row(tmp_path, capsys) -> None:
    call(variants, tmp_path, "--scale", "smoke", "--processes", "1")
    rows = rows_of(tmp_path / "variants.csv")
    columns = ("case", "on_shortcut", "on_branch", "paper_error")
    assert [tuple(row[c] for c in columns) for row in rows if row["table"] == "1"] == TABLE_1
    second = [row for row in rows if row["table"] == "2"]
    assert {case: tuple(row["paper_error"] for row in second if row["case"] == case) for case in TABLE_2} == TABLE_2
    assert [row["paper_network"] for row in second] == ["ResNet-110", "ResNet-164"] * 5
    for row in rows:
        assert row["our_depth"] == ("11" if row["paper_network"] == "ResNet-164" else "8")
        assert row["our_runs"] == "1"
        assert 0 <= float(row["our_error"]) <= 100
        assert row["our_verdict"] == ("fail" if float(row["our_error"]) > 20 else "trained")
        assert "digits" in row["our_data"]
    assert rows[0]["our_error"] == second[0]["our_error"], "the original unit is one network"
    assert_picture(tmp_path / "variants.png")
    assert "not comparable" in capsys.readouterr().out


def test_every_case_of_variants_is_the_network_of_its_row() -> None:
    networks = [models.cifar_resnet(11 if c.options.get("bottleneck") else 8, **c.options) for c in variants.CASES]
    for case, network in zip(variants.CASES, networks, strict=True):
        unit = network.layer1[0]
        if case.table == 2:
            assert case.name[4:].startswith(
                {
                    "original": "original",
                    "bn_after_add": "BN after",
                    "relu_before_add": "ReLU before",
                    "relu_preact": "ReLU-only",
                    "full_preact": "full",
                }[getattr(unit, "unit", "original")]
            )
        elif "scaling" in case.name or "gating" in case.name or "dropout" in case.name:
            mix = unit.mixing.train().mix()
            if not unit.mixing.has_shortcut:
                mix = mix._replace(shortcut=0)
            constants = {"0": (0, 0), "0.5": (0.5, 0), "1": (1, 0), "1 - g(x)": (1, -1), "g(x)": (0, 1)}
            constants["dropout 0.5"] = (0, 1)
            assert (mix.shortcut, mix.shortcut_gate) == constants[case.shortcut]
            assert (mix.branch, mix.branch_gate) == constants[case.branch]
        elif "1x1" in case.name:
            assert all(
                unit.downsample is not None for unit in itertools.chain(network.layer1, network.layer2, network.layer3)
            )


def test_a_run_that_diverges_is_told(tmp_path, monkeypatch) -> None:
    def train(index, scale, data, seed, device):
        return variants.Found(index, [math.nan, 30.0, 10.0][min(index, 2)], math.nan if index == 0 else 1.0)

    monkeypatch.setattr(variants, "train", train)
    call(variants, tmp_path, "--scale", "smoke", "--processes", "1", "--table", "1", "--runs", "2")
    rows = rows_of(tmp_path / "variants.csv")
    assert [row["our_verdict"] for row in rows[:3]] == ["diverged", "fail", "trained"]
    assert {row["our_runs"] for row in rows} == {"2"}
    assert len(rows) == len(TABLE_1)
    assert_picture(tmp_path / "variants.png")


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    data = images.synthetic(16, 10)
    recipe = trainer.Recipe(3, 8, rate=math.inf)
    made = trainer.Trainer(models.cifar_resnet(8), data, recipe, device=torch.device("cpu"), seed=0)
    made.run()
    assert made.diverged
    assert len(made.rows) == 1


def test_variants_paper_needs_cifar(tmp_path) -> None:
    with pytest.raises(UsageError, match="argument --scale: expected --data with CIFAR-10's files for paper, got none"):
        call(variants, tmp_path, "--scale", "paper")
    paper = variants.SCALES["paper"]
    assert (paper.depth, paper.bottleneck_depth, paper.runs) == (110, 164, 5)
    assert paper.recipe._replace(warmup=0) == trainer.Recipe(164, 128, 0.1, 0.9, 1e-4, 0, True, "off")


# --- signal propagation ---------------------------------------------------------------------------------------------


def test_signal_propagation_writes_every_rule_and_every_length(tmp_path) -> None:
    call(signal_propagation, tmp_path, "--units", "4", "--paths", "5", "--batch", "2", "--size", "4")
    rows = rows_of(tmp_path / "signal_propagation.csv")
    assert {(row["rule"], int(row["unit"])) for row in rows} == set(
        itertools.product(signal_propagation.RULES, range(5))
    )
    factors = {"identity": 1.0, "plain": 0.0, "scaling 0.5": 0.5, "scaling 0.9": 0.9}
    for row in rows:
        predicted, measured = float(row["predicted_without_branches"]), float(row["measured_without_branches"])
        assert measured == pytest.approx(predicted, rel=1e-13)
        if row["rule"] in factors:
            assert predicted == pytest.approx(factors[row["rule"]] ** (4 - int(row["unit"])), rel=1e-13)
        assert row["unit"] != "4" or float(row["measured_with_branches"]) == 1
    paths = rows_of(tmp_path / "signal_propagation_paths.csv")
    assert [int(row["paths"]) for row in paths] == [int(row["binomial"]) for row in paths] == [1, 5, 10, 10, 5, 1]
    assert sum(float(row["share"]) for row in paths) == pytest.approx(1)
    assert_picture(tmp_path / "signal_propagation.png")


def test_factors_multiply_exactly_in_linear_units() -> None:
    """Powers of two: not a bit is lost. With weights, equation 8 says product (a + b w)."""
    x, last = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    for a in (1.0, 0.5, 0.25, 2.0, 0.0):
        found = signal_propagation.gradients([lambda x, a=a: a * x] * 20, x, last)
        assert all(torch.equal(grad, a ** (20 - i) * last) for i, grad in enumerate(found))
    weights = [1.0, 0.0, -2.0, 1.0]
    units = [lambda x, w=w: 0.5 * x + 0.5 * (w * x) for w in weights]
    found = signal_propagation.gradients(units, x, last)
    for i, grad in enumerate(found):
        assert torch.equal(grad, math.prod(0.5 + 0.5 * w for w in weights[i:]) * last)


def test_paths_of_linear_units_are_the_terms_of_the_product() -> None:
    """Product (1 + w_i): the paths of length k are the products of k of the weights."""
    x, last = torch.randn(2, 1, 2, 3, 3, dtype=torch.float64)
    weights = [2.0, -3.0, 0.5, 4.0, 1.0]
    lengths, deviation = signal_propagation.walk([lambda x, w=w: x + w * x for w in weights], x, last)
    assert deviation < 1e-14
    for k, length in enumerate(lengths):
        products = [math.prod(chosen) for chosen in itertools.combinations(weights, k)]
        assert length.paths == len(products) == math.comb(5, k)
        assert length.mean_norm == pytest.approx(sum(map(abs, products)) / len(products) * last.norm().item())
        assert length.norm == pytest.approx(abs(sum(products)) * last.norm().item())


@pytest.mark.parametrize("name", signal_propagation.RULES)
def test_predicted_products_are_autograds(name) -> None:
    """On the package's units in fp64: exact for constants that are powers of two, to rounding for others and gates."""
    rule = signal_propagation.RULES[name]
    x, last = torch.randn(2, 2, 16, 4, 4, dtype=torch.float64)
    bare = signal_propagation.without_branches(signal_propagation.stage(5, rule, seed=0))
    found, expected = signal_propagation.gradients(bare, x, last), signal_propagation.predicted(bare, x, last)
    for ours, theirs in zip(found, expected, strict=True):
        if "gate" in name or "0.9" in name:
            torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
        else:
            assert torch.equal(ours, theirs)
    units = signal_propagation.stage(5, rule, seed=0)
    if "gate" not in name:
        sums = signal_propagation.check_sums(units, x, last)
        assert max(sums) < 1e-13
    else:
        with torch.no_grad():
            gates = [1 - torch.sigmoid(u.mixing.conv(s)) for u, s in zip(units, signal_propagation.states(units, x))]  # noqa: B905
        product = last
        for gate in reversed(gates):
            product = product * gate
        assert torch.equal(signal_propagation.predicted(units, x, last)[0], product)


def test_the_sums_of_the_paper_are_not_met_by_other_factors(monkeypatch) -> None:
    """The check can fail: with a wrong product it does."""
    units = signal_propagation.stage(3, models.mixing.constant_scaling(0.5, 1.0), seed=0)
    x, last = torch.randn(2, 2, 16, 4, 4, dtype=torch.float64)
    assert max(signal_propagation.check_sums(units, x, last)) < 1e-13
    monkeypatch.setattr(signal_propagation, "factor", lambda rule, x: 1.0)
    assert min(signal_propagation.check_sums(units, x, last)) > 1e-3


# --- significance ---------------------------------------------------------------------------------------------------


def test_larger_counts_every_choice_of_ranks() -> None:
    for ours, theirs in (
        ([3.0, 5.0, 6.5], [1.0, 2.0, 4.0, 6.0]),
        ([1.0, 2.0], [3.0, 4.0, 5.0]),
        ([9.0, math.inf], [1.0]),
    ):
        both = ours + theirs
        wins = sum(a > b for a in ours for b in theirs)
        choices = list(itertools.combinations(range(len(both)), len(ours)))
        sums = [sum(both[i] > both[j] for i in c for j in range(len(both)) if j not in c) for c in choices]
        assert significance.larger(ours, theirs) == pytest.approx(sum(s >= wins for s in sums) / len(choices))


@pytest.mark.parametrize("pairs", [3, 8])
def test_sign_flips_of_one_column_are_scipys(pairs) -> None:
    for seed in range(5):
        d = torch.randn(pairs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
        test = stats.permutation_test((d.numpy(),), lambda x: x.mean(), permutation_type="samples", n_resamples=2**12)
        assert significance.sign_flips(d[:, None], torch.zeros(1)) == pytest.approx(test.pvalue)


def test_sign_flips_are_exact_for_several_columns() -> None:
    """Of all choices of signs, a share of p has a p as small; units and columns of zeros change nothing."""
    d = torch.randn(7, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    d[:, 1] = d[:, 0] + 0.1 * d[:, 1]
    signs = torch.tensor(list(itertools.product([1.0, -1.0], repeat=7)), dtype=torch.float64)
    found = torch.tensor([significance.sign_flips(s[:, None] * d, torch.zeros(3)) for s in signs])
    for p in found:
        assert (found <= p + 1e-9).float().mean() == pytest.approx(p.item())
    units = torch.tensor([1e9, 1.0, 1e-9])
    p = significance.sign_flips(torch.cat([d * units, torch.zeros(7, 2)], 1), torch.zeros(5))
    assert p == significance.sign_flips(d, torch.zeros(3))


def test_sign_flips_at_the_ends() -> None:
    one, none = torch.full((10, 4), 0.1, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    assert significance.sign_flips(one, none) == 2 / 2**10
    assert significance.sign_flips(0 * one, none) == 1
    assert significance.sign_flips(math.nan * one, none) == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_sign_flips_allow_what_no_one_minds(sign) -> None:
    d = sign * (1 + 0.01 * torch.randn(10, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    for allowed, p in ((0.5, 2 / 2**10), (0.9, 2 / 2**10), (1.1, 1), (100, 1)):
        assert significance.sign_flips(d, torch.tensor([allowed], dtype=torch.float64)) == p


# --- convergence ----------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A whole run of the script, and what its verdict was made from."""

    passed: bool
    folder: Path
    args: Any
    runs: list[Any]


@functools.cache
def few_digits(size: int = 8) -> Any:
    """Three batches to train on."""
    data = images.real_digits(size)
    train, test = (part._replace(pixels=part.pixels[:48], labels=part.labels[:48]) for part in data[1:])
    return images.Dataset(data.name, train, test)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Any:
    folder, runs = tmp_path_factory.mktemp("convergence"), []
    options = ("--quick", "--seeds", "10", "--epochs", "2", "--batch", "16", "--processes", "1", "--size", "9")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convergence, "real_digits", few_digits)
        train = convergence.train
        patch.setattr(convergence, "train", lambda *job: runs.append(train(*job)) or runs[-1])
        passed = call(convergence, folder, *options)
        yield Trained(passed, folder, convergence.parse([*options, "--device", "cpu"]), [*itertools.chain(*runs)])


def test_a_faithful_network_passes_and_the_files_say_how(trained) -> None:
    assert trained.passed is True
    rows = rows_of(trained.folder / "convergence.csv")
    keys = {(row["precision"], row["kind"], row["seed"], row["epoch"]) for row in rows}
    assert keys == set(itertools.product(("fp32", "bf16"), convergence.KINDS, map(str, range(10)), "12"))
    assert_picture(trained.folder / "convergence.png")
    document = json.loads((trained.folder / "convergence.json").read_text())
    assert document["machine"]["torch"] == torch.__version__
    assert document["machine"]["name"]
    assert (document["fused"], document["backend"], document["fallbacks"]) == ("3 of 3", "auto", [])
    assert document["backends"]["conv3x3_bprop"] == "aten"
    assert "scaled to 9x9" in document["data"]
    for precision, found in document["precisions"].items():
        last = {
            (row["kind"], row["seed"]): float(row["train_loss"])
            for row in rows
            if (row["precision"], row["epoch"]) == (precision, "2")
        }
        paired = [last["fused", str(seed)] - last["eager", str(seed)] for seed in range(10)]
        told = found["runs"]["fused"]["train_loss"]
        assert told["mean"] == pytest.approx(sum(v for (kind, _), v in last.items() if kind == "fused") / 10)
        assert told["minus_eager"] == pytest.approx(sum(paired) / 10, rel=1e-6)
        assert told["error"] == pytest.approx(stats.sem(paired))
        assert found["passed"]
        assert 0.5 < found["off fp64, times eager"]["median"] < 1.5


def test_deviations_are_those_from_fp64(trained) -> None:
    for precision, least, most in (("fp32", 1e-8, 1e-5), ("bf16", 1e-4, 0.1)):
        for kind in convergence.KINDS:
            found = [run.away["logits"] for run in trained.runs if (run.precision, run.kind) == (precision, kind)]
            assert len(found) == 10
            assert least < median(found) < most, kind
    t = torch.tensor([3.0, -4.0], dtype=torch.float64)
    assert convergence._away(t + torch.tensor([0.5, 0]), t) == pytest.approx(0.1)
    assert convergence._away(t * math.nan, t) == math.inf
    assert (convergence._away(0 * t, 0 * t), convergence._away(t, 0 * t) > 1e6) == (0, True)


def momentum(network: nn.Module) -> None:
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.101


def scaled(which: str, factor: float, after: int = 0) -> Callable[[nn.Module], None]:
    """Gradients of the parameters whose names end in ``which``, from the update behind number ``after`` on."""

    def change(network: nn.Module) -> None:
        for name, parameter in network.named_parameters():
            if name.endswith(which):
                updates = itertools.count()
                parameter.register_hook(lambda grad, u=updates: grad * (factor if next(u) >= after else 1))

    return change


def biased_variance(patch: pytest.MonkeyPatch) -> None:
    finalize = ops.batch_norm.finalize

    def change(tiles, *args):
        norm, var = finalize(tiles, *args)
        count = tiles.counts.sum()
        return norm, var * (count - 1) / count

    patch.setattr(ops.batch_norm, "finalize", change)


WRONG = {
    "momentum": (momentum, "bf16", "start"),
    "gamma's gradient": (scaled("bn2.weight", 1.02), "fp32", "start"),
    "one gradient": (scaled("layer2.0.conv1.weight", 1.001), "fp32", "start"),
    "biased variance": (biased_variance, "fp32", "start"),
    "later": (scaled("weight", 0.9, after=1), "fp32", "training"),
    "later in bf16": (scaled("weight", 0.9, after=1), "bf16", "training"),
}


@pytest.fixture(scope="module")
def truth(trained) -> Any:
    """The first update in fp64, by seed."""
    trainers = {seed: convergence._trainer("fp64", "eager", seed, trained.args, "cpu") for seed in range(10)}
    return {seed: convergence._first_update(trainer) for seed, trainer in trainers.items()}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_network_fails(name, trained, truth, monkeypatch) -> None:
    change, precision, expected = WRONG[name]
    network = convergence.network

    def changed(kind: str, *options: Any) -> nn.Module:
        made = network(kind, *options)
        if change is not biased_variance:
            change(made)
        return made

    if change is biased_variance:
        biased_variance(monkeypatch)
    monkeypatch.setattr(convergence, "network", changed)
    fused = [convergence._train(precision, "fused", seed, truth[seed], trained.args, "cpu") for seed in range(10)]
    eager = [run for run in trained.runs if run.precision == precision and run.kind != "fused"]
    found = convergence.judge(fused + eager, trained.args.epochs)
    assert not found["passed"]
    assert next(test for test, p in found["p"].items() if p < significance.LEVEL) == expected


@pytest.mark.parametrize(("fused", "p"), [(3.9, 1.0), (4.1, 2 / math.comb(20, 10))])
def test_the_first_update_may_be_twice_as_far_off_as_the_worse_layout(fused, p) -> None:
    """Two tensors, one of them beyond: p is that of all 10 seeds being the larger ones, times two."""
    of_kind = {"eager": 1.0, "eager NCHW": 2.0, "fused": fused}
    own = {
        kind: [convergence.Run("fp32", kind, i, {"x": x * (1 + i / 1e3), "y": 1.0}, [], []) for i in range(10)]
        for kind, x in of_kind.items()
    }
    found, ratios = convergence._start(own)
    assert found == pytest.approx(p)
    assert ratios == pytest.approx({"x": fused / 2, "y": 1})


def test_a_fused_network_that_diverges_fails(trained) -> None:
    runs = [run for run in trained.runs if run.precision == "fp32"]
    last = next(i for i, run in enumerate(runs) if run.kind == "fused")
    runs[last] = runs[last]._replace(rows=[runs[last].rows[0] | {"train_loss": math.nan}])
    found = convergence.judge(runs, trained.args.epochs)
    assert (found["passed"], found["p"]["training"]) == (False, 0)
    assert json.loads(json.dumps(finite(found), allow_nan=False))["runs"]["fused"]["train_loss"]["mean"] == "nan"


def test_the_exit_code_of_convergence_is_that_of_the_verdict(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["convergence.py"])
    for passed, code in ((True, 0), (False, 1), (None, 0)):
        assert common.launch(lambda args, out, passed=passed: passed, None) == code


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--seeds", "9"), "argument --seeds: invalid choice: 9"),
        (("--seeds", "17"), "argument --seeds: invalid choice: 17"),
        (("--size", "7"), "argument --size: expected an integer of at least 8, got '7'"),
        (("--depth", "9"), "expected depth to be 6n + 2"),
        (("--depth", "0"), "expected depth to be at least 8, got 0"),
        (("--bottleneck", "--depth", "8"), "expected depth to be at least 11, got 8"),
        (("--batch", "1348"), "training images, got 1348"),
        (("--device", "tpu"), "argument --device: expected cpu, cuda or cuda:N, got 'tpu'"),
        (("--rate", "0"), "argument --rate: expected a rate above 0, got '0'"),
    ],
)
def test_wrong_options_of_convergence(arguments, expected, tmp_path, monkeypatch, capsys) -> None:
    """Before anything is trained."""
    monkeypatch.setattr(common, "parallel", None)
    monkeypatch.setattr(sys, "argv", ["convergence.py"])
    try:
        code = common.launch(
            convergence.run, convergence.parse(["--out", str(tmp_path), "--device", "cpu", *arguments])
        )
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert expected in capsys.readouterr().err
