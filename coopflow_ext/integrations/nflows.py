"""Our flow layers as nflows transforms, for ``Flow(NflowsTransform(…), StandardNormal([D]))``."""

from __future__ import annotations

from torch import Tensor

from coopflow_ext._optional import require
from coopflow_ext.flows.base import Context, Transform, check_transform

__all__ = ["NflowsTransform"]

_transforms = require("nflows.transforms.base", extra="test", distribution="nflows")


class NflowsTransform(_transforms.Transform):  # type: ignore[misc, name-defined]
    """``forward`` is data → latent, as in nflows; nflows' context becomes ours.

    Args:
        transform: a layer of :mod:`coopflow_ext.flows`, its parameters trained as usual.
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = check_transform(transform)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.call_and_ladj(inputs, Context(aux=context))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(inputs, Context(aux=context))
