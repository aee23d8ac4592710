"""``report``: the files of results, the texts that follow from them, and the comparison of two runs."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from helpers import shell_environment

from resnet_fused import cli
from resnet_fused.cli import report, results

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
GPU = "NVIDIA Test"


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["report", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def row(name: str, median: float, case: str = "one", **info: object) -> dict:
    """A benchmark as pytest-benchmark writes it; all values here are made up."""
    known = {"kind": "network", "model": "resnet50", "mode": "train", "batch": 256, "dtype": "bf16", **info}
    if known["kind"] == "network":
        known["images_per_s"] = known["batch"] / median
    stats = {"min": median * 0.9, "q1": median * 0.95, "median": median, "q3": median * 1.05, "max": median * 2}
    stats |= {"mean": median, "stddev": 0.0, "rounds": 7, "iqr": median * 0.1, "data": [median] * 7}
    return {
        "group": case, "name": name, "fullname": f"benchmarks/bench.py::{name}", "params": None, "param": None,
        "extra_info": known, "options": {"disable_gc": False}, "stats": stats,
    }  # fmt: skip


def document(*rows: dict, gpu: str = GPU) -> dict:
    return {
        "machine_info": {
            "node": "secret", "cpu": {"brand_raw": "CPU", "count": 2, "flags": ["x"] * 9}, "name": gpu, "torch": "2.0",
            "gpu": {"driver_version": "580.1", "clocks.sm": "1980 MHz"}, "peers": {"jax": "not installed"},
            "copy_gb_per_s": 4000.0, "matmul_tflop_per_s": {"bf16": 700.0},
        },
        "unmeasured": [
            {"fullname": f"x{i}", "reason": "jax: not installed", "extra_info": {"impl": "jax"}} for i in range(3)
        ],
        "commit_info": {"id": COMMIT, "time": "2026-01-01", "dirty": False, "branch": "main", "project": "p"},
        "benchmarks": list(rows),
        "datetime": "2026-01-02T03:04:05+00:00",
        "version": "5.0.0",
    }  # fmt: skip


KERNEL = {
    "kind": "kernel", "op": "conv1x1_fprop", "direction": "fprop", "shape": [256, 64, 56, 56], "bytes": 10**9,
    "flops": 10**12, "gb_per_s": 2000.0, "tflop_per_s": 500.0, "bound_fraction": 0.7142, "error": 1e-3,
    "error_torch": 2e-3,
}  # fmt: skip
NETWORKS = (
    row("fused", 0.02, impl="fused", peak_mib=1000.0),
    row("graph", 0.016, impl="fused+graph"),
    row("eager", 0.04, impl="eager", peak_mib=3000.0),
    row("compile", 0.032, impl="compile", peak_mib=2000.0),
    row("tuned", 0.0128, impl="compile_max_autotune+graph"),
)
KERNELS = (row("k", 5e-4, "k", impl="fused", **KERNEL), row("k-eager", 1e-3, "k", impl="eager", **KERNEL))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with a README and one file of results."""
    (tmp_path / "README.md").write_text("before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n")
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "nvidia_test.json").write_text(json.dumps(document(*NETWORKS, *KERNELS)))
    return tmp_path


# --- the texts --------------------------------------------------------------------------------------------------------


def test_committed_texts_follow_from_the_committed_results() -> None:
    """Figures as well, but not to the byte: those are matplotlib's, which may be another version."""
    wanted = report.report(ROOT)
    assert len(wanted) >= 2
    for path, text in wanted.items():
        assert path.exists(), f"{path} is missing; run `python -m resnet_fused report`"
        if path.suffix == ".md":
            assert path.read_text(encoding="utf-8") == text, f"{path}: run `python -m resnet_fused report`"


def test_without_results_the_texts_say_so(root, capsys) -> None:
    (root / "benchmarks" / "results" / "nvidia_test.json").unlink()
    assert call(capsys, "--root", root)[0] == 0
    readme = (root / "README.md").read_text()
    assert readme.startswith("before\n<!-- results:begin -->\nNo results of a GPU are committed yet.")
    assert readme.endswith("<!-- results:end -->\nafter\n")
    assert "No results of a GPU are committed yet." in (root / "docs" / "results.md").read_text()


