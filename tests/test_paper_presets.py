"""The presets of the paper's experiments hold what the authors' published code does."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from coopflow_ext.coop import TrainConfig, Trainer
from coopflow_ext.coop.learner import Learner
from coopflow_ext.coop.model import EventSpec, build_energy, build_flow, build_sampler
from coopflow_ext.data import Dataset, load
from coopflow_ext.energies import GaussianMixtureEnergy

# Batches of an epoch, δ at test, epochs for which the flow of (Pre) is frozen, and then trained in
# every so many batches.
PAPER = {
    "cifar10": (50_000 // 28, 0.04, 26, 1),
    "svhn": (73_257 // 28, 0.035, 11, 1),
    "celeba": (182_637 // 28, 0.035, 10, 5),
}


class Clips(NamedTuple):
    """What one of their scripts does with gradients: bounds of the norms, None where it has none.

    An update is skipped whose norm is not below the bound; the energy's not before ``skip_from``.
    """

    flow_groups: bool
    energy: float | None
    skip_flow: float | None
    skip_energy: float | None


CLIPS = {
    ("cifar10", False): Clips(True, None, None, None),
    ("cifar10", True): Clips(False, 5e5, 5e5, 5e5),
    ("svhn", False): Clips(False, 1.0, 1e6, 5e6),
    ("svhn", True): Clips(False, 1.0, 1e6, 5e6),
    ("celeba", False): Clips(False, 1.0, 1e6, 5e6),
    ("celeba", True): Clips(False, 1.0, 1e6, 5e6),
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
    clips = CLIPS[data, pre]
    assert (config.flow_clip_groups, config.flow_skip_norm) == (clips.flow_groups, clips.skip_flow)
    assert (config.energy_grad_norm, config.energy_skip_norm) == (clips.energy, clips.skip_energy)
    assert config.energy_skip_from == (epoch if pre else 0)
    assert (config.warmup_by, config.init_batches, config.flow_restart) == ("batches", 20, pre)


class Theirs:
    """One network's optimizer in their scripts, with the schedule that is told the images so far.

    ``optim.Adam(groups)`` and ``LambdaLR(optimizer, lambda s: min(1, s / (200 * 28)))``, whose
    first value is that of s = 0; both are stepped together, or neither.
    """

    def __init__(self, module: nn.Module, betas: tuple[float, float], warm_up: int) -> None:
        named = list(module.named_parameters())
        g = [p for name, p in named if name.endswith("original0")]
        rest = [p for name, p in named if not name.endswith("original0")]
        groups = [{"params": rest, "weight_decay": 0.0}, {"params": g, "weight_decay": 5e-5}]
        self.optimizer = torch.optim.Adam(groups if g else rest, betas=betas, foreach=False)
        self.groups = [group["params"] for group in self.optimizer.param_groups]
        self.parameters = list(module.parameters())
        self.warm_up = warm_up
        self.schedule(0)

    def schedule(self, images: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4 * min(1.0, images / self.warm_up)

    def clip(self, gradients: list[Tensor], bound: float | None, by_group: bool = False) -> float:
        """Takes over the gradients; the norm of all of them before they are scaled."""
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient.clone()
        norm = nn.utils.clip_grad_norm_(self.parameters, math.inf).item()
        for group in self.groups if by_group else [self.parameters]:
            nn.utils.clip_grad_norm_(group, math.inf if bound is None else bound)
        return norm

    def step(self, images: int) -> None:
        self.optimizer.step()
        self.schedule(images)


def _their_iteration(
    flow: Theirs,
    energy: Theirs,
    clips: Clips,
    gradients: dict[str, list[Tensor]],
    batch: int,
    spared: bool,
) -> None:
    """Their update with these gradients (the flow's are missing while it is frozen); the energy's
    is spared in epoch 0 of (Pre)."""
    learns = "flow" in gradients
    if learns:
        flow_norm = flow.clip(gradients["flow"], 1.0, clips.flow_groups)
    energy_norm = energy.clip(gradients["energy"], clips.energy)
    if clips.skip_energy is None or energy_norm < clips.skip_energy or spared:
        energy.step(batch * 28)
        if learns and (clips.skip_flow is None or flow_norm < clips.skip_flow):
            flow.step(batch * 28)


# Factors of the flow's and the energy's gradients by iteration: clipped, and beyond every bound.
FACTORS = [(1e1, 1e9), (1e1, 1e2), (1e9, 1e2), (1e1, 1e2), (1e1, 1e9), (1e1, 1e2), (1e1, 1e2)]

# Which networks those move: none at rate 0, none where it is skipped, frozen or not its turn.
_OTHERS = ["", "", "e", "ef", "", "ef", "ef"]
MOVED = {
    ("cifar10", False): ["", "", "ef", "ef", "ef", "ef", "ef"],
    ("cifar10", True): ["", "", "e", "e", "", "ef", "ef"],
    ("svhn", False): _OTHERS,
    ("svhn", True): ["", "", "e", "e", "", "ef", "ef"],
    ("celeba", False): _OTHERS,
    ("celeba", True): ["", "", "e", "e", "", "e", "e"],
}


@pytest.mark.parametrize(("warm_up", "iterations"), [(200, 3), (4, 7)])
@pytest.mark.parametrize("variant", ["", "-pre"])
@pytest.mark.parametrize("data", PAPER)
def test_updates_are_those_of_their_scripts(digits, data, variant, warm_up, iterations):
    """From the same gradients the same weights, where clips and skips are reached: with the warm-up
    as it is three iterations, with a short one seven, of which (Pre) freezes the flow in two."""
    pre = variant == "-pre"
    small = {
        "data": "digits",
        "batch_size": 4,
        "flow_options": {
            "scales": [[0, 1]],
            "channels": 4,
            "blocks": 0,
            "components": 2,
            "dequant_blocks": 0,
        },
        "energy": "mlp",
        "energy_options": {"widths": [8]},
        "langevin_steps": 1,
        "warmup_steps": warm_up,
        **({"pretrain_steps": 2, "flow_frozen_steps": 2, "energy_skip_from": 1} if pre else {}),
    }
    config = TrainConfig.from_dict({"preset": data + variant, **small})
    trainer = Trainer(config, digits)
    gradients: dict[str, list[Tensor]] = {}
    for learner in (trainer.flow, trainer.energy):
        _spy_on_gradients(trainer, learner, gradients)
    for _ in range(config.pretrain_steps):
        trainer.train_step()
    twin = copy.deepcopy(trainer.model)
    flow = Theirs(twin.flow, (0.9, 0.999), warm_up * 28)
    energy = Theirs(twin.energy, (0.5, 0.5), warm_up * 28)
    taken = []
    for batch in range(iterations):
        gradients.clear()
        before = copy.deepcopy(twin.state_dict())
        trainer.train_step()
        _their_iteration(flow, energy, CLIPS[data, pre], gradients, batch, pre and batch == 0)
        for (name, ours), theirs in zip(
            trainer.model.named_parameters(), twin.parameters(), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=1e-8, msg=name)
        moved = {k.partition(".")[0] for k, v in twin.state_dict().items() if v.ne(before[k]).any()}
        taken.append("".join(sorted(name[0] for name in moved)))
    assert taken == MOVED[data, pre][:iterations]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def _spy_on_gradients(trainer: Trainer, learner: Learner, seen: dict[str, list[Tensor]]) -> None:
    """Scale the learner's gradients, which it then clips, and keep what they were before."""
    clip = learner._clip

    def spy() -> Tensor:
        gradients = [p.grad for p in learner.module.parameters()]
        if not trainer.pretraining:
            factor = FACTORS[trainer.iteration][learner.name == "energy"]
            torch._foreach_mul_(gradients, factor)
        seen[learner.name] = [g.clone() for g in gradients]
        return clip()

    learner._clip = spy


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
