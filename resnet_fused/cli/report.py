"""``report``: tables and plots of the committed results, and comparison of two runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from resnet_fused.cli.figures import FIGURES, figures
from resnet_fused.cli.output import Output, UsageError
from resnet_fused.cli.results import FUSED, OURS, PEERS, Results, Row, compare, fastest, read, trim

SUMMARY = "tables and plots of the committed benchmark results; comparison of two runs"
DESCRIPTION = """\
Write docs/results.md, docs/figures/ and the results in README.md from the files in benchmarks/results, and from them
alone: the same files give the same text. --trim makes such a file of what `pytest --benchmark --benchmark-json` wrote;
--show prints a line for each case of a file of either kind, --compare holds two against each other.
Exit code 1 if --check finds a text that would change, or --compare a regression."""
EXAMPLES = """\
examples:
  %(prog)s
  %(prog)s --check
  %(prog)s --show raw.json
  %(prog)s --trim raw.json --out benchmarks/results/nvidia_h200.json
  %(prog)s --compare benchmarks/results/nvidia_h200.json new.json --fail-above 5
"""

_BEGIN, _END = "<!-- results:begin -->", "<!-- results:end -->"
_COMMAND = "python -m resnet_fused report"
_MEASURE = "pytest --benchmark --benchmark-json raw.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``report``."""
    parser.add_argument(
        "--root", type=Path, default=Path(), metavar="DIR", help="the repository (default: the current folder)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if anything would change")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a line for each case and write nothing")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two files of one device")
    parser.add_argument(
        "--fail-above", type=_percent, default=5.0, metavar="PERCENT", help="of --compare: how much longer (default: 5)"
    )
    parser.add_argument("--trim", type=Path, metavar="RAW", help="a file that pytest wrote")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of --trim: where to write")
    parser.add_argument(
        "--commit", metavar="ID", help="of --trim: what was measured (default: what pytest wrote, if it was committed)"
    )


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a percentage of at least 0, got {text!r}")
    return value


def run(args: argparse.Namespace, out: Output) -> int:
    """Show, compare, trim, or write the report."""
    if args.show:
        return _show(args, out)
    if args.compare:
        return _compare(args, out)
    if args.trim or args.out:
        return _trim(args, out)
    return _write(args, out)


def _show(args: argparse.Namespace, out: Output) -> int:
    results = read(args.show)
    lines = [_line(case, fastest(own)) for case, own in _cases(results.rows).items()]
    lines += [f"not measured: {line}" for line in _unmeasured(results)]
    out.emit({"lines": lines})
    if not out.json_mode:
        print("\n".join(lines))
    return 0


def _line(case: str, best: dict[str, Row]) -> str:
    """This package's time, and how many times as long each peer takes; without it the peers' own times."""
    ours = best.get(FUSED)
    if ours is None:
        return f"{case}: " + ", ".join(f"{row.impl} {row.median * 1e6:,.1f} us" for row in best.values())
    peers = [f"{row.impl} {row.median / ours.median:.2f}x" for peer, row in best.items() if peer != FUSED]
    bound = [f"{text} of bound"] if (text := _of_bound(ours)) else []
    return ", ".join([f"{case}: {ours.impl} {ours.median * 1e6:,.1f} us", *bound, *peers])


def _trim(args: argparse.Namespace, out: Output) -> int:
    if not (args.trim and args.out):
        raise UsageError("expected --trim RAW together with --out FILE, got one of them")
    text = trim(args.trim, args.commit)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    out.print(f"{args.out}: {len(read(args.out).rows)} rows; `{_COMMAND}` writes the tables")
    out.emit({"file": str(args.out)})
    return 0


def _compare(args: argparse.Namespace, out: Output) -> int:
    old, new = (read(path) for path in args.compare)
    found = compare(old, new)
    worse = found.regressions(args.fail_above)
    ours = [change for change in found.changes if change.fused]
    for change in worse:
        out.print(f"{change.name}: {change.old * 1e6:.1f} us -> {change.new * 1e6:.1f} us, {change.percent:+.1f}%")
    for name in found.missing:
        out.print(f"{name}: missing in {args.compare[1]}")
    out.print(f"{len(worse)} of {len(ours)} rows of this package take more than {args.fail_above:g}% longer")
    out.emit(
        {
            "fail_above_percent": args.fail_above,
            "regressions": [{**vars(change), "percent": change.percent} for change in worse],
            "missing": list(found.missing),
            "compared": len(found.changes),
        }
    )
    return 1 if worse else 0


def _write(args: argparse.Namespace, out: Output) -> int:
    texts = report(args.root)
    changed = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    drawn = [path for name in FIGURES for path in (args.root / "docs" / "figures").glob(f"*-{name}.svg")]
    stale = sorted(path for path in drawn if path not in texts)
    out.emit({"changed": [str(path) for path in (*changed, *stale)], "written": not args.check})
    if args.check:
        for path in (*changed, *stale):
            print(f"report: {path} is not what the results give; run `{_COMMAND}`", file=sys.stderr)
        return 1 if changed or stale else 0
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[path], encoding="utf-8")
        out.print(f"wrote {path}")
    for path in stale:
        path.unlink()
        out.print(f"removed {path}")
    if not changed and not stale:
        out.print("nothing has changed")
    return 0


