"""What inference makes for one CUDA graph, apart from what it keeps.

The graph goes on reading the memory of folded weights, so it is its owner that decides how long they live; and since a
replay runs none of this package's code, the owner is told when what they were made from may have been written to.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn


class Pins:
    """What was made for the graph of ``model``."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = frozenset(model.modules())
        self.made: dict[Hashable, Callable[[Tensor], Tensor]] = {}  # by owner and kind of input
        self.sources: list[Tensor] = []  # what it was made from
        self.complete = False  # whether the graph is being captured: what is made then lies in the graph's own memory
        self.void = False  # whether a source may have been written to without a new version
        with _changing:
            _live.add(self)

    def hold(
        self, owner: nn.Module, sources: Sequence[Tensor | None], kind: Hashable, made: Callable[[Tensor], Tensor]
    ) -> None:
        """Hold what was made for ``owner`` from ``sources`` for this kind of input.

        Raises:
            ValueError: a source is a plain attribute, whose changes would go unseen.
            RuntimeError: the graph is being captured.
        """
        name = type(owner).__name__
        known = {id(t) for t in (*owner.parameters(), *owner.buffers())}
        if any(t is not None and id(t) not in known for t in sources):
            raise ValueError(
                f"capture: expected the tensors of {name} to be parameters and buffers, got a plain attribute"
            )
        if self.complete:
            raise RuntimeError(
                f"capture: expected {name} to run as in the calls before the capture, got weights folded within it"
            )
        self.made[owner, kind] = made
        self.sources += [t for t in sources if t is not None]


_live: weakref.WeakSet[Pins] = weakref.WeakSet()
_changing = threading.Lock()  # optimizers and modes of other models change in other threads
_current: ContextVar[Pins | None] = ContextVar("resnet_fused_pins", default=None)


@contextlib.contextmanager
def pinned(pins: Pins) -> Iterator[None]:
    """Within it inference finds what it made before in ``pins``, and puts there what it makes."""
    token = _current.set(pins)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Pins | None:
    """The pins of the innermost :func:`pinned`."""
    return _current.get()


def forget(owner: nn.Module) -> None:
    """Void what was made for models that ``owner`` is a part of."""
    for pins in _all():
        if owner in pins.modules:
            pins.void = True


def written(parameters: Sequence[Any]) -> None:
    """Void what was made from the memory of these parameters."""
    storages: set[int] = set()
    for pins in _all():
        storages = storages or {_storage(p) for p in parameters}
        pins.void = pins.void or any(_storage(t) in storages for t in pins.sources)


def _all() -> list[Pins]:
    with _changing:
        return list(_live)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata
