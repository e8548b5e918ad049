"""Data sets by the name that the command line knows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from coopflow_ext._checks import check_count, check_flag
from coopflow_ext.data.bundled import digits, patches
from coopflow_ext.data.dataset import Dataset
from coopflow_ext.data.folder import celeba, folder
from coopflow_ext.data.published import cifar10, svhn
from coopflow_ext.data.toy import DENSITIES, toy

_BUNDLED: dict[str, Callable[[], Dataset]] = {"digits": digits, "patches": patches}
_PUBLISHED: dict[str, Callable[[Path], Dataset]] = {"cifar10": cifar10, "svhn": svhn}

NAMES = (
    *_BUNDLED,
    *_PUBLISHED,
    "celeba",
    "folder:DIR",
    *(f"toy:{name}" for name in DENSITIES),
)
"""What :func:`load` takes; DIR stands for a folder of images."""

_KINDS = (*_BUNDLED, *_PUBLISHED, "celeba", "folder", "toy")


def load(
    name: str,
    root: str | Path | None = None,
    *,
    image_size: int | None = None,
    skip_bad: bool = False,
    max_pixels: int | None = None,
) -> Dataset:
    """The data set of that name.

    Args:
        name: one of ``NAMES``.
        root: where the published archives lie (cifar10, svhn, celeba).
        image_size: crop and scale the images of ``celeba`` (default 32) and ``folder:DIR``.
        skip_bad: leave out images that cannot be read, with a warning.
        max_pixels: of an image of ``celeba`` or ``folder:DIR`` (default 2²⁶); one with more cannot
            be read.

    Raises:
        ValueError: for an unknown name, a missing root, an argument that this data set does not
            take, or a damaged file.
        FileNotFoundError: the archive is not there; the message says where to get it.
        ImportError: a package is missing; the message says what to install.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    check_flag("skip_bad", skip_bad)
    for argument, value in {"image_size": image_size, "max_pixels": max_pixels}.items():
        if value is not None:
            check_count(argument, value, 1)
    with torch.device("cpu"):  # whatever torch's default device
        return _load(name, root, image_size, skip_bad, max_pixels)


def _load(
    name: str,
    root: str | Path | None,
    image_size: int | None,
    skip_bad: bool,
    max_pixels: int | None,
) -> Dataset:
    kind, _, rest = name.partition(":")
    _check_taken(kind, root, image_size, skip_bad, max_pixels)
    if name in _BUNDLED:
        return _BUNDLED[name]()
    if kind == "toy":
        return toy(rest)
    if kind == "folder" and rest:
        return folder(
            Path(rest).expanduser(), size=image_size, skip_bad=skip_bad, max_pixels=max_pixels
        )
    if name not in (*_PUBLISHED, "celeba"):
        raise ValueError(f"data must be one of {', '.join(NAMES)}, got {name!r}")
    if root is None:
        raise ValueError(f"{name} needs the folder where its archive lies: --data-dir DIR")
    if name == "celeba":
        return celeba(Path(root), size=image_size or 32, skip_bad=skip_bad, max_pixels=max_pixels)
    return _PUBLISHED[name](Path(root))


def _check_taken(
    kind: str,
    root: str | Path | None,
    image_size: int | None,
    skip_bad: bool,
    max_pixels: int | None,
) -> None:
    """ValueError for an argument that data of this kind would ignore."""
    images = ("celeba", "folder")
    for argument, value, takers in (
        ("data_dir", root, (*_PUBLISHED, "celeba")),
        ("image_size", image_size, images),
        ("skip_bad", skip_bad or None, images),
        ("max_pixels", max_pixels, images),
    ):
        if value is not None and kind in _KINDS and kind not in takers:
            raise ValueError(
                f"{argument} is for {', '.join(takers)}; {kind} takes none, got {value}"
            )
