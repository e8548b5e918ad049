"""The laws that every op keeps, once over the list in benchmarks/op_table.py.

What is particular to one op stands in the test of its stem.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from op_table import (
    DTYPES,
    OPS,
    Arguments,
    Draw,
    Op,
    as_tuple,
    attention_of,
    concat_elu_with_dropout,
    gate_add_norm_arguments,
    weight_norm_layers,
)
from thread_counts import by_threads
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.library import opcheck
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

import coopflow_ext as cf
from coopflow_ext._extension import native

SHAPES = (
    (0, 3), (3, 0), (1, 1), (2, 3), (3, 4), (5, 5), (7,), (4, 127), (2, 16411), (3, 2, 5, 7),
)  # fmt: skip
FACES = tuple({op.name: op for op in reversed(OPS)}.values())  # the first call of each
# For what is slow: components in registers are another kernel, but the same path to it.
COMPILED = [op for op in OPS if not op.variant.startswith(("K4", "K32", "d40"))]
DIFFERENTIABLE = [op for op in OPS if op.differentiable and op.variant not in ("K32", "d40")]
COUPLINGS = [op for op in OPS if op.is_coupling]
OPTIONAL = {("langevin_step", "x_ref"), ("langevin_step_", "x_ref"), ("concat_elu", "rng")}


def ids(value: Any) -> str | None:
    return str(value) if isinstance(value, Op) else None


def each(ops: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("op", ops, ids=str)


def cases() -> Iterator[tuple[Op, tuple[int, ...], torch.dtype, torch.dtype]]:
    for op in OPS:
        for shape in SHAPES:
            if op.variant == "K32" and math.prod(shape) > 10_000:
                continue  # the reference's bisection takes long
            for dtype, params_dtype in op.dtypes:
                yield op, shape, dtype, params_dtype


def leaves(op: Op, arguments: Arguments) -> Arguments:
    """The arguments, with new leaves for those that have derivatives."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_()

    return {**arguments, **tree_map(leaf, differentiable(op, arguments))}


def differentiable(op: Op, arguments: Arguments) -> Arguments:
    """Those that have derivatives."""
    return {name: arguments[name] for name in op.differentiable}


