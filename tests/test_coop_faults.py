"""Runs that are killed, fill the disk or lie on one that is read-only: nothing is lost or left."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import random
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from coop_runs import FORKS, assert_same_end, snapshot, tiny

from coopflow_ext import NonFiniteError, cli, coop
from coopflow_ext.coop import RunFolder, TrainConfig, pictures
from coopflow_ext.coop.checkpoint import load_checkpoint

PLACES = ("half", "written", "renamed")


def toy(**changes: Any) -> TrainConfig:
    """Points in the plane: no classifier to train before the first step."""
    vectors = {"flow_options": {"couplings": 2, "widths": [16]}, "step_clip": None}
    every = {"checkpoint_every": 2, "sample_every": 50}
    return tiny(data="toy:moons", **{**vectors, **every, **changes})


def draw_quickly(patch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time of so short a run. The files of the pictures stay."""
    drawn = b"\x89PNG" + bytes(1000)
    patch.setattr(pictures, "figure_bytes", lambda figure, dpi=100: drawn)
    patch.setattr(sys.modules["coopflow_ext.coop.train"], "report_plane", lambda *plane: {})


@pytest.fixture(scope="module", autouse=True)
def quick_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        draw_quickly(patch)
        yield


def die_at(place: str, name: str, count: int, signum: int) -> None:
    """This process gets a signal while it writes the ``count``-th file of such a name.

    ``place``: half of it is on the disk; all of it is, under a temporary name; it bears its name.
    """
    fsync, replace, left = os.fsync, Path.replace, [count]

    def is_due(path: str) -> bool:
        left[0] -= name in path
        return left[0] == 0 and name in path

    def half_or_whole(descriptor: int) -> None:
        if place != "renamed" and is_due(os.readlink(f"/proc/self/fd/{descriptor}")):
            if place == "half":
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signum)
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        result = replace(self, target)
        if place == "renamed" and is_due(str(target)):
            os.kill(os.getpid(), signum)
        return result

    os.fsync = half_or_whole
    Path.replace = renamed  # type: ignore[method-assign, assignment]


def train_in_child(
    config: TrainConfig, path: Path, resume: bool, death: tuple[str, str, int, int] | None
) -> None:
    torch.set_num_threads(1)
    draw_quickly(pytest.MonkeyPatch())
    if death is not None:
        die_at(*death)
    with contextlib.suppress(KeyboardInterrupt):
        coop.train(None if resume else config, path, resume=resume)


def child(
    config: TrainConfig,
    path: Path,
    *,
    resume: bool = False,
    death: tuple[str, str, int, int] | None = None,
) -> Any:
    process = FORKS.Process(target=train_in_child, args=(config, path, resume, death))
    process.start()
    return process


def check_no_half_file(path: Path) -> None:
    """Whatever happened, what stands under its name is whole."""
    run = RunFolder.open(path)
    for step, file in run.checkpoints():
        assert load_checkpoint(file)[1]["step"] == step
    run.metrics()


def check_nothing_left(path: Path) -> None:
    assert [p for p in path.rglob(".*") if p.name != ".lock"] == []
    assert (path / ".lock").read_bytes() == b""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    coop.train(toy(), path)
    return path


