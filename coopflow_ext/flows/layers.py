"""Layers without a conditioner: normalisation, mixing of channels, rearrangements, factor-out."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coopflow_ext._checks import check_count, check_number, check_sizes
from coopflow_ext._export import is_exporting
from coopflow_ext.autocast import full_precision
from coopflow_ext.flows.base import NO_CONTEXT, Context, Transform
from coopflow_ext.flows.folding import Foldable, by_kind
from coopflow_ext.flows.kept import Kept


def _check_channels(layer: nn.Module, x: Tensor, channels: int) -> None:
    if x.ndim < 2 or x.shape[1] != channels:
        raise ValueError(
            f"{type(layer).__name__}: x must be (B, {channels}, …), got {tuple(x.shape)}"
        )


def _check_image(layer: nn.Module, x: Tensor, *, height: int, width: int, channels: int) -> None:
    """x must be (B, C, H, W) with C, H and W multiples of the given numbers."""
    if x.ndim != 4 or x.shape[1] % channels or x.shape[2] % height or x.shape[3] % width:
        raise ValueError(
            f"{type(layer).__name__}: x must be (B, C, H, W) with C, H and W multiples of "
            f"{channels}, {height} and {width}, got {tuple(x.shape)}"
        )


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of dimension 1; ValueError when it is odd."""
    if x.ndim < 2 or x.shape[1] % 2:
        raise ValueError(f"dimension 1 of x must be even, got shape {tuple(x.shape)}")
    first, second = x.chunk(2, dim=1)
    return first, second


def _kind(parameter: Tensor) -> tuple[Any, ...]:
    """Parameters of a kind can be stacked; the frozen ones are not differentiated with others."""
    return parameter.shape, parameter.dtype, parameter.device, parameter.requires_grad


def _at_every_position(x: Tensor, logabsdet: Tensor) -> Tensor:
    """The ladj (B,) of a map of the channels that is the same everywhere."""
    return (math.prod(x.shape[2:]) * logabsdet).expand(x.shape[0])