def test_a_line_for_each_case(tmp_path, capsys) -> None:
    """The fastest of this package's configurations, and of every peer's how many times as long it takes."""
    path = tmp_path / "raw.json"
    path.write_text(json.dumps(document(*NETWORKS, *KERNELS, row("a", 1e-3, "alone", impl="eager"))))
    code, text, _ = call(capsys, "--show", path)
    assert code == 0
    assert text.splitlines() == [
        "one: fused+graph 16,000.0 us, eager 2.50x, compile_max_autotune+graph 0.80x",
        "k: fused 500.0 us, 71% of bound, eager 2.00x",
        "alone: eager 1,000.0 us",
        "not measured: jax (3 rows): jax: not installed",
    ]
    assert call(capsys, "--show", tmp_path / "none.json")[0] == 2


def test_less_memory_is_a_column_of_its_own_and_no_peer(root, capsys) -> None:
    """Here it is the fastest of all: the speed-up takes it neither for a peer nor for the default."""
    less = row("less", 0.011, impl="fused_recompute", peak_mib=500.0)
    (root / "benchmarks" / "results" / "nvidia_test.json").write_text(json.dumps(document(*NETWORKS, less)))
    assert call(capsys, "--root", root)[0] == 0
    lines = [line for line in (root / "docs" / "results.md").read_text().splitlines() if "resnet50" in line]
    assert any(line.endswith("| 0.80 |") for line in lines), lines
    assert any("1,000" in line and "500" in line and "3,000" in line for line in lines), lines
    path = root / "benchmarks" / "results" / "nvidia_test.json"
    assert "fused+graph 16,000.0 us, fused_recompute 0.69x, eager 2.50x" in call(capsys, "--show", path)[1]


def test_written_twice_the_texts_are_the_same(root, capsys) -> None:
    assert call(capsys, "--root", root)[0] == 0
    first = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert {path.name for path in first} >= {"results.md", "nvidia_test-roofline.svg", "nvidia_test-networks.svg"}
    code, text, _ = call(capsys, "--root", root)
    assert code == 0
    assert "nothing has changed" in text
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == first
    assert call(capsys, "--root", root, "--check")[0] == 0


@pytest.mark.parametrize("file", ["README.md", "docs/results.md", "docs/figures/nvidia_test-memory.svg"])
def test_check_finds_an_edit_by_hand(root, capsys, file) -> None:
    call(capsys, "--root", root)
    path = root / file
    path.write_text(path.read_text().replace("2", "3").replace("<!-- results:begin -->", "<!-- results:begin -->\nx"))
    code, _, error = call(capsys, "--root", root, "--check")
    assert code == 1
    assert str(path) in error


def test_figures_of_results_that_are_gone_are_removed(root, capsys) -> None:
    call(capsys, "--root", root)
    (root / "benchmarks" / "results" / "nvidia_test.json").unlink()
    assert call(capsys, "--root", root, "--check")[0] == 1
    call(capsys, "--root", root)
    assert not list((root / "docs" / "figures").iterdir())


def test_the_fastest_configuration_of_each_peer_counts(root, capsys) -> None:
    call(capsys, "--root", root)
    readme = (root / "README.md").read_text()
    # 256 images in 16, 40 and 12.8 ms; this package's best against the best of the others: a loss, told as one.
    line = (
        "| resnet50 | train | bf16 | 256 | 16,000 (fused+graph) | 6,400 | 20,000 (compile_max_autotune+graph) | 0.80 |"
    )
    assert line in readme
    assert "| model | mode | dtype | batch | fused | eager | compile | speed-up |" in readme
    head = f"**{GPU}**, batch 256, bf16, images/s of the fastest configurations"
    assert f"{head}; measured at `{COMMIT[:10]}` on 2026-01-02:" in readme
    assert f"](docs/figures/{next((root / 'docs' / 'figures').glob('*-networks.svg')).name})" in readme


