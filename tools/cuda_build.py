"""Decides whether the CUDA extension can be built here, builds it with CMake, and records the outcome.

Used by setup.py. Three outcomes, each with its reason, written to `resnet_fused/_build_info.json`:

    built      the extension stands beside the record
    skipped    something needed is missing, or RESNET_FUSED_CUDA=skip; the package is pure Python
    failed     the build was tried and went wrong; the package is pure Python and the record holds the log's last lines

Environment variables:

    RESNET_FUSED_CUDA        auto (default), require: skipped and failed end the installation, skip: never build
    RESNET_FUSED_CUDA_ARCHS  e.g. "80;90a" or "sm_80,sm_90a,120+ptx"; default: this machine's GPUs, else DEFAULT_ARCHS
    CUDA_HOME                the CUDA toolkit, before any other place
    MAX_JOBS                 compilations at a time
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_ARCHS = ("80", "86", "89", "90a", "100", "120+ptx")
OLDEST_ARCH = 80
OLDEST_NVCC = (12, 0)
OLDEST_CMAKE = (3, 24)
USUAL_FOLDERS = ("/usr/local/cuda", "/opt/cuda", "/usr/lib/cuda", "/usr")
RECORD = "_build_info.json"
LOG_LINES = 40

_MODES = ("auto", "require", "skip")
_ARCH = re.compile(r"(?:sm_)?(\d{2,3})([af]?)(\+ptx)?", re.IGNORECASE)


class SkippedError(Exception):
    """The extension cannot be built here; the text completes "skipped because"."""


class FailedError(Exception):
    """The build was tried and failed; the text completes "failed because"."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log.splitlines()[-LOG_LINES:]


@dataclass(frozen=True)
class Toolkit:
    root: Path
    nvcc: Path
    version: str
    supported: frozenset[int]


@dataclass(frozen=True)
class Plan:
    toolkit: Toolkit
    archs: tuple[str, ...]
    cmake: Path
    cmake_version: str
    ninja: Path
    pybind11: Path
    jobs: int
    notes: tuple[str, ...] = field(default=())


# --- what the environment asks for ------------------------------------------------------------------------------------


def read_mode(environ: Mapping[str, str]) -> str:
    mode = environ.get("RESNET_FUSED_CUDA", "") or "auto"
    if mode not in _MODES:
        raise ValueError(f"build: expected RESNET_FUSED_CUDA to be one of {', '.join(_MODES)}, got {mode!r}")
    return mode


def read_jobs(environ: Mapping[str, str]) -> int:
    text = environ.get("MAX_JOBS", "")
    if not text:
        return os.cpu_count() or 1
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"build: expected MAX_JOBS to be a positive integer, got {text!r}")
    return int(text)


def parse_archs(text: str) -> tuple[str, ...]:
    """ "80;sm_90a, 120+PTX" -> ("80", "90a", "120+ptx"), in the order given, without repetitions."""
    archs: list[str] = []
    for item in re.split(r"[;,\s]+", text.strip(";, \t")):
        match = _ARCH.fullmatch(item)
        if match is None or int(match[1]) < OLDEST_ARCH:
            raise ValueError(
                "build: expected RESNET_FUSED_CUDA_ARCHS to list architectures from sm_80 on, "
                f'such as "80;90a" or "sm_80,sm_90a,120+ptx", got {text!r}'
            )
        archs.append(match[1] + match[2].lower() + (match[3] or "").lower())
    return tuple(dict.fromkeys(archs))


def number(arch: str) -> int:
    return int(re.match(r"\d+", arch)[0])  # type: ignore[index]


# --- what this machine has --------------------------------------------------------------------------------------------


def toolkit_roots(environ: Mapping[str, str], which: Callable[..., str | None], usual: Iterable[str]) -> list[Path]:
    """Folders that may be a CUDA toolkit, best first: an `nvcc` on PATH may be a link or a script elsewhere."""
    if environ.get("CUDA_HOME"):
        return [Path(environ["CUDA_HOME"])]
    roots: list[Path] = []
    found = which("nvcc", path=environ.get("PATH"))
    if found:
        roots += [Path(found).parent.parent, Path(found).resolve().parent.parent]
    for folder in map(Path, usual):
        roots.append(folder)
        versions = folder.parent.glob(f"{folder.name}-*")
        roots += sorted(versions, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)], reverse=True)
    return list(dict.fromkeys(roots))


def is_toolkit(root: Path) -> bool:
    """Whether nvcc and the runtime's header are both there; conda puts the headers under targets/<platform>."""
    headers = [root / "include", *root.glob("targets/*/include")]
    return (root / "bin" / "nvcc").is_file() and any((folder / "cuda_runtime.h").is_file() for folder in headers)


