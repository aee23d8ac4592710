"""The extension's 3x3 kernels on the CPU: the module ``_emulated``, built once into build/emulated."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / f"emulated-{sysconfig.get_config_var('SOABI')}"
PATH = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])


@functools.cache
def cuda_build() -> ModuleType:
    """tools/cuda_build.py, which knows where toolkits are."""
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "tools" / "cuda_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_build"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(*command: object) -> str:
    """The output of a command of the build; a failure shows it."""
    environ = {**os.environ, "PATH": PATH}
    done = subprocess.run(list(map(str, command)), env=environ, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout


@functools.cache
def missing() -> str | None:
    """What a build of the kernels for the CPU needs and is not there."""
    lacking = [name for name in ("cmake", "ninja", "c++") if shutil.which(name, path=PATH) is None]
    if lacking:
        return f"needs {', '.join(lacking)} on PATH"
    try:
        cuda_build().find_toolkit(os.environ)
        cuda_build().find_pybind11()
    except cuda_build().SkippedError as error:
        return f"the emulated kernels were not built because {error}"
    return None


def build(*targets: str) -> Path:
    """Build targets of CMakeLists.txt that need the emulator, and give the folder; skip the test where that cannot be.

    Whoever comes first builds, the others wait.
    """
    if missing() is not None:
        pytest.skip(str(missing()))
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        options = {
            "RESNET_FUSED_BUILD_EXTENSION": "OFF",
            "RESNET_FUSED_BUILD_TESTS": "ON",
            "CUDAToolkit_ROOT": cuda_build().find_toolkit(os.environ).root,
            "pybind11_DIR": cuda_build().find_pybind11(),
            "Python_EXECUTABLE": sys.executable,
        }
        run("cmake", "-S", ROOT, "-B", FOLDER, "-G", "Ninja", *(f"-D{name}={value}" for name, value in options.items()))
        if targets:
            run("cmake", "--build", FOLDER, "--target", *targets)
    return FOLDER


@functools.cache
def _built() -> ModuleType | Exception:
    """The module, or why there is none: nobody builds again what has failed."""
    try:
        path = build("_emulated") / f"_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    except Exception as error:
        return error
    spec = importlib.util.spec_from_file_location("_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def module() -> ModuleType:
    """The module; the test is skipped where it cannot be built."""
    if missing() is not None:
        pytest.skip(str(missing()))
    found = _built()
    if isinstance(found, Exception):
        raise found
    return found
