"""Residual blocks, fused and not: a training step's forward and backward, and inference.

``-k "resnet50.layer1.1 and train"`` picks one.
"""

from __future__ import annotations

import pytest
from harness import networks, plan
from harness.session import DEVICE

CASES: dict[str, networks.ModuleCase] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    timed = metafunc.config.getoption("--benchmark")
    cases = networks.smoke_blocks(DEVICE, quick=not timed)
    plan.parametrize(metafunc, [*cases, *(networks.blocks(DEVICE) if timed else ())], CASES)


def bench_block(row, case, impl):
    row(CASES[case], impl)
