"""One process trains a run: a lock on a file in its folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from coopflow_ext.coop.files import parse_json
from coopflow_ext.errors import RunError

LOCK_NAME = ".lock"
_REFUSED = (errno.EACCES, errno.EAGAIN)
_IMPOSSIBLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

# Which lock files this process holds, by device and inode, and its number: a child made by fork
# holds none of them. Such a lock belongs to the process, not to a descriptor: it is lost as soon as
# any descriptor of the file is closed, so no file may be opened that stands here.
_held: dict[tuple[int, int], int] = {}
_guard = threading.Lock()


@contextmanager
def holding(run: Path) -> Iterator[None]:
    """Inside, no other process and no other thread trains the run in this folder.

    The folder is made if there is none, and is gone again afterwards unless it has become a run.

    Raises:
        RunError: somebody else holds it; the message says who, where and since when.
        OSError: the folder or the file in it cannot be made.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    owner = os.getpid()
    try:
        descriptor = _acquire(run)
        try:
            yield
        finally:
            if os.getpid() == owner:
                _release(run, descriptor)
    finally:
        if os.getpid() == owner:
            for folder in made:
                with suppress(OSError):  # something is in it
                    folder.rmdir()


def _acquire(run: Path) -> int:
    """A descriptor of the locked file; while it is open the lock is ours."""
    path = run / LOCK_NAME
    with _guard:
        while True:
            if path.exists() and _held.get(_identity(os.stat(path))) == os.getpid():
                raise RunError(f"{run} is being trained by this process already")
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _lock(run, descriptor)
                identity = _identity(os.fstat(descriptor))
                if path.exists() and _identity(os.stat(path)) == identity:
                    _say_who(descriptor)
                    _held[identity] = os.getpid()
                    return descriptor
            except BaseException as error:
                os.close(descriptor)
                if isinstance(error, OSError):  # which does not say of which file it speaks
                    raise OSError(error.errno, error.strerror, str(path)) from error
                raise
            os.close(descriptor)  # whoever held it before has removed it


def _lock(run: Path, descriptor: int) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _REFUSED:
            raise RunError(
                f"{run} is being trained by {_who(descriptor)}; choose another --out, or wait "
                "until that has ended"
            ) from error
        if error.errno not in _IMPOSSIBLE:
            raise
        warnings.warn(
            f"{run} is on a file system without locks ({error.strerror}): nothing keeps a second "
            "process from training it at the same time",
            stacklevel=2,
        )


def _release(run: Path, descriptor: int) -> None:
    with _guard:
        if (run / "config.json").exists():
            os.ftruncate(descriptor, 0)
        else:
            (run / LOCK_NAME).unlink(missing_ok=True)
        del _held[_identity(os.fstat(descriptor))]
        os.close(descriptor)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _say_who(descriptor: int) -> None:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(facts) + "\n").encode(), 0)


def _who(descriptor: int) -> str:
    try:
        facts = parse_json(os.pread(descriptor, 4096, 0))
        return f"process {facts['pid']} on {facts['host']} since {facts['since']}"
    except (ValueError, TypeError, KeyError):  # it has the lock, and is about to write its name
        return "another process"
