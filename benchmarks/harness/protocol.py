"""How the implementations of one case are measured, together.

1. Each is built and its result verified: a wrong result has no time.
2. Each runs until ``warm_s`` have passed, at least twice.
3. Rounds: every round calls each implementation once, in rotating order, so that a slow moment or a hot chip falls on
   all of them. On a GPU a buffer larger than the L2 is written before every call, and the time is that between two
   events. For kernels the device is kept busy meanwhile until the host has enqueued the whole call: the time is the
   device's alone. For blocks and networks the host's gaps count, as they do for users; ``+graph`` has none.
"""

from __future__ import annotations

import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from harness import verify
from resnet_fused.cli import timing
from resnet_fused.cli.ceilings import Rates
from resnet_fused.traffic import Traffic

FUSED = "fused"
LESS_MEMORY = {"fused_projections": "projections", "fused_recompute": "recompute"}  # as `fuse` takes it, in training
GRAPH = "+graph"
_HOST_CALLS = 5  # of which the median is the host's time of a call
_FLUSH_BYTES = 256 * 2**20  # beyond the L2 of any GPU so far
_LEAD = 1.5  # how many times the host's time the device is kept busy before a kernel is timed
_MOST_PASSES = 64


class Unavailable(Exception):
    """An implementation that cannot run a case; the text says why."""


class WrongResult(Exception):
    """An implementation whose result is beyond its bound; the text says by how much."""


class Prepared(NamedTuple):
    """One implementation of one case, ready to run."""

    call: timing.Call
    read: Callable[[Any], dict[str, Tensor]]  # what call returned, by name, for the comparison with fp64
    config: str | None = None  # what it chose to run
    samples: tuple[float, ...] = ()  # seconds, where it timed itself in a process of its own


class Bench(Protocol):
    """The operands of a case on a device."""

    floor: float  # see verify.check
    worst: float  # likewise
    device_only: bool  # whether the host's time is left out

    def exact(self) -> dict[str, Tensor]:
        """The results in fp64."""

    def prepare(self, impl: str) -> Prepared:
        """Build ``impl``.

        Raises:
            Unavailable: it cannot run this case here.
        """


class Case(Protocol):
    """One thing to measure, described before anything is built."""

    id: str
    impls: tuple[str, ...]
    dtype: torch.dtype
    smoke: bool  # small enough for a CPU and for every run of the tests
    headline: bool  # one of those to measure first
    info: dict[str, Any]  # those of rows.KEYS that are known beforehand
    traffic: Traffic  # the least that has to be moved and computed; may take a moment

    def open(self, device: torch.device) -> Bench:
        """Make the operands."""

    def bound_s(self, rates: Rates) -> float:
        """The least time that memory and arithmetic at ``rates`` allow."""


@dataclass
class Result:
    """What one implementation gave in one case."""

    unmeasured: str | None = None  # why it has no time
    failure: str | None = None  # the traceback: the fused implementation must run and be right, else its row fails
    samples: tuple[float, ...] = ()  # seconds; empty if it was not timed
    error: float | None = None  # relative, against fp64
    error_torch: float | None = None
    peak_bytes: int | None = None
    host_s: float | None = None
    config: str | None = None


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    device: torch.device
    timed: bool = True  # False: verify and call each implementation once
    min_rounds: int = 5
    max_s: float = 1.0  # of one implementation's rounds, unless min_rounds take longer
    warm_s: float = 0.05

    def rounds(self, slowest: float) -> int:
        return max(self.min_rounds, min(100, int(self.max_s / max(slowest, 1e-9))))


def measure(
    case: Case, impls: Iterable[str], settings: Settings, clock: timing.Clock = timing.clock
) -> dict[str, Result]:
    """Verify and time ``impls`` of ``case``; every one of them has a result."""
    impls = tuple(impls)
    kept, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        return _measure(case, impls, settings, clock)
    except Exception as error:  # no memory for the operands, say: measured again for every row it would fail again
        return {impl: _failed(impl, error) for impl in impls}
    finally:
        torch.backends.cudnn.benchmark = kept


def _measure(case: Case, impls: tuple[str, ...], settings: Settings, clock: timing.Clock) -> dict[str, Result]:
    bench = case.open(settings.device)
    judge = _Judge(bench)
    ready: dict[str, Prepared] = {}
    results: dict[str, Result] = {}
    for impl in impls:
        ready_one, results[impl] = _verified(bench, impl, judge)
        if ready_one is not None:
            ready[impl] = ready_one
    for impl, prepared in ready.items():
        results[impl].config = prepared.config
        results[impl].samples = prepared.samples
    del judge  # and with it all that was compared
    if settings.timed:
        _time({impl: p for impl, p in ready.items() if not p.samples}, bench, results, settings, clock)
    return results


