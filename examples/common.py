"""What the examples share: options, seeds, the progress bar, CSV files, figures, and runs in several processes.

Tables, progress and one-line errors are those of ``python -m resnet_fused``.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

import resnet_fused
from resnet_fused.cli import machine
from resnet_fused.cli.output import Output, UsageError, require

OUT = Path(__file__).resolve().parent / "out"

Result = TypeVar("Result")


# --- one run --------------------------------------------------------------------------------------------------------


def parser(doc: str | None, examples: str) -> argparse.ArgumentParser:
    """A parser with the options of every example; ``doc`` is the script's docstring."""
    made = argparse.ArgumentParser(
        description=doc,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"folder for the results (default: {OUT})")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of every random number (default: 0)")
    made.add_argument(
        "--device", default="auto", metavar="DEVICE", help="cpu, cuda or cuda:N (default: the GPU if there is one)"
    )
    return made


def launch(run: Callable[[argparse.Namespace, Output], Any], args: argparse.Namespace) -> int:
    """Exit code of ``run(args, output)``: 2 and one line on stderr for wrong input, 1 if it returns False."""
    try:
        require(Path(sys.argv[0]).name, "matplotlib", "sklearn", extra="demo")
        result = run(args, Output())
    except UsageError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        return 2
    return 1 if result is False else 0


def folder(path: Path) -> Path:
    """``path`` as a folder that exists.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"argument --out: expected a folder that can be written, got {path} ({error.strerror})"
        ) from error
    return path


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch, and ask torch for algorithms that give the same bits every time."""
    import numpy

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False


def header(device: torch.device, workers: int | None = None) -> str:
    """The package and the machine, for the first line of a run; ``workers`` of :func:`parallel` have a thread each."""
    if workers is None:
        return f"resnet_fused {resnet_fused.__version__} on {machine.sentence(device)}"
    with one_thread():
        each = "" if workers == 1 else f", {workers} processes"
        return f"resnet_fused {resnet_fused.__version__} on {machine.sentence(device)}{each}"


# --- many runs ------------------------------------------------------------------------------------------------------


def processes(device: torch.device) -> int:
    """How many runs to make at a time: one a core but at most four on the CPU, one on a GPU."""
    return 1 if device.type == "cuda" else max(1, min(4, len(os.sched_getaffinity(0))))


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread inside: with images of a few pixels a second one has nothing to do but wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def parallel(
    function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], workers: int, done: Callable[[Result], None]
) -> list[Result]:
    """``[function(*job) for job in jobs]`` on ``workers`` processes of one thread; ``done`` gets each result at once.

    One thread in every case, so that the bits do not depend on the number of processes.
    """
    if workers == 1:
        with one_thread():
            return [_told(function(*job), done) for job in jobs]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                done(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _told(result: Result, done: Callable[[Result], None]) -> Result:
    done(result)
    return result


# --- files ----------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to; it takes the place of ``path`` at the end, whole, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the same keys; floats with all their digits, None as an empty field."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        file.flush()


@contextmanager
def figure(
    path: Path, rows: int, columns: int, size: tuple[float, float], *, dpi: int = 120
) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes (an array of ``rows`` x ``columns``), written to the PNG ``path`` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    made, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    try:
        yield made, axes
        with replacing(path) as temporary:
            made.savefig(temporary, dpi=dpi, format="png")
    finally:
        plt.close(made)
