"""A value of a wrong type, for any argument of a public function or class that is annotated with a
plain type, is a TypeError or ValueError that names the argument, not an accident further in."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import coopflow_ext as cf
from coopflow_ext import coop, data, diagnostics, energies, flows, metrics, ops
from coopflow_ext.coop.model import EventSpec

# What each annotation does not allow.
WRONG: dict[str, tuple[Any, ...]] = {
    "int": ("a", 1.5, None, (1, 2), True, torch.zeros(3)),
    "int | None": ("a", 1.5, (1, 2), True, torch.zeros(3)),
    "float": ("a", None, (1, 2), True, torch.zeros(3)),
    "float | None": ("a", (1, 2), True, torch.zeros(3)),
    "bool": ("a", None, 2.5, torch.zeros(3)),
    "str": (1.5, None, [3], {}, object()),
    "Tensor": ("a", 1.5, None, object()),
    "Sequence[int]": ("ab", 2, None, object(), (1.5,)),
    "tuple[int, int]": ("ab", 2, None, object(), (1.5, 2)),
    "Sequence[Tensor]": ("ab", 2, None, object(), (1.5,)),
    "Sequence[Sequence[int]]": ("ab", 2, None, (1, 2), ((1.5, 2),)),
    "Key": (0, None, "a", torch.zeros(3, dtype=torch.int64)),
    "Key | None": (0, "a", torch.zeros(3, dtype=torch.int64)),
}


def given() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Each function with arguments that it takes."""
    x, image = torch.randn(4, 2), torch.rand(2, 1, 8, 8)
    rng, key = cf.Key(0).tensor(), cf.Key(0)
    flip, net = flows.Flip(), flows.MLPConditioner(1, 2, (8,))
    digits = data.load("digits")
    flow, energy = flows.realnvp(2, couplings=2, widths=(8,)), energies.MLPEnergy(2, (4,))
    network = {"weights": [torch.randn(8, 2), torch.randn(1, 8)],
               "biases": [torch.zeros(8), torch.zeros(1)], "activation": "silu"}  # fmt: skip
    well = {"energy": "double_well", "numbers": (2.0,)}
    chain = {"x0": x, "rng": rng, "n_steps": 3}
    moves = {**chain, "accept_rng": rng, "step_size": 0.1}
    sampler = cf.LangevinSampler(
        energy, n_steps=4, step_size=0.1, stats=True, return_trajectory=True
    )
    out = sampler(x, key=key)
    heads = {name: torch.randn(1, 1, 4, 8) for name in "qkv"}
    small = {"channels": 8, "blocks": 1, "components": 2, "dequant_components": 2}
    config = coop.TrainConfig(
        data="digits", energy="mlp", langevin_steps=2, flow="glow",
        flow_options={"steps": 1, "channels": 8},
    )  # fmt: skip
    model = coop.CoopFlow.from_config(config, EventSpec((1, 8, 8), 17))
    cases: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (flows.realnvp, {"dim": 4, "couplings": 2, "widths": (8,)}),
        (flows.glow, {"image_shape": (1, 8, 8), "steps": 1, "channels": 8}),
        (flows.flowpp, {"image_shape": (1, 8, 8), **small}),
        (flows.ActNorm, {"channels": 2}),
        (flows.AffineCoupling, {"net": net, "features": 1}),
        (flows.MixtureLogisticCoupling, {"net": net, "features": 1}),
        (flows.ChannelSplit, {}),
        (flows.CheckerboardSplit, {}),
        (flows.VectorSplit, {"mask": torch.tensor([True, False])}),
        (flows.ConvConditioner, {"n_in": 1, "n_out": 2, "width": 8}),
        (flows.MLPConditioner, {"n_in": 1, "n_out": 2}),
        (flows.FlowPPConditioner, {"n_in": 1, "n_out": 2, "size": (4, 4), "channels": 8}),
        (flows.Dequantize, {}),
        (flows.VariationalDequantize, {"transform": flip, "aux_net": nn.Identity()}),
        (flows.Dropout, {"p": 0.1}),
        (flows.Flow, {"transform": flip, "event_shape": (2,)}),
        (flows.Flatten, {"event_shape": (2, 2)}),
        (flows.InvertibleConv1x1, {"channels": 2}),
        (flows.Logit, {}),
        (flows.check_finite, {"params": x}),
        (flow.sample, {"n": 2}),
        (flow.log_prob, {"x": x}),
        (energies.DoubleWellEnergy, {}),
        (energies.FunnelEnergy, {"dim": 2}),
        (energies.GaussianEnergy, {"mean": torch.zeros(2), "covariance": torch.eye(2)}),
        (energies.GaussianMixtureEnergy, {"means": torch.zeros(3, 2)}),
        (energies.MLPEnergy, {"dim": 2}),
        (energies.RastriginEnergy, {}),
        (energies.ResEnergy, {"channels": 1, "width": 4, "image_size": 8}),
        (energies.RosenbrockEnergy, {}),
        (cf.LangevinSampler, {"energy": energy, "n_steps": 3, "step_size": 0.1}),
        (cf.MALASampler, {"energy": energy, "n_steps": 3, "step_size": 0.1}),
        (cf.UnderdampedLangevinSampler, {"energy": energy, "n_steps": 3, "step_size": 0.1}),
        (cf.ReplayBuffer, {"shape": (2,)}),
        (cf.ReplayBuffer((2,)).draw, {"n": 2}),
        (cf.Key, {"seed": 1}),
        (diagnostics.autocorrelation, {"samples": torch.randn(20, 4, 2)}),
        (diagnostics.ess, {"samples": torch.randn(20, 4, 2)}),
        (diagnostics.split_rhat, {"samples": torch.randn(20, 4, 2)}),
        (diagnostics.plot, {"out": out}),
        (diagnostics.to_arviz, {"out": out}),
        (data.load, {"name": "digits"}),
        (data.Batches, {"data": digits, "batch_size": 4, "key": key}),
        (data.permutation, {"n": 4, "key": key}),
        (data.Prefetch, {"batches": data.Batches(digits, 4, key)}),
        (metrics.RunningMoments, {"dim": 2}),
        (metrics.bits_per_dim, {"flow": flow, "x": x, "key": key}),
        (model.sample, {"n": 2}),
        (model.propose, {"n": 2}),
        (model.refine, {"x0": image[:, :, :8]}),
        (ops.attention, {**heads, "rng": rng, "p": 0.1}),
        (ops.concat_elu, {"x": image}),
        (ops.gate_add_norm, {"x": torch.randn(2, 3, 4), "gates": torch.randn(2, 3, 8),
                             "weight": torch.ones(4), "bias": torch.zeros(4)}),
        (ops.langevin_noise_, {"x": x.clone(), "rng": rng, "noise": 0.1}),
        (ops.langevin_step, {"x": x, "grad": x, "rng": rng, "drift": 0.1}),
        (ops.langevin_step_, {"x": x.clone(), "grad": x, "rng": rng, "drift": 0.1}),
        (ops.normal, {"shape": (2, 2), "rng": rng}),
        (ops.uniform, {"shape": (2, 2), "rng": rng}),
        (ops.weight_norm, {"directions": [x], "gains": [torch.ones(4, 1)]}),
        (ops.affine_coupling, {"x": x, "params": torch.randn(4, 2, 2)}),
        (ops.affine_coupling_inverse, {"y": x, "params": torch.randn(4, 2, 2)}),
        (ops.mixture_logistic_coupling, {"x": x, "params": torch.randn(4, 8, 2)}),
        (ops.mixture_logistic_coupling_inverse, {"y": x, "params": torch.randn(4, 8, 2)}),
        (ops.analytic_langevin_chain, {**chain, **well, "drift": 0.1}),
        (ops.analytic_mala_chain, {**moves, **well}),
        (ops.mlp_langevin_chain, {**chain, **network, "drift": 0.1}),
        (ops.mlp_mala_chain, {**moves, **network}),
        (ops.mlp_shared_bytes, {"sizes": (2, 8, 1)}),
    ]  # fmt: skip
    return {getattr(function, "__qualname__", ""): (function, kw) for function, kw in cases}