def function(op: Op, arguments: Arguments) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The op as a function of what has derivatives, and these; those of a list one by one."""
    given, spec = tree_flatten(differentiable(op, arguments))

    def call(*inputs: Tensor) -> Any:
        return getattr(cf.ops, op.name)(**{**arguments, **tree_unflatten(list(inputs), spec)})

    return call, tuple(given)


def tensors_by_name(arguments: Arguments) -> dict[str, Tensor]:
    """The tensors among the arguments, those of a list as NAME[i]."""
    found = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, list):
            found |= {f"{name}[{i}]": t for i, t in enumerate(value)}
    return found


def with_another(arguments: Arguments, name: str, value: Any) -> Arguments:
    """The arguments with another value for one of :func:`tensors_by_name`."""
    of, _, index = name.removesuffix("]").partition("[")
    if not index:
        return {**arguments, name: value}
    changed = list(arguments[of])
    changed[int(index)] = value
    return {**arguments, of: changed}


def loss_of(call: Callable[..., Any]) -> Callable[..., Tensor]:
    """A sum in which every result counts, differently for each element."""

    def loss(*inputs: Tensor) -> Tensor:
        terms = [(t.float() if t.dtype.itemsize < 4 else t).sin() for t in as_tuple(call(*inputs))]
        return sum(
            (term.square().sum() + term.sum() for term in terms), torch.zeros(()).to(terms[0])
        )

    return loss


def cotangents(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Numbers in (-1, 1), by the elements' numbers."""
    grids = [torch.arange(t.numel(), dtype=torch.float64).view(t.shape) for t in results]
    return [(1.7 * grid).sin().to(t) for grid, t in zip(grids, results, strict=True)]


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "shape", "dtype", "params_dtype"), list(cases()), ids=ids)
def test_matches_the_reference(
    device: torch.device,
    op: Op,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    params_dtype: torch.dtype,
) -> None:
    """Also for empty states, chains of no elements and chains that are numbers."""
    arguments = op.arguments(Draw(shape, dtype, params_dtype, device))
    results = op(arguments)
    op.assert_close(results, op.reference(arguments))
    like = {"attention": "q", "gate_add_norm": "x", "weight_norm": "directions"}.get(op.name)
    expected = [shape] if like is None else [t.shape for t in as_tuple(arguments[like])]
    if op.name == "concat_elu":
        batch, channels, *positions = arguments["x"].shape
        expected = [(batch, 2 * channels, *positions)]
    assert [t.shape for t in results[: len(expected)]] == expected
    assert {t.dtype for t in results[: len(expected)]} == {dtype}
    for ladj in results[len(expected) :]:
        assert ladj.shape == shape[:1]
        assert ladj.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@each(OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_misaligned_and_strided_arguments(device: torch.device, op: Op, dtype: torch.dtype) -> None:
    arguments = op.arguments(Draw((4, 256), dtype, device=device))
    expected = op(arguments)

    def shifted(t: Tensor) -> Tensor:
        return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)

    def strided(t: Tensor) -> Tensor:
        return torch.stack((t, t), dim=-1)[..., 0]

    layouts = (shifted, strided) if op.takes_any_strides else (shifted,)
    for layout in layouts:
        given = {
            name: value if (name, layout) == ("rng", strided)
            else tree_map_only(Tensor, layout, value)
            for name, value in arguments.items()
        }  # fmt: skip
        for ours, plain in zip(op(given), expected, strict=True):
            assert torch.equal(ours, plain)


def rows(arguments: Arguments, first: int, last: int) -> Arguments:
    """The arguments of some of the chains."""
    part = dict(arguments)
    for name, value in arguments.items():
        if name == "rng":
            part[name] = value + torch.tensor([0, 0, first], device=value.device)
        elif name == "shape":
            part[name] = (last - first, *value[1:])
        elif name in ("drift", "noise") and isinstance(value, Tensor):
            part[name] = value[:, first:last]
        elif name in ("weight", "bias"):
            part[name] = value.clone()
        else:
            part[name] = tree_map_only(Tensor, lambda t: t[first:last].clone(), value)
    return part


