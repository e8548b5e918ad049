"""Another number of steps and other coefficients at a call; through CUDA graphs, see
test_sampler_graph.py."""

from __future__ import annotations

import pytest
import torch

import coopflow_ext as cf
from coopflow_ext.energies import GaussianEnergy
from coopflow_ext.samplers import LangevinSampler

KEY = cf.Key(3)
PATHS = [{"kernel": True}, {"kernel": False}, {"differentiable": True}, {"differentiable": "last"}]

# A sampler's options, a call's, and those of a sampler that does the same.
SAME = [
    ({"step_size": 0.1}, {"n_steps": 9}, {"step_size": 0.1}),
    ({"step_size": 0.1}, {"step_size": 0.2}, {"step_size": 0.2}),
    ({"step_size": 0.1}, {"drift": 0.03}, {"drift": 0.03}),
    ({"step_size": 0.1}, {"noise": 0.03}, {"drift": 0.1**2 / 2, "noise": 0.03}),
    ({"step_size": 0.1}, {"temperature": 0.4}, {"step_size": 0.1, "temperature": 0.4}),
    ({"step_size": 0.1, "temperature": 0.4}, {"step_size": 0.2},
     {"step_size": 0.2, "temperature": 0.4}),
    ({"step_size": 0.1, "temperature": 0.4}, {"noise": 0.2}, {"drift": 0.1**2 / 2, "noise": 0.2}),
    ({"drift": 0.1, "noise": 0.2}, {"drift": 0.3}, {"drift": 0.3, "noise": 0.2}),
    ({"drift": 0.1, "noise": 0.2}, {"step_size": 0.3}, {"step_size": 0.3}),
    ({"drift": 0.1}, {"drift": 0.3, "noise": 0.0}, {"drift": 0.3, "noise": 0.0}),
    ({"drift": lambda k: 0.3 / (k + 1)}, {"n_steps": 9}, {"drift": lambda k: 0.3 / (k + 1)}),
    ({"drift": [0.1, 0.2, 0.3, 0.4, 0.5]}, {"n_steps": 3}, {"drift": [0.1, 0.2, 0.3]}),
    ({"drift": 0.1}, {"n_steps": 2, "drift": [0.2, 0.1]}, {"drift": [0.2, 0.1]}),
    ({"drift": 0.1}, {"drift": torch.arange(1.0, 5.0)[None] / 10},
     {"drift": torch.arange(1.0, 5.0)[None] / 10}),
]  # fmt: skip


@pytest.fixture
def energy() -> GaussianEnergy:
    return GaussianEnergy(torch.tensor([1.0, -1.0]), torch.eye(2) * 0.3)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: "-".join(map(str, *path.items())))
@pytest.mark.parametrize(("options", "call", "same"), SAME)
def test_a_call_s_values_are_those_of_another_sampler(energy, path, options, call, same):
    x0 = torch.randn(4, 2, requires_grad="differentiable" in path)
    common = {"reference_std": 2.0, "pull": (torch.ones(4, 2), 0.5), "stats": True, **path}
    sampler = LangevinSampler(energy, n_steps=5, **options, **common)
    alone = LangevinSampler(energy, n_steps=call.get("n_steps", 5), **same, **common)
    out, expected = sampler(x0, key=KEY, **call), alone(x0, key=KEY)
    torch.testing.assert_close(out.x, expected.x, rtol=0, atol=0)
    torch.testing.assert_close(vars(out.stats), vars(expected.stats), rtol=0, atol=0)
    assert out.key == expected.key == KEY.advance(call.get("n_steps", 5))
    if x0.requires_grad and path["differentiable"] is True:
        grads = [torch.autograd.grad(o.x.sum(), x0)[0] for o in (out, expected)]
        torch.testing.assert_close(*grads, rtol=0, atol=0)
    first = sampler(x0, key=KEY)  # nothing of the call stays
    again = LangevinSampler(energy, n_steps=5, **options, **common)(x0, key=KEY)
    torch.testing.assert_close(first.x, again.x, rtol=0, atol=0)


def test_no_steps(energy):
    x0 = torch.randn(4, 2)
    out = LangevinSampler(energy, n_steps=5, step_size=0.1, return_trajectory=True)(x0, n_steps=0)
    assert torch.equal(out.x, x0)
    assert out.trajectory.shape == (0, 4, 2)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("sampler", [LangevinSampler, cf.MALASampler])
