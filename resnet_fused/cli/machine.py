"""What the commands say about the machine they run on."""

from __future__ import annotations

import argparse
import platform
from typing import Any

import torch

from resnet_fused import config
from resnet_fused.cli.output import UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """``--device``, ``--backend`` and ``--seed``."""
    parser.add_argument(
        "--device", default="auto", metavar="DEVICE", help="cpu, cuda or cuda:N (default: the GPU if there is one)"
    )
    parser.add_argument(
        "--backend", default="auto", choices=("auto", *config.BACKENDS), help="force one backend (default: auto)"
    )


def device(name: str) -> torch.device:
    """The device of ``--device``.

    Raises:
        UsageError: it does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"argument --device: expected cpu, cuda or cuda:N, got {name!r}")
    if found.type == "cuda":
        if not torch.cuda.is_available():
            raise UsageError(
                f"argument --device: expected a GPU that torch can use for {name!r}, got none; use --device cpu"
            )
        if (found.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"argument --device: expected an index below {torch.cuda.device_count()}, got {name!r}")
    return found


def cpu_name() -> str:
    """The CPU's model as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def describe(where: torch.device) -> dict[str, Any]:
    """Device, threads and torch for the header of a measurement."""
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else cpu_name()
    return {"device": str(where), "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def sentence(where: torch.device) -> str:
    """:func:`describe` for people."""
    known = describe(where)
    threads = f", {known['threads']} threads" if where.type == "cpu" else ""
    return f"{known['name']} ({known['device']}{threads}), torch {known['torch']}"
