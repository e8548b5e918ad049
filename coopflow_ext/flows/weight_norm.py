"""Weight-normed layers: w = g·v/‖v‖ for every output (Salimans & Kingma 2016).

Like torch's ``parametrizations.weight_norm``, with its names and numbers; but a layer that can be
pickled, and whose weight one flow in one thread can fold, together with those of other layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from coopflow_ext import ops
from coopflow_ext.flows.folding import Foldable


class _GainAndDirection(nn.Module):
    """g and v, under the names that torch gives them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        weight = weight.detach()
        self.original0 = nn.Parameter(torch.norm_except_dim(weight, 2, 0))
        self.original1 = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return torch._weight_norm(self.original1, self.original0, 0)


class WeightNormed(Foldable, nn.Module):
    """A module whose ``weight`` is computed from its gain g and direction v."""

    def _normalise(self) -> None:
        """Put gain and direction in the place of the parameter ``weight``."""
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.parametrizations = nn.ModuleDict({"weight": _GainAndDirection(weight)})

    @property
    def weight(self) -> Tensor:
        # Before _normalise this is an AttributeError, for which nn.Module gives the parameter.
        folded: Tensor | None = self.folded()
        return self.fold() if folded is None else folded

    def fold(self) -> Tensor:
        """By torch's own operator, which is quicker for one layer, and which compilers fuse."""
        weight: Tensor = self.parametrizations["weight"]()
        return weight

    @staticmethod
    def fold_all(layers: Sequence[WeightNormed]) -> list[Tensor]:
        """By one operator for those of a dtype and a device; those that are frozen by another, so
        that nothing of theirs is differentiated."""
        given = [layer.parametrizations["weight"] for layer in layers]
        pairs = [(norm.original1, norm.original0) for norm in given]
        kinds: dict[Hashable, list[int]] = {}
        for i, (v, g) in enumerate(pairs):
            learns = v.requires_grad or g.requires_grad
            kinds.setdefault((v.dtype, v.device, learns), []).append(i)
        weights: dict[int, Tensor] = {}
        for numbers in kinds.values():
            directions, gains = zip(*(pairs[i] for i in numbers), strict=True)
            weights.update(zip(numbers, ops.weight_norm(directions, gains), strict=True))
        return [weights[i] for i in range(len(layers))]


class WeightNormedConv2d(WeightNormed, nn.Conv2d):  # type: ignore[override]
    """``nn.Conv2d`` of odd size that keeps height and width."""

    def __init__(self, n_in: int, n_out: int, size: int) -> None:
        super().__init__(n_in, n_out, size, padding=size // 2)
        self._normalise()


class WeightNormedLinear(WeightNormed, nn.Linear):  # type: ignore[override]
    """``nn.Linear``."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool) -> None:
        super().__init__(n_in, n_out, bias=bias)
        self._normalise()


class Rescale(WeightNormed):
    """One factor per channel, at first 1, for (B, features, H, W)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.ones(features, 1, 1)))
        self._normalise()
