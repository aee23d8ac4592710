"""Which rows a session has: parameters of the bench functions."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from harness.protocol import Case

MARKS = {
    "smoke": "a benchmark small enough for a CPU and for every run of the tests",
    "headline": "a benchmark to run first: ResNet-50 in bf16 with 256 images, its blocks and kernels",
}
_KINDS = ("bench_models", "bench_kernels", "bench_blocks")


def order(item: pytest.Item) -> tuple[bool, bool, int]:
    """Sorts items by what a budget should be spent on first."""
    smoke, headline = (item.get_closest_marker(name) is not None for name in ("smoke", "headline"))
    return smoke, not headline, _KINDS.index(item.path.stem)


def parametrize(metafunc: pytest.Metafunc, cases: Iterable[Case], known: dict[str, Case]) -> None:
    """One row for each implementation of each case; ``known`` takes the cases by their ids.

    The parameters are strings, so that they are legible in the JSON: ``case`` and ``impl``.
    """
    found = []
    for case in cases:
        if case.id in known:
            raise ValueError(f"parametrize: expected ids of cases to differ, got {case.id} twice")
        known[case.id] = case
        marks = [getattr(pytest.mark, name) for name in MARKS if getattr(case, name)]
        found += [pytest.param(case.id, impl, id=f"{case.id}-{impl}", marks=marks) for impl in case.impls]
    metafunc.parametrize(("case", "impl"), found)
