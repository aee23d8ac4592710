"""The C++ tests of csrc, built from CMakeLists.txt and run: host code, and kernels over the emulator."""

from __future__ import annotations

import re
import shutil

import emulated
import pytest

HOST = ("test_merge", "test_geometry")
EMULATED = (
    "test_emulator_mma",
    "test_emulator_sm90",
    "test_emulator_errors",
    "test_emulator_async_errors",
    "test_portable_conv",
    "test_portable_wgrad",
    "test_sm90_conv",
    "test_sm90_wgrad",
)


def passes(output: str) -> None:
    assert re.search(r": [1-9]\d* checks, 0 failures\n$", output), output


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Built with a C++ compiler alone; a warning is an error."""
    lacking = [name for name in ("cmake", "ninja", "c++") if shutil.which(name, path=emulated.PATH) is None]
    if lacking:
        pytest.skip(f"needs {', '.join(lacking)} on PATH")
    folder = tmp_path_factory.mktemp("host")
    options = ["-DRESNET_FUSED_BUILD_EXTENSION=OFF", "-DRESNET_FUSED_BUILD_TESTS=ON"]
    strict = ["-DCMAKE_COMPILE_WARNING_AS_ERROR=ON", "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON"]
    emulated.run("cmake", "-S", emulated.ROOT, "-B", folder, "-G", "Ninja", *options, *strict)
    emulated.run("cmake", "--build", folder)
    return folder


@pytest.mark.parametrize("name", HOST)
def test_on_the_host(name, host):
    passes(emulated.run(host / name))


@pytest.mark.parametrize("name", EMULATED)
def test_in_the_emulator(name):
    passes(emulated.run(emulated.build(name) / name))


def test_no_test_is_forgotten():
    folder = emulated.build()
    listed = emulated.run("ctest", "--test-dir", folder, "-N")
    assert set(re.findall(r"Test +#\d+: (\w+)", listed)) == {*HOST, *EMULATED}