def find_toolkit(
    environ: Mapping[str, str],
    which: Callable[..., str | None] = shutil.which,
    usual: Iterable[str] = USUAL_FOLDERS,
) -> Toolkit:
    roots = toolkit_roots(environ, which, usual)
    root = next(filter(is_toolkit, roots), None)
    if root is None:
        if environ.get("CUDA_HOME"):
            raise SkippedError(f"CUDA_HOME={environ['CUDA_HOME']} holds no bin/nvcc with include/cuda_runtime.h")
        raise SkippedError(f"no CUDA toolkit was found (looked in {', '.join(map(str, roots))}); set CUDA_HOME")
    nvcc = root / "bin" / "nvcc"
    match = re.search(r"V(\d+\.\d+\.\d+)", _output([nvcc, "--version"]))
    if match is None:
        raise SkippedError(f"{nvcc} --version states no version")
    if _version(match[1]) < OLDEST_NVCC:
        raise SkippedError(f"nvcc {match[1]} in {root} is older than {'.'.join(map(str, OLDEST_NVCC))}")
    listed = re.findall(r"compute_(\d+)", _output([nvcc, "--list-gpu-arch"]))
    return Toolkit(root, nvcc, match[1], frozenset(map(int, listed)))


def visible_archs(environ: Mapping[str, str], which: Callable[..., str | None] = shutil.which) -> tuple[str, ...]:
    """Architectures of this machine's GPUs as the driver's own tool tells them; empty without a driver."""
    tool = which("nvidia-smi", path=environ.get("PATH"))
    if tool is None:
        return ()
    try:
        answer = _output([tool, "--query-gpu=compute_cap", "--format=csv,noheader"])
    except SkippedError:
        return ()
    numbers = sorted({int(major) * 10 + int(minor) for major, minor in re.findall(r"^(\d+)\.(\d+)\s*$", answer, re.M)})
    return tuple("90a" if n == 90 else str(n) for n in numbers)


