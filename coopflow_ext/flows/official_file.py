"""Reading a checkpoint file of the authors' code without executing anything in it."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

_SCALAR = np.float64(0).__reduce__()[0]
# Numbers that numpy computed (an FID). The function has another address in numpy 1 and 2. Of the
# classes of dtypes only those of numbers may be built, so no object comes in by this way.
_SCALAR_NAMES = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_NUMPY_NUMBERS: list[Any] = [
    *((_SCALAR, name) for name in _SCALAR_NAMES),
    (np.dtype, "numpy.dtype"),
    *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
]


def read_file(path: Path) -> object:
    """What ``torch.save`` wrote, if that is containers, tensors and numbers.

    Raises:
        ValueError: it holds anything else, which the message names, is damaged, or would take more
            memory than it has bytes.
        OSError: the file cannot be read.
    """
    check_claim(path, _unpacked_size(path))
    try:
        with torch.serialization.safe_globals(_NUMPY_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # Its text, of any type for a file that is no checkpoint, advises to load unsafely.
        found = ", ".join(f"{key} ({kind})" for key, kind in _what_is_refused(path))
        if found:
            raise ValueError(f"{path} holds more than tensors and numbers: {found}") from error
        raise ValueError(
            f"{path} holds more than tensors, or is damaged: "
            "torch.load refuses it with weights_only=True"
        ) from error


def check_claim(path: Path, n_bytes: int) -> None:
    """ValueError unless a file can hold what it claims to: nothing in it is compressed."""
    held = path.stat().st_size
    if n_bytes > held:
        raise ValueError(f"{path} asks for {n_bytes:,} bytes of memory, and has only {held:,}")


def _unpacked_size(path: Path) -> int:
    """Of all records in an archive; 0 for a file that is none, of which torch reads what it has."""
    try:
        with zipfile.ZipFile(path) as archive:
            return sum(record.file_size for record in archive.infolist())
    except Exception:  # damaged in whatever way: torch.load says so
        return 0


class _Placeholder:
    """Stands for whatever the file would have made: takes everything, does nothing."""

    kind = ""

    def __init__(self, *args: object) -> None: ...
    def __setstate__(self, state: object) -> None: ...
    def __setitem__(self, key: object, value: object) -> None: ...
    def append(self, item: object) -> None: ...
    def extend(self, items: object) -> None: ...


class _Inert(pickle.Unpickler):
    """Finds no class and no function of the file, so nothing of it is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        kind = f"{module}.{name}"
        harmless = module in ("torch", "torch._utils", "torch.storage", "_codecs")
        harmless |= kind in (*_SCALAR_NAMES, "numpy.dtype")
        return type(name, (_Placeholder,), {"kind": "" if harmless else kind})

    def persistent_load(self, pid: Any) -> Any:
        # A tensor's storage; in files of before torch 1.6 also a module's class, with its source.
        return pid[1] if pid[0] == "module" else _Placeholder()


def _what_is_refused(path: Path) -> list[tuple[str, str]]:
    """Keys of a file's contents and the types there that are neither tensors nor numbers."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
                with archive.open(name) as file:
                    return list(_foreign(_Inert(file).load()))
        with path.open("rb") as file:  # before torch 1.6: three pickles about the file come first
            *_, content = (_Inert(file).load() for _ in range(4))
            return list(_foreign(content))
    except Exception:  # damaged in whatever way, or made so that even this stumbles over it
        return []


def _foreign(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    kind = value if isinstance(value, type) else type(value)
    if issubclass(kind, _Placeholder) and kind.kind:
        yield key or "the file itself", kind.kind
    parts: Any = ()
    if isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    for name, part in parts:
        yield from _foreign(part, f"{key}.{name}" if key else str(name))
