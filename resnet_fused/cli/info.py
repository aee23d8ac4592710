"""``info``: versions, GPU, extension, and which backend runs each operation and why not another."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

import torch

import resnet_fused
from resnet_fused import backends, config, extension
from resnet_fused.cli import machine
from resnet_fused.cli.output import Output, table

SUMMARY = "versions, GPU, state of the extension, backend of each operation"
DESCRIPTION = (
    "Show what is installed, which GPU is seen, whether the extension is built, and which backend runs each operation."
)
EXAMPLES = """\
examples:
  %(prog)s                     for people
  %(prog)s --json              for a bug report
"""

_PACKAGES = ("torch", "triton", "torchvision", "timm", "scikit-learn", "matplotlib", "rich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None beside ``--json``."""


def run(args: argparse.Namespace, out: Output) -> int:
    """Print :func:`collect`."""
    found = collect()
    out.emit(found)
    versions = found["versions"]
    out.print(
        table("Versions", ("package", "version"), [(k, v or "not installed") for k, v in versions.items()], left=2)
    )
    out.print(_machine_table(found))
    out.print(_extension_table(found["extension"]))
    out.print(_backend_table(found["backends"]))
    out.print(f"Backend in force: {found['forced']} (RESNET_FUSED_BACKEND, or `use_backend`, forces one).")
    return 0


def collect() -> dict[str, Any]:
    """Everything that ``info`` tells, as plain data."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    versions: dict[str, str | None] = {"resnet_fused": resnet_fused.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "platform": platform.platform(),
        "cpu": {"name": machine.cpu_name(), "count": os.cpu_count(), "threads": torch.get_num_threads()},
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "no_gpu": None if torch.cuda.is_available() else _no_gpu(),
        "cuda": {"torch": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
        "extension": _extension(),
        "device": where.type,
        "forced": backends.forced(),
        "backends": {op: _backends(op, where) for op in backends.operations()},
    }


def _gpu(index: int) -> dict[str, Any]:
    known = torch.cuda.get_device_properties(index)
    return {
        "index": index,
        "name": known.name,
        "capability": f"{known.major}.{known.minor}",
        "memory_bytes": known.total_memory,
        "multiprocessors": known.multi_processor_count,
    }


def _no_gpu() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    told = extension.module.device_info()["error"] if extension.module is not None else None
    return f"torch finds no GPU{f' ({told})' if told else ''}"


def _extension() -> dict[str, Any]:
    module = extension.module
    return {
        "loaded": module is not None,
        "reason": extension.reason,
        "file": None if module is None else module.__file__,
        "build": extension.build_info(),
        "driver": None if module is None else module.device_info(),
    }


def _backends(op: str, where: torch.device) -> dict[str, dict[str, str | None]]:
    """For every backend: chosen, available (a later choice), or unavailable with the reason."""
    first = backends.expected(op, where)
    return {name: _backend(op, name, first, where) for name in config.BACKENDS}


def _backend(op: str, name: str, first: str, where: torch.device) -> dict[str, str | None]:
    found = backends.implementations(op).get(name)
    if found is None:
        return {"status": "unavailable", "reason": "not implemented"}
    if name == first:
        return {"status": "chosen", "reason": None}
    if name in ("cuda", "triton") and where.type != "cuda":
        return {"status": "unavailable", "reason": "no GPU"}
    if name == "cuda" and extension.module is None:
        return {"status": "unavailable", "reason": extension.reason}
    if not found.default:
        return {"status": "available", "reason": "only when forced"}
    return {"status": "available", "reason": None}


# --- tables ---------------------------------------------------------------------------------------------------------


def _machine_table(found: dict[str, Any]) -> Any:
    cpu = found["cpu"]
    rows = [
        ("platform", found["platform"]),
        ("CPU", f"{cpu['name']}, {cpu['count']} cores, torch uses {cpu['threads']} threads"),
        ("CUDA of torch", f"{found['cuda']['torch'] or 'none'}, cuDNN {found['cuda']['cudnn'] or 'none'}"),
    ]
    for gpu in found["gpus"]:
        rows.append(
            (
                f"GPU {gpu['index']}",
                f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory_bytes'] / 2**30:.0f} GiB, "
                f"{gpu['multiprocessors']} multiprocessors",
            )
        )
    if found["no_gpu"]:
        rows.append(("GPU", found["no_gpu"]))
    return table("Machine", ("what", "found"), rows, left=2)


def _extension_table(known: dict[str, Any]) -> Any:
    build = known["build"]
    rows = [
        ("state", f"loaded from {known['file']}" if known["loaded"] else "not loaded"),
        ("build", str(build["outcome"])),
    ]
    if known["reason"]:
        rows.append(("why", known["reason"]))
    for key in ("archs", "nvcc", "toolkit", "compiler", "cmake", "pybind11", "flags", "notes"):
        value = build.get(key)
        if value:
            rows.append((key, ", ".join(value) if isinstance(value, list) else str(value)))
    if known["driver"]:
        version = ".".join(str(part) for part in known["driver"]["driver_version"])
        rows.append(("driver", known["driver"]["error"] or f"CUDA {version}"))
    return table("Extension resnet_fused._C", ("what", "found"), rows, left=2)


def _backend_table(found: dict[str, dict[str, dict[str, str | None]]]) -> Any:
    """One row for each operation, a column for each backend."""

    def cell(entry: dict[str, str | None]) -> str:
        if entry["status"] == "chosen":
            return "[green]chosen[/green]"
        if entry["status"] == "available":
            return entry["reason"] or "available"
        return f"[dim]{entry['reason']}[/dim]"

    rows = [(op, *(cell(entries[name]) for name in config.BACKENDS)) for op, entries in found.items()]
    return table(
        "Backends, in order of preference", ("operation", *config.BACKENDS), rows, left=1 + len(config.BACKENDS)
    )
