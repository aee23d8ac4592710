"""The choice of a configuration, and of another backend where one was measured to be faster."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from resnet_fused import plans
from resnet_fused.tuning import tables
from resnet_fused.tuning.configs import Config, runs_on

Problem = tuple[Any, ...]  # a NamedTuple of numbers, booleans and short strings: what a configuration is chosen for
_C = TypeVar("_C", bound=Config)
Candidates = Callable[[Any], tuple[Config, ...]]

_forced: ContextVar[dict[str, Config]] = ContextVar("resnet_fused_configs", default={})  # noqa: B039 (never written to)


def choose(op: str, problem: Problem, device: torch.device, candidates: Candidates) -> Config:
    """The configuration of ``op`` for ``problem``: forced, else the table's of this GPU, else the first candidate.

    Candidates that ``device`` cannot run do not count. Nothing is measured.
    """
    forced = _forced.get().get(op)
    return forced if forced is not None else _chosen(op, problem, device, candidates)


def asked(op: str, problem: Problem, device: torch.device, kind: type[_C]) -> _C | None:
    """The configuration of ``kind`` that is forced on ``op``, else the table's; None where there is none."""
    forced = _forced.get().get(op)
    found = forced if isinstance(forced, kind) else _tabled(op, problem, device)
    return found if isinstance(found, kind) else None


@functools.cache
def _tabled(op: str, problem: Problem, device: torch.device) -> Config | None:
    entry = tables.of_device(device).find(op, problem)
    return None if entry is None else entry.config


@functools.cache
def _chosen(op: str, problem: Problem, device: torch.device, candidates: Candidates) -> Config:
    possible = fitting(candidates(problem), device)
    entry = tables.of_device(device).find(op, problem)
    # A configuration that the kernel no longer offers was measured with another kernel.
    return entry.config if entry is not None and entry.config in possible else possible[0]


def fitting(candidates: tuple[Config, ...], device: torch.device) -> tuple[Config, ...]:
    """Those of ``candidates`` that ``device`` can run; if none, the one that needs least shared memory."""
    limits = _limits(device)
    return tuple(c for c in candidates if runs_on(c, *limits)) or (min(candidates, key=lambda c: c.shared),)


@functools.cache
def _limits(device: torch.device) -> tuple[int, float]:
    """Compute capability, and KiB of shared memory of a program; none where nothing is launched."""
    if device.type != "cuda":
        return 90, float("inf")
    known: Any = torch.cuda.get_device_properties(device)
    return 10 * known.major + known.minor, known.shared_memory_per_block_optin / 1024


def loses(op: str, problem: Problem, device: torch.device, backend: str = "triton") -> bool:
    """Whether the table of this GPU has a later backend ahead of ``backend`` for ``problem``."""
    return contested(op, device, backend) and _loses(op, problem, device, backend)


@functools.cache
def contested(op: str, device: torch.device, backend: str = "triton") -> bool:
    """Whether the table of this GPU has a later backend ahead for any problem of ``op``."""
    return op in tables.of_device(device).lost(backend)


@functools.cache
def _loses(op: str, problem: Problem, device: torch.device, backend: str) -> bool:
    entry = tables.of_device(device).find(op, problem)
    return entry is not None and tables.overtakes(entry.backend, backend)


@contextlib.contextmanager
def measured(table: tables.Table) -> Iterator[None]:
    """Within it ``table`` is the table of every device."""
    token = tables.in_force.set(table)
    _forget()
    try:
        with plans.suspended():
            yield
    finally:
        tables.in_force.reset(token)
        _forget()


def _forget() -> None:
    for function in (_chosen, _tabled, contested, _loses):
        function.cache_clear()


@contextlib.contextmanager
def use(op: str, config: Config) -> Iterator[None]:
    """Within it ``op`` takes ``config`` whatever the problem."""
    token = _forced.set({**_forced.get(), op: config})
    try:
        with plans.suspended():
            yield
    finally:
        _forced.reset(token)