CASES = given()


def wrong_values(function: Callable[..., Any], annotation: str) -> Iterator[Any]:
    """Ops take as numbers and flags what torch's operators take as such."""
    converts = function.__module__.startswith("coopflow_ext.ops")
    for value in WRONG.get(annotation, ()):
        number = annotation.split()[0] in ("int", "float")
        if converts and (value is True if number else annotation == "bool" and value != "a"):
            continue
        yield value


@pytest.mark.parametrize("name", CASES)
def test_wrong_types_name_their_argument(name: str) -> None:
    function, arguments = CASES[name]
    function(**arguments)
    unnamed = []
    for parameter in inspect.signature(function).parameters.values():
        for wrong in wrong_values(function, parameter.annotation):
            what = f"{parameter.name}={wrong!r}"
            try:
                function(**{**arguments, parameter.name: wrong})
            except (TypeError, ValueError) as error:
                if not re.search(rf"\b{parameter.name}\b", str(error)):
                    unnamed.append(f"{what}: {error}")
            except Exception as error:
                unnamed.append(f"{what}: {type(error).__name__}: {error}")
            else:
                unnamed.append(f"{what} was taken")
    assert not unnamed, "\n".join(unnamed)


def public_with_plain_arguments() -> Iterator[str]:
    """But not of errors and records, which only hold what they are given."""
    for module in (cf, data, diagnostics, energies, flows, metrics, ops):
        for value in map(vars(module).get, module.__all__):
            if inspect.isclass(value):
                record = dataclasses.is_dataclass(value) or issubclass(value, (tuple, Exception))
                if record and value is not cf.Key:
                    continue
            elif not inspect.isfunction(value):
                continue
            annotations = {p.annotation for p in inspect.signature(value).parameters.values()}
            if annotations & WRONG.keys():
                yield value.__qualname__


def test_every_public_function_with_plain_arguments_is_among_them() -> None:
    assert set(public_with_plain_arguments()) - set(CASES) == set()
