"""Steps of a training as graphs, with a recording of operators in the place of CUDA's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorded_ops import RecordedOps

from coopflow_ext import graphed_calls
from coopflow_ext._recording import CaptureError
from coopflow_ext.coop import step_graphs
from coopflow_ext.coop.config import TrainConfig
from coopflow_ext.coop.step_graphs import StepGraphs
from coopflow_ext.coop.trainer import Trainer
from coopflow_ext.data import load
from coopflow_ext.errors import NonFiniteError
from coopflow_ext.flows import Flow

SETTINGS: dict[str, Any] = {
    "data": "digits",
    "batch_size": 6,
    "steps": 12,
    "flow": "realnvp",
    "flow_options": {"net": "mlp", "couplings": 2, "widths": [16], "dropout": 0.2},
    "energy": "mlp",
    "energy_options": {"widths": [16, 16]},
    "langevin_steps": 3,
    "step_size": 0.3,
    "pretrain_steps": 6,
    "warmup_steps": 5,
    "flow_ema": 0.9,
    "energy_ema": 0.9,
    "flow_grad_norm": 1.0,
    "energy_grad_norm": 1.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "pre-training, then both": {},
    "flow frozen, then every second step": {"flow_frozen_steps": 5, "flow_every": 2, "steps": 20},
    "accumulated": {"accumulate": 2, "warmup_by": "batches"},
    "persistent chains": {"start": "buffer", "buffer_size": 20, "pretrain_steps": 0},
    "from noise": {"start": "uniform", "pretrain_steps": 0},
    "updates left out": {"flow_skip_norm": 15.0, "energy_skip_norm": 0.22, "energy_skip_from": 4,
                         "steps": 20},
    "half precision": {"precision": "bfloat16", "flow_precision": "bfloat16"},
    "Flow++": {"flow": "flowpp", "flow_options": {"channels": 8, "blocks": 1, "components": 2,
               "dropout": 0.2}, "energy": "res", "energy_options": {"width": 4}, "steps": 8},
    "restart": {"flow_restart": True, "flow_weight_decay": 1e-3},
}  # fmt: skip


def trainer(monkeypatch: pytest.MonkeyPatch | None = None, **changes: Any) -> Trainer:
    made = Trainer(TrainConfig.from_dict({**SETTINGS, **changes}), load("digits"))
    if monkeypatch is not None:
        monkeypatch.setattr(step_graphs, "Recording", RecordedOps)
        keyed = [made] if made.model.buffer is None else [made, made.model.buffer]
        made._graphs = StepGraphs(made._take_step, keyed, made.device, required=True)
    return made


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_graphs_make_the_weights_of_steps(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rate, batch, frozen parts, keys: all that changes from step to step."""
    plain, graphed = trainer(**changes), trainer(monkeypatch, **changes)
    skipped = set()
    for _ in range(plain.config.total_steps):
        ours, expected = graphed.train_step(), plain.train_step()
        for name in expected:
            torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=0, equal_nan=True)
        skipped.add(bool(expected.get("energy_skipped", False)))
        assert graphed.key == plain.key
    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(graphed.tensors()[name], tensor, rtol=0, atol=0, msg=name)
    assert graphed._graphs is not None
    assert graphed._graphs._captured
    if "energy_skip_norm" in changes:
        assert skipped == {True, False}


def test_a_flow_has_no_graphs_of_its_own_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the steps before the capture it would, and its streams would be missing in the capture."""
    plain, graphed = trainer(pretrain_steps=0), trainer(monkeypatch, pretrain_steps=0)
    monkeypatch.setattr(graphed_calls, "Recording", RecordedOps)
    monkeypatch.setattr(Flow, "_can_capture", lambda self, n: not torch.is_grad_enabled())
    take_steps(8, plain, graphed)
    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(graphed.tensors()[name], tensor, rtol=0, atol=0, msg=name)


def test_a_stream_that_only_the_capture_draws_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(monkeypatch, pretrain_steps=0)
    propose = run.propose

    def propose_otherwise(n: int) -> torch.Tensor:
        if run.step == 3:
            run.key.fold_in(99).tensor(run.device)
        return propose(n)

    monkeypatch.setattr(run, "propose", propose_otherwise)
    take_steps(3, run)
    with pytest.raises(RuntimeError, match="was not drawn before the capture"):
        run.train_step()


def test_the_recording_of_these_tests_is_as_blind_as_a_graph() -> None:
    """It does not see a number of Python again, and changes nothing while it records."""
    x, rate = torch.zeros(3), [1.0]
    recording = RecordedOps(x.device)
    recording.add("add", lambda: x.add_(torch.ones(3) * rate[0]), warm_up=lambda: None)
    assert x.tolist() == [0, 0, 0]
    rate[0] = 2.0
    recording.replay("add")
    assert x.tolist() == [1, 1, 1]
    with pytest.raises(CaptureError, match="reads a value on the host"):
        recording.add("read", lambda: x.add_(x.sum().item()), warm_up=lambda: None)
    assert x.tolist() == [1, 1, 1]


def diverge(run: Trainer) -> None:
    """The next step's chains meet a gradient that is not finite, the later ones do not."""
    weight = next(run.model.energy.parameters())
    whole = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(3e38)
    run.train_step()
    with torch.no_grad():
        assert (weight == 3e38).all()
        weight.copy_(whole)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("start", ["flow", "buffer"])
