"""Energies: parity with the authors' network, sizes, closed-form scores, errors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from coopflow_ext import energies

DATA = Path(__file__).parent / "data"


def _score_by_autograd(energy: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(energy(x).sum(), x)
    return -gradient


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(DATA / "ebm_small.safetensors")


@pytest.fixture(scope="module")
def golden_energy(golden: dict[str, Tensor]) -> energies.ResEnergy:
    """The authors' network at width 8, under our names."""
    energy = energies.ResEnergy(channels=3, width=8, image_size=32)
    names = {"f.0": "stem", "f.5": "head"} | {f"f.{i + 2}": f"blocks.{i}" for i in range(3)}
    state = {}
    for key, value in golden.items():
        if key.startswith("state."):
            layer = key.removeprefix("state.")
            ours = names[layer[:3]] + layer[3:].replace("res.", "skip.")
            state[ours] = value
    energy.load_state_dict(state)
    return energy


def test_res_energy_equals_the_authors_network(golden, golden_energy):
    # float32 convolutions sum up to 1,024 products; 1e-5 of the result is a few ulp per layer.
    u = golden_energy(golden["in.x"])
    torch.testing.assert_close(-u, golden["out.f"], rtol=1e-5, atol=1e-5)
    scale = golden["out.grad_f"].abs().max().item()
    score = _score_by_autograd(golden_energy, golden["in.x"])
    torch.testing.assert_close(score, golden["out.grad_f"], rtol=1e-5, atol=1e-5 * scale)


def test_thirty_noise_free_steps_equal_the_authors_chain(golden, golden_energy):
    x = golden["in.x"]
    for _ in range(30):
        step = (0.5 * 0.03**2 * _score_by_autograd(golden_energy, x)).clamp(-0.1, 0.1)
        x = (x + step).clamp(-1, 1)
    expected = golden["out.x_after_30_steps_delta_0.03"]
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-5)


def test_res_energy_has_the_papers_parameter_count():
    with torch.device("meta"):
        energy = energies.ResEnergy(width=128)
    assert sum(p.numel() for p in energy.parameters()) == 17_129_444


@pytest.mark.parametrize("image_size", [8, 16, 32, 64])
def test_res_energy_sizes(image_size):
    energy = energies.ResEnergy(channels=1, width=4, image_size=image_size)
    x = torch.randn(2, 1, image_size, image_size)
    assert energy(x).shape == (2,)
    assert len(energy.blocks) == int(math.log2(image_size / 4))


def test_res_energy_doubles_its_channels_three_times_at_most():
    energy = energies.ResEnergy(1, width=2, image_size=64)
    assert [block.conv2.out_channels for block in energy.blocks] == [4, 8, 16, 16]
    assert energy.head.in_channels == 16


def test_res_energy_refuses_bad_sizes():
    with pytest.raises(ValueError, match="image_size must be one of"):
        energies.ResEnergy(image_size=28)
    with pytest.raises(ValueError, match="x must have shape"):
        energies.ResEnergy(width=2, image_size=8)(torch.zeros(1, 3, 16, 16))


def test_mlp_energy_is_the_written_formula():
    energy = energies.MLPEnergy(6, widths=(5, 4), activation="tanh").double()
    x = torch.randn(3, 1, 2, 3, dtype=torch.float64)
    first, second, last = energy.layers
    h = torch.tanh(x.reshape(3, 6) @ first.weight.T + first.bias)
    h = torch.tanh(h @ second.weight.T + second.bias)
    expected = h @ last.weight[0] + last.bias[0]
    torch.testing.assert_close(energy(x), expected)
    assert energy(x).dtype == torch.float64


@pytest.mark.parametrize("activation", ["silu", "softplus", "tanh", "gelu"])
def test_mlp_energy_is_smooth(activation):
    energy = energies.MLPEnergy(2, widths=(3,), activation=activation).double()
    x = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(energy, x)


def test_mlp_energy_refuses_bad_arguments():
    with pytest.raises(ValueError, match="activation must be one of"):
        energies.MLPEnergy(2, activation="relu")
    with pytest.raises(ValueError, match="widths must hold the size of at least one"):
        energies.MLPEnergy(2, widths=())
    with pytest.raises(ValueError, match="of 2 elements"):
        energies.MLPEnergy(2)(torch.zeros(4, 3))


