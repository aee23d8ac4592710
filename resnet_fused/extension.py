"""Loads the compiled extension `resnet_fused._C`, and says why where there is none.

Importing this module never fails and never imports torch. `module` is the extension or None, `reason` is None or the
sentence that explains its absence. One RuntimeWarning is given where a user would otherwise lose speed without knowing:
an extension that was built and does not load, or a failed build on a machine with an NVIDIA driver.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

_NAME = f"{__package__}._C"
_RECORD = Path(__file__).with_name("_build_info.json")
_FIX = (
    "install again with RESNET_FUSED_CUDA=require (`pip install --no-deps -e .` in a checkout), which either builds "
    "the extension or stops with the compiler's message"
)


def build_info() -> dict[str, Any]:
    """The record that the build left behind.

    Returns:
        dict with `outcome` ("built", "skipped", "failed", or "unknown" where the package was never installed) and
        `reason` (str or None). A built extension adds `archs` (list of str), `nvcc`, `toolkit`, `compiler`, `cmake`,
        `pybind11`, `flags` and `notes`; a failed build adds `log`, the last lines of the build's output.
    """
    try:
        record = json.loads(_RECORD.read_text(encoding="utf-8"))
        outcome, soabi = record["outcome"], record["soabi"]
    except FileNotFoundError:
        return _unknown("no build is recorded: the package was not installed with pip")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return _unknown(f"{_RECORD.name} cannot be read: {error!r}")
    if outcome not in ("built", "skipped", "failed"):
        return _unknown(f"{_RECORD.name} holds the outcome {outcome!r}")
    if soabi != sysconfig.get_config_var("SOABI"):
        return _unknown(f"the recorded build is for another Python, {soabi}")
    return record


def _unknown(reason: str) -> dict[str, Any]:
    return {"outcome": "unknown", "reason": reason}


def _driver_present() -> bool:
    """Whether this machine has an NVIDIA driver: asked of the file system, since torch may not be imported here."""
    return any(os.path.exists(path) for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg"))


def _load() -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec(_NAME) is None:
        record = build_info()
        if record["outcome"] == "built":
            reason = f"{_NAME} was built, but its file is gone; {_FIX}"
            warnings.warn(reason, RuntimeWarning, stacklevel=3)
        elif record["outcome"] == "failed":
            reason = f"{_NAME} failed to build because {record['reason']}; {_FIX}"
            if _driver_present():
                warnings.warn(reason, RuntimeWarning, stacklevel=3)
        elif record["outcome"] == "skipped":
            reason = f"{_NAME} was not built because {record['reason']}"
        else:
            reason = f"{_NAME} is absent and {record['reason']}"
        return None, reason
    try:
        return importlib.import_module(_NAME), None
    except Exception as error:  # whatever a broken binary raises must not take the package down with it
        reason = f"{_NAME} was built but does not load ({type(error).__name__}: {error}); {_FIX}"
        warnings.warn(reason, RuntimeWarning, stacklevel=3)
        return None, reason


module, reason = _load()
