"""A chain is a function of its key, its number and its start: not of who runs beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import coopflow_ext as cf
from coopflow_ext.energies import GaussianMixtureEnergy, MLPEnergy, ResEnergy
from coopflow_ext.samplers import LangevinSampler

KEY = cf.Key(12345)


def mixture() -> GaussianMixtureEnergy:
    return GaussianMixtureEnergy(torch.tensor([[-1.0, 0.0, 2.0], [1.5, 0.5, -1.0]]), 0.7)


def starts(n: int = 64) -> Tensor:
    return cf.ops.normal((n, 3), cf.Key(7).tensor())


SCORES = {
    "elementwise": lambda x: -x * (x.square() - 1),
    "mixture": mixture().score,
}


@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stats": True, "return_trajectory": True},
        {"noise_before_gradient": True},
        {"grad_norm": 1.0, "clamp": (-1, 1)},
        {"on_nonfinite": "ignore"},
    ],
)
def test_a_chain_is_the_same_alone(score, options):
    """Chain 17 of 64 = the only chain of a batch at number 17, bitwise."""
    x0 = starts()
    sampler = LangevinSampler(score=SCORES[score], n_steps=25, drift=0.05, noise=0.3, **options)
    whole = sampler(x0, key=KEY)
    alone = sampler(x0[17:18], key=KEY.at_chain(17))
    assert torch.equal(alone.x[0], whole.x[17])
    if "stats" in options:
        assert torch.equal(alone.trajectory[:, 0], whole.trajectory[:, 17])
        for name in ("grad_norm", "displacement"):
            assert torch.equal(getattr(alone.stats, name)[:, 0], getattr(whole.stats, name)[:, 17])


def test_a_network_chain_is_the_same_alone_to_rounding():
    """Convolutions round differently for other batch sizes; the noise is the same."""
    torch.manual_seed(0)
    energy = ResEnergy(channels=1, width=4, image_size=8)
    x0 = torch.rand(16, 1, 8, 8) * 2 - 1
    sampler = LangevinSampler(energy, n_steps=20, step_size=0.05)
    whole = sampler(x0, key=KEY).x
    parts = [sampler(x0[i : i + 4], key=KEY.at_chain(i)).x for i in range(0, 16, 4)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


_CHILD = """
import sys, torch
import coopflow_ext as cf
offset, path = int(sys.argv[1]), sys.argv[2]
x0 = cf.ops.normal((64, 3), cf.Key(7).tensor())[offset : offset + 32]
score = lambda x: -x * (x.square() - 1)
torch.manual_seed(0)
network = cf.energies.MLPEnergy(3)
options = {"n_steps": 25, "drift": 0.05, "noise": 0.3}
samplers = cf.LangevinSampler(score=score, **options), cf.LangevinSampler(network, **options)
torch.save([s(x0, key=cf.Key(12345, chain=offset)).x for s in samplers], path)
"""


def test_two_processes_make_what_one_makes(tmp_path):
    """Bitwise for an elementwise score, to the network's rounding for a network."""
    root = str(Path(cf.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    paths = [tmp_path / f"{offset}.pt" for offset in (0, 32)]
    children = [
        subprocess.Popen([sys.executable, "-c", _CHILD, path.stem, str(path)], env=environment)
        for path in paths
    ]
    assert [child.wait() for child in children] == [0, 0]
    torch.manual_seed(0)
    network = MLPEnergy(3)
    halves = zip(*(torch.load(path) for path in paths), strict=True)
    elementwise, with_network = (torch.cat(parts) for parts in halves)
    options = {"n_steps": 25, "drift": 0.05, "noise": 0.3}
    whole = LangevinSampler(score=SCORES["elementwise"], **options)(starts(), key=KEY).x
    assert torch.equal(elementwise, whole)
    # Matrix products of other sizes round otherwise, by an ulp or so at each step.
    whole = LangevinSampler(network, **options)(starts(), key=KEY).x
    torch.testing.assert_close(with_network, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise_first", [False, True])
def test_an_interrupted_chain_goes_on(noise_first):
    x0, energy = starts(), mixture()
    options = {"drift": 0.05, "noise": 0.3, "noise_before_gradient": noise_first}
    whole = LangevinSampler(energy, n_steps=30, **options)(x0, key=KEY)
    x, key = x0, KEY
    for n_steps in (7, 13, 10):
        out = LangevinSampler(energy, n_steps=n_steps, **options)(x, key=key)
        x, key = out.x, cf.Key.from_state_dict(out.key.state_dict())
    assert torch.equal(x, whole.x)
    assert key == whole.key


def test_repeated_runs_are_equal_for_any_number_of_threads():
    torch.manual_seed(0)
    energy = ResEnergy(channels=1, width=4, image_size=8)
    x0 = torch.rand(8, 1, 8, 8)
    sampler = LangevinSampler(energy, n_steps=10, step_size=0.05)
    assert torch.equal(sampler(x0, key=KEY).x, sampler(x0, key=KEY).x)
    threads = torch.get_num_threads()
    x0, score = starts(4096), SCORES["elementwise"]
    sampler = LangevinSampler(score=score, n_steps=10, drift=0.05, noise=0.3)
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(sampler(x0, key=KEY).x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
