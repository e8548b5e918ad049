"""The states that a chain keeps on its way."""

from __future__ import annotations

from torch import Tensor


class Trajectory:
    """(T // thin, *x.shape), allocated before the chain; ``states`` is None when not wanted."""

    def __init__(self, x: Tensor, n_steps: int, thin: int, *, keep: bool) -> None:
        self.thin = thin
        self.states = x.new_empty(n_steps // thin, *x.shape) if keep else None

    def record(self, step: int, x: Tensor) -> None:
        """Keep x, the state after ``step``, if it is one of the states thin, 2·thin, …"""
        if self.states is not None and (step + 1) % self.thin == 0:
            self.states[(step + 1) // self.thin - 1].copy_(x)
