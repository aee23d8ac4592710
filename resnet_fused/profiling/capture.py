"""One step of a model, warmed up, in ranges: what every profiler looks at."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import resnet_fused
from resnet_fused.cli import bench, machine, models, timing
from resnet_fused.cli.ceilings import Rates, rates
from resnet_fused.cli.output import UsageError
from resnet_fused.profiling import blocks
from resnet_fused.profiling.ranges import Call, Range, ranged

TARGET_SAYS = "resnet_fused.profiling: "
"""In front of what the profiled process has against its input."""
_WARM_UP = 3  # steps before anything is looked at
_SEEDING = 8  # images from which the batch norms of a model get their values, on the CPU
_TIMED = 5  # steps of which the median is the step's time


class Job(NamedTuple):
    """What is profiled."""

    model: str  # as on the command line
    mode: str  # train, infer
    batch: int
    size: int
    dtype: str
    device: str
    backend: str
    seed: int


def target(calls: Path, job: Job, block: str | None) -> list[str]:
    """The command line of the process that ncu and nsys look at; it writes its :class:`Capture` to ``calls``."""
    return [sys.executable, "-m", "resnet_fused.profiling", str(calls), json.dumps([*job, block])]


def parse_arguments(arguments: list[str]) -> tuple[Path, Job, str | None]:
    """The inverse of :func:`target`."""
    calls, values = arguments
    *job, block = json.loads(values)
    return Path(calls), Job(*job), block


@dataclass(frozen=True)
class Capture:
    """What is known of a captured step besides the profiler's own results."""

    job: Job
    machine: dict[str, Any]
    step_s: float  # of a step without profiler, host included
    rates: Rates
    calls: tuple[Call, ...]

    def write(self, path: Path) -> None:
        known = {
            "job": self.job._asdict(),
            "machine": self.machine,
            "step_s": self.step_s,
            "rates": self.rates._asdict(),
            "calls": [call.to_dict() for call in self.calls],
        }
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Capture:
        known = json.loads(path.read_text(encoding="utf-8"))
        calls = tuple(Call.from_dict(call) for call in known["calls"])
        return Capture(Job(**known["job"]), known["machine"], known["step_s"], Rates(**known["rates"]), calls)


def capture(job: Job, block: str | None, make: Range, profiler: Callable[[], AbstractContextManager[Any]]) -> Capture:
    """Build and warm up the model, then run one step in ranges within ``profiler()``.

    Raises:
        UsageError: the model or the block does not exist.
    """
    device, dtype = machine.device(job.device), machine.DTYPES[job.dtype]
    loaded = models.load(job.model, seed=job.seed, batch=min(job.batch, _SEEDING), size=job.size)
    model = resnet_fused.fuse(loaded.model.to(device).to(memory_format=torch.channels_last), backend=job.backend)
    models.wants_blocks(job.model, model)
    _check_block(model, block)
    x = models.images(job.batch, job.size, job.seed).to(device, memory_format=torch.channels_last)
    labels = torch.arange(job.batch, device=device)
    step = bench.step(model, x, labels, bench.Setting(job.mode, dtype, device))
    ceilings = rates(device, dtype)
    with _searching():
        for _ in range(_WARM_UP):
            step()
        times = timing.interleave({"step": step}, _TIMED, device)["step"]
        with ranged(model, make) as calls:
            step()  # binds what inference binds
            timing.synchronize(device)
            calls.clear()
            with profiler():
                step()
                timing.synchronize(device)
            found = tuple(calls)
    return Capture(job, machine.describe(device), times.median, ceilings, found)


def _check_block(model: nn.Module, block: str | None) -> None:
    known = blocks.modules(model)
    if block is not None and block not in known:
        raise UsageError(f"argument --block: expected one of {', '.join(known)}, got {block!r}")


@contextlib.contextmanager
def _searching() -> Iterator[None]:
    """cuDNN's own search for the fastest kernels, on."""
    kept = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = kept


@contextlib.contextmanager
def cuda_profiler() -> Iterator[None]:
    """The region that ncu and nsys capture."""
    torch.cuda.cudart().cudaProfilerStart()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStop()
