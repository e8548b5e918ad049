"""∇U of an energy, or the score as given, for the loop of a chain."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from coopflow_ext.errors import reason
from coopflow_ext.samplers.output import State, Tensors, pack

StateFunction = Callable[..., Any]

_CHANGED = (
    "energy changed its parameters during the chain, or another thread did; a sampler needs them "
    "constant"
)


def module_of(function: object) -> nn.Module | None:
    """The nn.Module that a callable is, or is a method of."""
    owner = getattr(function, "__self__", function)
    return owner if isinstance(owner, nn.Module) else None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def parameters_of(module: nn.Module | None) -> list[Tensor]:
    """The module's parameters; none without a module."""
    return [] if module is None else list(module.parameters())


def constant(parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
    """ValueError if they are changed inside. Nothing about them is touched: other threads may use
    the same module."""
    return _constant(parameters) if parameters else nullcontext()


@contextmanager
def _constant(parameters: Sequence[Tensor]) -> Iterator[None]:
    versions = [_version(p) for p in parameters]

    def changed() -> bool:
        return [_version(p) for p in parameters] != versions

    try:
        yield
        if changed():
            raise ValueError(_CHANGED)
    except RuntimeError as error:
        if changed():  # autograd noticed it first
            raise ValueError(_CHANGED) from error
        raise


def check_energy(u: object, batch: int) -> Tensor:
    """The energy's output as (B,).

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: not of shape (B,), (B, 1) or (B, 1, 1, 1), nor () where B = 1.
    """
    if not isinstance(u, Tensor):
        raise TypeError(f"energy must return a tensor, got {type(u).__name__}")
    squeezed = batch == 1 and u.ndim == 0  # of a batch of one, as squeeze() leaves it
    if u.shape not in ((batch,), (batch, 1), (batch, 1, 1, 1)) and not squeezed:
        raise ValueError(
            f"energy must return one value for each of the {batch} chains, shape ({batch},), "
            f"({batch}, 1) or ({batch}, 1, 1, 1), got shape {tuple(u.shape)}"
        )
    if not u.is_floating_point():
        raise TypeError(f"energy must return floating-point numbers, got {u.dtype}")
    return u if u.ndim == 1 else u.reshape(batch)


_DETACHED = (
    "energy returned a tensor detached from x, so it has no gradient; compute it from x "
    "without detach(), .data, numpy, no_grad or torch.func.vmap, or give score= instead"
)


def check_score(score: object, xs: Sequence[Tensor]) -> Tensors:
    """The score's output as one tensor for each tensor of the state; TypeError or ValueError."""
    if isinstance(score, Tensor):
        if len(xs) == 1 and score.shape == xs[0].shape and score.is_floating_point():
            return (score,)  # nearly every call ends here, at little cost
        score = (score,)
    scores = score
    if not isinstance(scores, (tuple, list)) or len(scores) != len(xs):
        raise TypeError(
            f"score must return {len(xs)} tensor(s), like the state, got {type(score).__name__}"
        )
    for s, x in zip(scores, xs, strict=True):
        if not isinstance(s, Tensor) or not s.is_floating_point():
            raise TypeError("score must return floating-point tensors")
        if s.shape != x.shape:
            raise ValueError(
                f"score must have the shape of x, {tuple(x.shape)}, got {tuple(s.shape)}"
            )
    return tuple(scores)


def _ones_like(u: Tensor, kept: dict[torch.dtype, Tensor] | None) -> Tensor:
    if kept is None:
        return torch.ones_like(u)
    if u.dtype not in kept:
        kept[u.dtype] = torch.ones_like(u)
    return kept[u.dtype]


def _detached(tensors: Tensors) -> Tensors:
    for tensor in tensors:
        if tensor.requires_grad:
            return tuple(t.detach() for t in tensors)
    return tensors


class Gradient:
    """Callable: the state's leaves → (gradients or scores, the energy's value or None).

    Args:
        energy: returns U, or f = −U with ``negative_energy``, whose gradient is a score.
        score: returns ∇log p; instead of energy.
        negative_energy: ``energy`` returns f.
        compile: compile the gradient (or the score) with torch.compile at the first call.

    Attributes:
        is_score: whether the gradients are those of log p.
        sign: of the energy's value: U = sign · value.
        module: the nn.Module whose parameters must stay constant, if there is one.
    """

    def __init__(
        self,
        energy: StateFunction | None,
        score: StateFunction | None,
        *,
        negative_energy: bool = False,
        compile: bool = False,
    ) -> None:
        if (energy is None) == (score is None):
            raise ValueError("give exactly one of energy and score")
        function = energy if score is None else score
        if not callable(function):
            name = "energy" if score is None else "score"
            raise TypeError(f"{name} must be callable, got {type(function).__name__}")
        if negative_energy and score is not None:
            raise ValueError("negative_energy belongs to energy, not to score")
        self.function = function
        self.has_energy = score is None
        self.is_score = score is not None or negative_energy
        self.sign = -1.0 if negative_energy else 1.0
        self.module = module_of(function)
        self._depends = True  # of the energy on x, as torch.compile found when it traced it
        self._compiled: StateFunction | None = self._compile() if compile else None

    def of(self, function: StateFunction) -> Gradient:
        """The same gradient of another function, compiled on its own."""
        other = copy(self)
        other.function, other.module = function, module_of(function)
        other._compiled = other._compile() if self._compiled is not None else None
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Without what torch.compile made, which belongs to this process."""
        return {**vars(self), "_compiled": self._compiled is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._compiled = self._compile() if state["_compiled"] else None

    def __call__(
        self,
        leaves: Tensors,
        state: State,
        model_kwargs: Mapping[str, Any],
        *,
        create_graph: bool = False,
        wants_energy: bool = True,
        ones: dict[torch.dtype, Tensor] | None = None,
    ) -> tuple[Tensors, Tensor | None]:
        """Gradients at ``state``, which is made of ``leaves`` in the caller's structure.

        Args:
            wants_energy: whether its value is asked for; a compiled gradient leaves it out if not.
            ones: where a loop keeps the gradients of ΣU with respect to U from step to step.
        """
        failed: Exception | None = None
        if self._compiled is not None and not create_graph:
            try:
                return self._call_compiled(leaves, state, model_kwargs, wants_energy)
            except Exception as error:
                failed = error
        # Where the energy itself raises, it does so here, and stays compiled.
        found = self._call_plain(leaves, state, model_kwargs, create_graph, ones)
        if failed is not None:
            self._compiled = None
            warnings.warn(
                "compile=True: torch.compile could not compile the gradient, which runs without: "
                f"{reason(failed)}",
                stacklevel=2,
            )
        return found

    def _call_plain(
        self,
        leaves: Tensors,
        state: State,
        model_kwargs: Mapping[str, Any],
        create_graph: bool,
        ones: dict[torch.dtype, Tensor] | None,
    ) -> tuple[Tensors, Tensor | None]:
        if not self.has_energy:
            scores = check_score(self.function(state, **model_kwargs), leaves)
            return scores if create_graph else _detached(scores), None
        u = check_energy(self.function(state, **model_kwargs), leaves[0].shape[0])
        if not u.requires_grad:
            raise ValueError(_DETACHED)
        # To x alone: the parameters may require gradients, and get none.
        grads = torch.autograd.grad(
            u, leaves, _ones_like(u, ones), create_graph=create_graph, allow_unused=True
        )
        if all(grad is None for grad in grads):
            raise ValueError(_DETACHED)
        for j, grad in enumerate(grads):
            if grad is None:
                raise ValueError(f"energy does not depend on tensor {j} of the state")
        return grads, u.detach()

    def _compile(self) -> StateFunction:
        def summed(
            state: State, model_kwargs: Mapping[str, Any], batch: int
        ) -> tuple[Tensor, Tensor]:
            u = check_energy(self.function(state, **model_kwargs), batch)
            self._depends = u.requires_grad  # of x: func.grad gives zeros where u does not depend
            return u.sum(), u

        def gradient(
            state: State, model_kwargs: Mapping[str, Any], batch: int, wants_energy: bool
        ) -> tuple[State, Tensor | None]:
            if not self.has_energy:
                return self.function(state, **model_kwargs), None
            grads, u = torch.func.grad(summed, has_aux=True)(state, model_kwargs, batch)
            return grads, u if wants_energy else None

        # torch.compile allows a code object few variants, and then no longer compiles it: every
        # sampler needs one of its own.
        gradient.__code__ = gradient.__code__.replace()
        return torch.compile(gradient)

    def _call_compiled(
        self,
        leaves: Tensors,
        state: State,
        model_kwargs: Mapping[str, Any],
        wants_energy: bool,
    ) -> tuple[Tensors, Tensor | None]:
        """The compiled gradient; whatever torch.compile or the energy raises."""
        assert self._compiled is not None
        plain = pack([leaf.detach() for leaf in leaves], state)
        # Without it, a gradient of the energy would be one to its parameters, too.
        grad_mode = torch.is_grad_enabled() and not self.has_energy
        with torch.set_grad_enabled(grad_mode):
            found, u = self._compiled(plain, model_kwargs, len(leaves[0]), wants_energy)
        grads = check_score(found, leaves)
        if self.has_energy and not self._depends:
            raise ValueError(_DETACHED)
        return _detached(grads), u
