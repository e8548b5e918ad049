"""One process trains a run; others are told which, and readers need not ask."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from coop_runs import FORKS, snapshot, tiny

from coopflow_ext import cli, coop
from coopflow_ext.coop import RunError
from coopflow_ext.coop.lock import holding

# Only what the system knows of the lock.
TRY = """
import fcntl, sys
with open(sys.argv[1], "r+") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("locked")
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    coop.train(tiny(), path)
    return path


def hold(path: Path, ready: Any) -> None:
    with holding(path):
        ready.set()
        signal.pause()


@contextmanager
def held_elsewhere(path: Path) -> Iterator[Any]:
    """Another process holds the run."""
    ready = FORKS.Event()
    process = FORKS.Process(target=hold, args=(path, ready))
    process.start()
    assert ready.wait(60)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def is_locked(path: Path) -> bool:
    command = [sys.executable, "-c", TRY, str(path / ".lock")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout == "locked\n"


def test_a_second_process_is_told_who_trains_the_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new"
    with held_elsewhere(finished) as process, held_elsewhere(new) as other:
        before = snapshot(finished)
        assert cli.main(["train", "--out", str(finished), "--resume"]) == 1
        error = capsys.readouterr().err
        who = f"process {process.pid} on {socket.gethostname()} since 20"
        assert f"{finished} is being trained by {who}" in error
        assert error.count("\n") == 1
        # A fresh start finds out before it reads any data, and leaves nothing.
        assert cli.main(["train", "--out", str(new), "--data", "folder:/nowhere"]) == 1
        assert f"{new} is being trained by process {other.pid} on" in capsys.readouterr().err
        # Readers do not ask.
        picture = tmp_path / "samples.png"
        assert cli.main(["sample", str(finished), "-n", "4", "--out", str(picture)]) == 0
        assert coop.RunFolder.open(finished).metrics()
        assert snapshot(finished) == before
    with holding(finished):
        pass
    assert (finished / ".lock").read_text() == ""


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path) as process:
        with pytest.raises(RunError, match=f"process {process.pid} on"), holding(tmp_path):
            pass
        process.kill()
        process.join()
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == process.pid
        with holding(tmp_path):
            pass
        assert not (tmp_path / ".lock").exists()


def test_a_second_try_in_the_same_process_does_not_lose_the_lock(tmp_path: Path) -> None:
    """It would by closing any descriptor of the file."""
    with holding(tmp_path):
        failures = []

        def attempt() -> None:
            try:
                with holding(tmp_path / "." / "x" / ".."):
                    pass
            except RunError as error:
                failures.append(str(error))

        (tmp_path / "x").mkdir()
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
        assert len(failures) == 1
        assert "is being trained by this process already" in failures[0]
        assert is_locked(tmp_path)


def test_a_forked_child_holds_nothing_and_takes_nothing_away(tmp_path: Path) -> None:
    with holding(tmp_path):
        child = os.fork()
        if child == 0:  # only what ends this process without more of pytest
            code = 3
            try:
                with holding(tmp_path):
                    code = 2
            except RunError as error:
                code = 0 if f"by process {os.getppid()} on" in str(error) else 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert is_locked(tmp_path)


def test_a_start_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must be one of"):
        coop.train(tiny(data="mnist"), tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data must be one of"):
        coop.train(tiny(data="mnist"), tmp_path / "empty")
    assert [p.name for p in tmp_path.rglob("*")] == ["empty"]


def test_a_lock_file_that_its_holder_has_just_removed_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = fcntl.lockf, []

    def lockf(descriptor: int, how: int) -> Any:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        return real(descriptor, how)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with holding(tmp_path):
        assert len(calls) == 2
        assert is_locked(tmp_path)


def test_no_descriptor_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a lock, one whose file was removed meanwhile, a refusal and an error inside."""

    def is_open() -> list[str]:
        links = []
        for link in Path("/proc/self/fd").iterdir():
            with suppress(OSError):  # of the listing itself
                links.append(os.readlink(link))
        return [target for target in links if ".lock" in target]

    real, calls = fcntl.lockf, []

    def lockf(descriptor: int, how: int) -> Any:
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        if len(calls) == 3:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return real(descriptor, how)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with holding(tmp_path):
        assert len(is_open()) == 1
    with pytest.raises(RunError, match="is being trained by"), holding(tmp_path):
        pass
    with pytest.raises(ZeroDivisionError), holding(tmp_path):
        raise ZeroDivisionError
    assert len(calls) == 4
    assert is_open() == []


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lockf(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with (
        pytest.warns(UserWarning, match=r"file system without locks \(No locks available\)"),
        holding(tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())
