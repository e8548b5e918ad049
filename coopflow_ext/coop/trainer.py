"""The algorithm of the paper, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from coopflow_ext._checks import check_count, check_number
from coopflow_ext._modes import training_modes
from coopflow_ext._recording import kind_of_module
from coopflow_ext.autocast import in_precision, tensor_float32
from coopflow_ext.coop.config import TrainConfig
from coopflow_ext.coop.contents import Contents
from coopflow_ext.coop.divergence import Divergence
from coopflow_ext.coop.learner import Learner
from coopflow_ext.coop.memory import naming_memory
from coopflow_ext.coop.model import CoopFlow, EventSpec, build_sampler
from coopflow_ext.coop.provenance import check_same_data, data_facts
from coopflow_ext.coop.ranks import ALONE, Ranks
from coopflow_ext.coop.step_graphs import HasKey, StepGraphs
from coopflow_ext.data import Batches, Dataset, Prefetch
from coopflow_ext.errors import RunError
from coopflow_ext.flows.recompute import deferred_checks
from coopflow_ext.metrics import RunningMoments, moment_gap
from coopflow_ext.rng import Key

# At most so many for the data-dependent initialisation: enough for its statistics, and few enough
# that attention over large images fits where a training step does.
_INITIALISATION_IMAGES = 1024


class StepKind(NamedTuple):
    """What of a step is the same for many of them."""

    pretrains: bool
    flow_learns: bool
    energy_may_skip: bool


def captures_steps(config: TrainConfig, device: torch.device) -> bool:
    """Whether the steps of a training there become CUDA graphs; ValueError where they must and
    cannot."""
    wanted, can = config.cuda_graph, device.type == "cuda"
    if wanted is True and not can:
        raise ValueError(f"cuda_graph=true needs a CUDA device, got {device}")
    return wanted is not False and can


class Trainer:
    """One step at a time of the paper's algorithm; all state is in :meth:`tensors`.

    Args:
        config: the settings.
        data: the data set they name.
        device: where to train.
        ranks: the processes that share each batch, all with the same settings.

    Random numbers come from one key whose time counts Langevin steps and maximum-likelihood
    updates, so a step is a function of the weights and of this key.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Dataset,
        device: torch.device | str = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        if ranks.world > 1 and config.start == "buffer":
            raise ValueError("start must not be buffer with several processes: it is not shared")
        self.config = config
        self.data = data
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # also for other threads
            self.device = torch.device("cuda", torch.cuda.current_device())
        event = EventSpec(data.event_shape, data.levels)
        self.model = CoopFlow.from_config(config, event).to(self.device)
        self.key = Key(config.seed)
        self.step = 0
        # Within the graphs of a step a chain needs none of its own.
        chain_graphs: bool | Literal["auto"] = (
            False if captures_steps(config, self.device) else "auto"
        )
        self.sampler = build_sampler(
            config, self.model.energy, event, training=True,
            on_nonfinite="freeze", cuda_graph=chain_graphs,
        )  # fmt: skip
        self.seconds = 0.0
        flip = config.flip and data.flip
        self.ranks = ranks
        self.rows = ranks.rows(config.batch_size)
        self.first_chain = self.rows.start
        batches = Batches(
            data, config.batch_size, self.key, device=self.device, flip=flip, rows=self.rows
        )
        # On the CPU a second thread would only take time from the first.
        self.batches = Prefetch(batches) if self.device.type == "cuda" else batches
        self._initialize_flow()
        self.flow = Learner(
            "flow",
            self.model.flow,
            betas=config.flow_betas,
            weight_decay=config.flow_weight_decay,
            grad_norm=config.flow_grad_norm,
            clip_groups=config.flow_clip_groups,
            skip_norm=config.flow_skip_norm,
            warmup=config.warmup_steps,
            warmup_by=config.warmup_by,
            ema=config.flow_ema,
            ranks=ranks,
        )
        self.energy = Learner(
            "energy",
            self.model.energy,
            betas=config.energy_betas,
            grad_norm=config.energy_grad_norm,
            skip_norm=config.energy_skip_norm,
            warmup=config.warmup_steps,
            warmup_by=config.warmup_by,
            ema=config.energy_ema,
            ranks=ranks,
        )
        self.data_moments = RunningMoments(data.dim, self.device)
        for rows in data.train.split(1000):
            self.data_moments.update(data.decode(rows).to(self.device))
        # Of this process's samples since the last line of the metrics.
        self.sample_moments = RunningMoments(data.dim, self.device)
        self.divergence = Divergence(self.rows.stop - self.rows.start, self.device, ranks)
        # What a captured step reads of the numbers that change from step to step.
        self._step_number = torch.zeros((), dtype=torch.int64, device=self.device)
        self._iteration_number = torch.zeros_like(self._step_number)
        self._pretrain_lr = torch.zeros((), dtype=torch.float64, device=self.device)
        self._graphs = self._step_graphs()

    def _step_graphs(self) -> StepGraphs | None:
        if not captures_steps(self.config, self.device):
            return None
        keyed: list[HasKey] = [self] if self.model.buffer is None else [self, self.model.buffer]
        return StepGraphs(
            self._take_step,
            keyed,
            self.device,
            required=self.config.cuda_graph is True,
            depends_on=self._dependence,
        )

    def _dependence(self) -> object:
        """What a step depends on that is no number of its kind, and in no tensor that it reads."""
        learners = self.flow.dependence(), self.energy.dependence()
        return self.config, kind_of_module(self.model), learners

    def _initialize_flow(self) -> None:
        wanted = min(self.config.init_batches * self.config.batch_size, _INITIALISATION_IMAGES)
        size = min(len(self.data.train), wanted)
        x = Batches(self.data, size, self.key, device=self.device)[0]
        self.model.flow.initialize(x, key=self.key)
        self.ranks.copy_from_first(self.model)

    @property
    def pretraining(self) -> bool:
        """Whether the next step is one of the flow's pre-training."""
        return self.step < self.config.pretrain_steps

    def train_step(self) -> dict[str, Tensor]:
        """The next step; returns its numbers as 0-d tensors, which are not waited for.

        Raises:
            torch.OutOfMemoryError: names the batch, and settings that would take less.
        """
        with training_modes():
            return self._train_step()

    def _train_step(self) -> dict[str, Tensor]:
        config = self.config
        if self.step == config.pretrain_steps and config.flow_restart:
            self.flow.restart()
        x = self.batches[self.step]
        self.model.train()
        kind = StepKind(
            self.pretraining,
            flow_learns=self.pretraining or self._flow_learns(),
            energy_may_skip=not self.pretraining and self.iteration >= config.energy_skip_from,
        )
        self._step_number.fill_(self.step)
        self._iteration_number.fill_(self.iteration)
        self._pretrain_lr.fill_(
            (1 - self.step / max(config.pretrain_steps, 1)) * config.pretrain_lr
        )
        step = self._take_step if self._graphs is None else self._graphs.run
        with naming_memory(config):
            metrics = step(kind, x)
        # A chain of no steps draws as well.
        self.key = self.key.advance(1 if kind.pretrains else max(1, config.langevin_steps))
        self.step += 1
        return metrics

    def _take_step(self, kind: StepKind, x: Tensor) -> dict[str, Tensor]:
        """All that a step does on the device. What is a Python number in it is the same in all
        steps of a kind."""
        with tensor_float32(self.config.tf32):
            return self.pretrain(x) if kind.pretrains else self.cooperate(x, kind)

    def pretrain(self, x: Tensor) -> dict[str, Tensor]:
        """The flow learns the data by maximum likelihood, at a rate that falls linearly to 0."""
        return self.update_flow(x, self._pretrain_lr, may_skip=False)

    def cooperate(self, x: Tensor, kind: StepKind) -> dict[str, Tensor]:
        """One iteration of the paper's algorithm on the data batch x.

        The energy's update comes before the flow's, which is left out with it. Neither sees what
        the other does to the weights, so the order is not otherwise felt. Once :attr:`divergence`
        has noted something, nothing is learned any more.
        """
        persistent = self.model.buffer.draw(len(x)) if self.model.buffer else None
        proposal = self.propose(len(x)) if persistent is None else persistent.x
        samples = self.run_chain(proposal)
        if self.model.buffer and persistent:
            before = self.model.buffer.states.index_select(0, persistent.indices)
            kept = torch.where(self.divergence.flag, before, samples)
            self.model.buffer.write(persistent.indices, kept)
        metrics = {"langevin_distance": (samples - proposal).square().mean().sqrt()}
        metrics.update(self.update_energy(x, samples, may_skip=kind.energy_may_skip))
        if kind.flow_learns:
            skip = metrics["energy_skipped"]
            # The flow refuses samples that are not finite; it learns nothing of either then.
            learned = torch.where(self.divergence.flag, x, samples)
            metrics.update(self.update_flow(learned, self.config.flow_lr, skip))
        self.sample_moments.update(samples)
        return metrics

    def propose(self, n: int) -> Tensor:
        """The starts of this process's chains."""
        return self.model.propose(n, self.key.at_chain(self.first_chain))

    def run_chain(self, proposal: Tensor) -> Tensor:
        """The Langevin flow: T steps from the proposals toward the energy's distribution."""
        ends, stops = [], []
        for x0, key in self._parts(proposal):
            out = self.sampler(x0, key=key)
            assert isinstance(out.x, Tensor)
            assert out.frozen_at is not None
            ends.append(out.x)
            stops.append(out.frozen_at)
        self.divergence.note_chains(self._step_number, torch.cat(stops), self.config.langevin_steps)
        return torch.cat(ends)

    def _parts(self, x: Tensor) -> Iterator[tuple[Tensor, Key]]:
        """Pieces of this process's rows for gradient accumulation, and the key of their chains."""
        chain = self.first_chain
        for part in x.chunk(self.config.accumulate):
            yield part, self.key.at_chain(chain)
            chain += len(part)

    def _flow_learns(self) -> bool:
        if self.config.start != "flow":
            return False
        frozen = self.config.flow_frozen_steps
        return self.iteration >= frozen and (self.iteration - frozen) % self.config.flow_every == 0

    @property
    def iteration(self) -> int:
        """Number of the next step from 0, of the pre-training or of the iterations after it."""
        return self.step if self.pretraining else self.step - self.config.pretrain_steps

    def update_flow(
        self,
        x: Tensor,
        lr: float | Tensor,
        skip: Tensor | None = None,
        *,
        may_skip: bool = True,
    ) -> dict[str, Tensor]:
        """Flow step: the negative log-likelihood of x goes down; of the samples, not the data.

        Without the step where ``skip`` is true, once the training has diverged, or, if it
        ``may_skip``, because of its gradient.
        """
        losses = []

        def parts() -> Iterator[Tensor]:
            for rows, key in self._parts(x):
                with in_precision(self.config.flow_precision, self.device.type):
                    log_prob = self.model.flow.log_prob(rows, key=key)
                loss = -log_prob.sum() / len(x)
                losses.append(loss.detach())
                yield loss

        def left_out() -> Tensor:
            if errors:
                self.divergence.note_rebuilt(self._step_number, errors)
            return self.divergence.flag if skip is None else self.divergence.flag | skip

        with self._deferred() as errors:
            norm, skipped = self.flow.update(
                parts(), lr, iteration=self._iteration_number, may_skip=may_skip, skip=left_out
            )
        return {
            "flow_nll": torch.stack(losses).sum() / self.data.dim,
            "flow_grad_norm": norm,
            "flow_skipped": skipped,
        }

    def _deferred(self) -> AbstractContextManager[list[Tensor]]:
        """Where no step is captured, recompute raises at once, and nothing is left to check."""
        return nullcontext([]) if self._graphs is None else deferred_checks()

    def update_energy(
        self, x: Tensor, samples: Tensor, *, may_skip: bool = True
    ) -> dict[str, Tensor]:
        """EBM step: f = −U goes up on the data and down on the samples.

        Without the step once the training has diverged, or, if it ``may_skip``, because of its
        gradient.
        """
        means = []

        def parts() -> Iterator[Tensor]:
            pairs = zip(self._parts(x), self._parts(samples), strict=True)
            for (real, _), (synthesised, _) in pairs:
                with in_precision(self.config.precision, self.device.type):
                    u = self.model.energy(torch.cat((real, synthesised))).float()
                on_real, on_synthesised = u.split(len(real))
                mean = torch.stack((on_real.sum(), on_synthesised.sum())) / len(x)
                means.append(mean.detach())
                yield mean[0] - mean[1]

        norm, skipped = self.energy.update(
            parts(),
            self.config.energy_lr,
            iteration=self._iteration_number,
            may_skip=may_skip,
            skip=lambda: self.divergence.flag,
        )
        on_data, on_samples = torch.stack(means).sum(0)
        return {
            "energy_data": on_data,
            "energy_samples": on_samples,
            "energy_grad_norm": norm,
            "energy_skipped": skipped,
        }

    def take_moment_gap(self) -> float | None:
        """The gap of the samples since it was last asked; None when there were none."""
        self.gather_moments()
        gap = None
        if float(self.sample_moments.count) > 0:
            gap = moment_gap(self.data_moments, self.sample_moments)
        self.sample_moments.reset()
        return gap

    def gather_moments(self) -> None:
        """Bring the running sums of all processes to the first one, before they are used."""
        sums = self.sample_moments.state_dict().values()
        self.ranks.total(sums)
        if not self.ranks.is_first:
            self.sample_moments.reset()

    @contextmanager
    def averaged(self) -> Iterator[CoopFlow]:
        """The model with averaged weights, where the settings ask for them."""
        with self.flow.averaged(), self.energy.averaged():
            yield self.model

    def tensors(self) -> dict[str, Tensor]:
        """Weights, optimizers, averages and running sums, by name."""
        moments = self.sample_moments.state_dict()
        return {
            **self.flow.tensors(),
            **self.energy.tensors(),
            **self.model.buffer_tensors(),
            **{f"moments.{name}": tensor for name, tensor in moments.items()},
        }

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint holds beside the tensors."""
        return {
            **self.model.metadata(),
            "step": self.step,
            "key": self.key.state_dict(),
            "seconds": self.seconds,
            **data_facts(self.data),
        }

    def load(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Continue from a checkpoint, all of which is checked before anything changes.

        Raises:
            RunError: a tensor or a number is missing or does not fit, or the data are others; names
                it.
        """
        step, key, seconds = _position(metadata)
        check_same_data(metadata, self.data)
        contents = Contents(tensors)
        flow, energy = self.flow.read(contents), self.energy.read(contents)
        chains = self.model.read_buffer(contents)
        moments = {
            name: contents.take(f"moments.{name}", like, minimum=0 if name == "count" else None)
            for name, like in self.sample_moments.state_dict().items()
        }
        contents.check_all_taken()
        self.flow.load(flow)
        self.energy.load(energy)
        self.model.load_buffer(chains)
        if self.ranks.is_first:
            self.sample_moments.load_state_dict(moments)
        self.divergence.reset()
        self.step, self.key, self.seconds = step, key, seconds
        self._graphs = self._step_graphs()  # those there were go on with the optimizers' old state


def _position(metadata: dict[str, Any]) -> tuple[int, Key, float]:
    """Step, key and seconds of a checkpoint; RunError, which names what is missing or wrong."""
    try:
        step = check_count("step", metadata["step"], 0)
        seconds = check_number("seconds", metadata["seconds"], minimum=0)
        return step, Key.from_state_dict(metadata["key"]), seconds
    except KeyError as error:
        raise RunError(f"its metadata has no {error}: it holds models, but no training") from error
    except (ValueError, TypeError) as error:
        raise RunError(f"its metadata is wrong: {error}") from error
