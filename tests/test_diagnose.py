"""The theory: laws 3 and 4 on closed-form models, and diagnosis of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from coop_runs import tiny

from coopflow_ext import Key, LangevinSampler, cli, coop
from coopflow_ext.coop.model import EventSpec
from coopflow_ext.coop.study.diagnose import diagnose_run, long_chains
from coopflow_ext.data import load
from coopflow_ext.diagnostics import split_rhat
from coopflow_ext.flows import ActNorm, Flow
from coopflow_ext.metrics import RunningMoments, moment_gap
from coopflow_ext.rng import USE_EVALUATION


def test_law_3_moments_match_although_theta_is_not_the_maximum_likelihood() -> None:
    """f(x) = θ₁x + θ₂x², short chains from N(0, 1), data N(0.8, 0.5²): the gap closes."""
    generator = torch.Generator().manual_seed(0)
    data = 0.8 + 0.5 * torch.randn(20_000, 1, generator=generator)
    target = torch.cat((data, data.square()), 1).mean(0)
    theta = torch.tensor([0.0, -0.5])

    def energy(x: torch.Tensor) -> torch.Tensor:
        return -(theta[0] * x + theta[1] * x.square()).squeeze(1)

    start = torch.randn(20_000, 1, generator=generator)
    sampler = LangevinSampler(energy, n_steps=5, step_size=0.3)
    for iteration in range(300):
        x = sampler(start, key=Key(0).fold_in(iteration)).x
        assert isinstance(x, torch.Tensor)
        moments = torch.cat((x, x.square()), 1).mean(0)
        theta += (0.5 if iteration < 250 else 0.1) * (target - moments)
    torch.testing.assert_close(moments, target, rtol=0, atol=0.02)
    # Maximum likelihood has θ = (μ/σ², −1/(2σ²)) = (3.2, −2).
    assert abs(float(theta[0]) - 3.2) > 1
    assert abs(float(theta[1]) + 2) > 0.5


def test_law_4_the_flow_chases_the_chain_to_its_stationary_variance() -> None:
    """One affine layer, fitted by maximum likelihood to the chain's output again and again."""
    lam, delta = 2.0, 0.8
    layer = ActNorm(1, eps=0.0)
    flow = Flow(layer, (1,))
    layer.initialize(torch.linspace(-5, 5, 100)[:, None])
    before = layer.inv_std.item() ** -2
    sampler = LangevinSampler(
        lambda x: lam * x.square().sum(1) / 2, n_steps=3, step_size=delta, stats=False
    )
    key = Key(1)
    for _ in range(12):
        out = sampler(flow.sample(100_000, key), key=key)
        assert isinstance(out.x, torch.Tensor)
        layer.initialize(out.x)  # mean and variance of the sample: the exact maximum
        key = out.key
    stationary = 1 / (lam * (1 - delta**2 * lam / 4))
    assert before > 10 * stationary
    # Five standard errors of a variance from 100,000 samples.
    tolerance = 5 * stationary * (2 / 100_000) ** 0.5
    assert layer.inv_std.item() ** -2 == pytest.approx(stationary, abs=tolerance)
    assert stationary > 1.3 / lam  # and not the target's variance


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("diagnose") / "run"
    config = coop.TrainConfig.from_dict(
        {
            "preset": "digits-small",
            "flow_options": {"net": "mlp", "couplings": 2, "widths": [16]},
            "energy_options": {"widths": [16]},
            "batch_size": 32,
            "langevin_steps": 4,
            "pretrain_steps": 10,
            "flow_frozen_steps": 5,
            "steps": 20,
            "log_every": 5,
            "n_samples": 40,
        }
    )
    coop.train(config, path)
    return path


