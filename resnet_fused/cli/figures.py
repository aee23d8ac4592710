"""The report's plots, as SVG that is the same for the same results."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from resnet_fused.cli.output import require
from resnet_fused.cli.results import FUSED, PEERS, Results, Row, fastest

FIGURES = ("roofline", "networks", "memory")
_COLORS = {
    FUSED: "#2a9d5c",
    "fused_projections": "#74c69d",
    "fused_recompute": "#b7e4c7",
    "eager": "#8d99ae",
    "compile": "#f4a261",
    "cudnn": "#457b9d",
    "jax": "#9d4edd",
    "onnxruntime": "#e76f51",
}
_SETTINGS = {
    "svg.hashsalt": "resnet_fused",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def _pyplot() -> Any:
    matplotlib, pyplot = require("report", "matplotlib", "matplotlib.pyplot", extra="demo")
    matplotlib.use("svg")
    return pyplot


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    _pyplot().close(figure)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def figures(results: Results) -> dict[str, str]:
    """SVG by the names of ``FIGURES``; one without data is left out."""
    with _pyplot().rc_context(_SETTINGS):
        found = (
            _roofline(results),
            _bars(results, "images_per_s", "images/s", fastest),
            _bars(results, "peak_mib", "peak MiB", _least_memory),
        )
    return {name: svg for name, svg in zip(FIGURES, found, strict=True) if svg is not None}


def _roofline(results: Results) -> str | None:
    """Every kernel of this package under the measured ceilings: convolutions, and beside them what has no FLOPs."""
    rows = [row for row in results.of(kind="kernel") if row.fused and row.bytes]
    bandwidth = results.machine.get("copy_gb_per_s")
    if not rows or not bandwidth:
        return None
    figure, (left, right) = _pyplot().subplots(1, 2, figsize=(10, 4.5), width_ratios=(3, 2))
    _convolutions(left, [row for row in rows if row.flops], bandwidth, results.machine.get("matmul_tflop_per_s") or {})
    _passes(right, [row for row in rows if not row.flops], bandwidth)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(fontsize=7)
    figure.suptitle(f"Kernels of this package, {results.device}")
    figure.tight_layout()
    return _svg(figure)


def _convolutions(axes: Any, rows: Sequence[Row], bandwidth: float, ceilings: dict[str, float]) -> None:
    """FLOPs a byte that the op must move, against what is reached."""
    intensity = [row.flops / row.bytes for row in rows] or [100.0]
    lowest, highest = min(intensity) / 2, max(intensity) * 2
    for dtype, rate in sorted(ceilings.items()):
        ridge = rate * 1e3 / bandwidth
        points = sorted((lowest, ridge, highest))
        axes.plot(points, [min(rate, x * bandwidth / 1e3) for x in points], label=f"measured ceiling, {dtype}", lw=1)
    for direction in dict.fromkeys(row.direction for row in rows):
        own = [row for row in rows if row.direction == direction]
        reached = [row.flops / row.median / 1e12 for row in own]
        axes.scatter([row.flops / row.bytes for row in own], reached, s=14, label=direction)
    axes.set_xlabel("FLOP a byte that the op must move")
    axes.set_ylabel("TFLOP/s")


def _passes(axes: Any, rows: Sequence[Row], bandwidth: float) -> None:
    """Megabytes that the op must move, against GB/s."""
    axes.axhline(bandwidth, label="measured copy", lw=1)
    for op in dict.fromkeys(row.op for row in rows):
        own = [row for row in rows if row.op == op]
        rates = [row.bytes / row.median / 1e9 for row in own]
        axes.scatter([row.bytes / 1e6 for row in own], rates, s=14, label=op)
    axes.set_xlabel("MB that the op must move")
    axes.set_ylabel("GB/s")


def _least_memory(rows: Sequence[Row]) -> dict[str, Row]:
    """The configuration of each peer that needs the least memory."""
    best: dict[str, Row] = {}
    for peer, impls in PEERS.items():
        own = [row for row in rows if row.impl in impls and row.peak_mib is not None]
        if own:
            best[peer] = min(own, key=lambda row: row.peak_mib)
    return best


def _bars(results: Results, key: str, label: str, choose: Any) -> str | None:
    """One panel for each mode, at the largest batch and the dtype that comes first; bars for every peer."""
    panels = []
    for mode in ("train", "infer"):
        rows = [row for row in results.of(kind="network", mode=mode) if row.info.get(key) is not None]
        if rows:
            batch = max(row.batch for row in rows)
            dtype = next(row.dtype for row in rows if row.batch == batch)
            panels.append((mode, batch, dtype, [row for row in rows if (row.batch, row.dtype) == (batch, dtype)]))
    if not panels:
        return None
    figure, grid = _pyplot().subplots(len(panels), 1, figsize=(8, 3 * len(panels)), squeeze=False)
    for axes, (mode, batch, dtype, rows) in zip(grid[:, 0], panels, strict=True):
        models = list(dict.fromkeys(row.model for row in rows))
        chosen = {model: choose([row for row in rows if row.model == model]) for model in models}
        peers = [peer for peer in PEERS if any(peer in found for found in chosen.values())]
        for i, peer in enumerate(peers):
            heights = [chosen[m][peer].info[key] if peer in chosen[m] else 0 for m in models]
            places = [j + (i - (len(peers) - 1) / 2) * 0.8 / len(peers) for j in range(len(models))]
            axes.bar(places, heights, 0.8 / len(peers), label=peer, color=_COLORS[peer])
        axes.set_xticks(range(len(models)), models, fontsize=7)
        axes.set_ylabel(label)
        axes.set_title(f"{mode}, batch {batch}, {dtype}")
        axes.legend(fontsize=7)
    figure.suptitle(results.device)
    figure.tight_layout()
    return _svg(figure)
