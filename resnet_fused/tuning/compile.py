"""Kernels compiled ahead of a launch, for any target, without a GPU: what `launch` would compile, byte for byte.

A compilation lands in Triton's cache on disk, under the key that a launch looks for.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib
import math
import multiprocessing
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from resnet_fused import backends, tuning
from resnet_fused.kernels import module_of
from resnet_fused.kernels._launch import Launch, recording
from resnet_fused.tuning.calls import Call
from resnet_fused.tuning.configs import RowsConfig

LEAST_KIB = RowsConfig.shared  # of shared memory, that every GPU has: what kernels without a configuration may take


class Job(NamedTuple):
    """One compilation, as plain data: workers in other processes take it."""

    module: str  # of the kernel
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    target: int  # compute capability, 90 for 9.0

    @property
    def key(self) -> str:
        """Equal for equal compilations."""
        return repr(tuple(self))


class Compiled(NamedTuple):
    """What a compilation gave."""

    shared: int  # bytes of a program
    product: bool  # whether it multiplies matrices
    cubin: bytes


class Usage(NamedTuple):
    """What the machine code needs and does."""

    registers: int  # of a thread
    stack: int  # bytes of a thread: spilled registers and local arrays
    spills: int  # instructions that store to or load from it
    instructions: dict[str, int]  # how many of each that tells how a kernel works


# --- what a call launches -------------------------------------------------------------------------------------------


def declined(call: Call) -> str | None:
    """Why the Triton kernel does not run ``call``."""
    return backends.unavailable(call.op, "triton", *call.args)


def candidates(call: Call) -> tuple[tuning.Config, ...]:
    """Every configuration of the Triton kernel for ``call``; none where it has no choice."""
    module = module_of(call.op)
    return module.candidates(module.problem(call.op, *call.args)) if hasattr(module, "candidates") else ()


def launches(call: Call, config: tuning.Config | None) -> list[Launch]:
    """What ``call`` launches, with ``config`` if one is given."""
    run = getattr(module_of(call.op), call.op)
    with recording() as found:
        if config is None:
            run(*call.args)
        else:
            with tuning.use(call.op, config):
                run(*call.args)
    return found


def job(launch: Launch, target: int) -> Job:
    """The compilation that ``launch`` needs on ``target``."""
    kernel = launch.kernel
    options = {**launch.options, "debug": bool(kernel.debug), "instrumentation_mode": ""}
    bound, specialization, left = _binder(kernel, target)(**launch.arguments, **options)
    _, signature, constants, attributes = kernel._pack_args(_backend(target), options, bound, specialization, left)
    return Job(kernel.fn.__module__, kernel.fn.__name__, signature, constants, attributes, options, target)


@functools.cache
def _backend(target: int) -> Any:
    from triton.compiler import make_backend

    return make_backend(_gpu(target))


def _gpu(target: int) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", target, 32)


@functools.cache
def _binder(kernel: Any, target: int) -> Any:
    """Triton's own way from arguments to types, constants and divisibility."""
    from triton.runtime.jit import create_function_from_signature

    return create_function_from_signature(kernel.signature, kernel.params, _backend(target))


# --- compiling ------------------------------------------------------------------------------------------------------


def compile(job: Job) -> Compiled:
    """Run the compiler, or find its result in Triton's cache."""
    import triton
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job.module), job.kernel)
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    options = _backend(job.target).parse_options(job.options).__dict__
    found = triton.compile(source, target=_gpu(job.target), options=options)
    return Compiled(found.metadata.shared, "tt.dot" in found.asm["ttir"], found.asm["cubin"])


# Matrix products, bulk copies, wide accesses: what a kernel of this package is expected to show.
_PRODUCTS, _COPIES = ("HGMMA", "HMMA", "UTCHMMA"), ("UTMALDG", "UTMASTG", "LDGSTS.E.BYPASS.128")
_TOLD = (*_PRODUCTS, *_COPIES, "LDG.E.128", "STG.E.128", "LDG", "STG", "BAR")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def usage(cubin: Path) -> Usage:
    """Read machine code with the tools that Triton brings."""
    resources = dict(re.findall(r"(REG|STACK):(\d+)", _tool("-res-usage", cubin)))
    code = _INSTRUCTION.findall(disassembly(cubin))
    return Usage(
        int(resources["REG"]),
        int(resources["STACK"]),
        sum(name.startswith(("STL", "LDL")) for name in code),
        {told: count for told in _TOLD if (count := sum(_is(name, told) for name in code))},
    )


def disassembly(cubin: Path) -> str:
    """The machine code as text."""
    return _tool("-sass", cubin)


def _is(name: str, told: str) -> bool:
    return name == told or name.startswith(told + ".")


def _tool(option: str, cubin: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout


# --- in parallel ----------------------------------------------------------------------------------------------------


def in_parallel(
    work: Callable[..., Any], jobs: Sequence[Job], *args: Any, workers: int, deadline: float = math.inf
) -> Iterator[tuple[Job, Any]]:
    """``(job, work(job, *args))`` in processes of their own, as they are done; none after ``deadline``.

    Args:
        work: a function of a module, which the workers import.
        deadline: of time.monotonic.
    """
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        futures = {pool.submit(work, job, *args): job for job in jobs}
        timeout = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        for future in concurrent.futures.as_completed(futures, timeout):
            yield futures[future], future.result()
    except concurrent.futures.TimeoutError:
        return
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def warm(job: Job) -> str | None:
    """Compile for the cache alone; what went wrong, if anything did."""
    try:
        compile(job)
    except Exception as error:  # whatever the compiler raises: the candidate will not be chosen
        return f"{type(error).__name__}: {error}"
    return None
