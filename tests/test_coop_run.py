"""The files of a run beside its checkpoints: whole, or named where they are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from coop_runs import assert_same_end, snapshot, tiny

from coopflow_ext import cli, coop
from coopflow_ext.coop import RunError, RunFolder, TrainConfig
from coopflow_ext.coop import run as run_module
from coopflow_ext.coop.files import sweep, write_atomically


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    coop.train(tiny(), path)
    return path


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The same run, to do harm to."""
    path = tmp_path / "run"
    for name, content in snapshot(finished).items():
        to = path / Path(name).relative_to(finished)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(content)
    return path


def gone_process() -> int:
    """The number of a process that has ended."""
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    return int(done.stdout)


# --- config.json ---------------------------------------------------------------------------------


def test_a_flipped_bit_of_the_settings_is_seen_unless_it_changes_nothing(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", tiny())
    file = run.path / "config.json"
    whole = file.read_bytes()
    loaded = []
    for bit in range(0, 8 * len(whole), 29):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        try:
            loaded.append(TrainConfig.of_run(run.path))
        except RunError as error:
            loaded.append(run.config if str(file) in str(error) else None)
    assert loaded == [run.config] * len(loaded)


def test_settings_may_be_laid_out_anew_but_not_edited(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", tiny())
    file = run.path / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(dict(sorted(values.items()))))
    assert TrainConfig.of_run(run.path) == run.config
    file.write_text(json.dumps({**values, "noise": 0.5}))
    with pytest.raises(RunError, match=r"config.json cannot be used: .*it is damaged, or was edit"):
        TrainConfig.of_run(run.path)
    del values["coopflow_sha256"]
    file.write_text(json.dumps({**values, "noise": 0.5}))
    with pytest.warns(UserWarning, match=r"config.json has no coopflow_sha256, as files of older"):
        assert TrainConfig.of_run(run.path).noise == 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b'{"format": 1, "data": "\xff"}', "'utf-8' codec can't decode"),
        (b"[" * 100_000, "nested more than 64 deep"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested more than 64 deep"),
        (b"[]", "not of format 1"),
        (b'{"format": 1, "stepz": 3}', "unknown setting 'stepz'"),
        (b'{"format": 1, "steps": "3"}', "steps must be int"),
        (b'{"format": 1, "history": 3}', "history must be a list of changes"),
        (b'{"format": 1, "history": [{"step": 3}]}', "history must be a list of changes"),
    ],
)
def test_what_is_no_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert cli.main(["train", "--out", str(tmp_path), "--resume"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"coopflow: {tmp_path / 'config.json'} cannot be used: ")
    assert message in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


# --- metrics, summary, pictures ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"seconds": 1.0}', "KeyError: 'step'"),
        (b'{"step": "1"}', "step must be an int, got '1'"),
        (b'{"step": true}', "step must be an int, got True"),
        (b"[1]", "TypeError"),
        (b"\xff", "UnicodeDecodeError"),
        (b"[" * 100_000, "nested more than 64 deep"),
    ],
)
def test_a_damaged_line_of_the_metrics_is_named(copied: Path, line: bytes, message: str) -> None:
    file = copied / "metrics.jsonl"
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]) + b"\n")
    before = snapshot(copied)
    with pytest.raises(RunError, match=rf"metrics.jsonl, line 3, must be .*{message}"):
        coop.train(None, copied, resume=True)
    assert snapshot(copied) == before


def test_only_a_last_line_may_be_cut_off(copied: Path) -> None:
    file = copied / "metrics.jsonl"
    whole = RunFolder.open(copied).metrics()
    file.write_bytes(file.read_bytes()[:-9])
    assert RunFolder.open(copied).metrics() == whole[:-1]


def test_a_damaged_summary_is_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"\xff", b"[" * 9999, b"3"):
        (copied / "summary.json").write_bytes(content)
        with pytest.raises(RunError, match=rf"^{copied / 'summary.json'} is damaged: it "):
            RunFolder.open(copied).summary()
    assert cli.main(["report", str(copied)]) == 1
    assert f"coopflow: {copied / 'summary.json'} is damaged" in capsys.readouterr().err


def test_folders_that_are_missing_are_made_anew(finished: Path, copied: Path) -> None:
    for picture in (copied / "samples").iterdir():
        picture.unlink()
    (copied / "samples").rmdir()
    (_, path) = RunFolder.open(copied).checkpoints()[-1]
    path.unlink()
    coop.train(None, copied, resume=True)
    assert_same_end(copied, finished)
    assert [p.name for p in (copied / "samples").iterdir()] == ["step-0000010.png"]


# --- what a killed process leaves ----------------------------------------------------------------


