"""What every op shares: its registration with torch.library and the way a call reaches a backend."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from resnet_fused import backends, plans
from resnet_fused.reference import compute_dtype

NAMESPACE = "resnet_fused"
_library = torch.library.Library(NAMESPACE, "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

ops: dict[str, Op] = {}

Observer = Callable[[str, tuple[Any, ...]], AbstractContextManager[Any]]
_observer: Observer | None = None  # of every thread: on a GPU backward runs in one of autograd's own


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Within it every call of an op, on real or fake tensors, in any thread, runs inside ``observer(name, args)``.

    What inference has bound before is not seen: call ``refresh(model)`` first.
    """
    global _observer
    before, _observer = _observer, observer
    try:
        with plans.suspended():
            yield
    finally:
        _observer = before


_local = threading.local()


def is_dispatched() -> bool:
    """Whether an op of this thread is run by the dispatcher: for compiled code, say, which may own a call's memory."""
    return getattr(_local, "dispatched", False)


class Op:
    """A registered op ``resnet_fused::<name>``.

    Args:
        schema: torch.library schema, name first.
        check: raises ValueError or TypeError on arguments outside the contract; the same for eager, CPU, CUDA and fake.
        fake: output metadata from the arguments.
    """

    def __init__(self, schema: str, check: Callable[..., None], fake: Callable[..., Any]) -> None:
        self.name = schema.partition("(")[0]
        self.check = check
        _library.define(schema, tags=_TAGS)
        for key in ("CPU", "CUDA"):
            _library.impl(self.name, self._dispatched, key)

        def checked_fake(*args: Any) -> Any:
            check(*args)
            return self._observed(fake, args)

        torch.library.register_fake(f"{NAMESPACE}::{self.name}", checked_fake, lib=_library)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        ops[self.name] = self

    def _observed(self, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """``run(*args)``, inside the observer if there is one."""
        if _observer is None:
            return run(*args)
        with _observer(self.name, args):
            return run(*args)

    def _dispatched(self, *args: Any) -> Any:
        before, _local.dispatched = is_dispatched(), True
        try:
            return self.run(*args)
        finally:
            _local.dispatched = before

    def run(self, *args: Any) -> Any:
        """Check the arguments, choose a backend, run it."""
        self.check(*args)
        return self._observed(backends.choose(self.name, *args).run, args)

    def __call__(self, *args: Any) -> Any:
        return self.overload(*args) if _watched(args[0]) else self.run(*args)

    def consume(self, *args: Any) -> Any:
        """The op on gradients that nobody needs afterwards: a backend may write over them."""
        if _watched(args[0]):
            return self.overload(*args)
        self.check(*args)
        chosen = backends.choose(self.name, *args)
        return self._observed(chosen.consume or chosen.run, args)

    def bind(self, *args: Any, **hints: Any) -> Callable[..., Any] | None:
        """What the backend chosen for arguments like these prepares for many calls; None if it prepares nothing."""
        if _watched(args[0]):
            return None
        self.check(*args)
        prepare = backends.choose(self.name, *args).bind
        bound = None if prepare is None else prepare(*args, **hints)
        return bound if bound is None or _observer is None else self._watched_bound(bound, args)

    def _watched_bound(self, bound: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
        """``bound``, of whose calls the observer is told the arguments that it was bound for: all have their shapes."""
        return lambda *activations: self._observed(lambda *_: bound(*activations), args)


def _watched(x: Any) -> bool:
    """Whether something must see the op itself; else a call goes straight to the backend, past the dispatcher."""
    if not (type(x) is Tensor or type(x) is torch.nn.Parameter) or torch.compiler.is_compiling():
        return True
    modes = torch._C._len_torch_dispatch_stack()
    return bool(modes and modes > (plans.recorder() is not None))


def empty_channels_last(like: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised 4-d tensor in channels_last on ``like``'s device."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def empty_channels(like: Tensor, given: bool = True) -> Tensor:
    """An uninitialised vector of ``like``'s channels in the accumulation dtype, of no element unless ``given``."""
    return like.new_empty((like.shape[1] if given else 0,), dtype=compute_dtype(like.dtype))


def empty_tiles(y: Tensor, given: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised statistics of ``y``: of one tile, or of none."""
    tiles = 1 if given else 0
    mean = y.new_empty((tiles, y.shape[1]), dtype=compute_dtype(y.dtype))
    return y.new_empty((tiles,), dtype=torch.int32), mean, torch.empty_like(mean)
