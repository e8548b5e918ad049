"""Samplers: Langevin chains as a drop-in for hand-written loops."""

from coopflow_ext.samplers.langevin import LangevinSampler
from coopflow_ext.samplers.mala import MALAOutput, MALASampler, MALAStatistics
from coopflow_ext.samplers.output import ChainStatistics, SamplerOutput
from coopflow_ext.samplers.replay_buffer import BufferDraw, ReplayBuffer
from coopflow_ext.samplers.underdamped import (
    UnderdampedLangevinSampler,
    UnderdampedOutput,
    UnderdampedStatistics,
)

__all__ = [
    "BufferDraw",
    "ChainStatistics",
    "LangevinSampler",
    "MALAOutput",
    "MALASampler",
    "MALAStatistics",
    "ReplayBuffer",
    "SamplerOutput",
    "UnderdampedLangevinSampler",
    "UnderdampedOutput",
    "UnderdampedStatistics",
]