# --- the texts --------------------------------------------------------------------------------------------------------


def report(root: Path) -> dict[Path, str]:
    """Every text that follows from the results in ``root``.

    Raises:
        UsageError: ``root`` is no repository of this package, or a file of results is damaged.
    """
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if text.count(_BEGIN) != 1 or text.count(_END) != 1:
        raise UsageError(f"argument --root: expected a README.md with {_BEGIN} and {_END} once each, got {str(root)!r}")
    every = [read(path) for path in sorted((root / "benchmarks" / "results").glob("*.json"))]
    before, after = text.partition(_BEGIN)[0], text.partition(_END)[2]
    texts = {readme: f"{before}{_BEGIN}\n{_summary(every)}{_END}{after}"}
    pages = []
    for results in every:
        drawn = figures(results)
        texts |= {root / "docs" / "figures" / f"{results.stem}-{name}.svg": svg for name, svg in drawn.items()}
        pages.append(_page(results, list(drawn)))
    texts[root / "docs" / "results.md"] = _document(pages)
    return texts


_NONE = f"""\
No results of a GPU are committed yet. On a machine with one:

    {_MEASURE}
    {_COMMAND} --trim raw.json --out benchmarks/results/NAME_OF_THE_GPU.json
    {_COMMAND}
"""


_NOTE = """\
Of every peer the fastest configuration counts; it is named where it is not the plain one. *Speed-up* is this package's
fastest over the fastest of all others: below 1 it is slower. How it is measured: [benchmarks](../benchmarks/harness).
"""


def _summary(every: Sequence[Results]) -> str:
    """The README's part: networks at their largest batch in bf16, one table a device."""
    if not every:
        return _NONE
    parts = []
    for results in every:
        rows = results.of(kind="network")
        if rows:
            batch = max(row.batch for row in rows)
            dtypes = [row.dtype for row in rows if row.batch == batch]
            dtype = "bf16" if "bf16" in dtypes else dtypes[0]
            shown = [row for row in rows if (row.batch, row.dtype) == (batch, dtype)]
            head = f"**{results.device}**, batch {batch}, {dtype}, images/s of the fastest configurations"
            figure = f"![images/s of every network](docs/figures/{results.stem}-networks.svg)"
            parts.append(f"{head}; {_commit(results)}:\n\n{_networks(shown)}\n{figure}\n")
        else:
            parts.append(f"**{results.device}**: kernels and blocks only; {_commit(results)}.\n")
    return (
        "\n".join(parts) + "\nEvery kernel, block and network, losses included: [docs/results.md](docs/results.md).\n"
    )


def _document(pages: Sequence[str]) -> str:
    source = "the files in [benchmarks/results](../benchmarks/results), and from nothing else"
    head = ["# Results\n", f"Written by `{_COMMAND}` from {source}.\n"]
    return "\n".join([*head, _NOTE, *pages] if pages else [*head, _NONE])


def _page(results: Results, drawn: Sequence[str]) -> str:
    sections = [f"## {results.device}\n", _machine(results)]
    if results.unmeasured:
        sections += ["### Not measured\n", "".join(f"- {line}\n" for line in _unmeasured(results))]
    networks = results.of(kind="network")
    if networks:
        sections += [
            "### Networks, images/s\n",
            _networks(networks),
            "### Networks, peak MiB of one call\n",
            _memory(networks),
        ]
    blocks = results.of(kind="block")
    if blocks:
        sections += ["### Blocks, microseconds\n", _blocks(blocks)]
    kernels = results.of(kind="kernel")
    if kernels:
        sections += ["### Kernels\n", _KERNEL_NOTE, _kernels(kernels)]
    sections += [f"![{name}](figures/{results.stem}-{name}.svg)\n" for name in drawn]
    return "\n".join(sections)


def _unmeasured(results: Results) -> list[str]:
    return [f"{impl} ({rows} rows): {reason}" for (impl, reason), rows in sorted(results.unmeasured.items())]


_KERNEL_NOTE = (
    "Times in microseconds, median and quartiles. GB/s are of the fewest bytes that the op must move; *of bound* is "
    "the least time that the measured ceilings allow, over the time. Errors are relative, against fp64.\n"
)


def _commit(results: Results) -> str:
    commit = str(results.commit.get("id") or "unknown")[:10]
    return f"measured at `{commit}` on {results.date[:10]}"


_GPU = {
    "driver": "driver_version",
    "clock of the multiprocessors": "clocks.sm",
    "its maximum": "clocks.max.sm",
    "clock of the memory": "clocks.mem",
    "power limit": "power.limit",
}


