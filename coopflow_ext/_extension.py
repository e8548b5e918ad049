"""Finds and loads the native library, which registers the operators `torch.ops.coopflow.*`."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

from coopflow_ext.errors import BuildError

LIBRARY_NAME = "libcoopflow_ext.so"
_HOW_TO_BUILD = (
    "Build it in the source tree with `pip install --no-build-isolation -e .` (needs a C++17 "
    "compiler, torch >= 2.10, setuptools >= 77, cmake, ninja, scikit-build-core and pybind11; nvcc "
    "for CUDA code), or install a coopflow-ext wheel."
)


def library_path() -> Path:
    """Where the native library is expected: `$COOPFLOW_LIBRARY`, else beside this file."""
    override = os.environ.get("COOPFLOW_LIBRARY")
    return Path(override) if override else Path(__file__).with_name(LIBRARY_NAME)


def load_library() -> Path:
    """Loads the native library once and returns its path.

    Raises:
        BuildError: it is missing or this torch cannot load it; the message says what to do.
    """
    path = library_path()
    if not path.is_file():
        raise BuildError(f"coopflow_ext's native library is missing: {path}. {_HOW_TO_BUILD}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise BuildError(
            f"coopflow_ext's native library {path} does not load beside torch "
            f"{torch.__version__} (torch >= 2.10 is needed): {error}. {_HOW_TO_BUILD}"
        ) from error
    return path


@functools.cache
def native() -> Any:
    """The loaded operators, `torch.ops.coopflow`.

    Raises:
        BuildError: as :func:`load_library`.
    """
    load_library()
    return torch.ops.coopflow
