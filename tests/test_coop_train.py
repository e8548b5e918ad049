"""The cooperative algorithm, and what happens to a run when things go wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coop_runs import assert_same_end, snapshot, tiny, without_times
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import coopflow_ext as cf
from coopflow_ext import Key, coop, reference
from coopflow_ext.coop import RunError, RunFolder, TrainConfig, Trainer
from coopflow_ext.coop.checkpoint import load_checkpoint, save_checkpoint
from coopflow_ext.coop.config import SettingType
from coopflow_ext.coop.contents import Contents
from coopflow_ext.coop.divergence import Divergence
from coopflow_ext.coop.files import write_atomically
from coopflow_ext.coop.judge import Judge
from coopflow_ext.coop.learner import Learner
from coopflow_ext.coop.run import open_run
from coopflow_ext.coop.study.report import report_run
from coopflow_ext.data import Batches, Dataset, load
from coopflow_ext.rng import USE_PRIOR


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- the algorithm ------------------------------------------------------------------------------


def test_one_iteration_is_the_papers(digits: Dataset) -> None:
    """Proposal, T Langevin steps, flow step on the samples, EBM step: in plain PyTorch again."""
    changes = {"pretrain_steps": 0, "flow_frozen_steps": 0, "warmup_steps": 0}
    config = tiny(**changes, flow_ema=0.0, energy_ema=0.0)
    trainer, twin = Trainer(config, digits), Trainer(config, digits)
    flow, energy = twin.model.flow, twin.model.energy

    # The twin's step by hand.
    x, rng = twin.batches[0], Key(0).tensor()
    z = reference.normal((16, 1, 8, 8), Key(0).fold_in(USE_PRIOR).tensor())
    with torch.no_grad():
        state = flow.to_data(flow.inverse_and_ladj(z)[0])
    for step in range(3):
        leaf = state.clone().requires_grad_()
        (grad,) = torch.autograd.grad(energy(leaf).sum(), leaf)
        state = reference.langevin_step(
            state, grad, rng, drift=0.125, noise=0.02, step_clip=0.1, clamp=(-1, 1), step=step
        )
    flow_optimizer = torch.optim.Adam(flow.parameters(), config.flow_lr)
    (-flow.log_prob(state, key=Key(0)).mean()).backward()
    torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
    flow_optimizer.step()
    energy.zero_grad()
    energy_optimizer = torch.optim.Adam(energy.parameters(), config.energy_lr, (0.5, 0.9))
    (energy(x).mean() - energy(state).mean()).backward()
    energy_optimizer.step()

    metrics = trainer.train_step()
    assert trainer.key == Key(0, time=3)
    assert metrics["energy_grad_norm"] > 0
    for own, by_hand in zip(
        trainer.model.state_dict().values(), twin.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(own, by_hand, rtol=1e-4, atol=2e-6)
    assert not same(weights(trainer.model), weights(Trainer(config, digits).model))


def test_a_seed_of_many_digits_is_named(digits: Dataset) -> None:
    with pytest.raises(ValueError, match=r"seed must be in \[0, 18446744073709551616\), got 10000"):
        Trainer(tiny(seed=10**400), digits)


def test_the_numbers_of_a_step_are_those_of_their_names(digits: Dataset) -> None:
    trainer = Trainer(tiny(pretrain_steps=0, flow_frozen_steps=0), digits)
    twin = Trainer(tiny(pretrain_steps=0, flow_frozen_steps=0), digits)
    proposal, x = twin.propose(16), twin.batches[0]
    samples = twin.run_chain(proposal)
    metrics = trainer.train_step()
    with torch.no_grad():
        flow, energy = twin.model.flow, twin.model.energy
        expected = {
            "langevin_distance": (samples - proposal).square().mean().sqrt(),
            "flow_nll": -flow.log_prob(samples, key=twin.key).mean() / 64,
            "energy_data": energy(x).mean(),
            "energy_samples": energy(samples).mean(),
        }
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-5, atol=1e-6)


def test_the_rate_of_the_pre_training_falls_to_nothing(digits: Dataset) -> None:
    trainer = Trainer(tiny(pretrain_steps=4, warmup_steps=0), digits)
    rates = []
    for _ in range(4):
        trainer.train_step()
        rates.append(float(trainer.flow.optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([2e-3, 1.5e-3, 1e-3, 0.5e-3])


def test_chains_of_no_steps_draw_anew_in_every_iteration(digits: Dataset) -> None:
    trainer = Trainer(tiny(pretrain_steps=0, langevin_steps=0), digits)
    starts = []
    for _ in range(2):
        starts.append(trainer.propose(16))
        trainer.train_step()
    assert trainer.key == Key(0, time=2)
    assert not torch.equal(*starts)


def test_each_precision_is_that_of_its_model(digits: Dataset) -> None:
    def numbers(**given: str) -> list[float]:
        trainer = Trainer(tiny(pretrain_steps=0, **given), digits)
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.add_(0.02)  # couplings begin as the identity
        x = trainer.batches[0]
        u = trainer.update_energy(x, -x)["energy_samples"]
        return [float(trainer.update_flow(x, 0.1)["flow_nll"]), float(u)]

    both, flow, energy = (
        numbers(precision=p, flow_precision=f)
        for p, f in (("float32",) * 2, ("float32", "bfloat16"), ("bfloat16", "float32"))
    )
    assert flow[0] != both[0] == energy[0]
    assert flow[1] == both[1] != energy[1]


def test_so_many_images_start_the_flow(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(cf.flows.Flow, "initialize", lambda self, x, key: sizes.append(len(x)))
    for batches in (1, 3, 70, 100):
        Trainer(tiny(init_batches=batches), digits)
    few = dataclasses.replace(digits, train=digits.train[:20])
    Trainer(tiny(init_batches=3), few)
    assert sizes == [16, 48, 1024, 1024, 20]


def test_running_moments_are_of_the_samples_since_they_were_last_asked(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny(pretrain_steps=0), digits)
    samples = torch.linspace(-1, 1, 16 * 64).view(16, 1, 8, 8)
    monkeypatch.setattr(trainer, "run_chain", lambda proposal: samples)
    trainer.train_step()
    torch.testing.assert_close(trainer.sample_moments.sum, samples.flatten(1).sum(0))
    assert trainer.take_moment_gap() is not None
    assert trainer.take_moment_gap() is None  # there were none since
    trainer.train_step()
    assert trainer.sample_moments.count == 16


def test_what_is_counted_and_timed_goes_on_in_a_resumed_training(digits: Dataset) -> None:
    trainer = Trainer(tiny(pretrain_steps=0), digits)
    for _ in range(3):
        trainer.train_step()
    trainer.seconds = 12.5
    again = Trainer(tiny(pretrain_steps=0), digits)
    again.load(trainer.tensors(), trainer.metadata())
    assert (again.step, again.seconds, again.key) == (3, 12.5, trainer.key)
    assert again.sample_moments.count == 48


def test_images_are_mirrored_where_settings_and_data_allow_it(digits: Dataset) -> None:
    """A mirrored digit is none."""
    symmetric = dataclasses.replace(digits, flip=True)
    for data, flip, expected in ((digits, True, False), (symmetric, True, True),
                                 (symmetric, False, False)):  # fmt: skip
        batches = Trainer(tiny(flip=flip), data).batches
        assert isinstance(batches, Batches)
        assert batches.flip == expected


def test_accumulated_parts_have_the_numbers_of_the_whole(digits: Dataset) -> None:
    whole, parts = (
        Trainer(tiny(pretrain_steps=0, flow_frozen_steps=0, accumulate=k), digits).train_step()
        for k in (1, 4)
    )
    for name in ("flow_nll", "energy_data", "energy_samples", "langevin_distance"):
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-5)


def test_a_step_trains_whatever_mode_the_models_were_left_in(digits: Dataset) -> None:
    """Dropout would be off in evaluation mode."""
    trainer = Trainer(tiny(), digits)
    trainer.model.eval()
    trainer.train_step()
    assert all(module.training for module in trainer.model.modules())


def test_chains_of_the_training_have_its_step_size_and_its_mode(digits: Dataset) -> None:
    """Not those of sampling afterwards: dropout in an energy stays on."""
    ends = []
    for delta in (None, 0.01):
        trainer = Trainer(tiny(pretrain_steps=0, sample_step_size=delta), digits)
        ends.append(trainer.run_chain(trainer.propose(16)))
    assert torch.equal(*ends)
    modes = []
    trainer.model.energy.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    trainer.train_step()
    assert len(modes) > 3
    assert all(modes)


def test_pre_training_then_a_frozen_flow_then_both_learn(digits: Dataset) -> None:
    trainer = Trainer(tiny(warmup_steps=0), digits)
    learned = []
    for _ in range(7):
        flow, energy = weights(trainer.model.flow), weights(trainer.model.energy)
        trainer.train_step()
        now = not same(flow, weights(trainer.model.flow))
        learned.append((now, not same(energy, weights(trainer.model.energy))))
    assert learned == [(True, False)] * 3 + [(False, True)] * 2 + [(True, True)] * 2


def test_flow_every(digits: Dataset) -> None:
    trainer = Trainer(tiny(pretrain_steps=0, flow_frozen_steps=1, flow_every=3), digits)
    updates = []
    for _ in range(8):
        trainer.train_step()
        updates.append(trainer.flow.updates)
    assert updates == [0, 1, 1, 1, 2, 2, 2, 3]


def test_warm_up_starts_at_rate_zero_and_rises_linearly() -> None:
    layer = torch.nn.Linear(2, 1)
    learner = Learner("l", layer, betas=(0.9, 0.999), warmup=4)
    rates = []
    for _ in range(6):
        before = weights(layer)
        learner.update([layer(torch.ones(3, 2)).square().mean()], 0.1)
        rates.append(float(learner.optimizer.param_groups[0]["lr"]))
        assert same(before, weights(layer)) == (len(rates) == 1)
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.1])


def test_warm_up_by_batches_keeps_the_rate_of_before_a_pause() -> None:
    """Updates at iterations 0, 1, 2, 3 and, after a pause, 9 and 10 of a warm-up over 4."""
    layer = torch.nn.Linear(2, 1)
    learner = Learner("l", layer, betas=(0.9, 0.999), warmup=4, warmup_by="batches")
    rates = []
    for iteration in (0, 1, 2, 3, 9, 10):
        learner.update([layer(torch.ones(3, 2)).square().mean()], 0.1, iteration=iteration)
        rates.append(float(learner.optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([0, 0, 0.025, 0.05, 0.075, 0.1])
    learner.restart()
    learner.update([layer(torch.ones(3, 2)).square().mean()], 0.1, iteration=11)
    assert float(learner.optimizer.param_groups[0]["lr"]) == 0
    assert learner.updates == 7
    assert float(learner.optimizer.state[layer.weight]["step"]) == 1


@pytest.mark.parametrize("warmup_by", ["updates", "batches"])
def test_a_warm_up_goes_on_from_its_own_count(warmup_by: str) -> None:
    """Which is not that of the updates once it has begun anew."""

    def made() -> Learner:
        torch.manual_seed(0)
        layer = torch.nn.Linear(2, 1)
        return Learner("l", layer, betas=(0.9, 0.999), warmup=8, warmup_by=warmup_by)

    def update(learner: Learner, iteration: int) -> float:
        loss = learner.module(torch.ones(3, 2)).square().mean()
        learner.update([loss], 0.1, iteration=iteration)
        return float(learner.optimizer.param_groups[0]["lr"])

    learner, again = made(), made()
    for iteration in range(5):
        update(learner, iteration)
    learner.restart()
    update(learner, 1)
    again.load(again.read(Contents({k: t.clone() for k, t in learner.tensors().items()})))
    assert update(again, 2) == update(learner, 2) == pytest.approx(0.1 / 8)
    assert again.updates == learner.updates == 7


def test_weight_decay_acts_on_weight_norms_g_only() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    learner = Learner("l", layer, betas=(0.9, 0.999), weight_decay=5e-5)
    decays = {
        name: group["weight_decay"]
        for group in learner.optimizer.param_groups
        for name, p in layer.named_parameters()
        if any(p is q for q in group["params"])
    }
    assert decays == {
        "bias": 0.0,
        "parametrizations.weight.original0": 5e-5,
        "parametrizations.weight.original1": 0.0,
    }


def test_gradient_clip_bounds_the_norm() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    learner = Learner("l", layer, betas=(0.9, 0.999), grad_norm=0.5)
    norm, skipped = learner.update([100 * layer(torch.ones(1, 2)).sum()], 0.1)
    assert not skipped
    assert float(norm) == pytest.approx(100 * math.sqrt(2), rel=1e-5)
    assert layer.weight.grad is not None
    assert float(layer.weight.grad.norm()) == pytest.approx(0.5, rel=1e-4)


def test_clip_of_each_group_by_itself() -> None:
    """Weight-norm's g has its own bound, so the rest is not scaled with it."""
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    g = layer.parametrizations.weight.original0
    rest = [layer.parametrizations.weight.original1, layer.bias]
    learner = Learner("l", layer, betas=(0.9, 0.999), grad_norm=1.0, clip_groups=True)
    loss = (30 * g).sum() + 0.1 * rest[0].sum() + 0.1 * rest[1].sum()
    norm, _ = learner.update([loss], 0.1)
    assert float(norm) == pytest.approx(math.sqrt(2 * 30**2 + 8 * 0.1**2), rel=1e-6)
    assert float(g.grad.norm()) == pytest.approx(1, rel=1e-6)
    for p in rest:
        torch.testing.assert_close(p.grad, torch.full_like(p, 0.1))


