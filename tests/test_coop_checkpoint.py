"""A checkpoint is whole and fits, or it is refused by name before anything changes."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from coop_runs import tiny
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import coopflow_ext as cf
from coopflow_ext import coop
from coopflow_ext.coop import RunError, RunFolder, Trainer, checkpoint
from coopflow_ext.coop.checkpoint import load_checkpoint, save_checkpoint
from coopflow_ext.data import Dataset, load

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture(scope="module")
def saved(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a training in which both models have learned."""
    trainer = Trainer(tiny(), digits)
    for _ in range(7):
        trainer.train_step()
    path = tmp_path_factory.mktemp("checkpoint") / "step-0000007.safetensors"
    save_checkpoint(path, trainer.tensors(), trainer.metadata())
    return path


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        found: dict[str, str] = file.metadata()
    return found


# --- the file ------------------------------------------------------------------------------------


def test_what_was_saved_is_loaded(saved: Path, digits: Dataset) -> None:
    trainer = Trainer(tiny(), digits)
    trainer.load(*load_checkpoint(saved))
    again, _ = load_checkpoint(saved)
    assert trainer.tensors().keys() == again.keys()
    assert all(torch.equal(t, again[name]) for name, t in trainer.tensors().items())
    assert header(saved).keys() == {"coopflow", "coopflow_sha256"}


