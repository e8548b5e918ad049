"""Two processes with gloo do what one does."""

from __future__ import annotations

import importlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from recorded_ops import RecordedOps
from torch.utils.flop_counter import FlopCounterMode

from coopflow_ext import Key
from coopflow_ext.coop import RunFolder, TrainConfig, Trainer, step_graphs, train
from coopflow_ext.coop.checkpoint import latest_checkpoint, load_checkpoint
from coopflow_ext.coop.divergence import Divergence
from coopflow_ext.coop.ranks import Ranks
from coopflow_ext.coop.step_graphs import StepGraphs
from coopflow_ext.data import load
from coopflow_ext.energies import ResEnergy
from coopflow_ext.errors import NonFiniteError, RunError
from coopflow_ext.flows import ActNorm, Flow, flowpp

training = importlib.import_module("coopflow_ext.coop.train")

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_gloo_available(), reason="this torch has no gloo"
)

SETTINGS: dict[str, Any] = {
    "preset": "digits-small",
    "flow_options": {"net": "mlp", "couplings": 2, "widths": [16]},
    "energy_options": {"widths": [16]},
    "batch_size": 16,
    "langevin_steps": 3,
    "pretrain_steps": 2,
    "flow_frozen_steps": 1,
    "flow_every": 1,
    "steps": 4,
    "warmup_steps": 0,
    "n_samples": 20,
    "log_every": 2,
    "checkpoint_every": 3,
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What one iteration makes: chains, and the averaged gradients of both models."""
    chains = []
    run_chain = trainer.run_chain

    def spy(proposal: torch.Tensor) -> torch.Tensor:
        chains.append(run_chain(proposal))
        return chains[0]

    trainer.run_chain = spy  # type: ignore[method-assign]
    trainer.train_step()
    named = trainer.model.named_parameters()
    return {"chains": chains[0], **{n: p.grad.clone() for n, p in named if p.grad is not None}}


def one_iteration(rank: int, world: int, port: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    config = TrainConfig.from_dict({**SETTINGS, "pretrain_steps": 0, "flow_frozen_steps": 0})
    if rank == 1:  # ActNorm sees something else here: rank 0's state must come in its place
        initialize = Flow.initialize
        Flow.initialize = lambda self, x, **k: initialize(self, x / 2, **k)  # type: ignore
    trainer = Trainer(config, load("digits"), ranks=Ranks.current())
    sent = []
    all_reduce = torch.distributed.all_reduce

    def counted(tensor: torch.Tensor, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, **options)

    torch.distributed.all_reduce = counted
    made = gradients(trainer)
    assert not trainer.ranks.any(False, trainer.device)
    torch.save({**made, "sent": torch.tensor(sent)}, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_make_the_chains_and_gradients_of_one(tmp_path: Path) -> None:
    config = TrainConfig.from_dict({**SETTINGS, "pretrain_steps": 0, "flow_frozen_steps": 0})
    whole = gradients(Trainer(config, load("digits")))
    mp.start_processes(
        one_iteration, (2, free_port(), str(tmp_path)), nprocs=2, start_method="spawn"
    )
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    chains = torch.cat([part["chains"] for part in parts])
    torch.testing.assert_close(chains, whole["chains"], rtol=0, atol=1e-5)
    # Whether a chain stopped, each model's gradient, and the flag: what docs/scaling.md says.
    sizes = [4 * sum(whole[n].numel() for n in whole if n.startswith(m)) for m in ("energ", "flow")]
    assert parts[0]["sent"].tolist() == [4, *sizes, 4]
    for name in whole:
        if name != "chains":
            assert torch.equal(parts[0][name], parts[1][name])
            torch.testing.assert_close(parts[0][name], whole[name], rtol=1e-3, atol=1e-5)


def runs(rank: int, world: int, port: int, out: str) -> None:
    """A run, one that Ctrl-C stops while rank 0 is slow to save, and a resume of two at once."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    config = TrainConfig.from_dict(SETTINGS)
    train(config, f"{out}/whole")

    asked, save = threading.Event(), training._checkpoint
    asked.set()

    def slowly(*arguments: Any) -> None:
        if rank == 0:
            time.sleep(0.5)
        save(*arguments)

    with (
        mock.patch.object(training, "_interrupts", return_value=nullcontext(asked)),
        mock.patch.object(training, "_checkpoint", slowly),
        pytest.raises(training.TrainingInterrupted, match="step 1 and saved"),
    ):
        train(config, f"{out}/stopped")
    assert latest_checkpoint(Path(out) / "stopped").name == "step-0000001.safetensors"

    theirs = ("whole", "stopped")[rank]
    step = (6, 1)[rank]
    with pytest.raises(RunError, match=f"rank {rank}: it goes on from step {step} here, .* 2 proc"):
        train(None, f"{out}/{theirs}", resume=True)
    torch.distributed.destroy_process_group()


def test_runs_of_two_ranks(tmp_path: Path) -> None:
    """Metrics are those of one process; nobody says "saved" too early; all go on from one point."""
    mp.start_processes(runs, (2, free_port(), str(tmp_path)), nprocs=2, start_method="spawn")
    train(TrainConfig.from_dict(SETTINGS), tmp_path / "alone")
    together, alone = (RunFolder.open(tmp_path / name).metrics() for name in ("whole", "alone"))
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & {"langevin_distance", "flow_nll", "energy_samples"}:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5)
    assert any("langevin_distance" in line for line in together)


