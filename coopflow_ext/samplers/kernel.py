"""Energies whose whole chain is one call of an op: which they are, and how it is called.

An energy gets in by a line of ``_FINDERS``: its exact type, and a function that says which ops run
its chains, or why none does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coopflow_ext import ops
from coopflow_ext._recording import hooks_of
from coopflow_ext.energies import (
    DoubleWellEnergy,
    FunnelEnergy,
    GaussianEnergy,
    GaussianMixtureEnergy,
    MLPEnergy,
    RastriginEnergy,
    RosenbrockEnergy,
)
from coopflow_ext.samplers.chain import Inputs, Plan
from coopflow_ext.samplers.gradient import Gradient
from coopflow_ext.samplers.output import (
    ChainStatistics,
    State,
    Tensors,
    chain_statistics,
)
from coopflow_ext.samplers.schedule import place


@dataclass(frozen=True)
class Kernel:
    """The ops that run whole chains, Langevin's and MALA's, and the arguments that describe the
    energy to them."""

    langevin: Callable[..., ops.ChainResult]
    mala: Callable[..., ops.MALAResult]
    energy: Mapping[str, Any]


Found = Kernel | str
"""A kernel, or the reason why there is none."""


class KernelChain:
    """T steps in one launch: what :class:`Chain` is for steps one by one.

    Attributes:
        last: the state after the last step.
        trajectory: the states kept, or None.
        frozen_at: (B,), the step at which a chain stopped, T where it did not.
    """

    def __init__(self, plan: Plan, inputs: Inputs, kernel: Kernel) -> None:
        self.plan = plan
        (x0,) = inputs.xs
        result = kernel.langevin(
            x0,
            rng=inputs.rngs[0],
            **kernel.energy,
            **{name: place(name, value, x0) for name, value in plan.coefficients.items()},
            **plan.clips,
            n_steps=plan.n_steps,
            x_ref=None if inputs.x_refs is None else inputs.x_refs[0],
            clamp=plan.end_clamp or plan.step_clamp,
            clamp_end=plan.end_clamp is not None,
            negative_energy=plan.gradient.sign < 0,
            xi=None if inputs.xis is None else inputs.xis[0],
            thin=plan.thin if plan.keep_trajectory else None,
            stats=plan.keep_stats,
            freeze_nonfinite=plan.masked,
        )
        self.last: Tensors = (result.x,)
        self.trajectory: Tensors | None = None
        if result.trajectory is not None:
            states = result.trajectory
            self.trajectory = (torch.cat([x0[None], states]) if plan.keep_start else states,)
        self.frozen_at = result.frozen_at
        self._stats = result.stats

    def stopped(self) -> bool:
        """Whether a chain has met a gradient that is not finite: one read."""
        frozen_at = self.frozen_at.cpu()
        return self.plan.masked and len(frozen_at) > 0 and int(frozen_at.min()) < self.plan.n_steps

    @property
    def active(self) -> Tensor:
        """(B,), whether a chain has not stopped."""
        return self.frozen_at == self.plan.n_steps

    def statistics(self) -> ChainStatistics | None:
        """The recorded sums as norms and fractions."""
        if self._stats is None:
            return None
        gradient, x = self.plan.gradient, self.last[0]
        energy = gradient.sign * self._stats[..., 5] if gradient.has_energy else None
        return chain_statistics(self._stats, energy, n_elements=x.shape[1])


# --- what a sampler's options allow --------------------------------------------------------------


def refusal(plan: Plan, *, compile: bool, differentiable: object) -> str | None:
    """The option that no kernel of whole chains has; None where there is none."""
    if compile:
        return "compile=True compiles a gradient that it does not take"
    if differentiable is not False:
        return f"differentiable={differentiable!r} needs steps one by one"
    if plan.noise_first:
        return "noise_before_gradient=True needs steps one by one"
    if plan.rules is not None:
        return "snr, preconditioner and momentum need steps one by one"
    if plan.after_step is not None:
        return "after_step needs steps one by one"
    if plan.channels_last:
        return "channels_last=True is for images, and its chains are vectors"
    return None


def no_kernel(reason: str) -> ValueError:
    """What kernel=True raises."""
    return ValueError(f"kernel=True: no kernel of whole chains can run this: {reason}")


def kernel_for(
    asked: bool | Literal["auto"],
    gradient: Gradient,
    x0: State,
    model_kwargs: Mapping[str, Any],
    *,
    refused: str | None = None,
    autocast: torch.dtype | None = None,
) -> Kernel | None:
    """The kernel for chains of a sampler from x0, where there is one and it is not switched off.

    Args:
        asked: the sampler's option ``kernel``.
        refused: why its other options rule a kernel out.

    Raises:
        ValueError: there is none, and True asks for it.
    """
    if asked is False:
        return None
    found = refused or _find_kernel(gradient, x0, model_kwargs, autocast)
    if isinstance(found, Kernel):
        return found
    if asked is True:
        raise no_kernel(found)
    return None


def _find_kernel(
    gradient: Gradient,
    x0: State,
    model_kwargs: Mapping[str, Any],
    autocast: torch.dtype | None,
) -> Found:
    if not isinstance(x0, Tensor):
        return f"x0 must be one tensor, got a {type(x0).__name__}"
    if type(x0) not in (Tensor, nn.Parameter):
        return f"x0 must be a plain tensor, got {type(x0).__name__}"
    if x0.ndim != 2 or x0.dtype not in (torch.float32, torch.float64):
        return f"x0 must be (B, D), float32 or float64, got {x0.dtype} of {tuple(x0.shape)}"
    if x0.device.type not in ("cpu", "cuda"):
        return f"x0 must be on a CPU or a CUDA device, got {x0.device}"
    if torch.is_autocast_enabled(x0.device.type):
        return "torch.autocast is on"
    if model_kwargs:
        return "it takes no model_kwargs or step_kwargs"
    owner = _owner(gradient)
    if isinstance(owner, str):
        return owner
    return _FINDERS[type(owner)](owner, x0, autocast)


def _owner(gradient: Gradient) -> nn.Module | str:
    """The energy that is given itself or by its method ``score``, or what is in the way."""
    name = "energy" if gradient.has_energy else "score"
    function = gradient.function
    owner = function if gradient.has_energy else getattr(function, "__self__", None)
    if type(owner) not in _FINDERS:
        return f"{name} must be one of {', '.join(t.__name__ for t in _FINDERS)}, exactly" + (
            "" if gradient.has_energy else ", by its method score"
        )
    assert isinstance(owner, nn.Module)
    if not gradient.has_energy and getattr(function, "__func__", None) is not getattr(
        type(owner), "score", None
    ):
        return f"score must be the method score of a {type(owner).__name__}"
    return changed_by_hand(owner) or owner


def changed_by_hand(module: nn.Module) -> str:
    """Why a module may compute something else than its type does; empty where it does not."""
    if next(hooks_of(module), None) is not None:
        return f"{type(module).__name__} has hooks"
    if torch.nn.modules.module._has_any_global_hook():
        return "torch has hooks for all modules"
    if any(name in vars(module) for name in ("forward", "score")):
        return f"{type(module).__name__} has a forward or score of its own"
    return ""


# --- energies in closed form ---------------------------------------------------------------------


def _analytic(
    energy: Any,
    x0: Tensor,
    autocast: torch.dtype | None,
    *,
    name: str,
    tensors: tuple[str, ...] = (),
    numbers: tuple[str, ...] = (),
    least: int = 1,
) -> Found:
    """An energy that ``ops.analytic_langevin_chain`` and ``ops.analytic_mala_chain`` know, by names
    of its attributes."""
    given = [getattr(energy, tensor).detach().contiguous() for tensor in tensors]
    dim = given[0].shape[-1] if given else getattr(energy, "dim", x0.shape[1])
    if autocast is not None:
        return "autocast is for networks, and this energy is in closed form"
    if x0.shape[1] != dim or dim < least:
        return f"x0 does not fit the energy, got {tuple(x0.shape)}"
    if x0.is_cuda and dim > ops.MOST_ELEMENTS_ON_CUDA:
        return f"x0 must have D ≤ {ops.MOST_ELEMENTS_ON_CUDA} on CUDA, got {tuple(x0.shape)}"
    for tensor, value in zip(tensors, given, strict=True):
        if value.dtype != x0.dtype or value.device != x0.device:
            return (
                f"{tensor} must have x0's dtype and device, {x0.dtype} and {x0.device}, got "
                f"{value.dtype} and {value.device}"
            )
    values = [getattr(energy, number) for number in numbers]
    for number, value in zip(numbers, values, strict=True):
        if not isinstance(value, Real) or not math.isfinite(value):
            return f"{number} must be a finite number, got {value!r}"
    return Kernel(
        ops.analytic_langevin_chain,
        ops.analytic_mala_chain,
        {"energy": name, "tensors": given, "numbers": values},
    )


# --- fully connected networks --------------------------------------------------------------------

# Exact types, what ``ops.mlp_langevin_chain`` calls them, and their parameters.
_ACTIVATIONS: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.SiLU: ("silu", ()),
    nn.ReLU: ("relu", ()),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.ELU: ("elu", ("alpha",)),
    nn.Tanh: ("tanh", ()),
    nn.Softplus: ("softplus", ("beta", "threshold")),
    nn.GELU: ("gelu", ()),
}
_MOST_UNITS, _MOST_HIDDEN = 128, 4
_Activation = tuple[str, dict[str, float]]


def _mlp_energy(energy: MLPEnergy, x0: Tensor, autocast: torch.dtype | None) -> Found:
    return _network(list(energy.layers), (energy.activation, {}), x0, autocast)


def _sequential(energy: nn.Sequential, x0: Tensor, autocast: torch.dtype | None) -> Found:
    """Linear and activation in turn; what changes nothing, a dropout that is off, may stand
    between them."""
    modules = [m for m in energy if not _is_identity(m)]
    if modules and len(modules) % 2 == 0:
        return "Linear and an activation must take turns and end with a Linear"
    activations = set()
    for module in modules[1::2]:
        if type(module) not in _ACTIVATIONS:
            return f"Linear and an activation must take turns, got {type(module).__name__}"
        if changed := changed_by_hand(module):
            return changed
        activations.add(_activation_of(module))
    if len(activations) != 1:
        return f"all activations must be alike, and one at least, got {len(activations)} kinds"
    ((name, parameters),) = activations
    return _network(modules[0::2], (name, dict(parameters)), x0, autocast)


def _is_identity(module: nn.Module) -> bool:
    if type(module) is nn.Dropout:
        off = not module.training or module.p == 0
        return off and not changed_by_hand(module)
    return type(module) is nn.Identity and not changed_by_hand(module)


def _activation_of(module: nn.Module) -> tuple[str, tuple[tuple[str, float], ...]]:
    name, parameters = _ACTIVATIONS[type(module)]
    if name == "gelu" and module.approximate == "tanh":
        name = "gelu_tanh"
    return name, tuple((p, float(getattr(module, p))) for p in parameters)


def _network(
    layers: Sequence[nn.Module],
    activation: _Activation,
    x0: Tensor,
    autocast: torch.dtype | None,
) -> Found:
    """The layers as ``ops.mlp_langevin_chain`` and ``ops.mlp_mala_chain`` take them; they read the
    parameters at each call."""
    bfloat16 = autocast is torch.bfloat16
    if autocast is not None and not bfloat16:
        return f"its networks compute in the dtype of x0 or in bfloat16, not in {autocast}"
    if not 2 <= len(layers) <= _MOST_HIDDEN + 1:
        return f"it takes networks of 1 to {_MOST_HIDDEN} hidden layers, got {len(layers) - 1}"
    sizes = [x0.shape[1]]
    weights, biases = [], []
    for layer in layers:
        if type(layer) is not nn.Linear:
            return f"its layers must be Linear, exactly, got {type(layer).__name__}"
        if changed := changed_by_hand(layer) or _unlike(layer, x0):
            return changed
        weight, bias = layer.weight, layer.bias
        if weight.shape[1] != sizes[-1]:
            return f"a layer takes {weight.shape[1]} numbers and is given {sizes[-1]}"
        sizes.append(weight.shape[0])
        weights.append(weight.contiguous())
        biases.append(x0.new_zeros(len(weight)) if bias is None else bias)
    if sizes[-1] != 1:
        return f"its networks end in one number, got {sizes[-1]}"
    if max(sizes) > _MOST_UNITS:
        return f"D and layers must be at most {_MOST_UNITS} wide, got {max(sizes)}"
    if x0.is_cuda and (lack := _lack_on_cuda(sizes[:-1], x0, bfloat16=bfloat16)):
        return lack
    name, parameters = activation
    if parameters.get("beta") == 0:
        return "beta of softplus must not be 0"
    network = {"weights": weights, "biases": biases, "activation": name}
    return Kernel(
        partial(ops.mlp_langevin_chain, bfloat16=bfloat16),
        ops.mlp_mala_chain,
        {**network, "activation_args": parameters},
    )


def _lack_on_cuda(sizes: Sequence[int], x0: Tensor, *, bfloat16: bool) -> str:
    """Why a GPU does not hold a network of these sizes; empty where it does."""
    if x0.dtype != torch.float32:
        return f"its networks are in float32 on CUDA, got {x0.dtype}"
    needed = ops.mlp_shared_bytes(sizes, bfloat16=bfloat16)
    properties: Any = torch.cuda.get_device_properties(x0.device)  # whose stub lacks a line
    there = properties.shared_memory_per_block_optin
    if needed > there:
        return f"the network needs {needed} bytes of shared memory, and there are {there}"
    return ""


def _unlike(layer: nn.Linear, x0: Tensor) -> str:
    """Why a layer's parameters cannot be used as they are; empty where they can."""
    for parameter in (layer.weight, layer.bias):
        if parameter is None:
            continue
        if type(parameter) not in (Tensor, nn.Parameter):
            return f"parameters must be plain tensors, got {type(parameter).__name__}"
        if parameter.dtype != x0.dtype or parameter.device != x0.device:
            return (
                f"parameters must have x0's dtype and device, {x0.dtype} and {x0.device}, got "
                f"{parameter.dtype} and {parameter.device}"
            )
    return ""


_FINDERS: dict[type, Callable[[Any, Tensor, torch.dtype | None], Found]] = {
    DoubleWellEnergy: partial(_analytic, name="double_well", numbers=("barrier_height",)),
    FunnelEnergy: partial(_analytic, name="funnel", numbers=("scale",), least=2),
    GaussianEnergy: partial(_analytic, name="gaussian", tensors=("mean", "precision", "log_norm")),
    GaussianMixtureEnergy: partial(
        _analytic, name="gaussian_mixture", tensors=("means", "stds", "log_weights")
    ),
    MLPEnergy: _mlp_energy,
    RastriginEnergy: partial(_analytic, name="rastrigin", numbers=("a",)),
    RosenbrockEnergy: partial(_analytic, name="rosenbrock", numbers=("a", "b"), least=2),
    nn.Sequential: _sequential,
}
