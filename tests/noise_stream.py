"""The library's noise as raw 32-bit words on standard output, for a battery of tests.

    python tests/noise_stream.py words --fastest element | dieharder -a -g 200
    python tests/noise_stream.py normals --fastest step | dieharder -a -g 200

words: as Philox gives them. normals: the float32 ones of chains, through their distribution
function, which makes uniform numbers of them; the 16 leading bits of each, two to a word, since a
float32 has 24 and its rounding would show in the last of them. A sampler uses noise by (step,
chain, element); ``--fastest`` says which of these varies from one number to the next, since
neighbours in each direction must be independent. Ends when nothing reads any more; with ``--count
FILE`` the bytes written stand there.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor

import coopflow_ext as cf

STEPS, CHAINS, ELEMENTS = 64, 128, 128  # of a block: 4 MiB of words, 2 MiB of normals
DIMS = {"step": 0, "chain": 1, "element": 2}


def words(rng: Tensor, step: int) -> Tensor:
    uniform = cf.ops.uniform((CHAINS, ELEMENTS), rng, step=step, dtype=torch.float64)
    return uniform.mul_(2.0**32).to(torch.uint32)


def halves(rng: Tensor, step: int) -> Tensor:
    normal = cf.ops.normal((CHAINS, ELEMENTS), rng, step=step, dtype=torch.float32)
    uniform = torch.special.erf(normal.double().mul_(2.0**-0.5)).add_(1).mul_(0.5)
    return uniform.mul_(2.0**16).clamp_(max=2.0**16 - 1).to(torch.int32).to(torch.uint16)


def block(kind: str, fastest: str, key: cf.Key) -> memoryview:
    """The numbers of the next steps, in the order asked for."""
    numbers, rng = {"words": words, "normals": halves}[kind], key.tensor()
    cube = torch.stack([numbers(rng, step) for step in range(STEPS)])
    return cube.movedim(DIMS[fastest], -1).contiguous().numpy().data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=("words", "normals"))
    parser.add_argument("--fastest", choices=tuple(DIMS), default="element")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--blocks", type=int, help="how many; default: without end")
    parser.add_argument("--count", type=Path, help="a file for the number of bytes written")
    args = parser.parse_args()
    key, written = cf.Key(args.seed), 0
    try:
        for _ in itertools.islice(itertools.count(), args.blocks):
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
