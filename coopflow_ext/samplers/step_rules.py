"""What a step makes of ∇U and ξ before the op takes them: a step size from their norms, a
preconditioner, momentum. Each costs a few launches of torch's a step; a chain without them has
none of this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from coopflow_ext import ops
from coopflow_ext._tensors import Coefficient, arithmetic_dtype, flat, per_chain_view, table_row
from coopflow_ext.samplers.checks import check_constant
from coopflow_ext.samplers.output import Tensors


@dataclass(frozen=True)
class RuleOptions:
    """Those of a sampler, checked; at least one is on.

    Attributes:
        snr_over: whose norms set a step size; None: the coefficients do.
        preconditioner: the diagonal of P, positive, one for each tensor of a state, or None.
        momentum: μ, or None.
        nesterov: whether the gradient is taken ahead.
    """

    snr_over: Literal["chain", "batch"] | None = None
    preconditioner: Tensors | None = None
    momentum: float | None = None
    nesterov: bool = False

    def check_fits(self, xs: Tensors) -> None:
        """ValueError unless the preconditioner is one for the state ``xs``."""
        if self.preconditioner is None:
            return
        if len(self.preconditioner) != len(xs):
            raise ValueError(
                f"preconditioner must have {len(xs)} tensor(s), like x0, got "
                f"{len(self.preconditioner)}"
            )
        for scale, x in zip(self.preconditioner, xs, strict=True):
            sizes = zip(reversed(scale.shape), reversed(x.shape[1:]), strict=False)
            if scale.ndim >= x.ndim or any(mine not in (1, size) for mine, size in sizes):
                raise ValueError(
                    f"preconditioner must broadcast to the shape of a chain, {tuple(x.shape[1:])}, "
                    f"got {tuple(scale.shape)}"
                )

    @property
    def own_noise(self) -> bool:
        """Whether the op is given its normals."""
        return self.snr_over is not None or self.preconditioner is not None


def check_preconditioner(given: Tensor | Sequence[Tensor]) -> Tensors:
    """Copies of the diagonals; TypeError or ValueError unless they are positive tensors."""
    scales = (given,) if isinstance(given, Tensor) else given
    if not isinstance(scales, (list, tuple)) or not all(isinstance(s, Tensor) for s in scales):
        raise TypeError(
            f"preconditioner must be a tensor or a sequence of them, got {type(given).__name__}"
        )
    check_constant("preconditioner", *scales)
    for scale in scales:
        if not scale.is_floating_point():
            raise TypeError(f"preconditioner must be floating point, got {scale.dtype}")
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise ValueError("preconditioner must be finite and > 0 everywhere")
    return tuple(scale.clone() for scale in scales)


class StepRules:
    """The rules of one chain, with the buffers that its steps read.

    Attributes:
        coefficients: of the op.
        noises: normals of the step to come, for each tensor of the state; empty where the op draws
            its own.
        points: where the model takes its gradient, where that is not x itself; else empty.
    """

    def __init__(
        self,
        options: RuleOptions,
        xs: Tensors,
        coefficients: Mapping[str, Coefficient],
        *,
        is_score: bool,
        low: torch.dtype | None,
    ) -> None:
        self._options, self._xs = options, xs
        self.coefficients = dict(coefficients)
        self._snr: Coefficient | None = self.coefficients.pop("snr", None)
        wide = torch.float64 if torch.float64 in (x.dtype for x in xs) else torch.float32
        if self._snr is not None:
            for name in ("drift", "noise"):
                self.coefficients[name] = xs[0].new_zeros(1, len(xs[0]), dtype=wide)
        self.noises = tuple(map(torch.empty_like, xs)) if options.own_noise else ()
        self._scales: Tensors = ()
        if options.preconditioner is not None:
            scales = zip(options.preconditioner, xs, strict=True)
            self._scales = tuple(p.to(x.device, x.dtype).expand(x.shape[1:]) for p, x in scales)
        self._roots = tuple(scale.sqrt() for scale in self._scales)
        self._velocities: Tensors = ()
        if options.momentum is not None:
            self._velocities = tuple(map(torch.zeros_like, xs))
        self._towards = 1.0 if is_score else -1.0
        self.points: Tensors = ()
        if options.nesterov:
            self.points = tuple(torch.empty_like(x, dtype=low) for x in xs)

    def begin(self) -> None:
        """Before the first step."""
        for velocity in self._velocities:
            velocity.zero_()

    def draw(self, step: int, rngs: Tensors, xis: Tensors | None) -> None:
        """The normals of a step, N(0, P)."""
        for j, noise in enumerate(self.noises):
            xi = None if xis is None else xis[j][step]
            ops.langevin_noise_(noise.zero_(), rngs[j], noise=1.0, step=step, xi=xi)
            if self._roots:
                noise.mul_(self._roots[j])

    def look_ahead(self, step: int) -> None:
        """``points`` become x and the move of momentum alone."""
        for point, x, velocity in zip(self.points, self._xs, self._velocities, strict=False):
            drift = self.coefficients["drift"]
            rate = per_chain_view(table_row(drift, step), x) if isinstance(drift, Tensor) else drift
            assert self._options.momentum is not None
            point.copy_(x + (self._towards * self._options.momentum) * rate * velocity)

    def gradients(self, step: int, grads: Tensors) -> Tensors:
        """What the op is given in place of ∇U; sets the sizes of the step where its norm does."""
        if self._scales:
            grads = tuple(g * p for g, p in zip(grads, self._scales, strict=True))
        momentum = self._options.momentum
        if momentum is not None:
            for velocity, grad in zip(self._velocities, grads, strict=True):
                if self._options.nesterov:
                    velocity.copy_(grad)
                else:
                    velocity.mul_(momentum).add_(grad)
            grads = self._velocities
        if self._snr is not None:
            self._set_sizes(step, grads)
        return grads

    def _set_sizes(self, step: int, grads: Tensors) -> None:
        drift, noise = self.coefficients["drift"], self.coefficients["noise"]
        assert isinstance(drift, Tensor)
        assert isinstance(noise, Tensor)
        snr = self._snr
        assert snr is not None
        target = table_row(snr, step) if isinstance(snr, Tensor) else snr
        of_grad, of_noise = _norms(grads), _norms(self.noises)
        if self._options.snr_over == "batch":
            of_noise = torch.where(of_grad.isfinite(), of_noise, torch.nan)
            of_grad, of_noise = _finite_mean(of_grad), _finite_mean(of_noise)
        sizes = 2 * (target * of_noise / of_grad).square()
        # A chain at rest has no direction to go in, and stays.
        drift.copy_(torch.where(of_grad == 0, 0.0, sizes))
        torch.sqrt(2 * drift, out=noise)


def _norms(tensors: Tensors) -> Tensor:
    """L2 norm of each chain over all of its tensors, (B,)."""
    rows: list[Tensor] = [
        torch.linalg.vector_norm(flat(t), dim=1, dtype=arithmetic_dtype(t.dtype)) for t in tensors
    ]
    if len(rows) == 1:
        return rows[0]
    joint: Tensor = torch.linalg.vector_norm(torch.stack(rows), dim=0)
    return joint


def _finite_mean(norms: Tensor) -> Tensor:
    """Over the chains whose norm is finite, those that have not stopped."""
    mean: Tensor = torch.where(norms.isfinite(), norms, torch.nan).nanmean(0, keepdim=True)
    return mean
