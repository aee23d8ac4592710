"""Which backend runs an op: the registry, the choice, and how it is made visible.

An implementation joins with :func:`register`. One predicate, ``unsupported_reason(*args) -> str | None``, serves the
choice, the error text of a forced backend, the log line of a fallback and the skips of tests.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from resnet_fused import config

logger = logging.getLogger("resnet_fused")
fallbacks: Counter[tuple[str, str]] = Counter()
"""How often an op or block did not take its fused path, by (name, reason); an op that a plan repeats is not asked."""
SLOWER = "another backend was measured to be faster on this GPU"


@dataclass(frozen=True)
class Implementation:
    """One backend's code for one op."""

    backend: str
    run: Callable[..., Any]
    unsupported_reason: Callable[..., str | None]
    default: bool  # False: runs only when forced (no GPU has proved it yet)
    bind: Callable[..., Callable[..., Any] | None] | None  # like run, but returns a function of the activations alone
    consume: Callable[..., Any] | None  # like run, but may write over the gradients among its arguments
    preferred: Callable[..., bool] | None  # False: a later backend was measured to be faster on these arguments
    candidates: Callable[..., tuple[Any, ...]] | None  # the configurations that these arguments leave to choose from


_table: dict[str, dict[str, Implementation]] = {}
_forced: ContextVar[str | None] = ContextVar("resnet_fused_backend", default=None)


def always(*args: Any) -> None:
    """The predicate of an implementation that supports everything its op's checks let through."""
    return None


def register(
    op: str,
    backend: str,
    run: Callable[..., Any],
    unsupported_reason: Callable[..., str | None] = always,
    *,
    default: bool = True,
    bind: Callable[..., Callable[..., Any] | None] | None = None,
    consume: Callable[..., Any] | None = None,
    preferred: Callable[..., bool] | None = None,
    candidates: Callable[..., tuple[Any, ...]] | None = None,
) -> None:
    """Add ``backend``'s implementation of ``op``; see :class:`Implementation`."""
    if backend not in config.BACKENDS:
        raise ValueError(f"register: expected one of {', '.join(config.BACKENDS)}, got {backend!r}")
    found = Implementation(backend, run, unsupported_reason, default, bind, consume, preferred, candidates)
    _table.setdefault(op, {})[backend] = found


def implementations(op: str) -> dict[str, Implementation]:
    """The registered implementations of ``op``, by backend."""
    return _table.get(op, {})


def operations() -> list[str]:
    """Names of all ops that have an implementation."""
    return sorted(_table)


def forced() -> str:
    """The backend in force: of the innermost :func:`use_backend`, else of ``RESNET_FUSED_BACKEND``, else ``"auto"``."""
    return _forced.get() or config.backend()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend on every op within the context; ``"auto"`` restores the choice.

    Of several, with commas between them, an op takes the first that supports its arguments, or one behind that if the
    tables say it is faster. Kernels that no GPU has proved take part.

    Raises:
        ValueError: ``name`` is no backend.
    """
    token = _forced.set(config.check_backend(name, "use_backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def unavailable(op: str, backend: str, *args: Any) -> str | None:
    """Why ``backend`` cannot run ``op`` on these arguments; None if it can."""
    found = _table.get(op, {}).get(backend)
    if found is None:
        return f"no {backend} implementation is registered"
    return found.unsupported_reason(*args)


def choose(op: str, *args: Any) -> Implementation:
    """The implementation that runs ``op`` on these arguments.

    Raises:
        NotImplementedError: the forced backend cannot run them; the text says why.
    """
    name = forced()
    if name in config.BACKENDS:
        reason = unavailable(op, name, *args)
        if reason is not None:
            raise NotImplementedError(
                f"{op}: expected arguments that the forced backend {name} supports, got: {reason}"
            )
        return _table[op][name]
    slower: Implementation | None = None  # supports the arguments, where what is faster there is not asked for
    for found in _in_order(op, name):
        reason = found.unsupported_reason(*args)
        if reason is None:
            if found.preferred is None or found.preferred(*args):
                return found
            slower, reason = slower or found, SLOWER
        note_fallback(f"{op}[{found.backend}]", reason, level=logging.DEBUG)
    if slower is not None:
        return slower
    asked = "some backend" if name == "auto" else f"one of the forced backends {name}"
    raise NotImplementedError(f"{op}: expected arguments that {asked} supports, got none that does")


def _in_order(op: str, name: str) -> list[Implementation]:
    """What may run ``op`` under the forced ``name``, best first."""
    names = config.BACKENDS if name == "auto" else name.split(",")
    found = (_table.get(op, {}).get(backend) for backend in names)
    return [f for f in found if f is not None and (f.default or name != "auto")]


def expected(op: str, device: torch.device, name: str = "auto") -> str:
    """The backend that ``op`` tries first on ``device`` with ``name`` forced; ``"none"`` where none of it can run."""
    if name in config.BACKENDS:
        return name
    on_gpu = device.type == "cuda"
    able = (f.backend for f in _in_order(op, name) if on_gpu or f.backend not in ("cuda", "triton"))
    return next(able, "none")


def note_fallback(name: str, reason: str, *, level: int = logging.INFO) -> None:
    """Count a fallback and log it the first time."""
    fallbacks[name, reason] += 1
    if fallbacks[name, reason] == 1:
        logger.log(level, "%s: %s; running the next choice instead", name, reason)