def _mixture() -> energies.GaussianMixtureEnergy:
    means = torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.5, 0.0]], dtype=torch.float64)
    stds = torch.tensor([[0.5], [1.5]], dtype=torch.float64)
    return energies.GaussianMixtureEnergy(means, stds, torch.tensor([1.0, 3.0]))


def _gaussian() -> energies.GaussianEnergy:
    mean = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    covariance = torch.tensor([[2.0, 0.3, 0.1], [0.3, 0.5, -0.2], [0.1, -0.2, 1.0]])
    return energies.GaussianEnergy(mean, covariance.double())


@pytest.mark.parametrize(
    "energy",
    [
        _mixture(),
        _gaussian(),
        energies.FunnelEnergy(3, 1.3),
        energies.DoubleWellEnergy(1.7),
        energies.RastriginEnergy(3.0),
        energies.RosenbrockEnergy(0.9, 7.0),
    ],
    ids=lambda e: type(e).__name__,
)
def test_scores_are_minus_the_gradient(energy):
    x = torch.randn(7, 3, dtype=torch.float64)
    assert energy(x).shape == (7,)
    torch.testing.assert_close(energy.score(x), _score_by_autograd(energy, x))


def test_gaussian_mixture_is_normalised():
    normals = [
        torch.distributions.MultivariateNormal(m, torch.diag(s**2).double())
        for m, s in zip(_mixture().means, _mixture().stds, strict=True)
    ]
    x = torch.randn(5, 3, dtype=torch.float64)
    density = 0.25 * normals[0].log_prob(x).exp() + 0.75 * normals[1].log_prob(x).exp()
    torch.testing.assert_close(_mixture()(x), -density.log())


def test_gaussian_is_the_distribution():
    energy = _gaussian()
    law = torch.distributions.MultivariateNormal(energy.mean, precision_matrix=energy.precision)
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(energy(x), -law.log_prob(x))
    single = energies.GaussianEnergy(energy.mean.float(), law.covariance_matrix.float())
    assert single(x.float()).dtype == torch.float32
    torch.testing.assert_close(single(x.float()).double(), energy(x), rtol=1e-5, atol=1e-5)


def test_funnel_is_the_distribution():
    x = torch.randn(5, 4, dtype=torch.float64)
    law_of_v = torch.distributions.Normal(0.0, 3.0)
    law_of_rest = torch.distributions.Normal(0.0, (x[:, :1] / 2).exp())
    log_prob = law_of_v.log_prob(x[:, 0]) + law_of_rest.log_prob(x[:, 1:]).sum(1)
    torch.testing.assert_close(energies.FunnelEnergy(4)(x), -log_prob)


NAMES = ("res", "mlp", "mixture", "gaussian", "funnel", "wells", "rastrigin", "rosenbrock")


