"""Our flow layers as normflows flows: ``NormalizingFlow(base, [NormflowsFlow(coupling), …])``.

``ConditionalNormalizingFlow`` calls every layer with the context of a sample or of a density.
"""

from __future__ import annotations

from torch import Tensor

from coopflow_ext._optional import require
from coopflow_ext.flows.base import Context, Transform, check_transform

__all__ = ["NormflowsFlow"]

_flows = require("normflows.flows", extra="test", distribution="normflows")


class NormflowsFlow(_flows.Flow):  # type: ignore[misc, name-defined]
    """``forward`` is latent → data, as in normflows: the inverse of ours; its context becomes ours.

    Args:
        transform: a layer of :mod:`coopflow_ext.flows`, its parameters trained as usual.
    """

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = check_transform(transform)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(z, Context(aux=context))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.call_and_ladj(z, Context(aux=context))