def choose_archs(
    environ: Mapping[str, str], toolkit: Toolkit, visible: Callable[[], tuple[str, ...]]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Architectures to build for, and notes on the choice. Asked-for ones must be supported, default ones may drop."""
    text = environ.get("RESNET_FUSED_CUDA_ARCHS", "")
    if text.strip():
        archs = parse_archs(text)
        missing = [arch for arch in archs if number(arch) not in toolkit.supported]
        if missing:
            raise SkippedError(
                f"nvcc {toolkit.version} does not support {_names(missing)}, which RESNET_FUSED_CUDA_ARCHS asks for"
            )
        return archs, ()
    notes: list[str] = []
    archs = visible()
    if archs:
        fit = [arch for arch in archs if number(arch) >= OLDEST_ARCH and number(arch) in toolkit.supported]
        if len(fit) == len(archs):
            return archs, ("built for the GPUs of this machine alone",)
        notes.append(
            f"a GPU of this machine is {_names(set(archs) - set(fit))}, which nvcc cannot target or is too old"
        )
    kept = [arch for arch in DEFAULT_ARCHS if number(arch) in toolkit.supported]
    dropped = [arch for arch in DEFAULT_ARCHS if arch not in kept]
    if not kept:
        raise SkippedError(f"nvcc {toolkit.version} supports none of {_names(DEFAULT_ARCHS)}")
    if dropped:
        notes.append(f"nvcc {toolkit.version} does not support {_names(dropped)}")
        if not any(arch.endswith("+ptx") for arch in kept):
            newest = max((arch for arch in kept if arch.isdecimal()), key=int)
            kept[kept.index(newest)] += "+ptx"
    return tuple(kept), tuple(notes)


def find_tool(name: str, environ: Mapping[str, str], oldest: tuple[int, ...]) -> tuple[Path, str]:
    """A program from PATH or from the folder of this interpreter's scripts, and its version."""
    seen = []
    for path in (environ.get("PATH"), sysconfig.get_path("scripts")):
        found = shutil.which(name, path=path)
        if found is None:
            continue
        match = re.search(r"\d+(?:\.\d+)+", _output([found, "--version"]))
        if match and _version(match[0]) >= oldest:
            return Path(found), match[0]
        seen.append(f"{found} is {match[0] if match else 'of no stated version'}")
    needed = f"{name} {'.'.join(map(str, oldest))} or later"
    raise SkippedError(f"{needed} was not found{': ' if seen else ''}{', '.join(seen)}; pip install {name}")


def find_pybind11() -> Path:
    if importlib.util.find_spec("pybind11") is None:
        raise SkippedError("the Python package pybind11 is not installed; pip install pybind11")
    import pybind11

    return Path(pybind11.get_cmake_dir())


def find_compiler(environ: Mapping[str, str]) -> str:
    names = [environ["CXX"].split()[0]] if environ.get("CXX", "").strip() else ["c++", "g++", "clang++"]
    found = next(filter(None, (shutil.which(name, path=environ.get("PATH")) for name in names)), None)
    if found is None:
        raise SkippedError(f"no C++ compiler was found (looked for {', '.join(names)})")
    return found


def make_plan(environ: Mapping[str, str]) -> Plan:
    if not sys.platform.startswith("linux"):
        raise SkippedError(f"the extension is built on Linux only, not on {sys.platform}")
    toolkit = find_toolkit(environ)
    archs, notes = choose_archs(environ, toolkit, lambda: visible_archs(environ))
    find_compiler(environ)
    cmake, cmake_version = find_tool("cmake", environ, OLDEST_CMAKE)
    ninja, _ = find_tool("ninja", environ, (1, 10))
    return Plan(toolkit, archs, cmake, cmake_version, ninja, find_pybind11(), read_jobs(environ), notes)


# --- building ---------------------------------------------------------------------------------------------------------


def cmake_archs(archs: Iterable[str]) -> str:
    """("80", "120+ptx") -> "80-real;120", where CMake's bare number means machine code and PTX."""
    return ";".join(arch.removesuffix("+ptx") if arch.endswith("+ptx") else f"{arch}-real" for arch in archs)


def compile_extension(
    source: Path, plan: Plan, folder: Path, target: Path, environ: Mapping[str, str]
) -> dict[str, Any]:
    """Configures and builds in `folder`, copies the extension to `target`, returns what CMake says about the build."""
    configure = [
        *(plan.cmake, "-S", source, "-B", folder, "-G", "Ninja"),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_MAKE_PROGRAM={plan.ninja}",
        f"-DCMAKE_CUDA_COMPILER={plan.toolkit.nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={cmake_archs(plan.archs)}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={plan.pybind11}",
    ]
    _keep_only_if_same(folder, "\n".join(map(str, configure)))
    _step(configure, environ, "CMake could not configure the build")
    _step([plan.cmake, "--build", folder, "--parallel", str(plan.jobs)], environ, "the compilation failed")
    binary = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not binary.is_file():
        raise FailedError(f"the build ended without {binary.name}")
    # Not onto the old file: a process that has it mapped would crash.
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy2(binary, target / f"{binary.name}.new")
    os.replace(target / f"{binary.name}.new", target / binary.name)
    return json.loads((folder / "toolchain.json").read_text(encoding="utf-8"))


def _keep_only_if_same(folder: Path, configuration: str) -> None:
    """Objects are kept for the next build only where the same tools and options made them."""
    stamp = folder / "configuration.txt"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != configuration:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stamp.write_text(configuration, encoding="utf-8")


def _step(command: list[Any], environ: Mapping[str, str], reason: str) -> None:
    run = subprocess.run(
        list(map(str, command)), env=dict(environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    sys.stdout.write(run.stdout)
    if run.returncode:
        raise FailedError(f"{reason} (exit status {run.returncode})", run.stdout)


def build(source: Path, package: Path, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Builds into the folder `package` and leaves the record there.

    Raises:
        ValueError: an environment variable holds an unknown value.
        RuntimeError: RESNET_FUSED_CUDA=require and the outcome is not "built".
    """
    mode = read_mode(environ)
    for stale in products(package):
        stale.unlink()
    record: dict[str, Any] = {"outcome": "built", "reason": None}
    try:
        if mode == "skip":
            raise SkippedError("RESNET_FUSED_CUDA=skip asks for it")
        plan = make_plan(environ)
        record |= {
            "nvcc": plan.toolkit.version,
            "toolkit": str(plan.toolkit.root),
            "archs": [f"sm_{arch}" for arch in plan.archs],
            "cmake": plan.cmake_version,
            "notes": list(plan.notes),
        }
        soabi = sysconfig.get_config_var("SOABI")
        record |= compile_extension(source, plan, source / "build" / f"cmake-{soabi}", package, environ)
    except SkippedError as error:
        record |= {"outcome": "skipped", "reason": str(error)}
    except FailedError as error:
        record |= {"outcome": "failed", "reason": str(error), "log": error.log}
    record["soabi"] = sysconfig.get_config_var("SOABI")
    package.mkdir(parents=True, exist_ok=True)
    (package / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if mode == "require" and record["outcome"] != "built":
        log = "\n".join(record.get("log", ()))
        raise RuntimeError(f"RESNET_FUSED_CUDA=require, but {sentence(record)}" + (f"\n{log}" if log else ""))
    return record


def products(package: Path) -> list[Path]:
    """The record and the binary of this Python that an earlier build may have left in `package`."""
    names = (RECORD, f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
    return [package / name for name in names if (package / name).is_file()]


def sentence(record: Mapping[str, Any]) -> str:
    if record["outcome"] == "built":
        notes = "".join(f"; {note}" for note in record["notes"])
        return f"the CUDA extension was built for {', '.join(record['archs'])} with nvcc {record['nvcc']}{notes}"
    outcome = "was skipped" if record["outcome"] == "skipped" else "failed to build"
    return f"the CUDA extension {outcome} because {record['reason']}"


def _names(archs: Iterable[str]) -> str:
    return ", ".join(f"sm_{arch}" for arch in sorted(archs, key=number))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _output(command: list[Any]) -> str:
    try:
        run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SkippedError(f"{command[0]} does not run: {error}") from error
    if run.returncode:
        raise SkippedError(f"{' '.join(map(str, command))} ended with exit status {run.returncode}")
    return run.stdout
