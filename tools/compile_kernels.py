"""Compile the Triton kernels for GPUs that need not be here, and tell what the machine code needs and does.

    python tools/compile_kernels.py --ops conv1x1_fprop --targets 90
    python tools/compile_kernels.py --ops bn_add_relu_forward,bn_add_relu_reduce --models resnet50 --sass /tmp/sass
    python tools/compile_kernels.py --models sample --once --dtype fp32 --batch 3 --size 75

Every configuration of every call of the models (training and inference) is compiled once for each target, in parallel;
with --once each configuration of a kernel for its first shape alone. One line for each kernel and configuration on
stderr; with --json FILE (- for stdout) everything as JSON. Exit code 1 where something does not compile or breaks a
limit: the shared memory that the configuration states (on targets that have less it is not offered), and on sm_90 no
spilled register. No GPU is used; TRITON_INTERPRET must not be set. Results stay in Triton's cache (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import resnet_fused
from resnet_fused.tuning import calls, compile, configs

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # that a program may have


def sample() -> nn.Module:
    """The stem and the first blocks of ResNet-50's first two stages: every kernel, both strides, narrow and wide."""

    def block(inplanes: int, planes: int, stride: int) -> nn.Module:
        down = nn.Sequential(nn.Conv2d(inplanes, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes))
        return resnet_fused.Bottleneck(inplanes, planes, stride, down)

    model = resnet_fused.models.resnet50()
    model.layer1, model.layer2 = block(64, 64, 1), block(256, 128, 2)
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(512, 10)
    return model


def model_calls(models: list[str], batch: int, size: int, dtype: str) -> list[calls.Call]:
    """The calls of training steps and inferences, and what they are made of."""
    found: list[calls.Call] = []
    for name in models:
        build = sample if name == "sample" else getattr(resnet_fused.models, name)
        for train in (True, False):
            found += calls.of_model(build, batch=batch, size=size, dtype=DTYPES[dtype], train=train)
    # Parts first: a kernel is held against the configuration that it was given itself.
    return calls.unique([*(part for call in found for part in calls.parts(call)), *found])


def jobs(found: list[calls.Call], targets: list[int], once: bool) -> Iterator[tuple[compile.Job, dict[str, Any]]]:
    """Every compilation that the calls need, with what it is for; each once."""
    seen: set[Any] = set()
    for call in found:
        if compile.declined(call) is not None:
            continue
        for config in compile.candidates(call) or (None,):
            label = None if config is None else configs.label(config)
            stated = compile.LEAST_KIB if config is None else config.shared
            if stated == 0:
                continue  # it only calls other ops, which are among the calls
            for launch in compile.launches(call, config):
                for target in targets:
                    job = compile.job(launch, target)
                    keys = {job.key, (job.module, job.kernel, label, target) if once else job.key}
                    offered = config is None or configs.runs_on(config, target, SHARED_KIB[target])
                    if offered and not keys & seen:
                        seen |= keys
                        yield job, {"op": call.op, "config": label, "stated_kib": stated}


def work(job: compile.Job, sass: str | None) -> dict[str, Any]:
    """Compile in a worker process."""
    try:
        found = compile.compile(job)
    except Exception as error:  # whatever the compiler raises is the result
        return {"error": f"{type(error).__name__}: {error}"}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(found.cubin)
        used = compile.usage(cubin)
        if sass is not None:
            name = f"{job.kernel}_sm{job.target}_{hashlib.sha256(job.key.encode()).hexdigest()[:8]}.sass"
            Path(sass, name).write_text(f"{job}\n{used}\n{compile.disassembly(cubin)}", encoding="utf-8")
    return {"shared": found.shared, "product": found.product, **used._asdict()}


def broken(row: dict[str, Any]) -> str | None:
    """What is wrong with a compilation."""
    if "error" in row:
        return row["error"].strip().splitlines()[-1]
    if row["shared"] > row["stated_kib"] * 1024:
        return f"{row['shared'] / 1024:.1f} KiB of shared memory, and the configuration states {row['stated_kib']}"
    if row["spills"]:
        return f"{row['spills']} spills, {row['stack']} bytes of stack"
    return None


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    head = f"sm_{row['target']} {row['op']} {row['kernel']} {row['config'] or ''}".rstrip()
    if "error" in row:
        return f"{head}: BROKEN: {row['error']}"
    told = " ".join(f"{name}={count}" for name, count in row["instructions"].items())
    wrong = f"  BROKEN: {row['broken']}" if row["broken"] else ""
    return f"{head}: {row['registers']} registers, {row['spills']} spills, {row['shared']} B shared, {told}{wrong}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="", help="only these, with commas between")
    parser.add_argument("--targets", default="80,90,100", help="compute capabilities (default: 80,90,100)")
    parser.add_argument("--models", default="resnet50,resnet18", help="or sample (default: resnet50,resnet18)")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--once", action="store_true", help="each configuration of a kernel for its first shape alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="worker processes")
    parser.add_argument("--sass", metavar="FOLDER", help="write the machine code of each kernel there")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, - for stdout")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.sass:
        Path(args.sass).mkdir(parents=True, exist_ok=True)
    ops = set(filter(None, args.ops.split(",")))
    found = model_calls(args.models.split(","), args.batch, args.size, args.dtype)
    found = [call for call in found if not ops or call.op in ops]
    todo = {job.key: (job, known) for job, known in jobs(found, [int(t) for t in args.targets.split(",")], args.once)}
    print(f"{len(found)} calls, {len(todo)} compilations", file=sys.stderr)
    rows = []
    for job, result in compile.in_parallel(work, [job for job, _ in todo.values()], args.sass, workers=args.jobs):
        row = {**todo[job.key][1], "kernel": job.kernel, "target": job.target, **result}
        row["broken"] = broken(row)
        rows.append(row)
        print(line(row), file=sys.stderr)
    if args.json == "-":
        print(json.dumps(rows, indent=1))
    elif args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")
    failed = sum(row["broken"] is not None for row in rows)
    print(f"{len(rows)} compiled, {failed} broken", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
