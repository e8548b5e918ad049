"""Reconstruction, inpainting and interpolation by gradient descent on the start of the chain.

The recipes are those of the paper's published code: the chain is free of noise, clips and clamps
and is differentiated through all of its steps. Its δ is that of the training, 0.03 in the paper,
also where samples are made with another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coopflow_ext.coop.model import CoopFlow
from coopflow_ext.flows import Flow
from coopflow_ext.rng import Key
from coopflow_ext.samplers import LangevinSampler

RECONSTRUCTION_STEPS = 200
RECONSTRUCTION_RATE = 0.05
# Of inpainting, and of the reconstructions that are interpolated.
INPAINTING_STEPS = 201
INPAINTING_RATE = 0.03
INPAINTING_DECAY = 0.99


class Reconstruction(NamedTuple):
    """What :func:`reconstruct` returns.

    Attributes:
        start: the start of the chain that was found, (B, *event_shape), in [−1, 1] for images.
        result: the end of the chain from there, same shape.
        error: squared error per pixel, Σ(observed − result)² / (H·W), (B,).
        untouched_error: the same for the starts before the search.
        error_by_step: mean error of the batch after 0, 1, …, all steps of the search, (steps + 1,).
    """

    start: Tensor
    result: Tensor
    error: Tensor
    untouched_error: Tensor
    error_by_step: Tensor


def smooth_chain(
    model: CoopFlow, step_size: float | None = None, checkpoint_every: int | None = None
) -> LangevinSampler:
    """The model's chain without noise, clips and clamps, through which gradients flow.

    ``step_size`` is its δ; without it, that of the training.
    """
    delta = chain_step_size(model, step_size)
    assert model.config is not None
    return LangevinSampler(
        model.energy,
        n_steps=model.config.langevin_steps,
        drift=delta * delta / 2,
        noise=0.0,
        differentiable=True,
        checkpoint_every=checkpoint_every,
    )


def chain_step_size(model: CoopFlow, step_size: float | None = None) -> float:
    """δ of the smooth chain: the one asked for, or that of the training."""
    if model.config is None:
        raise ValueError("this needs a model made from settings (CoopFlow.from_config or load)")
    if step_size is None:
        return model.config.step_size
    if not (math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"step_size must be finite and > 0, got {step_size}")
    return step_size


def _pixels(x: Tensor) -> int:
    """H·W of images, 1 for vectors."""
    return x.shape[-2] * x.shape[-1] if x.ndim == 4 else 1


def pixel_error(observed: Tensor, result: Tensor) -> Tensor:
    """Σ(observed − result)² / (H·W) of each image, (B,); for vectors divided by 1."""
    return (observed - result).square().flatten(1).sum(1) / _pixels(observed)


def _descend(
    chain: Callable[..., object],
    start: Tensor,
    loss: Callable[[Tensor], Tensor],
    rates: list[float],
    clamp: tuple[float, float] | None,
) -> tuple[Tensor, list[Tensor]]:
    """Plain gradient steps on the start, clamped after each; and the loss before each."""
    x0, losses = start.clone(), []
    for rate in rates:
        leaf = x0.detach().requires_grad_()
        with torch.enable_grad():
            value = loss(_end(chain, leaf))
            (grad,) = torch.autograd.grad(value, leaf)
        losses.append(value.detach())
        x0 = leaf.detach() - rate * grad
        if clamp is not None:
            x0 = x0.clamp(*clamp)
    return x0, losses


def _end(chain: Callable[..., object], x0: Tensor) -> Tensor:
    x = chain(x0, key=Key(0)).x  # type: ignore[attr-defined]
    assert isinstance(x, Tensor)
    return x


def reconstruct(
    model: CoopFlow,
    observed: Tensor,
    key: Key | None = None,
    *,
    start: Tensor | None = None,
    steps: int = RECONSTRUCTION_STEPS,
    rate: float = RECONSTRUCTION_RATE,
    decay: float = 1.0,
    step_size: float | None = None,
    checkpoint_every: int | None = None,
) -> Reconstruction:
    """Find starts whose chains end at the observed events.

    The start is what the model proposes, a sample of the flow where there is one, and follows
    x0 ← clamp(x0 − rate·decay^j·∇Σ(observed − x̃)²) at step j, the sum over the whole batch.

    Args:
        model: a model made from settings.
        observed: (B, *event_shape).
        key: draws the starts; without it, a seed from torch's default generator does.
        start: (B, *event_shape), where the chains start before the search, instead of proposals.
        steps, rate, decay: of the descent; the paper has 200, 0.05 and 1, and where it
            interpolates the reconstructions 201, 0.03 and 0.99.
        step_size: δ of the chain; without it that of the training, which is the paper's 0.03.
        checkpoint_every: keep only every so many states of the chain, to bound memory.

    Raises:
        ValueError: ``observed`` or ``start`` has another shape, or ``step_size`` is not > 0.
    """
    observed = check_events(model, observed)
    chain = smooth_chain(model, step_size, checkpoint_every)
    rates = [rate * decay**j for j in range(steps)]
    clamp = None if model.event is None else model.event.clamp
    with model.evaluating():
        first = _starts(model, observed.shape, key, start)
        before = _end(chain, first).detach()
        found, losses = _descend(
            chain, first, lambda x: (observed - x).square().sum(), rates, clamp
        )
        result = _end(chain, found).detach()
    error, untouched = pixel_error(observed, result), pixel_error(observed, before)
    on_the_way = torch.stack([*losses, (observed - result).square().sum()])
    by_step = on_the_way / (len(observed) * _pixels(observed))
    return Reconstruction(found, result, error, untouched, by_step)


def inpaint(
    model: CoopFlow,
    observed: Tensor,
    known: Tensor,
    key: Key | None = None,
    *,
    start: Tensor | None = None,
    chains: int = 4,
    steps: int = INPAINTING_STEPS,
    rate: float = INPAINTING_RATE,
    decay: float = INPAINTING_DECAY,
    step_size: float | None = None,
    checkpoint_every: int | None = None,
) -> Tensor:
    """Fill in the pixels that are not known, several times for each image.

    As :func:`reconstruct`, with the error of the known pixels only; at the end the known pixels are
    pasted over the result.

    Args:
        model: a model made from settings.
        observed: (B, C, H, W).
        known: bool, (H, W) or broadcastable to (B, 1, H, W); True where the pixel is known.
        key: draws the starts; without it, a seed from torch's default generator does.
        start: (B, chains, C, H, W), where the chains start before the search, instead of proposals.
        chains: fillings of each image.
        steps, rate, decay: of the descent; the paper has 201, 0.03 and 0.99.
        step_size: δ of the chain; without it that of the training, which is the paper's 0.03.
        checkpoint_every: keep only every so many states of the chain, to bound memory.

    Returns:
        (B, chains, C, H, W); known pixels are those observed, to the bit.

    Raises:
        ValueError, TypeError: the shapes do not fit, ``known`` is not bool, or ``step_size`` is
            not > 0.
    """
    observed = check_events(model, observed)
    mask = check_mask(known, observed)
    if chains < 1:
        raise ValueError(f"chains must be ≥ 1, got {chains}")
    chain = smooth_chain(model, step_size, checkpoint_every)
    repeated = observed.repeat_interleave(chains, 0)
    weight = mask.repeat_interleave(chains, 0)

    def loss(x: Tensor) -> Tensor:
        return torch.where(weight, repeated - x, 0).square().sum()

    rates = [rate * decay**j for j in range(steps)]
    clamp = None if model.event is None else model.event.clamp
    with model.evaluating():
        shape = (len(observed), chains, *observed.shape[1:])
        first = _starts(model, shape, key, start).view_as(repeated)
        found, _ = _descend(chain, first, loss, rates, clamp)
        result = _end(chain, found).detach()
    if clamp is not None:
        result = result.clamp(*clamp)
    filled: Tensor = torch.where(weight, repeated, result)
    return filled.view(shape)


def _starts(model: CoopFlow, shape: Sequence[int], key: Key | None, start: Tensor | None) -> Tensor:
    """``start`` if it is given and of this shape (…, *event_shape), else that many proposals."""
    if start is None:
        events = len(model.flow.event_shape)
        return model.propose(math.prod(shape[:-events]), key).view(*shape)
    if start.shape != tuple(shape):
        raise ValueError(f"start must have shape {tuple(shape)}, got {tuple(start.shape)}")
    return start.detach()


def check_points(points: int) -> None:
    """ValueError for a line of fewer than its ends."""
    if points < 2:
        raise ValueError(f"points must be ≥ 2, got {points}")


def interpolate(
    model: CoopFlow,
    start_a: Tensor,
    start_b: Tensor,
    *,
    points: int = 21,
    step_size: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Straight lines in the flow's latent space between pairs of chain starts.

    Args:
        model: a model made from settings.
        start_a, start_b: (B, *event_shape), starts found by :func:`reconstruct`, or flow samples.
        points: how many, both ends included.
        step_size: δ of the chain; without it that of the training, which is the paper's 0.03.

    Returns:
        proposals and chain ends, each (B, points, *event_shape). The ends of the lines are the two
        starts, to the rounding of the flow.
    """
    check_points(points)
    check_events(model, start_a)
    check_events(model, start_b)
    weights = torch.linspace(0, 1, points, device=start_a.device).to(start_a.dtype)
    chain = smooth_chain(model, step_size)
    with model.evaluating(), torch.no_grad():
        z_a, z_b = (encode(model.flow, x).flatten(1) for x in (start_a, start_b))
        z = torch.lerp(z_a[:, None], z_b[:, None], weights[None, :, None])
        z = z.flatten(0, 1).view(-1, *start_a.shape[1:])
        proposals = decode(model.flow, z)
        results = _end(chain, proposals).detach()
    shape = (len(start_a), points)
    return proposals.unflatten(0, shape), results.unflatten(0, shape)


