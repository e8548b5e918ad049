"""What running a module changes beside its result, and what it depends on: buffers, the generators
it draws from, its mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ModelState:
    """A module's buffers and torch's generators as they are now, to be brought back.

    A module may also put a tensor into other memory (``u.data = …``, as some spectral norms do) or
    another tensor in its place; both are undone. What else it sets on itself in Python is not.

    Args:
        module: what runs, or None for a plain callable: generators alone.
        device: whose generator may be drawn from, beside the CPU's.
    """

    def __init__(self, module: nn.Module | None, device: torch.device) -> None:
        self._device = device
        self._random = random_state(device)
        self._buffers: list[tuple[_Place, Tensor]] = []
        self._parameters: list[_Place] = []
        for path, owner in [] if module is None else module.named_modules():
            prefix = f"{path}." if path else ""
            for name, tensor in owner._buffers.items():
                if tensor is not None:
                    place = _Place(prefix + name, owner._buffers, name, tensor)
                    self._buffers.append((place, tensor.detach().clone()))
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    place = _Place(prefix + name, owner._parameters, name, parameter)
                    self._parameters.append(place)

    def moved(self) -> list[str]:
        """Names of the tensors that are no longer where they were in memory."""
        places = [place for place, _ in self._buffers] + self._parameters
        return [place.path for place in places if place.left()]

    def restore(self, *, if_changed: bool = False) -> None:
        """Everything as it was. ``if_changed``: buffers that are as they were are not written, for
        graphs that have them; that reads them on the host."""
        with torch.no_grad():
            for place in self._parameters:
                place.put_back()
            for place, values in self._buffers:
                place.put_back()
                if not (if_changed and torch.equal(place.alias, values)):
                    place.alias.copy_(values)
        set_random_state(self._random, self._device)


class _Place:
    """Where a module has one of its tensors: under which name, and where in memory."""

    def __init__(self, path: str, table: dict[str, Any], name: str, tensor: Tensor) -> None:
        self.path, self._table, self._name, self._tensor = path, table, name, tensor
        # It stays at this place, whatever ``tensor.data`` becomes. Its version is its own: what is
        # brought back has not changed, for those that go by the tensor's.
        self.alias = tensor.data

    def left(self) -> bool:
        now = self._table.get(self._name)
        return now is None or now.data_ptr() != self.alias.data_ptr()

    def put_back(self) -> None:
        if self._tensor.data_ptr() != self.alias.data_ptr():
            self._tensor.data = self.alias
        self._table[self._name] = self._tensor


@contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode inside; afterwards each module in it has the mode it had."""
    modes = [(m, m.training) for m in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def random_state(device: torch.device) -> tuple[Tensor, ...]:
    """State of the generators that a module may draw from (dropout)."""
    cpu = torch.get_rng_state()
    return (cpu, torch.cuda.get_rng_state(device)) if device.type == "cuda" else (cpu,)


def set_random_state(state: tuple[Tensor, ...], device: torch.device) -> None:
    """The inverse of :func:`random_state`."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1], device)
