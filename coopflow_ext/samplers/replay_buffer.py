"""A buffer of persistent chains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from coopflow_ext import ops
from coopflow_ext._tensors import room_for
from coopflow_ext.rng import USE_BUFFER, Key
from coopflow_ext.samplers.checks import check_count, check_number

_P = ParamSpec("_P")
_T = TypeVar("_T")

Init = Literal["uniform", "normal"] | Callable[[tuple[int, ...], Key], Tensor]

# What the buffer's key is folded with for each separate use.
_FILL, _CHOOSE, _REINIT, _FRESH = range(4)


def _as_plain_tensors(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """A buffer outlives the modes in which it is used: what it holds and gives are neither
    inference tensors nor part of an autograd graph."""
    return torch.inference_mode(False)(torch.no_grad()(method))


class BufferDraw(NamedTuple):
    """Starts of chains, (n, *shape), and where in the buffer they belong, int64 (n,)."""

    x: Tensor
    indices: Tensor


class ReplayBuffer:
    """Persistent chains, kept on the device, of which a few start anew at each draw::

        x0, indices = buffer.draw(64)
        out = sampler(x0, key=key)
        buffer.write(indices, out.x)

    Every draw is determined by the key and the number of draws before it.

    Args:
        shape: of one chain's state.
        size: number of chains.
        reinit_probability: probability that a drawn chain starts anew.
        init: what a new chain is: "uniform" on [−1, 1), "normal", or a callable
            (shape, key) → tensor.
        key: where the draws come from; None draws a seed from torch's default generator.
        device, dtype: of the states.

    Attributes:
        key: of the next draw.

    Raises:
        ValueError, TypeError: for an argument out of range, by name.
    """

    @_as_plain_tensors
    def __init__(
        self,
        shape: Sequence[int],
        *,
        size: int = 10_000,
        reinit_probability: float = 0.05,
        init: Init = "uniform",
        key: Key | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.size = check_count("size", size, 1)
        self.reinit_probability = check_number("reinit_probability", reinit_probability)
        if not 0 <= self.reinit_probability <= 1:
            raise ValueError(f"reinit_probability must be in [0, 1], got {reinit_probability}")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating point, got {dtype!r}")
        if not callable(init) and init not in ("uniform", "normal"):
            raise ValueError(f"init must be 'uniform', 'normal' or a callable, got {init!r}")
        self._init = init
        self.key = Key.or_default(key).fold_in(USE_BUFFER)
        shape = _check_shape(shape)
        with room_for("a buffer", (self.size, *shape), dtype):
            self.states = torch.empty((self.size, *shape), dtype=dtype, device=device)
        self.states.copy_(self._fresh(self.size, _FILL))

    @_as_plain_tensors
    def draw(self, n: int) -> BufferDraw:
        """n different chains, some of them started anew; the buffer's states stay as they are.

        Raises:
            ValueError: n is larger than the buffer.
        """
        if check_count("n", n, 1) > self.size:
            raise ValueError(f"n must be at most the buffer's size {self.size}, got {n}")
        device = self.states.device
        chances = ops.uniform((self.size,), self._rng(_CHOOSE))
        indices = chances.topk(n, sorted=True).indices
        x = self.states.index_select(0, indices)
        anew = ops.uniform((n,), self._rng(_REINIT)) < self.reinit_probability
        fresh = self._fresh(n, _FRESH).to(device, x.dtype)
        x = torch.where(anew.reshape(-1, *[1] * (x.ndim - 1)), fresh, x)
        self.key = self.key.advance(1)
        return BufferDraw(x, indices)

    @_as_plain_tensors
    def write(self, indices: Tensor, x: Tensor) -> None:
        """Put the states of drawn chains back.

        Raises:
            TypeError: ``indices`` is not an int64 tensor, or x not a tensor.
            ValueError: ``indices`` is not (n,), or x does not have one state for each.
            IndexError: an index is beyond the buffer.
        """
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
            got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"indices must be an int64 tensor, as draw() gives, got {got}")
        if indices.ndim != 1:
            raise ValueError(f"indices must have shape (n,), got {tuple(indices.shape)}")
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.shape != (len(indices), *self.states.shape[1:]):
            expected = (len(indices), *self.states.shape[1:])
            raise ValueError(f"x must have shape {expected}, got {tuple(x.shape)}")
        self.states.index_copy_(0, indices, x.detach().to(self.states))

    def _rng(self, use: int) -> Tensor:
        return self.key.fold_in(use).tensor(self.states.device)

    def _fresh(self, n: int, use: int) -> Tensor:
        shape = (n, *self.states.shape[1:])
        if callable(self._init):
            with self.states.device:  # where what does not say otherwise is made
                fresh = self._init(shape, self.key.fold_in(use))
            if not isinstance(fresh, Tensor):
                raise TypeError(f"init must return a tensor, got {type(fresh).__name__}")
            if fresh.shape != shape:
                raise ValueError(f"init must return shape {shape}, got {tuple(fresh.shape)}")
            return fresh
        if self._init == "normal":
            return ops.normal(shape, self._rng(use), dtype=self.states.dtype)
        return 2 * ops.uniform(shape, self._rng(use), dtype=self.states.dtype) - 1

    @_as_plain_tensors
    def state_dict(self) -> dict[str, Any]:
        """The states and the key: a tensor and three integers."""
        return {"states": self.states.clone(), **self.key.state_dict()}

    @_as_plain_tensors
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: it is not a buffer's, or of a buffer of another size or shape.
        """
        if missing := {"states", "seed", "time"} - state.keys():
            raise ValueError(f"state must have {', '.join(sorted(missing))}, got {list(state)}")
        if state["states"].shape != self.states.shape:
            raise ValueError(
                f"states must have shape {tuple(self.states.shape)}, "
                f"got {tuple(state['states'].shape)}"
            )
        self.states.copy_(state["states"])
        self.key = Key(int(state["seed"]), int(state["time"]), int(state.get("chain", 0)))


def _check_shape(shape: object) -> tuple[int, ...]:
    """``shape`` as a tuple of ints ≥ 0; TypeError or ValueError, by name."""
    if isinstance(shape, int):
        raise TypeError(f"shape must be a sequence of ints, such as ({shape},), got an int")
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise TypeError(f"shape must be a sequence of ints, got {type(shape).__name__}")
    return tuple(check_count(f"shape[{i}]", length, 0) for i, length in enumerate(shape))
