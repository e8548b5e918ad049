"""Whether a training has gone wrong: a chain, what recompute rebuilds, or what it has learned."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from coopflow_ext.coop.ranks import ALONE, Ranks
from coopflow_ext.errors import NonFiniteError
from coopflow_ext.flows.recompute import complaint

_NONE = -1  # of a number that is not below 0


class Divergence:
    """Kept on the device from the first step on in which a chain, or what was rebuilt for a
    gradient, was wrong, and read when asked.

    Meanwhile nothing may be learned from what comes after: see :attr:`flag`.

    Args:
        batch_size: chains of an iteration.
        device: of the chains.
        ranks: the processes that share the batch; what happens to one of them happens to all.
    """

    def __init__(self, batch_size: int, device: torch.device, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._step = torch.empty((), dtype=torch.int64, device=device)
        self._stopped = torch.empty(batch_size, dtype=torch.bool, device=device)
        self._error = torch.empty((), device=device)  # of what was rebuilt
        self.reset()

    def reset(self) -> None:
        """Nothing has happened, as at the beginning."""
        self._step.fill_(_NONE)
        self._stopped.zero_()
        self._error.fill_(_NONE)

    @property
    def flag(self) -> Tensor:
        """0-d bool: whether it has happened."""
        return self._step != _NONE

    def note_chains(self, step: Tensor, frozen_at: Tensor, n_steps: int) -> None:
        """The steps at which the chains of an iteration stopped, out of ``n_steps``; the first
        iteration with one that did is kept.

        Args:
            step: number of the iteration, 0-d.
            frozen_at: see :class:`SamplerOutput`.
            n_steps: of a chain.
        """
        stopped = frozen_at < n_steps
        first = self._note(step, stopped.any().float())
        self._stopped.copy_(torch.where(first, stopped, self._stopped))

    def note_rebuilt(self, step: Tensor, errors: list[Tensor]) -> None:
        """What :func:`deferred_checks` gathered in a step, with gradients that must not be used
        where an error is above 1; the first such step is kept.

        Args:
            step: its number, 0-d.
            errors: one or more.
        """
        error = torch.stack(errors).max()
        wrong = torch.where(error <= 1, 0, error)
        first = self._note(step, wrong)
        self._error.copy_(torch.where(first, wrong, self._error))

    def _note(self, step: Tensor, wrong: Tensor) -> Tensor:
        """0-d bool: whether something is wrong in any process, and nothing was before. ``wrong``,
        0 where nothing is, becomes its sum over all processes."""
        self._ranks.total([wrong])
        first = (wrong != 0) & ~self.flag
        self._step.copy_(torch.where(first, step, self._step))
        return first

    def check(self) -> None:
        """One read.

        Raises:
            NonFiniteError: a chain was; names the iteration and the chains.
            RuntimeError: what recompute has rebuilt was wrong; names the step.
        """
        step = int(self._step)
        if step == _NONE:
            return
        error = float(self._error)
        if error != _NONE:
            raise RuntimeError(
                f"in step {step}, of which the flow learned nothing, and after which nothing was "
                f"learned: {complaint(error)}"
            )
        chains = self._stopped.nonzero().flatten().cpu()
        shown = ", ".join(map(str, chains[:8].tolist())) + (", …" if len(chains) > 8 else "")
        where = (
            f"{len(chains)} of the {len(self._stopped)} chains of this process ({shown})"
            if len(chains)
            else "chains of another process"
        )
        raise NonFiniteError(
            f"from iteration {step} on the energy's gradient was not finite in {where}; nothing "
            "was learned since",
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
