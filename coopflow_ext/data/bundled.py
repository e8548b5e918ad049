"""Real images that ship inside the package scikit-learn, so that nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coopflow_ext._optional import require
from coopflow_ext.data.batches import permutation
from coopflow_ext.data.dataset import Dataset, check_images
from coopflow_ext.rng import Key

DIGITS_LEVELS = 17
_DIGITS_HELD_OUT = 450
# The split is the same in every run, whatever its seed: distances stay comparable.
_SPLIT_KEY = Key(1797)

PATCH_SIZE = 32
_PATCH_STRIDE = 8
_PATCH_HELD_OUT_COLUMNS = 160


def _sklearn_datasets() -> Any:
    return require("sklearn.datasets", extra="train", distribution="scikit-learn")


def digits() -> Dataset:
    """scikit-learn's 1,797 scanned digits, (1, 8, 8) with 17 grey levels and classes 0…9.

    1,347 for training and 450 held out, drawn once for all runs.

    Source: E. Alpaydin, C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI, 1998.
    """
    bunch = _sklearn_datasets().load_digits()
    images = check_images(torch.from_numpy(bunch.images).to(torch.uint8)[:, None], DIGITS_LEVELS)
    labels = torch.from_numpy(bunch.target).long()
    order = permutation(len(images), _SPLIT_KEY)
    held_out, train = order[:_DIGITS_HELD_OUT], order[_DIGITS_HELD_OUT:]
    return Dataset(
        "digits",
        images[train],
        images[held_out],
        DIGITS_LEVELS,
        train_labels=labels[train],
        held_out_labels=labels[held_out],
    )


def _crops(photo: Tensor) -> Tensor:
    """(H, W, 3) → every crop at the stride, (N, 3, 32, 32)."""
    windows = photo.unfold(0, PATCH_SIZE, _PATCH_STRIDE).unfold(1, PATCH_SIZE, _PATCH_STRIDE)
    return windows.flatten(0, 1).contiguous()


def patches() -> Dataset:
    """32×32 colour crops of scikit-learn's two photographs, a temple and a flower.

    Crops start every 8 pixels. The 160 columns at the right of each photograph are held out, so
    that no pixel is in both splits, and stand in random order, the same in all runs: neighbours
    are nearly alike, and the first few of a split are what pictures and distances take.
    """
    bunch = _sklearn_datasets().load_sample_images()
    photos = [torch.from_numpy(image.copy()) for image in bunch.images]
    border = -_PATCH_HELD_OUT_COLUMNS
    train = torch.cat([_crops(photo[:, :border]) for photo in photos])
    held_out = torch.cat([_crops(photo[:, border:]) for photo in photos])
    held_out = held_out[permutation(len(held_out), _SPLIT_KEY)]
    return Dataset("patches", check_images(train, 256), held_out, 256, flip=True)