def encode(flow: Flow, x: Tensor) -> Tensor:
    """The latent code of continuous events: without dequantisation, so :func:`decode` undoes it."""
    y = x if flow.logit is None else flow.logit.call_and_ladj((x + 1) / 2)[0]
    z, _ = flow.transform.call_and_ladj(y)
    return z


def decode(flow: Flow, z: Tensor) -> Tensor:
    """Latent code → continuous event, the inverse of :func:`encode`: as ``flow.sample``, but
    neither rounded to grey levels nor with the contrast of ``legacy_contrast``."""
    y, _ = flow.inverse_and_ladj(z)
    return y if flow.logit is None else (2 * flow.logit.inverse(y) - 1).clamp(-1, 1)


def centre_hole(height: int, width: int) -> Tensor:
    """The paper's mask, (H, W) bool: a hole of half the size in the middle, True outside it.

    Rows and columns 8…23 of 32 would be centred; the paper's code has 7…22, and so has this.
    """
    known = torch.ones(height, width, dtype=torch.bool)
    top, left = (height // 4 - height // 32), (width // 4 - width // 32)
    known[top : top + height // 2, left : left + width // 2] = False
    return known


def check_events(model: CoopFlow, x: Tensor) -> Tensor:
    """x; ValueError unless it holds the model's events."""
    expected = model.flow.event_shape
    if x.shape[1:] != expected or len(x) < 1:
        raise ValueError(
            f"images must have shape (B ≥ 1, {', '.join(map(str, expected))}), got {tuple(x.shape)}"
        )
    return x


def check_mask(known: Tensor, observed: Tensor) -> Tensor:
    """The mask broadcast to the images; ValueError or TypeError when it does not fit."""
    if known.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {known.dtype}")
    if observed.ndim != 4:
        raise ValueError("inpainting is for images (B, C, H, W)")
    batch, _, height, width = observed.shape
    allowed = ((height, width), (1, height, width), (batch, 1, height, width))
    if tuple(known.shape) not in allowed:
        raise ValueError(
            f"mask must have shape ({height}, {width}) or ({batch}, 1, {height}, {width}), "
            f"got {tuple(known.shape)}"
        )
    return known.to(observed.device).expand(batch, 1, height, width)
