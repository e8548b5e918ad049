"""What is in a checkpoint, each tensor compared with what it is loaded into before it is used."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coopflow_ext.errors import RunError, reason

# Adam's state of one parameter, and the least that its elements may be.
_ADAM = {"step": 0.0, "exp_avg": None, "exp_avg_sq": 0.0}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A RunError inside is one about this file."""
    try:
        yield
    except RunError as error:
        raise RunError(f"{path} cannot be used: {error}") from error


class Contents:
    """The tensors of a checkpoint by name.

    A tensor that is taken has the shape and dtype of what it is meant for, and is finite: torch's
    fused optimizers, for one, write as far as a parameter reaches, whatever their state's size.
    Every method raises a RunError that names the tensor which does not fit.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, like: Tensor, *, minimum: float | None = None) -> Tensor:
        """One tensor, for which only shape and dtype of ``like`` matter."""
        self._taken.add(name)
        if name not in self:
            raise RunError(f"{name} is missing")
        tensor = self._tensors[name]
        _check_shape(name, tensor, like)
        _check_values(name, tensor, like, minimum)
        return tensor

    def take_count(self, name: str) -> int:
        """A number of something."""
        return int(self.take(name, torch.empty((), dtype=torch.int64, device="meta"), minimum=0))

    def take_state(self, prefix: str, module: nn.Module) -> dict[str, Tensor]:
        """All tensors ``prefix.NAME``, as the state of ``module``.

        Its layers translate what older versions wrote in another form while they load it: that is
        done on a copy without data, so that the result can be checked before ``module`` changes.
        """
        start = prefix + "."
        names = [name for name in self._tensors if name.startswith(start)]
        self._taken.update(names)
        state = {name.removeprefix(start): self._tensors[name] for name in names}
        expected = module.state_dict()
        for name in state.keys() & expected.keys():
            _check_shape(start + name, state[name], expected[name])
        draft = _without_data(module)
        try:
            missing, unknown = draft.load_state_dict(state, strict=False, assign=True)
        except Exception as error:  # each layer says in its own way that it cannot read a tensor
            raise RunError(f"the tensors {start}… do not fit: {reason(error)}") from error
        if missing or unknown:
            fault = f"{missing[0]} is missing" if missing else f"{unknown[0]} belongs to nothing"
            raise RunError(start + fault)
        translated = draft.state_dict()
        for name, like in expected.items():
            _check_values(start + name, translated[name], like, None)
        return translated

    def dtype_of(self, prefix: str, module: nn.Module) -> torch.dtype:
        """In which the first parameter of ``module`` is that is here as ``prefix.NAME``; float32
        where none is."""
        names = (f"{prefix}.{name}" for name, _ in module.named_parameters())
        return next((self._tensors[n].dtype for n in names if n in self), torch.float32)

    def take_averages(self, prefix: str, module: nn.Module) -> dict[str, Tensor]:
        """Averages of all parameters of ``module``, ``prefix.NAME``."""
        return {n: self.take(f"{prefix}.{n}", p) for n, p in module.named_parameters()}

    def take_adam(self, prefix: str, optimizer: torch.optim.Adam) -> dict[int, dict[str, Tensor]]:
        """Adam's state by the number of the parameter; none for one that was not updated yet."""
        scalar = torch.empty((), dtype=torch.float32, device="meta")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for index, p in enumerate(parameters):
            if any(f"{prefix}.{index}.{name}" in self for name in _ADAM):
                state[index] = {
                    name: self.take(
                        f"{prefix}.{index}.{name}", scalar if name == "step" else p, minimum=minimum
                    )
                    for name, minimum in _ADAM.items()
                }
        return state

    def check_all_taken(self) -> None:
        """RunError if there is a tensor that nothing took."""
        if unknown := sorted(self._tensors.keys() - self._taken):
            raise RunError(f"{unknown[0]} belongs to nothing")


def _check_shape(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise RunError(f"{name} must have shape {tuple(like.shape)}, got {tuple(tensor.shape)}")


def _check_values(name: str, tensor: Tensor, like: Tensor, minimum: float | None) -> None:
    if tensor.dtype != like.dtype:
        raise RunError(f"{name} must be {like.dtype}, got {tensor.dtype}")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise RunError(f"{name} must be finite")
    if minimum is not None and bool((tensor < minimum).any()):
        raise RunError(f"{name} must be ≥ {minimum:g}, got {tensor.min().item():g}")


def _without_data(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


def adam_tensors(optimizer: torch.optim.Adam, prefix: str) -> dict[str, Tensor]:
    """The state of an optimizer as named tensors, ``prefix.INDEX.NAME``: what
    :meth:`Contents.take_adam` takes."""
    return {
        f"{prefix}.{index}.{name}": torch.as_tensor(value)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
