"""Conditioners: the networks that read one half of x and parametrise the map of the other half."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from coopflow_ext import ops
from coopflow_ext.flows.base import NO_CONTEXT, Context


class Conditioner(nn.Module):
    """A network (B, n_in, …) → (B, n_out, …); sub-classes define :meth:`forward`."""

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        raise NotImplementedError


class Dropout(nn.Module):
    """Dropout whose mask is drawn from the context's key; without one it does nothing.

    Args:
        p: probability that an element is zeroed, 0 ≤ p < 1.
        per_channel: whole channels are zeroed, not single elements.

    ``index`` tells the layers of one flow apart; :class:`Flow` numbers them.
    """

    def __init__(self, p: float, *, per_channel: bool = False) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must be in [0, 1), got {p}")
        self.p = p
        self.per_channel = per_channel
        self.index = 0

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if context.dropout_rng is None or self.p == 0:
            return x
        n_mask_dims = 2 if self.per_channel else x.ndim
        shape = x.shape[:n_mask_dims]
        u = ops.uniform(
            shape, context.dropout_rng, step=self.index, chain_offset=context.chain_offset
        )
        mask = (u >= self.p).to(x.dtype) / (1 - self.p)
        return x * mask.reshape(shape + (1,) * (x.ndim - n_mask_dims))


def _zero(layer: nn.Linear | nn.Conv2d) -> None:
    """Start as the zero map, so that a coupling starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class MLPConditioner(Conditioner):
    """Linear layers with SiLU between them, for vectors: (B, n_in) → (B, n_out).

    The last layer starts at zero.
    """

    def __init__(
        self, n_in: int, n_out: int, widths: Sequence[int] = (256, 256), dropout: float = 0.0
    ) -> None:
        super().__init__()
        sizes = (n_in, *widths)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.dropouts = nn.ModuleList(Dropout(dropout) for _ in widths)
        self.last = nn.Linear(sizes[-1], n_out)
        _zero(self.last)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        for layer, dropout in zip(self.hidden, self.dropouts, strict=True):
            x = dropout(F.silu(layer(x)), context)
        return cast(Tensor, self.last(x))


class ConvConditioner(Conditioner):
    """A small residual network for images: (B, n_in, H, W) → (B, n_out, H, W).

    conv3×3, ``blocks`` × {x + conv1×1(silu(conv3×3(silu x)))}, silu, conv3×3; the last
    convolution starts at zero.
    """

    def __init__(self, n_in: int, n_out: int, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(n_in, width, 3, padding=1)
        self.spatial = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.pointwise = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(blocks))
        self.last = nn.Conv2d(width, n_out, 3, padding=1)
        _zero(self.last)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        x = self.first(x)
        for spatial, pointwise in zip(self.spatial, self.pointwise, strict=True):
            x = x + pointwise(F.silu(spatial(F.silu(x))))
        return cast(Tensor, self.last(F.silu(x)))
