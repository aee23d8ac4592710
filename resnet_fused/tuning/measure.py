"""Which candidate is fastest for each problem: every one is compared with the reference first, then all are timed."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import backends, config, tuning
from resnet_fused.kernels import module_of
from resnet_fused.ops._op import ops
from resnet_fused.tuning import compile, tables
from resnet_fused.tuning.calls import Call
from resnet_fused.tuning.configs import label

Run = Callable[[], Any]
Timer = Callable[[dict[str, Run]], dict[str, float]]  # medians in us
Report = Callable[[str], None]

# Deviation from the reference, relative to an output's largest value: a few roundings of the dtype.
TOLERANCE = {torch.float32: 2e-4, torch.float16: 6e-3, torch.bfloat16: 4e-2}
# Share of an activation that may deviate further: a value that rounds to the other side of a ReLU's 0 takes its
# gradient with it. A tile that is left out is a greater share.
_FLIPPED = 1e-5


class Problem(NamedTuple):
    """A call, and what the tables know it by."""

    call: Call
    key: Any  # the NamedTuple of the kernel's module


def problems(calls: Iterable[Call]) -> list[Problem]:
    """What there is to choose for ``calls``, each problem once; what others are made of comes first."""
    found: dict[Any, Problem] = {}
    for call in calls:
        if declined(call) is None:
            key = module_of(call.op).problem(call.op, *call.args)
            found.setdefault((call.op, key), Problem(call, key))
    return sorted(found.values(), key=lambda p: (p.call.op.startswith("conv"), p.call.op.endswith("bprop")))


def declined(call: Call) -> str | None:
    """Why there is nothing to choose for ``call``."""
    if "triton" not in backends.implementations(call.op):
        return "there is no Triton kernel"
    reason = backends.unavailable(call.op, "triton", *call.args)
    return reason or (None if hasattr(module_of(call.op), "problem") else "the kernel has no configurations")


def unknown(entry: tables.Entry) -> str | None:
    """What the code does not know of an entry."""
    if "triton" not in backends.implementations(entry.op):
        return f"expected op to have a Triton kernel, got {entry.op!r}"
    module = module_of(entry.op)
    # A stem's files are beside its module.
    beside = [found for name, found in sys.modules.items() if name.startswith(module.__name__)]
    kinds = (kind for found in beside for kind in vars(found).values() if hasattr(kind, "_fields"))
    kind: Any = next((kind for kind in kinds if set(kind._fields) == set(entry.problem)), None)
    if kind is None:
        return f"expected problem to have the fields of a problem of {entry.op}, got {entry.problem}"
    if (entry.config is None) == (entry.backend == "triton" or _chooses(entry.op, entry.backend)):
        return (
            f"expected a configuration for triton and where else there is a choice, got {entry.backend}, {entry.config}"
        )
    if entry.config is None:
        return None
    known = entry.backend == "triton" and entry.config in module.candidates(kind(**entry.problem))
    # What the extension offers depends on the device.
    if not known and not (entry.backend == "cuda" and isinstance(entry.config, tuning.ConvConfig)):
        return f"expected config to be a candidate of {entry.op}, got {label(entry.config)}"
    return None


def _chooses(op: str, backend: str) -> bool:
    """Whether a backend other than Triton has configurations of ``op``."""
    found = backends.implementations(op).get(backend)
    return found is not None and found.candidates is not None


def compile_ahead(found: list[Problem], device: torch.device, workers: int, deadline: float, report: Report) -> None:
    """Compile everything that will be measured on ``device``, in parallel, as far as half of the time allows."""
    major, minor = torch.cuda.get_device_capability(device)
    jobs: dict[str, compile.Job] = {}
    for problem in found:
        for chosen in tuning.fitting(module_of(problem.call.op).candidates(problem.key), device):
            for launch in compile.launches(problem.call, chosen):
                job = compile.job(launch, 10 * major + minor)
                jobs.setdefault(job.key, job)
    now = time.monotonic()
    half = now + (deadline - now) / 2
    done = 0
    for job, error in compile.in_parallel(compile.warm, list(jobs.values()), workers=workers, deadline=half):
        done += 1
        if error is not None:
            report(f"{job.kernel}: {error}")
    report(f"{done} of {len(jobs)} kernels compiled in {time.monotonic() - now:.0f} s")


# --- operands -------------------------------------------------------------------------------------------------------


def operands(call: Call, device: torch.device, seed: int = 0) -> tuple[Any, ...]:
    """Random arguments of the shapes, strides and dtypes of ``call``, the same for the same seed."""
    generator = torch.Generator(device).manual_seed(seed)
    names = [argument.name for argument in ops[call.op].overload._schema.arguments]
    rows = max((a.numel() // a.shape[1] for a in call.args if isinstance(a, Tensor) and a.dim() == 4), default=1024)
    return tuple(_operand(name, a, rows, device, generator) for name, a in zip(names, call.args, strict=True))


def _operand(name: str, like: Any, rows: int, device: torch.device, generator: torch.Generator) -> Any:
    if not isinstance(like, Tensor):
        return list(like) if isinstance(like, tuple) else like
    # What is expanded has one value in memory.
    sizes = [1 if stride == 0 else size for size, stride in zip(like.shape, like.stride(), strict=True)]
    t = torch.empty_strided(sizes, like.stride(), dtype=like.dtype, device=device)
    if like.dtype == torch.uint8:
        t.random_(0, 256, generator=generator)
    elif not like.is_floating_point():
        t.fill_(max(1, rows // like.numel()))  # counts of tiles
    elif like.dim() == 4:
        t.normal_(generator=generator)
        if name == "weight":
            t.mul_(1 / math.sqrt(like[0].numel()))
    else:
        t.uniform_(0.5, 1.5, generator=generator)
    return t.expand(like.shape)


# --- candidates -----------------------------------------------------------------------------------------------------


def candidates(problem: Problem, args: tuple[Any, ...], device: torch.device) -> dict[str, tuple[str, Any, Run]]:
    """``label -> (backend, configuration, call)`` of everything that can run ``problem``, the reference left out."""
    op = problem.call.op
    found: dict[str, tuple[str, Any, Run]] = {}

    def offer(backend: str, configs: Iterable[tuning.Config | None]) -> None:
        run = backends.implementations(op)[backend].run
        for chosen in configs:
            name = backend if chosen is None else label(chosen)
            found[name] = (backend, chosen, functools.partial(_with, op, chosen, run, args))

    for backend in config.BACKENDS:
        if backend in ("triton", "reference") or backends.unavailable(op, backend, *args) is not None:
            continue
        offered = backends.implementations(op)[backend].candidates
        offer(backend, (None,) if offered is None else offered(*args))
    if backends.unavailable(op, "triton", *args) is None:
        offer("triton", tuning.fitting(module_of(op).candidates(problem.key), device))
    return found


def _with(op: str, chosen: tuning.Config | None, run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    with contextlib.nullcontext() if chosen is None else tuning.use(op, chosen):
        return run(*args)


def tolerance(args: tuple[Any, ...]) -> float:
    """Of results from ``args``: their coarsest dtype's; TF32 has the precision of fp16."""
    dtypes = {a.dtype for a in args if isinstance(a, Tensor) and a.dtype in TOLERANCE}
    if dtypes == {torch.float32} and torch.backends.cudnn.allow_tf32:
        return TOLERANCE[torch.float16]
    return max(TOLERANCE[dtype] for dtype in dtypes)


