"""Copies of a network's weights in the precision and memory layout that a chain computes in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from coopflow_ext.samplers.gradient import constant

# The modules whose weights autocast casts at each call. Other parameters keep their precision.
_CAST_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
                 nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # fmt: skip


class WeightCopies:
    """Low-precision and/or channels-last copies of the weights of linear and convolution modules.

    Autocast would cast the same weights at every step of a chain, because it caches no cast of a
    frozen parameter; the copies are refreshed once per chain and give the same numbers.

    Args:
        module: the energy, or None: no copies.
        dtype: precision of the copies; None keeps each weight's.
        channels_last: lay 4-D weights out as channels_last.
    """

    def __init__(
        self, module: nn.Module | None, dtype: torch.dtype | None, *, channels_last: bool
    ) -> None:
        self._copies: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        if module is None or (dtype is None and not channels_last):
            return
        for owner in module.modules():
            if not isinstance(owner, _CAST_MODULES):
                continue
            for name in ("weight", "bias"):
                weight = owner._parameters.get(name)
                if weight is None:
                    continue
                layout = torch.preserve_format
                if channels_last and weight.ndim == 4:
                    layout = torch.channels_last
                copy = torch.empty_like(weight, dtype=dtype, memory_format=layout)
                self._copies.append((owner, name, weight, nn.Parameter(copy, False)))

    def refresh(self) -> None:
        """Bring the copies up to date with the weights."""
        if self._copies:
            with torch.no_grad():
                for _, _, weight, copy in self._copies:
                    copy.copy_(weight)

    def swapped_in(self) -> AbstractContextManager[None]:
        """The module computes with the copies inside, with its own weights afterwards."""
        return self._swapped_in() if self._copies else nullcontext()

    @contextmanager
    def _swapped_in(self) -> Iterator[None]:
        try:
            for owner, name, _, copy in self._copies:
                owner._parameters[name] = copy
            with constant([copy for _, _, _, copy in self._copies]):
                yield
        finally:
            for owner, name, weight, _ in self._copies:
                owner._parameters[name] = weight
