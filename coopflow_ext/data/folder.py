"""Images in folders: CelebA as published, and any folder of the user's own."""

from __future__ import annotations

import errno
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coopflow_ext._optional import require
from coopflow_ext._tensors import room_for
from coopflow_ext.data.batches import permutation
from coopflow_ext.data.dataset import Dataset, check_images
from coopflow_ext.data.published import check_checksum
from coopflow_ext.rng import Key

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_SPLIT_KEY = Key(10)
_HELD_OUT_SHARE = 0.1
MAX_PIXELS = 2**26  # of a picture, unless asked for more
_DECODERS = min(8, os.cpu_count() or 1)
_MIN_SPLIT = 2  # a covariance, and so a Fréchet distance, needs two
_CELEBA_FOLDER = "img_align_celeba"
_CELEBA_PARTITION = "list_eval_partition.txt"
_CELEBA_CROP = 140
_CELEBA_SOURCE = (
    "get img_align_celeba.zip and list_eval_partition.txt from "
    "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html and unpack the images there"
)


class BadImageError(ValueError):
    """An image that cannot be read."""


def read_image(
    path: Path,
    *,
    size: int | None = None,
    crop: int | None = None,
    max_pixels: int | None = None,
) -> Tensor:
    """One image as (3, H, W) uint8, or (1, H, W) for a grey one.

    Args:
        path: the file.
        size: height and width of the result, after a centred square crop; None keeps the image.
        crop: side of that square; None takes the largest that fits.
        max_pixels: a file that says it has more is not decoded; None for 2²⁶.

    Raises:
        BadImageError: the file is damaged, no image, too large, or has more than 8 bits for a
            channel; the message names it.
    """
    limit = MAX_PIXELS if max_pixels is None else max_pixels
    image_module = require("PIL.Image", extra="train", distribution="pillow")
    upright = require("PIL.ImageOps", extra="train", distribution="pillow").exif_transpose
    try:
        with image_module.open(path) as image:
            if image.width * image.height > limit:
                raise _too_large(path, f"{image.width}×{image.height} pixels", limit)
            deep = _is_deep(image)
            image.load()
            pixels = upright(image).convert("L" if image.mode in ("L", "1", "LA") else "RGB")
    except BadImageError:
        raise
    except image_module.DecompressionBombError as error:  # by Pillow's own, higher limit
        raise _too_large(path, str(error), limit) from error
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise BadImageError(f"{path} cannot be read as an image: {error}") from error
    if deep:  # Pillow would cut the values off at 255
        raise BadImageError(
            f"{path} cannot be read as an image of 8 bits for a channel: it has more"
        )
    if size is not None:
        pixels = _crop_and_resize(pixels, size, crop, path)
    array = np.array(pixels, dtype=np.uint8)
    tensor = torch.from_numpy(array)
    return tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1).contiguous()


def _is_deep(image: Any) -> bool:
    """Whether a file that was opened has more than 8 bits for a channel. Of colours Pillow takes
    the upper eight without a word; what it was told to unpack says so."""
    if image.mode.startswith(("I", "F")):
        return True
    for decoder, *_, arguments in image.tile:
        given = arguments if isinstance(arguments, tuple) else (arguments,)
        if any(isinstance(a, str) and ";16" in a for a in given):
            return True
        if decoder.startswith("ppm") and isinstance(given[-1], int) and given[-1] > 255:
            return True
    return False


def _too_large(path: Path, found: str, limit: int) -> BadImageError:
    return BadImageError(
        f"{path} has more pixels than max_pixels={limit} allows: {found}; --max-pixels N sets it"
    )


def _crop_and_resize(image: Any, size: int, crop: int | None, path: Path) -> Any:
    resampling = require("PIL.Image", extra="train", distribution="pillow").Resampling
    side = min(image.size) if crop is None else crop
    if side > min(image.size):
        raise BadImageError(f"{path} is {image.size}, too small for a crop of {side}")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), resampling.BICUBIC)