def test_the_page_has_machine_memory_kernels_and_what_was_not_measured(root, capsys) -> None:
    call(capsys, "--root", root)
    page = (root / "docs" / "results.md").read_text()
    assert "| copy, read and written | 4,000 GB/s |" in page
    assert "| matrix product, bf16 | 700 TFLOP/s |" in page
    assert "| driver | 580.1 |" in page
    assert "| jax | not installed |" in page
    assert "- jax (3 rows): jax: not installed" in page
    assert "| resnet50 | train | bf16 | 256 | 1,000 | 3,000 | 2,000 |" in page
    kernel = "| conv1x1_fprop | fprop | 256x64x56x56 | bf16 | 256 | 500.0 (475.0-525.0) | 2,000 | 500 | 71% "
    assert f"{kernel}| 1.0e-03 (2.0e-03) | 1,000.0 (950.0-1,050.0) | 2.00 |" in page


def test_every_line_of_a_table_has_as_many_cells_as_its_head(root, capsys) -> None:
    call(capsys, "--root", root)
    tables = [block for block in (root / "docs" / "results.md").read_text().split("\n\n") if block.startswith("|")]
    assert len(tables) == 4  # machine, images/s, memory, kernels
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_figures_are_xml_and_name_the_peers(root, capsys) -> None:
    call(capsys, "--root", root)
    for name in ("roofline", "networks", "memory"):
        text = (root / "docs" / "figures" / f"nvidia_test-{name}.svg").read_text()
        ElementTree.fromstring(text)
        assert GPU in text
    assert "compile" in text


def test_a_readme_without_markers_is_refused(root, capsys) -> None:
    (root / "README.md").write_text("nothing")
    code, _, error = call(capsys, "--root", root)
    assert code == 2
    assert "expected a README.md with <!-- results:begin -->" in error


# --- trimming ---------------------------------------------------------------------------------------------------------


def test_what_pytest_benchmark_writes_is_trimmed_and_read(tmp_path, capsys) -> None:
    """The plugin's real file, from a repository of its own."""
    bench = tmp_path / "test_one.py"
    info = "{'impl': 'fused', 'kind': 'kernel'}"
    bench.write_text(f"def test_one(benchmark):\n    benchmark.extra_info |= {info}\n    benchmark(int)\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "test_one.py"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True, capture_output=True)
    raw = tmp_path.parent / f"{tmp_path.name}.json"
    options = ["--benchmark-json", raw, "--benchmark-max-time=0.01", "-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-B", "-m", "pytest", *options]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=shell_environment())
    out = tmp_path / "results" / "gpu.json"
    code, text, error = call(capsys, "--trim", raw, "--out", out)
    assert code == 0, error
    assert "1 rows" in text
    kept = json.loads(out.read_text())
    assert "data" not in kept["benchmarks"][0]["stats"]
    assert out.stat().st_size < raw.stat().st_size / 2
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert kept["commit_info"]["id"] == head.stdout.strip()
    one = results.read(out).rows[0]
    assert one.fused
    assert one.q1 <= one.median <= one.q3
    assert results.trim(out) == out.read_text()


def test_trimming_drops_samples_smoke_checks_and_the_name_of_the_machine(tmp_path) -> None:
    raw = tmp_path / "raw.json"
    small = row("a", 1e-3, impl="fused", model="smoke_basic")
    raw.write_text(json.dumps(document(small, *reversed(KERNELS))))
    text = results.trim(raw)
    assert "secret" not in text
    kept = json.loads(text)
    assert kept["machine_info"]["cpu"] == {"brand_raw": "CPU", "count": 2}
    assert [r["name"] for r in kept["benchmarks"]] == ["k", "k-eager"]
    assert kept["benchmarks"][0]["extra_info"]["tflop_per_s"] == 500.0
    assert len(kept["unmeasured"]) == 3


