"""coopflow_ext: fused Langevin sampling, coupling layers and CoopFlow for PyTorch."""

from coopflow_ext import coop, data, diagnostics, energies, flows, metrics, ops, presets, reference
from coopflow_ext._info import build_info
from coopflow_ext._version import __version__
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
    "__version__",
    "build_info",
    "coop",
    "data",
    "diagnostics",
    "energies",
    "flows",
    "metrics",
    "ops",
    "presets",
    "reference",
]