def refused(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        load_checkpoint(path)
    except RunError as error:
        return str(path) in str(error)
    return False


def test_a_file_that_is_cut_anywhere_is_refused(saved: Path, tmp_path: Path) -> None:
    whole, path = saved.read_bytes(), tmp_path / "cut.safetensors"
    cuts = [*range(0, len(whole), 1024), len(whole) - 1]
    assert len(cuts) > 50
    assert [n for n in cuts if not refused(path, whole[:n])] == []
    assert refused(path, whole + b"\0")


@pytest.mark.parametrize("flips", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_bit_that_is_flipped_anywhere_is_seen(saved: Path, tmp_path: Path, flips: int) -> None:
    """A third of the places in the header, which is short, and the rest in the numbers."""
    whole, path = saved.read_bytes(), tmp_path / "flipped.safetensors"
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    generator = random.Random(flips)
    bits = [generator.randrange(8 * start) for _ in range(flips // 3)]
    bits += [generator.randrange(8 * start, 8 * len(whole)) for _ in range(flips - len(bits))]

    def flipped(bit: int) -> bytes:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        return bytes(content)

    assert [bit for bit in bits if not refused(path, flipped(bit))] == []


def test_other_dtypes_and_shapes_of_the_same_bytes_are_seen(saved: Path, tmp_path: Path) -> None:
    tensors, _ = load_checkpoint(saved)
    name = "energy.layers.0.weight"
    for other in (tensors[name].view(torch.int32), tensors[name].reshape(-1)):
        save_file({**tensors, name: other}, tmp_path / "c.safetensors", metadata=header(saved))
        with pytest.raises(RunError, match="its content does not have its coopflow_sha256"):
            load_checkpoint(tmp_path / "c.safetensors")


def test_tensors_of_any_layout_are_saved_and_loaded(tmp_path: Path) -> None:
    config = tiny(flow="glow", flow_options={"scales": 1, "steps": 1, "channels": 4, "blocks": 1},
                  energy="res", energy_options={"width": 4})  # fmt: skip
    model = coop.CoopFlow.from_config(config, coop.model.EventSpec((1, 8, 8), 17))
    model.to(memory_format=torch.channels_last)
    assert not all(t.is_contiguous() for t in model.state_dict().values())
    model.save(tmp_path / "model.safetensors")
    again = coop.CoopFlow.load(tmp_path / "model.safetensors").state_dict()
    assert all(torch.equal(again[name], t) for name, t in model.state_dict().items())


def rewrite(source: Path, path: Path, metadata: dict[str, str] | None) -> Path:
    """The same tensors beside other metadata."""
    save_file(load_checkpoint(source)[0], path, metadata=metadata)
    return path


def test_a_file_of_an_older_version_is_read_with_one_warning(saved: Path, tmp_path: Path) -> None:
    facts = header(saved)["coopflow"]
    old = rewrite(saved, tmp_path / "old.safetensors", {"coopflow": facts})
    with pytest.warns(UserWarning, match=r"old.safetensors has no coopflow_sha256") as seen:
        tensors, metadata = load_checkpoint(old)
    assert len(seen) == 1
    assert metadata == json.loads(facts)
    assert all(torch.equal(t, tensors[name]) for name, t in load_checkpoint(saved)[0].items())


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "is a safetensors file, but not a checkpoint of coopflow_ext"),
        ({"format": "pt"}, "is a safetensors file, but not a checkpoint of coopflow_ext"),
        ({"coopflow": "{}", "coopflow_sha257": "0"}, "unknown metadata 'coopflow_sha257'"),
        ({"coopflow": "{}", "coopflow_sha256": "0"}, "does not have its coopflow_sha256"),
        ({"coopflow": "{"}, "its metadata cannot be read"),
        ({"coopflow": "[" * 10_000}, "its metadata cannot be read"),
        ({"coopflow": "[" * 100 + "]" * 100}, "its metadata .* nested more than 64 deep"),
        ({"coopflow": "[1]"}, r"its metadata must be an object, got \[1\]"),
    ],
)
def test_wrong_metadata(
    saved: Path, tmp_path: Path, metadata: dict[str, str] | None, message: str
) -> None:
    path = rewrite(saved, tmp_path / "c.safetensors", metadata)
    with pytest.raises(RunError, match=rf"c\.safetensors .*{message}"):
        load_checkpoint(path)


def test_what_is_no_file_of_ours(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"none.safetensors does not exist"):
        load_checkpoint(tmp_path / "none.safetensors")
    with pytest.raises(RunError, match="is a folder, not a checkpoint"):
        load_checkpoint(tmp_path)


def test_nothing_that_is_not_finite_is_written(saved: Path, tmp_path: Path) -> None:
    tensors, facts = load_checkpoint(saved)
    tensors["energy.layers.0.weight"][0, 0] = torch.nan
    with pytest.raises(cf.NonFiniteError, match=r"^energy.layers.0.weight is not finite$"):
        save_checkpoint(tmp_path / "c.safetensors", tensors, facts)
    tensors["flow_updates"] = torch.tensor(torch.inf)
    with pytest.raises(cf.NonFiniteError, match=r"is not finite, nor are 1 other tensors of"):
        save_checkpoint(tmp_path / "c.safetensors", tensors, facts)
    assert not list(tmp_path.iterdir())


# --- what is in it -------------------------------------------------------------------------------


def grown(tensor: Tensor) -> Tensor:
    return torch.cat((tensor, tensor))


FLOW = "flow.transform.transforms.1.mean"
MOMENT = "energy_optimizer.0.exp_avg"
FAULTS: dict[str, tuple[str, Callable[[Tensor], Tensor | None], str]] = {
    "weight of another shape": (FLOW, grown, r"must have shape \(64,\), got \(128,\)"),
    "weight of another dtype": (FLOW, lambda t: t.double(), "must be torch.float32, got .*float64"),
    "weight that is not finite": (FLOW, lambda t: t / 0, "must be finite"),
    "weight missing": (FLOW, lambda t: None, "is missing"),
    "moment longer than its weight": (MOMENT, grown, "must have shape"),
    "moment shorter than its weight": (MOMENT, lambda t: t[:1], "must have shape"),
    "moment of another dtype": (MOMENT, lambda t: t.half(), "must be torch.float32, got .*float16"),
    "moment that is not finite": (MOMENT, lambda t: t * torch.nan, "must be finite"),
    "moment missing": (MOMENT, lambda t: None, "is missing"),
    "second moment below 0": ("flow_optimizer.3.exp_avg_sq", lambda t: t - 1, "must be ≥ 0"),
    "steps of a moment below 0": ("flow_optimizer.3.step", lambda t: -t, "must be ≥ 0, got -"),
    "steps of a moment as ints": ("flow_optimizer.3.step", lambda t: t.long(), "must be .*float32"),
    "average missing": ("flow_ema.transform.transforms.1.mean", lambda t: None, "is missing"),
    "average of another shape": ("energy_ema.layers.0.weight", grown, "must have shape"),
    "updates as a float": ("energy_updates", lambda t: t.float(), "must be torch.int64"),
    "updates below 0": ("energy_updates", lambda t: t - 99, "must be ≥ 0"),
    "updates missing": ("flow_updates", lambda t: None, "is missing"),
    "warm-up of another shape": ("flow_warmed", lambda t: t[None], r"must have shape \(\)"),
    "sums below 0": ("moments.count", lambda t: t - 1000, "must be ≥ 0"),
    "sums of other events": ("moments.outer", lambda t: t[:9, :9], r"must have shape \(64, 64\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_changes(
    saved: Path, digits: Dataset, fault: str
) -> None:
    name, change, message = FAULTS[fault]
    tensors, facts = load_checkpoint(saved)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    check_refused(Trainer(tiny(), digits), tensors, facts, rf"{name}.*{message}")


def check_refused(trainer: Trainer, tensors: Tensors, facts: dict[str, Any], message: str) -> None:
    before = {name: t.clone() for name, t in trainer.tensors().items()}
    with pytest.raises(RunError, match=message):
        trainer.load(tensors, facts)
    after = trainer.tensors()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert trainer.step == 0


@pytest.mark.parametrize("name", ["flow.x", "x", "flow_optimizer.999.exp_avg", "energy_ema.x"])
def test_a_tensor_that_belongs_to_nothing_is_refused(
    saved: Path, digits: Dataset, name: str
) -> None:
    tensors, facts = load_checkpoint(saved)
    tensors[name] = torch.ones(1)
    check_refused(Trainer(tiny(), digits), tensors, facts, rf"^{name} belongs to nothing")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("buffer.states", lambda t: t[:-1], r"must have shape \(40, 1, 8, 8\)"),
        ("buffer.states", lambda t: t * torch.inf, "must be finite"),
        ("buffer.draws", lambda t: t - 9, "must be ≥ 0"),
        ("buffer.draws", lambda t: t + 2**32, "must be < 4294967296"),
    ],
)
def test_persistent_chains_that_do_not_fit(
    digits: Dataset, name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    config = tiny(start="buffer", buffer_size=40, pretrain_steps=0)
    trainer = Trainer(config, digits)
    tensors = {n: t.clone() for n, t in trainer.tensors().items()}
    tensors[name] = change(tensors[name])
    check_refused(Trainer(config, digits), tensors, trainer.metadata(), rf"{name}.*{message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": None}, "its metadata has no 'step': it holds models, but no training"),
        ({"key": None}, "its metadata has no 'key'"),
        ({"step": -1}, "step must be ≥ 0, got -1"),
        ({"step": 1.5}, "step must be an int, got float"),
        ({"key": {"seed": -1, "time": 0}}, "seed must be in"),
        ({"key": {"seed": 0, "time": 2**32}}, "time must be in"),
        ({"key": [0, 1]}, "its metadata is wrong"),
        ({"seconds": float("nan")}, "seconds must be finite, got nan"),
    ],
)
def test_a_number_that_is_wrong_is_named(
    saved: Path, digits: Dataset, change: dict[str, Any], message: str
) -> None:
    tensors, facts = load_checkpoint(saved)
    facts = {k: v for k, v in {**facts, **change}.items() if v is not None}
    check_refused(Trainer(tiny(), digits), tensors, facts, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, "its metadata has no 'config'"),
        ({"config": "{"}, "Expecting property name"),
        ({"config": 3}, "must be str, bytes or bytearray, not int"),
        ({"event": None}, "its metadata has no 'event'"),
        ({"event": {"shape": [1, 8, -8], "levels": 17}}, "event.shape must be ≥ 1, got -8"),
        ({"event": {"shape": [1, 8, 8], "levels": 0.5}}, "event.levels must be an int"),
        ({"event": {"shape": [1, 8, 8], "levels": 1}}, "event.levels must be ≥ 2, got 1"),
        ({"event": {"shape": [1, 8, 9], "levels": 17}}, "must have shape"),
    ],
)
def test_a_model_is_not_made_of_wrong_facts(
    saved: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    tensors, facts = load_checkpoint(saved)
    facts = {k: v for k, v in {**facts, **change}.items() if v is not None}
    save_checkpoint(tmp_path / "c.safetensors", tensors, facts)
    with pytest.raises(RunError, match=rf"c\.safetensors cannot be used: .*{message}"):
        coop.CoopFlow.load(tmp_path / "c.safetensors")


def test_flags_and_masks_of_older_versions_are_translated(saved: Path, digits: Dataset) -> None:
    """Before the check, so that what comes of them is checked too."""
    tensors, facts = load_checkpoint(saved)
    old = dict(tensors)
    for name in tensors:
        if name.startswith("flow.") and name.endswith(".initialized"):
            old[name] = tensors[name] > 0
        if name.startswith("flow.") and name.endswith(".mask"):
            changed, kept = (old[name] > 0.5).nonzero()[:, 0], (old.pop(name) < 0.5).nonzero()[:, 0]
            parent = name.removesuffix("mask")
            old |= {f"{parent}changed": changed, f"{parent}kept": kept}
            old[f"{parent}order"] = torch.cat((changed, kept)).argsort()
    assert old.keys() != tensors.keys()
    trainer = Trainer(tiny(), digits)
    trainer.load(old, facts)
    assert all(torch.equal(t, tensors[name]) for name, t in trainer.tensors().items())
    order = next(name for name in old if name.endswith(".changed"))
    beyond = {**old, order: old[order] + 1000}
    check_refused(Trainer(tiny(), digits), beyond, facts, "tensors flow.… do not fit: IndexError")
    mask = next(name for name in tensors if name.endswith(".mask"))
    empty = {**tensors, mask: 0 * tensors[mask]}
    message = rf"tensors flow.… do not fit: .*{mask.removeprefix('flow.')} must be above 0.5 for"
    check_refused(Trainer(tiny(), digits), empty, facts, message)


# --- of a run ------------------------------------------------------------------------------------


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> RunFolder:
    """Three checkpoints, which hold the same but for their step."""
    folder = RunFolder.create(tmp_path / "run", tiny(keep_checkpoints=3))
    tensors, facts = load_checkpoint(saved)
    facts["config"] = folder.config.to_json()
    for step in (5, 6, 7):
        folder.save(step, tensors, {**facts, "step": step})
    return folder


def test_the_last_good_checkpoint_is_named(run: RunFolder) -> None:
    (_, good), (_, older), (_, latest) = run.checkpoints()
    for path in (older, latest):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    expected = rf"{latest.name} is damaged: .*the last good checkpoint is {good.name}: delete"
    for read in (run.load_latest, lambda: coop.CoopFlow.load(run.path)):
        with pytest.raises(RunError, match=expected):
            read()
    good.unlink()
    with pytest.raises(RunError, match="there is no good one before it"):
        run.load_latest()


def test_of_several_good_checkpoints_the_newest_is_named(run: RunFolder) -> None:
    _, (_, older), (_, latest) = run.checkpoints()
    latest.write_bytes(latest.read_bytes()[:-9])
    with pytest.raises(RunError, match=f"the last good checkpoint is {older.name}: delete"):
        run.load_latest()


def test_a_checkpoint_under_the_name_of_another_is_refused(run: RunFolder) -> None:
    _, (_, older), (_, latest) = run.checkpoints()
    older.replace(latest)
    with pytest.raises(RunError, match=rf"{latest.name} is of another step than its name says: 6"):
        run.load_latest()


def test_a_reader_finds_the_next_one_where_a_training_has_removed_the_last(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (_, older), (_, latest) = run.checkpoints()
    latest.unlink()
    tensors, facts = load_checkpoint(older)
    asked = []

    def late(path: Path) -> checkpoint.Loaded:
        asked.append(path)
        if len(asked) == 1:
            save_checkpoint(latest, tensors, {**facts, "step": 7})
            path.unlink()
        return load_checkpoint(path)

    monkeypatch.setattr(checkpoint, "load_checkpoint", late)
    assert run.load_latest()[1]["step"] == 7
    assert asked == [older, latest]


def test_a_run_of_models_alone_says_that_there_is_no_training(run: RunFolder) -> None:
    for _, path in run.checkpoints():
        path.unlink()
    model = coop.CoopFlow.from_config(run.config, coop.model.EventSpec((1, 8, 8), 17))
    run.save(0, model.state_dict(), model.metadata())
    with pytest.raises(RunError, match=r"step-0000000.safetensors cannot be used: .*no training"):
        coop.train(None, run.path, resume=True)


def test_a_link_to_nowhere_is_no_checkpoint(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, asked = run.path / "checkpoints" / "step-0000009.safetensors", []
    link.symlink_to(run.path / "gone.safetensors")

    def counted(path: Path) -> checkpoint.Loaded:
        asked.append(path)
        assert len(asked) < 5
        return load_checkpoint(path)

    monkeypatch.setattr(checkpoint, "load_checkpoint", counted)
    with pytest.raises(
        RunError, match=rf"{link.name} does not exist; the last good .* step-0000007"
    ):
        run.load_latest()


def test_persistent_chains_move_and_go_on_with_their_key(digits: Dataset) -> None:
    config = tiny(start="buffer", buffer_size=40, pretrain_steps=0)
    trainer, again = Trainer(config, digits), Trainer(config, digits)
    buffer = trainer.model.buffer
    assert buffer is not None
    buffer.key = buffer.key.at_chain(3)
    trainer.train_step()
    again.model.buffer.key = again.model.buffer.key.at_chain(3)
    again.load({k: t.clone() for k, t in trainer.tensors().items()}, trainer.metadata())
    assert again.model.buffer.key == buffer.key
    assert torch.equal(again.model.buffer.draw(16).x, buffer.draw(16).x)
    model = coop.CoopFlow.from_config(config, coop.model.EventSpec((1, 8, 8), 17)).to("meta")
    assert model.buffer is not None
    assert model.buffer.states.is_meta


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_what_stops_the_reading_is_no_damage(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stopped(content: bytes) -> Tensors:
        raise error

    monkeypatch.setattr(checkpoint, "load", stopped)
    with pytest.raises(error):
        load_checkpoint(saved)


def test_a_file_that_may_not_be_read_is_no_damaged_one(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*step-0000007.safetensors'$"):
        run.load_latest()


def test_a_folder_whose_name_is_no_text(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"run\xff") / saved.name
    path.parent.mkdir()
    path.write_bytes(saved.read_bytes())
    again, facts = load_checkpoint(path)
    expected, same = load_checkpoint(saved)
    assert facts == same
    assert all(torch.equal(t, again[name]) for name, t in expected.items())
