"""One CoopFlow iteration by part, with our ops and with plain PyTorch.

    pytest benchmarks/bench_coop.py --benchmark-only [--device cuda]
    python benchmarks/suite.py --case 'coop/*'

Contestants, same models, same batches:

- ours: the compiled ops;
- reference: couplings, noise and updates from ``coopflow_ext.reference`` (Philox in tensor
  operations: the oracle of the tests, which nobody would run for speed; on the CPU only), and the
  operators of the networks and the published inverse of the mixture from ``plain.py``;
- reference, randn: the same with noise from ``torch.randn``, what a user would write.

On CUDA ours captures its chain, so that the chain is one part there, and its flow's sampling; the
references run theirs operator by operator. Parts are waited for.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import plain
import torch
from harness import NOT_COMPILED, OURS, Case, Contest, run_pytest, synchronize

from coopflow_ext import data, ops, reference
from coopflow_ext.coop import TrainConfig, Trainer
from coopflow_ext.samplers import LangevinSampler, chain

LOW: dict[str, Any] = {"precision": "bfloat16", "flow_precision": "bfloat16"}
BY_OPERATOR = "ours, operator by operator"
LOW_PRECISION, LOW_COMPILED = "ours, bfloat16", "ours, bfloat16, compiled"


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
    return torch.randn(shape, device=rng.device)


def _rand(shape: tuple[int, ...], rng: torch.Tensor, **_: Any) -> torch.Tensor:
    return torch.rand(shape, device=rng.device)


_COUPLINGS = {
    "affine_coupling": reference.affine_coupling,
    "affine_coupling_inverse": reference.affine_coupling_inverse,
    "mixture_logistic_coupling": reference.mixture_logistic_coupling,
    "mixture_logistic_coupling_inverse": plain.mixture_logistic_coupling_inverse,
}


def _networks(uniform: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """Their operators in plain PyTorch, with masks from this."""
    return {
        "attention": partial(plain.attention, uniform=uniform),
        "concat_elu": partial(plain.concat_elu, uniform=uniform),
        "gate_add_norm": plain.gate_add_norm,
        "weight_norm": plain.weight_norm,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {"affine_coupling": ops.affine_coupling},
    "reference": {
        **_COUPLINGS,
        **_networks(reference.uniform),
        "normal": reference.normal,
        "uniform": reference.uniform,
        "langevin_step_": _in_place(reference.langevin_step),
    },
    "reference, randn": {
        **_COUPLINGS,
        **_networks(_rand),
        "normal": _randn,
        "uniform": _rand,
        "langevin_step_": _in_place(_randn_step),
    },
}


@contextmanager
def timed(
    totals: dict[str, float], owner: Any, name: str, part: str, device: torch.device
) -> Iterator[None]:
    """Add up the time spent in ``owner.name``."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            synchronize(device)
            totals[part] += time.perf_counter() - begin

    with mock.patch.object(owner, name, call):
        yield


def _by_the_face(
    self: ops.BoundStep, x: torch.Tensor, rng: torch.Tensor, **replaced: Any
) -> Callable[[torch.Tensor, int], None]:
    """The sampler's bound step as calls of ``ops.langevin_step_``, whatever stands there."""

    def move(grad: torch.Tensor, step: int) -> None:
        options = self.at(step, **replaced).items()
        given = {name: value for name, value in options if value is not None}
        ops.langevin_step_(x, grad, rng, **given)

    return move


@contextmanager
def timed_updates(totals: dict[str, float], replaced: bool) -> Iterator[None]:
    """Add up the time of the sampler's updates, by the compiled ops or by what replaces them."""
    update = chain.Chain.update

    def call(self: chain.Chain, *args: Any, **kwargs: Any) -> None:
        begin = time.perf_counter()
        update(self, *args, **kwargs)
        totals["Langevin update"] += time.perf_counter() - begin

    with (
        mock.patch.object(chain.Chain, "update", call),
        mock.patch.object(ops.BoundStep, "in_place", _by_the_face) if replaced else nullcontext(),
    ):  # fmt: skip
        yield


@contextmanager
def _without_graphs(trainer: Trainer) -> Iterator[None]:
    """Chains as loops, and the flow's passes operator by operator, as plain PyTorch has them."""
    with (
        mock.patch.object(LangevinSampler, "_can_capture", return_value=False),
        mock.patch.object(trainer.model.flow, "cuda_graph", False),
    ):
        yield