@pytest.mark.parametrize(
    ("place", "signum"),
    [
        pytest.param(
            place,
            signum,
            marks=() if i % 3 == j else pytest.mark.slow,
            id=f"{place}-{signum.name}",
        )
        for i, place in enumerate(PLACES)
        for j, signum in enumerate((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    ],
)
def test_a_kill_inside_a_checkpoints_write_loses_no_bit(
    whole: Path, tmp_path: Path, place: str, signum: int
) -> None:
    path = tmp_path / "run"
    process = child(toy(), path, death=(place, ".safetensors", 3, signum))
    process.join(60)
    # Others wait until the step is done and save; what they interrupt here is a save.
    kills = signum == signal.SIGKILL
    assert process.exitcode == (-signum if kills else 0)
    check_no_half_file(path)
    done = [step for step, _ in RunFolder.open(path).checkpoints()]
    assert done[-1] == (6 if place == "renamed" or not kills else 4)
    coop.train(None, path, resume=True)
    assert_same_end(path, whole)
    check_nothing_left(path)


@pytest.mark.parametrize("place", PLACES)
def test_a_kill_before_there_is_a_run_leaves_the_folder_free(
    whole: Path, tmp_path: Path, place: str
) -> None:
    path = tmp_path / "run"
    process = child(toy(), path, death=(place, "config.json", 1, signal.SIGKILL))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    is_run = place == "renamed"
    assert (path / "config.json").exists() == is_run
    coop.train(None if is_run else toy(), path, resume=is_run)
    assert_same_end(path, whole)
    check_nothing_left(path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills(tmp_path: Path) -> None:
    """Twenty of them inside a checkpoint's write, the others at any time, of a run without end."""
    config = toy(steps=10**6, log_every=20, checkpoint_every=10, sample_every=1000)
    twin, path = tmp_path / "twin", tmp_path / "run"
    generator, kinds = random.Random(0), []
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    while len(kinds) < 100:
        signum, inside = generator.choice(signals), len(kinds) % 5 == 0
        place = generator.choice(PLACES)
        death = (place, ".safetensors", generator.randint(1, 3), signum) if inside else None
        resume = (path / "config.json").exists()
        process = child(config, path, resume=resume, death=death)
        process.join(60 if inside else generator.uniform(0, 2))
        if process.is_alive():
            os.kill(process.pid, signum)
        process.join(60)
        assert process.exitcode is not None
        kinds.append(process.exitcode)
        if (path / "config.json").exists():
            check_no_half_file(path)
    assert kinds.count(-signal.SIGKILL) > 20
    assert kinds.count(0) > 40  # stopped by one of the others, and saved
    done = RunFolder.open(path).checkpoints()[-1][0]
    assert done > 100
    shorter = dataclasses.replace(config, steps=done)  # beside those of the pre-training
    coop.train(shorter, path, resume=True)
    coop.train(shorter, twin)
    assert_same_end(path, twin)
    check_nothing_left(path)


# --- the disk ------------------------------------------------------------------------------------


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that is full, writes beyond so many bytes of a file fail."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("n", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_a_full_disk_is_named_by_file_and_loses_no_bit(whole: Path, tmp_path: Path, n: int) -> None:
    """At each size another file is the first that does not fit."""
    path, seen = tmp_path / "run", []
    least, most = 500, max(p.stat().st_size for p in whole.rglob("*.safetensors")) - 100
    for i in range(n):
        size = least + i * (most - least) // (n - 1)
        resume = (path / "config.json").exists()
        with files_of_at_most(size), pytest.raises(OSError, match="File too large") as stopped:
            coop.train(None if resume else toy(), path, resume=resume)
        seen.append(Path(stopped.value.filename).name)
        if (path / "config.json").exists():
            check_no_half_file(path)
            check_nothing_left(path)
        else:
            assert not path.exists()
    assert seen[0] == "config.json"
    assert len(set(seen)) >= 3
    coop.train(None, path, resume=True)
    assert_same_end(path, whole)


@pytest.fixture
def read_only(whole: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tests may run as root, whom no permission stops: so an error where files are opened."""
    real_open, real_os_open = Path.open, os.open

    def refuse(path: object) -> None:
        if str(path).startswith(str(whole)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def path_open(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if set(mode) & set("wax+"):
            refuse(self)
        return real_open(self, mode, *args, **options)

    def os_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(path)
        return real_os_open(path, flags, *args, **options)

    monkeypatch.setattr(Path, "open", path_open)
    monkeypatch.setattr(os, "open", os_open)
    return whole


def test_a_read_only_run_is_read_and_not_trained(
    read_only: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(read_only)
    assert cli.main(["train", "--out", str(read_only), "--resume"]) == 1
    error = capsys.readouterr().err
    assert "Read-only file system" in error
    assert str(read_only) in error
    assert error.count("\n") == 1
    picture = tmp_path / "samples.png"
    assert cli.main(["sample", str(read_only), "-n", "4", "--out", str(picture)]) == 0
    assert cli.main(["report", str(read_only)]) == 1
    assert "Read-only file system" in capsys.readouterr().err
    assert snapshot(read_only) == before


@pytest.mark.parametrize("steps", [3, 0])
def test_a_flow_that_diverges_is_told_as_that(tmp_path: Path, steps: int) -> None:
    """Its samples are no images any more, which it refuses to learn."""
    config = tiny(pretrain_steps=0, flow_frozen_steps=0, warmup_steps=0, langevin_steps=steps,
                  flow_lr=1e30, steps=60, log_every=20, checkpoint_every=30)  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"training diverged by step .* --resume --lr X"):
        coop.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "divergence.json").exists()
