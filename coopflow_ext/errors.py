"""The exceptions of this package beyond ValueError and TypeError."""

from __future__ import annotations

import torch


class BuildError(RuntimeError):
    """The native library is missing, cannot be loaded, or cannot use this GPU's driver; the message
    says what to install."""


class RunError(RuntimeError):
    """A run folder or a file in it cannot be used; the message says what to do."""


class NonFiniteError(RuntimeError):
    """A chain met a gradient that is not finite, or a training has left the finite numbers.

    Attributes:
        step: first step (counted from 0 in this call) at which a gradient was not finite, or
            ``None`` when it was not recorded; of a training, how many steps were done.
        chains: indices of the chains concerned, int64, on the CPU; None where it was no chain.
        x: the state of every chain where its gradient was last looked at, same shape and device as
            the sampler's state. It is finite unless it overflowed in the step before, while its
            gradient did not.
    """

    def __init__(
        self,
        message: str,
        *,
        step: int | None = None,
        chains: torch.Tensor | None = None,
        x: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        super().__init__(message)
        self.step = step
        self.chains = chains
        self.x = x


def reason(error: BaseException) -> str:
    """Type and message of an error in one line: the reason often stands after the first one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"