@each(OPS)
@pytest.mark.parametrize("dtype", [dtype for dtype, _ in DTYPES])
@pytest.mark.parametrize("shape", [(70, 1), (70, 3), (7, 130), (7, 20_000)])
def test_a_chain_does_not_know_its_batch(
    device: torch.device, op: Op, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    arguments = op.arguments(Draw(shape, dtype, device=device))
    whole, again, one, three = (
        op(arguments), op(arguments), op(rows(arguments, 4, 5)), op(rows(arguments, 3, 6)),
    )  # fmt: skip
    for result, repeated, alone, few in zip(whole, again, one, three, strict=True):
        assert torch.equal(result, repeated)
        assert torch.equal(result[4:5], alone)
        assert torch.equal(result[3:6], few)


@each(FACES)
def test_threads_do_not_change_a_bit(op: Op) -> None:
    arguments = op.arguments(Draw((9, 20_000)))
    results = by_threads(lambda: op(arguments))
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


# --- couplings ------------------------------------------------------------------------------------


@each([op for op in COUPLINGS if not op.name.endswith("_inverse")])
@pytest.mark.parametrize("there_first", [True, False])
def test_the_inverse_inverts(device: torch.device, op: Op, there_first: bool) -> None:
    """In float64; what rounding does to narrower types is asked in the tests of the stems."""
    arguments = op.arguments(Draw((5, 77), torch.float64, device=device))
    x, params = arguments.pop("x"), arguments.pop("params")
    there, back = getattr(cf.ops, op.name), getattr(cf.ops, str(op.inverse))
    if not there_first:
        there, back = back, there
    state, ladj = there(x, params, **arguments)
    returned, inverse_ladj = back(state, params, **arguments)
    torch.testing.assert_close(returned, x, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(inverse_ladj, -ladj, rtol=1e-13, atol=1e-13)


@each(COUPLINGS)
def test_ladj_is_that_of_the_jacobian(device: torch.device, op: Op) -> None:
    call, (state, params) = function(op, op.arguments(Draw((1, 6), torch.float64, device=device)))
    jacobian = torch.autograd.functional.jacobian(lambda state: call(state, params)[0], state)
    expected = torch.linalg.slogdet(jacobian.reshape(6, 6)).logabsdet
    torch.testing.assert_close(call(state, params)[1][0], expected, rtol=1e-10, atol=1e-10)


# --- derivatives ----------------------------------------------------------------------------------


@each(DIFFERENTIABLE)
def test_gradients_of_first_and_second_order(device: torch.device, op: Op) -> None:
    shape = (3, 2, 2) if op.variant in ("", "plain", "full") else (1, 3)
    draw = Draw(shape, torch.float64, device=device)
    call, inputs = function(op, leaves(op, op.arguments(draw)))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize(
    ("op", "shape", "dtype", "params_dtype"),
    # Of many elements some lie within rounding of a limit, where the derivative jumps.
    [
        c
        for c in cases()
        if c[0].differentiable and (c[0].takes_any_strides or math.prod(c[1]) < 10_000)
    ],
    ids=ids,
)
def test_gradients_match_the_reference(
    device: torch.device,
    op: Op,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    params_dtype: torch.dtype,
) -> None:
    arguments = leaves(op, op.arguments(Draw(shape, dtype, params_dtype, device)))
    inputs = tree_leaves(differentiable(op, arguments))
    results, exact = op(arguments), op.reference(arguments)
    given = cotangents(results)
    ours = torch.autograd.grad(results, inputs, given)
    expected = torch.autograd.grad(exact, inputs, [t.cpu().double() for t in given])
    assert op.gradient_bounds is not None
    for one, other in zip(ours, expected, strict=True):
        bound = op.gradient_bounds.of(one.dtype) + op.gradient_bounds.of(dtype)
        scale = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=bound * scale)


@each(DIFFERENTIABLE)
def test_only_one_input_needs_a_gradient(device: torch.device, op: Op) -> None:
    arguments = op.arguments(Draw((3, 5), torch.float64, device=device))
    both = leaves(op, arguments)
    named = tensors_by_name(differentiable(op, both))
    expected = torch.autograd.grad(sum(t.sum() for t in op(both)), list(named.values()))
    for name, gradient in zip(named, expected, strict=True):
        leaf = named[name].detach().clone().requires_grad_()
        sum(t.sum() for t in op(with_another(arguments, name, leaf))).backward()
        assert torch.equal(leaf.grad, gradient)
    for index in range(len(op(arguments))):  # a result that nobody uses contributes nothing
        op(both)[index].sum().backward()


@each(DIFFERENTIABLE)
def test_func_grad_and_vjp(device: torch.device, op: Op) -> None:
    call, inputs = function(op, op.arguments(Draw((2, 8), torch.float64, device=device)))
    loss, every = loss_of(call), tuple(range(len(inputs)))
    expected = torch.func.grad(loss, argnums=every)(*inputs)
    plain = [t.clone().requires_grad_() for t in inputs]
    torch.testing.assert_close(expected, torch.autograd.grad(loss(*plain), plain))

    def size(*inputs: Tensor) -> Tensor:
        return sum(g.square().sum() for g in torch.func.grad(loss, argnums=every)(*inputs))

    first = torch.autograd.grad(loss(*plain), plain, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), plain)
    torch.testing.assert_close(torch.func.grad(size, argnums=every)(*inputs), second)

    # Called when the transform is over, with what it has saved.
    results, pull_back = torch.func.vjp(call, *inputs)
    assert not any(t.requires_grad for t in as_tuple(results))
    given = [t.requires_grad_() for t in cotangents(as_tuple(results))]
    ours = pull_back(tuple(given) if isinstance(results, tuple) else given[0])
    theirs = torch.autograd.grad(as_tuple(call(*plain)), plain, given, create_graph=True)
    torch.testing.assert_close(ours, theirs)
    seconds = [
        torch.autograd.grad(sum(g.square().sum() for g in both), given) for both in (ours, theirs)
    ]
    torch.testing.assert_close(*seconds)


