"""The build: what is decided from environment and machine, its three outcomes, and what the built binary holds."""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import emulated
import pytest

from resnet_fused import extension

ROOT = emulated.ROOT
BINARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


cuda_build = emulated.cuda_build()


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake_toolkit(
    root: Path, version: str = "13.0.88", archs: str = "80 86 89 90 100 120", include: str = "include"
) -> Path:
    listed = "\\n".join(f"compute_{arch}" for arch in archs.split())
    script(
        root / "bin" / "nvcc",
        f'case "$1" in --version) echo "Cuda compilation tools, V{version}";; '
        f'--list-gpu-arch) printf "{listed}\\n";; *) echo "fake nvcc: no" >&2; exit 3;; esac',
    )
    (root / include).mkdir(parents=True)
    (root / include / "cuda_runtime.h").touch()
    return root


def toolkit(*archs: int):
    return cuda_build.Toolkit(Path("/t"), Path("/t/bin/nvcc"), "13.0.88", frozenset(archs))


# --- environment variables --------------------------------------------------------------------------------------------


def test_mode_is_one_of_three():
    assert cuda_build.read_mode({}) == cuda_build.read_mode({"RESNET_FUSED_CUDA": ""}) == "auto"
    for mode in ("auto", "require", "skip"):
        assert cuda_build.read_mode({"RESNET_FUSED_CUDA": mode}) == mode
    with pytest.raises(ValueError) as caught:
        cuda_build.read_mode({"RESNET_FUSED_CUDA": "yes"})
    assert str(caught.value) == "build: expected RESNET_FUSED_CUDA to be one of auto, require, skip, got 'yes'"


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_jobs_are_a_positive_integer(text):
    assert cuda_build.read_jobs({"MAX_JOBS": "3"}) == 3
    assert cuda_build.read_jobs({}) >= 1
    with pytest.raises(ValueError, match=f"expected MAX_JOBS to be a positive integer, got '{re.escape(text)}'"):
        cuda_build.read_jobs({"MAX_JOBS": text})


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("80", ("80",)),
        ("80;90a", ("80", "90a")),
        ("sm_80,sm_90a", ("80", "90a")),
        (" SM_80 ; 90A;120+PTX;", ("80", "90a", "120+ptx")),
        ("80 80;sm_80", ("80",)),
    ],
)
def test_architectures_are_read_in_every_spelling(text, archs):
    assert cuda_build.parse_archs(text) == archs


@pytest.mark.parametrize("text", ["8.0", "hopper", "80;;x", "75", "90b", ";", "sm80", "1000"])
def test_unknown_architectures_are_refused(text):
    with pytest.raises(
        ValueError, match="expected RESNET_FUSED_CUDA_ARCHS to list architectures from sm_80 on, such as"
    ):
        cuda_build.parse_archs(text)


def test_cmake_spelling_of_architectures():
    assert cuda_build.cmake_archs(("80", "90a", "120+ptx")) == "80-real;90a-real;120"


# --- choice of architectures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "visible", "supported", "archs", "note"),
    [
        ("", (), (80, 86, 89, 90, 100, 120), ("80", "86", "89", "90a", "100", "120+ptx"), None),
        ("", (), (80, 86, 89, 90), ("80", "86", "89+ptx", "90a"), "does not support sm_100, sm_120"),
        ("", ("90a",), (80, 86, 89, 90, 100, 120), ("90a",), "GPUs of this machine alone"),
        ("", ("75",), (75, 80, 86, 89, 90, 100, 120), ("80", "86", "89", "90a", "100", "120+ptx"), "is sm_75"),
        ("", ("130",), (80, 86, 89, 90, 100, 120), ("80", "86", "89", "90a", "100", "120+ptx"), "is sm_130"),
        ("80;90a", ("86",), (80, 90), ("80", "90a"), None),
    ],
)
def test_architectures_asked_for_then_visible_then_default(asked, visible, supported, archs, note):
    chosen, notes = cuda_build.choose_archs({"RESNET_FUSED_CUDA_ARCHS": asked}, toolkit(*supported), lambda: visible)
    assert chosen == archs
    assert (note is None and notes == ()) or note in notes[0]


def test_unsupported_architecture_that_is_asked_for_is_said():
    with pytest.raises(
        cuda_build.SkippedError, match=r"^nvcc 13\.0\.88 does not support sm_120, which RESNET_FUSED_CUDA"
    ):
        cuda_build.choose_archs({"RESNET_FUSED_CUDA_ARCHS": "80;120"}, toolkit(80, 90), tuple)


