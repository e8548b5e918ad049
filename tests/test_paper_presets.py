"""The presets of the paper's experiments hold what the authors' published code does."""

from __future__ import annotations

import pytest
import torch

from coopflow_ext.coop import TrainConfig
from coopflow_ext.coop.model import EventSpec, build_energy, build_flow, build_sampler
from coopflow_ext.energies import GaussianMixtureEnergy

# Batches of an epoch, δ at test, epochs for which the flow of (Pre) is frozen, and then trained in
# every so many batches.
PAPER = {
    "cifar10": (50_000 // 28, 0.04, 25, 1),
    "svhn": (73_257 // 28, 0.035, 10, 1),
    "celeba": (182_637 // 28, 0.035, 10, 5),
}
EVENT = EventSpec((3, 32, 32), 256)


def _config(name: str) -> TrainConfig:
    return TrainConfig.from_dict({"preset": name})


@pytest.mark.parametrize("variant", ["", "-pre", "-long"])
@pytest.mark.parametrize("data", PAPER)
def test_presets_are_the_authors_settings(data, variant):
    epoch, test_delta, frozen_epochs, every = PAPER[data]
    config = _config(data + variant)
    assert config.data == data
    assert config.flip == (data == "cifar10")
    assert config.batch_size == 28
    assert config.steps == 200 * epoch
    assert (config.step_size, config.sample_step_size) == (0.03, test_delta)
    assert (config.noise, config.step_clip) == (0.0, 0.1)
    assert config.langevin_steps == (200 if variant == "-long" else 30)
    assert (config.flow_lr, config.energy_lr, config.warmup_steps) == (1e-4, 1e-4, 200)
    assert (config.flow_betas, config.energy_betas) == ((0.9, 0.999), (0.5, 0.5))
    assert (config.flow_weight_decay, config.flow_grad_norm) == (5e-5, 1.0)
    assert (config.flow_ema, config.energy_ema) == (0.0, 0.0)
    assert (config.precision, config.accumulate, config.start) == ("float32", 1, "flow")
    pre = variant == "-pre"
    assert bool(config.pretrain_steps) == pre
    assert config.flow_frozen_steps == (frozen_epochs * epoch if pre else 0)
    assert config.flow_every == (every if pre else 1)


def test_their_models_are_the_papers():
    config = _config("cifar10")
    with torch.device("meta"):
        flow, energy = build_flow(config, EVENT), build_energy(config, EVENT)
    assert sum(p.numel() for p in flow.parameters()) == 28_784_792
    assert sum(p.numel() for p in energy.parameters()) == 17_129_444


@pytest.mark.parametrize(("training", "delta"), [(True, 0.03), (False, 0.04)])
def test_their_chain_is_the_published_one(training, delta):
    """d = clamp(½δ²∇f, ±0.1); x ← clamp(x + d, −1, 1), without noise; both clamps are reached."""
    energy = GaussianMixtureEnergy(torch.tensor([[1.5, 0.0, -0.4]]), 0.08)
    torch.manual_seed(0)
    x = torch.rand(50, 3) * 2 - 1
    sampler = build_sampler(_config("cifar10"), energy, EVENT, training=training)
    expected = x
    for _ in range(30):
        d = (0.5 * delta**2 * energy.score(expected)).clamp(-0.1, 0.1)
        expected = (expected + d).clamp(-1, 1)
    torch.testing.assert_close(sampler(x).x, expected)
    assert (expected[:, 0] == 1).all()