@contextmanager
def nothing_waited_for(device: torch.device) -> Iterator[None]:
    """An error inside where the host waits for the GPU, if that is the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bad", [100.0, math.inf, math.nan])
def test_a_skipped_update_moves_nothing(bad: float, device: torch.device) -> None:
    """One between two others: the end has the bits of the two alone. No update waits for a GPU."""
    ends = []
    for factors in ([1.0, bad, 2.0], [1.0, 2.0]):
        layer = torch.nn.Linear(2, 1, bias=False, device=device)
        torch.nn.init.ones_(layer.weight)
        settings: dict[str, Any] = {"warmup": 2, "ema": 0.9, "grad_norm": 1.0, "skip_norm": 50.0}
        learner = Learner("l", layer, betas=(0.5, 0.5), **settings)
        with nothing_waited_for(device):
            skipped = [learner.update([f * layer.weight.sum()], 0.1).skipped for f in factors]
        assert list(map(bool, skipped)) == [f is bad for f in factors]
        assert learner.updates == 2
        ends.append(learner.tensors())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_gradient_of_exactly_the_norm_is_skipped() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    gradient = torch.tensor([[3.0, 4.0]])
    for limit, skipped in ((5.0, True), (5.1, False)):
        learner = Learner("l", layer, betas=(0.5, 0.5), skip_norm=limit)
        assert bool(learner.update([(gradient * layer.weight).sum()], 0.1).skipped) == skipped


def test_weight_norms_g_is_known_by_its_older_name_too() -> None:
    layer, net = torch.nn.Module(), torch.nn.Module()
    layer.weight_g, layer.weight_v = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    net.layer = layer
    groups = Learner("l", net, betas=(0.5, 0.5), weight_decay=1e-3).optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.0, 1e-3]
    assert [group["params"][0] for group in groups] == [layer.weight_v, layer.weight_g]


def test_an_update_may_not_be_skipped_or_must_be() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    learner = Learner("l", layer, betas=(0.5, 0.5), skip_norm=1.0)
    before = weights(layer)
    assert not learner.update([9 * layer.weight.sum()], 0.1, may_skip=False).skipped
    moved = weights(layer)
    assert not same(before, moved)
    asked = []

    def yes() -> torch.Tensor:
        asked.append(layer.weight.grad)  # when all gradients are there
        return torch.tensor(True)

    assert learner.update([0.1 * layer.weight.sum()], 0.1, may_skip=False, skip=yes).skipped
    assert asked[0] is layer.weight.grad is not None
    assert same(moved, weights(layer))


class _NothingRead(TorchDispatchMode):
    """Fails where the host asks for the value of a tensor, which on a GPU waits for it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_updates_read_nothing_back(digits: Dataset) -> None:
    skips = {"flow_skip_norm": 1.0, "energy_skip_norm": 1.0, "warmup_by": "batches"}
    trainer = Trainer(tiny(pretrain_steps=0, **skips, energy_grad_norm=1.0), digits)
    x = trainer.batches[0]
    with _NothingRead():
        skip = trainer.update_energy(x, x)["energy_skipped"]
        trainer.update_flow(x, 0.1, skip)
        with pytest.raises(AssertionError):
            float(skip)


