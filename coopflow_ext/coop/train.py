"""A training run from start to summary: logging, pictures, checkpoints, interruption."""

from __future__ import annotations

import json
import math
import shlex
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from coopflow_ext._info import build_info
from coopflow_ext._modes import usual_modes
from coopflow_ext._optional import require
from coopflow_ext.coop import pictures
from coopflow_ext.coop.board import LOGS, Board
from coopflow_ext.coop.config import RATES, TrainConfig
from coopflow_ext.coop.contents import naming
from coopflow_ext.coop.divergence import check_finite
from coopflow_ext.coop.judge import Judge
from coopflow_ext.coop.lock import holding
from coopflow_ext.coop.plane import report_plane
from coopflow_ext.coop.ranks import Ranks
from coopflow_ext.coop.run import RunFolder
from coopflow_ext.coop.trainer import Trainer
from coopflow_ext.errors import NonFiniteError

# Metrics that are root mean squares: several processes share the mean of the squares.
_ROOTS = ("langevin_distance",)


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped, by Ctrl-C or SIGTERM, after its state was saved; the message says how
    to go on."""


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a step is never cut in two; Ctrl-C stops at
    once then. SIGTERM, by which schedulers and torchrun end a job, may come more than once.

    A process that ignores Ctrl-C, as a shell starts those in its background, goes on doing so, and
    one that handles SIGTERM by itself does too.
    """
    asked = threading.Event()

    def ask(signum: int, frame: object) -> None:
        if signum == signal.SIGINT and asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    with ExitStack() as stack:
        for signum in _signals_to_take():
            stack.callback(signal.signal, signum, signal.getsignal(signum))
            signal.signal(signum, ask)
        yield asked


def _signals_to_take() -> list[signal.Signals]:
    """Those that nobody ignores, and SIGTERM only where nobody handles it."""
    if threading.current_thread() is not threading.main_thread():
        return []  # where Python lets nobody take one
    signals = []
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):  # None: not Python's
        signals.append(signal.SIGINT)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signals.append(signal.SIGTERM)
    return signals


@usual_modes()
def train(
    config: TrainConfig | None,
    out: str | Path,
    *,
    resume: bool = False,
    device: torch.device | str = "cpu",
    log: str | None = None,
) -> dict[str, Any]:
    """Train a CoopFlow and leave a run folder behind.

    The caller's default dtype, ``no_grad``, ``inference_mode`` and autocast change nothing.

    Args:
        config: the settings. With ``resume`` they are the run's own: give None, or the same ones
            with another number of ``steps`` or other rates (``pretrain_lr``, ``flow_lr``,
            ``energy_lr``), which are written into its config.json with what they were.
        out: the run folder; must be empty or missing unless ``resume``. One process at a time
            trains it.
        resume: continue from the last checkpoint. On the CPU the result has the same bits as that
            of a run that was never stopped.
        device: where to train. Inside a process group of torch.distributed each process takes its
            part of every batch, and rank 0 writes the files.
        log: "tensorboard" also writes scalars, pictures and histograms to RUN/tensorboard.

    Returns:
        What ``summary.json`` holds; an empty dictionary on ranks other than 0.

    Raises:
        RunError: the folder cannot be used, a file in it is damaged, or another process trains it.
        NonFiniteError: training diverged. The last checkpoint is from before; RUN/divergence.json
            says what is needed to reproduce it.
        TrainingInterrupted: Ctrl-C or SIGTERM, after a checkpoint was written.
        OSError: the disk is full or not writable; the last good checkpoint stays readable.
    """
    pictures.check_installed()
    if log not in (None, *LOGS):
        raise ValueError(f"log must be one of {', '.join(LOGS)}, got {log!r}")
    if log == "tensorboard":
        require("tensorboard", extra="tensorboard")
    path, ranks = Path(out), Ranks.current()
    if resume:  # before a lock is put into a folder that is no run
        TrainConfig.of_run(path)
    elif ranks.is_first:
        RunFolder.check_free(path)
    with holding(path) if ranks.is_first else nullcontext():
        begin = _continue_run if resume else _start_run
        trainer, run, judge = begin(config, path, device, ranks)
        if log == "tensorboard" and ranks.is_first:
            run.board = Board(run.path, trainer.step)
        with closing(run):
            _run_to_the_end(trainer, run, judge)
            return _finish(trainer, run, judge) if ranks.is_first else {}


def _start_run(
    config: TrainConfig | None, path: Path, device: torch.device | str, ranks: Ranks
) -> tuple[Trainer, RunFolder, Judge]:
    """Everything that can fail is made before the folder becomes a run."""
    if config is None:
        raise ValueError("config must be given for a new run, got None")
    data = config.load_data()
    trainer, judge = Trainer(config, data, device, ranks), Judge(data, config)
    _check_same(trainer)
    run = RunFolder.create(path, config) if ranks.is_first else RunFolder(path, config)
    return trainer, run, judge


