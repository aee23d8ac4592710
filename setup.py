"""Builds the optional CUDA extension `resnet_fused._C`; everything else stands in pyproject.toml.

What to build is decided in tools/cuda_build.py, and only while `build_ext` runs: importing this file starts
no compiler.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import cuda_build  # noqa: E402


class BuildExtension(build_ext):
    """Runs CMake into the package folder (editable installs) or into the build folder (wheels)."""

    def run(self) -> None:
        package = ROOT / "resnet_fused" if self.inplace else Path(self.build_lib).resolve() / "resnet_fused"
        record = cuda_build.build(ROOT, package)
        print(f"resnet_fused: {cuda_build.sentence(record)}", file=sys.stderr)
        self.built = [] if self.inplace else [str(path) for path in cuda_build.products(package)]

    def get_outputs(self) -> list[str]:
        return getattr(self, "built", [])

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    # Sources are listed in CMakeLists.txt alone; the entry tells setuptools that wheels depend on the platform.
    ext_modules=[Extension("resnet_fused._C", sources=[])],
    cmdclass={"build_ext": BuildExtension},
)
