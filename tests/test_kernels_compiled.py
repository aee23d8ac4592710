"""The Triton kernels as machine code for GPUs that need not be here: all configurations, their memory and registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
TOOL = Path(__file__).parents[1] / "tools" / "compile_kernels.py"
# A program may have so much shared memory; compute capability 8.6 and its like have 99 KiB.
SHARED_KIB = {80: 163, 90: 227, 100: 227}


def compiled(folder: Path, *options: str) -> list[dict[str, Any]]:
    """The rows of tools/compile_kernels.py on the smallest model that has every kernel."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-W", "ignore", TOOL, "--models", "sample", *options, "--json", folder / "rows.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    rows = json.loads((folder / "rows.json").read_text()) if (folder / "rows.json").exists() else []
    broken = [f"sm_{r['target']} {r['op']} {r['kernel']} {r['config']}: {r['broken']}" for r in rows if r["broken"]]
    assert not broken, "\n".join(broken)
    assert done.returncode == 0, done.stderr[-4000:]
    return rows


def check(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["shared"] <= SHARED_KIB[row["target"]] * 1024, row


def test_every_launch_on_sm_90(tmp_path):
    """Training and inference in bf16 at batch 256: no register is spilled, products are wgmma, accesses 16 bytes."""
    rows = compiled(tmp_path, "--targets", "90")
    check(rows)
    products = [row for row in rows if row["product"]]
    assert {row["op"] for row in products} >= {"conv1x1_fprop", "conv1x1_infer", "conv1x1_dgrad"}
    assert all(row["instructions"].get("HGMMA") for row in products)
    walks = [row for row in rows if row["op"].startswith("bn_add_relu")]
    assert all(row["instructions"].get("LDG.E.128") for row in walks)


def test_every_configuration_on_other_gpus(tmp_path):
    rows = compiled(tmp_path, "--targets", "80,100", "--once")
    check(rows)
    assert {row["target"] for row in rows} == {80, 100}


def test_every_configuration_in_fp32_on_odd_sizes(tmp_path):
    rows = compiled(tmp_path, "--targets", "90", "--once", "--dtype", "fp32", "--batch", "3", "--size", "75")
    check(rows)
    assert len(rows) > 20
