"""Training variants, and the comparison of them."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from coopflow_ext import Key, NonFiniteError, cli
from coopflow_ext.coop import CoopFlow, RunError, TrainConfig, Trainer
from coopflow_ext.coop.study.ablate import Ablation, run_ablation, save_plot, table
from coopflow_ext.data import load

BASE: dict[str, Any] = {
    "preset": "digits-small",
    "flow_options": {"net": "mlp", "couplings": 2, "widths": [8]},
    "energy_options": {"widths": [8]},
    "batch_size": 16,
    "langevin_steps": 2,
    "pretrain_steps": 0,
    "flow_frozen_steps": 0,
    "flow_every": 1,
    "steps": 4,
    "n_samples": 20,
}
ROWS: dict[str, dict[str, Any]] = {
    "flow alone": {"steps": 0, "pretrain_steps": 4, "langevin_steps": 0},
    "energy alone": {"start": "uniform"},
    "CoopFlow(T=2)": {},
    "CoopFlow(Pre)": {"pretrain_steps": 2, "flow_frozen_steps": 2},
}


def write_plan(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({"seeds": [0, 1], "base": BASE, "rows": ROWS, **changes}))
    return path


def test_energy_alone_starts_from_noise_and_leaves_the_flow() -> None:
    config = TrainConfig.from_dict({**BASE, "start": "uniform", "warmup_steps": 0})
    trainer = Trainer(config, load("digits"))
    starts = trainer.model.propose(2000, Key(0))
    assert starts.min() > -1
    assert starts.max() < 1
    assert float(starts.mean()) == pytest.approx(0, abs=0.02)
    assert float(starts.std()) == pytest.approx(2 / 12**0.5, rel=0.02)
    assert torch.equal(trainer.model.propose(5, Key(0, chain=3)), starts[3:8])
    before = [p.detach().clone() for p in trainer.model.flow.parameters()]
    for _ in range(3):
        trainer.train_step()
    after = trainer.model.flow.parameters()
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    assert trainer.energy.updates == 3


def test_persistent_chains_go_on_where_they_were(tmp_path: Path) -> None:
    config = TrainConfig.from_dict(
        {**BASE, "start": "buffer", "buffer_size": 40, "buffer_reinit": 0.0}
    )
    data = load("digits")
    trainer = Trainer(config, data)
    assert trainer.model.buffer is not None
    before = trainer.model.buffer.states.clone()
    for _ in range(3):
        trainer.train_step()
    moved = (trainer.model.buffer.states != before).flatten(1).any(1)
    assert 16 <= int(moved.sum()) <= 40
    assert float((trainer.model.buffer.states - before).abs().max()) < 3 * 2 * (0.1 + 5 * 0.02)
    # Saved with the run: a second trainer that takes over does the same next step.
    twin = Trainer(config, data)
    saved = {name: tensor.clone() for name, tensor in trainer.tensors().items()}
    twin.load(saved, trainer.metadata())
    trainer.train_step()
    twin.train_step()
    assert torch.equal(trainer.model.buffer.states, twin.model.buffer.states)
    # Samples of the trained model start from the persistent chains.
    states = {bytes(x.numpy()) for x in trainer.model.buffer.states}
    assert {bytes(x.numpy()) for x in trainer.model.propose(10, Key(0))} <= states
    trainer.model.save(tmp_path / "model.safetensors")
    loaded = CoopFlow.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded.sample(4, Key(0)), trainer.model.sample(4, Key(0)))


def test_ablation_writes_table_and_plot_and_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = Ablation.read(write_plan(tmp_path / "plan.json")), tmp_path / "out"
    rows = run_ablation(plan, out)
    assert [row["name"] for row in rows] == list(ROWS)
    assert [row["flow_updates"] for row in rows] == [4, 0, 4, 4]
    assert [row["energy_updates"] for row in rows] == [0, 4, 4, 4]
    assert all(row["seeds"] == 2 for row in rows)
    assert rows[2]["flow"]["std"] > 0
    # Without a chain, what comes after it is the proposal.
    assert rows[0]["langevin"] == rows[0]["flow"]
    written = (out / "table.md").read_text()
    assert "| CoopFlow(Pre) | 2 |" in written
    assert json.loads((out / "table.json").read_text()) == rows
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((out / "runs" / "energy-alone-seed1" / "summary.json").read_text())
    assert summary["bits_per_dim"] is None  # of a flow that never learned
    assert summary["start_of_chains"] == "noise"
    model = CoopFlow.load(out / "runs" / "energy-alone-seed1")
    assert model.sample(3, Key(0)).shape == (3, 1, 8, 8)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr("coopflow_ext.coop.study.ablate.train", fail)
    assert run_ablation(plan, out) == rows


def test_other_settings_do_not_mix_with_the_runs_that_are_there(tmp_path: Path) -> None:
    one_row = {"CoopFlow(T=2)": {}}
    plan = Ablation.read(write_plan(tmp_path / "plan.json", seeds=[0], rows=one_row))
    run_ablation(plan, tmp_path / "out")
    other = {"CoopFlow(T=2)": {"noise": 0.1}}
    plan = Ablation.read(write_plan(tmp_path / "plan.json", seeds=[0], rows=other))
    with pytest.raises(RunError, match=r"made with noise=0.02; --resume cannot change it to 0.1"):
        run_ablation(plan, tmp_path / "out")


def test_other_rates_are_refused_and_more_steps_are_trained(tmp_path: Path) -> None:
    def plan(**settings: Any) -> Ablation:
        rows = {"CoopFlow(T=2)": settings}
        return Ablation.read(write_plan(tmp_path / "plan.json", seeds=[0], rows=rows))

    for steps in (4, 5):
        assert run_ablation(plan(steps=steps), tmp_path / "o")[0]["energy_updates"] == steps
    with pytest.raises(RunError, match=r"energy_lr=0.002; .* to 1e-05 \(only steps may change\)"):
        run_ablation(plan(steps=5, energy_lr=1e-5), tmp_path / "o")


def test_an_interrupted_extension_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the old summary, which is still there, is not taken for the result."""

    def plan(steps: int) -> Ablation:
        rows = {"CoopFlow(T=2)": {"steps": steps}}
        return Ablation.read(write_plan(tmp_path / "plan.json", seeds=[0], rows=rows))

    run_ablation(plan(4), tmp_path / "o")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_ablation(plan(6), tmp_path / "o")
    (run,) = (tmp_path / "o" / "runs").iterdir()
    assert json.loads((run / "config.json").read_text())["steps"] == 6
    assert (run / "summary.json").exists()
    assert run_ablation(plan(6), tmp_path / "o")[0]["energy_updates"] == 6


