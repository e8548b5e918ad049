"""What a chain keeps of its steps on the way: states and statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from coopflow_ext._tensors import arithmetic_dtype, room_for, widest
from coopflow_ext.samplers.output import (
    ChainStatistics,
    Tensors,
    chain_statistics,
    new_states,
)


class Records:
    """Memory for what T steps leave behind, allocated before the first.

    Args:
        xs: the tensors of the state.
        n_steps: T.
        thin: the states after steps thin, 2·thin, … are kept; None: none is.
        stats: whether statistics are kept.
        energy: whether the energy's value is one of them.
        start: whether the first of the kept states is ``xs`` as it is now.
        columns: of statistics that a chain makes itself, for its state as a whole; None: the five
            of ``ops.langevin_step_``, for each tensor.

    Attributes:
        trajectory: (T // thin, *x.shape) for each tensor, one more with ``start``; or None.
        sums: (T, B, 5) for each tensor, see ``ops.langevin_step_``, or one (T, B, columns); empty
            where not kept.
        energies: (T, B), or None.
    """

    def __init__(
        self,
        xs: Tensors,
        n_steps: int,
        *,
        thin: int | None,
        stats: bool,
        energy: bool,
        start: bool = False,
        columns: int | None = None,
    ) -> None:
        self._n_elements = sum(x[:1].numel() for x in xs)
        self._thin, self._before = thin, int(start)
        self.trajectory: Tensors | None = None
        if thin is not None:
            self.trajectory = tuple(new_states(x, self._before + n_steps // thin) for x in xs)
            if start:
                for kept, x in zip(self.trajectory, xs, strict=True):
                    kept[0].copy_(x)
        self.sums: Tensors = ()
        self.energies: Tensor | None = None
        if stats:
            shape, wide = (n_steps, len(xs[0])), widest(xs)
            dtypes = [wide] if columns else [arithmetic_dtype(x.dtype) for x in xs]
            width = columns or 5
            with room_for("statistics", (len(dtypes), *shape, width), dtypes[0]):
                self.sums = tuple(xs[0].new_empty(*shape, width, dtype=dtype) for dtype in dtypes)
            if energy:
                self.energies = xs[0].new_empty(*shape, dtype=wide)

    def keep(self, step: int, xs: Tensors, u: Tensor | None) -> None:
        """The state after a step, if it is one of those kept, and the energy before it."""
        if self.energies is not None and u is not None:
            self.energies[step].copy_(u)
        if self.trajectory is not None and self._thin and (step + 1) % self._thin == 0:
            for kept, x in zip(self.trajectory, xs, strict=True):
                kept[self._before + (step + 1) // self._thin - 1].copy_(x)

    def take(self, window: Records, start: int, n_steps: int) -> None:
        """Steps ``start``, start + 1, … are the first ``n_steps`` of a window, which keeps the
        state after every one."""
        steps = slice(start, start + n_steps)
        for mine, theirs in zip(self.sums, window.sums, strict=True):
            mine[steps].copy_(theirs[:n_steps])
        if self.energies is not None and window.energies is not None:
            self.energies[steps].copy_(window.energies[:n_steps])
        if self.trajectory is None or window.trajectory is None or not self._thin:
            return
        first, last = start // self._thin, (start + n_steps) // self._thin
        wanted = slice((first + 1) * self._thin - 1 - start, n_steps, self._thin)
        for mine, theirs in zip(self.trajectory, window.trajectory, strict=True):
            mine[self._before + first : self._before + last].copy_(theirs[wanted])

    def statistics(self, sign: float) -> ChainStatistics | None:
        """The sums as norms and fractions over the whole state; U is sign · energies."""
        if not self.sums:
            return None
        return chain_statistics(
            torch.stack(self.sums).sum(0),
            None if self.energies is None else sign * self.energies,
            n_elements=self._n_elements,
        )
