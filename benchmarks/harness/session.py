"""One session of pytest: what was measured in it, what was not, and what it says about the machine."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from harness import rows
from harness.protocol import Case, Result
from resnet_fused.cli import ceilings, machine

DEVICE = machine.device("auto")
PEERS = ("triton", "torchvision", "jax", "flax", "onnxruntime", "nvidia-cudnn-frontend")


_MEASURED = ("copy_gb_per_s", "matmul_tflop_per_s", "gpu")  # of machine_info: other figures in every run


class Tape:
    """Hands durations that were measured elsewhere to pytest-benchmark, as its timer."""

    def __init__(self) -> None:
        self._now = 0.0
        self._samples: list[float] = []

    def load(self, samples: tuple[float, ...]) -> None:
        self._samples = list(reversed(samples))

    def now(self) -> float:
        return self._now

    def rewind(self) -> None:
        self._now = 0.0

    def play(self) -> None:
        """Let the next duration pass."""
        self._now = self._samples.pop()


TAPE = Tape()


@dataclass
class Recorder:
    """What was measured in this session, and what was not."""

    budget_s: float | None
    begun: float | None = None
    results: dict[str, dict[str, Result]] = field(default_factory=dict)
    unmeasured: dict[str, tuple[Case, str, str]] = field(default_factory=dict)  # row -> case, implementation, why

    def over(self) -> str | None:
        """Why no further case is measured; None while there is time."""
        if self.begun is None:
            self.begun = time.monotonic()
        if self.budget_s is None or time.monotonic() - self.begun < self.budget_s:
            return None
        return f"beyond --benchmark-budget {self.budget_s:g}"


@functools.cache
def machine_info() -> dict[str, Any]:
    """The device, its clocks and ceilings, and the versions of the peers, "not installed" where they are not."""
    cuda = DEVICE.type == "cuda"
    dtypes = rows.DTYPES if cuda else {torch.float32: "fp32"}
    return machine.describe(DEVICE) | {
        "gpu": _gpu() if cuda else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": {"conv": torch.backends.cudnn.allow_tf32, "matmul": torch.backends.cuda.matmul.allow_tf32},
        "peers": {name: _version(name) for name in PEERS},
        "copy_gb_per_s": ceilings.copy_rate(DEVICE) / 1e9,
        "matmul_tflop_per_s": {name: ceilings.matmul_rate(DEVICE, dtype) / 1e12 for dtype, name in dtypes.items()},
    }


def settle(machine_info: dict[str, Any], compared: dict[str, Any]) -> None:
    """Give ``compared``, an earlier run's, the figures that differ every time: only another machine is told of."""
    compared |= {key: machine_info[key] for key in _MEASURED}
    if isinstance(compared.get("cpu"), dict):
        compared["cpu"] |= {key: value for key, value in machine_info["cpu"].items() if key.startswith("hz_actual")}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> dict[str, Any]:
    known = torch.cuda.get_device_properties(DEVICE)
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    return {
        "name": known.name,
        "capability": f"{known.major}.{known.minor}",
        "memory_bytes": known.total_memory,
        "multiprocessors": known.multi_processor_count,
        "l2_bytes": known.L2_cache_size,
        **dict(zip(fields, _nvidia_smi(fields), strict=True)),
    }


def _nvidia_smi(fields: tuple[str, ...]) -> list[str | None]:
    """The driver's answers with their units; None for each where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={DEVICE.index or 0}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return [None] * len(fields)
    return [answer.strip() for answer in done.stdout.strip().split(",")]
