"""Runs one case, or the check of indices, on a build of the emulated kernels.

    run_case.py LIBRARY CASE|indices

Exit status 1 with the first result that differs from the CPU op's; errors of the emulation and of
sanitizers end the process in their own ways.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

from cuda_emulation.cases import BFLOAT16_TOLERANCE, CASES, COVERING_SHAPES, Inputs
from cuda_emulation.harness import FAR_BLOCKS, Emulation


def main(library: str, case: str) -> str:
    emulation = Emulation(Path(library))
    if case == "indices":
        with emulation.settings(blocks=FAR_BLOCKS):
            return emulation.wrong_index()
    for shape in (*COVERING_SHAPES, (9, 1031)):
        for inputs in (
            functools.partial(Inputs, torch.float32, shape),
            functools.partial(Inputs, torch.float32, shape, aligned=False),
            functools.partial(Inputs, torch.float32, shape, alone=1),
        ):
            with emulation.ops():
                results = CASES[case](inputs())
            for key, expected in CASES[case](inputs()).items():
                tolerances = (BFLOAT16_TOLERANCE,) * 2 if "(bfloat16)" in key else (1e-5, 1e-8)
                if not torch.allclose(results[key], expected, *tolerances, equal_nan=True):
                    return f"{case}, {shape}: {key}: {results[key]} is not {expected}"
    return ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) or 0)
