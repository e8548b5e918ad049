"""What a data set is to the trainer."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """A training split and a held-out split, both in memory.

    Attributes:
        name: the name it was loaded by.
        train: (N, *event_shape); images as uint8 grey levels, vectors as float32.
        held_out: (M, *event_shape), disjoint from ``train``, same dtype.
        levels: number of grey levels of the images, so that level l stands for
            2·l/(levels − 1) − 1 in [−1, 1]; None for vectors.
        train_labels: (N,) int64 classes, or None.
        held_out_labels: (M,) int64 classes, or None.
        flip: a mirrored image is as likely as the image, so batches may be mirrored.
    """

    name: str
    train: Tensor
    held_out: Tensor
    levels: int | None
    train_labels: Tensor | None = None
    held_out_labels: Tensor | None = None
    flip: bool = False

    def __post_init__(self) -> None:
        if self.train.shape[1:] != self.held_out.shape[1:]:
            raise ValueError(
                f"{self.name}: train and held_out must hold events of one shape, got "
                f"{tuple(self.train.shape[1:])} and {tuple(self.held_out.shape[1:])}"
            )
        if not len(self.train) or not len(self.held_out):
            raise ValueError(
                f"{self.name}: both splits need at least one event, got "
                f"{len(self.train)} for training and {len(self.held_out)} held out"
            )

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event: (C, H, W) of an image, (D,) of a vector."""
        return tuple(self.train.shape[1:])

    @property
    def dim(self) -> int:
        """Number of elements of one event."""
        return math.prod(self.event_shape)

    @property
    def is_image(self) -> bool:
        """Whether events are images with grey levels."""
        return self.levels is not None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the events of both splits, in hexadecimal."""
        digest = hashlib.sha256()
        for split in (self.train, self.held_out):
            digest.update(f"{split.dtype} {tuple(split.shape)}".encode())
            digest.update(split.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def decode(self, raw: Tensor) -> Tensor:
        """Rows of a split → float32, images in [−1, 1] with both ends exact."""
        if self.levels is None:
            return raw.float()
        return raw.float() / (self.levels - 1) * 2 - 1


def to_bytes(x: Tensor) -> Tensor:
    """Images (B, C, H, W) in [−1, 1], C = 1 or 3 → (B, 3, H, W) uint8, rounded to 256 levels."""
    levels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.expand(-1, 3, -1, -1)


def check_images(images: Tensor, levels: int) -> Tensor:
    """(N, C, H, W) uint8 with every value below ``levels``; returned as it came."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images must be (N, C, H, W) uint8, got {images.dtype} of {tuple(images.shape)}"
        )
    if len(images) and int(images.max()) >= levels:
        raise ValueError(f"images must have values below {levels}, got {int(images.max())}")
    return images
