"""What a sampler refuses: each helper raises TypeError or ValueError and names the argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from coopflow_ext._checks import check_count
from coopflow_ext._recording import is_capturing
from coopflow_ext.rng import TIME_LIMIT
from coopflow_ext.samplers.nested import map_tensors
from coopflow_ext.samplers.output import State, Tensors, unpack


def check_steps(value: object) -> int:
    """T as an int, of which a key can count the steps; asked before any schedule is evaluated.

    Raises:
        TypeError, ValueError: it is not an int in [0, 2³²).
    """
    steps = check_count("n_steps", value, 0)
    if steps >= TIME_LIMIT:
        raise ValueError(f"n_steps must be < 2**32, as far as a key counts, got {steps}")
    return steps


def check_chain_counts(counts: Mapping[str, int], batch: int) -> None:
    """ValueError, naming the option, unless its values are for as many chains as x0 has."""
    for name, count in counts.items():
        if count != batch:
            raise ValueError(f"{name} has values for {count} chains, but x0 has {batch} chains")


def check_constant(name: str, *values: object, unless: str = "") -> None:
    """ValueError if gradients are expected to flow to one of ``values``: they would not.

    Args:
        unless: the option with which they do, for the message.
    """
    if any(isinstance(value, Tensor) and value.requires_grad for value in values):
        without = f"without {unless}" if unless else "not even through differentiable=True"
        raise ValueError(
            f"{name} must not require grad: no gradient flows to it, {without}; give it detached"
        )


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
        if x.layout != torch.strided:
            raise ValueError(f"x0 must be dense, got a tensor of layout {x.layout}")
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
    if not isinstance(values, (Tensor, list, tuple)):
        raise TypeError(f"{name} must be like x0, tensors, got {type(values).__name__}")
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


def check_can_copy(name: str, value: Tensor, x: Tensor) -> None:
    """ValueError where ``value`` lies in the host's memory, of which a graph of the caller's that
    is being captured on x's device would keep no copy."""
    if value.device.type == "cpu" and is_capturing(x):
        raise ValueError(
            f"{name} is a tensor in the host's memory, which cannot be copied to the device while "
            "a CUDA graph captures its stream; give a number"
        )


def check_can_read(x: Tensor, who: str, advice: str = "") -> None:
    """ValueError where the host cannot read from x's device what ``who`` reads after the chain."""
    if x.is_meta:
        raise ValueError(
            f"{who} reads what x0's chains became, but x0 is on the meta device and has no data"
            f"{advice}"
        )
    if is_capturing(x):
        raise ValueError(
            f"{who} reads from the device after the chain, which cannot be done while a CUDA graph "
            f"captures its stream{advice}"
        )