def test_nothing_is_learned_after_a_chain_that_diverged(
    start: str, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"start": start, "pretrain_steps": 0, "steps": 20, "buffer_size": 20}
    run = trainer(monkeypatch if graphs else None, **settings)
    for _ in range(5):
        run.train_step()
    run.divergence.check()
    learned = {n: t.clone() for n, t in run.tensors().items() if not n.startswith("moments")}
    diverge(run)
    for _ in range(3):
        run.train_step()
    for name, tensor in learned.items():
        if name != "buffer.draws":
            torch.testing.assert_close(run.tensors()[name], tensor, rtol=0, atol=0, msg=name)
    with pytest.raises(NonFiniteError, match="in 6 of the 6 chains") as caught:
        run.divergence.check()
    assert caught.value.step == 5
    assert caught.value.chains is not None
    assert caught.value.chains.tolist() == list(range(6))


def take_steps(n: int, *runs: Trainer) -> None:
    for _ in range(n):
        for run in runs:
            run.train_step()


def reads_the_host(run: Trainer) -> None:
    run.model.energy.register_forward_hook(lambda module, args, u: u * float(u.sum() != 0.123))


def test_a_step_that_reads_the_host_runs_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, graphed = trainer(pretrain_steps=0), trainer(monkeypatch, pretrain_steps=0)
    graphed._graphs = StepGraphs(graphed._take_step, [graphed], graphed.device, required=False)
    for run in (plain, graphed):
        reads_the_host(run)
    with pytest.warns(UserWarning, match="cannot be captured.*reads a value on the host") as caught:
        take_steps(6, plain, graphed)
    assert len([w for w in caught if "captured" in str(w.message)]) == 1
    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(graphed.tensors()[name], tensor, rtol=0, atol=0, msg=name)


def test_a_step_that_must_be_captured_says_why_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(monkeypatch, pretrain_steps=0)
    reads_the_host(run)
    take_steps(3, run)
    with pytest.raises(RuntimeError, match=r"cuda_graph=True: a step .*reads a value on the host"):
        run.train_step()
    with pytest.raises(ValueError, match="cuda_graph=true needs one process on a CUDA device"):
        trainer(cuda_graph=True)


@pytest.mark.parametrize("allowed", [None, True, False])
def test_tf32_holds_within_a_step(allowed: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    run, seen = trainer(pretrain_steps=0, tf32=allowed), []
    run.model.energy.register_forward_hook(
        lambda *_: seen.append([flag.allow_tf32 for flag in flags])
    )
    run.train_step()
    assert seen
    assert all(inside == (before if allowed is None else [allowed] * 2) for inside in seen)
    assert [flag.allow_tf32 for flag in flags] == before


@pytest.mark.gpu
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_gpu_graphs_make_the_weights_of_steps(changes: dict[str, Any]) -> None:
    """To rounding: libraries may choose other kernels for a capture."""
    graphed, plain = (
        Trainer(TrainConfig.from_dict({**SETTINGS, **changes, "cuda_graph": how}), load("digits"),
                "cuda")
        for how in (True, False)
    )  # fmt: skip
    for _ in range(plain.config.total_steps):
        graphed.train_step()
        plain.train_step()
    graphed.divergence.check()
    assert graphed._graphs is not None
    assert graphed._graphs._captured
    for a, b in zip(graphed.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-3)
