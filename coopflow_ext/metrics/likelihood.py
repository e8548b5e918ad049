"""Likelihood of a flow in the unit that papers report."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from coopflow_ext._checks import check_count
from coopflow_ext._model_state import in_mode
from coopflow_ext._tensors import check_tensor
from coopflow_ext.flows.flow import Flow
from coopflow_ext.rng import Key


@torch.no_grad()
def bits_per_dim(flow: Flow, x: Tensor, key: Key, *, batch_size: int = 500) -> float:
    """−log₂ p(x)/D under ``flow``, averaged over the rows of x, in evaluation mode.

    For images it is an upper bound of the bits for one grey value, with the dequantisation noise
    drawn from ``key``; it does not depend on ``batch_size`` beyond rounding.

    Raises:
        ValueError: x holds no row, or ``batch_size`` < 1.
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"flow must be a Flow, got {type(flow).__name__}")
    Key.check(key)
    check_tensor("x", x)
    check_count("batch_size", batch_size, 1)
    if not len(x):
        raise ValueError("x must hold at least one row, got none")
    with in_mode(flow, training=False):
        total = sum(
            float(flow.log_prob(rows, key=key.at_chain(key.chain + start)).double().sum())
            for start, rows in zip(range(0, len(x), batch_size), x.split(batch_size), strict=True)
        )
    return -total / (len(x) * flow.dim * math.log(2))
