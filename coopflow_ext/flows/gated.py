"""The conditioner of Flow++ (Ho et al. 2019): gated convolutions and gated attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coopflow_ext import ops
from coopflow_ext._checks import check_counts, check_flag, check_probability, check_sizes
from coopflow_ext.flows.base import NO_CONTEXT, Context
from coopflow_ext.flows.compiled import compiled_for
from coopflow_ext.flows.nets import Conditioner, Dropout, Masks, conditioning
from coopflow_ext.flows.weight_norm import (
    Affine,
    WeightNormed,
    WeightNormedConv2d,
    WeightNormedLinear,
)
from coopflow_ext.ops.attention import split_heads

N_HEADS = 4
AUX_CHANNELS = 32

Layer = Callable[[Tensor], Tensor]
Norm = tuple[Tensor, Tensor]


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


def _conv_gates(
    x: Tensor,
    features: Tensor | None,
    masks: Masks,
    conv: Layer,
    aux: Layer | None,
    gate: Layer,
) -> Tensor:
    """(B, 2C, H, W): values, and behind them their gates."""
    h = conv(ops.concat_elu(x))
    if aux is not None and features is not None:
        h = h + aux(features)
    return gate(ops.concat_elu(h, masks.rng, masks.p, step=masks.step))


def _attention_gates(
    x: Tensor, positions: Tensor, masks: Masks, project: Layer, gate: Layer
) -> Tensor:
    """(B, positions, 2C): values, and behind them their gates."""
    B, L, C = x.shape
    heads = project(x + positions).view(B, L, 3, N_HEADS, C // N_HEADS)
    keys, values, queries = split_heads(heads)
    if masks.rng is None:
        mixed = F.scaled_dot_product_attention(queries, keys, values)
    else:
        # The mask comes from our own key, which torch's fused attention cannot take.
        mixed = ops.attention(queries, keys, values, masks.rng, masks.p, step=masks.step)
    return gate(mixed.transpose(1, 2).reshape(B, L, C))


def _gate_add_norm(x: Tensor, gates: Tensor, norm: Norm) -> Tensor:
    """Of x's dtype, which in autocast is that of the layer before, half precision."""
    return ops.gate_add_norm(x, gates.to(x.dtype), *norm)


def _block(
    x: Tensor,
    conv_gates: Layer,
    norm1: Norm,
    attention_gates: Layer | None,
    norm2: Norm | None,
) -> Tensor:
    B, C, H, W = x.shape
    # In channels_last the change to (B, H·W, C) and back moves no data.
    gates = conv_gates(x).permute(0, 2, 3, 1)
    h = _gate_add_norm(x.permute(0, 2, 3, 1), gates, norm1).view(B, H * W, C)
    if attention_gates is not None and norm2 is not None:
        h = _gate_add_norm(h, attention_gates(h), norm2)
    return h.view(B, H, W, C).permute(0, 3, 1, 2)


