"""What a seed gives stays what it was, whatever else changes: numbers drawn once, and written down.

A line here that no longer holds is a change of everybody's seeds, which CHANGELOG.md has to say.
"""

from __future__ import annotations

import torch
from coop_runs import tiny
from torch import Tensor

import coopflow_ext as cf
from coopflow_ext import coop, data, flows
from coopflow_ext.coop.model import EventSpec
from coopflow_ext.data import Batches

KEY = cf.Key(2026, time=5, chain=3)

EXPECTED: dict[str, list[float]] = {
    "accepted": [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1],
    "buffer": [-0.250974, -0.752146],
    "buffer's choice": [11, 2, 8, 7, 5, 0],
    "buffer's fresh": [-0.09137, 0.024404],
    "chains of a run": [0.683803, -0.61815, -0.297466],
    "flips": [1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0],
    "log_prob": [-100.600143, -109.955177],
    "order": [1336, 1252, 1002, 462, 0, 1234, 712, 390],
    "sample": [-0.695192, 0.256702, -0.069525, -0.322803],
    "samples of a run": [0.483232, -0.475811, -0.3759],
    "steps": [-0.524925, -0.219529],
    "underdamped": [-0.034185, 0.090417],
    "weights": [-0.109428, 0.012693, 0.221199, -0.006209, 0.164805, -0.169823],
}


def energy(x: Tensor) -> Tensor:
    return 0.5 * x.square().sum(1)


def replay_buffer() -> dict[str, Tensor]:
    buffer = cf.ReplayBuffer((2,), size=12, reinit_probability=0.5, key=KEY)
    first = buffer.states[0]
    draw = buffer.draw(6)
    return {
        "buffer": first,
        "buffer's choice": draw.indices,
        "buffer's fresh": draw.x[(draw.x != buffer.states[draw.indices]).any(1)][0],
    }


def batches() -> dict[str, Tensor]:
    order = Batches(data.load("digits"), 4, KEY)
    images = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8).repeat(12, 1, 1, 1)
    flipped = Batches(data.Dataset("rising", images, images[:4], 256, flip=True), 4, KEY, flip=True)
    first = torch.stack([flipped[step][:, 0, 0, 0] for step in range(6)])
    return {
        "order": torch.cat([order.indices(0), order.indices(400)]),
        "flips": (first > first.min()).flatten(),
    }


def chains() -> dict[str, Tensor]:
    x0 = torch.zeros(1, 2)
    mala = cf.MALASampler(energy, n_steps=12, step_size=1.9, stats=True, kernel=False)
    stats = mala(x0, key=KEY).stats
    assert stats is not None
    sampler = cf.UnderdampedLangevinSampler(energy, n_steps=1, step_size=0.1, friction=0.5)
    return {
        "steps": cf.LangevinSampler(energy, n_steps=2, step_size=0.5)(x0, key=KEY).x,
        "accepted": stats.accepted.flatten(),
        "underdamped": sampler(x0, key=KEY).x,
    }


def of_flows() -> dict[str, Tensor]:
    torch.manual_seed(0)
    flow = flows.flowpp((1, 4, 4), scales=((0, 1),), channels=8, blocks=1, components=2,
                        dequant_blocks=1, dequant_components=2, dropout=0.5)  # fmt: skip
    x = torch.linspace(-1, 1, 32).reshape(2, 1, 4, 4)
    flow.initialize(x, key=KEY)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).reshape(parameter.shape))
    flow.sampling_dropout = True
    result = {"log_prob": flow.log_prob(x, key=KEY).detach()}
    result["sample"] = flow.sample(1, KEY).detach().flatten()[:4]
    return result


def of_models() -> dict[str, Tensor]:
    model = coop.CoopFlow.from_config(
        tiny(start="buffer", buffer_size=20), EventSpec((1, 8, 8), 16)
    )
    assert model.buffer is not None
    weights = [p.flatten()[:2] for p in model.energy.parameters() if p.ndim > 1]
    return {
        "weights": torch.cat(weights).detach(),
        "chains of a run": model.buffer.states.flatten()[:3],
        "samples of a run": model.sample(2, KEY).flatten()[:3],
    }


def all_draws() -> dict[str, Tensor]:
    return {**replay_buffer(), **batches(), **chains(), **of_flows(), **of_models()}


def test_seeds_give_what_they_gave() -> None:
    found = all_draws()
    assert found.keys() == EXPECTED.keys()
    for name, values in found.items():
        expected = torch.tensor(EXPECTED[name], dtype=torch.float64)
        found_here = values.double().flatten()
        torch.testing.assert_close(
            found_here, expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