def test_no_steps_of_a_schedule(energy, sampler, kernel):
    x0 = torch.randn(4, 2)
    out = sampler(energy, n_steps=0, step_size=lambda k: 0.1 / (k + 1), kernel=kernel)(x0)
    assert torch.equal(out.x, x0)
    steps = LangevinSampler(energy, n_steps=5, step_size=lambda k: 0.1, kernel=kernel)
    assert torch.equal(steps(x0, n_steps=0).x, x0)
    empty = LangevinSampler(energy, n_steps=0, step_size=[], kernel=kernel)
    assert torch.equal(empty(x0).x, x0)


@pytest.mark.parametrize(
    ("options", "call", "error", "message"),
    [
        ({"drift": [0.1] * 5}, {"n_steps": 6}, ValueError,
         "n_steps=6 needs as many values of drift, and the sampler has 5"),
        ({"drift": 0.1}, {"drift": [0.1] * 4}, ValueError, "drift must have one value for each"),
        ({"drift": 0.1}, {"drift": -1.0}, ValueError, "drift must be ≥ 0"),
        ({"drift": 0.1}, {"drift": torch.tensor(0.1, requires_grad=True)}, ValueError,
         "drift must not require grad"),
        ({"drift": 0.1}, {"drift": 0.1, "step_size": 0.1}, ValueError, "exactly one of step_size"),
        ({"drift": 0.1}, {"step_size": 0.1, "noise": 0.1}, ValueError, "noise goes with drift"),
        ({"drift": 0.1}, {"noise": 0.1, "temperature": 1.0}, ValueError, "temperature and noise"),
        ({"drift": 0.1, "noise": 0.1}, {"temperature": 1.0}, ValueError, "temperature and noise"),
        ({"drift": 0.1}, {"temperature": "hot"}, TypeError, "temperature must be"),
        ({"drift": 0.1}, {"n_steps": 2.0}, TypeError, "n_steps must be an int"),
        ({"drift": 0.1}, {"n_steps": -1}, ValueError, "n_steps must be ≥ 0"),
        ({"drift": 0.1}, {"noise": torch.rand(1, 3)}, ValueError, "noise has values for 3 chains"),
        ({"drift": torch.rand(1, 4)}, {"temperature": torch.rand(1, 3)}, ValueError,
         "got drift for 4 and temperature for 3"),
        ({"drift": 0.1}, {"n_steps": 3, "xi": torch.randn(5, 4, 2)}, ValueError, "xi must"),
    ],
)  # fmt: skip
def test_a_call_s_values_are_refused_by_name(energy, options, call, error, message):
    sampler = LangevinSampler(energy, n_steps=5, **options)
    with pytest.raises(error, match=message):
        sampler(torch.randn(4, 2), **call)


def test_where_a_table_is_too_short_the_call_is_told_what_to_give(energy):
    x0 = torch.randn(4, 2)
    advised = LangevinSampler(energy, n_steps=2, drift=[0.1, 0.2])
    with pytest.raises(ValueError, match=r"the sampler has 2; give drift at the call too$"):
        advised(x0, n_steps=3)
    snr = LangevinSampler(energy, n_steps=2, snr=[0.1, 0.2])
    with pytest.raises(ValueError, match=r"the sampler has 2$"):  # a call takes none
        snr(x0, n_steps=3)
    row = LangevinSampler(energy, n_steps=2, drift=[[0.1, 0.1, 0.1, 0.1]])
    constant = LangevinSampler(energy, n_steps=3, drift=0.1)
    torch.testing.assert_close(row(x0, key=KEY, n_steps=3).x, constant(x0, key=KEY).x)


def test_the_denoising_step_of_a_shorter_call_is_its_own(energy):
    """Its drift and that it has no noise, of tables, numbers and values per chain."""
    x0 = torch.randn(4, 2)
    for drift, noise in (([0.1, 0.2, 0.3], 0.5), (0.1, [0.5, 0.4, 0.3]), (0.1, 0.0)):
        options = {"drift": drift, "noise": noise}
        sampler = LangevinSampler(energy, n_steps=3, denoise=[0.1, 0.2, 0.3, 0.4], **options)
        alone = LangevinSampler(energy, n_steps=3, **options)
        for n_steps in (3, 1):
            x = alone(x0, key=KEY, n_steps=n_steps).x
            expected = x - torch.linspace(0.1, 0.4, 4)[:, None] * energy_gradient(energy, x)
            got = sampler(x0, key=KEY, n_steps=n_steps)
            torch.testing.assert_close(got.x, expected)
            assert got.key == KEY.advance(n_steps + 1)


def energy_gradient(energy, x: torch.Tensor) -> torch.Tensor:
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(energy(leaf).sum(), leaf)[0]
