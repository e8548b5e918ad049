"""What this installation is made of."""

from __future__ import annotations

import json
import platform
from typing import Any

import torch

from coopflow_ext._extension import library_path, native


def build_info() -> dict[str, Any]:
    """Versions, how the native library was built, and the devices that torch finds.

    "CUDA code" says "none" when the library was built without.

    Raises:
        BuildError: the native library is missing; the message says how to build it.
    """
    built = json.loads(native().build_info())
    return {
        "version": built["version"],
        "library": str(library_path()),
        "compiler": built["compiler"],
        "built with torch": built["torch"],
        "CPU instructions": built["cpu_isa"],
        "CUDA code": _cuda_code(built),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "CUDA devices": _devices(),
    }


def _cuda_code(built: dict[str, str]) -> str:
    if not built["cuda_architectures"]:
        return "none: built without nvcc"
    return f"{built['cuda_architectures']} (CUDA {built['cuda_version']})"


def _devices() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)
