"""Every op and direction over the shapes of ResNet-50 and ResNet-18, beside the ATen sequence that it replaces.

On the CPU small shapes alone: the kernels are a GPU's.
"""

from __future__ import annotations

import pytest
from harness import kernels, plan
from harness.session import DEVICE

CASES: dict[str, kernels.KernelCase] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--benchmark") and DEVICE.type == "cuda"
    plan.parametrize(metafunc, [*kernels.smoke(), *(kernels.table() if full else ())], CASES)


def bench_kernel(row, case, impl):
    row(CASES[case], impl)
