"""One CoopFlow iteration on the CPU, timed by part, with our ops and with plain PyTorch.

    python benchmarks/bench_coop.py [--preset digits-small] [--iterations 30] [--json FILE]

Three columns, same models, same batches, in turns within one process:

- ours: the compiled ops;
- reference: every op from ``coopflow_ext.reference``, noise included (Philox in tensor operations:
  the oracle of the tests, which nobody would run for speed);
- reference, randn: the same with noise from ``torch.randn``, what a user would write.

Times are medians in milliseconds. On a shared machine only ratios mean something.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from harness import Case, Contest, run_pytest

from coopflow_ext import data, ops, reference
from coopflow_ext.coop import TrainConfig, Trainer
from coopflow_ext.samplers import chain

PARTS = ("proposal", "Langevin gradient", "Langevin update", "flow step", "EBM step")


def _in_place(step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``ops.langevin_step_`` from a functional step; masks and statistics as the sampler asks."""

    def langevin_step_(
        x: torch.Tensor,
        grad: torch.Tensor,
        rng: torch.Tensor,
        *,
        active: torch.Tensor | None = None,
        freeze_nonfinite: bool = False,
        frozen_at: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        out = step(x, grad, rng, **kwargs)
        if active is not None:
            if freeze_nonfinite and frozen_at is not None:
                chain.mask_jointly(active, frozen_at, kwargs["step"], (grad,))
            out = torch.where(active.view(-1, *[1] * (x.ndim - 1)), out, x)
        return x.copy_(out)

    return langevin_step_


def _randn_step(x: torch.Tensor, grad: torch.Tensor, rng: torch.Tensor, **kw: Any) -> torch.Tensor:
    return reference.langevin_step(x, grad, rng, **{**kw, "xi": torch.randn_like(x)})


def _randn(shape: tuple[int, ...], rng: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.randn(shape)


def _rand(shape: tuple[int, ...], rng: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.rand(shape)


_COUPLINGS = {
    "affine_coupling": reference.affine_coupling,
    "affine_coupling_inverse": reference.affine_coupling_inverse,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {"affine_coupling": ops.affine_coupling},
    "reference": {
        **_COUPLINGS,
        "normal": reference.normal,
        "uniform": reference.uniform,
        "langevin_step_": _in_place(reference.langevin_step),
    },
    "reference, randn": {
        **_COUPLINGS,
        "normal": _randn,
        "uniform": _rand,
        "langevin_step_": _in_place(_randn_step),
    },
}


@contextmanager
def timed(totals: dict[str, float], owner: Any, name: str, part: str) -> Iterator[None]:
    """Add up the time spent in ``owner.name``."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            totals[part] += time.perf_counter() - begin

    with mock.patch.object(owner, name, call):
        yield


@contextmanager
def timed_updates(totals: dict[str, float], replaced: bool) -> Iterator[None]:
    """Add up the time of the sampler's updates: the compiled op, or what replaces its face."""
    compiled = chain._langevin_step()

    def replacement(x: torch.Tensor, grad: torch.Tensor, rng: torch.Tensor, **raw: Any) -> None:
        clamp = raw.pop("clamp_low", None), raw.pop("clamp_high", None)
        options = {name.removesuffix("_t"): value for name, value in raw.items()}
        ops.langevin_step_(x, grad, rng, clamp=None if clamp[0] is None else clamp, **options)

    step = replacement if replaced else compiled

    def call(*args: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        step(*args, **kwargs)
        totals["Langevin update"] += time.perf_counter() - begin

    with mock.patch.object(chain, "_langevin_step", return_value=call):
        yield


def time_iteration(trainer: Trainer, replacements: dict[str, Any]) -> dict[str, float]:
    """Seconds of each part of the next iteration."""
    totals: dict[str, float] = defaultdict(float)
    with (
        mock.patch.multiple(ops, **replacements),
        timed(totals, trainer.model, "propose", "proposal"),
        timed(totals, trainer, "run_chain", "chain"),
        timed_updates(totals, "langevin_step_" in replacements),
        timed(totals, trainer, "update_flow", "flow step"),
        timed(totals, trainer, "update_energy", "EBM step"),
    ):
        begin = time.perf_counter()
        trainer.train_step()
        totals["whole iteration"] = time.perf_counter() - begin
    totals["Langevin gradient"] = totals.pop("chain") - totals["Langevin update"]
    return dict(totals)


def check_equal(config: TrainConfig, dataset: data.Dataset) -> None:
    """Ours and the reference do the same iteration before anything is timed."""
    ours, theirs = Trainer(config, dataset), Trainer(config, dataset)
    time_iteration(ours, VARIANTS["ours"])
    time_iteration(theirs, VARIANTS["reference"])
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def config_of(preset: str) -> TrainConfig:
    """The preset with every part in every iteration."""
    settings = {"pretrain_steps": 0, "flow_frozen_steps": 0, "warmup_steps": 0, "flow_every": 1}
    return TrainConfig.from_dict({"preset": preset, **settings})


def harness_case(preset: str) -> Case:
    """A whole iteration as a case of the suite, by part; on the CPU, where the parts are serial."""
    config = config_of(preset)

    def build(device: torch.device, with_compile: bool) -> Contest:
        dataset = data.load(config.data)
        trainers = {name: Trainer(config, dataset) for name in VARIANTS}

        def iteration(name: str) -> dict[str, float]:
            seconds = time_iteration(trainers[name], VARIANTS[name])
            return {part.removesuffix(" iteration"): t for part, t in seconds.items()}

        runs = {name: partial(iteration, name) for name in VARIANTS}
        return Contest(runs, lambda: check_equal(config, dataset), by_part=True)

    elements = config.batch_size * 64
    return Case(f"coop/{preset}", build, elements, devices=("cpu",))


SUITE_CASES = (harness_case("digits-small"),)


@pytest.mark.parametrize("case", SUITE_CASES, ids=lambda c: c.name)
def test_iteration(benchmark: Any, case: Case, device: torch.device) -> None:
    run_pytest(benchmark, case, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="digits-small")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = config_of(args.preset)
    dataset = data.load(config.data)
    check_equal(config, dataset)
    trainers = {name: Trainer(config, dataset) for name in VARIANTS}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for i in range(args.iterations + 3):
        for name, trainer in trainers.items():
            seconds = time_iteration(trainer, VARIANTS[name])
            if i >= 3:
                times[name].append(seconds)
    medians = {
        name: {
            part: statistics.median(t[part] for t in rows) for part in (*PARTS, "whole iteration")
        }
        for name, rows in times.items()
    }
    report(args.preset, config, medians)
    if args.json:
        args.json.write_text(json.dumps(medians, indent=2) + "\n")


def report(preset: str, config: TrainConfig, medians: dict[str, dict[str, float]]) -> None:
    print(
        f"{preset}: batch {config.batch_size}, T={config.langevin_steps}; torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads, {platform.processor()}"
    )
    ours = medians["ours"]
    names = list(medians)
    print(f"{'part':<20}" + "".join(f"{name:>18}" for name in names) + f"{'share':>8}{'ratio':>14}")
    for part, seconds in ours.items():
        cells = "".join(f"{medians[name][part] * 1e3:>15.2f} ms" for name in names)
        share = seconds / ours["whole iteration"]
        ratios = " / ".join(f"{medians[name][part] / seconds:.2f}" for name in names[1:])
        print(f"{part:<20}{cells}{share:>8.1%}{ratios:>14}")
    print("share: of our iteration; ratio: reference / ours, then reference with randn / ours")


if __name__ == "__main__":
    main()