def test_diagnose(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["diagnose", str(run), "--n", "20", "--long", "3", "5"]) == 0
    printed = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "diagnose" / "summary.json").read_text())
    assert printed == summary
    chains = summary["long_chains"]
    assert [(c["factor"], c["steps"]) for c in chains] == [(1, 4), (3, 12), (5, 20)]
    assert all(c["fd"] > 0 for c in chains)
    assert chains[0]["energy_rhat"] is None  # half of 4 steps is too short for it
    assert all(c["energy_rhat"] > 0.9 for c in chains[1:])
    assert summary["moment_gap"]["samples"] > 0
    assert summary["drift"]["last"] > 0
    for name in ("long_chains.png", "energies.png"):
        assert (run / "diagnose" / name).read_bytes().startswith(b"\x89PNG")
    assert cli.main(["diagnose", str(run), "--long", "5", "3"]) == 1
    assert "long: factors must be ≥ 2 and ascending, got (5, 3)" in capsys.readouterr().err


def test_long_chains_are_one_chain() -> None:
    config = tiny(langevin_steps=4, sample_step_size=0.3)
    model = coop.CoopFlow.from_config(config, EventSpec((1, 8, 8), 17))
    start, modes = model.propose(6, Key(1)), []
    model.energy.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    chains, states = long_chains(model, start, (3, 5), Key(2))
    assert modes
    assert not any(modes)
    assert model.training
    assert [(c["factor"], c["steps"]) for c in chains] == [(1, 4), (3, 12), (5, 20)]
    for chain, x in zip(chains, states, strict=True):
        steps = chain["steps"]
        whole = LangevinSampler(
            model.energy, n_steps=steps, drift=0.045, noise=0.02, step_clip=0.1, clamp=(-1, 1),
            stats=True,
        )(start, key=Key(2))  # fmt: skip
        torch.testing.assert_close(x, whole.x, rtol=0, atol=1e-5)
        energy = whole.stats.energy
        torch.testing.assert_close(chain["trace"], energy.mean(1), rtol=1e-5, atol=1e-5)
        assert chain["energy"] == pytest.approx(float(energy[-1].mean()), abs=1e-5)
        if steps > 4:
            expected = float(split_rhat(energy[steps // 2 :]))
            assert chain["energy_rhat"] == pytest.approx(expected, rel=1e-3)


def test_a_diagnosis_measures_what_it_says(run: Path) -> None:
    summary = diagnose_run(run, n=8, factors=(2,))
    data, model = load("digits"), coop.CoopFlow.load(run)
    training, held_out = data.decode(data.train), data.decode(data.held_out)
    proposals, samples = model.sample_pairs(8, Key(0).fold_in(USE_EVALUATION))
    moments = [RunningMoments(64) for _ in range(3)]
    for of, x in zip(moments, (training, proposals, samples), strict=True):
        of.update(x)
    assert summary["moment_gap"] == {
        "proposals": pytest.approx(moment_gap(moments[0], moments[1])),
        "samples": pytest.approx(moment_gap(moments[0], moments[2])),
    }
    lines = [line for line in coop.RunFolder.open(run).metrics() if "langevin_distance" in line]
    assert summary["drift"] == {
        "first": lines[0]["langevin_distance"],
        "last": lines[-1]["langevin_distance"],
    }
    expected = float(model.energy(held_out).mean().detach())
    assert summary["energy_of_held_out_data"] == pytest.approx(expected, rel=1e-5)
    assert summary["step"] == 30
    for n, factors in ((3, (2,)), (8, (1,)), (8, ()), (8, (2, 2))):
        with pytest.raises(ValueError, match="must be ≥"):
            diagnose_run(run, n=n, factors=factors)


def test_tensorboard(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = coop.RunFolder.open(run).config
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        out = tmp_path / "run"
        with pytest.raises(ImportError, match=r"pip install 'coopflow-ext\[tensorboard\]'"):
            coop.train(config, out, log="tensorboard")
        assert not out.exists()
        return
    out = tmp_path / "run"
    coop.train(config, out, log="tensorboard")
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"moment_gap", "fd_langevin", "energy_data"} <= set(tags["scalars"])
    assert set(tags["images"]) == {"flow proposal", "after Langevin"}
    assert "energy/after Langevin" in tags["histograms"]