class Elsewhere(Ranks):
    """Two processes, of which the other one has a chain that stopped."""

    def total(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            tensor += 1


def test_a_chain_that_stopped_in_another_process_is_none_of_this_one() -> None:
    divergence = Divergence(4, torch.device("cpu"), Elsewhere(0, 2))
    divergence.note_chains(torch.tensor(3), torch.full((4,), 5), 5)
    with pytest.raises(NonFiniteError, match=r"3 on .* in chains of another process; nothing"):
        divergence.check()


def graphed_steps(rank: int, world: int, port: int, device: str) -> None:
    """A training with graphs beside one without, in each of several processes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    options = {**SETTINGS["flow_options"], "recompute": True}
    plain, graphed = (
        Trainer(
            TrainConfig.from_dict({**SETTINGS, "flow_options": options, "pretrain_steps": 5,
                                   "steps": 20, "cuda_graph": how}),
            load("digits"), device, Ranks.current(),
        )
        for how in (False, "auto" if device == "cpu" else True)
    )  # fmt: skip
    if device == "cpu":
        step_graphs.Recording = RecordedOps  # type: ignore
        graphed._graphs = StepGraphs(graphed._take_step, [graphed], graphed.device, required=True)
    for _ in range(11):
        plain.train_step()
        graphed.train_step()
    graphed.divergence.check()
    recording: Any = graphed._graphs._recording  # type: ignore
    if device == "cpu":
        cuts = {k.pretrains: sum(map(callable, ops)) for k, ops in recording.pieces.items()}
    else:
        cuts = {k.pretrains: len(parts) // 2 for k, parts in recording._parts.items()}
    # The flow's gradient and whether it is wrong; before them whether a chain stopped, and the
    # energy's gradient.
    assert cuts == {True: 2, False: 4}
    bounds = {"rtol": 0.0, "atol": 0.0} if device == "cpu" else {"rtol": 5e-2, "atol": 5e-3}
    for a, b in zip(graphed.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, **bounds)

    learned = [p.detach().clone() for p in graphed.model.flow.parameters()]
    shift = next(m.mean for m in graphed.model.flow.modules() if isinstance(m, ActNorm))
    whole = shift.detach().clone()
    if rank == 1:  # what this process alone rebuilds is wrong
        shift.data.fill_(1e9)
    graphed.train_step()
    shift.data.copy_(whole)
    for tensor, before in zip(graphed.model.flow.parameters(), learned, strict=True):
        assert torch.equal(tensor, before)
    with pytest.raises(RuntimeError, match=r"in step 11, .* rebuilt by the inverse are off by"):
        graphed.divergence.check()
    torch.distributed.destroy_process_group()


def test_graphs_of_several_processes_are_cut_at_their_messages() -> None:
    """Nothing is sent while one is captured, and each replay sends what the steps send."""
    mp.start_processes(graphed_steps, (2, free_port(), "cpu"), nprocs=2, start_method="spawn")


@pytest.mark.gpu
def test_gpu_graphs_of_several_processes() -> None:
    """Two on one GPU, with gloo: NCCL wants a GPU for each."""
    mp.start_processes(graphed_steps, (2, free_port(), "cuda:0"), nprocs=2, start_method="spawn")


def test_accumulated_parts_are_the_whole_batch() -> None:
    settings = {**SETTINGS, "pretrain_steps": 0, "flow_frozen_steps": 0}
    whole = gradients(Trainer(TrainConfig.from_dict(settings), load("digits")))
    parts = gradients(Trainer(TrainConfig.from_dict({**settings, "accumulate": 3}), load("digits")))
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)


def test_bfloat16_energy_learns_nearly_the_same() -> None:
    settings = {**SETTINGS, "pretrain_steps": 0, "flow_frozen_steps": 0}
    exact = gradients(Trainer(TrainConfig.from_dict(settings), load("digits")))
    half = TrainConfig.from_dict({**settings, "precision": "bfloat16"})
    rounded = gradients(Trainer(half, load("digits")))
    assert rounded["chains"].dtype == torch.float32
    torch.testing.assert_close(rounded["chains"], exact["chains"], rtol=0, atol=0.02)
    assert not torch.equal(rounded["chains"], exact["chains"])


def test_bfloat16_flow_learns_nearly_the_same() -> None:
    settings = {**SETTINGS, "pretrain_steps": 0, "flow_frozen_steps": 0, "flow_lr": 1e-3}
    made = []
    for precision in ("float32", "bfloat16"):
        config = TrainConfig.from_dict({**settings, "flow_precision": precision})
        trainer = Trainer(config, load("digits"))
        trainer.train_step()  # at first the couplings are the identity, whatever their networks say
        made.append(gradients(trainer))
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    exact, rounded = made
    assert any(not torch.equal(rounded[name], exact[name]) for name in exact)
    for name in exact:
        error = (rounded[name] - exact[name]).norm() / exact[name].norm().clamp(min=1e-6)
        assert error < 0.05, name


@pytest.mark.slow
def test_compiled_gradient_learns_the_same() -> None:
    settings = {**SETTINGS, "pretrain_steps": 0, "flow_frozen_steps": 0}
    eager = gradients(Trainer(TrainConfig.from_dict(settings), load("digits")))
    compiled = TrainConfig.from_dict({**settings, "compile": True})
    torch.testing.assert_close(
        gradients(Trainer(compiled, load("digits"))), eager, rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
def test_arithmetic_of_the_papers_networks_is_that_of_the_cost_model() -> None:
    """docs/scaling.md, in GFLOP for one image."""

    def count(work: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        return round(float(counter.get_total_flops()) / 1e9, 2)

    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 0.5
    energy, flow = ResEnergy(3, width=128, image_size=32), flowpp(image_shape=(3, 32, 32))
    # Data and sample, each with gradients to weights and activations.
    assert 2 * count(lambda: energy(x).sum().backward()) == pytest.approx(27.2, abs=0.1)
    assert count(lambda: flow.log_prob(x, key=Key(0)).sum().backward()) == pytest.approx(
        78.0, abs=0.1
    )
    energy.requires_grad_(False)
    leaf = x.requires_grad_()
    assert count(lambda: energy(leaf).sum().backward()) == pytest.approx(9.08, abs=0.01)
    flow.eval()
    with torch.no_grad():
        assert count(lambda: flow.sample(1, Key(0))) == pytest.approx(16.4, abs=0.1)


def launch(
    *args: str, n: int, cwd: Path, restarts: int = 0, code: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """``code``: a folder with a sitecustomize.py for the processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}"]
    place = ["--standalone", f"--max-restarts={restarts}", "-m", "coopflow_ext"]
    root = str(Path(__file__).parents[1])
    folders = root if code is None else f"{code}:{root}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": folders}
    if restarts:  # as docs/scaling.md says
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    command = [*torchrun, *place, *args]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=120, check=False
    )


