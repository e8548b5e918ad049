"""A buffer of persistent chains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from coopflow_ext import ops
from coopflow_ext._checks import check_count, check_number
from coopflow_ext._tensors import apart_from, per_chain_view, room_for, storages
from coopflow_ext.errors import reason
from coopflow_ext.rng import USE_BUFFER, Key, stream
from coopflow_ext.samplers.inputs import rng_tensors
from coopflow_ext.samplers.output import State, Tensors, unpack

_P = ParamSpec("_P")
_T = TypeVar("_T")

Init = Literal["uniform", "normal"] | Callable[..., Any]

# What the buffer's key is folded with for each separate use.
_FILL, _CHOOSE, _REINIT, _FRESH = range(4)


def _as_plain_tensors(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """A buffer outlives the modes in which it is used: what it holds and gives are neither
    inference tensors nor part of an autograd graph."""
    return torch.inference_mode(False)(torch.no_grad()(method))


class _Draw(NamedTuple):
    x: Any  # a State; what a buffer of one tensor gives is a tensor
    indices: Tensor


class BufferDraw(_Draw):
    """Starts of chains, (n, *shape), and where in the buffer they belong, int64 (n,); as attribute
    ``y`` their labels, int64 (n,), where the buffer has classes, else None."""

    y: Tensor | None = None


class ReplayBuffer:
    """Persistent chains, kept on the device, of which a few start anew at each draw::

        x0, indices = buffer.draw(64)
        out = sampler(x0, key=key)
        buffer.write(indices, out.x)

    Every draw is determined by the key and the number of draws before it. With classes, each chain
    has a label, which stays its own when it starts anew; ``buffer.draw(64, y=labels)`` draws from
    the chains of these labels, as the buffers of JEM do.

    Args:
        shape: of one chain's state; a list or tuple of shapes for a state of several tensors.
        size: number of chains.
        reinit_probability: probability that a drawn chain starts anew.
        init: what a new chain is: "uniform" on [−1, 1), "normal", or a callable
            (shape, key) → tensor, with classes (shape, key, labels) → tensor. ``shape`` begins with
            the number of chains; for several tensors it is a list or tuple of shapes, and so is
            the result of tensors.
        n_classes: number of classes, among which the chains are shared evenly: chain i has label
            i modulo n_classes.
        key: where the draws come from; None draws a seed from torch's default generator.
        device, dtype: of the states.

    Attributes:
        states: (size, *shape), or as many tensors as there are shapes.
        key: of the next draw.

    Raises:
        ValueError, TypeError: for an argument out of range, by name.
    """

    @_as_plain_tensors
    def __init__(
        self,
        shape: Sequence[int] | Sequence[Sequence[int]],
        *,
        size: int = 10_000,
        reinit_probability: float = 0.05,
        init: Init = "uniform",
        n_classes: int | None = None,
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
        if n_classes is not None and check_count("n_classes", n_classes, 1) > self.size:
            raise ValueError(
                f"n_classes must be at most the buffer's size {self.size}, got {n_classes}"
            )
        self._init, self.n_classes = init, n_classes
        self.key = Key.or_default(key).fold_in(USE_BUFFER)
        self._shapes, self._like = _check_shapes(shape)
        states = []
        for one in self._shapes:
            with room_for("a buffer", (self.size, *one), dtype):
                states.append(torch.empty((self.size, *one), dtype=dtype, device=device))
        self.states: Any = self._packed(states)
        for state, fresh in zip(states, self._fresh(self.size, _FILL), strict=True):
            state.copy_(fresh)

    @property
    def labels(self) -> Tensor | None:
        """int64 (size,) with classes, else None."""
        if self.n_classes is None:
            return None
        return torch.arange(self.size, device=self._device) % self.n_classes

    @property
    def _device(self) -> torch.device:
        return unpack(self.states)[0].device

    def _packed(self, values: Sequence[Any]) -> Any:
        """One for each tensor of a state, in the structure of the buffer's."""
        return values[0] if self._like is None else self._like(values)

    @_as_plain_tensors
    def draw(self, n: int, *, y: Tensor | Sequence[int] | int | None = None) -> BufferDraw:
        """n different chains, some of them started anew; the buffer's states stay as they are.

        Args:
            y: labels that the chains are to have, integers (n,) or one for all; the host reads
                them. None: whichever.

        Raises:
            TypeError: y is not integers.
            ValueError: n is larger than the buffer, y is given to a buffer without classes, does
                not fit n or the classes, or asks for more chains of a class than there are.
        """
        if check_count("n", n, 1) > self.size:
            raise ValueError(f"n must be at most the buffer's size {self.size}, got {n}")
        wanted = None if y is None else self._check_labels(y, n)
        chances = ops.uniform((self.size,), self._rng(_CHOOSE))
        if wanted is None:
            indices = chances.topk(n, sorted=True).indices
        else:
            indices = self._of_labels(wanted, chances)
        labels = None if self.n_classes is None else indices % self.n_classes
        anew = ops.uniform((n,), self._rng(_REINIT)) < self.reinit_probability
        xs = []
        fresh = self._fresh(n, _FRESH, labels)
        for state, new in zip(unpack(self.states), fresh, strict=True):
            x = state.index_select(0, indices)
            xs.append(torch.where(per_chain_view(anew, x), new.to(x), x))
        self.key = self.key.advance(1)
        drawn = BufferDraw(self._packed(xs), indices)
        drawn.y = labels
        return drawn

    def _check_labels(self, y: object, n: int) -> Tensor:
        """int64 (n,) on the host."""
        if self.n_classes is None:
            raise ValueError("y needs a buffer with classes; give it n_classes")
        try:
            labels = torch.as_tensor(y, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"y must be integers, got {y!r}") from error
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"y must be integers, got {labels.dtype}")
        if labels.shape not in ((), (n,)):
            raise ValueError(f"y must be one label or have shape ({n},), got {tuple(labels.shape)}")
        labels, counts = labels.long().expand(n), self._class_sizes(self.n_classes)
        lowest, highest = int(labels.min()), int(labels.max())
        if lowest < 0 or highest >= self.n_classes:
            raise ValueError(
                f"y must be labels in [0, {self.n_classes}), got {lowest} to {highest}"
            )
        asked = labels.bincount(minlength=self.n_classes)
        if bool((asked > counts).any()):
            label = int((asked - counts).argmax())
            raise ValueError(
                f"y asks for {int(asked[label])} chains of label {label}, of which the buffer has "
                f"{int(counts[label])}"
            )
        return labels

    def _class_sizes(self, n_classes: int) -> Tensor:
        """How many chains each class has, on the host."""
        sizes = [len(range(c, self.size, n_classes)) for c in range(n_classes)]
        return torch.tensor(sizes, device="cpu")

    def _of_labels(self, y: Tensor, chances: Tensor) -> Tensor:
        """For each label a chain of its class, none twice: the classes' chains in random order, and
        of each as many from the front as are asked for."""
        assert self.n_classes is not None
        shuffled = chances.argsort(descending=True)
        by_class = shuffled[(shuffled % self.n_classes).argsort(stable=True)]
        order = y.argsort(stable=True)
        asked, sizes = y.bincount(minlength=self.n_classes), self._class_sizes(self.n_classes)
        first_asked, first = asked.cumsum(0) - asked, sizes.cumsum(0) - sizes
        rank = torch.empty_like(y)
        rank[order] = torch.arange(len(y), device=y.device) - first_asked[y[order]]
        return by_class[(first[y] + rank).to(by_class.device)]

    @_as_plain_tensors
    def write(self, indices: Tensor, x: State) -> None:
        """Put the states of drawn chains back; they keep their labels.

        Raises:
            TypeError: ``indices`` is not an int64 tensor, or x not a tensor, or not as many.
            ValueError: ``indices`` is not (n,), or x does not have one state for each.
            IndexError: an index is beyond the buffer.
        """
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
            got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"indices must be an int64 tensor, as draw() gives, got {got}")
        if indices.ndim != 1:
            raise ValueError(f"indices must have shape (n,), got {tuple(indices.shape)}")
        xs = self._check("x must be", "x must have", x, len(indices))
        self._check_indices(indices)
        states = unpack(self.states)
        for state, value in zip(states, apart_from(storages(states), xs), strict=True):
            state.index_copy_(0, indices, value.detach().to(state))

    def _check_indices(self, indices: Tensor) -> None:
        """IndexError on the CPU; elsewhere the device looks: asking it here would wait for it."""
        if indices.device.type != "cpu":
            return
        try:  # by an operator, for code that is recorded: it could read no value
            torch.empty(1, device="cpu").expand(self.size).index_select(0, indices)
        except (IndexError, RuntimeError) as error:
            raise IndexError(f"indices must be in [0, {self.size}): {reason(error)}") from None

    def _check(self, be: str, have: str, values: object, n: int) -> Tensors:
        """The tensors of a state of n chains; messages begin with ``be`` or ``have``."""
        shapes = [(n, *shape) for shape in self._shapes]
        if self._like is None:
            given: tuple[Any, ...] = (values,)
        elif isinstance(values, (list, tuple)) and len(values) == len(shapes):
            given = tuple(values)
        else:
            got = f"{len(values)}" if isinstance(values, (list, tuple)) else type(values).__name__
            raise TypeError(f"{be} a list or tuple of {len(shapes)} tensors, got {got}")
        for value, shape in zip(given, shapes, strict=True):
            if not isinstance(value, Tensor):
                raise TypeError(f"{be} a tensor, got {type(value).__name__}")
            if value.is_complex():
                raise TypeError(f"{be} real, got {value.dtype}")
            if value.shape != shape:
                raise ValueError(f"{have} shape {shape}, got {tuple(value.shape)}")
        return given

    def _rng(self, use: int) -> Tensor:
        return stream(self.key, use, device=self._device)

    def _fresh(self, n: int, use: int, labels: Tensor | None = None) -> Tensors:
        """New states of n chains, which have these labels; of all by default."""
        labels = self.labels if labels is None else labels
        shapes = [(n, *shape) for shape in self._shapes]
        if callable(self._init):
            given = () if labels is None else (labels,)
            with self._device:  # where what does not say otherwise is made
                fresh = self._init(self._packed(shapes), self.key.fold_in(use), *given)
            return self._check("init must return", "init must return", fresh, n)
        make = ops.normal if self._init == "normal" else _signed_uniform
        states = unpack(self.states)
        rngs = rng_tensors(self.key, states, use)
        return tuple(
            make(shape, rng, dtype=state.dtype)
            for shape, rng, state in zip(shapes, rngs, states, strict=True)
        )

    @_as_plain_tensors
    def state_dict(self) -> dict[str, Any]:
        """The states and the key: a tensor, or a list of them, and three integers; with classes
        their number, too."""
        states = [state.clone() for state in unpack(self.states)]
        classes = {} if self.n_classes is None else {"n_classes": self.n_classes}
        kept = states[0] if self._like is None else states
        return {"states": kept, **self.key.state_dict(), **classes}

    @_as_plain_tensors
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: it is not a buffer's, or of a buffer of another size, shape or number of
                classes.
            TypeError: the states are not as many tensors as the buffer's.
        """
        if missing := {"states", "seed", "time"} - state.keys():
            raise ValueError(f"state must have {', '.join(sorted(missing))}, got {list(state)}")
        if state.get("n_classes") != self.n_classes:
            raise ValueError(f"n_classes must be {self.n_classes}, got {state.get('n_classes')}")
        states = self._check("states must be", "states must have", state["states"], self.size)
        key = Key(int(state["seed"]), int(state["time"]), int(state.get("chain", 0)))
        for own, given in zip(unpack(self.states), states, strict=True):
            own.copy_(given)
        self.key = key


def _signed_uniform(shape: Sequence[int], rng: Tensor, *, dtype: torch.dtype) -> Tensor:
    """On [−1, 1)."""
    return 2 * ops.uniform(shape, rng, dtype=dtype) - 1


def _check_shapes(shape: object) -> tuple[list[tuple[int, ...]], type | None]:
    """The shapes of a state's tensors, and what holds several: list or tuple; None for one."""
    several = isinstance(shape, (list, tuple)) and any(
        isinstance(one, Sequence) and not isinstance(one, str) for one in shape
    )
    if not several:
        return [_check_shape(shape)], None
    assert isinstance(shape, (list, tuple))
    return [_check_shape(one, f"shape[{i}]") for i, one in enumerate(shape)], (
        list if isinstance(shape, list) else tuple
    )


def _check_shape(shape: object, name: str = "shape") -> tuple[int, ...]:
    """``shape`` as a tuple of ints ≥ 0; TypeError or ValueError, by name."""
    if isinstance(shape, int):
        raise TypeError(f"{name} must be a sequence of ints, such as ({shape},), got an int")
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise TypeError(f"{name} must be a sequence of ints, got {type(shape).__name__}")
    return tuple(check_count(f"{name}[{i}]", length, 0) for i, length in enumerate(shape))
