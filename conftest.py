"""The option ``--benchmark``: with it benchmarks/ are timed and tests/ left out; without it small cases run once each.

``tests/cases.py`` and the harness are importable from both folders. A test that breaks the GPU's context ends its
process, where pytest-xdist starts another.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent
TESTS = ROOT / "tests"

sys.path[:0] = [str(ROOT / "benchmarks"), str(TESTS)]

# tests/conftest.py, which pytest imports whatever is run, sets its own: benchmarks run as PyTorch comes.
_THREADS, _TF32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise ValueError(text)
    return value


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark",
        action="store_true",
        help="time benchmarks/ and leave out tests/; without it small cases run once each, untimed",
    )
    parser.addoption(
        "--benchmark-budget",
        type=_seconds,
        metavar="SECONDS",
        help="start no further case after so many seconds; its rows are skipped and say so",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark"):
        torch.set_num_threads(_THREADS)
        torch.backends.cudnn.allow_tf32 = _TF32
    else:
        config.option.benchmark_disable = True


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # Folders named on the command line or in testpaths are collected whatever is said here; the files in them are not.
    if config.getoption("--benchmark") and TESTS in collection_path.parents:
        return True
    return None


# --- a broken GPU -----------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """After an illegal access every CUDA call of the process fails: later tests would be blamed for it."""
    if call.excinfo is not None and "PYTEST_XDIST_WORKER" in os.environ and _device_is_lost():
        reason = call.excinfo.exconly().splitlines()[0]
        print(f"breaks the device: {item.nodeid}: {reason}", file=sys.__stderr__, flush=True)
        os._exit(1)


def _device_is_lost() -> bool:
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