def test_what_killed_processes_were_writing_is_swept(copied: Path) -> None:
    dead, living = gone_process(), os.getppid()
    left = [copied / f".config.json.{dead}.tmp", copied / "samples" / f".a.png.{dead}.tmp"]
    left.append(copied / "checkpoints" / f".step-0000012.safetensors.{dead}.tmp")
    kept = [copied / f".report.html.{living}.tmp", copied / ".notes.tmp"]
    for path in (*left, *kept):
        path.write_text("half")
    coop.train(None, copied, resume=True)
    assert [p for p in left if p.exists()] == []
    assert [p for p in kept if not p.exists()] == []
    sweep(copied / "nowhere")


def test_a_dead_process_may_have_had_this_ones_number(tmp_path: Path) -> None:
    """In containers all of them are number 1."""
    left = tmp_path / f".config.json.{os.getpid()}.tmp"
    left.write_text("half")
    sweep(tmp_path)
    assert not left.exists()


def test_a_damaged_run_does_not_take_over_other_settings(copied: Path) -> None:
    (copied / "metrics.jsonl").write_bytes(b"[1]\n")
    before = snapshot(copied)
    with pytest.raises(RunError, match=r"metrics.jsonl, line 1, must be"):
        coop.train(tiny(steps=9), copied, resume=True)
    assert snapshot(copied) == before


def test_a_folder_that_was_made_but_is_no_run_yet_is_free(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for part in ("samples", "checkpoints"):
        (path / part).mkdir(parents=True)
    (path / f".config.json.{gone_process()}.tmp").write_text("{")
    (path / ".lock").write_text("")
    assert coop.train(tiny(), path)["steps"] == 7
    assert not list(path.glob("*.tmp"))
    assert not list(path.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["notes.txt", "samples/mine.png", "checkpoints/x", "data/x"])
def test_a_folder_with_something_of_the_users_is_not(tmp_path: Path, name: str) -> None:
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(RunError, match="is not empty, and no run; choose another"):
        coop.train(tiny(), tmp_path / "run")
    assert list(snapshot(tmp_path)) == [str(file)]


def test_the_settings_are_written_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, content: bytes) -> None:
        assert [p.name for p in path.parent.iterdir() if p.name != ".lock"] == []
        write_atomically(path, content)
        raise KeyboardInterrupt

    monkeypatch.setattr("coopflow_ext.coop.run.write_atomically", fail)
    with pytest.raises(KeyboardInterrupt):
        coop.train(tiny(), tmp_path / "run")
    assert RunFolder.open(tmp_path / "run").config == tiny()


# --- lines and pictures --------------------------------------------------------------------------


def test_lost_last_lines_are_measured_again(finished: Path, copied: Path) -> None:
    run, lines = RunFolder.open(copied), RunFolder.open(finished).metrics()
    kept = [line for line in lines if line["step"] < 10]
    for number, left in enumerate((kept, lines)):
        run.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in left))
        summary = coop.train(None, copied, resume=True)
        expected = RunFolder.open(finished).summary()
        assert summary["fd"] == expected["fd"]
        assert summary["moment_gap_start"] == expected["moment_gap_start"]
        # Of the samples of a training, which are gone.
        assert summary["moment_gap"] == (None if number == 0 else expected["moment_gap"])


@pytest.mark.parametrize("lost", [b"", None])
def test_what_began_with_lost_lines_is_left_out(
    finished: Path, copied: Path, lost: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = RunFolder.open(copied).metrics_path
    metrics.unlink() if lost is None else metrics.write_bytes(lost)
    with pytest.warns(UserWarning, match=r"metrics.jsonl has lost the lines of the beginning"):
        assert cli.main(["train", "--out", str(copied), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "after Langevin" in printed
    assert "at step 0" not in printed
    summary, expected = RunFolder.open(copied).summary(), RunFolder.open(finished).summary()
    assert summary["fd"] == {**expected["fd"], "flow_start": None}
    assert summary["moment_gap_start"] is None
    assert cli.main(["report", str(copied)]) == 0


def test_pictures_of_dropped_steps_go_with_their_lines(copied: Path) -> None:
    run = RunFolder.open(copied)
    later, other = run.picture_path(11), copied / "samples" / "mine.png"
    for path in (later, other):
        path.write_bytes(run.picture_path(10).read_bytes())
    coop.train(tiny(steps=9), copied, resume=True)
    assert [step for step, _ in run.pictures()] == [0, 3, 5, 10, 12]
    assert other.exists()


def test_lines_are_on_the_disk_before_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, save = [], run_module.save_checkpoint
    monkeypatch.setattr(run_module, "sync", lambda path: done.append(path.name))
    monkeypatch.setattr(
        run_module, "save_checkpoint", lambda path, *a: [done.append(path.suffix), save(path, *a)]
    )
    coop.train(tiny(), tmp_path / "run")
    assert done == ["metrics.jsonl", ".safetensors"] * 3
