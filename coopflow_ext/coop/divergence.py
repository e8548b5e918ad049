"""Whether a training has left the finite numbers: in a chain, or in what it has learned."""

from __future__ import annotations

from collections.abc import Mapping

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
            f"from iteration {step} on the energy's gradient was not finite in {len(chains)} of "
            f"the {len(self._stopped)} chains of this process ({shown}); nothing was learned since",
            step=step,
            chains=chains,
        )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """One read of the device.

    Raises:
        NonFiniteError: a tensor has an element that is not finite; names the first such tensor.
    """
    floating = {name: t.detach() for name, t in tensors.items() if t.is_floating_point()}
    if not floating:
        return
    device = next(iter(floating.values())).device
    finite = torch.stack([t.isfinite().all().to(device) for t in floating.values()])
    if bool(finite.all()):
        return
    bad = [name for name, good in zip(floating, finite.tolist(), strict=True) if not good]
    raise NonFiniteError(
        f"{bad[0]} is not finite"
        + (f", nor are {len(bad) - 1} other tensors of {len(floating)}" if bad[1:] else "")
    )
