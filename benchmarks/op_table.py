"""The ops of random numbers, steps, couplings and layers, once: arguments to call them with, and
how far their results may lie from those of the plain-PyTorch reference. ``tests/test_ops.py``
runs the laws over this list, and ``exercise_ops.py`` calls it under memory checkers. Ops of
whole chains, whose reference is a loop, have tests of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import coopflow_ext as cf

Arguments = dict[str, Any]

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# State, parameters.
DTYPES = ((F32, F32), (F64, F64), (BF16, BF16), (F16, F16))
MIXED_DTYPES = ((F32, BF16), (F32, F16))


class Draw:
    """Seeded random tensors for the arguments of a call on chains of one shape."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = F32,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.params_dtype = params_dtype or dtype
        self.generator = torch.Generator().manual_seed(0)

    def rng(self) -> Tensor:
        return cf.Key(0xDEADBEEF12345678, time=3, chain=11).tensor(self.device)

    def normal(self, *shape: int) -> Tensor:
        """Of the state's shape and dtype, or in float64 of another shape."""
        x = torch.randn(shape or self.shape, generator=self.generator, dtype=F64)
        return x if shape else x.to(self.device, self.dtype)

    def params(self, rows: int) -> Tensor:
        """(B, rows, …) in float64."""
        return self.normal(self.shape[0], rows, *self.shape[1:])

    def as_params(self, params: Tensor) -> Tensor:
        return params.to(self.device, self.params_dtype)


@dataclass(frozen=True)
class Bounds:
    """How far a result may lie from the reference's in float64: of float32 and float64 as a part of
    1 + |reference|, of the half-precision types, which are rounded once, in their eps.

    The reference's bisection, which ends at 1e-10, limits what a mixture's inverse can show in
    float64; tests/test_mixture_logistic.py holds it to more.
    """

    float32: float
    float64: float
    half: float = 0.52

    def of(self, dtype: torch.dtype) -> float:
        exact = {F32: self.float32, F64: self.float64}
        return exact[dtype] if dtype in exact else self.half * torch.finfo(dtype).eps


@dataclass(frozen=True)
class Op:
    """One way to call an op.

    Attributes:
        name: its face in ``coopflow_ext.ops``.
        arguments: of the face, all by name.
        bounds: one for each result.
        gradient_bounds: for gradients, as a part of their largest.
        differentiable: names of the arguments with derivatives, tensors or lists of them.
        inverse: face of the inverse map, for a coupling.
        variant: tells calls of one face apart.
    """

    name: str
    arguments: Callable[[Draw], Arguments]
    bounds: tuple[Bounds, ...]
    gradient_bounds: Bounds | None = None
    differentiable: tuple[str, ...] = ()
    inverse: str | None = None
    variant: str = ""

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name

    @property
    def is_coupling(self) -> bool:
        return self.inverse is not None

    @property
    def is_layer(self) -> bool:
        """Of a network: its input has dimensions that the drawn shape has not."""
        return self.name in ("attention", "concat_elu", "gate_add_norm", "weight_norm")

    @property
    def takes_any_strides(self) -> bool:
        return self.is_coupling or self.is_layer

    @property
    def in_place(self) -> bool:
        return self.name.endswith("_")

    @property
    def dtypes(self) -> tuple[tuple[torch.dtype, torch.dtype], ...]:
        return DTYPES + MIXED_DTYPES if self.is_coupling else DTYPES

    def __call__(self, arguments: Arguments) -> tuple[Tensor, ...]:
        """The results; an op in place is given its own copy of the state."""
        if self.in_place:
            arguments = {**arguments, "x": arguments["x"].clone()}
        return as_tuple(getattr(cf.ops, self.name)(**arguments))

    def reference(self, arguments: Arguments) -> tuple[Tensor, ...]:
        """The same in plain PyTorch and float64, on the CPU."""
        arguments = tree_map(_wide, arguments)
        if "dtype" in arguments:
            arguments["dtype"] = F64
        return as_tuple(getattr(cf.reference, self.name.removesuffix("_"))(**arguments))

    def assert_close(
        self, results: tuple[Tensor, ...], expected: tuple[Tensor, ...], slack: float = 1
    ) -> None:
        """AssertionError that names the op and the result, unless each is within its bound times
        ``slack``: bounds are of one draw, and of many the worst rounding lies further out."""
        for i, (ours, exact, bounds) in enumerate(zip(results, expected, self.bounds, strict=True)):
            bound = slack * bounds.of(ours.dtype)
            if ours.is_cuda and not self.is_coupling:
                bound = max(bound, 2e-3)  # of normals near zero: approximate logarithms near 1
            torch.testing.assert_close(
                ours.detach().cpu().double(), exact.detach(), rtol=bound, atol=bound,
                msg=lambda text, i=i: f"{self}, result {i}: {text}",
            )  # fmt: skip


