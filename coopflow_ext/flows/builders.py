"""Ready-made flows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from coopflow_ext import ops
from coopflow_ext._checks import check_choice, check_counts, check_sequence, check_sizes
from coopflow_ext.flows.base import Compose, Inverse, Transform
from coopflow_ext.flows.couplings import AffineCoupling, MixtureLogisticCoupling, VectorSplit
from coopflow_ext.flows.flow import Flow
from coopflow_ext.flows.gated import AUX_CHANNELS, AuxNet, FlowPPConditioner
from coopflow_ext.flows.layers import (
    ActNorm,
    Checkerboard,
    Flatten,
    Flip,
    InvertibleConv1x1,
    SplitPrior,
    Squeeze,
)
from coopflow_ext.flows.nets import ConvConditioner, MLPConditioner
from coopflow_ext.flows.preprocessing import Dequantize, Logit, VariationalDequantize
from coopflow_ext.rng import USE_INIT, Key

ImageShape = tuple[int, int, int]
_MakeCoupling = Callable[[int], Transform]


def _check_image_shape(image_shape: Sequence[int], multiple: int) -> ImageShape:
    sizes = check_sizes("image_shape", image_shape)
    if len(sizes) != 3:
        raise ValueError(f"image_shape must be (C, H, W), got {sizes}")
    channels, height, width = sizes
    if height % multiple or width % multiple:
        raise ValueError(
            f"height and width of image_shape must be multiples of {multiple} for this many "
            f"scales, got {height} and {width}"
        )
    return channels, height, width


def random_masks(dim: int, n: int, seed: int = 0) -> list[torch.Tensor]:
    """n masks (dim,) with dim // 2 True each, random, every second the complement of the last.

    So two couplings in a row change every coordinate once. They are made on the CPU, also for a
    flow that is made on another device, meta included.
    """
    scores = ops.uniform((n, dim), Key(seed).fold_in(USE_INIT).tensor("cpu"))
    masks: list[torch.Tensor] = []
    for i in range(n):
        if i % 2:
            masks.append(~masks[-1])
        else:
            mask = torch.zeros(dim, dtype=torch.bool, device="cpu")
            mask[scores[i].argsort()[: dim // 2]] = True
            masks.append(mask)
    return masks


def _vector_couplings(
    dim: int,
    couplings: int,
    widths: Sequence[int],
    dropout: float,
    mask_seed: int,
    context_dim: int,
) -> list[Transform]:
    layers: list[Transform] = []
    for mask in random_masks(dim, couplings, mask_seed):
        split = VectorSplit(mask)
        net = MLPConditioner(split.n_kept, 2 * split.n_changed, widths, dropout, context_dim)
        layers += [ActNorm(dim), AffineCoupling(net, split.n_changed, split)]
    return layers


def _image_flow(
    transform: Transform,
    image_shape: ImageShape,
    levels: int,
    legacy_contrast: bool,
    recompute: bool,
    context_dim: int,
) -> Flow:
    return Flow(
        transform,
        image_shape,
        dequantize=Dequantize(levels),
        logit=Logit(),
        legacy_contrast=legacy_contrast,
        recompute=recompute,
        context_dim=context_dim,
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
    context_dim: int = 0,
    levels: int = 256,
    legacy_contrast: bool = False,
    recompute: bool = False,
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
        context_dim: size of the context that every network reads too; 0 for none.
        levels: grey levels of the dequantisation of images.
        legacy_contrast, recompute: see :class:`Flow`.

    Raises:
        ValueError: for sizes that do not fit.
    """
    if (dim is None) == (image_shape is None):
        raise ValueError("give either dim or image_shape")
    check_choice("net", net, (None, "mlp", "conv"))
    check_counts(1, couplings=couplings, scales=scales, channels=channels)
    check_counts(0, blocks=blocks, mask_seed=mask_seed)
    check_counts(2, levels=levels)
    if image_shape is None:
        check_counts(2, dim=dim)
        assert dim is not None
        if net == "conv":
            raise ValueError("net='conv' needs image_shape")
        layers = _vector_couplings(dim, couplings, widths, dropout, mask_seed, context_dim)
        return Flow(
            Compose(layers),
            (dim,),
            legacy_contrast=legacy_contrast,
            context_dim=context_dim,
            recompute=recompute,
        )
    if net == "mlp":
        shape = _check_image_shape(image_shape, 1)
        size = math.prod(shape)
        layers = _vector_couplings(size, couplings, widths, dropout, mask_seed, context_dim)
        transform: Transform = Compose([Flatten(shape), *layers, Inverse(Flatten(shape))])
        return _image_flow(transform, shape, levels, legacy_contrast, recompute, context_dim)

    def couplings_of(n: int, split: str) -> list[Transform]:
        # A checkerboard's halves have n channels each, a channel split's n / 2.
        features = n if split == "checkerboard" else n // 2
        layers: list[Transform] = []
        for i in range(4):
            conditioner = ConvConditioner(features, 2 * features, channels, blocks, context_dim)
            layers += [ActNorm(n), AffineCoupling(conditioner, features, split, flip=i % 2 == 1)]
        return layers

    def scale(n: int, scales_left: int) -> Transform:
        layers = couplings_of(n, "checkerboard")
        if scales_left > 1:
            inner = SplitPrior(scale(2 * n, scales_left - 1))
            layers += [Squeeze(), *couplings_of(4 * n, "channel"), inner, Inverse(Squeeze())]
        return Compose(layers)

    shape = _check_image_shape(image_shape, 2**scales)
    transform = scale(shape[0], scales)
    return _image_flow(transform, shape, levels, legacy_contrast, recompute, context_dim)