AROUND: dict[str, Callable[[torch.device], AbstractContextManager[Any]]] = {
    "copies": lambda device: saved_tensors_hooks(lambda t: (t.clone(),), lambda kept: kept[0]),
    "two pairs": lambda device: both(
        saved_tensors_hooks(lambda t: [t.clone()], lambda kept: kept[0]), save_on_cpu()
    ),
    "autocast": lambda device: torch.autocast(device.type, torch.bfloat16),
}


@contextmanager
def both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


@pytest.mark.parametrize("name", AROUND)
@each(DIFFERENTIABLE)
def test_second_derivatives_inside_hooks_and_autocast(
    device: torch.device, op: Op, name: str
) -> None:
    """The caller's hooks of saved tensors, and autocast, around forward and backward passes."""
    call, inputs = function(op, leaves(op, op.arguments(Draw((3, 5), device=device))))
    loss = loss_of(call)

    def derivatives() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
        second = torch.autograd.grad(sum(t.sin().sum() for t in first), inputs, allow_unused=True)
        return *first, *(t for t in second if t is not None)

    alone = derivatives()
    with AROUND[name](device):
        inside = derivatives()
    for one, other in zip(inside, alone, strict=True):
        assert torch.equal(one, other)


@each(DIFFERENTIABLE)
def test_forward_mode_raises_rather_than_giving_zeros(device: torch.device, op: Op) -> None:
    call, inputs = function(op, op.arguments(Draw((2, 3), device=device)))
    ones = tuple(torch.ones_like(t) for t in inputs)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(call, inputs, ones)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="jvp"), dual_level():
        call(*map(make_dual, inputs, ones))


@each(DIFFERENTIABLE)
def test_vmap_raises(device: torch.device, op: Op) -> None:
    """With and without gradients."""
    call, inputs = function(op, op.arguments(Draw((2, 3), device=device)))
    stacked = tuple(torch.stack((t, t)) for t in inputs)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, pytest.raises(RuntimeError, match="vmap"):
            torch.func.vmap(call)(*stacked)


def test_ops_in_place_refuse_forward_mode(device: torch.device) -> None:
    x, rng = torch.ones(2, 3, device=device), cf.Key(0).tensor(device)
    for call in (
        lambda x: cf.ops.langevin_step_(x.clone(), x, rng, drift=0.1),
        lambda x: cf.ops.langevin_noise_(torch.zeros_like(x), rng, noise=x[:1, :1]),
    ):
        for context in (torch.no_grad(), torch.enable_grad()):
            with context, pytest.raises(RuntimeError, match="has a tangent"):
                torch.func.jvp(call, (x,), (torch.ones_like(x),))


