"""Functions made from rows of a table: each has its own name and docstring, is found by pickle, and fixes arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Factory = TypeVar("Factory", bound=Callable[..., Any])


def named(function: Factory, name: str, module: str, doc: str) -> Factory:
    """``function`` as the one that ``module`` calls ``name``."""
    function.__name__ = function.__qualname__ = name
    function.__module__, function.__doc__ = module, doc
    return function


def fix(owner: str, arguments: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Add to ``arguments`` those that the name ``owner`` stands for; raises ValueError if one is already another."""
    for name, value in fixed.items():
        if arguments.setdefault(name, value) != value:
            raise ValueError(f"{owner}: expected {name} to be {value!r}, got {arguments[name]!r}")