@pytest.mark.parametrize(
    ("answer", "archs"),
    [
        ('printf "9.0\\n"', ("90a",)),
        ('printf "8.6\\n8.0\\n8.6\\n"', ("80", "86")),
        ("exit 9", ()),
        ("echo '[N/A]'", ()),
    ],
)
def test_visible_gpus_are_asked_of_nvidia_smi(tmp_path, answer, archs):
    script(tmp_path / "nvidia-smi", answer)
    assert cuda_build.visible_archs({"PATH": str(tmp_path)}) == archs


def test_no_nvidia_smi_is_no_gpu(tmp_path):
    assert cuda_build.visible_archs({"PATH": str(tmp_path)}) == ()


# --- where the toolkit is ---------------------------------------------------------------------------------------------


def test_cuda_home_comes_first_and_alone(tmp_path):
    home, other = fake_toolkit(tmp_path / "home"), fake_toolkit(tmp_path / "cuda")
    environ = {"CUDA_HOME": str(home), "PATH": str(other / "bin")}
    assert cuda_build.find_toolkit(environ, usual=[str(other)]).root == home
    environ["CUDA_HOME"] = str(tmp_path / "absent")
    with pytest.raises(
        cuda_build.SkippedError, match=r"CUDA_HOME=.*absent holds no bin/nvcc with include/cuda_runtime\.h"
    ):
        cuda_build.find_toolkit(environ, usual=[str(other)])


def test_nvcc_on_path_names_its_toolkit(tmp_path):
    root = fake_toolkit(tmp_path / "anywhere")
    found = cuda_build.find_toolkit({"PATH": str(root / "bin")}, usual=[])
    assert (found.root, found.version, found.supported) == (root, "13.0.88", frozenset({80, 86, 89, 90, 100, 120}))


def test_link_to_nvcc_leads_to_its_toolkit(tmp_path):
    root = fake_toolkit(tmp_path / "anywhere")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(root / "bin" / "nvcc")
    assert cuda_build.find_toolkit({"PATH": str(tmp_path / "bin")}, usual=[]).root == root


def test_script_in_front_of_nvcc_does_not_hide_the_usual_folders(tmp_path):
    root = fake_toolkit(tmp_path / "cuda")
    script(tmp_path / "bin" / "nvcc", f'exec {root}/bin/nvcc "$@"')
    assert cuda_build.find_toolkit({"PATH": str(tmp_path / "bin")}, usual=[str(root)]).root == root


def test_usual_folder_without_link_takes_the_newest_version(tmp_path):
    for version in ("9.2", "12.8", "13.0"):
        fake_toolkit(tmp_path / f"cuda-{version}")
    assert cuda_build.find_toolkit({"PATH": ""}, usual=[str(tmp_path / "cuda")]).root == tmp_path / "cuda-13.0"


def test_conda_keeps_headers_under_targets(tmp_path):
    root = fake_toolkit(tmp_path / "conda", include="targets/x86_64-linux/include")
    assert cuda_build.find_toolkit({"PATH": str(root / "bin")}, usual=[]).root == root


def test_no_toolkit_says_where_was_looked(tmp_path):
    with pytest.raises(
        cuda_build.SkippedError, match=rf"no CUDA toolkit was found \(looked in {tmp_path}/cuda\); set CUDA_"
    ):
        cuda_build.find_toolkit({"PATH": str(tmp_path)}, usual=[str(tmp_path / "cuda")])


def test_old_nvcc_is_said(tmp_path):
    root = fake_toolkit(tmp_path, version="11.8.89")
    with pytest.raises(cuda_build.SkippedError, match=r"nvcc 11\.8\.89 in .* is older than 12\.0"):
        cuda_build.find_toolkit({"CUDA_HOME": str(root)})


def test_old_cmake_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_build.sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    script(tmp_path / "cmake", "echo cmake version 3.18.4")
    with pytest.raises(
        cuda_build.SkippedError, match=r"cmake 3\.24 or later was not found: .*cmake is 3\.18\.4; pip install"
    ):
        cuda_build.find_tool("cmake", {"PATH": str(tmp_path)}, (3, 24))