@dataclass
class _Judge:
    """Compares results with fp64 and with eager PyTorch's, both computed when first asked for."""

    bench: Bench
    _known: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def _exact(self) -> dict[str, Tensor]:
        if "exact" not in self._known:
            self._known["exact"] = self.bench.exact()
        return self._known["exact"]

    def _eager(self) -> dict[str, Tensor]:
        if "eager" not in self._known:
            try:
                eager = self.bench.prepare("eager")
                self._known["eager"] = _copied(eager.read(eager.call()))
            except Unavailable:
                self._known["eager"] = {}
        return self._known["eager"]

    def check(self, impl: str, prepared: Prepared) -> tuple[float, float]:
        """(error, PyTorch's error) of one call.

        Raises:
            WrongResult: the error is beyond the bound.
        """
        found = _copied(prepared.read(prepared.call()))
        if impl == "eager":
            self._known["eager"] = found
        try:
            return verify.check(found, self._exact(), self._eager(), self.bench.floor, self.bench.worst)
        except verify.Beyond as error:
            raise WrongResult(str(error)) from None


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compiled and captured calls reuse their memory."""
    return {name: t.detach().clone() for name, t in tensors.items()}


def _verified(bench: Bench, impl: str, judge: _Judge) -> tuple[Prepared | None, Result]:
    try:
        prepared = bench.prepare(impl)
        error, error_torch = judge.check(impl, prepared)
        return prepared, Result(error=error, error_torch=error_torch)
    except Unavailable as error:
        return None, Result(unmeasured=str(error))
    except Exception as error:
        return None, _failed(impl, error)


def _failed(impl: str, error: Exception) -> Result:
    # As text: the frames of a traceback would keep the operands on the device.
    fails = impl.removesuffix(GRAPH) in (FUSED, *LESS_MEMORY)
    return Result(first_line(error), "".join(traceback.format_exception(error)) if fails else None)


def first_line(error: Exception) -> str:
    """``Type: text`` in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no text'}"[:300]


# --- timing -----------------------------------------------------------------------------------------------------------


def _time(
    ready: dict[str, Prepared],
    bench: Bench,
    results: dict[str, Result],
    settings: Settings,
    clock: timing.Clock,
) -> None:
    if not ready:
        return
    device, calls = settings.device, {impl: prepared.call for impl, prepared in ready.items()}
    slowest = max(_warm_up(call, device, settings.warm_s) for call in calls.values())
    for impl, call in calls.items():
        results[impl].peak_bytes = None if impl.endswith(GRAPH) else timing.peak_memory(call, device)
        results[impl].host_s = _host_time(call, device)
    before = None
    if device.type == "cuda":
        hosts = [result.host_s for result in results.values() if result.host_s]
        before = ColdCache(device, lead_s=_LEAD * max(hosts) if bench.device_only else 0.0)
    times = timing.interleave(calls, settings.rounds(slowest), device, before=before, clock=clock)
    for impl, measured in times.items():
        results[impl].samples = measured.samples


def _warm_up(call: timing.Call, device: torch.device, seconds: float) -> float:
    """Call until ``seconds`` have passed, at least twice; the wall time of the last call."""
    end, calls, last = time.perf_counter() + seconds, 0, 0.0
    while calls < 2 or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        timing.synchronize(device)
        last, calls = time.perf_counter() - begin, calls + 1
    return last


def _host_time(call: timing.Call, device: torch.device) -> float | None:
    """Seconds in which the host enqueues a call on an idle GPU; None on the CPU, which does the work itself."""
    if device.type != "cuda":
        return None
    found = []
    for _ in range(_HOST_CALLS):
        timing.synchronize(device)
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    timing.synchronize(device)
    return statistics.median(found)


class ColdCache:
    """Puts everything out of the L2 by writing over a larger buffer, for at least ``lead_s`` seconds."""

    def __init__(self, device: torch.device, lead_s: float = 0.0) -> None:
        self._buffer = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
        self.passes = 1
        if lead_s:
            one = min(timing.clock(self._buffer.zero_, device) for _ in range(3))
            self.passes = passes_for(lead_s, one)

    def __call__(self) -> None:
        for _ in range(self.passes):
            self._buffer.zero_()


def passes_for(lead_s: float, pass_s: float) -> int:
    """How many passes of ``pass_s`` seconds last ``lead_s``, at least one."""
    return max(1, min(_MOST_PASSES, math.ceil(lead_s / pass_s)))
