"""Conditioners: the networks that read one half of x and parametrise the map of the other half."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coopflow_ext import ops
from coopflow_ext._checks import (
    check_count,
    check_counts,
    check_flag,
    check_probability,
    check_sizes,
)
from coopflow_ext.flows.base import NO_CONTEXT, Context


class Conditioner(nn.Module):
    """A network (B, n_in, …) → (B, n_out, …); sub-classes define :meth:`forward`.

    It uses ``context.aux`` or refuses it: see :func:`conditioning`.
    """

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        raise NotImplementedError


def conditioning(context: Context, context_dim: int, x: Tensor) -> Tensor | None:
    """``context.aux`` for a network that takes ``context_dim`` numbers of it, shaped to broadcast.

    Raises:
        ValueError: it is given to a network that takes none, is missing, or does not fit x.
    """
    aux = context.aux
    if context_dim == 0:
        if aux is None:
            return None
        raise ValueError(
            f"context of shape {tuple(aux.shape)} is given to a network that takes none; make it "
            "with context_dim (FlowPPConditioner: aux_channels)"
        )
    if aux is None:
        raise ValueError(f"context must be a tensor (B, {context_dim}), got None")
    vector = aux.shape == (x.shape[0], context_dim)
    if not vector and aux.shape != (x.shape[0], context_dim, *x.shape[2:]):
        raise ValueError(
            f"context must have shape ({x.shape[0]}, {context_dim}), or also x's sizes behind it, "
            f"got {tuple(aux.shape)} beside x of shape {tuple(x.shape)}"
        )
    return aux.reshape(*aux.shape[:2], *(1,) * (x.ndim - 2)) if vector else aux


def _with_context(x: Tensor, context: Context, context_dim: int) -> Tensor:
    """x, and the context as further channels."""
    aux = conditioning(context, context_dim, x)
    return x if aux is None else torch.cat((x, aux.expand(-1, -1, *x.shape[2:])), dim=1)


class Masks(NamedTuple):
    """Where the masks of a dropout layer come from, as the ops take it."""

    rng: Tensor | None
    p: float
    step: int


class Dropout(nn.Module):
    """Dropout whose mask is drawn from the context's key; without one it does nothing.

    Args:
        p: probability that an element is zeroed, 0 ≤ p < 1.
        per_channel: whole channels are zeroed, not single elements.

    ``index`` tells the layers of one flow apart; :class:`Flow` numbers them.
    """

    def __init__(self, p: float, *, per_channel: bool = False) -> None:
        super().__init__()
        self.p = check_probability("p", p)
        self.per_channel = check_flag("per_channel", per_channel)
        self.index = 0

    def masks(self, context: Context) -> Masks:
        """For ops that drop by themselves."""
        rng = context.dropout_rng
        if rng is None:
            return Masks(None, self.p, 0)
        return (
            Masks(rng, self.p, self.index) if rng.ndim == 1 else Masks(rng[self.index], self.p, 0)
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        rng, p, step = self.masks(context)
        if rng is None or p == 0:
            return x
        n_mask_dims = 2 if self.per_channel else x.ndim
        shape = x.shape[:n_mask_dims]
        u = ops.uniform(shape, rng, step=step)
        mask = (u >= p).to(x.dtype) / (1 - p)
        return x * mask.reshape(shape + (1,) * (x.ndim - n_mask_dims))


def _zero(layer: nn.Linear | nn.Conv2d) -> None:
    """Start as the zero map, so that a coupling starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class MLPConditioner(Conditioner):
    """Linear layers with SiLU between them, for vectors: (B, n_in) → (B, n_out).

    The last layer starts at zero. The first reads ``context_dim`` numbers of context too.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        widths: Sequence[int] = (256, 256),
        dropout: float = 0.0,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        check_counts(1, n_in=n_in, n_out=n_out)
        widths = check_sizes("widths", widths)
        check_probability("dropout", dropout)
        self.context_dim = check_count("context_dim", context_dim, 0)
        sizes = (n_in + context_dim, *widths)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.dropouts = nn.ModuleList(Dropout(dropout) for _ in widths)
        self.last = nn.Linear(sizes[-1], n_out)
        _zero(self.last)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        x = _with_context(x, context, self.context_dim)
        for layer, dropout in zip(self.hidden, self.dropouts, strict=True):
            x = dropout(F.silu(layer(x)), context)
        return cast(Tensor, self.last(x))


class ConvConditioner(Conditioner):
    """A small residual network for images: (B, n_in, H, W) → (B, n_out, H, W).

    conv3×3, ``blocks`` × {x + conv1×1(silu(conv3×3(silu x)))}, silu, conv3×3; the last
    convolution starts at zero. The first reads ``context_dim`` channels of context too.
    """

    def __init__(
        self, n_in: int, n_out: int, width: int = 64, blocks: int = 2, context_dim: int = 0
    ) -> None:
        super().__init__()
        check_counts(1, n_in=n_in, n_out=n_out, width=width)
        check_counts(0, blocks=blocks)
        self.context_dim = check_count("context_dim", context_dim, 0)
        self.first = nn.Conv2d(n_in + context_dim, width, 3, padding=1)
        self.spatial = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.pointwise = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(blocks))
        self.last = nn.Conv2d(width, n_out, 3, padding=1)
        _zero(self.last)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        x = self.first(_with_context(x, context, self.context_dim))
        for spatial, pointwise in zip(self.spatial, self.pointwise, strict=True):
            x = x + pointwise(F.silu(spatial(F.silu(x))))
        return cast(Tensor, self.last(F.silu(x)))
