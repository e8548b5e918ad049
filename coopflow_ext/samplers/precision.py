"""A model that computes with copies of its weights in another precision or memory layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from coopflow_ext.samplers.gradient import Gradient

# The modules whose weights autocast casts at each call. Other parameters keep their precision.
_CAST_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
                 nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # fmt: skip

_State = tuple[dict[str, Any], dict[str, Any]]  # a module's attributes and its buffers


def _casts_its_weights(module: nn.Module) -> bool:
    """Whether it does with its weights what torch's own layer does, and so casts them first. What
    computes with them by itself would do so with rounded ones."""
    kind = type(module)
    layer = next((c for c in kind.__mro__ if c in _CAST_MODULES), None)
    passes = ("forward", "_conv_forward")
    return layer is not None and all(
        getattr(kind, name, None) is getattr(layer, name, None) for name in passes
    )


class CastModel:
    """The caller's energy or score with copies of the weights of linear and convolution layers.

    Autocast would cast the same weights at every step of a chain; the copies are made once per
    chain and give the same numbers. The caller's modules are left alone, since other threads may
    use them meanwhile: those that lead to a copied weight have twins, whose own tables of
    parameters, buffers and submodules hold the same objects but for the copies and the twins. What
    a forward pass sets on a twin (a counter, a buffer) is handed on after the chain.

    Args:
        gradient: of the caller's function.
        dtype: precision of the copies; None keeps each weight's.
        channels_last: lay 4-D weights out as channels_last.

    Attributes:
        gradient: of the model that computes with the copies.
    """

    def __init__(
        self, gradient: Gradient, dtype: torch.dtype | None, *, channels_last: bool
    ) -> None:
        self._caller, self._dtype, self._channels_last = gradient, dtype, channels_last
        self._twins: dict[nn.Module, nn.Module] = {}
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._before: dict[nn.Module, _State] = {}
        self.gradient = gradient
        self.update()
        twin = None if gradient.module is None else self._twins.get(gradient.module)
        if twin is not None:
            is_method = gradient.function is not gradient.module
            function = gradient.function.__func__.__get__(twin) if is_method else twin  # type: ignore[attr-defined]
            self.gradient = gradient.of(function)

    def update(self) -> None:
        """The twins become what the caller's modules are now. Their copies still lack values."""
        known, self._twins, self._copies = self._twins, {}, []
        if self._caller.module is not None:
            self._add_twin(self._caller.module, known, set())
        self._before = {module: _state(twin) for module, twin in self._twins.items()}

    def _add_twin(
        self, module: nn.Module, known: dict[nn.Module, nn.Module], seen: set[nn.Module]
    ) -> None:
        """Twins of ``module`` and of its descendants, where they lead to a copied weight. Those
        that were ``known`` stay the same objects, or torch.compile would compile them again."""
        if module in seen:
            return
        seen.add(module)
        children = {name: child for name, child in module._modules.items() if child is not None}
        for child in children.values():
            self._add_twin(child, known, seen)
        twins = {name: self._twins[m] for name, m in children.items() if m in self._twins}
        copies = self._copies_of(module)
        if twins or copies:
            twin = known.get(module) or object.__new__(type(module))
            twin.__class__ = type(module)
            vars(twin).clear()
            vars(twin).update(
                vars(module),
                _parameters={**module._parameters, **copies},
                _buffers=dict(module._buffers),
                _modules={**module._modules, **twins},
            )
            self._twins[module] = twin

    def _copies_of(self, module: nn.Module) -> dict[str, nn.Parameter]:
        if not _casts_its_weights(module):
            return {}
        copies = {}
        for name in ("weight", "bias"):
            weight = module._parameters.get(name)
            if weight is None:
                continue
            layout = torch.preserve_format
            if self._channels_last and weight.ndim == 4:
                layout = torch.channels_last
            copy = torch.empty_like(weight, dtype=self._dtype, memory_format=layout)
            copies[name] = nn.Parameter(copy, False)
            self._copies.append((weight, copies[name]))
        return copies

    def refresh(self) -> None:
        """The copies take the weights' values: work for the device alone, which can be captured."""
        if self._copies:
            with torch.no_grad():
                for weight, copy in self._copies:
                    copy.copy_(weight)

    def hand_on(self) -> None:
        """The caller's modules take what forward passes have set on their twins."""
        for module, (attributes, buffers) in self._before.items():
            now = _state(self._twins[module])
            vars(module).update(_changed(attributes, now[0]))
            module._buffers.update(_changed(buffers, now[1]))


def _state(module: nn.Module) -> _State:
    return dict(vars(module)), dict(module._buffers)


def _changed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in after.items() if k not in before or before[k] is not v}


class CastModels:
    """The models of one sampler: a chain takes one and gives it back, so that chains of several
    threads have their own."""

    def __init__(
        self, gradient: Gradient, dtype: torch.dtype | None, *, channels_last: bool
    ) -> None:
        self._gradient, self._dtype, self._channels_last = gradient, dtype, channels_last
        self._idle: list[CastModel] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_idle": []}

    def take(self) -> CastModel:
        """A model that no other chain uses, up to date with the caller's."""
        try:
            model = self._idle.pop()
        except IndexError:
            return CastModel(self._gradient, self._dtype, channels_last=self._channels_last)
        model.update()
        return model

    def give_back(self, model: CastModel) -> None:
        """A chain is over that took it."""
        model.hand_on()
        self._idle.append(model)


def casts_for(
    gradient: Gradient, dtype: torch.dtype | None, *, channels_last: bool = False
) -> CastModels | None:
    """The models of a sampler that computes with copies of weights; None where it does not."""
    if gradient.module is None or not (dtype or channels_last):
        return None
    return CastModels(gradient, dtype, channels_last=channels_last)
