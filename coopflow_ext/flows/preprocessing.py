"""From images to the real line: dequantisation and the logit map, with their log-determinants."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coopflow_ext import ops
from coopflow_ext._checks import check_count, check_number
from coopflow_ext.flows.base import NO_CONTEXT, Context, Transform
from coopflow_ext.flows.folding import folding
from coopflow_ext.flows.layers import Checkerboard
from coopflow_ext.flows.recompute import call_and_ladj
from coopflow_ext.flows.weight_norm import WeightNormed


class Dequantize(nn.Module):
    """Uniform dequantisation: v = ((levels − 1)·x + u)/levels with u ~ U(0, 1), x in [0, 1].

    ``call_and_ladj`` returns v in (0, 1) and −log q(u | x) per row, which is 0 for uniform noise,
    so that log p(v) + ladj − D·log(levels) is a lower bound of the log-probability of the discrete
    image (Theis et al. 2016, section 3.1).

    Args:
        levels: number of grey levels of the data, 256 for 8 bits.
    """

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        self.levels = check_count("levels", levels, 2)

    def draw(self, x: Tensor, rng: Tensor) -> Tensor:
        """The noise of one call, shape of x."""
        return ops.uniform(x.shape, rng, dtype=x.dtype)

    def call_and_ladj(
        self, x: Tensor, eps: Tensor, context: Context = NO_CONTEXT
    ) -> tuple[Tensor, Tensor]:
        """x in [0, 1] and noise ``eps``, both (B, C, H, W) → v, ladj (B,)."""
        return self._mix(x, eps), x.new_zeros(x.shape[0])

    def round(self, v: Tensor) -> Tensor:
        """The grey level in [0, 1] that v was made from, the inverse of dequantisation."""
        level = (self.levels * v).floor().clamp(0, self.levels - 1)
        return level / (self.levels - 1)

    def _mix(self, x: Tensor, u: Tensor) -> Tensor:
        return ((self.levels - 1) * x + u) / self.levels


class VariationalDequantize(Dequantize):
    """Dequantisation with learned noise: u = sigmoid(g(ε; x)), v = (255·x + u)/256.

    ε ~ N(0, I) passes a flow g on the checkerboard pair, conditioned on features of the image;
    ``call_and_ladj`` returns v and −log q(u | x) (Ho et al. 2019, section 3.1).
    """

    def __init__(self, transform: Transform, aux_net: nn.Module, levels: int = 256) -> None:
        super().__init__(levels)
        self.aux_net = aux_net
        self.transform = transform
        self.board = Checkerboard()
        self.recompute = False

    def draw(self, x: Tensor, rng: Tensor) -> Tensor:
        """ε of one call, shape of x."""
        return ops.normal(x.shape, rng, dtype=x.dtype)

    def call_and_ladj(
        self, x: Tensor, eps: Tensor, context: Context = NO_CONTEXT
    ) -> tuple[Tensor, Tensor]:
        with folding(self.aux_net, WeightNormed):
            aux = self.aux_net(self.board.rearrange(x - 0.5))
        inner = replace(context, aux=aux)
        pair = self.board.rearrange(eps)
        w, ladj = call_and_ladj(self.transform, pair, inner, recompute=self.recompute)
        w = self.board.restore(w)
        # −log q = ½ε² + ½ log 2π + ladj + log u + log(1 − u), u = sigmoid(w).
        terms = 0.5 * eps.square() + F.logsigmoid(w) + F.logsigmoid(-w)
        log_q = terms.flatten(1).sum(1) + 0.5 * math.log(2 * math.pi) * math.prod(eps.shape[1:])
        return self._mix(x, torch.sigmoid(w)), ladj + log_q


class Logit(nn.Module):
    """y = logit((bound·(2v − 1) + 1)/2) for v in [0, 1]; the bound keeps y finite.

    Args:
        bound: 0 < bound < 1; the paper has 0.9.
    """

    def __init__(self, bound: float = 0.9) -> None:
        super().__init__()
        if not 0 < check_number("bound", bound) < 1:
            raise ValueError(f"bound must be in (0, 1), got {bound}")
        self.bound = bound

    def call_and_ladj(self, v: Tensor) -> tuple[Tensor, Tensor]:
        p = (self.bound * (2 * v - 1) + 1) / 2
        y = torch.log(p) - torch.log1p(-p)
        # dy/dv = bound / (p (1 − p)), and −log p − log(1 − p) = softplus(−y) + softplus(y).
        log_slope = F.softplus(y) + F.softplus(-y) + math.log(self.bound)
        return y, log_slope.flatten(1).sum(1)

    def inverse(self, y: Tensor) -> Tensor:
        """v for y; it leaves [0, 1] where y lies beyond the image of [0, 1]."""
        return (torch.tanh(y / 2) / self.bound + 1) / 2
