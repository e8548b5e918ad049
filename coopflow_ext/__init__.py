"""coopflow_ext: fused Langevin sampling, coupling layers and CoopFlow for PyTorch."""

from coopflow_ext import ops, reference
from coopflow_ext.errors import BuildError, NonFiniteError
from coopflow_ext.rng import Key

__all__ = ["BuildError", "Key", "NonFiniteError", "ops", "reference"]