def interrupted(self: Trainer) -> None:
    raise KeyboardInterrupt


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"flow alone": ROWS["flow alone"]}
    path = write_plan(tmp_path / "plan.json", seeds=[0], rows=rows)
    assert cli.main(["ablate", "--configs", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "| flow alone | 0 | – | 4 | 0 |" in capsys.readouterr().out


def test_unequal_flow_updates_are_said_under_the_table() -> None:
    spread = {"mean": 2.0, "std": 0.5}
    same: dict[str, Any] = dict.fromkeys(("held_out", "flow", "langevin", "moment_gap"), spread)
    same |= {"feature_space": "f", "n": 20, "seeds": 3, "langevin_steps": 2, "step_size": 0.5}
    same |= {"energy_updates": 4, "starts_from_flow": True}
    rows = [{**same, "name": f"{n} updates", "flow_updates": n} for n in (2, 4)]
    rows.append({**same, "name": "no flow", "flow_updates": 0, "starts_from_flow": False})
    assert table(rows).endswith("differ in its updates: they are not equally trained.\n")
    assert "differ" not in table(rows[1:])


def test_a_row_that_cannot_be_built_is_found_before_any_training(tmp_path: Path) -> None:
    rows = {"good": {}, "bad": {"flow_options": {"net": "mlp", "depth": 3}}}
    plan = Ablation.read(write_plan(tmp_path / "plan.json", rows=rows))
    with pytest.raises(ValueError, match=r"row 'bad': flow_options do not fit realnvp.*depth"):
        run_ablation(plan, tmp_path / "out")
    rows = {"good": {}, "bad": {"cuda_graph": True}}
    plan = Ablation.read(write_plan(tmp_path / "plan.json", rows=rows))
    with pytest.raises(ValueError, match="row 'bad': cuda_graph=true needs a CUDA device, got cpu"):
        run_ablation(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"seeds": 3, "rows": {"a": {}}}', "seeds must be a list, base and rows objects"),
        ('{"seeds": [0], "rows": ["a"]}', "seeds must be a list, base and rows objects"),
        ('{"seeds": [0], "rows": {"a": null}}', "row 'a' must be an object, got None"),
        ('{"seeds": [0], "rows": {"a": {"preset": [1]}}}', r"preset must be one of .*got \[1\]"),
        ('{"seeds": [-1], "rows": {"a": {}}}', "row 'a': seed must be finite and ≥ 0, got -1"),
        ('{"seeds": ["x"], "rows": {"a": {}}}', "row 'a': seed must be int, got 'x'"),
        ('{"seeds": [0], "rows": {"a": {"steps": 1.5}}}', "row 'a': steps must be int, got 1.5"),
        ('{"seeds": [0], "rows": {"a b": {}, "a-b": {}}}', "must differ in the letters and digits"),
        (
            '{"seeds": [0], "rows": {"a": {"data": "digits"}, "b": {"data": "patches"}}}',
            "data must be the same in all rows",
        ),
        ("[1]", "must be JSON with seeds, rows and maybe base"),
        ("[" * 100_000, "must be JSON with .* nested more than 64 deep"),
        ('{"rows": {}}', "KeyError.*seeds"),
        ('{"seeds": [], "rows": {"a": {}}}', "at least one seed and one row"),
        ('{"seeds": [0, 0], "rows": {"a": {}}}', r"seeds must differ, got \[0, 0\]"),
        ('{"seeds": [0], "bas": {}, "rows": {"a": {}}}', "has 'bas'; known are seeds, base and"),
        ('{"seeds": [0], "rows": {"a": {"seed": 1}}}', "row 'a': seed must not be among"),
        ('{"seeds": [0], "rows": {"a": {"noise": -1}}}', "row 'a': noise must be finite"),
        ('{"seeds": [0], "rows": {"a": {"start": "x"}}}', "row 'a': start must be one of flow"),
    ],
)
def test_bad_plans(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Ablation.read(path)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, "row 'a', seed 0, was stopped and saved; the same command goes on"),
        (
            1e30,
            r"row 'a', seed 0, diverged by step .*: .* lower its rates in the file, delete .*a-",
        ),
    ],
)
def test_what_ends_a_row_says_how_the_ablation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float | None, message: str
) -> None:
    original = Trainer.train_step

    def asked(self: Trainer) -> dict[str, torch.Tensor]:
        signal.raise_signal(signal.SIGINT)
        return original(self)

    if error is None:
        monkeypatch.setattr(Trainer, "train_step", asked)
    settings = {} if error is None else {"flow_lr": error, "steps": 60}
    ablation = Ablation.read(write_plan(tmp_path / "plan.json", rows={"a": settings}))
    with pytest.raises((KeyboardInterrupt, NonFiniteError), match=message):
        run_ablation(ablation, tmp_path / "out")


def test_names_of_rows_are_no_markup(tmp_path: Path) -> None:
    row = {
        **dict.fromkeys(("langevin_steps", "step_size", "flow_updates", "energy_updates"), 1),
        **{name: {"mean": 1.0, "std": 0.1} for name in ("held_out", "flow", "langevin")},
        "seeds": 1,
        "moment_gap": None,
        "feature_space": "digits",
        "n": 20,
        "starts_from_flow": True,
        "name": r"a|b $\foo$",
    }
    assert r"| a\|b $\foo$ | 1 |" in table([row])
    save_plot(tmp_path / "plot.png", [row])
    assert (tmp_path / "plot.png").exists()
