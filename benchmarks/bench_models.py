"""Whole networks: a training step with SGD, and inference; images per second and peak memory beside every peer.

``-k "resnet50 and train and bf16 and b256"`` picks one, with all of its peers.
"""

from __future__ import annotations

import pytest
from harness import networks, plan
from harness.session import DEVICE

CASES: dict[str, networks.ModuleCase] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    timed = metafunc.config.getoption("--benchmark")
    cases = networks.smoke_networks(DEVICE, quick=not timed)
    plan.parametrize(metafunc, [*cases, *(networks.networks(DEVICE) if timed else ())], CASES)


def bench_model(row, case, impl):
    row(CASES[case], impl)
