"""coopflow_ext: fused Langevin sampling, coupling layers and CoopFlow for PyTorch."""

from coopflow_ext import diagnostics, energies, flows, ops, presets, reference
from coopflow_ext.errors import BuildError, NonFiniteError
from coopflow_ext.rng import Key
from coopflow_ext.samplers import (
    LangevinSampler,
    MALASampler,
    ReplayBuffer,
    UnderdampedLangevinSampler,
)

__all__ = [
    "BuildError",
    "Key",
    "LangevinSampler",
    "MALASampler",
    "NonFiniteError",
    "ReplayBuffer",
    "UnderdampedLangevinSampler",
    "diagnostics",
    "energies",
    "flows",
    "ops",
    "presets",
    "reference",
]
