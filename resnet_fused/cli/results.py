"""Results of ``pytest --benchmark``: read, trimmed to what is committed, compared.

The format is pytest-benchmark's JSON, with a list ``unmeasured`` of the rows that have no time beside ``benchmarks``.
What is measured is told by ``extra_info``; see benchmarks/harness/rows.py.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_fused.cli.output import UsageError

_STATS = ("min", "q1", "median", "q3", "max", "mean", "stddev", "rounds")
_ROW = ("group", "name", "fullname", "extra_info")
_COMMIT = ("id", "time", "dirty")
_SMOKE = "smoke"  # begins the names of their models

FUSED = "fused"
OURS = (FUSED, "fused_projections", "fused_recompute")
"""This package's implementations: with ``memory="save"``, which is held against the peers, and with the others."""


@dataclass(frozen=True)
class Row:
    """One implementation of one case."""

    name: str  # pytest's full name
    case: str  # the same for all implementations of one thing
    median: float  # seconds
    q1: float
    q3: float
    rounds: int
    info: dict[str, Any]  # extra_info

    def __getattr__(self, key: str) -> Any:
        """A key of ``extra_info``; None where the row has none."""
        if key.startswith("__"):
            raise AttributeError(key)
        return self.info.get(key)

    @property
    def fused(self) -> bool:
        """Whether it is an implementation of this package's, in a CUDA graph or not."""
        return str(self.info.get("impl")).partition("+")[0] in OURS


@dataclass(frozen=True)
class Results:
    """One file."""

    path: Path
    machine: dict[str, Any]
    commit: dict[str, Any]
    date: str
    rows: tuple[Row, ...]
    unmeasured: dict[tuple[str, str], int]  # implementation and the reason -> how many rows have no time for it

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def device(self) -> str:
        """The GPU's name, or the CPU's."""
        return str(self.machine.get("name") or "unknown machine")

    def of(self, **wanted: Any) -> list[Row]:
        """The rows whose ``extra_info`` has these values."""
        return [row for row in self.rows if all(row.info.get(key) == value for key, value in wanted.items())]


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"expected a file of results, got {str(path)!r} ({error.strerror})") from error
    except ValueError as error:
        raise UsageError(f"expected {str(path)!r} to hold JSON, got {error}") from error
    if not isinstance(document, dict) or "benchmarks" not in document:
        raise UsageError(
            f"expected {str(path)!r} to be written by `pytest --benchmark --benchmark-json`, got other JSON"
        )
    return document


def read(path: Path) -> Results:
    """The results of a file, raw or trimmed.

    Raises:
        UsageError: it cannot be read or is something else.
    """
    document = _document(path)
    rows = []
    for found in document["benchmarks"]:
        stats, info = found["stats"], found["extra_info"]
        if info.get("impl") is not None:
            case = found["group"] or found["name"]
            median, q1, q3 = stats["median"], stats["q1"], stats["q3"]
            rows.append(Row(found["fullname"], case, median, q1, q3, stats["rounds"], info))
    missing = document.get("unmeasured") or []
    unmeasured = Counter((str(row["extra_info"].get("impl")), row["reason"]) for row in missing)
    commit = document.get("commit_info") or {}
    return Results(path, document["machine_info"], commit, document.get("datetime", ""), tuple(rows), dict(unmeasured))


def trim(source: Path, commit: str | None = None) -> str:
    """What is committed of a raw file, as JSON: no single samples, rows in the order of their names.

    Args:
        commit: the full id of what was measured, for a run outside of a repository.
    Raises:
        UsageError: ``source`` is no such file, or nobody says at which commit it was measured.
    """
    document = _document(source)
    measured = {"id": commit, "time": None, "dirty": False} if commit else document.get("commit_info") or {}
    if measured.get("dirty", True) or not re.fullmatch(r"[0-9a-f]{40}", str(measured.get("id"))):
        raise UsageError(
            f"expected {str(source)!r} to be measured at a commit, got {measured.get('id')!r} with uncommitted changes "
            "or no repository; name the full id with --commit if you know it"
        )
    rows = [
        {**{key: row[key] for key in _ROW}, "stats": {key: row["stats"][key] for key in _STATS}}
        for row in _kept(document["benchmarks"])
    ]
    machine = dict(document["machine_info"])
    if isinstance(machine.get("cpu"), dict):
        machine["cpu"] = {key: machine["cpu"][key] for key in ("brand_raw", "count") if key in machine["cpu"]}
    machine.pop("node", None)  # the name of the machine is nobody's business
    kept = {
        "machine_info": machine,
        "commit_info": {key: measured.get(key) for key in _COMMIT},
        "datetime": document["datetime"],
        "version": document["version"],
        "benchmarks": rows,
        "unmeasured": _kept(document.get("unmeasured") or []),
    }
    return json.dumps(kept, indent=1, sort_keys=True) + "\n"


def _kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the small cases that only check that benchmarks run."""
    kept = [row for row in rows if not str(row["extra_info"].get("model")).startswith(_SMOKE)]
    return sorted(kept, key=lambda row: row["fullname"])


# --- comparison -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One row of both files."""

    name: str
    fused: bool
    old: float  # seconds, median
    new: float

    @property
    def percent(self) -> float:
        """How much longer the new one takes."""
        return (self.new / self.old - 1) * 100


@dataclass(frozen=True)
class Comparison:
    """Two files of the same device."""

    changes: tuple[Change, ...]
    missing: tuple[str, ...]  # fused rows of the old file that the new one lacks

    def regressions(self, percent: float) -> list[Change]:
        """This package's rows that take more than ``percent`` longer, the worst first; peers' are not ours."""
        return sorted((c for c in self.changes if c.fused and c.percent > percent), key=lambda c: -c.percent)


def compare(old: Results, new: Results) -> Comparison:
    """Match rows by name.

    Raises:
        UsageError: different devices, or no row in common.
    """
    if old.device != new.device:
        raise UsageError(f"expected results of one device, got {old.device} and {new.device}")
    found = {row.name: row for row in new.rows}
    changes = [Change(r.name, r.fused, r.median, found[r.name].median) for r in old.rows if r.name in found]
    if not changes:
        raise UsageError(f"expected {str(old.path)!r} and {str(new.path)!r} to have rows in common, got none")
    return Comparison(tuple(changes), tuple(row.name for row in old.rows if row.fused and row.name not in found))


# --- peers ------------------------------------------------------------------------------------------------------------

PEERS = {
    **{impl: (impl,) for impl in OURS},
    "eager": ("eager", "eager_nchw"),
    "compile": ("compile", "compile_max_autotune"),
    "cudnn": ("cudnn",),
    "jax": ("jax",),
    "onnxruntime": ("onnxruntime",),
}
"""The implementations that are configurations of one peer; the fastest of them counts, in a CUDA graph or not."""


def fastest(rows: Sequence[Row]) -> dict[str, Row]:
    """The fastest configuration of every peer among rows of one case."""
    best: dict[str, Row] = {}
    for peer, impls in PEERS.items():
        own = [row for row in rows if row.impl.partition("+")[0] in impls]
        if own:
            best[peer] = min(own, key=lambda row: row.median)
    return best