def read_images(
    paths: Sequence[Path],
    *,
    size: int | None = None,
    crop: int | None = None,
    skip_bad: bool = False,
    max_pixels: int | None = None,
) -> tuple[Tensor, list[Path]]:
    """Images of one size as (N, C, H, W) uint8, and the paths they came from, in order.

    Grey images become colour images where both kinds occur. Beside the result there are only a few
    images in memory at a time, whatever the number of files.

    Raises:
        BadImageError: an image is damaged; with ``skip_bad`` it is left out with a warning.
        ValueError: sizes differ and ``size`` is None.
    """

    def read(path: Path) -> Tensor | BadImageError:
        try:
            return read_image(path, size=size, crop=crop, max_pixels=max_pixels)
        except BadImageError as error:
            return error

    kept: list[Path] = []
    images = torch.empty(0, dtype=torch.uint8)
    for path, result in zip(paths, _in_order(read, paths), strict=True):
        if isinstance(result, Tensor):
            if not kept:
                images = _room_for_images(len(paths), result.shape)
            elif result.shape[1:] != images.shape[2:]:
                raise ValueError(
                    f"images must have one size: {kept[0]} is {tuple(images.shape[2:])} and {path} "
                    f"is {tuple(result.shape[1:])}; --image-size N crops and scales all to N×N"
                )
            elif len(result) > images.shape[1]:  # the first in colour
                grey = images
                images = _room_for_images(len(paths), result.shape)
                images[: len(kept)] = grey[: len(kept)]
            images[len(kept)] = result
            kept.append(path)
        elif skip_bad:
            warnings.warn(f"left out: {result}", stacklevel=2)
        else:
            raise BadImageError(f"{result}; --skip-bad leaves such images out") from result
    if not kept:
        raise ValueError("there is no image that can be read")
    return images[: len(kept)], kept


def _in_order(
    read: Callable[[Path], Tensor | BadImageError], paths: Iterable[Path]
) -> Iterator[Tensor | BadImageError]:
    """``read`` of every path, by threads that are at most a few images ahead."""
    pending: deque[Future[Tensor | BadImageError]] = deque()
    with ThreadPoolExecutor(_DECODERS, thread_name_prefix="coopflow-images") as pool:
        for path in paths:
            pending.append(pool.submit(read, path))
            if len(pending) > 2 * _DECODERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _room_for_images(n: int, shape: Sequence[int]) -> Tensor:
    with room_for("a data set", (n, *shape), torch.uint8):
        return torch.empty((n, *shape), dtype=torch.uint8)


def folder(
    root: Path,
    *,
    size: int | None = None,
    skip_bad: bool = False,
    max_pixels: int | None = None,
) -> Dataset:
    """Every image below ``root``, in the order of their names; a tenth is held out, at random.

    Links are followed; files and folders whose names begin with a dot are left out.

    Args:
        root: the folder.
        size: crop and scale all images to size × size; None wants images of one size.
        skip_bad: leave out images that cannot be read instead of raising.
        max_pixels: of an image; one with more cannot be read. None for 2²⁶.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: a folder below cannot be read, or leads back to one above it.
        BadImageError: an image cannot be read, and not ``skip_bad``.
        ValueError: fewer than 4 images, two for each split, or images of several sizes.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root.absolute()} is not a folder")
    paths = sorted(_images_below(root))
    if not paths:
        raise ValueError(f"{root} holds no images ({', '.join(_SUFFIXES)})")
    images, _ = read_images(paths, size=size, skip_bad=skip_bad, max_pixels=max_pixels)
    if len(images) < 2 * _MIN_SPLIT:
        raise ValueError(
            f"{root} must hold at least {2 * _MIN_SPLIT} images, {_MIN_SPLIT} of them to hold out; "
            f"got {len(images)}"
        )
    order = permutation(len(images), _SPLIT_KEY)
    n_held_out = max(_MIN_SPLIT, round(_HELD_OUT_SHARE * len(images)))
    check_images(images, 256)
    return Dataset(
        f"folder:{root}",
        images[order[n_held_out:]],
        images[order[:n_held_out]],
        256,
        flip=True,
    )


def _images_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    here = os.path.realpath(folder)
    if here in above:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder))
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _images_below(path, (*above, here))
        elif path.suffix.lower() in _SUFFIXES:
            yield path


def celeba(
    root: Path, *, size: int = 32, skip_bad: bool = False, max_pixels: int | None = None
) -> Dataset:
    """CelebA, aligned: the centred 140×140 square of each 178×218 image, scaled to size × size.

    ``root`` holds the folder img_align_celeba and list_eval_partition.txt, whose checksum is
    verified; the published training and validation parts train, the test part is held out.

    Source: Z. Liu et al., *Deep Learning Face Attributes in the Wild*, ICCV 2015.
    """
    images_root, partition = root / _CELEBA_FOLDER, root / _CELEBA_PARTITION
    for path in (images_root, partition):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: {_CELEBA_SOURCE}")
    check_checksum(partition)
    splits: dict[bool, list[Path]] = {True: [], False: []}
    for number, line in enumerate(partition.read_text().splitlines(), 1):
        fields = line.split()
        if len(fields) != 2 or fields[1] not in ("0", "1", "2"):
            raise ValueError(f"{partition}:{number} must be 'NAME 0|1|2', got {line!r}")
        splits[fields[1] == "2"].append(images_root / fields[0])
    options: dict[str, Any] = {
        "size": size, "crop": _CELEBA_CROP, "skip_bad": skip_bad, "max_pixels": max_pixels
    }  # fmt: skip
    train, _ = read_images(splits[False], **options)
    held_out, _ = read_images(splits[True], **options)
    return Dataset("celeba", train, held_out, 256, flip=True)
