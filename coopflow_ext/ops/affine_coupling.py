"""The affine coupling and its inverse."""

from __future__ import annotations

from torch import Tensor

from coopflow_ext import reference
from coopflow_ext.ops._coupling import coupling, differentiable, inverse_vjp_of, vjp_of


def affine_coupling(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """The affine coupling y = x·e^a + b and its log|det|.

    Equivalent to::

        a, b = params.unbind(1)
        return x * a.exp() + b, a.flatten(1).sum(1)

    Args:
        x: (B, …), floating.
        params: (B, 2, …) = (a, b), of x's dtype, or half-precision beside a float32 x; a arrives
            bounded.

    Returns:
        y of x's dtype, and ladj (B,), float32 (float64 for double), summed in a fixed order.

    Raises:
        ValueError, TypeError: an argument does not fit.
    """
    return coupling(_AFFINE, "x", x, params)


def affine_coupling_inverse(y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`affine_coupling`, and the log|det| of the inverse map.

    Equivalent to::

        a, b = params.unbind(1)
        return (y - b) * (-a).exp(), -a.flatten(1).sum(1)
    """
    return coupling(_AFFINE_INVERSE, "y", y, params)


_AFFINE = differentiable(
    "affine_coupling", vjp_of(reference.affine_coupling), saved=lambda x, y: (x,)
)
_AFFINE_INVERSE = differentiable(
    "affine_coupling_inverse", inverse_vjp_of(reference.affine_coupling), saved=lambda y, x: (x,)
)
