"""Arguments of an energy or score that differ from step to step: a noise level, a time."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from coopflow_ext._tensors import arithmetic_dtype
from coopflow_ext.samplers.gradient import Gradient


def check_step_kwargs(given: object) -> dict[str, Tensor]:
    """The tensors by name; TypeError or ValueError unless each can have a row for each step."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"step_kwargs must be a mapping from names to tensors, got {given!r}")
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"step_kwargs[{name!r}] must be a tensor, got {type(value).__name__}")
        if value.ndim == 0 or value.layout != torch.strided:
            raise ValueError(
                f"step_kwargs[{name!r}] must be dense, with a row for each step: (T,) or "
                f"(T, B or 1, …), got {value.layout} of shape {tuple(value.shape)}"
            )
    return dict(given)


def rows_for_call(
    mine: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    n_steps: int,
    x: Tensor,
    *,
    repeat_last: bool = False,
) -> dict[str, Tensor]:
    """The rows of a call on x's device, (T,) or (T, B, …), or one more.

    Args:
        mine: the sampler's, of which the first T rows count.
        given: those of the call, with T rows, in place of the sampler's.
        n_steps: T.
        x: a tensor of the state, (B, …).
        repeat_last: one more step has the last row again.

    Raises:
        ValueError: the rows are not as many as the steps, or not of as many chains as x has.
    """
    rows = {}
    for name, value in {**mine, **given}.items():
        fits = len(value) == n_steps or (name not in given and len(value) > n_steps)
        if not fits:
            raise ValueError(
                f"step_kwargs[{name!r}] must have a row for each of {n_steps} steps, got "
                f"{len(value)}"
            )
        if value.ndim > 1 and value.shape[1] not in (1, len(x)):
            raise ValueError(
                f"step_kwargs[{name!r}] must have values for each of {len(x)} chains or one for "
                f"all, shape ({n_steps}, {len(x)} or 1, …), got {tuple(value.shape)}"
            )
        value = value[:n_steps]
        if repeat_last:
            if not n_steps:
                raise ValueError(
                    f"denoise has no row of step_kwargs[{name!r}] to use: n_steps is 0"
                )
            value = torch.cat([value, value[-1:]])
        rows[name] = _placed(value, x)
    return rows


def _placed(value: Tensor, x: Tensor) -> Tensor:
    """Floating-point values in what x's steps compute in, as coefficients are."""
    dtype = arithmetic_dtype(x.dtype) if value.is_floating_point() else value.dtype
    value = value.to(x.device, dtype, non_blocking=True)
    if value.is_inference():  # autograd refuses to go through it
        value = value.clone()
    return value if value.ndim == 1 else value.expand(len(value), len(x), *value.shape[2:])


def check_accepted(gradient: Gradient, names: Iterable[str], others: Iterable[str]) -> None:
    """ValueError, naming it, where the energy or score has no argument of one of ``names``, or is
    given it among ``others`` too."""
    if twice := sorted(set(names) & set(others)):
        raise ValueError(f"{twice[0]!r} is in both step_kwargs and model_kwargs; give it once")
    function = gradient.function
    try:
        parameters = inspect.signature(
            function.forward if isinstance(function, nn.Module) else function
        ).parameters.values()
    except (TypeError, ValueError):  # it does not tell; then a call of it will
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    by_name = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    for name in names:
        if name not in by_name:
            what = "energy" if gradient.has_energy else "score"
            raise ValueError(
                f"step_kwargs has {name!r}, which {what} does not take; its arguments are "
                f"{', '.join(p.name for p in parameters)}"
            )
