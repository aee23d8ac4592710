"""What every command writes: tables or one JSON document on stdout, progress on stderr, wrong input in one line."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_WIDTH = 132  # of output that does not go to a terminal
_PACKAGES = {"sklearn": "scikit-learn"}  # module -> name on the package index, where they differ

Advance = Callable[[str], None]


class UsageError(Exception):
    """Input that the user can correct; the text says how, in one line."""


class Output:
    """The two streams of one run.

    Args:
        json_mode: stdout carries one JSON document, and everything printed is dropped.
    """

    def __init__(self, *, json_mode: bool = False) -> None:
        self.json_mode = json_mode
        self._out = _console(stderr=False)
        self._err = _console(stderr=True)

    def print(self, *renderables: Any) -> None:
        """Print text or rich renderables; nothing with ``--json``."""
        if not self.json_mode:
            self._out.print(*renderables, highlight=False, soft_wrap=all(isinstance(r, str) for r in renderables))

    def heading(self, text: str) -> None:
        """A line that opens a section."""
        self.print(f"\n[bold]{text}[/bold]")

    def emit(self, document: dict[str, Any]) -> None:
        """Print ``document`` with ``--json``; NaN and infinities, which JSON lacks, become strings."""
        if self.json_mode:
            print(json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False))

    @contextmanager
    def progress(self, total: int) -> Iterator[Advance]:
        """A progress bar on stderr, gone at the end; the yielded function tells what the next of ``total`` steps is."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._err, transient=True) as bar:
            task = bar.add_task("", total=total)
            started = False

            def advance(text: str) -> None:
                nonlocal started
                bar.update(task, description=text, advance=1 if started else 0, refresh=True)
                started = True

            yield advance


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities as strings: JSON has no numbers for them."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> Table:
    """A table whose first ``left`` columns are left-aligned and whose others are right-aligned figures."""
    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for i, column in enumerate(columns):
        result.add_column(column, justify="left" if i < left else "right", overflow="fold", no_wrap=False)
    for row in rows:
        result.add_row(*row)
    return result


def require(command: str, *modules: str, extra: str | None = None) -> list[ModuleType]:
    """Import optional packages.

    Raises:
        UsageError: one is missing; the text says what to install.
    """
    found, missing = [], []
    for name in modules:
        try:
            found.append(importlib.import_module(name))
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise
            missing.append(_PACKAGES.get(error.name, error.name))
    if missing:
        command_line = f"pip install {' '.join(missing)}" if extra is None else f'pip install "resnet_fused[{extra}]"'
        raise UsageError(f"{command}: expected {' and '.join(missing)} to be installed, got none; `{command_line}`")
    return found


def integer(minimum: int) -> Callable[[str], int]:
    """The type of an option that takes an integer of at least ``minimum``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {minimum}, got {text!r}")
        return value

    return parse


def seconds(value: float) -> str:
    """A duration in ms, three digits."""
    ms = value * 1e3
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}" if ms < 100 else f"{ms:.0f}"
