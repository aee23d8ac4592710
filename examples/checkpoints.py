"""Checkpoints: the state of every random number generator, files that are whole or not there, safe loading."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import common
import numpy
import torch

from resnet_fused.cli.output import UsageError

FORMAT = 1


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of Python's, numpy's and torch's generators, in types that ``torch.load(weights_only=True)`` takes."""
    words = numpy.random.get_state(legacy=False)
    key = torch.from_numpy(words["state"]["key"].astype("int64"))
    return {
        "python": random.getstate(),
        "numpy": {**words, "state": {**words["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Undo what has been drawn since :func:`random_state`."""
    random.setstate(state["python"])
    words = state["numpy"]
    key = words["state"]["key"].numpy().astype("uint32")
    numpy.random.set_state({**words, "state": {**words["state"], "key": key}})
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write ``state``; a reader finds the old file or the new one, whatever happens meanwhile."""
    with common.replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())


def load(path: Path) -> dict[str, Any]:
    """What :func:`save` wrote, on the CPU; runs no code from the file.

    Raises:
        UsageError: there is no such file, or it is something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(
            f"argument --resume: expected a checkpoint that can be read, got {path} ({error.strerror})"
        ) from error
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UsageError(f"argument --resume: expected a checkpoint of this script, got {path}") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise UsageError(f"argument --resume: expected a checkpoint of format {FORMAT}, got {found!r} in {path}")
    return state