@pytest.mark.parametrize("commit", [{"id": COMMIT, "dirty": True}, {"id": "unversioned", "dirty": False}, None])
def test_uncommitted_changes_are_not_trimmed_unless_the_commit_is_named(tmp_path, capsys, commit) -> None:
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps({**document(*KERNELS), "commit_info": commit}))
    code, _, error = call(capsys, "--trim", raw, "--out", tmp_path / "x.json")
    assert code == 2
    assert "to be measured at a commit" in error
    assert not (tmp_path / "x.json").exists()
    assert call(capsys, "--trim", raw, "--out", tmp_path / "x.json", "--commit", COMMIT)[0] == 0
    assert json.loads((tmp_path / "x.json").read_text())["commit_info"]["id"] == COMMIT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "expected a file of results"),
        ("{", "to hold JSON"),
        ("[]", "to be written by"),
        ("{}", "to be written by"),
    ],
)
def test_other_files_are_refused(tmp_path, capsys, text, expected) -> None:
    raw = tmp_path / "raw.json"
    if text is not None:
        raw.write_text(text)
    code, _, error = call(capsys, "--trim", raw, "--out", tmp_path / "x.json")
    assert code == 2
    assert expected in error


# --- comparison -------------------------------------------------------------------------------------------------------


def files(tmp_path: Path, *documents: dict) -> list[Path]:
    paths = [tmp_path / f"{i}.json" for i in range(len(documents))]
    for path, content in zip(paths, documents, strict=True):
        path.write_text(json.dumps(content))
    return paths


@pytest.mark.parametrize(("above", "code"), [("5", 1), ("9.9", 1), ("10.1", 0)])
def test_a_regression_beyond_the_percentage_fails(tmp_path, capsys, above, code) -> None:
    old = document(row("a", 1e-3, impl="fused"), row("b", 1e-3, impl="fused"), row("p", 1e-3, impl="eager"))
    new = document(row("a", 1.1e-3, impl="fused"), row("b", 0.5e-3, impl="fused"), row("p", 9e-3, impl="eager"))
    found, text, _ = call(capsys, "--compare", *files(tmp_path, old, new), "--fail-above", above)
    assert found == code
    assert ("benchmarks/bench.py::a: 1000.0 us -> 1100.0 us, +10.0%" in text) is (code == 1)
    assert f"{code} of 2 rows of this package" in text
    assert "::p" not in text  # a slower peer is no regression of this package


def test_rows_that_are_gone_are_listed(tmp_path, capsys) -> None:
    old = document(row("a", 1e-3, impl="fused"), row("b", 1e-3, impl="fused+graph"))
    new = document(row("a", 1e-3, impl="fused"))
    code, text, _ = call(capsys, "--compare", *files(tmp_path, old, new), "--json")
    assert code == 0
    assert json.loads(text)["missing"] == ["benchmarks/bench.py::b"]


def test_other_devices_and_strangers_are_not_compared(tmp_path, capsys) -> None:
    a, b = document(row("a", 1e-3, impl="fused")), document(row("b", 1e-3, impl="fused"))
    code, _, error = call(capsys, "--compare", *files(tmp_path, a, document(gpu="other")))
    assert code == 2
    assert f"expected results of one device, got {GPU} and other" in error
    code, _, error = call(capsys, "--compare", *files(tmp_path, a, b))
    assert code == 2
    assert "to have rows in common" in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--fail-above", "-1"), "expected a percentage of at least 0"),
        (("--trim", "x"), "--trim RAW together with --out FILE"),
        (("--out", "x"), "--trim RAW together with --out FILE"),
    ],
)
def test_wrong_options_are_answered_in_one_line(capsys, arguments, expected) -> None:
    code, _, error = call(capsys, *arguments)
    assert code == 2
    assert expected in error


def test_every_implementation_of_the_goal_belongs_to_a_peer() -> None:
    known = {impl for impls in report.PEERS.values() for impl in impls}
    named = (
        "fused fused_projections fused_recompute eager eager_nchw compile compile_max_autotune cudnn jax onnxruntime"
    )
    assert known == set(named.split())
