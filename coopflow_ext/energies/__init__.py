"""Energy functions. Every one of them returns U of shape (B,), with p(x) ∝ exp(−U(x))."""

from coopflow_ext.energies.analytic import (
    DoubleWellEnergy,
    FunnelEnergy,
    GaussianEnergy,
    GaussianMixtureEnergy,
    RastriginEnergy,
    RosenbrockEnergy,
)
from coopflow_ext.energies.networks import MLPEnergy, ResEnergy

__all__ = [
    "DoubleWellEnergy",
    "FunnelEnergy",
    "GaussianEnergy",
    "GaussianMixtureEnergy",
    "MLPEnergy",
    "RastriginEnergy",
    "ResEnergy",
    "RosenbrockEnergy",
]
