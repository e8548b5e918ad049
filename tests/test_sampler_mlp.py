"""LangevinSampler(kernel=…) on fully connected networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.utils import parametrize

import coopflow_ext as cf
from coopflow_ext import ops
from coopflow_ext.energies import MLPEnergy
from coopflow_ext.samplers import kernel

KEY = cf.Key(3, chain=5)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "SiLU": nn.SiLU,
    "ReLU": nn.ReLU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.3),
    "ELU": lambda: nn.ELU(0.6),
    "Tanh": nn.Tanh,
    "Softplus": lambda: nn.Softplus(2.0, 3.0),
    "GELU": nn.GELU,
    "GELU by tanh": lambda: nn.GELU("tanh"),
}


def network(activation: Callable[[], nn.Module] = nn.SiLU, dim: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(dim, 20), activation(), nn.Linear(20, 9), activation(), nn.Linear(9, 1)
    )


def start(batch: int = 18, dim: int = 3) -> Tensor:
    return torch.randn(batch, dim, generator=torch.Generator().manual_seed(1))


def sample(energy: Any, kernel: bool | str = True, x0: Tensor | None = None, **options: Any) -> Any:
    given = {"n_steps": 1, "step_size": 0.5, **options}
    sampler = cf.LangevinSampler(energy, kernel=kernel, **given)
    return sampler(start() if x0 is None else x0, key=KEY)


def assert_same_step(energy: nn.Module, device: torch.device, **options: Any) -> None:
    """With the kernel and step by step, to rounding; without noise, which hides the drift."""
    energy, x0 = energy.to(device), start().to(device)
    for noise in ({"step_size": 0.5}, {"step_size": None, "drift": 0.5, "noise": 0.0}):
        ours = sample(energy, True, x0, **options, **noise)
        loop = sample(energy, False, x0, **options, **noise)
        torch.testing.assert_close(ours.x, loop.x, rtol=3e-6, atol=3e-6)
        assert not torch.equal(ours.x, x0)


@pytest.mark.parametrize("activation", ["silu", "softplus", "tanh", "gelu"])
def test_mlp_energy_is_known(device: torch.device, activation: str) -> None:
    torch.manual_seed(0)
    assert_same_step(MLPEnergy(3, (20, 9), activation), device)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sequential_is_known(device: torch.device, activation: str) -> None:
    assert_same_step(network(ACTIVATIONS[activation]), device)


def test_what_changes_nothing_may_stand_between_layers(device: torch.device) -> None:
    layers = list(network())
    energy = nn.Sequential(
        nn.Identity(), *layers[:2], nn.Dropout(0.5), *layers[2:4], nn.Dropout(0.0), layers[4]
    )
    assert_same_step(energy.eval(), device)


def test_a_dropout_of_probability_0_changes_nothing_in_training_either() -> None:
    layers = list(network())
    assert_same_step(nn.Sequential(*layers[:2], nn.Dropout(0.0), *layers[2:]), torch.device("cpu"))


def test_the_largest_networks_are_known() -> None:
    torch.manual_seed(0)
    for energy in (MLPEnergy(3, (128, 128)), MLPEnergy(3, (8, 8, 8, 8))):
        assert_same_step(energy, torch.device("cpu"))


def test_layers_without_bias(device: torch.device) -> None:
    energy = network()
    energy[0] = nn.Linear(3, 20, bias=False)
    energy[4] = nn.Linear(9, 1, bias=False)
    assert_same_step(energy, device)


def test_negative_energy_and_options(device: torch.device) -> None:
    assert_same_step(
        network(), device, negative_energy=True, grad_norm=0.5, clamp=(-1.0, 1.0), reference_std=2.0
    )


def test_trajectory_statistics_and_key_are_those_of_the_loop() -> None:
    options = {"n_steps": 4, "return_trajectory": True, "thin": 2, "stats": True}
    ours, loop = sample(network(), True, **options), sample(network(), False, **options)
    assert ours.key == loop.key
    torch.testing.assert_close(ours.trajectory, loop.trajectory, rtol=1e-5, atol=1e-5)
    for name, expected in vars(loop.stats).items():
        mine = getattr(ours.stats, name)
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5, msg=name)


def test_long_chains_have_the_law_of_the_energy() -> None:
    """In one dimension, where quadrature knows it: exp(−U) under a Gaussian, with two modes."""
    torch.manual_seed(5)
    energy = MLPEnergy(1, (32, 32), "tanh")
    with torch.no_grad():
        for layer in energy.layers:
            layer.weight.mul_(3)
    grid = torch.linspace(-8, 8, 4001)
    with torch.no_grad():
        density = (-energy(grid[:, None]) - grid.square() / 8).double().exp()
    peaks = (density[1:-1] > density[:-2]) & (density[1:-1] > density[2:])
    assert int(peaks.sum()) >= 2
    cdf = torch.cumulative_trapezoid(density, grid.double())
    x = sample(energy, True, 2 * start(4000, 1), n_steps=2000, step_size=0.2, reference_std=2.0).x
    at = np.interp(x[:, 0].numpy(), grid[1:].numpy(), (cdf / cdf[-1]).numpy())
    assert stats.kstest(at, "uniform").pvalue > 1e-3


def test_training_between_calls_is_seen() -> None:
    energy = network()
    sampler = cf.LangevinSampler(energy, n_steps=2, step_size=0.5, kernel=True)
    before = sampler(start(), key=KEY).x
    optimizer = torch.optim.SGD(energy.parameters(), lr=0.5)
    energy(start()).sum().backward()
    optimizer.step()
    after = sampler(start(), key=KEY).x
    assert not torch.equal(after, before)
    assert torch.equal(after, sample(energy, n_steps=2).x)
    assert all(p.requires_grad for p in energy.parameters())


def test_nan_weights_are_named_by_step_and_chains() -> None:
    energy = network()
    with torch.no_grad():
        energy[2].weight[0, 0] = torch.nan
    with pytest.raises(cf.NonFiniteError, match=r"step 0"):
        sample(energy, n_steps=5)
    frozen = sample(energy, n_steps=5, on_nonfinite="freeze")
    assert torch.equal(frozen.x, start())


# --- what it does not take ------------------------------------------------------------------------


class OwnLinear(nn.Linear):
    pass


class OwnTensor(Tensor):
    pass


class OwnTanh(nn.Tanh):
    pass


class OwnSequential(nn.Sequential):
    pass


class OwnEnergy(MLPEnergy):
    pass


def replaced(i: int, module: nn.Module) -> nn.Sequential:
    energy = network()
    energy[i] = module
    return energy


def hooked(module: nn.Module, part: nn.Module | None = None) -> nn.Module:
    (part or module).register_forward_hook(lambda *_: None)
    return module


def parametrized() -> nn.Sequential:
    energy = network()
    parametrize.register_parametrization(energy[2], "weight", nn.Identity())
    return energy


def normalised() -> nn.Sequential:
    energy = network()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(energy[2])
    return energy


def with_own_forward() -> MLPEnergy:
    energy = MLPEnergy(3, (8,))
    energy.forward = lambda x: x.sum(1)  # type: ignore[method-assign]
    return energy


def hooked_inside() -> nn.Module:
    energy = network()
    return hooked(energy, energy[1])


def with_a_subclass_of_tensor() -> nn.Sequential:
    energy = network()
    energy[2].bias = nn.Parameter(energy[2].bias.detach().as_subclass(OwnTensor))
    return energy


def with_a_hooked(module: nn.Module) -> nn.Sequential:
    """Which by itself changes nothing."""
    energy = network()
    return nn.Sequential(*energy[:2], hooked(module), *energy[2:])


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a subclass of MLPEnergy": (lambda: OwnEnergy(3), "energy must be one of"),
    "a subclass of Sequential": (lambda: OwnSequential(*network()), "energy must be one of"),
    "a subclass of Linear": (lambda: replaced(2, OwnLinear(20, 9)), "got OwnLinear"),
    "a hook": (lambda: hooked(network()), "Sequential has hooks"),
    "a hook inside": (hooked_inside, "SiLU has hooks"),
    "a hooked identity": (lambda: with_a_hooked(nn.Identity()), "must take turns"),
    "a hooked dropout": (lambda: with_a_hooked(nn.Dropout(0.0)), "must take turns"),
    "a parametrisation": (parametrized, "got ParametrizedLinear"),
    "weight_norm": (normalised, "Linear has hooks"),
    "a forward of its own": (with_own_forward, "has a forward or score of its own"),
    "a dropout that is on": (lambda: replaced(1, nn.Dropout()), "got Dropout"),
    "another activation": (lambda: network(nn.Mish), "got Mish"),
    "a subclass of an activation": (lambda: network(OwnTanh), "got OwnTanh"),
    "two activations": (lambda: replaced(3, nn.ReLU()), "must be alike.* got 2 kinds"),
    "two parameters": (lambda: replaced(3, nn.ELU(2.0)), "got 2 kinds"),
    "no layer": (nn.Sequential, "got 0 kinds"),
    "no hidden layer": (lambda: nn.Sequential(nn.Linear(3, 1)), "got 0 kinds"),
    "five hidden layers": (lambda: MLPEnergy(3, (4,) * 5), "1 to 4 hidden layers, got 5"),
    "two outputs": (lambda: replaced(4, nn.Linear(9, 2)), "end in one number, got 2"),
    "wide layers": (lambda: MLPEnergy(3, (129,)), "at most 128 wide, got 129"),
    "another size": (lambda: MLPEnergy(4), "takes 4 numbers and is given 3"),
    "another dtype": (lambda: network().double(), "x0's dtype and device"),
    "another device": (lambda: network().to("meta"), "x0's dtype and device.*meta"),
    "a subclass of tensor": (with_a_subclass_of_tensor, "plain tensors, got OwnTensor"),
    "softplus of beta 0": (lambda: network(lambda: nn.Softplus(0.0)), "beta of softplus"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_is_named(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(ValueError, match=f"kernel=True: .*{reason}"):
        sample(make(), True)


@pytest.mark.parametrize(
    "name",
    [
        "a subclass of Linear",
        "a subclass of an activation",
        "a hook inside",
        "two activations",
        "a dropout that is on",
    ],
)
def test_auto_goes_step_by_step_where_there_is_no_kernel(name: str) -> None:
    energy = REFUSED[name][0]().eval()
    assert torch.equal(sample(energy, "auto", n_steps=3).x, sample(energy, False, n_steps=3).x)


TOO_LARGE = "needs .* bytes of shared memory, .* 166912"


@pytest.mark.parametrize("energy", [network(), MLPEnergy(3, (20, 9))])
def test_autocast_to_bfloat16_is_the_ops_option(device: torch.device, energy: nn.Module) -> None:
    energy, x0 = energy.to(device), start().to(device)
    ours, plain = (
        sample(energy, True, x0, autocast=dtype, drift=0.5, step_size=None, noise=0.1)
        for dtype in (torch.bfloat16, None)
    )
    linear = [m for m in energy.modules() if isinstance(m, nn.Linear)]
    expected = ops.mlp_langevin_chain(
        x0, [m.weight for m in linear], [m.bias for m in linear], KEY.tensor(device),
        activation="silu", n_steps=1, drift=0.5, noise=0.1, freeze_nonfinite=True, bfloat16=True,
    )  # fmt: skip
    assert torch.equal(ours.x, expected.x)
    assert torch.equal(ours.x, plain.x) == (device.type == "cpu")
    torch.testing.assert_close(ours.x, plain.x, rtol=5e-3, atol=5e-3)


def test_autocast_to_float16_goes_step_by_step() -> None:
    with pytest.raises(ValueError, match=r"x0 or in bfloat16, not in torch\.float16"):
        sample(network(), True, autocast=torch.float16)


@pytest.mark.parametrize(
    ("sizes", "dtype", "reasons"),
    [
        ((2, 64, 64, 64), torch.float32, ("", "")),
        ((2, 128, 128, 128, 128), torch.float32, (TOO_LARGE, "")),
        ((64, 128, 128, 128), torch.float32, (TOO_LARGE, "")),
        ((128, 128, 128, 128, 128), torch.float32, (TOO_LARGE, TOO_LARGE)),
        ((2, 8), torch.float64, ("float32 on CUDA, got torch.float64",) * 2),
    ],
)
def test_what_a_gpu_does_not_hold(
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    reasons: tuple[str, str],
) -> None:
    """As sm_80 answers; there is no GPU to ask."""
    a100 = SimpleNamespace(shared_memory_per_block_optin=166_912)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: a100)
    for bfloat16, reason in zip((False, True), reasons, strict=True):
        lack = kernel._lack_on_cuda(sizes, torch.zeros(3, 2, dtype=dtype), bfloat16=bfloat16)
        assert re.search(reason, lack) if reason else lack == ""