def _machine(results: Results) -> str:
    """What it was measured with."""
    known = results.machine
    rows: list[tuple[str, Any]] = [("measured at", _commit(results).removeprefix("measured at "))]
    gpu = known.get("gpu") or {}
    rows += [(name, gpu.get(key)) for name, key in _GPU.items()]
    rows += [(name, known.get(name)) for name in ("torch", "cuda", "cudnn")]
    rows += sorted((known.get("peers") or {}).items())
    if known.get("copy_gb_per_s"):
        rows.append(("copy, read and written", f"{_number(known['copy_gb_per_s'])} GB/s"))
    rates = known.get("matmul_tflop_per_s") or {}
    rows += [(f"matrix product, {dtype}", f"{_number(rate)} TFLOP/s") for dtype, rate in sorted(rates.items())]
    return _table(("", ""), [(name, str(value)) for name, value in rows if value])


def _networks(rows: Sequence[Row]) -> str:
    """A line for each setting: every peer's fastest configuration, and the fused one against the best of them."""
    peers = _present(rows)
    lines = []
    for setting, own in _settings(rows, "model", "mode", "dtype", "batch"):
        best = fastest(own)
        others = [best[peer] for peer in peers if peer in best and peer not in OURS]
        ratio = min(r.median for r in others) / best[FUSED].median if others and FUSED in best else None
        cells = [_rate(best[peer]) if peer in best else "" for peer in peers]
        lines.append((*map(str, setting), *cells, "" if ratio is None else f"{ratio:.2f}"))
    return _table(("model", "mode", "dtype", "batch", *peers, "speed-up"), lines)


def _rate(row: Row) -> str:
    """Images a second; a configuration that is not the peer's plain one is named."""
    plain = row.impl in PEERS
    return _number(row.images_per_s) + ("" if plain else f" ({row.impl})")


def _number(value: float) -> str:
    """Whole from 100 on, three digits below."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _memory(rows: Sequence[Row]) -> str:
    impls = list(dict.fromkeys(row.impl for row in rows if row.peak_mib is not None))
    lines = []
    for setting, own in _settings(rows, "model", "mode", "dtype", "batch"):
        known = {row.impl: row.peak_mib for row in own if row.peak_mib is not None}
        lines.append((*map(str, setting), *(f"{known[i]:,.0f}" if i in known else "" for i in impls)))
    return _table(("model", "mode", "dtype", "batch", *impls), lines)


def _blocks(rows: Sequence[Row]) -> str:
    peers = _present(rows)
    lines = []
    for setting, own in _settings(rows, "model", "op", "mode", "shape", "dtype", "batch"):
        best = fastest(own)
        others = [best[peer].median for peer in peers if peer in best and peer not in OURS]
        ratio = f"{min(others) / best[FUSED].median:.2f}" if others and FUSED in best else ""
        times = [_time(best[peer]) if peer in best else "" for peer in peers]
        lines.append((*map(_text, setting), *times, ratio, _of_bound(best.get(FUSED))))
    columns = ("block", "kind", "mode", "shape", "dtype", "batch", *peers, "speed-up", "of bound")
    return _table(columns, lines)


def _kernels(rows: Sequence[Row]) -> str:
    peers = [peer for peer in _present(rows) if peer not in OURS]
    lines = []
    for setting, own in _settings(rows, "op", "direction", "shape", "dtype", "batch"):
        best = fastest(own)
        ours = best.get(FUSED)
        others = [best[peer].median for peer in peers if peer in best]
        ratio = f"{min(others) / ours.median:.2f}" if others and ours is not None else ""
        figures = ("",) * 5 if ours is None else _kernel_figures(ours)
        times = [_time(best[peer]) if peer in best else "" for peer in peers]
        lines.append((*map(_text, setting), *figures, *times, ratio))
    columns = ("fused", "GB/s", "TFLOP/s", "of bound", "error (PyTorch's)")
    return _table(("op", "direction", "shape", "dtype", "batch", *columns, *peers, "speed-up"), lines)


def _kernel_figures(row: Row) -> tuple[str, ...]:
    error = "" if row.error is None else f"{row.error:.1e}"
    if row.error is not None and row.error_torch is not None:
        error += f" ({row.error_torch:.1e})"
    rates = ("" if value is None else _number(value) for value in (row.gb_per_s, row.tflop_per_s))
    return (_time(row), *rates, _of_bound(row), error)


def _of_bound(row: Row | None) -> str:
    return "" if row is None or row.bound_fraction is None else f"{row.bound_fraction:.0%}"


def _time(row: Row) -> str:
    """Median and quartiles."""
    return f"{row.median * 1e6:,.1f} ({row.q1 * 1e6:,.1f}-{row.q3 * 1e6:,.1f})"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "x".join(map(str, value))
    return "" if value is None else str(value)


def _present(rows: Iterable[Row]) -> list[str]:
    """The peers that any of the rows belongs to."""
    found = {row.impl.partition("+")[0] for row in rows}
    return [peer for peer, impls in PEERS.items() if found & set(impls)]


def _settings(rows: Sequence[Row], *keys: str) -> list[tuple[tuple[Any, ...], list[Row]]]:
    """The cases in the order in which they come, with their values of these keys."""
    return [(tuple(_text(own[0].info.get(key)) for key in keys), own) for own in _cases(rows).values()]


def _cases(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.case, []).append(row)
    return groups


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown; figures to the right from the column after the words on."""
    rule = ["---"] * len(columns)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, rule, *lines))
