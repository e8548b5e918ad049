"""Samplers: Langevin chains as a drop-in for hand-written loops."""

from coopflow_ext.samplers.langevin import LangevinSampler
from coopflow_ext.samplers.output import ChainStatistics, SamplerOutput

__all__ = ["ChainStatistics", "LangevinSampler", "SamplerOutput"]