def test_a_run_goes_on_after_an_update_that_was_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinite gradient at a step that is logged: no divergence, no number to show."""
    config = tiny(energy_skip_norm=1e6, pretrain_steps=0, flow_frozen_steps=0, log_every=1, steps=3)
    original = Trainer.update_energy

    def explode(self: Trainer, *args: torch.Tensor, **options: bool) -> dict[str, torch.Tensor]:
        last = next(p for n, p in self.model.energy.named_parameters() if n.endswith("2.bias"))
        hook = last.register_hook(lambda g: g * (math.inf if self.step == 1 else 1))
        metrics = original(self, *args, **options)
        hook.remove()
        return metrics

    monkeypatch.setattr(Trainer, "update_energy", explode)
    summary = coop.train(config, tmp_path / "run")
    assert (summary["flow_updates"], summary["energy_updates"]) == (2, 2)
    lines = [line for line in RunFolder.open(tmp_path / "run").metrics() if "flow_nll" in line]
    assert [line["energy_skipped"] for line in lines] == [0, 1, 0]
    assert [line["flow_skipped"] for line in lines] == [0, 1, 0]
    assert ["energy_grad_norm" in line for line in lines] == [True, False, True]


def test_a_run_from_before_these_settings_resumes(finished: Path, tmp_path: Path) -> None:
    """config.json and checkpoint without what was added since: same bits as before."""
    new = {"init_batches", "flow_clip_groups", "flow_skip_norm", "flow_restart", "warmup_by"}
    new |= {"energy_grad_norm", "energy_skip_norm", "energy_skip_from"}
    new |= {"max_pixels", "coopflow_sha256"}
    source = RunFolder.open(finished)
    settings = json.loads((finished / "config.json").read_text())
    assert new <= settings.keys()
    old = json.dumps({k: v for k, v in settings.items() if k not in new})
    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True)
    (path / "samples").mkdir()
    (path / "config.json").write_text(old)
    tensors, facts = load_checkpoint(source.checkpoints()[0][1])
    kept = {k: v for k, v in tensors.items() if not k.endswith("_warmed")}
    assert len(kept) == len(tensors) - 2
    name = source.checkpoints()[0][1].name
    save_checkpoint(path / "checkpoints" / name, kept, {**facts, "config": old})
    with pytest.warns(UserWarning, match=r"config.json has no coopflow_sha256, as files of older"):
        assert RunFolder.open(path).config == source.config
    with pytest.warns(UserWarning, match=r"config.json has no coopflow_sha256"):
        coop.train(None, path, resume=True)
    with pytest.warns(UserWarning, match=r"config.json has no coopflow_sha256"):
        a, _ = load_checkpoint(RunFolder.open(path).latest_checkpoint())
    b, _ = load_checkpoint(source.latest_checkpoint())
    assert [name for name in b if not torch.equal(a[name], b[name])] == []


def test_a_checkpoint_with_unknown_weights_is_refused(finished: Path, tmp_path: Path) -> None:
    tensors, facts = load_checkpoint(RunFolder.open(finished).latest_checkpoint())
    save_checkpoint(tmp_path / "c.safetensors", {**tensors, "flow.x": torch.ones(1)}, facts)
    with pytest.raises(RunError, match=r"c.safetensors cannot be used: flow.x belongs to nothing"):
        coop.CoopFlow.load(tmp_path / "c.safetensors")


def test_averaged_weights() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    learner = Learner("l", layer, betas=(0.9, 0.999), ema=0.5)
    average = layer.weight.item()
    for n in range(1, 13):
        learner.update([layer(torch.ones(1, 1)).sum()], 0.1)
        decay = min(0.5, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * layer.weight.item()
    own = layer.weight.item()
    with learner.averaged():
        assert layer.weight.item() == pytest.approx(average, abs=1e-6)
    assert layer.weight.item() == own != pytest.approx(average, abs=1e-3)


def test_own_weights_are_back_after_an_error_inside_the_averaged_ones(digits: Dataset) -> None:
    trainer = Trainer(tiny(pretrain_steps=0, flow_frozen_steps=0), digits)
    for _ in range(4):
        trainer.train_step()
    before = {name: t.clone() for name, t in trainer.tensors().items()}
    with trainer.averaged() as model:
        for name, net in (("flow", model.flow), ("energy", model.energy)):
            for own, p in net.named_parameters():
                assert torch.equal(p, before[f"{name}_ema.{own}"])
    with pytest.raises(ZeroDivisionError), trainer.averaged():
        raise ZeroDivisionError
    assert all(torch.equal(t, before[name]) for name, t in trainer.tensors().items())


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    coop.train(tiny(), path)
    return path


def interrupt_at(
    monkeypatch: pytest.MonkeyPatch, step: int, signum: signal.Signals = signal.SIGINT
) -> None:
    """Ctrl-C, or another signal, arrives in the middle of that step."""
    original = Trainer.train_step

    def train_step(self: Trainer) -> dict[str, torch.Tensor]:
        if self.step == step:
            signal.raise_signal(signum)
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def test_run_folder_holds_what_it_promises(finished: Path) -> None:
    assert TrainConfig.from_json((finished / "config.json").read_text()) == tiny()
    steps = [line["step"] for line in RunFolder.open(finished).metrics()]
    assert steps == [0, 2, 3, 4, 5, 6, 8, 10, 10]
    pictures = sorted(p.stem for p in (finished / "samples").iterdir())
    assert pictures == [f"step-{step:07d}" for step in (0, 3, 5, 10)]
    checkpoints = [step for step, _ in RunFolder.open(finished).checkpoints()]
    assert checkpoints == [8, 10]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["steps"] == 7
    assert summary["seconds"] > 0
    assert summary["iterations_per_second"] > 0
    assert summary["fd"]["n"] == 20
    assert summary["fd"]["feature_space"] == "digit-classifier-64"
    for name in ("held_out", "flow", "langevin", "flow_start"):
        assert summary["fd"][name] > 0
    assert summary["moment_gap"] > 0
    assert summary["bits_per_dim"] > 0
    bits = summary["pretraining_bits_per_dim"]
    assert list(bits) == ["0", str(tiny().pretrain_steps)]
    assert bits["0"] > bits[str(tiny().pretrain_steps)] > 0
    assert (finished / summary["picture"]).exists()


def test_the_summary_is_of_the_first_and_the_last_lines(finished: Path) -> None:
    run = RunFolder.open(finished)
    summary, lines = run.summary(), run.metrics()
    gaps = [line["moment_gap"] for line in lines if "moment_gap" in line]
    distances = [line for line in lines if "fd_flow" in line]
    assert (summary["moment_gap_start"], summary["moment_gap"]) == (gaps[0], gaps[-1])
    assert summary["fd"]["flow"] == distances[-1]["fd_flow"]
    assert summary["fd"]["langevin"] == distances[-1]["fd_langevin"]
    assert summary["fd"]["flow_start"] == distances[0]["fd_flow"]
    assert run.load_latest()[1]["seconds"] == summary["seconds"]


def test_pictures_and_summary_are_of_the_averaged_weights(finished: Path, tmp_path: Path) -> None:
    run, model, data = open_run(finished)
    judge, summary = Judge(data, run.config), run.summary()
    values, _ = judge.observe(model, tmp_path / "again.png")
    last = [line for line in run.metrics() if "fd_flow" in line][-1]
    assert {name: last[name] for name in values} == values
    assert (tmp_path / "again.png").read_bytes() == (finished / summary["picture"]).read_bytes()
    assert summary["bits_per_dim"] == judge.facts(model)["bits_per_dim"]
    tensors, _ = load_checkpoint(run.latest_checkpoint())
    for name, net in (("flow", model.flow), ("energy", model.energy)):
        own = {n: tensors[f"{name}.{n}"] for n, _ in net.named_parameters()}
        net.load_state_dict(own, strict=False)
    others, _ = judge.observe(model, tmp_path / "own.png")
    assert others["bits_per_dim"] != values["bits_per_dim"]  # by the flow
    assert others["fd_langevin"] != values["fd_langevin"]  # by the energy, too


@pytest.mark.parametrize(
    ("step", "signum"),  # in pre-training, frozen, both learning
    [(1, signal.SIGINT), (4, signal.SIGTERM), (6, signal.SIGINT)],
)
def test_interrupted_and_resumed_is_bit_for_bit_the_same(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    signum: signal.Signals,
) -> None:
    path, handler = tmp_path / "run", signal.getsignal(signum)
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, signum)
        with pytest.raises(coop.TrainingInterrupted, match=r"--resume") as stopped:
            coop.train(tiny(), path)
    assert str(path) in str(stopped.value)
    assert signal.getsignal(signum) is handler
    assert RunFolder.open(path).checkpoints()[-1][0] == step + 1
    torch.rand(7)  # nothing may depend on torch's own generator
    coop.train(None, path, resume=True)
    assert_same_end(path, finished)
    picture = "samples/step-0000010.png"
    assert (path / picture).read_bytes() == (finished / picture).read_bytes()


def test_an_ignored_interrupt_stays_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupt_at(monkeypatch, 1)
        summary = coop.train(tiny(), tmp_path / "run")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert summary["steps"] == 7


def test_who_handles_the_end_of_a_job_goes_on_doing_so() -> None:
    train, came = sys.modules["coopflow_ext.coop.train"], []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: came.append(signum))
    try:
        with train._interrupts() as asked:
            signal.raise_signal(signal.SIGTERM)
            assert not asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


def test_a_training_in_another_thread_leaves_interrupts_alone() -> None:
    train, found = sys.modules["coopflow_ext.coop.train"], []

    def handlers() -> list[object]:
        return [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]

    def run() -> None:
        with train._interrupts() as asked:
            found.append((asked.is_set(), handlers()))

    before = handlers()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_a_run_is_closed_also_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, closed = sys.modules["coopflow_ext.coop.train"], []

    def fail(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(train, "_run_to_the_end", fail)
    monkeypatch.setattr(RunFolder, "close", lambda self: closed.append(self.path))
    with pytest.raises(ZeroDivisionError):
        coop.train(tiny(), tmp_path / "run")
    assert closed == [tmp_path / "run"]


def test_a_divergence_tells_what_was_changed_before(tmp_path: Path, digits: Dataset) -> None:
    RunFolder.create(tmp_path / "run", tiny(steps=1))
    run = RunFolder.open(tmp_path / "run")
    run.adopt(tiny(steps=5))
    train = sys.modules["coopflow_ext.coop.train"]
    error = train._diverged(Trainer(run.config, digits), run, cf.NonFiniteError("x is not finite"))
    assert "training diverged by step 0: x is not finite; no checkpoint yet" in str(error)
    facts = json.loads(run.divergence_path.read_text())
    assert facts["history"] == list(run.history) != []
    assert (facts["reason"], facts["chains"], facts["from_checkpoint"]) == (
        "x is not finite",
        None,
        None,
    )


def test_sigterm_may_come_more_than_once() -> None:
    train, before = sys.modules["coopflow_ext.coop.train"], signal.getsignal(signal.SIGTERM)
    assert before is signal.SIG_DFL
    with train._interrupts() as asked:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
            assert asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_stops_at_once() -> None:
    train, before = sys.modules["coopflow_ext.coop.train"], signal.getsignal(signal.SIGINT)
    with train._interrupts() as asked:
        signal.raise_signal(signal.SIGINT)
        assert asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_killed_between_checkpoints_repeats_the_steps_that_were_lost(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = tmp_path / "run", Trainer.train_step

    def die(self: Trainer) -> dict[str, torch.Tensor]:
        if self.step == 7:
            raise SystemError("killed")
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", die)
        with pytest.raises(SystemError):
            coop.train(tiny(), path)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "energy_')  # a line that was cut off
    coop.train(None, path, resume=True)
    ours, theirs = RunFolder.open(path), RunFolder.open(finished)
    assert without_times(ours.metrics()) == without_times(theirs.metrics())


def test_more_steps_for_a_finished_run(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    coop.train(tiny(steps=4), path)
    summary = coop.train(tiny(), path, resume=True)
    assert summary["steps"] == 7
    a, _ = load_checkpoint(RunFolder.open(path).latest_checkpoint())
    b, _ = load_checkpoint(RunFolder.open(finished).latest_checkpoint())
    assert all(torch.equal(a[name], b[name]) for name in b if not name.startswith("moments"))


def test_colour_patches_with_a_glow_and_the_papers_energy(tmp_path: Path) -> None:
    """A few steps of what tests/test_coop_demo.py trains for longer."""
    config = TrainConfig.from_dict(
        {
            "preset": "patches-small",
            "flow_options": {"scales": 3, "steps": 1, "channels": 8, "blocks": 1},
            "energy_options": {"width": 4},
            "batch_size": 4,
            "langevin_steps": 3,
            "pretrain_steps": 1,
            "flow_frozen_steps": 1,
            "flow_every": 1,
            "steps": 3,
            "n_samples": 8,
            "log_every": 1,
        }
    )
    summary = coop.train(config, tmp_path / "run")
    assert (summary["flow_updates"], summary["energy_updates"]) == (3, 3)
    assert summary["fd"]["feature_space"] == "random-conv-64"
    lines = RunFolder.open(tmp_path / "run").metrics()
    numbers = [v for line in lines for v in line.values()]
    assert all(math.isfinite(v) for v in numbers)
    picture = Image.open(tmp_path / "run" / summary["picture"])
    red, green, _ = np.asarray(picture.convert("RGB"), dtype=float).transpose(2, 0, 1)
    assert np.abs(red - green).max() > 10, "a picture without colours"


# --- bad input ----------------------------------------------------------------------------------


def test_existing_folder_without_resume(finished: Path) -> None:
    before = snapshot(finished)
    with pytest.raises(RunError, match=r"exists: continue it with --resume, or choose another"):
        coop.train(tiny(), finished)
    assert snapshot(finished) == before


def test_resume_refuses_other_settings_and_fewer_steps(finished: Path) -> None:
    before = snapshot(finished)
    with pytest.raises(RunError, match=r"made with batch_size=16; --resume cannot change it to 8"):
        coop.train(tiny(batch_size=8), finished, resume=True)
    with pytest.raises(RunError, match="has done 10 steps already, more than the 5 asked for"):
        coop.train(tiny(steps=2), finished, resume=True)
    assert snapshot(finished) == before


def test_resume_of_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run: it has no readable config.json"):
        coop.train(None, tmp_path, resume=True)
    (tmp_path / "config.json").write_text('{"format": 99}')
    with pytest.raises(RunError, match="not of format 1, which this version reads, but of 99"):
        coop.train(None, tmp_path, resume=True)


def test_load_of_a_folder_that_is_not_a_run_or_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run: it has no readable config.json"):
        coop.CoopFlow.load(tmp_path)
    RunFolder.create(tmp_path, tiny())
    with pytest.raises(RunError, match="has no checkpoint yet"):
        coop.CoopFlow.load(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 99}')
    with pytest.raises(RunError, match=r"config.json cannot be used: .* but of 99"):
        coop.CoopFlow.load(tmp_path)


def test_a_checkpoint_of_another_format_is_refused(finished: Path, tmp_path: Path) -> None:
    tensors, facts = load_checkpoint(RunFolder.open(finished).latest_checkpoint())
    settings = {**json.loads(facts["config"]), "format": 2}
    save_checkpoint(tmp_path / "c.safetensors", tensors, {**facts, "config": json.dumps(settings)})
    with pytest.raises(RunError, match=r"c.safetensors cannot be used: .* but of 2"):
        coop.CoopFlow.load(tmp_path / "c.safetensors")


def test_a_data_set_too_small_to_be_judged_leaves_nothing_behind(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    for i in range(3):
        image_module.new("L", (8, 8)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="at least 4 images"):
        coop.train(tiny(data=f"folder:{tmp_path}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_has_grown_is_other_data(tmp_path: Path) -> None:
    """Of which another part is held out."""
    images, pixels = tmp_path / "images", np.random.default_rng(0)
    images.mkdir()

    def write(name: str) -> None:
        values = pixels.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(values).save(images / f"{name}.png")

    for i in range(40):
        write(f"{i:03d}")
    config = tiny(data=f"folder:{images}", steps=2, pretrain_steps=0)
    coop.train(config, tmp_path / "run")
    more = dataclasses.replace(config, steps=3)
    kept = (images / "000.png").read_bytes()
    write("000")
    with pytest.raises(RunError, match=r"began with other data: .* as many events now, but not"):
        coop.train(more, tmp_path / "run", resume=True)
    with pytest.warns(UserWarning, match=r"step-0000002.*: the run began with other data"):
        open_run(tmp_path / "run")
    (images / "000.png").write_bytes(kept)
    write("000a")
    with pytest.raises(RunError, match=r"began with other data: .*36.* has .*37.* now"):
        coop.train(more, tmp_path / "run", resume=True)
    (images / "000a.png").unlink()
    open_run(tmp_path / "run")
    coop.train(more, tmp_path / "run", resume=True)


def test_options_may_hold_tuples(tmp_path: Path) -> None:
    config = tiny(flow_options={"net": "mlp", "couplings": 2, "widths": (16,)}, steps=2)
    coop.train(config, tmp_path / "run")
    coop.train(config, tmp_path / "run", resume=True)


def test_models_that_do_not_fit_the_events_are_refused() -> None:
    config = tiny(energy="res", energy_options={"width": 4})
    for shape in ((1, 8, 16), (64,)):
        with pytest.raises(ValueError, match=r"energy must be mlp for events of shape .*got 'res'"):
            coop.model.build_energy(config, coop.model.EventSpec(shape, None))
    for name, value in (("dim", 64), ("image_shape", [1, 8, 8]), ("levels", 17)):
        with pytest.raises(ValueError, match=rf"flow_options must not have {name}"):
            coop.model.build_flow(
                tiny(flow_options={name: value}), coop.model.EventSpec((1, 8, 8), 17)
            )
    with pytest.raises(ValueError, match="flow must be realnvp for vectors, got 'glow'"):
        coop.model.build_flow(tiny(flow="glow"), coop.model.EventSpec((2,), None))


def test_options_that_follow_from_the_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="flow_options must not have levels"):
        coop.train(tiny(flow_options={"net": "mlp", "levels": 256}), tmp_path / "run")
    with pytest.raises(ValueError, match="flow_grad_norm must be > 0"):
        tiny(flow_grad_norm=0)
    with pytest.raises(ValueError, match="drift must be"):
        coop.train(tiny(step_size=1e300), tmp_path / "run")


def test_truncated_checkpoint_is_named_and_the_older_one_works(
    finished: Path, tmp_path: Path
) -> None:
    run = RunFolder.create(tmp_path / "run", tiny())
    for _, path in RunFolder.open(finished).checkpoints():
        (run.path / "checkpoints" / path.name).write_bytes(path.read_bytes())
    latest = run.latest_checkpoint()
    latest.write_bytes(latest.read_bytes()[:-100])
    expected = (
        r"step-0000010.safetensors is truncated.*the last good checkpoint is step-0000008.safe.*: "
        "delete what is newer to go on from it"
    )
    with pytest.raises(RunError, match=expected):
        coop.train(None, run.path, resume=True)
    latest.unlink()
    assert coop.train(None, run.path, resume=True)["steps"] == 7


def test_full_disk_during_a_run_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "run", os.fsync
    checkpoint_syncs = 0

    def fsync(fd: int) -> None:
        nonlocal checkpoint_syncs
        target = os.readlink(f"/proc/self/fd/{fd}")
        checkpoint_syncs += target.endswith(".tmp") and "safetensors" in target
        if checkpoint_syncs > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"No space left on device: .*step-0000008.safetensors'"):
            coop.train(tiny(), path)
    run = RunFolder.open(path)
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["step-0000004.safetensors"]
    assert load_checkpoint(run.latest_checkpoint())[1]["step"] == 4
    assert coop.train(None, path, resume=True)["steps"] == 7


def test_a_write_that_the_system_cuts_off_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def explode_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A weight becomes infinite there, in every training at the rates of ``tiny``."""
    original = Trainer.update_energy

    def explode(self: Trainer, *args: torch.Tensor, **options: bool) -> dict[str, torch.Tensor]:
        metrics = original(self, *args, **options)
        if self.step == step and self.config.energy_lr == tiny().energy_lr:
            with torch.no_grad():
                next(self.model.energy.parameters()).fill_(math.inf)
        return metrics

    monkeypatch.setattr(Trainer, "update_energy", explode)