class ActNorm(Foldable, Transform):
    """z = (x − mean)·inv_std per channel (dimension 1), initialised from the first batch.

    The first call of :meth:`call_and_ladj` in training mode sets mean and inv_std so that every
    channel of the result has mean 0 and variance 1 (Kingma & Dhariwal 2018, section 3.1); a channel
    that does not vary keeps its scale. Until then the layer is the identity.

    ``initialized`` is a persistent floating-point buffer, 0 at first, and every positive value
    means yes: so it may be averaged with the weights, and a layer that was loaded, copied or
    averaged is not initialised again. In training mode the host reads it once after each such
    change, never in evaluation mode. Compiled code cannot: it goes by what was last read outside of
    it, in a pass, a load or :meth:`Flow.initialize`, and breaks the graph where that was no.

    Args:
        channels: size of dimension 1.
        eps: added to the standard deviation.

    Raises:
        ValueError: for a first batch that is not finite, or with fewer than two values per channel.
    """

    initialized: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        check_count("channels", channels, 1)
        self.eps = check_number("eps", eps, minimum=0)
        self.mean = nn.Parameter(torch.zeros(channels))
        self.inv_std = nn.Parameter(torch.ones(channels))
        self.register_buffer("initialized", torch.zeros(()))
        self._started: Kept[bool] = Kept()
        self._last_seen = False  # for traced code, where the buffer has no value

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        flag = state_dict.get(prefix + "initialized")
        if isinstance(flag, Tensor) and not flag.is_floating_point():  # from before it was a float
            state_dict[prefix + "initialized"] = flag.to(self.mean.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        _ = self._is_initialized  # read now, not in the next pass

    @property
    def _is_initialized(self) -> bool:
        """What the buffer says, read from the device where that is not known yet."""
        if not torch.compiler.is_compiling():
            flag = self.initialized
            # On the meta device there is nothing to start from.
            started = self._started.get(lambda: flag.is_meta or bool(flag > 0) or None, flag)
            self._last_seen = bool(started)
        return self._last_seen

    def capture_kind(self) -> Hashable:
        """Whether the next pass starts it; asked of the device in training mode until it has."""
        return self.training and not self._is_initialized

    def _start(self, x: Tensor) -> None:
        if is_exporting():
            raise ValueError(
                "ActNorm starts from its first batch in training mode: call flow.initialize(x) "
                "or flow.eval() before torch.export"
            )
        if torch.compiler.is_compiling():
            from coopflow_ext.flows.untraced import start

            start(self._start, x)
        elif not self._is_initialized:  # in traced code that is news
            self.initialize(x)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set mean and inv_std from the batch x (B, channels, …); it waits for the device."""
        _check_channels(self, x, self.mean.shape[0])
        rows = x.transpose(0, 1).flatten(1).to(self.mean.dtype)
        if rows.shape[1] < 2:
            raise ValueError(
                "ActNorm: x must hold at least two values of each channel to start from (its first "
                f"batch in training mode), got shape {tuple(x.shape)}"
            )
        mean, std = rows.mean(1), rows.std(1, unbiased=False)
        finite = mean.isfinite() & std.isfinite()
        if not bool(finite.all()):
            channels = (~finite).nonzero()[:, 0].tolist()
            raise ValueError(
                "ActNorm: x must be finite to start from (its first batch in training mode); "
                f"channels with NaN or infinite values, or beyond {rows.dtype}: {channels[:10]}"
            )
        rounding = 4 * torch.finfo(rows.dtype).eps * rows.abs().amax(1)
        self.mean.copy_(mean)
        self.inv_std.copy_(torch.where(std > rounding, 1 / (std + self.eps), 1.0))
        self.initialized.fill_(1)
        self.unfold()
        _ = self._is_initialized

    def fold(self) -> tuple[Tensor, Tensor]:
        """The scale, and the log-determinant at one position."""
        return self.inv_std, self._logabsdet(self.inv_std)

    @classmethod
    def fold_all(
        cls, layers: Sequence[ActNorm], *, frozen: bool, inverse: bool
    ) -> list[tuple[Tensor, Tensor]]:
        scales = [layer.inv_std for layer in layers]

        def fold(numbers: list[int]) -> Iterable[tuple[Tensor, Tensor]]:
            stack = torch.stack([scales[i] for i in numbers])
            return zip(stack.unbind(), cls._logabsdet(stack).unbind(), strict=True)

        return by_kind([_kind(scale) for scale in scales], fold)

    @staticmethod
    def _logabsdet(inv_std: Tensor) -> Tensor:
        return inv_std.abs().log().sum(-1)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and scale as x has its channels, and the ladj of the forward map."""
        shape = (1, -1) + (1,) * (x.ndim - 2)
        inv_std, logabsdet = self.folded() or self.fold()
        return self.mean.view(shape), inv_std.view(shape), _at_every_position(x, logabsdet)

    def call_and_ladj(self, x: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        _check_channels(self, x, self.mean.shape[0])
        if self.training and not self._is_initialized:
            self._start(x)
        mean, inv_std, ladj = self._parts(x)
        return (x - mean) * inv_std, ladj

    def inverse_and_ladj(self, z: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        _check_channels(self, z, self.mean.shape[0])
        mean, inv_std, ladj = self._parts(z)
        return z / inv_std + mean, -ladj


# The matrix, its inverse, where that is needed, and its log-determinant at one position.
_Matrix = tuple[Tensor, Tensor | None, Tensor]

# Of more rows torch may leave a batch of matrices to MAGMA, which waits for the device.
_MOST_ROWS_TOGETHER = 16


class InvertibleConv1x1(Foldable, Transform):
    """z = W x at every position, W a learned (channels, channels) matrix, at first a rotation.

    For vectors (B, D) it mixes all coordinates. Kingma & Dhariwal 2018, section 3.2. The inverse
    matrix is computed in float64.

    Args:
        channels: size of dimension 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_count("channels", channels, 1)
        rotation, _ = torch.linalg.qr(torch.randn(channels, channels))
        self.weight = nn.Parameter(rotation.contiguous())

    def fold(self) -> _Matrix:
        return self.weight, self._inverse(self.weight), self._logabsdet(self.weight)

    @classmethod
    def fold_all(
        cls, layers: Sequence[InvertibleConv1x1], *, frozen: bool, inverse: bool
    ) -> list[_Matrix]:
        matrices = [layer.weight for layer in layers]

        def fold(numbers: list[int]) -> Iterable[_Matrix]:
            stack = torch.stack([matrices[i] for i in numbers])
            inverses = cls._inverse(stack).unbind() if inverse else [None] * len(stack)
            return zip(stack.unbind(), inverses, cls._logabsdet(stack).unbind(), strict=True)

        kinds = [
            (*_kind(matrix), i if len(matrix) > _MOST_ROWS_TOGETHER else None)
            for i, matrix in enumerate(matrices)
        ]
        return by_kind(kinds, fold)

    @staticmethod
    def _inverse(matrices: Tensor) -> Tensor:
        # inv_ex without its check: reading the error code would wait for the device.
        inverse: Tensor = torch.linalg.inv_ex(matrices.double()).inverse
        return inverse.to(matrices.dtype)

    @staticmethod
    def _logabsdet(matrices: Tensor) -> Tensor:
        matrices = matrices if matrices.dtype == torch.float64 else matrices.float()
        logabsdet: Tensor = torch.linalg.slogdet(matrices).logabsdet
        return logabsdet

    def _apply_matrix(self, x: Tensor, matrix: Tensor) -> Tensor:
        _check_channels(self, x, matrix.shape[0])
        if x.dtype != matrix.dtype:  # it comes from autocast, or is given in it
            dtype = torch.promote_types(x.dtype, matrix.dtype)
            x, matrix = x.to(dtype), matrix.to(dtype)
        # A state that autocast rounded would no longer belong to its log-determinant.
        with full_precision(x.device.type):
            if x.ndim == 2:
                return F.linear(x, matrix)
            if x.ndim == 4:
                # A convolution of so few channels takes at least twice as long on a CPU, and by
                # torch's defaults may round to TF32 on CUDA, which the inverse would not undo.
                return torch.bmm(matrix.expand(x.shape[0], -1, -1), x.flatten(2)).view(x.shape)
        raise ValueError(f"x must be (B, D) or (B, C, H, W), got {tuple(x.shape)}")

    def call_and_ladj(self, x: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        folded = self.folded()
        if folded is None:  # without the inverse
            matrix, logabsdet = self.weight, self._logabsdet(self.weight)
        else:
            matrix, _, logabsdet = folded
        return self._apply_matrix(x, matrix), _at_every_position(x, logabsdet)

    def inverse_and_ladj(self, z: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        matrix, inverse, logabsdet = self.folded() or self.fold()
        if inverse is None:  # of a forward pass that this is a part of
            inverse = self._inverse(matrix)
        return self._apply_matrix(z, inverse), -_at_every_position(z, logabsdet)


class _Rearrangement(Transform):
    """A transform that only moves elements, so that its ladj is 0."""

    def rearrange(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def restore(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def call_and_ladj(self, x: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        return self.rearrange(x), x.new_zeros(x.shape[0])

    def inverse_and_ladj(self, z: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        return self.restore(z), z.new_zeros(z.shape[0])


class Squeeze(_Rearrangement):
    """(B, C, H, W) → (B, 4C, H/2, W/2), channel index c·4 + 2·dy + dx."""

    def rearrange(self, x: Tensor) -> Tensor:
        _check_image(self, x, channels=1, height=2, width=2)
        B, C, H, W = x.shape
        blocks = x.reshape(B, C, H // 2, 2, W // 2, 2)
        return blocks.permute(0, 1, 3, 5, 2, 4).reshape(B, 4 * C, H // 2, W // 2)

    def restore(self, z: Tensor) -> Tensor:
        _check_image(self, z, channels=4, height=1, width=1)
        B, C, H, W = z.shape
        blocks = z.reshape(B, C // 4, 2, 2, H, W)
        return blocks.permute(0, 1, 4, 2, 5, 3).reshape(B, C // 4, 2 * H, 2 * W)


class Checkerboard(_Rearrangement):
    """(B, C, H, W) → (B, 2C, H, W/2): the two colours of a checkerboard as halves of the channels.

    The first half holds the pixels whose row parity equals their column parity, the second half
    the others, each collapsed horizontally.
    """

    def rearrange(self, x: Tensor) -> Tensor:
        _check_image(self, x, channels=1, height=1, width=2)
        left, right = x.reshape(*x.shape[:3], x.shape[3] // 2, 2).unbind(-1)
        return torch.cat(self._exchange_odd_rows(left, right), dim=1)

    def restore(self, z: Tensor) -> Tensor:
        left, right = self._exchange_odd_rows(*halves(z))
        return torch.stack((left, right), dim=-1).flatten(3)

    @staticmethod
    def _exchange_odd_rows(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        odd = (torch.arange(first.shape[2], device=first.device) % 2 == 1)[:, None]
        return torch.where(odd, second, first), torch.where(odd, first, second)


class Flip(_Rearrangement):
    """Exchange the two halves of dimension 1, so that the next coupling changes the other one."""

    def rearrange(self, x: Tensor) -> Tensor:
        first, second = halves(x)
        return torch.cat((second, first), dim=1)

    def restore(self, z: Tensor) -> Tensor:
        return self.rearrange(z)


class Flatten(_Rearrangement):
    """(B, *event_shape) → (B, D)."""

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = check_sizes("event_shape", event_shape)

    def rearrange(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def restore(self, z: Tensor) -> Tensor:
        return z.reshape(z.shape[0], *self.event_shape)


class SplitPrior(Transform):
    """Factor-out: ``inner`` transforms the first half of the channels, the second is latent as is.

    The result has x's shape: cat(inner z, factored-out half).
    """

    def __init__(self, inner: Transform) -> None:
        super().__init__()
        self.inner = inner

    def call_and_ladj(self, x: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        kept, factored_out = halves(x)
        z, ladj = self.inner.call_and_ladj(kept, context)
        return torch.cat((z, factored_out), dim=1), ladj

    def inverse_and_ladj(self, z: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        kept, factored_out = halves(z)
        x, ladj = self.inner.inverse_and_ladj(kept, context)
        return torch.cat((x, factored_out), dim=1), ladj
