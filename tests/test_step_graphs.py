"""Steps of a training as graphs, with a recording of operators in the place of CUDA's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from recorded_ops import RecordedOps
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from coopflow_ext import graphed_calls
from coopflow_ext._recording import CaptureError
from coopflow_ext.autocast import float32_precision, tensor_float32
from coopflow_ext.coop import step_graphs
from coopflow_ext.coop.config import TrainConfig
from coopflow_ext.coop.step_graphs import StepGraphs
from coopflow_ext.coop.trainer import StepKind, Trainer
from coopflow_ext.data import load
from coopflow_ext.errors import NonFiniteError
from coopflow_ext.flows import ActNorm, Flow
from coopflow_ext.rng import Key

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
FLOWPP = {
    "channels": 8,
    "blocks": 1,
    "components": 2,
    "dequant_blocks": 1,
    "dequant_components": 2,
    "scales": [[0, 1], [1, 1]],
    "dropout": 0.2,
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
    "Flow++": {"flow": "flowpp", "flow_options": FLOWPP, "energy": "res",
               "energy_options": {"width": 4}, "steps": 8},
    "recompute": {"flow": "flowpp", "flow_options": {**FLOWPP, "recompute": True},
                  "pretrain_steps": 4, "steps": 4},
    "restart": {"flow_restart": True, "flow_weight_decay": 1e-3},
}  # fmt: skip


def trainer(monkeypatch: pytest.MonkeyPatch | None = None, **changes: Any) -> Trainer:
    made = Trainer(TrainConfig.from_dict({**SETTINGS, **changes}), load("digits"))
    if monkeypatch is not None:
        monkeypatch.setattr(step_graphs, "Recording", RecordedOps)
        keyed = [made] if made.model.buffer is None else [made, made.model.buffer]
        made._graphs = StepGraphs(
            made._take_step, keyed, made.device, required=True, depends_on=made._dependence
        )
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
    assert not graphed.model.flow._graphs._captured  # nor before the capture


def test_after_a_checkpoint_is_loaded_steps_are_captured_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The optimizers then have other tensors."""
    plain, graphed = trainer(pretrain_steps=0), trainer(monkeypatch, pretrain_steps=0)
    made: list[StepGraphs] = []

    def anew() -> StepGraphs:
        made.append(StepGraphs(graphed._take_step, [graphed], graphed.device, required=True))
        return made[-1]

    monkeypatch.setattr(graphed, "_step_graphs", anew)
    take_steps(5, plain, graphed)
    checkpoint, metadata = copy.deepcopy(plain.tensors()), plain.metadata()
    take_steps(3, plain, graphed)
    for each in (plain, graphed):
        each.load(copy.deepcopy(checkpoint), metadata)
    take_steps(6, plain, graphed)
    assert len(made) == 1
    assert made[0]._captured
    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(graphed.tensors()[name], tensor, rtol=0, atol=0, msg=name)


def rebind(run: Trainer) -> None:
    for p in run.model.parameters():
        p.data = p.data.clone()


def reload_adam(run: Trainer) -> None:
    run.energy.optimizer.load_state_dict(copy.deepcopy(run.energy.optimizer.state_dict()))


def reload_other_masks(run: Trainer) -> None:
    """And let go of the indices that were worked out before."""
    state = run.model.flow.state_dict()
    run.model.flow.load_state_dict(
        {k: v.flip(0) if k.endswith("split.mask") else v for k, v in state.items()}
    )
    run.model.flow.call_and_ladj(torch.zeros(2, 1, 8, 8, device=run.device), key=Key(1))