def test_whole_chains_refuse_forward_mode(device: torch.device) -> None:
    """Also of what describes the energy, which gets no gradients: a tangent that is left out would
    make the derivative wrong."""
    x0, rng = torch.ones(2, 3, device=device), cf.Key(0).tensor(device)
    options: Any = {"n_steps": 2, "drift": 0.1, "noise": 0.1}
    mean, precision = torch.zeros(3, device=device), torch.eye(3, device=device)

    def network(weight: Tensor) -> Tensor:
        last, biases = weight[:1], [torch.zeros(3, device=device), torch.zeros(1, device=device)]
        return cf.ops.mlp_langevin_chain(
            x0, [weight, last], biases, rng, activation="tanh", **options
        ).x

    def gaussian(mean: Tensor) -> Tensor:
        return cf.ops.analytic_langevin_chain(
            x0, rng, energy="gaussian", tensors=[mean, precision, mean[0]], numbers=[], **options
        ).x

    for call, value in ((network, precision), (gaussian, mean)):
        with torch.no_grad():
            call(value)
        for context in (torch.no_grad(), torch.enable_grad()):
            with context, pytest.raises(RuntimeError, match="has a tangent, but a whole chain"):
                torch.func.jvp(call, (value,), (torch.ones_like(value),))


# --- torch.compile and opcheck --------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> None:
    """Each op is compiled through the same few functions, more often than a compiler allows."""
    torch.compiler.reset()


@each(COMPILED)
@pytest.mark.usefixtures("fresh_compiler")
def test_one_graph_under_compile(device: torch.device, op: Op) -> None:
    arguments = op.arguments(Draw((5, 13), device=device))

    def twice(arguments: Arguments) -> list[Tensor]:
        return [t * 2 for t in op(arguments)]

    for ours, expected in zip(
        torch.compile(twice, fullgraph=True)(arguments), twice(arguments), strict=True
    ):
        assert torch.equal(ours, expected)


@each([op for op in COMPILED if op.differentiable])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_gradients(device: torch.device, op: Op) -> None:
    call, inputs = function(op, leaves(op, op.arguments(Draw((4, 8), device=device))))
    loss = loss_of(call)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(
        torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs), inputs), expected
    )
    # The compiler of torch 2.10 meets the operator's registered derivative inside func.grad.
    if torch.__version__ >= (2, 11):
        in_func = torch.func.grad(loss, argnums=tuple(range(len(inputs))))
        plain = [t.detach() for t in inputs]
        compiled = torch.compile(in_func, fullgraph=True)(*plain)
        torch.testing.assert_close(compiled, expected)


RawCall = tuple[tuple[Any, ...], dict[str, Any]]