def _continue_run(
    config: TrainConfig | None, path: Path, device: torch.device | str, ranks: Ranks
) -> tuple[Trainer, RunFolder, Judge]:
    """A run without a checkpoint yet starts from its beginning, which is the same. Its files
    change only after everything that can fail."""
    run = RunFolder.open(path)
    settings = run.config if config is None else config
    run.changes(settings)  # RunError for one that may not be changed
    run.metrics()  # or where that file is damaged
    saved = run.load_latest() if run.checkpoints() else None
    data = settings.load_data()
    trainer, judge = Trainer(settings, data, device, ranks), Judge(data, settings)
    if saved is not None:
        with naming(run.latest_checkpoint()):
            trainer.load(*saved)
    _check_same(trainer)
    run.adopt(settings, write=ranks.is_first)
    if ranks.is_first:
        run.tidy()
        run.forget_after(trainer.step if saved else -1)
    return trainer, run, judge


def _check_same(trainer: Trainer) -> None:
    """RunError unless all processes go on from the same point of the same run."""
    facts = json.dumps(trainer.metadata(), sort_keys=True)
    trainer.ranks.check_same(
        f"it goes on from step {trainer.step} here, and settings, data and checkpoint are not",
        facts,
        trainer.device,
    )


def _run_to_the_end(trainer: Trainer, run: RunFolder, judge: Judge) -> None:
    """All steps, or until Ctrl-C, SIGTERM or a divergence, which are raised as such."""
    total = trainer.config.total_steps
    try:
        with _interrupts() as asked, _progress(trainer) as bar:
            if trainer.step == 0:
                _observe(trainer, run, judge)
            while trainer.step < total:
                _advance(trainer, run, judge, bar)
                stop = trainer.ranks.any(asked.is_set(), trainer.device)
                if stop and trainer.step < total:
                    _checkpoint(trainer, run)
                    # Nobody leaves before the file is whole: torchrun ends the others then.
                    trainer.ranks.any(False, trainer.device)
                    raise TrainingInterrupted(
                        f"stopped at step {trainer.step} and saved; go on with: "
                        f"coopflow train --out {shlex.quote(str(run.path))} --resume"
                    )
    except NonFiniteError as error:
        raise _diverged(trainer, run, error) from error


def _diverged(trainer: Trainer, run: RunFolder, error: NonFiniteError) -> NonFiniteError:
    """The error to stop with, which says how to go on; what it was about is left in the run."""
    config = trainer.config
    saved = run.checkpoints()
    if trainer.ranks.is_first:
        run.write_divergence(
            {
                "step": trainer.step,
                "reason": str(error),
                "chains": None if error.chains is None else error.chains.tolist(),
                "from_checkpoint": saved[-1][1].name if saved else None,
                "settings": config.to_dict(),
                "history": run.history,
                "processes": trainer.ranks.world,
                "device": str(trainer.device),
                "build": build_info(),
            }
        )
    last = f"the last good checkpoint is {saved[-1][1].name}" if saved else "no checkpoint yet"
    rates = ", ".join(f"{name}={getattr(config, name):g}" for name in RATES)
    return NonFiniteError(
        f"training diverged by step {trainer.step}: {error}; {last}, and {run.divergence_path} "
        f"says what is needed to reproduce it; go on with a rate X below the present ({rates}): "
        f"coopflow train --out {shlex.quote(str(run.path))} --resume --lr X",
        step=trainer.step,
        chains=error.chains,
    )


def _progress(trainer: Trainer) -> tqdm[Any]:
    """A bar on a terminal, nothing elsewhere."""
    silent = None if trainer.ranks.is_first else True
    return tqdm(total=trainer.config.total_steps, initial=trainer.step, disable=silent, unit="it")


def _advance(trainer: Trainer, run: RunFolder, judge: Judge, bar: tqdm[Any]) -> None:
    """One step, and what is due after it."""
    config = trainer.config
    begin = time.perf_counter()
    try:
        metrics = trainer.train_step()
    except ValueError:  # where that is what the models have become, not what was given
        check_finite(trainer.tensors())
        raise
    bar.update()
    last = trainer.step == config.total_steps
    if trainer.step % config.log_every == 0 or last:
        _log(trainer, run, metrics, bar)
    pretrained = trainer.step == config.pretrain_steps
    if trainer.step % config.sample_every == 0 or pretrained or last:
        _observe(trainer, run, judge)
    trainer.seconds += time.perf_counter() - begin
    if trainer.step % config.checkpoint_every == 0 or last:
        _checkpoint(trainer, run)


