"""JAX as a peer: ResNet-50 in a process of its own, which owns its GPU memory and its compiler.

The process gets the same parameters, images and labels as PyTorch's networks and returns times, and the output or the
loss, which are verified like any other. Its rounds are not interleaved with the others'.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from harness.protocol import Prepared, Unavailable
from harness.rows import DTYPES

if TYPE_CHECKING:
    from harness.networks import ModuleBench

MODEL = "resnet50"
SCRIPT = Path(__file__).with_name("jax_resnet.py")
PYTHON = sys.executable
_TIMEOUT_S = 300


def prepare(bench: ModuleBench) -> Prepared:
    """Times, and the output or loss, of the same network in JAX.

    Raises:
        Unavailable: jax is missing, finds no GPU where PyTorch has one, or fails.
    """
    if PYTHON == sys.executable and importlib.util.find_spec("jax") is None:
        raise Unavailable("jax is not installed")
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()  # the other process needs room
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "network.npz"
        state = {name: t.detach().numpy() for name, t in bench.module.state_dict().items()}
        np.savez(data, images=bench.x.cpu().permute(0, 2, 3, 1).numpy(), **state)
        found = run(data, bench.setting.mode, DTYPES[bench.setting.dtype], bench.device.type)
    result = torch.tensor(found["result"], device=bench.device)
    read = {"loss": result} if bench.setting.training else {"output": result[: bench.few]}
    return Prepared(lambda: read, lambda out: out, found["config"], tuple(found["samples_s"]))


def run(data: Path, mode: str, dtype: str, device: str) -> dict[str, Any]:
    """The document that ``jax_resnet.py`` prints.

    Raises:
        Unavailable: the process failed; the text is its error's first line.
    """
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_PLATFORMS": {"cuda": "cuda", "cpu": "cpu"}[device],
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    command = [PYTHON, str(SCRIPT), str(data), mode, dtype]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"jax took more than {_TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise Unavailable(f"jax failed: {_last_error(done.stderr)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _last_error(stderr: str) -> str:
    """The line of a traceback that names the exception; the last line where there is none."""
    lines = stderr.strip().splitlines() or ["no text"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), lines[-1])[:200]