CHANGES: dict[str, Callable[[Trainer], object]] = {
    "frozen weights": lambda run: next(run.model.energy.parameters()).requires_grad_(False),
    "weights in other memory": rebind,
    "Adam's state in other memory": reload_adam,
    "Adam anew": lambda run: run.energy.restart(),
    "other masks": reload_other_masks,
    "a hook": lambda run: run.model.energy.register_forward_hook(lambda _, args, u: 1.5 * u),
    "a gradient clip": lambda run: setattr(run.energy, "grad_norm", 0.01),
    "averages": lambda run: setattr(run.energy, "ema", 0.5),
    "settings": lambda run: setattr(run, "config", replace(run.config, accumulate=2)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_a_step_depends_on_may_change(
    change: Callable[[Trainer], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, graphed = trainer(pretrain_steps=0), trainer(monkeypatch, pretrain_steps=0)
    take_steps(5, plain, graphed)
    assert graphed._graphs is not None
    assert graphed._graphs._captured
    for run in (plain, graphed):
        change(run)
    take_steps(5, plain, graphed)
    assert graphed._graphs._captured  # once more
    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(graphed.tensors()[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_gpu_what_a_step_depends_on_may_change(change: Callable[[Trainer], object]) -> None:
    """There freed memory is used again."""
    graphed, plain = (
        Trainer(TrainConfig.from_dict({**SETTINGS, "pretrain_steps": 0, "cuda_graph": how}),
                load("digits"), "cuda")
        for how in (True, False)
    )  # fmt: skip
    for _ in range(2):
        take_steps(5, plain, graphed)
        assert graphed._graphs is not None
        assert graphed._graphs._captured
        for run in (plain, graphed):
            change(run)
    for a, b in zip(graphed.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("times", [1, 3])
def test_steps_that_are_broken_off_prepare_no_capture(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have not made Adam's state, which would then be made in the capture, at each replay."""
    plain, graphed = trainer(pretrain_steps=0), trainer(monkeypatch, pretrain_steps=0)
    for run in (plain, graphed):
        with monkeypatch.context() as broken:
            broken.setattr(run.flow, "_step", Mock(side_effect=OSError("boom")))
            for _ in range(times):
                with pytest.raises(OSError, match="boom"):
                    run.train_step()
    take_steps(6, plain, graphed)
    assert graphed._graphs is not None
    assert graphed._graphs._captured
    for name, tensor in plain.tensors().items():
        torch.testing.assert_close(graphed.tensors()[name], tensor, rtol=0, atol=0, msg=name)


def test_after_a_checkpoint_is_loaded_a_divergence_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for run in (trainer(pretrain_steps=0), trainer(monkeypatch, pretrain_steps=0)):
        take_steps(5, run)
        checkpoint, metadata = copy.deepcopy(run.tensors()), run.metadata()
        with torch.no_grad():
            next(run.model.energy.parameters()).fill_(torch.nan)
        take_steps(1, run)
        with pytest.raises(NonFiniteError):
            run.divergence.check()
        run.load(checkpoint, metadata)
        take_steps(2, run)
        run.divergence.check()
        assert not torch.equal(run.tensors()["energy.layers.0.weight"],
                               checkpoint["energy.layers.0.weight"])  # fmt: skip


@pytest.mark.parametrize(
    "mode",
    [lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad, torch.inference_mode],
    ids=["autocast", "no_grad", "inference_mode"],
)
def test_a_step_does_not_depend_on_the_callers_modes(mode: Callable[[], Any]) -> None:
    usual, inside = trainer(pretrain_steps=0), trainer(pretrain_steps=0)
    take_steps(2, usual)
    with mode():
        take_steps(2, inside)
    for name, tensor in usual.tensors().items():
        assert torch.equal(inside.tensors()[name], tensor), name


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


def kinds_of(run: Trainer, monkeypatch: pytest.MonkeyPatch) -> dict[StepKind, torch.Tensor]:
    """Each kind of step of a training with a batch; no step is made."""
    kinds: dict[StepKind, torch.Tensor] = {}

    def note(kind: StepKind, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        kinds.setdefault(kind, batch)
        return {}

    monkeypatch.setattr(run._graphs, "run", note)
    take_steps(run.config.total_steps, run)
    return kinds


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_no_operator_of_a_step_needs_a_value(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recording above refuses a few operators that read the host. Fake tensors have no values,
    so that every operator fails on them that reads one or whose result's size depends on one."""
    run = trainer(monkeypatch, **changes)
    kinds = kinds_of(run, monkeypatch)
    two = bool(changes.keys() & {"flow_frozen_steps", "energy_skip_from"})  # of iterations
    assert len(kinds) == bool(run.config.pretrain_steps) + 1 + two
    for kind, batch in kinds.items():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            metrics = run._take_step(kind, mode.from_tensor(batch))
        assert all(isinstance(value, FakeTensor) for value in metrics.values())


@pytest.mark.parametrize(
    ("needs", "error"),
    [
        (lambda u: u * float(u.sum().detach()), DataDependentOutputException),
        (lambda u: u + u[u > 0].sum(), DynamicOutputShapeException),
    ],
)
def test_fake_tensors_find_what_needs_a_value(
    needs: Callable[[torch.Tensor], torch.Tensor],
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trainer(monkeypatch, pretrain_steps=0)
    [(kind, batch)] = kinds_of(run, monkeypatch).items()
    run.model.energy.register_forward_hook(lambda module, args, u: needs(u))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(error):
        run._take_step(kind, mode.from_tensor(batch))


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


RECOMPUTE = {"flow_options": {**SETTINGS["flow_options"], "recompute": True}}


def rebuild_wrongly(run: Trainer) -> None:
    """In the next step the flow adds so much that rounding leaves nothing of what was there."""
    shift = next(m.mean for m in run.model.flow.modules() if isinstance(m, ActNorm))
    whole = shift.detach().clone()
    with torch.no_grad():
        shift.fill_(1e9)
    run.train_step()
    with torch.no_grad():
        assert (shift == 1e9).all()
        shift.copy_(whole)


@pytest.mark.parametrize("pretrain_steps", [0, 20])
def test_nothing_is_learned_once_recompute_rebuilds_wrongly(
    pretrain_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(monkeypatch, **RECOMPUTE, pretrain_steps=pretrain_steps)
    take_steps(5, run)
    run.divergence.check()
    learned = {"flow": copy.deepcopy(run.flow.tensors())}
    rebuild_wrongly(run)
    learned["energy"] = copy.deepcopy(run.energy.tensors())  # its step came before
    take_steps(2, run)
    for name, tensors in learned.items():
        now = getattr(run, name).tensors()
        for key, tensor in tensors.items():
            torch.testing.assert_close(now[key], tensor, rtol=0, atol=0, msg=key)
    with pytest.raises(RuntimeError, match=r"in step 5, .* rebuilt by the inverse are off by"):
        run.divergence.check()


def test_without_graphs_recompute_raises_at_once() -> None:
    run = trainer(**RECOMPUTE, pretrain_steps=0)
    run.train_step()
    with pytest.raises(RuntimeError, match=r"^recompute: inputs rebuilt by the inverse are off by"):
        rebuild_wrongly(run)


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
    with pytest.raises(ValueError, match="cuda_graph=true needs a CUDA device, got cpu"):
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


def test_tensor_float32_beside_torchs_newer_settings() -> None:
    """torch refuses to read a flag of which the caller has set the newer names."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = matmul.fp32_precision, conv.fp32_precision
    try:
        matmul.fp32_precision, conv.fp32_precision = "tf32", "ieee"
        for allowed, name in ((True, "tf32"), (False, "ieee"), (None, None)):
            with tensor_float32(allowed):
                expected = (name, name) if name else ("tf32", "ieee")
                assert (matmul.fp32_precision, conv.fp32_precision) == expected
                assert float32_precision()[1:] == expected
            assert (matmul.fp32_precision, conv.fp32_precision) == ("tf32", "ieee")
    finally:
        matmul.fp32_precision, conv.fp32_precision = before
