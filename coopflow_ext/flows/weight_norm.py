"""Weight-normed layers: w = g·v/‖v‖ for every output (Salimans & Kingma 2016).

Like torch's ``parametrizations.weight_norm``, with its names and numbers; but a layer that can be
pickled, and whose weight one flow in one thread can fold, together with those of other layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coopflow_ext import ops
from coopflow_ext.autocast import autocast_dtype
from coopflow_ext.flows.folding import Foldable, by_kind

# The weight of a layer, and its bias.
Affine = tuple[Tensor, Tensor | None]


class _Cast(torch.autograd.Function):
    """(dtype, *tensors of one dtype) -> the same in this dtype, by one operator for all."""

    @staticmethod
    def forward(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        cast = [torch.empty_like(t, dtype=dtype) for t in tensors]
        torch._foreach_copy_(cast, tensors)
        return tuple(cast)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """None for those that nobody used."""
        given = [grad for grad in grads if grad is not None]
        cast = iter(_Cast.apply(ctx.dtype, *given) if given else ())  # type: ignore[no-untyped-call]
        return (None, *(None if grad is None else next(cast) for grad in grads))


class _GainAndDirection(nn.Module):
    """g and v, under the names that torch gives them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        weight = weight.detach()
        self.original0 = nn.Parameter(torch.norm_except_dim(weight, 2, 0))
        self.original1 = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return torch._weight_norm(self.original1, self.original0, 0)

    def append(self, parametrization: nn.Module) -> None:
        """What torch.nn.utils.parametrize would do with another one."""
        raise TypeError(_TAKES_NONE.format("weight"))


class _OwnParametrization(nn.ModuleDict):
    """torch.nn.utils.parametrize looks into it before it changes a layer. It takes the layer's
    class for one of its own making, and would change that of all layers."""

    def __contains__(self, name: str) -> bool:
        if name != "weight":
            raise TypeError(_TAKES_NONE.format(name))
        return super().__contains__(name)


_TAKES_NONE = "a layer that norms its weight itself takes no parametrization of its {}"


class WeightNormed(Foldable, nn.Module):
    """A module whose ``weight`` is computed from its gain g and direction v."""

    # Whether autocast rounds the weight: it is a factor of a product or a convolution.
    _is_factor = True

    def _normalise(self) -> None:
        """Put gain and direction in the place of the parameter ``weight``."""
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.parametrizations = _OwnParametrization({"weight": _GainAndDirection(weight)})

    @property
    def weight(self) -> Tensor:
        # Before _normalise this is an AttributeError, for which nn.Module gives the parameter.
        return self.affine()[0]

    def affine(self) -> Affine:
        """Weight and bias as this layer uses them here."""
        folded: Affine | None = self.folded()
        return self.fold() if folded is None or self._was_rounded(folded[0]) else folded

    def _was_rounded(self, folded: Tensor) -> bool:
        """For autocast, which has been left since."""
        if folded.dtype.itemsize > 2:
            return False
        v: Tensor = self.parametrizations["weight"].original1  # type: ignore[assignment]
        return folded.dtype != autocast_dtype(v)

    def _bias(self) -> Tensor | None:
        # Which pruning, replicas and sharding make a tensor that is no parameter.
        bias: Tensor | None = getattr(self, "bias", None)
        return bias

    def fold(self) -> Affine:
        """By torch's own operator, which is quicker for one layer, and which compilers fuse."""
        weight: Tensor = self.parametrizations["weight"]()
        return weight, self._bias()

    @staticmethod
    def fold_all(layers: Sequence[WeightNormed], *, frozen: bool, inverse: bool) -> list[Affine]:
        """By one operator for those of a dtype and a device; those that are frozen by another, so
        that nothing of theirs is differentiated. In autocast factors and, but for frozen passes,
        their biases are rounded by one more, where autocast would round each by itself when it is
        used."""
        given: list[Any] = [layer.parametrizations["weight"] for layer in layers]
        pairs: list[tuple[Tensor, Tensor]] = [(of.original1, of.original0) for of in given]

        def kind(layer: WeightNormed, v: Tensor, g: Tensor) -> tuple[Any, ...]:
            dtype = autocast_dtype(v) if layer._is_factor else v.dtype
            return dtype, v.dtype, v.device, v.requires_grad or g.requires_grad

        kinds = [kind(layer, *pair) for layer, pair in zip(layers, pairs, strict=True)]

        def norm(numbers: list[int]) -> Iterable[Affine]:
            dtype, own, *_ = kinds[numbers[0]]
            directions, gains = zip(*(pairs[i] for i in numbers), strict=True)
            weights: Sequence[Tensor] = ops.weight_norm(directions, gains)
            biases = [layers[i]._bias() for i in numbers]
            if dtype != own:
                weights, rounded = _rounded(dtype, weights, () if frozen else biases)
                biases = biases if frozen else rounded
            return zip(weights, biases, strict=True)

        return by_kind(kinds, norm)


def _rounded(
    dtype: torch.dtype, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Sequence[Tensor], list[Tensor | None]]:
    own = weights[0].dtype
    which = [i for i, bias in enumerate(biases) if bias is not None and bias.dtype == own]
    cast = _Cast.apply(dtype, *weights, *(biases[i] for i in which))  # type: ignore[no-untyped-call]
    found = dict(zip(which, cast[len(weights) :], strict=True))
    return cast[: len(weights)], [found.get(i, bias) for i, bias in enumerate(biases)]


class WeightNormedConv2d(WeightNormed, nn.Conv2d):  # type: ignore[override]
    """``nn.Conv2d`` of odd size that keeps height and width."""

    def __init__(self, n_in: int, n_out: int, size: int) -> None:
        super().__init__(n_in, n_out, size, padding=size // 2)
        self._normalise()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.affine()
        return F.conv2d(x, weight, bias, padding=self.padding)


class WeightNormedLinear(WeightNormed, nn.Linear):  # type: ignore[override]
    """``nn.Linear``."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool) -> None:
        super().__init__(n_in, n_out, bias=bias)
        self._normalise()

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.affine()
        return F.linear(x, weight, bias)


class Rescale(WeightNormed):
    """One factor per channel, at first 1, for (B, features, H, W)."""

    _is_factor = False

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_parameter("weight", nn.Parameter(torch.ones(features, 1, 1)))
        self._normalise()
