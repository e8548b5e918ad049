"""Ready-made flows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from coopflow_ext import ops
from coopflow_ext.flows.base import Compose, Inverse, Transform
from coopflow_ext.flows.couplings import AffineCoupling, VectorSplit
from coopflow_ext.flows.flow import Flow
from coopflow_ext.flows.layers import ActNorm, Flatten, InvertibleConv1x1, SplitPrior, Squeeze
from coopflow_ext.flows.nets import ConvConditioner, MLPConditioner
from coopflow_ext.flows.preprocessing import Dequantize, Logit
from coopflow_ext.rng import USE_INIT, Key

ImageShape = tuple[int, int, int]


def _check_at_least(minimum: int, **values: int) -> None:
    for name, value in values.items():
        if value < minimum:
            raise ValueError(f"{name} must be ≥ {minimum}, got {value}")


def _check_image_shape(image_shape: Sequence[int], multiple: int) -> ImageShape:
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape must be (C, H, W), got {tuple(image_shape)}")
    channels, height, width = image_shape
    if height % multiple or width % multiple:
        raise ValueError(
            f"height and width of image_shape must be multiples of {multiple} for this many "
            f"scales, got {height} and {width}"
        )
    return channels, height, width


def random_masks(dim: int, n: int, seed: int = 0) -> list[torch.Tensor]:
    """n masks (dim,) with dim // 2 True each, random, every second the complement of the last.

    So two couplings in a row change every coordinate once.
    """
    scores = ops.uniform((n, dim), Key(seed).fold_in(USE_INIT).tensor())
    masks: list[torch.Tensor] = []
    for i in range(n):
        if i % 2:
            masks.append(~masks[-1])
        else:
            mask = torch.zeros(dim, dtype=torch.bool)
            mask[scores[i].argsort()[: dim // 2]] = True
            masks.append(mask)
    return masks


def _vector_couplings(
    dim: int, couplings: int, widths: Sequence[int], dropout: float, mask_seed: int
) -> list[Transform]:
    layers: list[Transform] = []
    for mask in random_masks(dim, couplings, mask_seed):
        split = VectorSplit(mask)
        net = MLPConditioner(split.n_kept, 2 * split.n_changed, widths, dropout)
        layers += [ActNorm(dim), AffineCoupling(net, split.n_changed, split)]
    return layers


def _image_flow(
    transform: Transform, image_shape: ImageShape, levels: int, legacy_contrast: bool
) -> Flow:
    return Flow(
        transform,
        image_shape,
        dequantize=Dequantize(levels),
        logit=Logit(),
        legacy_contrast=legacy_contrast,
    )


def realnvp(
    dim: int | None = None,
    image_shape: Sequence[int] | None = None,
    *,
    net: Literal["mlp", "conv"] | None = None,
    couplings: int = 8,
    widths: Sequence[int] = (256, 256),
    dropout: float = 0.0,
    mask_seed: int = 0,
    scales: int = 2,
    channels: int = 64,
    blocks: int = 2,
    levels: int = 256,
    legacy_contrast: bool = False,
) -> Flow:
    """RealNVP (Dinh et al. 2017) for vectors or for images in [−1, 1].

    With ``net="mlp"`` (vectors, and images when asked for; strong on small images) there are
    ``couplings`` affine couplings with random binary masks and fully connected networks. With
    ``net="conv"`` (the default for images) every one of ``scales`` scales has 4 checkerboard
    couplings and, except for the last, a squeeze, 4 channel couplings and a factor-out of half of
    the channels. In both, an ActNorm precedes every coupling.

    Args:
        dim: size of the vectors; give either this or ``image_shape``.
        image_shape: (C, H, W); for "conv", H and W are multiples of 2^scales.
        net: "mlp" or "conv".
        couplings: couplings of an "mlp" flow.
        widths: hidden sizes of each "mlp" network.
        dropout: dropout of the "mlp" networks.
        mask_seed: seed of the random masks.
        scales: scales of a "conv" flow.
        channels: hidden channels of each "conv" network.
        blocks: residual blocks of each "conv" network.
        levels: grey levels of the dequantisation of images.
        legacy_contrast: see :class:`Flow`.

    Raises:
        ValueError: for sizes that do not fit.
    """
    if (dim is None) == (image_shape is None):
        raise ValueError("give either dim or image_shape")
    if net not in (None, "mlp", "conv"):
        raise ValueError(f"net must be 'mlp' or 'conv', got {net!r}")
    _check_at_least(1, couplings=couplings, scales=scales, channels=channels)
    _check_at_least(0, blocks=blocks)
    if image_shape is None:
        assert dim is not None
        _check_at_least(2, dim=dim)
        if net == "conv":
            raise ValueError("net='conv' needs image_shape")
        return Flow(Compose(_vector_couplings(dim, couplings, widths, dropout, mask_seed)), (dim,))
    if net == "mlp":
        shape = _check_image_shape(image_shape, 1)
        layers = _vector_couplings(math.prod(shape), couplings, widths, dropout, mask_seed)
        transform: Transform = Compose([Flatten(shape), *layers, Inverse(Flatten(shape))])
        return _image_flow(transform, shape, levels, legacy_contrast)

    def couplings_of(n: int, split: str) -> list[Transform]:
        # A checkerboard's halves have n channels each, a channel split's n / 2.
        features = n if split == "checkerboard" else n // 2
        layers: list[Transform] = []
        for i in range(4):
            conditioner = ConvConditioner(features, 2 * features, channels, blocks)
            layers += [ActNorm(n), AffineCoupling(conditioner, features, split, flip=i % 2 == 1)]
        return layers

    def scale(n: int, scales_left: int) -> Transform:
        layers = couplings_of(n, "checkerboard")
        if scales_left > 1:
            inner = SplitPrior(scale(2 * n, scales_left - 1))
            layers += [Squeeze(), *couplings_of(4 * n, "channel"), inner, Inverse(Squeeze())]
        return Compose(layers)

    shape = _check_image_shape(image_shape, 2**scales)
    return _image_flow(scale(shape[0], scales), shape, levels, legacy_contrast)


def glow(
    image_shape: Sequence[int],
    *,
    scales: int = 2,
    steps: int = 8,
    channels: int = 64,
    blocks: int = 2,
    levels: int = 256,
    legacy_contrast: bool = False,
) -> Flow:
    """Glow (Kingma & Dhariwal 2018) for images in [−1, 1].

    Every one of ``scales`` scales is a squeeze and ``steps`` × {ActNorm, invertible 1×1
    convolution, affine channel coupling}; half of the channels go to the prior between two scales.

    Args:
        image_shape: (C, H, W), H and W multiples of 2^scales.
        scales, steps: see above.
        channels: hidden channels of each conditioner.
        blocks: residual blocks of each conditioner.
        levels: grey levels of the dequantisation.
        legacy_contrast: see :class:`Flow`.

    Raises:
        ValueError: for sizes that do not fit.
    """
    _check_at_least(1, scales=scales, steps=steps, channels=channels)
    _check_at_least(0, blocks=blocks)
    shape = _check_image_shape(image_shape, 2**scales)

    def step(n: int) -> list[Transform]:
        conditioner = ConvConditioner(n // 2, n, channels, blocks)
        return [ActNorm(n), InvertibleConv1x1(n), AffineCoupling(conditioner, n // 2)]

    def scale(n: int, scales_left: int) -> Transform:
        layers: list[Transform] = [Squeeze()]
        for _ in range(steps):
            layers += step(4 * n)
        if scales_left > 1:
            layers.append(SplitPrior(scale(2 * n, scales_left - 1)))
        return Compose([*layers, Inverse(Squeeze())])

    return _image_flow(scale(shape[0], scales), shape, levels, legacy_contrast)