def glow(
    image_shape: Sequence[int],
    *,
    scales: int = 2,
    steps: int = 8,
    channels: int = 64,
    blocks: int = 2,
    context_dim: int = 0,
    levels: int = 256,
    legacy_contrast: bool = False,
    recompute: bool = False,
) -> Flow:
    """Glow (Kingma & Dhariwal 2018) for images in [−1, 1].

    Every one of ``scales`` scales is a squeeze and ``steps`` × {ActNorm, invertible 1×1
    convolution, affine channel coupling}; half of the channels go to the prior between two scales.

    Args:
        image_shape: (C, H, W), H and W multiples of 2^scales.
        scales, steps: see above.
        channels: hidden channels of each conditioner.
        blocks: residual blocks of each conditioner.
        context_dim: size of the context that every conditioner reads too; 0 for none.
        levels: grey levels of the dequantisation.
        legacy_contrast, recompute: see :class:`Flow`.

    Raises:
        ValueError: for sizes that do not fit.
    """
    check_counts(1, scales=scales, steps=steps, channels=channels)
    check_counts(0, blocks=blocks)
    shape = _check_image_shape(image_shape, 2**scales)

    def step(n: int) -> list[Transform]:
        conditioner = ConvConditioner(n // 2, n, channels, blocks, context_dim)
        return [ActNorm(n), InvertibleConv1x1(n), AffineCoupling(conditioner, n // 2)]

    def scale(n: int, scales_left: int) -> Transform:
        layers: list[Transform] = [Squeeze()]
        for _ in range(steps):
            layers += step(4 * n)
        if scales_left > 1:
            layers.append(SplitPrior(scale(2 * n, scales_left - 1)))
        return Compose([*layers, Inverse(Squeeze())])

    transform = scale(shape[0], scales)
    return _image_flow(transform, shape, levels, legacy_contrast, recompute, context_dim)


def _steps(n: int, pair_channels: int, make_coupling: _MakeCoupling) -> Compose:
    """n × {ActNorm, invertible 1×1 convolution, coupling, Flip} on a concatenated pair."""
    layers: list[Transform] = []
    for _ in range(n):
        layers += [ActNorm(pair_channels), InvertibleConv1x1(pair_channels)]
        layers += [make_coupling(pair_channels // 2), Flip()]
    return Compose(layers)


def _as_pairs(scales: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    given = check_sequence("scales", scales, "pairs")
    pairs = [check_sizes(f"scales[{i}]", pair, 0) for i, pair in enumerate(given)]
    if not pairs or any(len(pair) != 2 or sum(pair) == 0 for pair in pairs):
        raise ValueError(
            "scales must be pairs (channel steps, checkerboard steps) with at least one step "
            f"each, got {scales}"
        )
    return pairs


def _check_scales(scales: Sequence[Sequence[int]], channels: int, width: int) -> None:
    if scales[0][0] and channels % 2:
        raise ValueError(f"channel steps in the first scale need even channels, got {channels}")
    for index, (_, n_checker_steps) in enumerate(scales):
        if n_checker_steps and width % 2 ** (index + 1):
            raise ValueError(
                f"the width of image_shape must be a multiple of {2 ** (index + 1)} for a "
                f"checkerboard in scale {index + 1}, got {width}"
            )


def flowpp(
    image_shape: Sequence[int] = (3, 32, 32),
    *,
    scales: Sequence[Sequence[int]] = ((0, 4), (2, 3)),
    channels: int = 96,
    blocks: int = 10,
    components: int = 32,
    dequant_blocks: int = 2,
    dequant_components: int = 32,
    dropout: float = 0.2,
    attention: bool = True,
    context_dim: int = 0,
    levels: int = 256,
    legacy_contrast: bool = False,
    legacy_cdf_clamp: bool = False,
    sampling_dropout: bool = False,
    recompute: bool = False,
) -> Flow:
    """Flow++ for images in [−1, 1]; the defaults are the paper's CIFAR-10 model.

    Args:
        image_shape: (C, H, W), multiples of 2^(scales − 1), W even where a checkerboard halves it.
        scales: for each scale (channel steps, checkerboard steps), in the order they run.
        channels: hidden channels of the conditioners.
        blocks: blocks of each conditioner.
        components: logistics in each mixture.
        dequant_blocks: blocks of the conditioners of the variational dequantiser; with 0 the
            dequantisation is uniform.
        dequant_components: logistics in each of the dequantiser's mixtures.
        dropout: dropout of the conditioners, in training mode.
        attention: conditioners with or without attention.
        context_dim: size of the context that every conditioner reads too (the dequantiser's do
            not); 0 for none. It takes ``blocks`` ≥ 1.
        levels: grey levels of the dequantisation.
        legacy_contrast, sampling_dropout, recompute: see :class:`Flow`.
        legacy_cdf_clamp: see :class:`MixtureLogisticCoupling`.

    Raises:
        ValueError: for sizes that do not fit.
    """
    scales = _as_pairs(scales)
    shape = _check_image_shape(image_shape, 2 ** (len(scales) - 1))
    n_channels, height, width = shape
    _check_scales(scales, n_channels, width)
    check_counts(1, channels=channels, components=components)
    check_counts(0, blocks=blocks, dequant_blocks=dequant_blocks, context_dim=context_dim)
    check_counts(1 if dequant_blocks else 0, dequant_components=dequant_components)

    def coupling(
        size: tuple[int, int], n_blocks: int, components: int, aux_channels: int = context_dim
    ) -> _MakeCoupling:
        def make(features: int) -> MixtureLogisticCoupling:
            net = FlowPPConditioner(
                features,
                (2 + 3 * components) * features,
                size,
                channels=channels,
                blocks=n_blocks,
                dropout=dropout,
                aux_channels=aux_channels,
                attention=attention,
            )
            return MixtureLogisticCoupling(
                net, features, components, legacy_cdf_clamp=legacy_cdf_clamp
            )

        return make

    def scale(index: int, n: int, height: int, width: int) -> Compose:
        n_channel_steps, n_checker_steps = scales[index]
        layers: list[Transform] = []
        if n_channel_steps:
            layers.append(_steps(n_channel_steps, n, coupling((height, width), blocks, components)))
        if n_checker_steps:
            make = coupling((height, width // 2), blocks, components)
            layers += [Checkerboard(), _steps(n_checker_steps, 2 * n, make)]
            layers.append(Inverse(Checkerboard()))
        if index + 1 < len(scales):
            inner = scale(index + 1, 2 * n, height // 2, width // 2)
            layers += [Squeeze(), SplitPrior(inner), Inverse(Squeeze())]
        return Compose(layers)

    dequantize = Dequantize(levels)
    if dequant_blocks:
        make = coupling((height, width // 2), dequant_blocks, dequant_components, AUX_CHANNELS)
        noise_flow = _steps(4, 2 * n_channels, make)
        dequantize = VariationalDequantize(noise_flow, AuxNet(2 * n_channels), levels)
    return Flow(
        scale(0, n_channels, height, width),
        shape,
        dequantize=dequantize,
        logit=Logit(),
        legacy_contrast=legacy_contrast,
        sampling_dropout=sampling_dropout,
        context_dim=context_dim,
        recompute=recompute,
    )
