"""Rows of pytest-benchmark from the harness: one measurement a case, whose implementations each get their own row."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import plan, rows, session
from harness.protocol import Case, Result, Settings, first_line, measure

from resnet_fused.cli import ceilings

RECORDER = pytest.StashKey[session.Recorder]()


def pytest_configure(config: pytest.Config) -> None:
    for name, text in plan.MARKS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    config.stash[RECORDER] = session.Recorder(config.getoption("--benchmark-budget"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    measured = _rows(items)
    for item in measured:
        item.add_marker(pytest.mark.benchmark(timer=session.TAPE.now))
    others = set(items) - set(measured)
    items[:] = [*(item for item in items if item in others), *sorted(measured, key=plan.order)]


def pytest_collection_finish(session: pytest.Session) -> None:
    for item in _rows(session.items):
        case, impl = item.module.CASES[item.callspec.params["case"]], item.callspec.params["impl"]
        session.config.stash[RECORDER].unmeasured[item.nodeid] = case, impl, "the session ended before"


def _rows(items: list[pytest.Item]) -> list[pytest.Function]:
    return [item for item in items if isinstance(item, pytest.Function) and "row" in item.fixturenames]


@pytest.fixture
def row(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Case, str], None]:
    """``row(case, impl)``: the row of one implementation; the case is measured when its first row is asked for."""
    recorder = request.config.stash[RECORDER]

    def report(case: Case, impl: str) -> None:
        reason = None if case.id in recorder.results else recorder.over()
        if reason is None:
            result = _result(request, recorder, case, impl, timed=benchmark.enabled)
            reason = result.unmeasured
        if reason is None:
            _fill(benchmark, case, impl, result)
            del recorder.unmeasured[request.node.nodeid]
            return
        recorder.unmeasured[request.node.nodeid] = case, impl, reason
        benchmark.skipped = True
        pytest.skip(reason)

    return report


def _result(
    request: pytest.FixtureRequest, recorder: session.Recorder, case: Case, impl: str, *, timed: bool
) -> Result:
    """Measured now or with another row; a row of the fused implementation fails where that is wrong or broken."""
    if case.id not in recorder.results:
        recorder.results[case.id] = _measure(request, case, timed=timed)
    result = recorder.results[case.id][impl]
    if result.failure is not None:
        recorder.unmeasured[request.node.nodeid] = case, impl, str(result.unmeasured)
        pytest.fail(result.failure, pytrace=False)
    return result


def _measure(request: pytest.FixtureRequest, case: Case, *, timed: bool) -> dict[str, Result]:
    """All implementations of ``case`` that this session asks for."""
    options = request.config.option
    if timed:
        session.machine_info()  # while the device is whole: what is wrong with a kernel must not cost the report
    settings = Settings(session.DEVICE, timed, options.benchmark_min_rounds, float(options.benchmark_max_time))
    try:
        return measure(case, _asked(request.session.items, case), settings)
    finally:
        gc.collect()
        if session.DEVICE.type == "cuda":
            _free(request.session, case)


def _free(running: pytest.Session, case: Case) -> None:
    """Give the memory back; after an illegal access nothing more can be measured."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        running.shouldstop = f"{case.id} broke the device: {first_line(error)}"


def _asked(items: list[pytest.Item], case: Case) -> list[str]:
    """In the order of ``case.impls``."""
    chosen = set()
    for item in items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if params.get("case") == case.id:
            chosen.add(params["impl"])
    return [impl for impl in case.impls if impl in chosen]


def _fill(benchmark: Any, case: Case, impl: str, result: Result) -> None:
    if not benchmark.enabled:
        benchmark(lambda: None)
        return
    benchmark.group = f"{case.info['kind']} {case.id}"
    benchmark.extra_info |= rows.measured(case, impl, result, ceilings.rates(session.DEVICE, case.dtype))
    session.TAPE.load(result.samples)
    benchmark.pedantic(session.TAPE.play, setup=session.TAPE.rewind, rounds=len(result.samples))


# --- what the report says beside the rows ---------------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info |= session.machine_info()


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_benchmark_compare_machine_info(machine_info: dict[str, Any], compared_benchmark: dict[str, Any]) -> None:
    session.settle(machine_info, compared_benchmark["machine_info"])


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Beside ``benchmarks`` a list ``unmeasured``: rows that have no time, each with the reason."""
    output_json["unmeasured"] = [
        {"fullname": name, "reason": reason, "extra_info": rows.identity(case, impl)}
        for name, (case, impl, reason) in config.stash[RECORDER].unmeasured.items()
    ]