def raw_calls(device: torch.device, dtype: torch.dtype) -> dict[str, list[RawCall]]:
    """Calls of every op of the library that takes tensors; networks on CUDA are float32."""
    draw = Draw((3, 8), dtype, device=device)
    x, grad, rng = draw.normal(), draw.normal(), draw.rng()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table = torch.rand(2, 3, device=device)
    active, frozen_at = torch.ones(3, device=device).bool(), torch.zeros(3, device=device).long()
    masked = {"active": active, "freeze_nonfinite": True, "frozen_at": frozen_at}
    limits = {"drift": 0.1, "noise": 0.2, "clamp_low": -1.0, "clamp_high": 1.0}
    stats = torch.empty(3, 5, dtype=wide, device=device)
    mixture = [torch.ones(2, 8).to(device, wide) for _ in range(2)]
    mixture.append(mixture[0][:, 0].contiguous())
    of_network = torch.float32 if device.type == "cuda" else wide
    points = x.to(of_network)
    network = tuple(
        [torch.ones(*shape).to(device, of_network) for shape in shapes]
        for shapes in (((4, 8), (1, 4)), ((4,), (1,)))
    )
    calls: dict[str, list[RawCall]] = {
        "normal_": [((x, rng), {})],
        "uniform_": [((x, rng), {"step": 2})],
        "langevin_step_": [
            ((x, grad, rng), limits),
            ((x, grad, rng), {**limits, **masked, "stats": stats, "grad_norm": 0.5}),
        ],
        "langevin_noise_": [((x, rng), {"noise": 0.2})],
        "analytic_langevin_chain": [  # float32 or float64
            ((x.to(wide), rng, list(b"double_well"), [], [1.0]), {"n_steps": 3, "drift": 0.1}),
            (
                (x.to(wide), rng, list(b"gaussian_mixture"), mixture, []),
                {"n_steps": 2, **limits, "drift": 0.0, "drift_t": table, "stats": True, "thin": 2},
            ),
        ],
        "mlp_langevin_chain": [
            ((points, rng, *network, 0, 0.0, 0.0), {"n_steps": 3, "drift": 0.1}),
            (
                (points, rng, *network, 5, 1.0, 20.0),
                {"n_steps": 2, **limits, "drift": 0.0, "drift_t": table, "stats": True, "thin": 2},
            ),
        ],
        **attention_calls(draw),
        **concat_elu_calls(draw),
        **gate_add_norm_calls(draw),
        **weight_norm_calls(draw),
        "analytic_mala_chain": [  # float32 or float64
            (
                (x.to(wide), rng, rng, list(b"double_well"), [], [1.0]),
                {"n_steps": 3, "step_size": 0.1},
            ),
            (
                (x.to(wide), rng, rng, list(b"gaussian_mixture"), mixture, []),
                {"n_steps": 2, "step_size_t": table, "stats": True, "thin": 2},
            ),
        ],
        "mlp_mala_chain": [
            (
                (points, rng, rng, *network, 0, 0.0, 0.0),
                {"n_steps": 3, "step_size": 0.1, "adapt_steps": 2},
            ),
            (
                (points, rng, rng, *network, 5, 1.0, 20.0),
                {"n_steps": 2, "step_size_t": table, "stats": True, "thin": 2},
            ),
        ],
        "langevin_step": [((x, grad, rng, 0.1), {}), ((x, grad, rng, 0.0, table, 0.2), {})],
    }
    for op in COUPLINGS:
        if op.variant == "K32":
            continue
        state, params, *_ = (arguments := op.arguments(draw)).values()
        options = {n: v for n, v in arguments.items() if n not in op.differentiable}
        backward = f"{op.name}_backward"
        schema = getattr(native(), backward).default._schema.arguments
        states = len([a for a in schema if str(a.type) == "Tensor"]) - 3  # what backward is given
        sums = draw.normal(3).to(device, wide)
        calls.setdefault(op.name, []).append(((state, params), options))
        given = (grad, sums, *[state] * states, params)
        calls.setdefault(backward, []).append((given, options))
    return calls


def attention_calls(draw: Draw) -> dict[str, list[RawCall]]:
    q, k, v, rng, p, step = attention_of(9)(draw).values()
    out, lse = native().attention(q, k, v, rng, p, step)
    options = {"step": step, "scale": 0.4}
    return {
        "attention": [((q, k, v, rng, p), {}), ((q, k, v, rng, p), options)],
        "attention_backward": [((q, q, k, v, rng, out, lse, p), options)],
    }


def concat_elu_calls(draw: Draw) -> dict[str, list[RawCall]]:
    """Of channels_last with a mask, and of contiguous tensors without."""
    x, rng, p, step = concat_elu_with_dropout(draw).values()
    y, dense = native().concat_elu(x, rng, p, step), x.contiguous()
    return {
        "concat_elu": [((x, rng, p, step), {}), ((dense,), {})],
        "concat_elu_backward": [
            ((y, y, rng, p, step), {}),
            ((y, native().concat_elu(dense)), {}),
        ],
    }


def gate_add_norm_calls(draw: Draw) -> dict[str, list[RawCall]]:
    x, gates, *parameters = gate_add_norm_arguments(draw).values()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight, bias = (t.to(wide) for t in parameters)
    _, norms = native().gate_add_norm(x, gates, weight, bias)
    return {
        "gate_add_norm": [((x, gates, weight, bias), {}), ((x, gates, weight, bias, 0.1), {})],
        "gate_add_norm_backward": [((x, x, gates, weight, norms), {})],
    }


def weight_norm_calls(draw: Draw) -> dict[str, list[RawCall]]:
    directions, gains = weight_norm_layers(draw).values()
    grads = [torch.ones_like(v) for v in directions]
    return {
        "weight_norm": [((directions, gains), {}), ((directions[:1], gains[:1]), {})],
        "weight_norm_backward": [((grads, directions, gains), {})],
    }