def _as_conv(affine: Affine) -> Layer:
    weight, bias = affine
    return partial(F.conv2d, weight=weight, bias=bias, padding=weight.shape[-1] // 2)


def _as_linear(affine: Affine) -> Layer:
    weight, bias = affine
    return partial(F.linear, weight=weight, bias=bias)


def _affine(layer: WeightNormed) -> Affine:
    """Detached without gradients, where some layers are folded so and others not: compiled code is
    for one or the other."""
    weight, bias = layer.affine()
    if torch.is_grad_enabled():
        return weight, bias
    return weight.detach(), None if bias is None else bias.detach()


def _norm(layer: nn.LayerNorm) -> Norm:
    return layer.weight, layer.bias


def _block_of_tensors(
    x: Tensor,
    positions: Tensor,
    features: Tensor | None,
    masks: tuple[Masks, Masks | None],
    convs: tuple[Affine, Affine | None, Affine],
    norm1: Norm,
    linears: tuple[Affine, Affine] | None,
    norm2: Norm | None,
) -> Tensor:
    """The same of tensors alone, which can be compiled for all blocks of a kind."""
    conv, aux, gate = convs
    conv_gates = partial(
        _conv_gates,
        features=features,
        masks=masks[0],
        conv=_as_conv(conv),
        aux=None if aux is None else _as_conv(aux),
        gate=_as_conv(gate),
    )
    if linears is None or masks[1] is None or norm2 is None:
        return _block(x, conv_gates, norm1, None, None)
    project, out = map(_as_linear, linears)
    attention_gates = partial(
        _attention_gates, positions=positions, masks=masks[1], project=project, gate=out
    )
    return _block(x, conv_gates, norm1, attention_gates, norm2)


class GatedConv(nn.Module):
    """concat-ELU, conv3×3, [+ conv1×1(concat-ELU(aux))], concat-ELU, dropout, conv1×1.

    The result are values and, behind them, their gates: what uses it multiplies a by σ(b).
    """

    def __init__(self, channels: int, dropout: float = 0.0, aux_channels: int = 0) -> None:
        super().__init__()
        self.conv = WeightNormedConv2d(2 * channels, channels, 3)
        self.aux = WeightNormedConv2d(2 * aux_channels, channels, 1) if aux_channels else None
        self.dropout = Dropout(dropout, per_channel=True)
        self.gate = WeightNormedConv2d(2 * channels, 2 * channels, 1)

    def forward(
        self, x: Tensor, context: Context = NO_CONTEXT, features: Tensor | None = None
    ) -> Tensor:
        """(B, 2C, H, W). ``features`` is concat-ELU(aux), from a caller who needs it more than
        once."""
        if self.aux is not None and features is None:
            if context.aux is None:
                raise ValueError("this network is conditioned: context.aux is missing")
            features = ops.concat_elu(context.aux)
        masks = self.dropout.masks(context)
        return _conv_gates(x, features, masks, self.conv, self.aux, self.gate)

    def affines(self) -> tuple[Affine, Affine | None, Affine]:
        aux = None if self.aux is None else _affine(self.aux)
        return _affine(self.conv), aux, _affine(self.gate)


class GatedAttention(nn.Module):
    """Self-attention over the positions of (B, positions, channels), then a linear layer.

    The projection's output is (keys, values, queries), each split into heads. The result are values
    and, behind them, their gates, as of :class:`GatedConv`.
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
        """(B, positions, 2C)."""
        masks = self.dropout.masks(context)
        return _attention_gates(x, positions, masks, self.project, self.gate)

    def affines(self) -> tuple[Affine, Affine]:
        return _affine(self.project), _affine(self.gate)


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

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        context: Context = NO_CONTEXT,
        features: Tensor | None = None,
    ) -> Tensor:
        """``features`` as for :class:`GatedConv`."""
        if context.compiled:
            return self._compiled(x, positions, context, features)
        conv_gates = partial(self.conv, context=context, features=features)
        attention_gates = None
        if self.attention is not None:
            attention_gates = partial(self.attention, positions=positions, context=context)
        norm2 = None if self.norm2 is None else _norm(self.norm2)
        return _block(x, conv_gates, _norm(self.norm1), attention_gates, norm2)

    def _compiled(
        self, x: Tensor, positions: Tensor, context: Context, features: Tensor | None
    ) -> Tensor:
        """By the function that all blocks of this kind share, whatever their depth and flow."""
        conv, attention = self.conv, self.attention
        masks = conv.dropout.masks(context), attention and attention.dropout.masks(context)
        kind = (
            x.shape[1:],
            x.dtype,
            None if features is None else features.shape[1:],
            attention is None,
            tuple(None if of is None else (of.p, of.rng is None) for of in masks),
        )
        run = compiled_for(_block_of_tensors, kind)
        return run(
            x.contiguous(memory_format=torch.channels_last),  # as the blocks before give it
            positions,
            features,
            masks,
            conv.affines(),
            _norm(self.norm1),
            None if attention is None else attention.affines(),
            None if self.norm2 is None else _norm(self.norm2),
        )


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
        check_counts(1, n_in=n_in, n_out=n_out, channels=channels)
        check_counts(0, blocks=blocks, aux_channels=aux_channels)
        check_probability("dropout", dropout)
        check_flag("attention", attention)
        if len(check_sizes("size", size)) != 2:
            raise ValueError(f"size must be (H, W), got {tuple(size)}")
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

    def capture_kind(self) -> Hashable:
        """Where the positions are that a replay would read."""
        return self._place_positions().data_ptr()

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
        features = None if aux is None else ops.concat_elu(aux)  # once for all blocks
        context = replace(context, aux=aux)
        h = self.first(x.contiguous(memory_format=torch.channels_last))
        positions = self._place_positions().to(h.dtype)  # half precision in autocast
        for block in self.blocks:
            h = block(h, positions, context, features)
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
        first, *gated = self.layers
        x = first(x)
        for layer in gated:
            x = F.glu(layer(x), 1)
        return x
