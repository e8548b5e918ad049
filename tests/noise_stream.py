"""The library's noise as raw 32-bit words on standard output, for a battery of tests.

    python tests/noise_stream.py words --fastest element | dieharder -a -g 200
    python tests/noise_stream.py normals --fastest step | dieharder -a -g 200

words: as Philox gives them. normals: through their distribution function, which makes uniform
words of them. A sampler uses them by (step, chain, element); ``--fastest`` says which of these
varies from word to word, since neighbours in each direction must be independent. Ends when nothing
reads any more; with ``--count FILE`` the bytes written stand there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

import coopflow_ext as cf

STEPS, CHAINS, ELEMENTS = 128, 128, 64  # of a block: 4 MiB
DIMS = {"step": 0, "chain": 1, "element": 2}


def uniforms(kind: str, shape: tuple[int, int], rng: Tensor, step: int) -> Tensor:
    if kind == "words":
        return cf.ops.uniform(shape, rng, step=step, dtype=torch.float64)
    return torch.special.ndtr(cf.ops.normal(shape, rng, step=step, dtype=torch.float64))


def block(kind: str, fastest: str, key: cf.Key) -> memoryview:
    """The words of the next steps, in the order asked for."""
    rng = key.tensor()
    cube = torch.stack([uniforms(kind, (CHAINS, ELEMENTS), rng, step) for step in range(STEPS)])
    words = cube.mul_(2.0**32).clamp_(max=2.0**32 - 1).to(torch.uint32)
    return words.movedim(DIMS[fastest], -1).contiguous().numpy().data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=("words", "normals"))
    parser.add_argument("--fastest", choices=tuple(DIMS), default="element")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--blocks", type=int, help="how many of 4 MiB; default: without end")
    parser.add_argument("--count", type=Path, help="a file for the number of bytes written")
    args = parser.parse_args()
    key, written = cf.Key(args.seed), 0
    try:
        while args.blocks is None or written < args.blocks * 4 * STEPS * CHAINS * ELEMENTS:
            written += sys.stdout.buffer.write(block(args.kind, args.fastest, key))
            key = key.advance(STEPS)
            if key.time >= 2**31:
                key = cf.Key(key.seed + 1)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has enough
    finally:
        if args.count:
            args.count.write_text(f"{written}\n")


if __name__ == "__main__":
    main()
