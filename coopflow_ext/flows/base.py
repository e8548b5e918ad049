"""What every layer of a flow has in common, and how layers are put together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn


@dataclass(frozen=True)
class Context:
    """What a pass hands to every layer beside its input.

    Attributes:
        aux: what the couplings' networks are conditioned on, or None: (B, context_dim), or for
            images also maps (B, context_dim, H, W).
        dropout_rng: int64[3] on the input's device, from which dropout masks are drawn, each
            layer's at the step of its index; or (layers, 3), a row for each, which compiled blocks
            take, for a number would be a constant in them. None switches dropout off.
        compiled: whether the blocks of a Flow++ conditioner run compiled, see :class:`Flow`.
    """

    aux: Tensor | None = None
    dropout_rng: Tensor | None = None
    compiled: bool = False


NO_CONTEXT = Context()


class Transform(nn.Module):
    """An invertible map of (B, …) tensors; the direction data → latent is "forward".

    Sub-classes define :meth:`call_and_ladj` and :meth:`inverse_and_ladj`. Both return the log of
    the absolute determinant of the Jacobian of the map just run, per row, (B,).
    """

    def call_and_ladj(self, x: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def inverse_and_ladj(self, z: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        return self.call_and_ladj(x, context)


def check_transform(value: object) -> Transform:
    """``value`` itself; TypeError unless it is a layer."""
    if isinstance(value, Transform):
        return value
    advice = "; its layers are flow.transform" if hasattr(value, "transform") else ""
    raise TypeError(f"transform must be a Transform, got {type(value).__name__}{advice}")


class Compose(Transform):
    """Transforms one after the other, the first in the list first."""

    def __init__(self, transforms: Iterable[Transform]) -> None:
        super().__init__()
        given = list(transforms) if isinstance(transforms, Iterable) else [transforms]
        for i, transform in enumerate(given):
            if not isinstance(transform, nn.Module):
                got = type(transform).__name__
                raise TypeError(f"transforms[{i}] must be a Transform, got {got}")
        self.transforms = nn.ModuleList(given)
        if not self.transforms:
            raise ValueError("transforms must hold at least one transform")

    def call_and_ladj(self, x: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for transform in self.transforms:
            x, ladj = cast(Transform, transform).call_and_ladj(x, context)
            total = total + ladj
        return x, total

    def inverse_and_ladj(self, z: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(z.shape[0])
        for transform in reversed(self.transforms):
            z, ladj = cast(Transform, transform).inverse_and_ladj(z, context)
            total = total + ladj
        return z, total


class Inverse(Transform):
    """A transform run the other way round."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def call_and_ladj(self, x: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(x, context)

    def inverse_and_ladj(self, z: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        return self.transform.call_and_ladj(z, context)
