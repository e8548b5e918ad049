"""Calls of every op, for every storage type, width and option that chooses another kernel.

A case makes its inputs of a dtype and a shape, aligned or not, calls `cf.ops`, and returns the
results by name. The same call runs on the CPU ops and on the emulated CUDA kernels. Results are
equal bit by bit, unless their name says that they are sums, or depend on one: those agree to
rounding; or that small terms are in them: an exponential below 2^-110 is anything up to that on the
CPU, and on a GPU zero where it underflows; or that they are taken in bfloat16, which a CPU does not
do: those agree to the error of a few steps, which tests of the op measure.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

import coopflow_ext as cf
from coopflow_ext.ops import _call
from cuda_emulation.harness import misaligned

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Empty; one element; tails of an item; a warp and a block per chain; one and several chunks of a
# sum; more chains and more items than the grid has blocks and threads.
SHAPES = (
    (0, 5), (3, 0), (1, 1), (3, 2), (5, 4), (3, 5), (2, 127), (40, 8), (3, 512), (2, 519),
    (2, 16391), (1, 32776), (9, 1031),
)  # fmt: skip
# What reaches every kernel: a length that fills its items and one that does not, for chains that a
# thread, a warp or a block holds, the last with few registers and with many, and for longer ones;
# and that of the cases of one shape.
COVERING_SHAPES = (
    (3, 5), (2, 8), (2, 7), (2, 16), (2, 15), (1, 520), (1, 519), (1, 4104), (1, 4103), (1, 16392),
    (1, 16391),
)  # fmt: skip

Results = dict[str, Tensor]
Case = Callable[["Inputs"], Results]


class Inputs:
    """Seeded random tensors of one dtype and shape, aligned or not.

    With `alone`, all are aligned but the one of this number, in the order of their making.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        aligned: bool = True,
        *,
        alone: int | None = None,
    ) -> None:
        self.dtype, self.shape, self.aligned, self.alone = dtype, shape, aligned, alone
        self.placed = 0
        self.generator = torch.Generator().manual_seed(7)
        self.rng = cf.Key(5, time=11, chain=7).tensor()

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def place(self, x: Tensor) -> Tensor:
        aligned = self.aligned and self.placed != self.alone
        self.placed += 1
        return x if aligned else misaligned(x)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape or self.shape, generator=self.generator, dtype=torch.float64)
        return self.place(x.to(dtype or self.dtype))

    def poisoned(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.place(torch.full(shape or self.shape, torch.nan, dtype=dtype))


def _filled(inputs: Inputs, op: str) -> Tensor:
    """normal_ and uniform_ write into a given tensor only as raw ops; the faces allocate it."""
    if inputs.aligned:
        call = getattr(cf.ops, op)
        out: Tensor = call(inputs.shape, inputs.rng, step=3, dtype=inputs.dtype)
        return out
    out = inputs.poisoned(dtype=inputs.dtype)
    getattr(_call.coopflow, f"{op}_")(out, inputs.rng, step=3)
    return out


def random_numbers(inputs: Inputs) -> Results:
    return {op: _filled(inputs, op) for op in ("normal", "uniform")}


def langevin_plain(inputs: Inputs) -> Results:
    x, grad = inputs.normal(), inputs.normal()
    options = {"drift": 0.3, "noise": 0.1, "step_clip": 0.2, "clamp": (-1.0, 1.0), "step": 2}
    out = cf.ops.langevin_step(x, grad, inputs.rng, **options)
    cf.ops.langevin_step_(x, grad, inputs.rng, is_score=True, **options)
    batch = inputs.shape[0]
    moved, grad = inputs.normal(), _with_one_infinite(grad)
    active, frozen_at = torch.ones(batch, dtype=torch.bool), torch.full((batch,), 99)
    bound = cf.ops.BoundStep(
        drift=0.3, noise=0.1, decay=0.2, is_score=True, grad_clip=1.5, step_clip=0.2,
        clamp=(-1.0, 1.0), active=active, freeze_nonfinite=True, frozen_at=frozen_at,
    )  # fmt: skip
    bound.in_place(moved, inputs.rng)(grad, 2)
    return {
        "functional": out, "in place": x, "chain's": moved, "active": active,
        "frozen_at": frozen_at,
    }  # fmt: skip


def _tables(inputs: Inputs) -> dict[str, Tensor]:
    batch = inputs.shape[0]
    return {
        "drift": torch.linspace(0.1, 0.5, 3 * batch, dtype=torch.float64).view(3, batch),
        "noise": torch.linspace(0.1, 0.2, 3).view(3, 1),
        "decay": torch.linspace(0.0, 0.1, batch).view(1, batch),
    }


def langevin_full(inputs: Inputs) -> Results:
    x, grad, x_ref = inputs.normal(), inputs.normal(), inputs.normal()
    x_low = inputs.poisoned(dtype=torch.bfloat16)
    options = {
        **_tables(inputs), "pull": 0.2, "x_ref": x_ref, "grad_clip": 1.5,
        "clamp": (-1.0, 1.0), "noise_when": 1, "step": 1,
    }  # fmt: skip
    cf.ops.langevin_step_(x, grad, inputs.rng, **options, x_low=x_low)
    return {"x": x, "x_low": x_low}


def langevin_grad_norm(inputs: Inputs) -> Results:
    x, grad = inputs.normal(), inputs.normal()
    cf.ops.langevin_step_(x, grad, inputs.rng, drift=0.3, noise=0.1, grad_norm=2.0, grad_clip=1.5)
    return {"x (after a sum)": x}


def langevin_gradients(inputs: Inputs) -> Results:
    """Gradients that do not lie like the state, or are of a model's half precision."""
    spread = inputs.normal().movedim(0, -1).contiguous().movedim(-1, 0)
    one_row = inputs.normal(1, inputs.shape[1])
    gradients = {"batch innermost": spread, "of one chain": one_row.expand(inputs.shape)}
    if inputs.dtype in (torch.float32, torch.float64):
        gradients["bfloat16"] = inputs.normal(dtype=torch.bfloat16)
        gradients["float16, spread"] = spread.half()
    batch = inputs.shape[0]
    results = {}
    for name, grad in gradients.items():
        x, active = inputs.normal(), torch.ones(batch, dtype=torch.bool)
        stats = inputs.poisoned(batch, 5, dtype=inputs.sum_dtype)
        results[f"{name}: plain"] = cf.ops.langevin_step(
            x, grad, inputs.rng, drift=0.3, noise=0.1, clamp=(-1.0, 1.0)
        )
        cf.ops.langevin_step_(
            x, grad, inputs.rng, drift=0.3, noise=0.1, is_score=True, active=active,
            freeze_nonfinite=True, stats=stats,
        )  # fmt: skip
        results[f"{name}: x"] = x
        results[f"{name}: stats (sum)"] = stats
    return results


def langevin_given_noise(inputs: Inputs) -> Results:
    x, grad, xi = inputs.normal(), inputs.normal(), inputs.normal()
    x_low = inputs.poisoned(dtype=torch.float16)
    cf.ops.langevin_step_(x, grad, inputs.rng, drift=0.3, noise=0.1, xi=xi, x_low=x_low)
    return {"x": x, "x_low": x_low}


def langevin_no_noise(inputs: Inputs) -> Results:
    x, grad = inputs.normal(), inputs.normal()
    cf.ops.langevin_step_(x, grad, inputs.rng, drift=0.3, noise=0.1, decay=0.1, noise_when=2)
    return {"x": x}


def _with_one_infinite(grad: Tensor) -> Tensor:
    """The last element of the middle chain."""
    if grad.numel():
        grad.view(grad.shape[0], -1)[grad.shape[0] // 2, -1] = torch.inf
    return grad


def langevin_frozen(inputs: Inputs) -> Results:
    """Chains are switched off by their gradient, without statistics."""
    x, grad = inputs.normal(), _with_one_infinite(inputs.normal())
    active = torch.ones(inputs.shape[0], dtype=torch.bool)
    cf.ops.langevin_step_(
        x, grad, inputs.rng, drift=0.3, noise=0.1, active=active, freeze_nonfinite=True
    )
    return {"x": x, "active": active}


def langevin_full_statistics(inputs: Inputs) -> Results:
    """Statistics beside the other options; those of a state without its pending noise."""
    x, grad, x_ref, xi = (inputs.normal() for _ in range(4))
    x_low = inputs.poisoned(dtype=torch.bfloat16)
    stats = inputs.poisoned(inputs.shape[0], 5, dtype=inputs.sum_dtype)
    cf.ops.langevin_step_(
        x, grad, inputs.rng, **_tables(inputs), pull=0.2, x_ref=x_ref, step_clip=0.2,
        clamp=(-1.0, 1.0), noise_when=1, step=1, xi=xi, x_low=x_low, stats=stats,
    )  # fmt: skip
    return {"x": x, "x_low": x_low, "stats (sum)": stats}


def langevin_statistics(inputs: Inputs) -> Results:
    x, grad = inputs.normal(), _with_one_infinite(inputs.normal())
    batch = inputs.shape[0]
    active = torch.arange(batch) % 3 != 1
    frozen_at = torch.full((batch,), 99)
    stats = inputs.poisoned(batch, 5, dtype=inputs.sum_dtype)
    cf.ops.langevin_step_(
        x, grad, inputs.rng, drift=0.3, noise=0.1, grad_clip=1.0, clamp=(-1.0, 1.0),
        stats=stats, active=active, freeze_nonfinite=True, frozen_at=frozen_at,
    )  # fmt: skip
    return {"x": x, "active": active, "frozen_at": frozen_at, "stats (sum)": stats}


def langevin_noise(inputs: Inputs) -> Results:
    x = inputs.normal()
    cf.ops.langevin_noise_(x, inputs.rng, noise=0.5, active=torch.arange(inputs.shape[0]) % 2 == 0)
    return {"x": x}


def _affine(
    inputs: Inputs,
    name: str,
    params_dtype: torch.dtype,
    spoil: Callable[[Tensor, Tensor], None] | None = None,
) -> Results:
    x = inputs.normal()
    params = inputs.normal(inputs.shape[0], 2, *inputs.shape[1:], dtype=params_dtype)
    params.tanh_()
    if spoil is not None:
        spoil(x, params)
    x.requires_grad_()
    params.requires_grad_()
    out, ladj = getattr(cf.ops, name)(x, params)
    grad_out = inputs.normal()
    grad_ladj = inputs.normal(inputs.shape[0], dtype=inputs.sum_dtype)
    torch.autograd.backward((out, ladj), (grad_out, grad_ladj))
    assert x.grad is not None
    assert params.grad is not None
    return {
        "out": out.detach(),
        "ladj (sum)": ladj.detach(),
        "x.grad": x.grad,
        "params.grad": params.grad,
    }


NOT_FINITE = (torch.nan, torch.inf, -torch.inf)


def _one_shape(inputs: Inputs, batch: int) -> Inputs | None:
    """What does not depend on the shape runs at one of them: chains of two elements."""
    if inputs.shape != (3, 5) or not inputs.aligned:
        return None
    return Inputs(inputs.dtype, (batch, 2))


def langevin_not_finite(inputs: Inputs) -> Results:
    """NaN and infinity in the state and in the gradient, with every limit and without."""
    one_shape = _one_shape(inputs, 2 * len(NOT_FINITE))
    if one_shape is None:
        return {}
    limits = {"grad_clip": 1.0, "step_clip": 0.2, "clamp": (-1.0, 1.0)}
    results = {}
    for name, options in {"free": {}, "limited": limits, "scaled": {"grad_norm": 2.0}}.items():
        x, grad = one_shape.normal(), one_shape.normal()
        for chain, value in enumerate(NOT_FINITE):
            x[chain, 0] = grad[len(NOT_FINITE) + chain, 0] = value
        results[name] = cf.ops.langevin_step(
            x, grad, inputs.rng, drift=0.3, noise=0.1, decay=0.1, **options
        )
    return results


def _mlp_chain(
    inputs: Inputs,
    batch: int,
    widths: tuple[int, ...],
    op: str = "mlp_langevin_chain",
    **options: object,
) -> Results:
    """Chains of a network. `x_ref` and `xi` are drawn where they are named."""
    d = inputs.shape[1]
    sizes = (d, *widths, 1)
    weights = [inputs.normal(n, m).mul_(m**-0.5) for m, n in itertools.pairwise(sizes)]
    biases = [inputs.normal(n) for n in sizes[1:]]
    moves = {"drift": 0.3, "noise": 0.1} if op == "mlp_langevin_chain" else {}
    given = {"activation": "silu", "n_steps": 3, **moves, **options}
    shapes = {"x_ref": (batch, d), "xi": (3, batch, d)}
    drawn = [name for name in shapes if given.get(name) is True]
    given |= {name: inputs.normal(*shapes[name]) for name in drawn}
    x0 = inputs.normal(batch, d)
    result = getattr(cf.ops, op)(x0, weights, biases, inputs.rng, **given)
    return {name: value for name, value in result._asdict().items() if value is not None}


BFLOAT16_TOLERANCE = 0.02  # absolute and relative

# A tile of 8, 16 and 32 chains on the emulation's devices of few blocks, the last with a tail.
MLP_BATCHES = (3, 20, 57)


def _mlp_inputs(inputs: Inputs) -> Inputs | None:
    """Networks run in float32, with few elements; their batches are their own."""
    d = inputs.shape[1]
    return inputs if inputs.dtype == torch.float32 and 0 < d <= 36 else None


def mlp_chain(inputs: Inputs) -> Results:
    """Tiles of every size, one layer and four, widths that fill nothing and that fill a warp."""
    if _mlp_inputs(inputs) is None:
        return {}
    results = {}
    for batch, widths in zip(MLP_BATCHES, ((5,), (20, 9), (16, 1, 33, 7)), strict=True):
        results[str(batch)] = _mlp_chain(inputs, batch, widths, thin=2)
    return _joined(results)


def mlp_chain_options(inputs: Inputs) -> Results:
    """Everything beside the plain path, and given noise."""
    if _mlp_inputs(inputs) is None:
        return {}
    results = {}
    for batch in MLP_BATCHES:
        tables = {
            "drift": torch.linspace(0.1, 0.5, 5 * batch, dtype=torch.float64).view(5, batch),
            "noise": torch.linspace(0.1, 0.2, 5).view(5, 1),
        }
        results[f"{batch}, tables"] = _mlp_chain(
            inputs, batch, (20, 9), **tables, step=2, decay=0.1, pull=0.2, x_ref=True,
            grad_norm=0.7, grad_clip=0.5, clamp=(-1.0, 1.0), negative_energy=True, thin=1,
            stats=True, freeze_nonfinite=True,
        )  # fmt: skip
        results[f"{batch}, xi"] = _mlp_chain(inputs, batch, (9,), xi=True, stats=True)
        results[f"{batch}, no noise"] = _mlp_chain(inputs, batch, (9,), noise=0.0, clamp_end=True)
    return _joined(results)


def mlp_chain_activations(inputs: Inputs) -> Results:
    if inputs.shape != (3, 5) or _mlp_inputs(inputs) is None:
        return {}
    names = ("silu", "relu", "leaky_relu", "elu", "tanh", "softplus", "gelu", "gelu_tanh")
    return _joined({name: _mlp_chain(inputs, 9, (20, 9), activation=name) for name in names})


def mlp_chain_not_finite(inputs: Inputs) -> Results:
    """NaN and infinity in the state and in each layer, whose chains stop or go on."""
    if inputs.shape != (3, 5) or _mlp_inputs(inputs) is None:
        return {}
    results = {}
    for layer, value in itertools.product(range(3), NOT_FINITE):
        weights = [inputs.normal(9, 5), inputs.normal(7, 9), inputs.normal(1, 7)]
        biases = [inputs.normal(9), inputs.normal(7), inputs.normal(1)]
        x0 = inputs.normal(9, 5)
        x0[3, 1] = value
        biases[layer][0] = value if layer < 2 else 0.0
        for freeze in (True, False):
            result = cf.ops.mlp_langevin_chain(
                x0, weights, biases, inputs.rng, activation="tanh", n_steps=2, drift=0.3,
                noise=0.1, freeze_nonfinite=freeze, stats=True,
            )  # fmt: skip
            results[f"{layer}, {value}, {freeze}"] = {
                name: t for name, t in result._asdict().items() if t is not None
            }
    return _joined(results)


def mlp_chain_bfloat16(inputs: Inputs) -> Results:
    """Products on tensor cores: tiles of every size, two layers to four, widths that fill nothing
    and that fill fragments, plain steps and all that stands beside them."""
    if _mlp_inputs(inputs) is None:
        return {}
    plain = {"thin": 2, "bfloat16": True}
    options = {
        "grad_norm": 0.7, "decay": 0.1, "pull": 0.2, "x_ref": True, "xi": True, "thin": 1,
        "stats": True, "freeze_nonfinite": True, "bfloat16": True,
    }  # fmt: skip
    results = {
        "8": _mlp_chain(inputs, 3, (16, 5, 17, 7), **plain),
        "16": _mlp_chain(inputs, 20, (20, 9), **plain),
        "8, options": _mlp_chain(inputs, 3, (5, 3, 16), **options),
        "32, options": _mlp_chain(inputs, 57, (9, 7), **options),
    }
    return {f"{name} (bfloat16)": value for name, value in _joined(results).items()}


def mlp_chain_bfloat16_not_finite(inputs: Inputs) -> Results:
    """NaN and infinity in the state and in each layer: each chain's are its own."""
    if inputs.shape != (3, 5) or _mlp_inputs(inputs) is None:
        return {}
    results = {}
    for layer, value in itertools.product(range(3), NOT_FINITE):
        weights = [inputs.normal(9, 5), inputs.normal(17, 9), inputs.normal(1, 17)]
        biases = [inputs.normal(9), inputs.normal(17), inputs.normal(1)]
        x0 = inputs.normal(9, 5)
        x0[3, 1] = value
        weights[layer][0, 0] = value if layer < 2 else 0.0
        result = cf.ops.mlp_langevin_chain(
            x0, weights, biases, inputs.rng, activation="relu", n_steps=1, drift=0.01,
            freeze_nonfinite=layer == 2, bfloat16=True,
        )  # fmt: skip
        results[f"{layer}, {value}"] = {"x": result.x, "frozen_at": result.frozen_at}
    return {f"{name} (bfloat16)": value for name, value in _joined(results).items()}


def _joined(results: dict[str, Results]) -> Results:
    return {f"{call}: {name}": t for call, of in results.items() for name, t in of.items()}


def affine_coupling(inputs: Inputs) -> Results:
    return _affine(inputs, "affine_coupling", inputs.dtype)


def affine_coupling_inverse(inputs: Inputs) -> Results:
    return _affine(inputs, "affine_coupling_inverse", inputs.dtype)


def affine_coupling_not_finite(inputs: Inputs) -> Results:
    """NaN and infinity in the state, a and b."""
    one_shape = _one_shape(inputs, 3 * len(NOT_FINITE))
    if one_shape is None:
        return {}

    def spoil(x: Tensor, params: Tensor) -> None:
        for i, value in enumerate(NOT_FINITE):
            x[i, 0] = params[3 + i, 0, 0] = params[6 + i, 1, 0] = value

    return {
        f"{name}: {key}": value
        for name in ("affine_coupling", "affine_coupling_inverse")
        for key, value in _affine(one_shape, name, inputs.dtype, spoil).items()
    }


def affine_coupling_mixed(inputs: Inputs) -> Results:
    """Half-precision parameters beside a float32 state."""
    if inputs.dtype != torch.float32:
        return {}
    results = {}
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("affine_coupling", "affine_coupling_inverse"):
            for key, value in _affine(inputs, name, dtype).items():
                results[f"{name}, {dtype}: {key}"] = value
    return results


# Empty; one position; rows of weights that begin with a block of words and such that do not; more
# positions than a tile of scores has. A block computes whole tiles, which costs time here.
ATTENTION_SHAPES = ((0, 5), (3, 0), (1, 1), (2, 7), (3, 5), (2, 16391))
MOST_POSITIONS = 70


def _attention(
    inputs: Inputs,
    shape: tuple[int, ...],
    p: float,
    spoil: Callable[[tuple[Tensor, ...]], None] | None = None,
    *,
    dtype: torch.dtype | None = None,
    **options: float,
) -> Results:
    """Narrow results are sums that were rounded, those of bfloat16 of rounded terms."""
    dtype = dtype or inputs.dtype
    given = tuple(inputs.normal(*shape, dtype=dtype) for _ in range(3))
    if spoil is not None:
        spoil(given)
    q, k, v = (t.requires_grad_() for t in given)
    out = cf.ops.attention(q, k, v, inputs.rng, p, **options)
    out.backward(inputs.normal(*shape, dtype=dtype))
    results = {"out": out, "q.grad": q.grad, "k.grad": k.grad, "v.grad": v.grad}
    kinds = {torch.bfloat16: "(bfloat16)", torch.float16: "(after a sum)"}
    how = kinds.get(dtype, "(sum)")
    return {f"{shape}: {name} {how}": t.detach() for name, t in results.items() if t is not None}


def attention(inputs: Inputs) -> Results:
    """Vectors of both lengths that kernels are made for, with room and full. Accesses that need
    alignment are in the next case."""
    if inputs.shape not in ATTENTION_SHAPES or not inputs.aligned:
        return {}
    batch, length = inputs.shape
    if length > MOST_POSITIONS:
        return _attention(inputs, (1, 1, MOST_POSITIONS, 20), 0.3)
    results = _attention(inputs, (2 if batch == 3 else min(batch, 1), 2, length, 20), 0.3, step=3)
    if batch < 3:
        results |= _attention(inputs, (min(batch, 1), 1, length, 64), 0.6, scale=-0.1)
    return results


def attention_bfloat16(inputs: Inputs) -> Results:
    """Vectors that fill words of 16 bytes and such that do not, few positions and more than a tile
    of scores has, rows of weights that begin with a block of words and such that do not."""
    lengths = {(2, 7): (7, 16), (2, 8): (20, 8), (3, 5): (5, 20), (2, 16391): (68, 24)}
    if inputs.dtype != torch.float32 or inputs.shape not in lengths:
        return {}
    length, dim = lengths[inputs.shape]
    return _attention(inputs, (1, 2, length, dim), 0.3, dtype=torch.bfloat16)


def attention_not_finite(inputs: Inputs) -> Results:
    """NaN and infinity in a row of queries, keys, values; a row whose scores are all the same."""
    if _one_shape(inputs, 1) is None:
        return {}
    results = {}
    for which in range(3):

        def spoil(given: tuple[Tensor, ...], which: int = which) -> None:
            for chain, value in enumerate(NOT_FINITE):
                given[which][chain, 0, 2, 1] = value
            given[0][:, :, 3] = 0

        found = _attention(inputs, (len(NOT_FINITE), 1, 5, 8), 0.3, spoil)
        results |= {f"{which}: {name}": value for name, value in found.items()}
    return results


MOST_OF_A_ROW = 1031


def _concat_elu(
    inputs: Inputs,
    *,
    channels_last: bool,
    dropout: bool,
    spoil: Callable[[Tensor], None] | None = None,
) -> Results:
    """Three channels of so many positions as a chain has elements, or three positions of so many
    channels. The derivative by the raw op, since the result is one of its inputs."""
    batch, length = inputs.shape
    double = (batch, 3, 2 * length) if channels_last else (batch, 6, length)
    options = (inputs.rng, 0.4, 3) if dropout else (None, 0.0, 0)

    def laid(memory: Tensor) -> Tensor:
        return memory.movedim(1, -1) if channels_last else memory

    x = inputs.normal(batch, 3, length)
    if spoil is not None:
        spoil(x)
    y = _call.coopflow.concat_elu(laid(x), *options)
    memory = y.movedim(-1, 1) if channels_last else y
    grad_x = _call.coopflow.concat_elu_backward(
        laid(inputs.normal(*double)), laid(inputs.place(memory)), *options
    )
    what = f"channels_last={channels_last}, dropout={dropout}"
    return {f"{what}: y": y, f"{what}: grad_x": grad_x}


def concat_elu(inputs: Inputs) -> Results:
    """Items that fill rows and that do not; items within a channel and across two or more."""
    if inputs.shape[1] > MOST_OF_A_ROW:
        return {}
    results = {}
    for channels_last, dropout in itertools.product((False, True), (False, True)):
        results |= _concat_elu(inputs, channels_last=channels_last, dropout=dropout)
    return results


def concat_elu_not_finite(inputs: Inputs) -> Results:
    """NaN, infinities and zeros in channels that are kept and in such that are dropped."""
    one_shape = _one_shape(inputs, 8)
    if one_shape is None:
        return {}

    def spoil(x: Tensor) -> None:
        for i, value in enumerate((*NOT_FINITE, 0.0, -0.0)):
            x[i::5] = value

    results = {}
    for channels_last in (False, True):
        results |= _concat_elu(one_shape, channels_last=channels_last, dropout=True, spoil=spoil)
    return results


def _gate_add_norm(
    inputs: Inputs, rows: int, channels: int, spoil: Callable[[Tensor, Tensor], None] | None = None
) -> Results:
    """All results depend on sums."""
    x, gates = inputs.normal(rows, channels), inputs.normal(rows, 2 * channels)
    if spoil is not None:
        spoil(x, gates)
    parameters = [inputs.normal(channels, dtype=inputs.sum_dtype) for _ in range(2)]
    leaves = [t.requires_grad_() for t in (x, gates, *parameters)]
    y = cf.ops.gate_add_norm(*leaves)
    grads = torch.autograd.grad(y, leaves, inputs.normal(rows, channels))
    how = "(after a sum)" if inputs.dtype.itemsize == 2 else "(sum)"
    names = ("y", "grad_x", "grad_gates")
    results = {f"{name} {how}": t.detach() for name, t in zip(names, (y, *grads), strict=False)}
    return {**results, "grad_weight (sum)": grads[2], "grad_bias (sum)": grads[3]}


def gate_add_norm(inputs: Inputs) -> Results:
    """Rows that wide accesses fill and such that they do not."""
    return _gate_add_norm(inputs, *inputs.shape)


def gate_add_norm_parts(inputs: Inputs) -> Results:
    """Parameters whose gradients have several parts, with more channels than a warp has lanes."""
    one_shape = _one_shape(inputs, 1)
    return {} if one_shape is None else _gate_add_norm(one_shape, 300, 40)


def gate_add_norm_not_finite(inputs: Inputs) -> Results:
    """Values and gates with NaN and infinity, and gates that are shut and open."""
    one_shape = _one_shape(inputs, 1)
    if one_shape is None:
        return {}

    def spoil(x: Tensor, gates: Tensor) -> None:
        for row, value in enumerate(NOT_FINITE):
            x[row, 1] = value
            gates[len(NOT_FINITE) + row, 2] = value
        gates[-1, -2:] = torch.tensor([-1e4, 1e4])

    return _gate_add_norm(one_shape, 2 * len(NOT_FINITE) + 1, 16, spoil)


def _weight_norm(
    inputs: Inputs,
    shapes: tuple[tuple[int, ...], ...],
    spoil: Callable[[list[Tensor]], None] | None = None,
) -> Results:
    """Narrow results are rounded behind a sum."""
    directions = [inputs.normal(*shape) for shape in shapes]
    gains = [inputs.normal(shape[0], *[1] * (len(shape) - 1)) for shape in shapes]
    if spoil is not None:
        spoil(directions)
    leaves = [t.requires_grad_() for t in (*directions, *gains)]
    weights = cf.ops.weight_norm(directions, gains)
    grads = torch.autograd.grad(weights, leaves, [inputs.normal(*shape) for shape in shapes])
    how = "(after a sum)" if inputs.dtype.itemsize == 2 else "(sum)"
    return {f"{i} {how}": t.detach() for i, t in enumerate((*weights, *grads))}


def weight_norm(inputs: Inputs) -> Results:
    """Layers of one launch, with rows that wide accesses fill and such that they do not."""
    batch, per_row = inputs.shape
    return _weight_norm(inputs, ((batch, per_row), (2, 2, 4), (batch, 1, 1), (3,), (5, 3, 3)))


def weight_norm_not_finite(inputs: Inputs) -> Results:
    """Rows with NaN and infinity, of zeros, and of squares beyond float32."""
    if _one_shape(inputs, 1) is None:
        return {}

    def spoil(directions: list[Tensor]) -> None:
        for direction in directions:
            for row, value in enumerate(NOT_FINITE):
                direction[row, 1] = value
            direction[len(NOT_FINITE)] = 0
            direction[len(NOT_FINITE) + 1] = 6e4 if inputs.dtype == torch.float16 else 1e30

    rows = len(NOT_FINITE) + 2
    return _weight_norm(inputs, ((rows, 16), (rows, 7)), spoil)


def _mixture(
    inputs: Inputs,
    name: str,
    components: int,
    params_dtype: torch.dtype,
    *,
    affine: bool = True,
    legacy: bool = False,
    negligible: slice | None = None,
    spoil: Callable[[Tensor, Tensor], None] | None = None,
) -> Results:
    """Means and scales spread so that both direct sums and their scaled form are needed.

    Where several threads share an element, sums have another order than the CPU's. Then results
    agree to rounding, which small scales would make much of; and bit by bit where the `negligible`
    components, which weigh nothing beside the others, leave each sum the terms of one thread.

    `spoil` puts other values into state and parameters.
    """
    first = 2 if affine else 0
    reordered = components == 32 and inputs.dtype != torch.float64 and negligible is None
    state = inputs.normal().mul_(3)
    params = inputs.normal(
        inputs.shape[0], first + 3 * components, *inputs.shape[1:], dtype=params_dtype
    )
    if reordered:
        params[:, first + 2 * components :] *= 0.3
    else:
        params[:, first + components : first + 2 * components] *= 2
        params[:, first + 2 * components :] -= 1
    params[:, :first].tanh_()
    if negligible is not None:
        params[:, first : first + components][:, negligible] -= 200
    if spoil is not None:
        spoil(state, params)
    state.requires_grad_()
    params.requires_grad_()
    options = {"affine": affine} | ({"legacy_cdf_clamp": True} if legacy else {})
    out, ladj = getattr(cf.ops, name)(state, params, **options)
    grad_ladj = inputs.normal(inputs.shape[0], dtype=inputs.sum_dtype)
    torch.autograd.backward((out, ladj), (inputs.normal(), grad_ladj))
    assert state.grad is not None
    assert params.grad is not None
    values = {
        "out": out,
        "ladj (sum)": ladj,
        "state": state.grad,
        "params (small terms)": params.grad,
    }
    if reordered:  # rounded to half precision they are next to each other
        values = {
            f"{key} ({'sum' if value.dtype == torch.float32 else 'after a sum'})": value
            for key, value in values.items()
        }
    what = f"{name}, {components} x {params_dtype}, {options}, {negligible}"
    return {f"{what}: {key}": value.detach() for key, value in values.items()}


_MIXTURES = ("mixture_logistic_coupling", "mixture_logistic_coupling_inverse")


def _mixture_inputs(inputs: Inputs) -> Inputs | None:
    """A thread has one element, which costs time: fewer shapes, chains of three blocks at most."""
    batch, length = inputs.shape
    if length > 127 and (length not in (1031, 16391) or not inputs.aligned):
        return None
    return Inputs(inputs.dtype, (batch, min(length, 300)), inputs.aligned)


def mixture_logistic_coupling(inputs: Inputs) -> Results:
    """Every number of components that has a kernel of its own, and one that has not."""
    smaller = _mixture_inputs(inputs)
    if smaller is None:
        return {}
    halves = (torch.bfloat16, torch.float16) if inputs.dtype == torch.float32 else ()
    results = {}
    for params_dtype in (inputs.dtype, *halves):
        for components in (3, 4, 8, 16, 32):
            for name in _MIXTURES:
                results |= _mixture(smaller, name, components, params_dtype)
    if inputs.dtype == torch.float32 and smaller.shape[1] <= 127:
        for half, name in itertools.product((slice(0, 16), slice(16, 32)), _MIXTURES):
            results |= _mixture(smaller, name, 32, inputs.dtype, negligible=half)
    return results


def mixture_logistic_options(inputs: Inputs) -> Results:
    """Without a and b, and the inverse with the published code's clamp."""
    smaller = _mixture_inputs(inputs)
    if smaller is None:
        return {}
    results = {}
    for components in (3, 4):
        for name in _MIXTURES:
            results |= _mixture(smaller, name, components, inputs.dtype, affine=False)
        for affine in (True, False):
            results |= _mixture(
                smaller, _MIXTURES[1], components, inputs.dtype, affine=affine, legacy=True
            )
    return results


def mixture_logistic_not_finite(inputs: Inputs) -> Results:
    """NaN and infinity in the state and in each kind of parameter, the first and the last of those
    of the components; an infinite a beside a zero; logit F and inverse targets that overflow."""
    results = {}
    for components in (3, 4, 32):
        ends = [(2 + part * components, 1 + (part + 1) * components) for part in range(3)]
        rows = [0, 1, *(row for first_and_last in ends for row in first_and_last)]
        one_shape = _one_shape(inputs, len(NOT_FINITE) * (1 + len(rows)) + 4)
        if one_shape is None:
            return {}

        def spoil(state: Tensor, params: Tensor, rows: list[int] = rows) -> None:
            chain = iter(range(state.shape[0]))
            for value in NOT_FINITE:
                state[next(chain), 0] = value
                for row in rows:
                    params[next(chain), row, 0] = value
            for value in (torch.inf, -torch.inf):
                i = next(chain)
                state[i, 0], params[i, 0, 0] = 0, value
            for sign in (1, -1):
                i = next(chain)
                state[i, 0], params[i, 0, 0] = sign * torch.finfo(state.dtype).max / 2, -2
                params[i, rows[-2] :, 0] = -1  # every log-scale

        for name in _MIXTURES:
            results |= _mixture(one_shape, name, components, inputs.dtype, spoil=spoil)
        results |= _mixture(
            one_shape, _MIXTURES[1], components, inputs.dtype, legacy=True, spoil=spoil
        )
    return results


CHAIN_DTYPES = (torch.float32, torch.float64)
_ENERGIES = (
    "double_well", "funnel", "gaussian", "gaussian_mixture", "rastrigin", "rosenbrock",
)  # fmt: skip


def _energy(inputs: Inputs, name: str, dim: int, components: int) -> dict[str, object]:
    """An energy's name, tensors and numbers."""
    numbers = {"double_well": (0.7,), "funnel": (1.5,), "rastrigin": (1.2,),
               "rosenbrock": (0.9, 3.0)}  # fmt: skip
    if name in numbers:
        return {"energy": name, "numbers": numbers[name]}
    if name == "gaussian":
        root = inputs.normal(dim, dim)
        tensors = [inputs.normal(dim), root @ root.T / dim, inputs.normal(1)[0]]
    else:
        stds, log_weights = inputs.normal(components, dim), inputs.normal(components)
        tensors = [inputs.normal(components, dim), stds.abs_().add_(0.3), log_weights]
    return {"energy": name, "tensors": tensors}


def _chains(
    inputs: Inputs,
    components: int,
    options: Callable[[int], dict[str, object]],
    op: str = "analytic_langevin_chain",
) -> Results:
    """Of chains that a thread holds: one whose length the kernel knows, and the case's own."""
    if inputs.dtype not in CHAIN_DTYPES:
        return {}
    results = {}
    for dim in (2, min(max(inputs.shape[1], 1), 40)):
        for name in _ENERGIES:
            if dim < 2 and name in ("funnel", "rosenbrock"):
                continue
            energy = _energy(inputs, name, dim, components)
            x0 = inputs.normal(inputs.shape[0], dim)
            result = getattr(cf.ops, op)(
                x0, inputs.rng, **energy, n_steps=3, step=1, **options(dim)
            )
            for key, value in result._asdict().items():
                if value is not None:
                    results[f"{name}, {dim}: {key}"] = value
    return results


def analytic_chains(inputs: Inputs) -> Results:
    return _chains(inputs, 5, lambda dim: {"drift": 0.01, "noise": 0.1})


def analytic_chains_with_everything(inputs: Inputs) -> Results:
    """Every option, coefficients by step and chain, and a mixture's table beyond a block's own."""
    batch = inputs.shape[0]
    tables = {
        "drift": torch.linspace(0.01, 0.02, 4 * batch, dtype=torch.float64).view(4, batch),
        "noise": torch.linspace(0.1, 0.2, 4).view(4, 1),
        "decay": torch.linspace(0.0, 0.1, batch).view(1, batch),
    }

    def options(dim: int) -> dict[str, object]:
        return {
            **tables, "pull": 0.2, "x_ref": inputs.normal(batch, dim),
            "xi": inputs.normal(3, batch, dim), "grad_clip": 1.5, "grad_norm": 2.0,
            "step_clip": 0.2, "clamp": (-1.0, 1.0), "clamp_end": True, "negative_energy": True,
            "thin": 2, "stats": True, "freeze_nonfinite": True,
        }  # fmt: skip

    return _chains(inputs, 400, options)


def analytic_chains_not_finite(inputs: Inputs) -> Results:
    """NaN and infinity in the start, where chains stop and where they go on."""
    if inputs.dtype not in CHAIN_DTYPES:
        return {}
    one_shape = _one_shape(inputs, 2 * len(NOT_FINITE))
    if one_shape is None:
        return {}
    results = {}
    for name in _ENERGIES:
        energy = _energy(one_shape, name, 2, 3)
        for freeze in (False, True):
            x0 = one_shape.normal()
            for chain, value in enumerate(NOT_FINITE):
                x0[chain, 0] = x0[len(NOT_FINITE) + chain, 1] = value
            x, _, stats, frozen_at = cf.ops.analytic_langevin_chain(
                x0, inputs.rng, **energy, n_steps=2, drift=0.01, noise=0.1, stats=True,
                freeze_nonfinite=freeze,
            )  # fmt: skip
            assert stats is not None
            results |= {
                f"{name}, {freeze}: x": x,
                f"{name}, {freeze}: stats": stats[..., :5],
                f"{name}, {freeze}: frozen_at": frozen_at,
            }
    return results


def _mala_options(inputs: Inputs, batch: int, dim: int, name: str) -> dict[str, object]:
    """Of chains that accept their moves: with adapted steps, and with everything else."""
    accept_rng = cf.Key(6, time=11, chain=7).tensor()
    given: dict[str, object]
    if name == "adapted":
        given = {
            "step_size": 1.2, "adapt_steps": 2, "target_accept": 0.6, "thin": 2, "stats": True
        }  # fmt: skip
    else:
        given = {
            "step_size": torch.linspace(0.1, 1.2, 4 * batch, dtype=torch.float64).view(4, batch),
            "temperature": 1.7, "negative_energy": True, "xi": inputs.normal(3, batch, dim),
            "thin": 1, "stats": True,
        }  # fmt: skip
    return {"accept_rng": accept_rng, **given}


def analytic_mala_chains(inputs: Inputs) -> Results:
    """With a mixture's table that a block keeps, and beyond it."""
    results = {}
    for name, components in (("adapted", 5), ("full", 400)):
        results[name] = _chains(
            inputs,
            components,
            lambda dim, name=name: _mala_options(inputs, inputs.shape[0], dim, name),
            op="analytic_mala_chain",
        )
    return _joined(results)


def analytic_mala_chains_not_finite(inputs: Inputs) -> Results:
    """In the start: such chains stay where they are."""
    if inputs.dtype not in CHAIN_DTYPES:
        return {}
    one_shape = _one_shape(inputs, 2 * len(NOT_FINITE))
    if one_shape is None:
        return {}
    results: dict[str, Results] = {}
    for name in _ENERGIES:
        x0 = one_shape.normal()
        for chain, value in enumerate(NOT_FINITE):
            x0[chain, 0] = x0[len(NOT_FINITE) + chain, 1] = value
        x, _, stats, step_size, finite = cf.ops.analytic_mala_chain(
            x0, inputs.rng, **_energy(one_shape, name, 2, 3), n_steps=2,
            **_mala_options(one_shape, len(x0), 2, "adapted"),
        )  # fmt: skip
        assert stats is not None
        results[name] = {
            "x": x,
            "accepted": stats[..., 2:4],
            "step_size": step_size,
            "finite": finite,
        }
    return _joined(results)


def mlp_mala_chain(inputs: Inputs) -> Results:
    """Tiles of every size, one layer and two."""
    if _mlp_inputs(inputs) is None:
        return {}
    results = {}
    for batch, widths, name in zip(
        MLP_BATCHES, ((5,), (20, 9), (33, 7)), ("full", "adapted", "full"), strict=True
    ):
        given = _mala_options(inputs, batch, inputs.shape[1], name)
        results[str(batch)] = _mlp_chain(inputs, batch, widths, op="mlp_mala_chain", **given)
    return _joined(results)


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        random_numbers,
        langevin_plain,
        langevin_full,
        langevin_grad_norm,
        langevin_gradients,
        langevin_given_noise,
        langevin_no_noise,
        langevin_frozen,
        langevin_statistics,
        langevin_full_statistics,
        langevin_noise,
        langevin_not_finite,
        analytic_chains,
        analytic_chains_with_everything,
        analytic_chains_not_finite,
        analytic_mala_chains,
        analytic_mala_chains_not_finite,
        mlp_chain,
        mlp_chain_options,
        mlp_chain_activations,
        mlp_chain_not_finite,
        mlp_mala_chain,
        mlp_chain_bfloat16,
        mlp_chain_bfloat16_not_finite,
        affine_coupling,
        affine_coupling_inverse,
        affine_coupling_not_finite,
        affine_coupling_mixed,
        attention,
        attention_bfloat16,
        attention_not_finite,
        concat_elu,
        concat_elu_not_finite,
        mixture_logistic_coupling,
        mixture_logistic_options,
        mixture_logistic_not_finite,
        gate_add_norm,
        gate_add_norm_parts,
        gate_add_norm_not_finite,
        weight_norm,
        weight_norm_not_finite,
    )
}
