"""Energies given by a neural network."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coopflow_ext._checks import check_choice, check_count, check_counts, check_sizes
from coopflow_ext._tensors import check_tensor, parameter_dtype

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}
_RES_IMAGE_SIZES = (8, 16, 32, 64)
_RES_MOST_DOUBLINGS = 3


class _DownBlock(nn.Module):
    """Half the size, other channels: avgpool2(swish(conv(swish(conv x))) + swish(conv x))."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_in, 3, padding=1)
        self.conv2 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.skip = nn.Conv2d(n_in, n_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        deep = F.silu(self.conv2(F.silu(self.conv1(x))))
        return F.avg_pool2d(deep + F.silu(self.skip(x)), 2)


class ResEnergy(nn.Module):
    """The convolutional energy of the CoopFlow paper (appendix of arXiv 2205.06924).

    conv3×3 to ``width`` channels and swish, log2(image_size / 4) down-sampling blocks that double
    the channels up to 8·``width`` (the fourth, of images of 64, keeps them), and a 4×4 convolution
    to 100 outputs whose sum is the negative energy f.

    Args:
        channels: channels of the images.
        width: channels after the first convolution; the paper has 128.
        image_size: height and width of the images: 8, 16, 32 or 64.

    ``forward(x)``: x (B, channels, image_size, image_size) in [−1, 1] → U = −f, (B,), x's dtype.

    Raises:
        ValueError: for an image size that is not in the list, or an x of another shape.
        TypeError: for an x of another dtype than the parameters' (float32 and autocast's
            own are taken under autocast), or that is no tensor.
    """

    def __init__(self, channels: int = 3, width: int = 128, image_size: int = 32) -> None:
        super().__init__()
        if check_count("image_size", image_size, 1) not in _RES_IMAGE_SIZES:
            raise ValueError(f"image_size must be one of {_RES_IMAGE_SIZES}, got {image_size}")
        check_counts(1, channels=channels, width=width)
        self.event_shape = (channels, image_size, image_size)
        self.width = width
        n_blocks = (image_size // 4).bit_length() - 1
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        widths = [width << min(i, _RES_MOST_DOUBLINGS) for i in range(n_blocks + 1)]
        self.blocks = nn.ModuleList(itertools.starmap(_DownBlock, itertools.pairwise(widths)))
        self.head = nn.Conv2d(widths[-1], 100, 4)

    def forward(self, x: Tensor) -> Tensor:
        check_tensor("x", x, parameter_dtype(self))
        if x.shape[1:] != self.event_shape:
            raise ValueError(f"x must have shape (B, *{self.event_shape}), got {tuple(x.shape)}")
        h = F.silu(self.stem(x))
        for block in self.blocks:
            h = block(h)
        outputs: Tensor = self.head(h)
        return -outputs.flatten(1).sum(1)


class MLPEnergy(nn.Module):
    """A fully connected energy: U(x) = w·act(… act(W₁x + b₁) …) + b.

    Args:
        dim: number of elements of one x; x may have any shape (B, …) of that many elements.
        widths: sizes of the hidden layers.
        activation: "silu", "softplus", "tanh" or "gelu" (all smooth, so that ∇U is too).

    ``forward(x)`` → (B,), x's dtype.

    Raises:
        ValueError: for a size below 1, an unknown activation, or an x of another size.
        TypeError: for an x of another dtype than the parameters' (float32 and autocast's
            own are taken under autocast), or that is no tensor.
    """

    def __init__(
        self, dim: int, widths: Sequence[int] = (64, 64, 64), activation: str = "silu"
    ) -> None:
        super().__init__()
        self.dim = check_count("dim", dim, 1)
        self.widths = check_sizes("widths", widths)
        if not self.widths:
            raise ValueError("widths must hold the size of at least one hidden layer, got none")
        check_choice("activation", activation, tuple(_ACTIVATIONS))
        self.activation = activation
        sizes = (dim, *self.widths, 1)
        self.layers = nn.ModuleList(
            nn.Linear(n_in, n_out) for n_in, n_out in itertools.pairwise(sizes)
        )

    def forward(self, x: Tensor) -> Tensor:
        check_tensor("x", x, parameter_dtype(self))
        if x.ndim < 2 or math.prod(x.shape[1:]) != self.dim:
            raise ValueError(f"x must be (B, …) of {self.dim} elements each, got {tuple(x.shape)}")
        act = _ACTIVATIONS[self.activation]
        h = x.flatten(1)
        *hidden, last = self.layers
        for layer in hidden:
            h = act(layer(h))
        u: Tensor = last(h)
        return u.squeeze(1)
