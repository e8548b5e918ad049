"""The conditioner of Flow++ (Ho et al. 2019): gated convolutions and gated attention."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coopflow_ext import ops
from coopflow_ext.flows.base import NO_CONTEXT, Context
from coopflow_ext.flows.nets import Conditioner, Dropout, conditioning
from coopflow_ext.flows.weight_norm import WeightNormedConv2d, WeightNormedLinear

N_HEADS = 4
AUX_CHANNELS = 32


def _gate(x: Tensor, dim: int) -> Tensor:
    """a·sigmoid(b) of the two halves of a dimension."""
    return F.glu(x, dim)


def sinusoidal_positions(n_positions: int, channels: int) -> Tensor:
    """(n_positions, channels): [sin | cos], timescales geometric from 1 to 10⁴.

    Evaluated in float32, whatever the network's dtype, like the published code: at position 512
    the angle's rounding is visible, and networks were trained with it. An odd number of channels
    has a last channel of zeros.
    """
    n_scales = channels // 2
    on_cpu: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    exponents = torch.arange(n_scales, **on_cpu)
    frequencies = (exponents * -(math.log(10_000.0) / max(n_scales - 1, 1))).exp()
    angles = torch.arange(n_positions, **on_cpu)[:, None] * frequencies
    return F.pad(torch.cat((angles.sin(), angles.cos()), dim=1), (0, channels % 2))


class GatedConv(nn.Module):
    """concat-ELU, conv3×3, [+ conv1×1(concat-ELU(aux))], concat-ELU, dropout, conv1×1, gate."""

    def __init__(self, channels: int, dropout: float = 0.0, aux_channels: int = 0) -> None:
        super().__init__()
        self.conv = WeightNormedConv2d(2 * channels, channels, 3)
        self.aux = WeightNormedConv2d(2 * aux_channels, channels, 1) if aux_channels else None
        self.dropout = Dropout(dropout, per_channel=True)
        self.gate = WeightNormedConv2d(2 * channels, 2 * channels, 1)

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        h = self.conv(ops.concat_elu(x))
        if self.aux is not None:
            if context.aux is None:
                raise ValueError("this network is conditioned: context.aux is missing")
            h = h + self.aux(ops.concat_elu(context.aux))
        h = ops.concat_elu(h, context.dropout_rng, self.dropout.p, step=self.dropout.index)
        return _gate(self.gate(h), 1)


class GatedAttention(nn.Module):
    """Self-attention over the positions of (B, positions, channels), then a gated linear layer.

    The projection's output is (keys, values, queries), each split into heads.
    """

    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        most = N_HEADS * ops.ATTENTION_MAX_DIM
        if dropout > 0 and channels > most:
            raise ValueError(
                f"channels must be at most {most} for attention with dropout, got {channels}"
            )
        self.project = WeightNormedLinear(channels, 3 * channels, bias=False)
        self.dropout = Dropout(dropout)
        self.gate = WeightNormedLinear(channels, 2 * channels, bias=True)

    def forward(self, x: Tensor, positions: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        B, L, C = x.shape
        heads = self.project(x + positions).view(B, L, 3, N_HEADS, C // N_HEADS)
        keys, values, queries = (of.transpose(1, 2) for of in heads.unbind(2))
        if context.dropout_rng is None:
            mixed = F.scaled_dot_product_attention(queries, keys, values)
        else:
            # The mask comes from our own key, which torch's fused attention cannot take.
            mixed = ops.attention(
                queries, keys, values, context.dropout_rng, self.dropout.p, step=self.dropout.index
            )
        return _gate(self.gate(mixed.transpose(1, 2).reshape(B, L, C)), 2)


class ConditionerBlock(nn.Module):
    """Gated convolution and, if asked for, attention, each with a residual and a LayerNorm."""

    def __init__(
        self, channels: int, dropout: float, aux_channels: int = 0, attention: bool = True
    ) -> None:
        super().__init__()
        self.conv = GatedConv(channels, dropout, aux_channels)
        self.norm1 = nn.LayerNorm(channels)
        self.attention = GatedAttention(channels, dropout) if attention else None
        self.norm2 = nn.LayerNorm(channels) if attention else None

    def forward(self, x: Tensor, positions: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        B, C, H, W = x.shape
        # In channels_last the change to (B, H·W, C) and back moves no data.
        h = self.norm1((x + self.conv(x, context)).permute(0, 2, 3, 1).reshape(B, H * W, C))
        if self.attention is not None and self.norm2 is not None:
            h = self.norm2(h + self.attention(h, positions, context))
        return cast(Tensor, h).view(B, H, W, C).permute(0, 3, 1, 2)


class FlowPPConditioner(Conditioner):
    """conv3×3, blocks of gated convolution and attention, conv3×3; all weight-normed.

    Args:
        n_in, n_out: channels of the input and of the output.
        size: (H, W) of the input.
        channels: hidden channels, a multiple of the 4 heads when there is attention, and with
            dropout at most 256 then.
        blocks: number of blocks.
        dropout: on channels behind the convolutions and on attention weights.
        aux_channels: channels of ``context.aux``; 0 for a network that is not conditioned. Every
            block reads it.
        attention: with or without the attention layers.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        size: tuple[int, int],
        *,
        channels: int = 96,
        blocks: int = 10,
        dropout: float = 0.2,
        aux_channels: int = 0,
        attention: bool = True,
    ) -> None:
        super().__init__()
        if attention and channels % N_HEADS:
            raise ValueError(f"channels must be a multiple of {N_HEADS} heads, got {channels}")
        if aux_channels and not blocks:
            raise ValueError("blocks must be ≥ 1 for a network with context: they read it, got 0")
        self.size = size
        self.aux_channels = aux_channels
        self.first = WeightNormedConv2d(n_in, channels, 3)
        self.blocks = nn.ModuleList(
            ConditionerBlock(channels, dropout, aux_channels, attention) for _ in range(blocks)
        )
        self.last = WeightNormedConv2d(channels, n_out, 3)
        self._positions = sinusoidal_positions(math.prod(size), channels)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        module = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._place_positions()  # now, so that a compiled graph finds them
        return module

    def _place_positions(self) -> Tensor:
        """The code of the positions like the parameters, (H·W, channels).

        Constants, so no buffer that would be averaged, rounded twice or left on the meta device:
        where the parameters have another device or dtype, they are made anew.
        """
        like = self.first.bias
        assert like is not None
        positions = self._positions
        if positions.device != like.device or positions.dtype != like.dtype:
            with torch.inference_mode(False):
                positions = sinusoidal_positions(math.prod(self.size), self.first.out_channels)
                positions = positions.to(like.device, like.dtype)
            if not torch.compiler.is_compiling():
                self._positions = positions
        return positions

    def forward(self, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        aux = conditioning(context, self.aux_channels, x)
        context = Context(aux, context.dropout_rng)
        positions = self._place_positions()
        h = self.first(x.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            h = block(h, positions, context)
        # The couplings read (B, 2 + 3K, C, H, W) row-major, so leave channels_last here, where
        # the tensor is still small.
        return cast(Tensor, self.last(h.contiguous()))


class AuxNet(nn.Module):
    """Features of the image for the dequantiser: conv3×3, then gated convolutions."""

    def __init__(self, n_in: int, channels: int = AUX_CHANNELS, gated_layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(n_in, channels, 3, padding=1)])
        self.layers.extend(GatedConv(channels) for _ in range(gated_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
