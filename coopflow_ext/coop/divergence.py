"""Whether a chain of a training has met a gradient that is not finite."""

from __future__ import annotations

import torch
from torch import Tensor

from coopflow_ext.coop.ranks import ALONE, Ranks
from coopflow_ext.errors import NonFiniteError


class Divergence:
    """Kept on the device from the first iteration with such a chain on, and read when asked.

    Meanwhile nothing may be learned from what comes after: see :attr:`flag`.

    Args:
        batch_size: chains of an iteration.
        device: of the chains.
        ranks: the processes that share the batch; what happens to one of them happens to all.
    """

    def __init__(self, batch_size: int, device: torch.device, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._step = torch.full((), -1, dtype=torch.int64, device=device)
        self._stopped = torch.zeros(batch_size, dtype=torch.bool, device=device)

    @property
    def flag(self) -> Tensor:
        """0-d bool: whether it has happened."""
        return self._step >= 0

    def note(self, step: Tensor, frozen_at: Tensor, n_steps: int) -> None:
        """The steps at which the chains of an iteration stopped, out of ``n_steps``; the first
        iteration with one that did is kept.

        Args:
            step: number of the iteration, 0-d.
            frozen_at: see :class:`SamplerOutput`.
            n_steps: of a chain.
        """
        stopped = frozen_at < n_steps
        anywhere = stopped.any().float()
        self._ranks.total([anywhere])
        first = (anywhere > 0) & ~self.flag
        self._stopped.copy_(torch.where(first, stopped, self._stopped))
        self._step.copy_(torch.where(first, step, self._step))

    def check(self) -> None:
        """One read.

        Raises:
            NonFiniteError: it has happened; names the iteration and the chains.
        """
        step = int(self._step)
        if step < 0:
            return
        chains = self._stopped.nonzero().flatten().cpu()
        shown = ", ".join(map(str, chains[:8].tolist())) + (", …" if len(chains) > 8 else "")
        raise NonFiniteError(
            f"the energy's gradient was not finite in {len(chains)} of the {len(self._stopped)} "
            f"chains of this process ({shown}); nothing was learned since",
            step=step,
            chains=chains,
        )