# Between two log lines: a chain is the first to see it, or a checkpoint or picture is due before.
@pytest.mark.parametrize(
    ("every", "seen", "last"),
    [
        ({"log_every": 2}, 8, 4),
        ({"log_every": 50, "checkpoint_every": 1}, 6, 5),
        ({"log_every": 50, "sample_every": 2}, 6, 4),
    ],
)
def test_divergence_stops_the_run_and_the_last_good_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: dict[str, int], seen: int, last: int
) -> None:
    path = tmp_path / "run"
    explode_at(monkeypatch, 5)
    with pytest.raises(cf.NonFiniteError, match="training diverged by step") as stopped:
        coop.train(tiny(**every), path)
    run = RunFolder.open(path)
    assert run.load_latest()[1]["step"] == last
    assert all(t.isfinite().all() for t in run.load_latest()[0].values())
    message = str(stopped.value)
    assert f"the last good checkpoint is step-000000{last}.safetensors" in message
    assert message.endswith(f"coopflow train --out {path} --resume --lr X")
    assert "energy_lr=0.002" in message
    facts = json.loads((path / "divergence.json").read_text())
    assert facts["from_checkpoint"] == f"step-000000{last}.safetensors"
    assert facts["settings"]["energy_lr"] == 2e-3
    assert facts["step"] == stopped.value.step == seen
    assert (facts["chains"] is not None) == ("in 16 of the 16 chains" in message) == (seen == 8)
    # It does the same again, and not at another rate.
    with pytest.raises(cf.NonFiniteError, match=f"training diverged by step {seen}"):
        coop.train(None, path, resume=True)
    slower = dataclasses.replace(run.config, energy_lr=1e-4)
    assert coop.train(slower, path, resume=True)["energy_updates"] == 7


