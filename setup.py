"""Hands the native build to CMakeLists.txt (through scikit-build-core) and names the wheel."""

from __future__ import annotations

import os

import setuptools

# Without build isolation pip takes whatever is installed, and older ones fail without saying why.
if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit(
        f"coopflow_ext is built with setuptools >= 77, found {setuptools.__version__}: "
        "pip install 'setuptools>=77' cmake ninja scikit-build-core pybind11"
    )

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

# `make` keeps an incremental native build of its own and installs only the Python part.
skip_native = os.environ.get("COOPFLOW_SKIP_NATIVE", "0") == "1"


class BdistWheel(bdist_wheel):
    """Without `_host` nothing depends on the Python version: one wheel serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        if os.environ.get("COOPFLOW_BUILD_HOST", "auto") == "0":
            return "py3", "none", platform
        return python, abi, platform


class BuildPy(build_py):
    """The benchmarks lie at the top level; in an installed package `coopflow bench` finds them."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.packages = [*self.packages, "coopflow_ext._benchmarks"]
        self.package_dir = {**self.package_dir, "coopflow_ext._benchmarks": "benchmarks"}


setuptools.setup(
    cmdclass={"bdist_wheel": BdistWheel, "build_py": BuildPy},
    **({} if skip_native else {"cmake_source_dir": "."}),
)
