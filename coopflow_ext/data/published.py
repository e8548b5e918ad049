"""Readers of published archives, from a folder that the user names; nothing is downloaded."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coopflow_ext._optional import require
from coopflow_ext.data.dataset import Dataset, check_images

# MD5 of the published files, by name.
CHECKSUMS = {
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
    "list_eval_partition.txt": "d32c9cbf5e040fd4025c592c306e6668",
}
_CIFAR_RECORD = 1 + 3 * 32 * 32
_CIFAR_RECORDS = 10_000
_CIFAR_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
_CIFAR_TEST = "test_batch.bin"
_CIFAR_FOLDER = "cifar-10-batches-bin"
_CIFAR_SOURCE = (
    "get the binary version from https://www.cs.toronto.edu/~kriz/cifar.html "
    "(cifar-10-binary.tar.gz, 162 MB)"
)
_SVHN_SOURCE = (
    "get train_32x32.mat and test_32x32.mat (format 2) from http://ufldl.stanford.edu/housenumbers/"
)


def check_checksum(path: Path) -> None:
    """ValueError unless the file is the published one, for files whose MD5 is known."""
    expected = CHECKSUMS.get(path.name)
    if expected is None:
        return
    got = _md5(path)
    if got != expected:
        raise ValueError(
            f"{path} has MD5 {got}, but the published file has {expected}: "
            "it is truncated or another file; download it again"
        )


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cifar10(root: Path) -> Dataset:
    """CIFAR-10, binary version: 50,000 training and 10,000 test images (3, 32, 32) of 10 classes.

    ``root`` holds the archive cifar-10-binary.tar.gz as it was downloaded (its checksum is
    verified), or what was unpacked from it.

    Source: A. Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
    """
    archive = root / "cifar-10-binary.tar.gz"
    folders = [f for f in (root / _CIFAR_FOLDER, root) if (f / _CIFAR_TEST).exists()]
    if folders:
        parts = {
            name: _cifar_records((folders[0] / name).read_bytes(), folders[0] / name)
            for name in (*_CIFAR_TRAIN, _CIFAR_TEST)
            if _must_exist(folders[0] / name, _CIFAR_SOURCE)
        }
    elif archive.exists():
        check_checksum(archive)
        parts = dict(_cifar_members(archive))
    else:
        raise FileNotFoundError(
            f"no CIFAR-10 in {root}: {_CIFAR_SOURCE} and put the archive there, packed or unpacked"
        )
    train = [parts[name] for name in _CIFAR_TRAIN]
    return Dataset(
        "cifar10",
        torch.cat([images for images, _ in train]),
        parts[_CIFAR_TEST][0],
        256,
        train_labels=torch.cat([labels for _, labels in train]),
        held_out_labels=parts[_CIFAR_TEST][1],
        flip=True,
    )


def _cifar_members(archive: Path) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    with _readable(archive), tarfile.open(archive) as tar:
        for name in (*_CIFAR_TRAIN, _CIFAR_TEST):
            try:
                member = tar.extractfile(f"{_CIFAR_FOLDER}/{name}")
            except KeyError as error:
                raise ValueError(f"{archive} has no {_CIFAR_FOLDER}/{name}") from error
            assert member is not None
            yield name, _cifar_records(member.read(), archive / name)


def _cifar_records(content: bytes, path: Path) -> tuple[Tensor, Tensor]:
    """10,000 records of one label and 3 × 1,024 bytes (red, green, blue; row by row)."""
    if len(content) != _CIFAR_RECORDS * _CIFAR_RECORD:
        raise ValueError(
            f"{path} must hold {_CIFAR_RECORDS} records of {_CIFAR_RECORD} bytes, "
            f"got {len(content)} bytes: it is truncated or not the binary version"
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, _CIFAR_RECORD)
    labels = records[:, 0].long()
    if int(labels.max()) > 9:
        raise ValueError(f"{path} has a label {int(labels.max())}, but CIFAR-10 has 0…9")
    return check_images(records[:, 1:].reshape(-1, 3, 32, 32).clone(), 256), labels


def svhn(root: Path) -> Dataset:
    """Street View House Numbers, cropped: 73,257 training and 26,032 test images (3, 32, 32).

    ``root`` holds train_32x32.mat and test_32x32.mat as downloaded; checksums are verified.

    Source: Y. Netzer et al., *Reading Digits in Natural Images with Unsupervised Feature
    Learning*, 2011.
    """
    train, train_labels = _svhn_split(root / "train_32x32.mat")
    held_out, held_out_labels = _svhn_split(root / "test_32x32.mat")
    return Dataset(
        "svhn",
        train,
        held_out,
        256,
        train_labels=train_labels,
        held_out_labels=held_out_labels,
    )


def _svhn_split(path: Path) -> tuple[Tensor, Tensor]:
    _must_exist(path, _SVHN_SOURCE)
    check_checksum(path)
    scipy_io = require("scipy.io", extra="train", distribution="scipy")
    try:
        content = scipy_io.loadmat(path, variable_names=("X", "y"))
        images, labels = content["X"], content["y"]
    except Exception as error:  # scipy raises many kinds for a file that is cut off
        raise ValueError(f"{path} cannot be read as a MATLAB file: {error}") from error
    if images.ndim != 4 or images.shape[:3] != (32, 32, 3) or images.dtype != np.uint8:
        raise ValueError(f"{path} must hold X (32, 32, 3, N) uint8, got {images.shape}")
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1)))
    y = torch.from_numpy(labels.astype(np.int64)).flatten()
    if len(x) != len(y):
        raise ValueError(f"{path} holds {len(x)} images but {len(y)} labels")
    return check_images(x, 256), y % 10  # the file calls the digit 0 class 10


def _must_exist(path: Path, source: str) -> bool:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {source} and put it there")
    return True


@contextmanager
def _readable(archive: Path) -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{archive} cannot be read, it is damaged: {error}") from error
