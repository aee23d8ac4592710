"""The `--benchmark` option: with it benchmarks/ are timed and tests/ left out, without it every benchmark runs once."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent / "tests"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark",
        action="store_true",
        help="time benchmarks/ and leave out tests/; without it every benchmark runs once, untimed",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--benchmark"):
        config.option.benchmark_disable = True


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    # Folders named on the command line or in testpaths are collected whatever is said here; the files in them are not.
    if config.getoption("--benchmark") and TESTS in collection_path.parents:
        return True
    return None
