"""A module with its Adam, warm-up, gradient clip and averaged weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from coopflow_ext.coop.checkpoint import load_optimizer_tensors, optimizer_tensors
from coopflow_ext.coop.ranks import ALONE, Ranks

# Names under which torch keeps weight-norm's g: the parametrization, and the older hook.
_WEIGHT_NORM_G = (".original0", ".weight_g")


class Learner:
    """Updates one module.

    Args:
        name: prefix of its tensors in a checkpoint.
        module: what learns.
        betas: Adam's.
        weight_decay: for weight-norm's g only, as in the authors' code.
        grad_norm: the whole gradient is scaled to at most this L2 norm; None for no clip.
        warmup: updates over which the rate rises linearly from 0.
        ema: decay of the averaged weights, 0 for none. The first updates average over fewer:
            after n updates the decay is at most (1 + n)/(10 + n).
        ranks: the processes that share the batch.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        betas: tuple[float, float],
        weight_decay: float = 0.0,
        grad_norm: float | None = None,
        warmup: int = 0,
        ema: float = 0.0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.name = name
        self.module = module
        self.grad_norm = grad_norm
        self.warmup = warmup
        self.ema = ema
        self.ranks = ranks
        self.updates = 0
        decayed = [p for n, p in module.named_parameters() if n.endswith(_WEIGHT_NORM_G)]
        others = [p for n, p in module.named_parameters() if not n.endswith(_WEIGHT_NORM_G)]
        groups = [{"params": others, "weight_decay": 0.0}]
        if decayed:
            groups.append({"params": decayed, "weight_decay": weight_decay})
        self.parameters = others + decayed
        self.optimizer = torch.optim.Adam(groups, betas=betas, fused=True)
        self.average = [p.detach().clone() for p in module.parameters()] if ema else []

    def update(self, losses: Iterable[Tensor], lr: float) -> Tensor:
        """One Adam step down the gradient of the sum of ``losses``; returns the gradient's norm.

        Each loss is differentiated before the next is asked for, so a generator bounds memory.
        The gradients are averaged over all processes.
        """
        self.optimizer.zero_grad()
        for loss in losses:
            loss.backward()
        self.ranks.average(p.grad for p in self.parameters if p.grad is not None)
        limit = float("inf") if self.grad_norm is None else self.grad_norm
        norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        warm = min(1.0, self.updates / self.warmup) if self.warmup else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = lr * warm
        self.optimizer.step()
        self.updates += 1
        self._update_average()
        return norm

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average:
            decay = min(self.ema, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self.average, list(self.module.parameters()), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The module has its averaged weights inside, in place, and its own again afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        if self.average:
            for p, average in zip(self.module.parameters(), self.average, strict=True):
                own = p.clone()
                p.copy_(average)
                average.copy_(own)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that has to be saved, by name."""
        state = {f"{self.name}.{k}": v for k, v in self.module.state_dict().items()}
        state.update(optimizer_tensors(self.optimizer, f"{self.name}_optimizer"))
        state[f"{self.name}_updates"] = torch.tensor(self.updates)
        names = [name for name, _ in self.module.named_parameters()]
        for name, average in zip(names, self.average, strict=False):
            state[f"{self.name}_ema.{name}"] = average
        return state

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of :meth:`tensors`."""
        own = self.module.state_dict()
        self.module.load_state_dict({k: tensors[f"{self.name}.{k}"] for k in own})
        load_optimizer_tensors(self.optimizer, tensors, f"{self.name}_optimizer")
        self.updates = int(tensors[f"{self.name}_updates"])
        names = [name for name, _ in self.module.named_parameters()]
        for name, average in zip(names, self.average, strict=False):
            average.copy_(tensors[f"{self.name}_ema.{name}"])