def _log(trainer: Trainer, run: RunFolder, metrics: dict[str, Tensor], bar: tqdm[Any]) -> None:
    trainer.divergence.check()
    line: dict[str, Any] = {"step": trainer.step, "seconds": round(trainer.seconds, 3)}
    if trainer.device.type == "cuda":  # with what graphs and torch's allocator keep
        line["peak_memory_mib"] = torch.cuda.max_memory_reserved(trainer.device) >> 20
    values = torch.stack([value.float() for value in metrics.values()])
    roots = torch.tensor([name in _ROOTS for name in metrics], device=values.device)
    values = torch.where(roots, values.square(), values)
    trainer.ranks.average([values])
    values = torch.where(roots, values.sqrt(), values)
    line.update(zip(metrics, values.tolist(), strict=True))
    for net in ("flow", "energy"):
        if line.get(f"{net}_skipped") and not math.isfinite(line[f"{net}_grad_norm"]):
            del line[f"{net}_grad_norm"]  # the update was left out for it; nothing diverged
    gap = trainer.take_moment_gap()
    if gap is not None:
        line["moment_gap"] = gap
    bad = [name for name, value in line.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteError(f"{bad[0]} is not finite")
    if trainer.ranks.is_first:
        run.log(line)
    shown = ("energy_data", "energy_samples", "flow_nll", "moment_gap")
    bar.set_postfix({name: f"{line[name]:.3g}" for name in shown if name in line})


def _observe(trainer: Trainer, run: RunFolder, judge: Judge) -> None:
    if not trainer.ranks.is_first:
        return
    trainer.divergence.check()
    check_finite(trainer.tensors())
    with trainer.averaged() as model:
        distances, kinds = judge.observe(model, run.picture_path(trainer.step))
        if run.board is not None:
            events = {"data": judge.held_out.to(trainer.device), **kinds}
            with model.evaluating(), torch.no_grad():
                energies = {name: model.energy(x) for name, x in events.items()}
            run.board.events(kinds, energies, trainer.step)
    run.log({"step": trainer.step, **distances})


def _checkpoint(trainer: Trainer, run: RunFolder) -> None:
    """NonFiniteError, and nothing written, unless all that would be saved is finite."""
    trainer.divergence.check()
    trainer.gather_moments()
    if trainer.ranks.is_first:
        run.save(trainer.step, trainer.tensors(), trainer.metadata())


def _finish(trainer: Trainer, run: RunFolder, judge: Judge) -> dict[str, Any]:
    """Write curves and summary."""
    if not _line_of(run.metrics(), "fd_flow", trainer.step):
        _observe(trainer, run, judge)  # its line was lost, and will be the same
    metrics = run.metrics()
    start, end = (_line_of(metrics, "fd_flow", step) for step in (0, trainer.step))
    if not start:
        warnings.warn(
            f"{run.metrics_path} has lost the lines of the beginning: what the summary compares "
            "with it is left out",
            stacklevel=2,
        )
    gaps = [line["moment_gap"] for line in metrics if "moment_gap" in line]
    with trainer.averaged() as model:
        facts = judge.facts(model)
        if trainer.data.name.startswith("toy:"):
            facts.update(report_plane(model, trainer.data, run.path))
    facts["fd"].update(
        flow=end["fd_flow"],
        langevin=end["fd_langevin"],
        flow_start=start.get("fd_flow"),
    )
    summary = {
        "seconds": trainer.seconds,
        "steps": trainer.config.steps,
        "pretrain_steps": trainer.config.pretrain_steps,
        "flow_updates": trainer.flow.updates,
        "energy_updates": trainer.energy.updates,
        "iterations_per_second": trainer.config.total_steps / max(trainer.seconds, 1e-9),
        **facts,
        "pretraining_bits_per_dim": _pretraining_bits(trainer.config, metrics),
        "moment_gap": _line_of(metrics, "moment_gap", trainer.step).get("moment_gap"),
        "moment_gap_start": gaps[0] if gaps and start else None,
        "picture": str(run.picture_path(trainer.step).relative_to(run.path)),
        "device": str(trainer.device),
    }
    pictures.save_curves(run.path / "curves.png", metrics)
    run.write_summary(summary)
    return summary


def _line_of(metrics: list[dict[str, Any]], name: str, step: int) -> dict[str, Any]:
    """The line of that step that has the number; empty where there is none."""
    return next((line for line in metrics if line["step"] == step and name in line), {})


def _pretraining_bits(config: TrainConfig, lines: list[dict[str, Any]]) -> dict[str, float]:
    """Bits/dim of held-out events by step, from the untrained flow to the pre-trained one."""
    if config.pretrain_steps == 0:
        return {}
    known = [line for line in lines if "bits_per_dim" in line]
    before = [line for line in known if line["step"] <= config.pretrain_steps]
    return {str(line["step"]): line["bits_per_dim"] for line in before}
