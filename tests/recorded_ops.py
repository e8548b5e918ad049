"""What a CUDA graph does, on the CPU: the operators of some work, done again on the same memory.

Numbers of Python are what they were in the recording, as in a graph; so what a replay gets wrong
because something came from Python and not from a tensor is seen without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from coopflow_ext._recording import CaptureError, Recording, cutting
from coopflow_ext.autocast import full_precision, uncached_casts

# What looks at a value on the host, which a stream that is being captured cannot.
HOST_READS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any] | Callable[[], object]] = []  # or a cut's work
        self.made: set[int] = set()  # storages that the work itself has allocated
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.kept: list[Tensor] = []  # so that no storage's number is given to another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in HOST_READS:
            raise RuntimeError(f"{func._schema.name} reads a value on the host")
        for name, given in self._arguments(func, args, kwargs):
            if name.alias_info is not None and name.alias_info.is_write:
                for tensor in _tensors(given):
                    self._save(tensor)
        out = func(*args, **kwargs)
        known = {_storage(t) for t in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            self.kept.append(tensor)
            if _storage(tensor) not in known:
                self.made.add(_storage(tensor))
        self.kept += _tensors((args, kwargs))
        self.ops.append((func, args, kwargs, out))
        return out

    @staticmethod
    def _arguments(func: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
        schema = func._schema.arguments
        named = [(a, kwargs[a.name]) for a in schema if a.name in kwargs]
        return [*zip(schema, args, strict=False), *named]

    def _save(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if _storage(tensor) not in self.made | self.before.keys():
            self.before[_storage(tensor)] = (storage, storage.clone())


class RecordedOps(Recording):
    """Operators in the place of graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.pieces: dict[Any, list[tuple[Any, Any, Any, Any] | Callable[[], object]]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self.pieces

    def add(self, name: Any, run: Any, *, warm_up: Any) -> None:
        """Nothing is changed by it, as a capture executes nothing."""
        recorder = _Recorder()
        try:
            with uncached_casts("cpu"):
                warm_up()
                with recorder, cutting(recorder.ops.append):
                    run()
        except RuntimeError as error:
            raise CaptureError(str(error)) from error
        finally:
            for storage, values in recorder.before.values():
                storage.copy_(values)
        self.pieces[name] = recorder.ops

    @torch.no_grad()
    def replay(self, name: Any) -> None:
        with full_precision("cpu"):  # the casts are among the operators
            self._replay(name)

    def _replay(self, name: Any) -> None:
        for op in self.pieces[name]:
            if callable(op):
                op()
                continue
            func, args, kwargs, out = op
            known = {_storage(t) for t in _tensors((args, kwargs))}
            if all(_storage(t) in known for t in _tensors(out)) and not func._schema.is_mutable:
                continue  # views of what is there
            again = func(*args, **kwargs)
            for mine, new in zip(_tensors(out), _tensors(again), strict=True):
                if _storage(mine) not in known:
                    mine.copy_(new)

    def forget(self, name: Any) -> None:
        del self.pieces[name]

    def wait(self) -> None: ...

    def release(self) -> None: ...

    def finish(self) -> None: ...