def tensor_ops() -> list[str]:
    """The ops of the library that take tensors."""
    found = [name.partition("::") for name in torch._C._dispatch_get_all_op_names()]
    return [
        name
        for library, _, name in sorted(found)
        if library == "coopflow"
        if any("Tensor" in str(a.type) for a in getattr(native(), name).default._schema.arguments)
    ]


# Their second derivative, which is the reference's, takes torch 8 to 20 s to trace.
LONG_CHECKS = {
    "attention_backward",
    "mixture_logistic_coupling_backward",
    "mixture_logistic_coupling_inverse_backward",
}


# The two halves of a chain's bound step, which only see real tensors: what traces or watches is
# shown langevin_step_, see tests/test_langevin.py.
OF_BOUND_STEPS = {"langevin_bind", "langevin_bound_step_"}


def opchecks() -> Iterator[Any]:
    for name in sorted({*tensor_ops()} - OF_BOUND_STEPS):
        yield name, torch.float64, False
        yield name, torch.bfloat16, False
        if not getattr(native(), name).default._schema.is_mutable:
            marks = [pytest.mark.slow] * (name in LONG_CHECKS)
            yield pytest.param(name, torch.float64, True, marks=marks)


@pytest.mark.parametrize(("name", "dtype", "requires_grad"), list(opchecks()))
def test_opcheck(device: torch.device, name: str, dtype: torch.dtype, requires_grad: bool) -> None:
    for args, options in raw_calls(device, dtype)[name]:
        if requires_grad:
            args = tree_map_only(
                Tensor, lambda t: t.clone().requires_grad_() if t.dtype == dtype else t, args
            )
        opcheck(getattr(native(), name).default, args, options)


# --- bad input ------------------------------------------------------------------------------------


@each(FACES)
def test_what_is_no_tensor_is_named(device: torch.device, op: Op) -> None:
    arguments = op.arguments(Draw((3, 4), device=device))
    for name, value in tensors_by_name(arguments).items():
        if name in ("drift", "noise"):  # numbers, too
            continue
        for other in (value.tolist(), value.cpu().double().numpy(), None):
            if other is None and (op.name, name) in OPTIONAL:
                continue
            with pytest.raises(TypeError, match=rf"(?<!\w){re.escape(name)}(?!\w)"):
                getattr(cf.ops, op.name)(**with_another(arguments, name, other))


@each([op for op in FACES if op.name not in ("normal", "uniform")])
def test_what_is_not_dense_or_has_no_data_is_named(device: torch.device, op: Op) -> None:
    arguments = op.arguments(Draw((3, 4), device=device))
    named = tensors_by_name(arguments)
    state, *others = named
    with pytest.raises(ValueError, match="tensors must be dense"):
        getattr(cf.ops, op.name)(**with_another(arguments, state, named[state].to_sparse()))
    for name in others:
        with pytest.raises(ValueError, match=f"{re.escape(name)}: must be on the device of"):
            op(with_another(arguments, name, named[name].to("meta")))


@pytest.mark.gpu
@each([op for op in FACES if op.name not in ("normal", "uniform")])
def test_mixed_devices_are_named(op: Op) -> None:
    arguments = op.arguments(Draw((3, 4), device="cuda"))
    named = tensors_by_name(arguments)
    for name in list(named)[1:]:
        with pytest.raises(ValueError, match=f"{re.escape(name)}: must be on the device of"):
            op(with_another(arguments, name, named[name].cpu()))


def test_shapes_alone_pass_through_the_ops() -> None:
    for op in FACES:
        arguments = op.arguments(Draw((4, 6)))
        shapes = [t.shape for t in op(arguments)]
        given = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, arguments)
        assert [t.shape for t in op(given)] == shapes
