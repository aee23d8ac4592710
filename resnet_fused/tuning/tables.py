"""Tables of what was fastest: one JSON file for each GPU in `tables/`, measured by ``python -m resnet_fused tune``."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resnet_fused import config
from resnet_fused.tuning.configs import Config, from_json, to_json

logger = logging.getLogger("resnet_fused")
FOLDER = Path(__file__).parent / "tables"
METADATA = ("gpu", "driver", "torch", "triton", "date", "commit")
# The fields that grow with the batch, and with nothing else that matters: an entry serves for a problem that differs
# from it in one of them, by a factor of 2 at most.
SIZES = ("images", "rows")
_NEAR = 2.0

Key = tuple[Any, ...]


class Entry(NamedTuple):
    """The fastest of a problem's candidates."""

    op: str
    problem: dict[str, Any]  # the fields of the kernel's problem
    backend: str
    config: Config | None  # of the kernel; None for a backend that has no choice
    us: dict[str, float]  # median of each candidate that gave the right result

    def to_json(self) -> dict[str, Any]:
        """The entry of the file."""
        return self._asdict() | {"config": None if self.config is None else to_json(self.config)}


class Table:
    """Measurements of one GPU."""

    def __init__(self, metadata: dict[str, Any], entries: list[Entry]) -> None:
        self.metadata, self.entries = metadata, entries
        self._exact = {key(e.op, e.problem): e for e in entries}
        self._near: dict[Key, list[Entry]] = {}
        for entry in entries:
            size = _size(entry.problem)
            if size is not None:
                self._near.setdefault(key(entry.op, entry.problem, without=size), []).append(entry)

    def find(self, op: str, problem: Any) -> Entry | None:
        """The entry of ``problem``, else of the same one with the nearest size within a factor of 2."""
        fields = problem._asdict()
        size = _size(fields)
        found = self._exact.get(key(op, fields))
        if found is not None or size is None:
            return found
        near = self._near.get(key(op, fields, without=size), [])
        distances = [(abs(math.log(entry.problem[size] / fields[size])), entry) for entry in near]
        distance, entry = min(distances, key=lambda pair: pair[0], default=(math.inf, None))
        return entry if distance <= math.log(_NEAR) + 1e-9 else None

    def lost(self, backend: str) -> frozenset[str]:
        """The ops for which some entry has a backend ahead that would come after ``backend`` without it."""
        return frozenset(entry.op for entry in self.entries if overtakes(entry.backend, backend))

    def dumps(self) -> str:
        """The file's text, one entry a line."""
        head = json.dumps(self.metadata, indent=1, ensure_ascii=False)[:-2]
        lines = ",\n".join(f"  {json.dumps(entry.to_json())}" for entry in self.entries)
        return f'{head},\n "entries": [\n{lines}\n ]\n}}\n'


def overtakes(fastest: str, backend: str) -> bool:
    """Whether ``fastest`` would come after ``backend`` if nothing had been measured."""
    return config.BACKENDS.index(fastest) > config.BACKENDS.index(backend)


def _size(problem: dict[str, Any]) -> str | None:
    return next((name for name in SIZES if name in problem), None)


def key(op: str, problem: dict[str, Any], without: str | None = None) -> Key:
    """Equal for equal problems of an op, whatever the order of their fields; one field may be left out."""
    return (op, *((name, value) for name, value in sorted(problem.items()) if name != without))


# --- reading --------------------------------------------------------------------------------------------------------


def parse(text: str, where: str) -> tuple[Table, list[str]]:
    """The table of a file's text, and a sentence for each part of it that cannot be used."""
    wrong: list[str] = []
    try:
        document = json.loads(text)
        metadata, raw = {name: document[name] for name in METADATA}, list(document["entries"])
    except (ValueError, KeyError, TypeError) as error:
        return Table({}, []), [f"{where}: expected a JSON object with {', '.join(METADATA)} and entries, got {error!r}"]
    entries = []
    for i, fields in enumerate(raw):
        try:
            entries.append(_entry(fields))
        except ValueError as error:
            wrong.append(f"{where}, entry {i}: {error}")
    return Table(metadata, entries), wrong


def _entry(fields: Any) -> Entry:
    """One entry; a ValueError says what is wrong with it."""
    if not isinstance(fields, dict) or set(fields) != set(Entry._fields):
        raise ValueError(f"expected the fields {', '.join(Entry._fields)}, got {fields!r}")
    op, problem, backend, chosen, us = (fields[name] for name in Entry._fields)
    if not isinstance(op, str) or not isinstance(problem, dict) or not isinstance(us, dict):
        raise ValueError(f"expected op, problem and us to be text and objects, got {op!r}, {problem!r}, {us!r}")
    if backend not in config.BACKENDS:
        raise ValueError(f"expected backend to be one of {', '.join(config.BACKENDS)}, got {backend!r}")
    sizes = [problem[name] for name in SIZES if name in problem]
    if not all(isinstance(value, (int, float)) and value > 0 for value in (*sizes, *us.values())):
        raise ValueError(f"expected times, {' and '.join(SIZES)} above 0, got {us}, {problem}")
    problem = {name: tuple(value) if isinstance(value, list) else value for name, value in problem.items()}
    return Entry(op, problem, backend, None if chosen is None else from_json(chosen), us)


def load(path: Path) -> Table:
    """The table of a file.

    Raises:
        ValueError: some part of it cannot be used; the text names the file and the entry.
    """
    table, wrong = parse(path.read_text(encoding="utf-8"), path.name)
    if wrong:
        raise ValueError("; ".join(wrong))
    return table


# --- the table of a device ------------------------------------------------------------------------------------------


def path_of(gpu: str) -> Path:
    """The file of the GPU with this name."""
    return FOLDER / (re.sub(r"[^A-Za-z0-9]+", "_", gpu) + ".json")


in_force: ContextVar[Table | None] = ContextVar("resnet_fused_table", default=None)
"""A table that takes the place of every device's."""


def of_device(device: torch.device) -> Table:
    """The table of ``device``, read once; without a file, and for what cannot be used of it, without entries."""
    return in_force.get() or _read(device)


@functools.cache
def _read(device: torch.device) -> Table:
    if device.type != "cuda":
        return Table({}, [])
    path = path_of(torch.cuda.get_device_name(device))
    if not path.exists():
        return Table({}, [])
    table, wrong = parse(path.read_text(encoding="utf-8"), path.name)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        logger.warning("%s%s; the built-in rule is followed there", wrong[0], more)
    return table