def as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _wide(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.cpu()
    return value.double() if value.is_floating_point() else value


# --- random numbers -------------------------------------------------------------------------------


def _draw(draw: Draw) -> Arguments:
    return {"shape": draw.shape, "rng": draw.rng(), "step": 3, "dtype": draw.dtype}


# --- Langevin -------------------------------------------------------------------------------------


def _plain_step(draw: Draw) -> Arguments:
    return {
        "x": draw.normal(), "grad": draw.normal(), "rng": draw.rng(), "drift": 0.3, "noise": 0.1,
        "decay": 0.2, "clamp": (-1.0, 1.0), "step_clip": 0.2, "step": 2,
    }  # fmt: skip


def _full_step(draw: Draw) -> Arguments:
    batch = draw.shape[0]
    drift, noise = (draw.normal(4, batch).abs().to(draw.device) for _ in range(2))
    return {
        "x": draw.normal(), "grad": draw.normal(), "rng": draw.rng(), "drift": drift,
        "noise": noise.float(), "decay": 0.1, "pull": 0.2, "x_ref": draw.normal(),
        "is_score": True, "grad_clip": 1.5, "grad_norm": 2.0, "clamp": (-1.0, 1.0),
        "noise_when": 1, "step": 1,
    }  # fmt: skip


def _model_gradient(draw: Draw) -> Arguments:
    """A gradient that does not lie like the state, in half precision where the state is wider."""
    arguments = {**_plain_step(draw), "grad_norm": 2.0}
    grad = arguments["grad"].movedim(0, -1).contiguous().movedim(-1, 0)
    arguments["grad"] = grad if grad.dtype.itemsize == 2 else grad.bfloat16()
    return arguments


def _noise(draw: Draw) -> Arguments:
    return {"x": draw.normal(), "rng": draw.rng(), "noise": 0.1, "step": 1}


# --- attention ------------------------------------------------------------------------------------

MOST_POSITIONS = 70  # of a chain of many elements: more than a tile of every back end


def attention_of(dim: int) -> Callable[[Draw], Arguments]:
    """Two heads with a position for each element of the drawn shape's chains, and one more: of a
    single one the score has no gradient. None where there are no elements."""

    def arguments(draw: Draw) -> Arguments:
        batch, *others = draw.shape
        elements = math.prod(others)
        shape = (batch, 2, min(elements + 1, MOST_POSITIONS) if elements else 0, dim)
        q, k, v = (draw.normal(*shape).to(draw.device, draw.dtype) for _ in range(3))
        return {"q": q, "k": k, "v": v, "rng": draw.rng(), "p": 0.3, "step": 2}

    return arguments


# --- concat-ELU -----------------------------------------------------------------------------------


def _concat_elu(draw: Draw) -> Arguments:
    """Four channels, contiguous, of a position for each element of a chain."""
    batch, *others = draw.shape
    return {"x": draw.normal(batch, 4, *others).to(draw.device, draw.dtype)}


def concat_elu_with_dropout(draw: Draw) -> Arguments:
    """Six channels, innermost in memory; the mask of −x begins within a block of words."""
    batch, *others = draw.shape
    x = draw.normal(batch, *others, 6).to(draw.device, draw.dtype).movedim(-1, 1)
    return {"x": x, "rng": draw.rng(), "p": 0.3, "step": 2}


# --- gate, sum and LayerNorm ----------------------------------------------------------------------


def gate_add_norm_arguments(draw: Draw) -> Arguments:
    """Rows of the drawn shape's last dimension and five more: of two numbers a row that is normed
    says nothing but which is larger."""
    *sizes, last = draw.shape if len(draw.shape) > 1 else (*draw.shape, 0)
    shapes = {"x": (*sizes, last + 5), "gates": (*sizes, 2 * last + 10)}
    parameters = {"weight": (last + 5,), "bias": (last + 5,)}
    return {
        name: draw.normal(*shape).to(draw.device, draw.dtype)
        for name, shape in {**shapes, **parameters}.items()
    }


# --- weight norm ----------------------------------------------------------------------------------


def weight_norm_layers(draw: Draw) -> Arguments:
    """Three layers with a row for each chain, the first with rows of the drawn shape and two more
    elements: of a single one the direction has no gradient."""
    batch, *others = draw.shape
    *middle, last = others or [0]
    shapes = ((batch, *middle, last + 2), (batch, 5), (batch, 2, 1, 3))
    gains = [(batch, *[1] * (len(shape) - 1)) for shape in shapes]
    return {
        "directions": [draw.normal(*shape).to(draw.device, draw.dtype) for shape in shapes],
        "gains": [draw.normal(*shape).to(draw.device, draw.dtype) for shape in gains],
    }


# --- couplings ------------------------------------------------------------------------------------


def affine_params(draw: Draw) -> Tensor:
    """a in (-2, 2), b."""
    params = draw.params(2)
    params[:, 0].tanh_().mul_(2)
    return draw.as_params(params)


def mixture_params(components: int) -> Callable[[Draw], Tensor]:
    """a in (-1, 1), b, and a mixture without sharp components, whose tests are in
    tests/test_mixture_logistic.py."""

    def params(draw: Draw) -> Tensor:
        values = draw.params(2 + 3 * components)
        values[:, 0].tanh_()
        values[:, 2 + 2 * components :] *= 0.3
        return draw.as_params(values)

    return params


def mixture_alone(components: int) -> Callable[[Draw], Tensor]:
    """Without a and b."""
    return lambda draw: mixture_params(components)(draw)[:, 2:].contiguous()


def coupling(
    name: str,
    params: Callable[[Draw], Tensor],
    bounds: tuple[Bounds, Bounds, Bounds],
    inverse_bounds: tuple[Bounds, Bounds, Bounds],
    variant: str = "",
    **options: Any,
) -> tuple[Op, Op]:
    """A coupling and its inverse; the bounds are of the state, of ladj and of gradients."""

    def op(name: str, state: str, bounds: tuple[Bounds, ...], inverse: str) -> Op:
        return Op(
            name, lambda draw: {state: draw.normal(), "params": params(draw), **options},
            bounds[:2], bounds[2], (state, "params"), inverse, variant,
        )  # fmt: skip

    inverse = f"{name}_inverse"
    return op(name, "x", bounds, inverse), op(inverse, "y", inverse_bounds, name)


_STEP = {"bounds": (Bounds(2e-6, 1e-15),), "gradient_bounds": Bounds(5e-7, 1e-15, half=1)}
_ATTENTION: dict[str, Any] = {
    "bounds": (Bounds(1e-6, 2e-15),),
    "gradient_bounds": Bounds(2e-6, 1e-14, half=1),
    "differentiable": ("q", "k", "v"),
}
_CONCAT_ELU: dict[str, Any] = {
    "bounds": (Bounds(2e-7, 5e-16),),
    "gradient_bounds": Bounds(2e-7, 5e-16, half=1),
    "differentiable": ("x",),
}
_GATE_ADD_NORM: dict[str, Any] = {
    "bounds": (Bounds(2e-6, 4e-15),),
    "gradient_bounds": Bounds(4e-6, 1e-14, half=1),
    "differentiable": ("x", "gates", "weight", "bias"),
}
_WEIGHT_NORM: dict[str, Any] = {
    "bounds": (Bounds(5e-7, 1e-15),) * 3,
    "gradient_bounds": Bounds(2e-6, 5e-15, half=1),
    "differentiable": ("directions", "gains"),
}
_AFFINE = Bounds(4e-7, 1e-15), Bounds(1e-5, 1e-13), Bounds(4e-7, 1e-15, half=1)
_MIXTURE = "mixture_logistic_coupling"
_MIXTURE_BOUNDS = (
    (Bounds(2e-6, 5e-15), Bounds(1e-5, 1e-13), Bounds(2e-6, 5e-15, half=1)),
    (Bounds(3e-6, 2e-10), Bounds(1e-5, 2e-10), Bounds(2e-6, 2e-10, half=1)),
)

OPS: tuple[Op, ...] = (
    Op("normal", _draw, (Bounds(3e-6, 1e-15),)),
    Op("uniform", _draw, (Bounds(1e-7, 0.0),)),
    Op("langevin_step", _plain_step, **_STEP, differentiable=("x", "grad"), variant="plain"),
    Op("langevin_step", _full_step, **_STEP, differentiable=("x", "grad"), variant="full"),
    Op("langevin_step_", _plain_step, **_STEP, variant="plain"),
    Op("langevin_step_", _full_step, **_STEP, variant="full"),
    Op("langevin_step_", _model_gradient, **_STEP, variant="gradient"),
    Op("langevin_noise_", _noise, **_STEP),
    # Vectors of two lengths for which a GPU has kernels, with room left in them.
    Op("attention", attention_of(9), **_ATTENTION, variant="d9"),
    Op("attention", attention_of(40), **_ATTENTION, variant="d40"),
    Op("concat_elu", concat_elu_with_dropout, **_CONCAT_ELU, variant="dropout"),
    Op("concat_elu", _concat_elu, **_CONCAT_ELU, variant="plain"),
    Op("gate_add_norm", gate_add_norm_arguments, **_GATE_ADD_NORM),
    Op("weight_norm", weight_norm_layers, **_WEIGHT_NORM),
    *coupling("affine_coupling", affine_params, _AFFINE, _AFFINE),
    # Components that are streamed, and two numbers of them that are held in registers.
    *coupling(_MIXTURE, mixture_params(3), *_MIXTURE_BOUNDS, "K3"),
    *coupling(_MIXTURE, mixture_params(4), *_MIXTURE_BOUNDS, "K4"),
    *coupling(_MIXTURE, mixture_alone(4), *_MIXTURE_BOUNDS, "K4-alone", affine=False),
    *coupling(_MIXTURE, mixture_params(32), *_MIXTURE_BOUNDS, "K32"),
)
