"""Langevin chains in JAX, as an expert would write them: one jitted ``lax.scan`` over the steps.

A baseline of bench_sampler.py for those energies that are written here too; JAX is not needed
otherwise.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from coopflow_ext.energies import GaussianMixtureEnergy, MLPEnergy

NOT_WRITTEN = "this energy is not written in JAX"


def why_not(device: torch.device, function: Callable[[Tensor], Tensor]) -> str | None:
    """Why JAX cannot compete on the device with this energy or score; None where it can."""
    if importlib.util.find_spec("jax") is None:
        return "not installed"
    # Else it takes three quarters of the GPU's memory at its first use.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")  # no TF32, as all others
    if _score(function) is None:
        return NOT_WRITTEN

    wanted = "gpu" if device.type == "cuda" else device.type
    found = jax.default_backend()
    return None if found == wanted else f"JAX is installed for {found} only"


def _array(x: Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.asarray(x.detach().cpu().numpy())


def _score(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Any] | None:
    """∇log p of an energy, or of a score in closed form, as a JAX function."""
    import jax
    import jax.numpy as jnp

    owner = getattr(function, "__self__", function)
    if isinstance(owner, GaussianMixtureEnergy):
        means, stds, log_weights = map(_array, (owner.means, owner.stds, owner.log_weights))

        def log_components(x: Any) -> Any:
            squares = jnp.square((x[:, None] - means) / stds).sum(-1)
            return log_weights - 0.5 * squares - jnp.log(stds).sum(-1)

        if owner is function:
            return jax.grad(lambda x: jax.scipy.special.logsumexp(log_components(x), -1).sum())

        def closed_form(x: Any) -> Any:
            share = jax.nn.softmax(log_components(x), -1)
            return (share[..., None] * (means - x[:, None]) / jnp.square(stds)).sum(1)

        return closed_form
    if isinstance(owner, MLPEnergy) and owner.activation == "silu":
        layers = [(_array(layer.weight), _array(layer.bias)) for layer in owner.layers]

        def energy(x: Any) -> Any:
            for weight, bias in layers[:-1]:
                x = jax.nn.silu(x @ weight.T + bias)
            weight, bias = layers[-1]
            return (x @ weight.T + bias).sum()

        return jax.grad(lambda x: -energy(x))
    return None


def make_chain(
    function: Callable[[Tensor], Tensor], x0: Tensor, n_steps: int, step_size: float
) -> tuple[Callable[[], Any], Callable[[Tensor], Tensor]]:
    """(a whole chain with JAX's own noise, waited for; the same on supplied normals (T, B, D))."""
    import jax
    import jax.numpy as jnp

    score = _score(function)
    assert score is not None
    start = _array(x0)

    def step(x: Any, noise: Any) -> Any:
        return x + step_size**2 / 2 * score(x) + step_size * noise

    @jax.jit
    def chain(x: Any, key: Any) -> Any:
        def draw_and_step(x: Any, key: Any) -> tuple[Any, None]:
            return step(x, jax.random.normal(key, x.shape, x.dtype)), None

        return jax.lax.scan(draw_and_step, x, jax.random.split(key, n_steps))[0]

    def supplied(xi: Tensor) -> Tensor:
        end, _ = jax.lax.scan(lambda x, noise: (step(x, noise), None), start, _array(xi))
        return torch.tensor(jnp.asarray(end).tolist(), dtype=x0.dtype, device=x0.device)

    key = jax.random.key(0)
    return lambda: chain(start, key).block_until_ready(), supplied
