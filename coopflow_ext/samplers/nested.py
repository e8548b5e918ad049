"""Tensors inside of dicts, lists and tuples: the arguments of an energy beside x."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from copy import copy
from typing import Any

from torch import Tensor


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with each of its tensors replaced, in containers of the same types.

    A container none of whose tensors changes is kept, and so is anything that is neither a
    tensor nor a dict, list or tuple.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        items = {key: map_tensors(function, item) for key, item in value.items()}
        if all(items[key] is value[key] for key in items):
            return value
        mapped = copy(value)
        mapped.update(items)
        return mapped
    if isinstance(value, (list, tuple)):
        row = [map_tensors(function, item) for item in value]
        if all(new is old for new, old in zip(row, value, strict=True)):
            return value
        return type(value)(*row) if hasattr(value, "_fields") else type(value)(row)
    return value


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of ``value``, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)


def structure_of(value: Any) -> Hashable:
    """What ``value`` is apart from its tensors; hashable where everything else in it is."""
    if isinstance(value, Tensor):
        return Tensor
    if isinstance(value, dict):
        return type(value), tuple((key, structure_of(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(structure_of(item) for item in value)
    return type(value), value
