"""A module with its Adam, warm-up, gradient clip, skipped updates and averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coopflow_ext.coop.contents import Contents, adam_tensors
from coopflow_ext.coop.ranks import ALONE, Ranks

# Names under which torch keeps weight-norm's g: the parametrization, and the older hook.
_WEIGHT_NORM_G = (".original0", ".weight_g")


class Update(NamedTuple):
    """What :meth:`Learner.update` returns, both 0-d and on the module's device.

    Attributes:
        norm: L2 norm of the whole gradient, before the clip.
        skipped: bool, whether the update was left out.
    """

    norm: Tensor
    skipped: Tensor


class LearnerState(NamedTuple):
    """What a checkpoint holds for a :class:`Learner`, all of which fits it."""

    module: dict[str, Tensor]
    adam: dict[int, dict[str, Tensor]]
    updates: int
    warmed: int
    average: list[Tensor]


class Learner:
    """Updates one module.

    An update may be left out because of its gradient. That is decided on the device, so that no
    step waits for it: a skipped update leaves the weights, Adam's state, the count of updates, the
    warm-up and the averaged weights as they are, to the bit.

    Args:
        name: prefix of its tensors in a checkpoint.
        module: what learns.
        betas: Adam's.
        weight_decay: for weight-norm's g only, as in the authors' code.
        grad_norm: the gradient is scaled to at most this L2 norm; None for no clip.
        clip_groups: clip weight-norm's g and all else each by itself instead of the whole gradient.
        skip_norm: an update whose :attr:`Update.norm` is not below this is left out; None: none.
        warmup: count over which the rate rises linearly from 0.
        warmup_by: what is counted. "updates": those taken before this one. "batches": the
            iterations before that of the last update taken (the authors' schedule: two updates at
            rate 0, and after a pause one at the rate from before it).
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
        clip_groups: bool = False,
        skip_norm: float | None = None,
        warmup: int = 0,
        warmup_by: str = "updates",
        ema: float = 0.0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.name = name
        self.module = module
        self.grad_norm = grad_norm
        self.clip_groups = clip_groups
        self.skip_norm = skip_norm
        self.warmup = warmup
        self.warmup_by = warmup_by
        self.ema = ema
        self.ranks = ranks
        decayed = [p for n, p in module.named_parameters() if n.endswith(_WEIGHT_NORM_G)]
        others = [p for n, p in module.named_parameters() if not n.endswith(_WEIGHT_NORM_G)]
        groups = [{"params": others, "weight_decay": 0.0}]
        if decayed:
            groups.append({"params": decayed, "weight_decay": weight_decay})
        self.parameters = others + decayed
        on_cuda = self.parameters[0].is_cuda
        self.optimizer = torch.optim.Adam(groups, betas=betas, fused=True, capturable=on_cuda)
        self.average = [p.detach().clone() for p in module.parameters()] if ema else []
        # On the device, because what they count depends on updates that are skipped there.
        self._updates = torch.zeros((), dtype=torch.int64, device=self.parameters[0].device)
        self._warmed = torch.zeros_like(self._updates)

    @property
    def updates(self) -> int:
        """How many updates were taken; waits for the device."""
        return int(self._updates)

    def restart(self) -> None:
        """Begin Adam and the warm-up anew; averaged weights and the count of updates go on."""
        self.optimizer.state.clear()
        self._warmed.zero_()

    def dependence(self) -> object:
        """What an update depends on beside the gradients, to be compared: the options, and where
        weights, Adam's state and averages are."""
        plain = (bool, int, float, str, type(None))
        options = [value for value in vars(self).values() if isinstance(value, plain)]
        groups = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in self.optimizer.param_groups
        ]
        weights = [(p.data_ptr(), p.requires_grad) for p in self.parameters]
        adam = [t.data_ptr() for state in self.optimizer.state.values() for t in state.values()]
        averages = [average.data_ptr() for average in self.average]
        return options, groups, weights, adam, averages

    def update(
        self,
        losses: Iterable[Tensor],
        lr: float | Tensor,
        *,
        iteration: int | Tensor = 0,
        may_skip: bool = True,
        skip: Callable[[], Tensor] | None = None,
    ) -> Update:
        """One Adam step down the gradient of the sum of ``losses``.

        Each loss is differentiated before the next is asked for, so a generator bounds memory.
        The gradients are averaged over all processes.

        Args:
            losses: 0-d tensors.
            lr: the rate after the warm-up; a number or a 0-d tensor.
            iteration: number of this batch from 0, for ``warmup_by="batches"``; the same.
            may_skip: whether ``skip_norm`` applies.
            skip: asked once all losses are differentiated; 0-d bool, the same in all processes,
                true to leave the update out whatever its gradient.
        """
        self.optimizer.zero_grad()
        for loss in losses:
            loss.backward()
        self.ranks.average(p.grad for p in self.parameters if p.grad is not None)
        norm = self._clip()
        skipped = torch.zeros_like(norm, dtype=torch.bool) if skip is None else skip()
        if may_skip and self.skip_norm is not None:
            skipped = skipped | ~(norm < self.skip_norm)  # also where the norm is not a number
        self._step(lr, iteration, skipped)
        return Update(norm, skipped)

    def _clip(self) -> Tensor:
        """Scale the gradients; returns the norm of all of them before."""
        limit = float("inf") if self.grad_norm is None else self.grad_norm
        if not self.clip_groups:
            return nn.utils.clip_grad_norm_(self.parameters, limit)
        groups = [group["params"] for group in self.optimizer.param_groups]
        norms = [nn.utils.clip_grad_norm_(group, limit) for group in groups]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    @torch.no_grad()
    def _step(self, lr: float | Tensor, iteration: int | Tensor, skipped: Tensor) -> None:
        # Fused Adam takes a rate in float32 on CUDA, and in double precision on the CPU.
        dtype = torch.float64 if self._warmed.device.type == "cpu" else torch.float32
        rate = torch.empty_like(self._warmed, dtype=dtype)
        rate.copy_(lr) if isinstance(lr, Tensor) else rate.fill_(lr)
        if self.warmup:
            rate *= (self._warmed.to(dtype) / self.warmup).clamp(max=1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # By this a GradScaler tells fused Adam to leave weights and state as they are.
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self._updates += ~skipped
        counted = self._warmed + 1 if self.warmup_by == "updates" else iteration
        self._warmed.copy_(torch.where(skipped, self._warmed, counted))
        self._update_average(skipped)

    def _update_average(self, skipped: Tensor) -> None:
        if self.average:
            # 1 − decay, and 0 where the update was skipped.
            weight = (9 / (10 + self._updates)).clamp(min=1 - self.ema) * ~skipped
            weights = [weight] * len(self.average)
            torch._foreach_lerp_(self.average, list(self.module.parameters()), weights)

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
        state.update(adam_tensors(self.optimizer, f"{self.name}_optimizer"))
        state[f"{self.name}_updates"] = self._updates
        state[f"{self.name}_warmed"] = self._warmed
        names = [name for name, _ in self.module.named_parameters()]
        for name, average in zip(names, self.average, strict=False):
            state[f"{self.name}_ema.{name}"] = average
        return state

    def read(self, contents: Contents) -> LearnerState:
        """What :meth:`tensors` gave, from a checkpoint; nothing changes here.

        Raises:
            RunError: a tensor is missing or does not fit; names it.
        """
        warmed = f"{self.name}_warmed"
        updates = contents.take_count(f"{self.name}_updates")
        return LearnerState(
            contents.take_state(self.name, self.module),
            contents.take_adam(f"{self.name}_optimizer", self.optimizer),
            updates,
            # Checkpoints of before this was counted apart hold runs that warm up by updates.
            contents.take_count(warmed) if warmed in contents else updates,
            [*contents.take_averages(f"{self.name}_ema", self.module).values()] if self.ema else [],
        )

    @torch.no_grad()
    def load(self, state: LearnerState) -> None:
        """Go on from what :meth:`read` gave."""
        self.module.load_state_dict(state.module)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state.adam, "param_groups": groups})
        self._updates.fill_(state.updates)
        self._warmed.fill_(state.warmed)
        for mine, saved in zip(self.average, state.average, strict=True):
            mine.copy_(saved)