def difference(found: Any, expected: Any, allowed: float) -> str | None:
    """How ``found`` differs from the reference's result; None if it does by ``allowed`` at most."""
    for i, (a, b) in enumerate(zip(_flat(found), _flat(expected), strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {i} is {tuple(a.shape)} {a.dtype}, not {tuple(b.shape)} {b.dtype}"
        if b.numel() == 0:
            continue
        if b.is_floating_point():
            exact = b.float()
            wrong = ~((a.float() - exact).abs() <= allowed * exact.abs().max())
        else:
            wrong = a != b
        share = wrong.float().mean().item()
        if share > (_FLIPPED if b.dim() == 4 or b.dtype == torch.uint8 else 0):
            return f"output {i} is wrong in {share:.2%} of its values"
    return None


def _flat(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


# --- timing ---------------------------------------------------------------------------------------------------------

_ROUNDS = 12
_HOPELESS = 1.5  # a candidate this many times slower than the best of the first rounds is timed no further
_FIRST_ROUNDS = 3


class CudaTimer:
    """Medians of interleaved calls, each with a cold second-level cache, between two events.

    The cache is flushed by a write that takes longer than a call takes to be enqueued, so that no launch is waited for.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flushed = torch.empty(max(4 * cache, 2**29), dtype=torch.uint8, device=device)
        self._device = device

    def __call__(self, runs: dict[str, Run]) -> dict[str, float]:
        for run in runs.values():
            run()
        first = self._rounds(runs, _FIRST_ROUNDS)
        limit = _HOPELESS * min(map(statistics.median, first.values()))
        hopeful = {name: run for name, run in runs.items() if statistics.median(first[name]) <= limit}
        rest = self._rounds(hopeful, _ROUNDS - _FIRST_ROUNDS)
        return {name: statistics.median(times + rest.get(name, [])) for name, times in first.items()}

    def _rounds(self, runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
        names, events = list(runs), dict[str, list[tuple[Any, Any]]]()
        for i in range(rounds):
            for j in range(len(names)):
                name = names[(i + j) % len(names)]
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flushed.zero_()
                start.record()
                runs[name]()
                end.record()
                events.setdefault(name, []).append((start, end))
            torch.cuda.synchronize(self._device)
        return {name: [1e3 * start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


# --- the tuner ------------------------------------------------------------------------------------------------------


def measure(problem: Problem, device: torch.device, timer: Timer, report: Report) -> tables.Entry | None:
    """The entry of one problem; None where nothing gives the right result."""
    op = problem.call.op
    args = operands(problem.call, device)
    with _exactly():
        expected = backends.implementations(op)["reference"].run(*args)
    found = candidates(problem, args, device)
    for name, (*_, run) in list(found.items()):
        wrong = _wrong(run, expected, tolerance(args))
        if wrong is not None:
            report(f"{op} {tuple(problem.key)}: {name}: {wrong}")
            del found[name]
    if not found:
        return None
    us = timer({name: run for name, (*_, run) in found.items()})
    backend, chosen, _ = found[min(us, key=us.__getitem__)]
    return tables.Entry(op, problem.key._asdict(), backend, chosen, {name: round(t, 2) for name, t in us.items()})


def _wrong(run: Run, expected: Any, allowed: float) -> str | None:
    _poison(expected)
    try:
        return difference(run(), expected, allowed)
    except Exception as error:  # what a compiler or a driver raises disqualifies the candidate, too
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _poison(like: Any) -> None:
    """Leave no result in freed memory: outputs that a candidate does not write would be the last one's, and right."""
    for t in [torch.empty_like(t) for t in _flat(like)]:
        t.fill_(math.nan if t.is_floating_point() else 85)


@contextlib.contextmanager
def _exactly() -> Iterator[None]:
    """Without TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def tune(
    found: list[Problem],
    device: torch.device,
    timer: Timer,
    known: tables.Table,
    *,
    deadline: float,
    report: Report,
    save: Callable[[list[tables.Entry]], None],
) -> list[tables.Entry]:
    """Entries of ``known`` and of as many problems as are measured by ``deadline`` (of time.monotonic).

    Problems that ``known`` has come last. What is measured is in force for what comes after it: the two halves of a
    ``bprop`` run as they are fastest.
    """
    entries = {tables.key(entry.op, entry.problem): entry for entry in known.entries}
    todo = sorted(found, key=lambda p: tables.key(p.call.op, p.key._asdict()) in entries)
    for i, problem in enumerate(todo):
        if time.monotonic() >= deadline:
            report(f"out of time: {len(todo) - i} of {len(todo)} problems are not measured")
            break
        with tuning.measured(tables.Table({}, list(entries.values()))):
            entry = measure(problem, device, timer, report)
        if entry is not None:
            entries[tables.key(entry.op, entry.problem)] = entry
            save(list(entries.values()))
            report(f"{i + 1}/{len(todo)} {line(entry)}")
    return list(entries.values())


def line(entry: tables.Entry) -> str:
    """An entry for people: the best first."""
    ranked = sorted(entry.us.items(), key=lambda pair: pair[1])
    times = ", ".join(f"{name} {us:.1f} us" for name, us in ranked[:3])
    return f"{entry.op} {' '.join(map(str, entry.problem.values()))}: {times}"
