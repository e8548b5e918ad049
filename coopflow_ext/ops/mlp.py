"""Whole Langevin and MALA chains of an energy that is a fully connected network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real

from torch import Tensor

from coopflow_ext._checks import check_choice, check_sequence
from coopflow_ext._tensors import Coefficient
from coopflow_ext.ops import _call
from coopflow_ext.ops._langevin_chain import (
    KIND,
    ChainResult,
    MALAResult,
    fake_mala_results,
    fake_results,
    run_chain,
    run_mala_chain,
)
from coopflow_ext.ops.langevin import refuse_tangent

# Numbered as in csrc/include/coopflow/mlp.h; the parameters and what torch gives them.
ACTIVATIONS: Mapping[str, Mapping[str, float]] = {
    "silu": {},
    "relu": {},
    "leaky_relu": {"negative_slope": 0.01},
    "elu": {"alpha": 1.0},
    "tanh": {},
    "softplus": {"beta": 1.0, "threshold": 20.0},
    "gelu": {},
    "gelu_tanh": {},
}
_NUMBERS = {name: i for i, name in enumerate(ACTIVATIONS)}


def mlp_langevin_chain(
    x0: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rng: Tensor,
    *,
    activation: str,
    n_steps: int,
    drift: Coefficient,
    activation_args: Mapping[str, float] | None = None,
    noise: Coefficient = 0.0,
    decay: Coefficient = 0.0,
    pull: Coefficient = 0.0,
    x_ref: Tensor | None = None,
    negative_energy: bool = False,
    grad_clip: float | None = None,
    grad_norm: float | None = None,
    step_clip: float | None = None,
    clamp: tuple[float, float] | None = None,
    clamp_end: bool = False,
    step: int = 0,
    xi: Tensor | None = None,
    thin: int | None = None,
    stats: bool = False,
    freeze_nonfinite: bool = False,
    bfloat16: bool = False,
) -> ChainResult:
    """All steps of the chains of a fully connected energy, in one kernel.

    Equivalent to::

        def energy(x):  # (B, d) -> (B,)
            for weight, bias in zip(weights[:-1], biases[:-1]):
                x = activation(F.linear(x, weight, bias))
            return F.linear(x, weights[-1], biases[-1]).squeeze(1)

        x = x0
        for k in range(n_steps):
            (grad,) = torch.autograd.grad(energy(x.requires_grad_()).sum(), x)
            x = ops.langevin_step(x.detach(), grad, rng, drift=drift, ..., step=step + k)

    with the same noise, to the rounding of the gradient. Results depend on neither the batch nor
    the number of threads, bit for bit. Nothing is differentiated: the parameters are constants,
    read anew at every call.

    Args:
        x0: start (B, d), contiguous, float32 or float64, d ≤ 128; not changed.
        weights: (out, in) of each Linear, contiguous, of x0's dtype: 1 to 4 hidden layers of at
            most 128 units, then one output.
        biases: (out,) of each.
        rng: int64[3] = (seed, time, number of the first chain), see :meth:`Key.tensor`.
        activation: "silu", "relu", "leaky_relu", "elu", "tanh", "softplus", "gelu", or "gelu_tanh",
            which is gelu's approximation by tanh.
        n_steps: number of steps, ≥ 0.
        drift, noise, decay, pull: floats, or tables (T or 1, B or 1), float32 or float64; step k
            uses row ``step`` + k.
        activation_args: negative_slope of leaky_relu, alpha of elu, beta (not 0) and threshold of
            softplus; what is not given is as in torch.
        x_ref: reference of the pull, like x0.
        negative_energy: the network gives f = −U.
        grad_clip, grad_norm, step_clip, clamp: as in :func:`langevin_step_`.
        clamp_end: clamp the last state alone.
        step: number of the first step: in the noise, in the tables, in ``frozen_at``.
        xi: standard normals (n_steps, B, d) in place of the key's.
        thin: keep every so many states; None: no trajectory.
        stats: record the five statistics of a step and the network's output.
        freeze_nonfinite: a chain stops at its first gradient that is not finite, and keeps its
            state.
        bfloat16: on CUDA take the products between hidden layers on tensor cores: weights,
            activations and gradients are rounded to bfloat16 where they enter such a product. Sums,
            the first layer, the last and the update stay in float32. On a CPU nothing changes.

    With ``bfloat16`` the gradient's relative error against float64 was at most 4e-3, 8e-3 and 1e-2
    with 2, 3 and 4 hidden layers, under the emulation of a GPU (tests hold 5e-3, 1e-2,
    1.5e-2): the largest of six smooth activations, widths from 16 to 128 and weights of two kinds,
    each over 32 chains (torch.autocast: 8e-3, 1e-2, 1.5e-2). With one it is
    that of float32. A unit of relu or leaky_relu that rounding puts on the other side of its kink
    changes its chain's gradient by a jump: the median chain is as above, but the worst batch had
    0.26 (torch.autocast: 0.16), and single chains have more. A network needs about half the memory.

    Returns:
        :class:`ChainResult`: (x, trajectory or None, stats or None, frozen_at).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. On CUDA also for
            float64, and for networks that do not fit in a multiprocessor's memory: it says how
            many bytes they need (:func:`mlp_shared_bytes`) and how many there are.
    """
    shape, threshold = _activation_numbers("mlp_langevin_chain", activation, activation_args)
    return run_chain(
        "mlp_langevin_chain",
        x0,
        rng,
        _constants("mlp_langevin_chain: weights", weights),
        _constants("mlp_langevin_chain: biases", biases),
        _NUMBERS[activation],
        shape,
        threshold,
        n_steps=n_steps,
        drift=drift,
        noise=noise,
        decay=decay,
        pull=pull,
        x_ref=x_ref,
        negative_energy=negative_energy,
        grad_clip=grad_clip,
        grad_norm=grad_norm,
        step_clip=step_clip,
        clamp=clamp,
        clamp_end=clamp_end,
        step=step,
        xi=xi,
        thin=thin,
        stats=stats,
        freeze_nonfinite=freeze_nonfinite,
        bfloat16=bfloat16,
    )


def mlp_mala_chain(
    x0: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    rng: Tensor,
    accept_rng: Tensor,
    *,
    activation: str,
    n_steps: int,
    step_size: Coefficient,
    activation_args: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    adapt_steps: int = 0,
    target_accept: float = 0.574,
    negative_energy: bool = False,
    step: int = 0,
    xi: Tensor | None = None,
    thin: int | None = None,
    stats: bool = False,
) -> MALAResult:
    """All steps of the chains of a fully connected energy by the Metropolis-adjusted Langevin
    algorithm, in one kernel.

    Equivalent to the loop of :func:`analytic_mala_chain` with U the energy of
    :func:`mlp_langevin_chain`, to the rounding of U and its gradient. Results depend on neither the
    batch nor the number of threads, bit for bit; the parameters are read anew at every call.

    Args:
        x0, weights, biases, rng, activation, activation_args: as in :func:`mlp_langevin_chain`.
        accept_rng, n_steps, step_size, temperature, adapt_steps: as in :func:`analytic_mala_chain`.
        target_accept, negative_energy, step, xi, thin, stats: likewise.

    Returns:
        (x, trajectory, stats, step_size, finite), see :class:`MALAResult`.

    Raises:
        ValueError, TypeError: an argument does not fit; on CUDA also for what
            :func:`mlp_langevin_chain` refuses there.
    """
    shape, threshold = _activation_numbers("mlp_mala_chain", activation, activation_args)
    return run_mala_chain(
        "mlp_mala_chain",
        x0,
        rng,
        accept_rng,
        _constants("mlp_mala_chain: weights", weights),
        _constants("mlp_mala_chain: biases", biases),
        _NUMBERS[activation],
        shape,
        threshold,
        n_steps=n_steps,
        step_size=step_size,
        temperature=temperature,
        adapt_steps=adapt_steps,
        target_accept=target_accept,
        negative_energy=negative_energy,
        step=step,
        xi=xi,
        thin=thin,
        stats=stats,
    )


def mlp_shared_bytes(sizes: Sequence[int], *, bfloat16: bool = False) -> int:
    """Bytes of a multiprocessor's memory that chains of a network need on CUDA.

    Args:
        sizes: (d, width, …) of the state and of 1 to 4 hidden layers, each from 1 to 128.
        bfloat16: as there.

    A block must be able to have as many: 232,448 on sm_90, 166,912 on sm_80 (torch's
    ``shared_memory_per_block_optin`` of a device).
    """
    try:
        given = list(check_sequence("mlp_shared_bytes: sizes", sizes, "ints"))
        needed: int = _call.coopflow.mlp_shared_bytes(given, bfloat16)
    except RuntimeError as error:
        raise _call.argument_error(error) from None
    return needed


def _constants(name: str, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Without their part in autograd, which would mark the results."""
    given = check_sequence(name, parameters, "tensors")
    for i, parameter in enumerate(given):
        refuse_tangent(f"{name}[{i}]", parameter, KIND)
    return [p.detach() if isinstance(p, Tensor) else p for p in given]


def _activation_numbers(
    op: str, name: str, given: Mapping[str, float] | None
) -> tuple[float, float]:
    """The parameters as the raw op takes them: (shape, threshold)."""
    check_choice(f"{op}: activation", name, tuple(ACTIVATIONS))
    if not isinstance(given, Mapping | None):
        raise TypeError(f"{op}: activation_args must be a mapping, got {type(given).__name__}")
    defaults, given = ACTIVATIONS[name], given or {}
    for key, value in given.items():
        if key not in defaults:
            raise ValueError(
                f"{op}: activation_args of {name} are {', '.join(defaults) or 'none'}, got {key!r}"
            )
        if not isinstance(value, Real):
            raise TypeError(f"{op}: activation_args: {key} must be a number, got {value!r}")
    values = [float(value) for value in {**defaults, **given}.values()]
    shape, threshold = (*values, 0.0, 0.0)[:2]
    return shape, threshold


_call.register_fake("mlp_langevin_chain", fake_results)
_call.register_fake("mlp_mala_chain", fake_mala_results)