def test_a_resumed_run_may_change_its_rates_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    coop.train(tiny(steps=1), path)
    changed = tiny(flow_lr=2e-5, energy_lr=1e-5)
    coop.train(changed, path, resume=True)
    run = RunFolder.open(path)
    assert run.config == changed
    assert [(c["step"], c["setting"], c["before"], c["after"]) for c in run.history] == [
        (4, "steps", 1, 7),
        (4, "flow_lr", 1e-4, 2e-5),
        (4, "energy_lr", 2e-3, 1e-5),
    ]
    page = report_run(path).read_text()
    assert "<th scope='row'>energy_lr from step 4</th><td>1e-05</td>" in page
    # The rate counts: at that of before the weights are others.
    twin = tmp_path / "twin"
    coop.train(tiny(), twin)
    a, b = coop.CoopFlow.load(path), coop.CoopFlow.load(twin)
    assert not same(weights(a.energy), weights(b.energy))


def test_every_resumed_run_adds_to_the_history(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", tiny(steps=1))
    for steps in (2, 3):
        RunFolder.open(tmp_path / "run").adopt(tiny(steps=steps))
    history = RunFolder.open(tmp_path / "run").history
    assert [(c["setting"], c["before"], c["after"]) for c in history] == [
        ("steps", 1, 2),
        ("steps", 2, 3),
    ]


def test_nothing_is_left_behind_by_settings_that_do_not_work(tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"data": "mnist"}, "data must be one of"),
        ({"flow": "nice"}, "flow must be one of realnvp"),
        ({"flow_options": {"width": 3}}, "flow_options do not fit realnvp: .*'width'"),
        ({"energy": "conv"}, "energy must be one of"),
        ({"energy_options": {"depth": 3}}, "energy_options do not fit mlp"),
    ]
    for changes, message in bad:
        with pytest.raises(ValueError, match=message):
            coop.train(tiny(**changes), tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "ten"}, "steps must be int, got 'ten'"),
        ({"batch_size": 2.0}, "batch_size must be int, got 2.0"),
        ({"noise": None}, "noise must be float, got None"),
        ({"step_clip": "0.1"}, r"step_clip must be float \| None, got '0.1'"),
        ({"flip": 1}, "flip must be bool, got 1"),
        ({"flow_options": [1]}, r"flow_options must be dict\[str, Any\], got \[1\]"),
        ({"flow_betas": [0.9]}, r"flow_betas must be tuple\[float, float\], got \(0.9,\)"),
    ],
)
def test_settings_of_another_type(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        tiny(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepz": 1}, "unknown setting 'stepz'"),
        ({"preset": "big"}, "preset must be one of"),
        ({"batch_size": 0}, "batch_size must be finite and ≥ 1, got 0"),
        ({"noise": -0.1}, "noise must be finite and ≥ 0, got -0.1"),
        ({"step_size": math.nan}, "step_size must be finite"),
        ({"flow_ema": 1.0}, r"flow_ema must be in \[0, 1\), got 1.0"),
        ({"flow_betas": (1.0, 0.5)}, r"flow_betas must be two numbers in \[0, 1\), got \(1.0"),
        ({"energy_betas": (0.5, math.nan)}, r"energy_betas must be two numbers in \[0, 1\)"),
        ({"step_clip": 0.0}, "step_clip must be > 0"),
        ({"steps": 0, "pretrain_steps": 0}, "must be ≥ 1, got 0"),
        ({"energy_skip_norm": 0.0}, "energy_skip_norm must be > 0, or none for no bound"),
        ({"flow_skip_norm": -1.0}, "flow_skip_norm must be finite and ≥ 0, got -1.0"),
        ({"warmup_by": "epochs"}, "warmup_by must be one of updates, batches, got 'epochs'"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


# --- the model ----------------------------------------------------------------------------------


def test_settings_survive_json() -> None:
    for name in coop.PRESETS:
        config = TrainConfig.from_dict({"preset": name})
        assert TrainConfig.from_json(config.to_json()) == config


def test_samples_do_not_depend_on_the_batch_size(finished: Path) -> None:
    model = coop.CoopFlow.load(finished)
    whole = model.sample(10, Key(1))
    torch.testing.assert_close(model.sample(10, Key(1), batch_size=3), whole, rtol=0, atol=1e-5)
    assert whole.shape == (10, 1, 8, 8)
    assert whole.abs().max() <= 1
    assert not torch.equal(whole, model.sample(10, Key(2)))


def test_samples_are_without_dropout_whatever_the_models_mode() -> None:
    options = {"channels": 8, "blocks": 1, "components": 2, "dequant_blocks": 0, "dropout": 0.5}
    options |= {"scales": [[0, 1]], "sampling_dropout": True}
    model = coop.CoopFlow.from_config(
        tiny(flow="flowpp", flow_options=options), coop.model.EventSpec((1, 4, 4), 17)
    )
    assert model.training
    with torch.no_grad():
        for p in model.flow.parameters():
            p.add_(0.1)
    dropped = model.propose(4, Key(1))
    pairs = model.sample_pairs(4, Key(1))
    assert model.flow.training
    assert not torch.equal(pairs[0], dropped)
    expected = model.eval().sample_pairs(4, Key(1))
    assert all(map(torch.equal, pairs, expected))
    assert torch.equal(pairs[0], model.propose(4, Key(1)))
    assert not model.flow.training


def test_samples_of_a_later_chain_are_those_of_the_whole(finished: Path) -> None:
    model = coop.CoopFlow.load(finished)
    whole = model.sample(10, Key(1))
    for size in (500, 2):
        part = model.sample(6, Key(1).at_chain(4), batch_size=size)
        torch.testing.assert_close(part, whole[4:], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="chain"):
        model.sample(4, Key(1).at_chain(2**63 - 2))


def test_save_and_load(finished: Path, tmp_path: Path) -> None:
    model = coop.CoopFlow.load(finished)
    model.save(tmp_path / "model.safetensors")
    again = coop.CoopFlow.load(tmp_path / "model.safetensors")
    assert torch.equal(model.sample(4, Key(1)), again.sample(4, Key(1)))


def test_load_takes_the_averaged_weights(finished: Path) -> None:
    tensors, _ = load_checkpoint(RunFolder.open(finished).latest_checkpoint())
    loaded = coop.CoopFlow.load(finished).state_dict()
    name = "energy.layers.0.weight"
    assert torch.equal(loaded[name], tensors["energy_ema.layers.0.weight"])
    assert not torch.equal(loaded[name], tensors[name])


@pytest.mark.parametrize("net", ["flow", "energy"])
def test_an_average_that_is_missing_is_named(finished: Path, tmp_path: Path, net: str) -> None:
    """The weights beside it are not taken in its place."""
    tensors, facts = load_checkpoint(RunFolder.open(finished).latest_checkpoint())
    names = [name for name in tensors if name.startswith(f"{net}_ema.")]
    for name in (names[0], names[-1]):
        kept = {k: t for k, t in tensors.items() if k != name}
        save_checkpoint(tmp_path / "c.safetensors", kept, facts)
        with pytest.raises(RunError, match=rf"{name} is missing"):
            coop.CoopFlow.load(tmp_path / "c.safetensors")


def test_a_model_without_settings_cannot_be_saved(finished: Path, tmp_path: Path) -> None:
    built = coop.CoopFlow.load(finished)
    own = coop.CoopFlow(built.flow, built.energy, built.sampler)
    with pytest.raises(ValueError, match="save needs a model made by"):
        own.save(tmp_path / "model.safetensors")
    with pytest.raises(RunError, match="does not exist"):
        coop.CoopFlow.load(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="n must be ≥ 1, got 0"):
        own.sample(0)
    with pytest.raises(TypeError, match=r"key must be a Key, .* or None, got int"):
        own.sample(2, 1)  # type: ignore[arg-type]


def test_cuda_graph_is_auto_or_a_switch() -> None:
    assert [tiny(cuda_graph=how).cuda_graph for how in ("auto", True, False)] == [
        "auto",
        True,
        False,
    ]
    for bad in ("true", None, 1):
        with pytest.raises(TypeError, match=r"cuda_graph must be bool \| Literal"):
            tiny(cuda_graph=bad)
    assert TrainConfig.from_json(tiny(cuda_graph=False).to_json()).cuda_graph is False
    parse = SettingType.of("bool | Literal['auto']").parse
    assert [parse(word) for word in ("auto", "true", "False")] == ["auto", True, False]


def test_ctrl_c_in_the_last_step_ends_the_run_as_usual(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, asked = sys.modules["coopflow_ext.coop.train"], threading.Event()
    step = Trainer.train_step

    def interrupted(self: Trainer) -> Any:
        if self.step == self.config.total_steps - 1:
            asked.set()
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    monkeypatch.setattr(train, "_interrupts", lambda: nullcontext(asked))
    summary = coop.train(tiny(), tmp_path / "run")
    assert asked.is_set()
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary


def test_a_data_set_is_known_by_both_splits_and_their_layout(digits: Dataset) -> None:
    train, held_out = digits.train, digits.held_out
    others = [
        dataclasses.replace(digits, train=train.flip(0)),
        dataclasses.replace(digits, held_out=held_out.flip(0)),
        dataclasses.replace(digits, train=train.view(torch.int8)),
        dataclasses.replace(
            digits, train=train.reshape(-1, 1, 4, 16), held_out=held_out.reshape(-1, 1, 4, 16)
        ),
    ]
    digests = {data.digest for data in (digits, *others)}
    assert len(digests) == 5


def test_the_first_thing_that_went_wrong_is_told() -> None:
    step = torch.tensor
    divergence = Divergence(4, torch.device("cpu"))
    divergence.note_rebuilt(step(2), [torch.tensor(0.5), torch.tensor(1.0)])
    divergence.note_chains(step(2), torch.full((4,), 3), 3)
    divergence.check()
    assert not divergence.flag
    divergence.note_rebuilt(step(3), [torch.tensor(math.nan), torch.tensor(0.5)])
    divergence.note_rebuilt(step(4), [torch.tensor(9.0)])
    divergence.note_chains(step(5), torch.zeros(4, dtype=torch.int64), 3)
    assert divergence.flag
    with pytest.raises(RuntimeError, match=r"^in step 3, .* are off by nan times what is allowed"):
        divergence.check()
    divergence.reset()
    divergence.check()
    divergence.note_chains(step(7), step([3, 3, 2, 0]), 3)
    divergence.note_chains(step(8), step([0, 0, 0, 0]), 3)
    with pytest.raises(
        cf.NonFiniteError, match=r"from iteration 7 .* 2 of the 4 .* \(2, 3\); "
    ) as told:
        divergence.check()
    assert told.value.chains.tolist() == [2, 3]