def train_arguments(out: Path, **settings: Any) -> list[str]:
    import json

    arguments = ["train", "--out", str(out), "--device", "cpu"]
    for name, value in {**SETTINGS, **settings}.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        arguments += ["--" + name.replace("_", "-"), text]
    return arguments


@pytest.mark.slow
def test_torchrun_then_resume_on_one_process(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = launch(*train_arguments(out, steps=2), n=2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("picture:") == 1  # rank 0 alone speaks
    run = RunFolder.open(out)
    assert [line["step"] for line in run.metrics()] == [0, 2, 2, 4, 4]
    resumed = ["train", "--out", str(out), "--device", "cpu", "--resume", "--steps", "4"]
    assert launch(*resumed, n=1, cwd=tmp_path).returncode == 0
    twin = tmp_path / "twin"
    assert launch(*train_arguments(twin), n=1, cwd=tmp_path).returncode == 0
    a, _ = load_checkpoint(run.latest_checkpoint())
    b, _ = load_checkpoint(RunFolder.open(twin).latest_checkpoint())
    for name in a:
        if name.startswith(("flow.", "energy.")):
            # Adam divides by the gradient's size, so rounding can become a step of the rate.
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=5e-3)


def let_rank_1_die(code: Path) -> None:
    """In its fourth step, the first time that it is started."""
    code.mkdir()
    (code / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    from coopflow_ext.coop import Trainer\n"
        "    step = Trainer.train_step\n"
        "    def train_step(self):\n"
        "        if self.step == 4:\n"
        "            os._exit(9)\n"
        "        return step(self)\n"
        "    Trainer.train_step = train_step\n"
    )


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_and_the_checkpoint_is_whole(tmp_path: Path) -> None:
    out, code = tmp_path / "run", tmp_path / "code"
    let_rank_1_die(code)
    result = launch(*train_arguments(out), n=2, cwd=tmp_path, code=code)
    assert result.returncode != 0
    assert re.search(
        r"rank 0: another of the 2 processes stopped, or did not answer in time; .* --resume",
        result.stderr,
    )
    run = RunFolder.open(out)
    assert load_checkpoint(run.latest_checkpoint())[1]["step"] == 3
    resumed = ["train", "--out", str(out), "--device", "cpu", "--resume"]
    assert launch(*resumed, n=2, cwd=tmp_path / "run").returncode == 0


@pytest.mark.slow
def test_a_job_that_torchrun_starts_again_goes_on(tmp_path: Path) -> None:
    out, code, twin = (tmp_path / name for name in ("run", "code", "twin"))
    let_rank_1_die(code)
    arguments = [*train_arguments(out), "--resume", "auto"]
    result = launch(*arguments, n=2, cwd=tmp_path, restarts=1, code=code)
    assert result.returncode == 0, result.stderr
    assert "another of the 2 processes stopped" in result.stderr
    assert launch(*train_arguments(twin), n=2, cwd=tmp_path).returncode == 0
    assert RunFolder.open(out).summary()["fd"] == RunFolder.open(twin).summary()["fd"]


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(
        ValueError, match="batch_size must be a multiple of the 3 processes, got 16"
    ):
        Trainer(TrainConfig.from_dict(SETTINGS), load("digits"), ranks=Ranks(0, 3))
    buffered = TrainConfig.from_dict({**SETTINGS, "start": "buffer"})
    with pytest.raises(ValueError, match="start must not be buffer with several processes"):
        Trainer(buffered, load("digits"), ranks=Ranks(0, 2))