def test_missing_compiler_is_said(tmp_path):
    with pytest.raises(
        cuda_build.SkippedError, match=r"no C\+\+ compiler was found \(looked for c\+\+, g\+\+, clang\+\+\)"
    ):
        cuda_build.find_compiler({"PATH": str(tmp_path)})


def test_importing_setup_starts_no_process():
    """`setup.py --version` and editors import setup.py: no compiler may run then."""
    code = (
        "import subprocess, runpy, sys; subprocess.Popen = None; sys.argv = ['setup.py', '--version'];"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    environ = {**os.environ, "CUDA_HOME": "/nowhere", "RESNET_FUSED_CUDA": "require"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", run.stdout.split()[-1])


# --- the three outcomes -----------------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path):
    """A machine with a toolkit and tools that only pretend: environment, package folder, and a stale earlier build."""
    fake_toolkit(tmp_path / "cuda")
    binary = tmp_path / "source" / "build" / f"cmake-{sysconfig.get_config_var('SOABI')}"
    script(
        tmp_path / "bin" / "cmake",
        'case "$1" in --version) echo cmake version 3.31.0;; '
        f"--build) echo compiling; echo fresh > {binary / BINARY};; "
        f"""*) echo '{{"compiler": "GNU 12", "pybind11": "3.1.0", "flags": "-O3"}}' > {binary}/toolchain.json;; esac""",
    )
    script(tmp_path / "bin" / "ninja", "echo 1.11.1")
    script(tmp_path / "bin" / "c++", "exit 0")
    package = tmp_path / "source" / "resnet_fused"
    package.mkdir(parents=True)
    (package / BINARY).write_text("stale")
    (package / "_build_info.json").write_text("stale")
    path = os.pathsep.join([str(tmp_path / "bin"), "/usr/bin", "/bin"])
    environ = {"PATH": path, "CUDA_HOME": str(tmp_path / "cuda"), "RESNET_FUSED_CUDA_ARCHS": "80;90a"}
    return environ, package


def build(machine, **changed):
    environ, package = machine
    record = cuda_build.build(package.parent, package, {**environ, **changed})
    assert json.loads((package / "_build_info.json").read_text()) == record
    return record


def test_built(machine):
    record = build(machine)
    assert (machine[1] / BINARY).read_text() == "fresh\n"
    assert record == {
        "outcome": "built",
        "reason": None,
        "nvcc": "13.0.88",
        "toolkit": machine[0]["CUDA_HOME"],
        "archs": ["sm_80", "sm_90a"],
        "cmake": "3.31.0",
        "notes": [],
        "compiler": "GNU 12",
        "pybind11": "3.1.0",
        "flags": "-O3",
        "soabi": sysconfig.get_config_var("SOABI"),
    }
    assert cuda_build.sentence(record) == "the CUDA extension was built for sm_80, sm_90a with nvcc 13.0.88"
    assert build(machine) == record  # nothing in it that differs from run to run


def test_skipped_because_asked_leaves_no_stale_binary(machine):
    record = build(machine, RESNET_FUSED_CUDA="skip")
    assert (record["outcome"], record["reason"]) == ("skipped", "RESNET_FUSED_CUDA=skip asks for it")
    assert not (machine[1] / BINARY).exists()


def test_skipped_because_no_toolkit(machine, tmp_path):
    record = build(machine, CUDA_HOME=str(tmp_path / "absent"))
    assert record["outcome"] == "skipped"
    assert "holds no bin/nvcc" in record["reason"]
    assert not (machine[1] / BINARY).exists()


def test_required_but_skipped_ends_the_installation(machine, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"^RESNET_FUSED_CUDA=require, but the CUDA extension was skipped because CUDA_HO"
    ):
        build(machine, CUDA_HOME=str(tmp_path / "absent"), RESNET_FUSED_CUDA="require")


def test_failing_compile_is_recorded_with_the_log(machine, tmp_path):
    script(
        tmp_path / "bin" / "cmake",
        'case "$1" in --version) echo cmake version 3.31.0;; '
        '--build) seq 100; echo "finalize.cu(7): error" >&2; exit 2;; esac',
    )
    record = build(machine)
    assert (record["outcome"], record["reason"]) == ("failed", "the compilation failed (exit status 2)")
    assert record["log"][-1] == "finalize.cu(7): error"
    assert len(record["log"]) == cuda_build.LOG_LINES
    assert not (machine[1] / BINARY).exists()
    with pytest.raises(
        RuntimeError, match=r"(?s)but the CUDA extension failed to build because .*finalize\.cu\(7\): error$"
    ):
        build(machine, RESNET_FUSED_CUDA="require")


def test_failing_nvcc_is_recorded_with_the_log(machine, tmp_path):
    """The real CMake, and an nvcc that refuses to compile."""
    cmake = shutil.which("cmake") or shutil.which("cmake", path=sysconfig.get_path("scripts"))
    if cmake is None or not (shutil.which("ninja") and shutil.which("c++")):
        pytest.skip("needs cmake, ninja and a C++ compiler on PATH")
    for name in ("cmake", "ninja", "c++"):
        (tmp_path / "bin" / name).unlink()
    shutil.copytree(ROOT / "csrc", tmp_path / "source" / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path / "source")
    record = build(machine, PATH=os.pathsep.join([str(Path(cmake).parent), os.environ["PATH"]]))
    assert record["outcome"] == "failed"
    assert record["reason"].startswith("CMake could not configure the build (exit status ")
    assert any("fake nvcc: no" in line or "nvcc" in line for line in record["log"])


@pytest.mark.parametrize("variable", ["RESNET_FUSED_CUDA", "RESNET_FUSED_CUDA_ARCHS", "MAX_JOBS"])
def test_unknown_values_end_the_installation(machine, variable):
    with pytest.raises(ValueError, match=f"^build: expected {variable} to"):
        build(machine, **{variable: "what"})


# --- the code itself --------------------------------------------------------------------------------------------------


def _cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton's package carries."""
    spec = importlib.util.find_spec("triton")
    carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else None
    return shutil.which("cuobjdump") or (carried and shutil.which("cuobjdump", path=str(carried)))


@pytest.fixture(scope="module")
def sass():
    """Per (architecture, kernel): the machine code that the built extension holds."""
    if extension.module is None:
        pytest.skip(extension.reason)
    tool = _cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of Triton's package")
    archs = [arch.removesuffix("+ptx") for arch in extension.build_info()["archs"]]
    kernels = {}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for arch, dump in zip(archs, pool.map(functools.partial(_dump, tool), archs), strict=True):
            for line in dump.splitlines():
                if found := re.search(r"Function : (\S+)", line):
                    kernels[arch, found[1]] = code = []
                elif kernels:
                    code.append(line)
    return {key: "\n".join(code) for key, code in kernels.items()}


def _dump(tool: str, arch: str) -> str:
    command = [tool, "-sass", "-arch", arch, extension.module.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_recorded_architecture_has_every_kernel(sass):
    for arch in {arch.removesuffix("+ptx") for arch in extension.build_info()["archs"]}:
        names = [kernel for of, kernel in sass if of == arch]
        assert sum("finalize_kernel" in name for name in names) == 2  # int32 counts of tiles, int64 counts of slices
        assert sum("merge_slices_kernel" in name for name in names) == 1


PORTABLE, HOPPER = ("14conv3x3_kernel", "12wgrad_kernel"), ("19sm90_conv3x3_kernel", "17sm90_wgrad_kernel")  # mangled


def test_convolutions_multiply_and_copy_with_the_instructions_of_their_chip(sass):
    """mma.sync and cp.async everywhere, and wgmma, with the bulk copy engine, on sm_90a alone."""
    types = {f"4TypeE{i}E" for i in range(4)}  # fp16, bf16, fp32, tf32
    for arch in {arch for arch, _ in sass}:
        codes = {kernel: code for (of, kernel), code in sass.items() if of == arch}
        for name in PORTABLE:
            found = {kernel: code for kernel, code in codes.items() if name in kernel}
            assert {t for t in types if any(t in kernel for kernel in found)} == types, (arch, name)
            assert all("HMMA." in code and "LDGSTS" in code for code in found.values()), (arch, name)
            assert not any("HGMMA" in code for code in found.values())
        for name in HOPPER:
            found = {kernel: code for kernel, code in codes.items() if name in kernel}
            assert bool(found) == (arch == "sm_90a"), (arch, name)
            assert all("HGMMA" in code for code in found.values()), name
            assert all("UTMALDG" in code for code in found.values()) or "wgrad" in name


def test_kernels_keep_everything_in_registers(sass):
    spilled = [key for key, code in sass.items() if " LDL" in code or " STL" in code]
    assert not spilled
    assert all("LDG" in code for code in sass.values())  # the listing is what it is taken for
