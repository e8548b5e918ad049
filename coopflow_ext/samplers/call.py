"""What every sampler does at a call, before its loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from coopflow_ext.errors import NonFiniteError
from coopflow_ext.rng import Key
from coopflow_ext.samplers.nested import map_tensors
from coopflow_ext.samplers.output import State, Tensors, unpack
from coopflow_ext.samplers.schedule import check_count

_MAX_CHAIN = 2**63


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """ValueError unless value is one of ``allowed``."""
    if not any(value is choice or (value == choice != 1) for choice in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_offset(chain_offset: object) -> int:
    """``chain_offset`` in [0, 2⁶³), else TypeError or ValueError."""
    offset = check_count("chain_offset", chain_offset, 0)
    if offset >= _MAX_CHAIN:
        raise ValueError(f"chain_offset must be below 2**63, got {offset}")
    return offset


def check_kwargs(model_kwargs: object) -> dict[str, Any]:
    """The keyword arguments of the energy; TypeError unless they are a mapping by name.

    Tensors made in inference mode, also those in dicts, lists and tuples, are copied: autograd
    refuses to go through them.
    """
    if model_kwargs is None:
        return {}
    if not isinstance(model_kwargs, Mapping) or not all(isinstance(k, str) for k in model_kwargs):
        raise TypeError(
            f"model_kwargs must be a mapping from names to values, got {model_kwargs!r}"
        )
    with torch.inference_mode(False):
        kwargs: dict[str, Any] = map_tensors(
            lambda t: t.clone() if t.is_inference() else t, dict(model_kwargs)
        )
    return kwargs


def check_state(x0: State) -> Tensors:
    """The tensors of a state; TypeError or ValueError unless they are chains that can move."""
    if not isinstance(x0, (Tensor, list, tuple)):
        raise TypeError(f"x0 must be a tensor or a list or tuple of them, got {type(x0).__name__}")
    xs = unpack(x0)
    if not xs or not all(isinstance(x, Tensor) for x in xs):
        raise TypeError("x0 must be a tensor or a non-empty list or tuple of tensors")
    for x in xs:
        if not x.is_floating_point():
            raise TypeError(f"x0 must be floating point, got {x.dtype}")
        if x.ndim == 0:
            raise ValueError("x0 must be (B, …): dimension 0 counts the chains; got a scalar")
        if x.shape[0] != xs[0].shape[0] or x.device != xs[0].device:
            raise ValueError(
                "the tensors of x0 must have the same number of chains and the same device, got "
                f"{xs[0].shape[0]} on {xs[0].device} and {x.shape[0]} on {x.device}"
            )
    return xs


def check_like(name: str, values: State, xs: Tensors, lead: tuple[int, ...] = ()) -> Tensors:
    """The tensors of ``values``; each must have the shape of the state's, after ``lead``."""
    given = unpack(values)
    if len(given) != len(xs):
        raise ValueError(f"{name} must have {len(xs)} tensor(s), like x0, got {len(given)}")
    for value, x in zip(given, xs, strict=True):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor like x0, got {type(value).__name__}")
        if value.shape != (*lead, *x.shape):
            expected = (*lead, *x.shape)
            raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")
    return given


def state_copy(x: Tensor, *, channels_last: bool = False) -> Tensor:
    """A copy that a chain may overwrite: dense, with the batch as outermost dimension."""
    if channels_last and x.ndim != 4:
        raise ValueError(f"channels_last needs x0 of shape (B, C, H, W), got {tuple(x.shape)}")
    if channels_last or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x.detach().clone(memory_format=torch.channels_last)
    return x.detach().clone(memory_format=torch.contiguous_format)


def rng_tensors(key: Key, xs: Tensors) -> Tensors:
    """Tensor 0 of a state uses the key's seed, tensor j folds in j."""
    return tuple((key.fold_in(j) if j else key).tensor(x.device) for j, x in enumerate(xs))


def nonfinite_error(
    active: Tensor, frozen_at: Tensor, xs: Tensors, *, what: str = "the gradient", advice: str
) -> NonFiniteError:
    """The error for the chains that stopped at steps ``frozen_at``, and end in ``xs``."""
    last = tuple(x.detach().clone() for x in xs)
    chains = (~active).nonzero().flatten().cpu()
    step = int(frozen_at.min())
    shown = ", ".join(map(str, chains[:8].tolist())) + (", …" if len(chains) > 8 else "")
    return NonFiniteError(
        f"{what} was not finite in {len(chains)} of {len(active)} chains ({shown}), first at "
        f"step {step}; {advice}",
        step=step,
        chains=chains,
        x=last[0] if len(last) == 1 else last,
    )


def check_single_state(sampler: str, x0: State) -> Tensor:
    """The tensor of a state that must have only one."""
    xs = check_state(x0)
    if not isinstance(x0, Tensor):
        raise TypeError(f"{sampler} moves one tensor, got a {type(x0).__name__} of {len(xs)}")
    return x0


def normals_like(x: Tensor, xi: State | None, n_steps: int) -> Tensors | None:
    """The supplied normals of each step in x's dtype and layout."""
    if xi is None:
        return None
    (given,) = check_like("xi", xi, (x,), lead=(n_steps,))
    return tuple(torch.empty_like(x).copy_(row) for row in given.unbind(0))