@pytest.mark.parametrize("name", NAMES)
def test_messages_about_types_name_argument_and_types(name):
    energy, x = {
        "res": (energies.ResEnergy(1, width=2, image_size=8), torch.zeros(2, 1, 8, 8)),
        "mlp": (energies.MLPEnergy(3), torch.zeros(2, 3)),
        "mixture": (_mixture().float(), torch.zeros(2, 3)),
        "gaussian": (_gaussian().float(), torch.zeros(2, 3)),
        "funnel": (energies.FunnelEnergy(3), torch.zeros(2, 3)),
        "wells": (energies.DoubleWellEnergy(), torch.zeros(2, 3)),
        "rastrigin": (energies.RastriginEnergy(), torch.zeros(2, 3)),
        "rosenbrock": (energies.RosenbrockEnergy(), torch.zeros(2, 3)),
    }[name]
    for function in (energy, getattr(energy, "score", energy)):
        with pytest.raises(TypeError, match=r"^x must be a tensor, got numpy\.ndarray"):
            function(x.numpy())
        with pytest.raises(
            TypeError, match=r"^x must be a floating-point tensor, got torch\.int64"
        ):
            function(x.long())
    if name in ("res", "mlp"):
        with pytest.raises(TypeError, match=r"x must be torch\.float32, .* got torch\.float64"):
            energy(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert energy(x.bfloat16()).shape == (2,)
    else:
        assert energy(x.double()).dtype == torch.float64


def test_known_minima():
    zeros, ones = torch.zeros(1, 4), torch.ones(1, 4)
    assert energies.DoubleWellEnergy()(-ones).item() == 0
    assert energies.RastriginEnergy()(zeros).item() == 0
    assert energies.RosenbrockEnergy()(ones).item() == 0
    assert energies.DoubleWellEnergy(2.0)(zeros).item() == 8.0


def test_analytic_energies_refuse_bad_arguments():
    with pytest.raises(ValueError, match="x must be"):
        energies.RastriginEnergy()(torch.zeros(3))
    with pytest.raises(ValueError, match="D ≥ 2"):
        energies.RosenbrockEnergy()(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="stds must be positive"):
        energies.GaussianMixtureEnergy(torch.zeros(2, 2), 0.0)
    with pytest.raises(ValueError, match="means must be"):
        energies.GaussianMixtureEnergy(torch.zeros(2))
    with pytest.raises(ValueError, match="weights must be"):
        energies.GaussianMixtureEnergy(torch.zeros(2, 2), weights=torch.ones(3))
    with pytest.raises(ValueError, match="x must be"):
        _mixture()(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x must be \(B, 3\), got \(2, 4\)"):
        _gaussian()(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"mean must be \(D,\)"):
        energies.GaussianEnergy(torch.zeros(2, 2), torch.eye(2))
    with pytest.raises(ValueError, match=r"covariance must be \(2, 2\), got \(3, 3\)"):
        energies.GaussianEnergy(torch.zeros(2), torch.eye(3))
    for covariance in (
        [[1.0, 2.0], [2.0, 1.0]],
        [[1.0, 0.5], [0.0, 1.0]],
        [[1.0, 0.0], [0.0, 0.0]],
    ):
        with pytest.raises(ValueError, match="symmetric and positive definite"):
            energies.GaussianEnergy(torch.zeros(2), torch.tensor(covariance))
    with pytest.raises(ValueError, match="dim must be ≥ 2, got 1"):
        energies.FunnelEnergy(1)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"scale must be (> 0|finite)"):
            energies.FunnelEnergy(2, scale)
    with pytest.raises(ValueError, match=r"x must be \(B, 4\), got \(2, 3\)"):
        energies.FunnelEnergy(4).score(torch.zeros(2, 3))


def test_an_energy_keeps_its_numbers_whatever_becomes_of_the_callers():
    means, stds, weights = torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2)
    mean, covariance = torch.zeros(3), torch.eye(3)
    made = (
        energies.GaussianMixtureEnergy(means, stds, weights),
        energies.GaussianEnergy(mean, covariance),
    )
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    before = [energy(x) for energy in made]
    for tensor in (means, stds, weights, mean, covariance):
        tensor.add_(1)
    assert all(torch.equal(energy(x), u) for energy, u in zip(made, before, strict=True))


def test_weights_of_a_mixture_may_be_nothing_but_not_all_of_them():
    means = torch.tensor([[0.0], [5.0]])
    one = energies.GaussianMixtureEnergy(means, weights=torch.tensor([2.0, 0.0]))
    alone = energies.GaussianMixtureEnergy(means[:1])
    x = torch.linspace(-1, 6, 5)[:, None]
    torch.testing.assert_close(one(x), alone(x))
    torch.testing.assert_close(one.score(x), alone.score(x))
    for weights in ([0.0, 0.0], [2.0, -1.0]):
        with pytest.raises(ValueError, match="weights must be 2 non-negative numbers of positive"):
            energies.GaussianMixtureEnergy(means, weights=torch.tensor(weights))
    with pytest.raises(ValueError, match="stds must be positive"):
        energies.GaussianMixtureEnergy(means, torch.tensor([[1.0], [0.0]]))


def test_an_energy_without_parameters_of_its_own_computes():
    """As a replica of DataParallel, or where its layers were quantized."""
    energy = energies.MLPEnergy(4, (8,))
    x = torch.randn(3, 4)
    expected = energy(x)
    for layer in energy.layers:
        for name in ("weight", "bias"):
            value = getattr(layer, name).detach()
            delattr(layer, name)
            setattr(layer, name, value)
    torch.testing.assert_close(energy(x), expected.detach())


@pytest.mark.gpu
def test_gpu_a_mixture_lies_where_its_means_are():
    energy = energies.GaussianMixtureEnergy(torch.zeros(3, 2, device="cuda"), 0.5, [1.0, 2.0, 3.0])
    assert {buffer.device.type for buffer in energy.buffers()} == {"cuda"}
    assert energy(torch.zeros(4, 2, device="cuda")).shape == (4,)