def time_iteration(trainer: Trainer, variant: str) -> tuple[dict[str, float], Any]:
    """Seconds of each part of the next iteration, and its numbers."""
    totals: dict[str, float] = defaultdict(float)
    replacements, device = VARIANTS[variant], trainer.device
    with (
        mock.patch.multiple(ops, **replacements),
        nullcontext() if variant == OURS else _without_graphs(trainer),
        timed(totals, trainer.model, "propose", "proposal", device),
        timed(totals, trainer, "run_chain", "Langevin", device),
        nullcontext() if trainer.device.type == "cuda" and variant == OURS
        else timed_updates(totals, "langevin_step_" in replacements),
        timed(totals, trainer, "update_flow", "flow step", device),
        timed(totals, trainer, "update_energy", "EBM step", device),
    ):  # fmt: skip
        begin = time.perf_counter()
        metrics = trainer.train_step()
        synchronize(device)
        totals["whole"] = time.perf_counter() - begin
    if device.type == "cpu":
        totals["Langevin gradient"] = totals.pop("Langevin") - totals["Langevin update"]
    else:  # a loop's update is not waited for, and a graph has no parts
        totals.pop("Langevin update", None)
    return dict(totals), metrics


def check_equal(config: TrainConfig, dataset: data.Dataset, device: torch.device) -> None:
    """Ours and the reference do the same iteration before anything is timed.

    On the CPU to the same weights. On CUDA the published bisection moves proposals by more than
    rounding, and Adam's first step makes a sign of each gradient: there by the iteration's numbers.
    """
    ours, theirs = (Trainer(config, dataset, device) for _ in range(2))
    _, our_numbers = time_iteration(ours, OURS)
    _, numbers = time_iteration(theirs, "reference")
    for name, value in numbers.items():
        torch.testing.assert_close(
            our_numbers[name], value, rtol=1e-2, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    if device.type == "cpu":
        for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def config_of(preset: str, **settings: Any) -> TrainConfig:
    """The preset with every part in every iteration, and each part by itself."""
    always = {"pretrain_steps": 0, "flow_frozen_steps": 0, "warmup_steps": 0, "flow_every": 1,
              "cuda_graph": False}  # fmt: skip
    return TrainConfig.from_dict({"preset": preset, **always, **settings})


def case(preset: str, event_shape: tuple[int, ...], *, device: str, **settings: Any) -> Case:
    """A whole iteration as a case of the suite, by part."""
    config = config_of(preset, **settings)
    names = [n for n in VARIANTS if device == "cpu" or n != "reference"]

    def build(device: torch.device, with_compile: bool) -> Contest:
        dataset = data.load(config.data)
        trainers = {name: Trainer(config, dataset, device) for name in names}
        runs = {n: partial(lambda n: time_iteration(trainers[n], n)[0], n) for n in names}
        return Contest(
            runs,
            lambda: check_equal(config, dataset, device),
            own_memory=frozenset([OURS] if device.type == "cuda" else []),
            by_part=True,
        )

    elements = config.batch_size * math.prod(event_shape)
    return Case(f"coop/{preset}", build, elements, devices=(device,))


def graph_case(
    preset: str,
    event_shape: tuple[int, ...],
    *,
    device: str = "cuda",
    cuda_graph: bool = True,
    **settings: Any,
) -> Case:
    """A whole iteration as one CUDA graph, in half precision and compiled too, beside the same step
    by step and the reference."""
    steps = config_of(preset, **settings)
    captured = replace(steps, cuda_graph=cuda_graph)

    def build(device: torch.device, with_compile: bool) -> Contest:
        dataset = data.load(steps.data)
        configs = {OURS: captured, BY_OPERATOR: steps, LOW_PRECISION: replace(captured, **LOW)}
        if with_compile:
            configs[LOW_COMPILED] = replace(captured, **LOW, compile=True)
        ours = {name: Trainer(config, dataset, device) for name, config in configs.items()}
        theirs = Trainer(steps, dataset, device)

        def check() -> None:
            found = {}
            for name, trainer in ours.items():
                for _ in range(5):  # the last two of which are replays
                    found[name] = trainer.train_step()
            for number, expected in found[BY_OPERATOR].items():
                torch.testing.assert_close(found[OURS][number], expected, rtol=1e-2, atol=1e-3)
                for name, numbers in found.items():
                    assert numbers[number].isfinite(), f"{name}: {number} is {numbers[number]}"

        runs = {name: trainer.train_step for name, trainer in ours.items()}
        runs["reference, randn"] = partial(time_iteration, theirs, "reference, randn")
        missing = {} if with_compile else {LOW_COMPILED: NOT_COMPILED}
        graphs = frozenset(configs) - {BY_OPERATOR}
        return Contest(runs, check, missing=missing, own_memory=graphs)

    elements = steps.batch_size * math.prod(event_shape)
    return Case(f"coop/{preset}, one graph", build, elements, devices=(device,))


# The paper's networks and settings, batch 28, on images that come with a package. Without their
# clamp of the CDF the published bisection ends where float32 has no CDF left.
PAPER: dict[str, Any] = {"data": "patches", "flow_options": {"legacy_cdf_clamp": True}}
SUITE_CASES = (
    case("digits-small", (1, 8, 8), device="cpu"),
    case("cifar10", (3, 32, 32), device="cuda", **PAPER),
    graph_case("cifar10", (3, 32, 32), **PAPER),
)


def test_iteration(benchmark: Any, case: Case, device: torch.device) -> None:
    run_pytest(benchmark, case, device)
