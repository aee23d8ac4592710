"""Implementations in Triton; importing registers them, Triton itself is imported by the first call that may use it.

One module for each stem of ``ops/``. A module has a function for each op, and its predicate under the same name in
``UNSUPPORTED``. A kernel that no GPU has run yet is not in ``_PROVED``: it runs only when the backend is forced. In
Triton's interpreter (``TRITON_INTERPRET=1``, CPU tensors) all of them run only when forced.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from resnet_fused import backends, config, tuning

_MODULES = {
    "batch_norm": ("bn_statistics", "bn_merge", "bn_finalize", "bn_coefficients"),
    "bn_add_relu": tuple(
        f"bn_add_relu_{name}" for name in ("forward", "backward", "mask", "reduce", "apply", "pool", "spread")
    ),
    "conv1x1": tuple(f"conv1x1_{name}" for name in ("fprop", "infer", "dgrad", "wgrad", "bprop")),
    "conv3x3": tuple(f"conv3x3_{name}" for name in ("fprop", "infer", "dgrad", "wgrad", "bprop")),
    "stem": ("stem_forward", "stem_infer", "stem_reduce", "stem_apply", "stem_backward"),
}
_PROVED: frozenset[str] = frozenset()
_MISSING = None if importlib.util.find_spec("triton") else "Triton is not installed"


_STEMS = {op: stem for stem, ops in _MODULES.items() for op in ops}


@functools.cache
def module_of(op: str) -> ModuleType:
    """The module that has ``op``; this imports Triton."""
    return importlib.import_module(f"{__name__}.{_STEMS[op]}")


def _run(op: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return getattr(module_of(op), op)(*args)

    return run


def _unsupported(op: str) -> Callable[..., str | None]:
    def unsupported_reason(*args: Any) -> str | None:
        if _MISSING is not None:
            return _MISSING
        first = next(a for a in args if isinstance(a, Tensor))
        if first.is_cpu and not config.triton_interprets():
            return f"Triton kernels run on CUDA devices, and a tensor is on {first.device}"
        return module_of(op).UNSUPPORTED[op](*args)

    return unsupported_reason


def _preferred(op: str) -> Callable[..., bool]:
    def preferred(*args: Any) -> bool:
        device = next(a.device for a in args if isinstance(a, Tensor))
        if not tuning.contested(op, device):
            return True
        return not tuning.loses(op, module_of(op).problem(op, *args), device)

    return preferred


for _stem, _ops in _MODULES.items():
    if importlib.util.find_spec(f"{__name__}.{_stem}") is None:
        continue
    for _op in _ops:
        _default = _op in _PROVED and not config.triton_interprets()
        backends.register(_op, "triton", _run(_op), _unsupported(_op), default=_default, preferred=_preferred(_op))
