"""The coefficients of a sampler's update, which a call may change with the number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from coopflow_ext._tensors import Coefficient
from coopflow_ext.samplers.schedule import (
    Schedule,
    chain_counts,
    coefficient,
    is_off,
    sqrt,
    with_last_row,
)


class Combined(NamedTuple):
    """What the options come to.

    Attributes:
        values: drift, noise, decay, pull, by name, those that there are; or snr.
        chain_counts: for each option that has values per chain, for how many.
    """

    values: Mapping[str, Coefficient]
    chain_counts: Mapping[str, int]


class Coefficients:
    """What the options of a sampler say about its update, for any number of steps.

    Args:
        n_steps: T of the sampler.
        given: step_size, drift, noise, temperature, those that are given; or snr alone.
        reference_std: σ; adds the decay drift/σ².
        pull: its strength; adds the pull drift·strength.
        denoise: the drift of one more step, which has no noise.
        learnable: those of ``given`` may require grad. Then ``combined`` has their values, and
            :meth:`changed` gives tables through which gradients flow, of the values they have by
            then.

    Attributes:
        combined: what the options come to at the sampler's number of steps.
        learned: names of those that require grad.

    Raises:
        ValueError, TypeError: an option is out of range or contradicts another; names it.
    """

    def __init__(
        self,
        n_steps: int,
        given: Mapping[str, Schedule],
        *,
        reference_std: float | None,
        pull: Coefficient | None,
        denoise: Coefficient | None = None,
        learnable: bool = False,
    ) -> None:
        self._given, self._reference_std, self._pull = given, reference_std, pull
        self._denoise, self._n_steps = denoise, n_steps
        self._unless = None if learnable else "differentiable=True"
        checked = self._check(given, n_steps)
        tables = {name: v for name, v in checked.items() if isinstance(v, Tensor)}
        self.learned = frozenset(name for name, table in tables.items() if table.requires_grad)
        self._checked = {**checked, **{name: table.detach() for name, table in tables.items()}}
        self.combined = self._combine(self._checked, n_steps)

    def _check(self, given: Mapping[str, Schedule], n_steps: int) -> dict[str, Coefficient]:
        with torch.enable_grad():  # as the steps run that it is for
            return {n: coefficient(n, v, n_steps, unless=self._unless) for n, v in given.items()}

    def changed(self, n_steps: int, given: Mapping[str, Schedule]) -> Combined:
        """The same with other values at a call, each of which takes the place of those of the
        sampler that fix the same.

        Args:
            n_steps: T of the call, for which ``given`` is; tables of the sampler give their first
                T rows.

        Raises:
            ValueError, TypeError: as in the constructor, and where a table is shorter than T.
        """
        checked = self._check(given, n_steps)
        gone = {name for new in checked for name in _REPLACED_BY[new]}
        kept = {name: self._for_steps(name, n_steps) for name in self._given if name not in gone}
        if "noise" in checked and "step_size" in kept:  # of which the drift remains
            kept["drift"] = _drift_of(kept.pop("step_size"))
        with torch.enable_grad():
            return self._combine({**kept, **checked}, n_steps)

    def _for_steps(self, name: str, n_steps: int) -> Coefficient:
        given, checked = self._given[name], self._checked[name]
        if callable(given) and not isinstance(given, Tensor):
            return self._check({name: given}, n_steps)[name]
        if name in self.learned:  # whose values an optimizer may have changed
            checked = self._check({name: given}, self._n_steps)[name]
        if not isinstance(checked, Tensor) or len(checked) == 1:
            return checked
        if len(checked) < n_steps:
            advice = f"; give {name} at the call too" if name in _REPLACED_BY else ""
            raise ValueError(
                f"n_steps={n_steps} needs as many values of {name}, and the sampler has "
                f"{len(checked)}{advice}"
            )
        return checked[: max(n_steps, 1)]  # also of no steps an op takes a table with a row

    def _combine(self, options: Mapping[str, Coefficient], n_steps: int) -> Combined:
        others = {"pull": self._pull, "denoise": self._denoise}
        counts = chain_counts(
            {**options, **{name: value for name, value in others.items() if value is not None}}
        )
        if "snr" in options:
            self._refuse_beside_snr(options, others)
            return Combined({"snr": options["snr"]}, counts)
        drift, noise = _drift_and_noise(options)
        if self._denoise is not None:
            drift = with_last_row(drift, n_steps, self._denoise)
            noise = noise if is_off(noise) else with_last_row(noise, n_steps, 0.0)
        values = {"drift": drift, "noise": noise}
        if self._pull is not None:
            values["pull"] = drift * self._pull
        if self._reference_std is not None:
            values["decay"] = drift / self._reference_std**2
        return Combined(values, counts)

    def _refuse_beside_snr(
        self, options: Mapping[str, Coefficient], others: Mapping[str, Coefficient | None]
    ) -> None:
        given = {**options, **others, "reference_std": self._reference_std}
        beside = [name for name, value in given.items() if name != "snr" and value is not None]
        if beside:
            raise ValueError(
                f"snr sets drift and noise from the norms of gradient and noise; give it without "
                f"{', '.join(beside)}"
            )


# Options of a sampler that one given at a call stands for.
_REPLACED_BY = {
    "step_size": ("step_size", "drift", "noise"),
    "drift": ("step_size", "drift"),
    "noise": ("noise", "temperature"),
    "temperature": ("temperature",),
}


def _drift_of(step_size: Coefficient) -> Coefficient:
    return step_size * step_size / 2


def _drift_and_noise(given: Mapping[str, Coefficient]) -> tuple[Coefficient, Coefficient]:
    """The two coefficients of an update from the options that may fix them."""
    if ("step_size" in given) == ("drift" in given):
        raise ValueError("give exactly one of step_size (drift δ²/2, noise δ) and drift, or snr")
    if "noise" in given and "step_size" in given:
        raise ValueError("noise goes with drift; step_size already fixes the noise")
    if "noise" in given and "temperature" in given:
        raise ValueError("temperature and noise both fix the scale of the noise; give one")
    if "step_size" in given:
        s = given["step_size"]
        a = _drift_of(s)
    else:
        a = given["drift"]
        s = sqrt(2 * a)
    s = given.get("noise", s)
    return a, s * sqrt(given["temperature"]) if "temperature" in given else s
