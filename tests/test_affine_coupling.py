"""The affine coupling ops: values and log-determinants, derivatives, repeatability, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual
from torch.library import opcheck

import coopflow_ext as cf

# State dtype, parameter dtype.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
SHAPES = [
    (0, 3), (3, 0), (1, 1), (2, 3), (3, 4), (5, 5), (7,), (4, 127), (2, 65537), (3, 2, 5, 7),
]  # fmt: skip
MAPS = [cf.ops.affine_coupling, cf.ops.affine_coupling_inverse]
MIXTURE_MAPS = [cf.ops.mixture_logistic_coupling, cf.ops.mixture_logistic_coupling_inverse]
ORACLES = {
    cf.ops.affine_coupling: cf.reference.affine_coupling,
    cf.ops.affine_coupling_inverse: cf.reference.affine_coupling_inverse,
}
Map = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, params_dtype: torch.dtype, device: Any
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    params = torch.randn((shape[0], 2, *shape[1:]), generator=generator, dtype=torch.float64)
    params[:, 0].tanh_().mul_(2)
    return x.to(device, dtype), params.to(device, params_dtype)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("map_", MAPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "params_dtype"), DTYPES)
def test_matches_the_oracle(
    device: torch.device,
    map_: Map,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    params_dtype: torch.dtype,
) -> None:
    x, params = inputs(shape, dtype, params_dtype, device)
    y, ladj = map_(x, params)
    expected, expected_ladj = ORACLES[map_](x, params)
    assert y.dtype == dtype
    assert ladj.dtype == sum_dtype(dtype)
    assert ladj.shape == shape[:1]
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=4 * ulp, atol=8 * ulp)
    exact = params[:, 0].double().reshape(shape[0], -1 if x.numel() else 0).sum(1)
    exact = exact if map_ is cf.ops.affine_coupling else -exact
    bound = 2e-5 if dtype != torch.float64 else 1e-12
    torch.testing.assert_close(ladj.double(), exact, rtol=bound, atol=bound)
    torch.testing.assert_close(expected_ladj.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "params_dtype"), DTYPES[2:])
def test_half_precision_errs_at_most_twice_as_much_as_plain_torch(
    device: torch.device, dtype: torch.dtype, params_dtype: torch.dtype
) -> None:
    x, params = inputs((64, 300), dtype, params_dtype, device)
    exact, _ = cf.reference.affine_coupling(x.double(), params.double())
    ours, _ = cf.ops.affine_coupling(x, params)
    a, b = params.unbind(1)
    plain = x * a.exp() + b
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize(("dtype", "params_dtype"), DTYPES)
def test_the_inverse_inverts(
    device: torch.device, dtype: torch.dtype, params_dtype: torch.dtype
) -> None:
    x, params = inputs((5, 77), dtype, params_dtype, device)
    y, ladj = cf.ops.affine_coupling(x, params)
    back, inverse_ladj = cf.ops.affine_coupling_inverse(y, params)
    # Rounding y moves x by up to ulp(y)·e^{-a}, with |y| up to 30 and |a| up to 2.
    bound = 300 * torch.finfo(dtype).eps
    torch.testing.assert_close(back, x, rtol=bound, atol=bound)
    assert torch.equal(inverse_ladj, -ladj)


@pytest.mark.parametrize("map_", MAPS)
def test_ladj_is_the_jacobians(device: torch.device, map_: Map) -> None:
    x, params = inputs((1, 6), torch.float64, torch.float64, device)
    jacobian = torch.autograd.functional.jacobian(lambda x: map_(x, params)[0], x)
    expected = torch.linalg.slogdet(jacobian.reshape(6, 6)).logabsdet
    torch.testing.assert_close(map_(x, params)[1][0], expected)


@pytest.mark.parametrize("map_", MAPS)
def test_misaligned_and_strided_inputs(device: torch.device, map_: Map) -> None:
    x, params = inputs((4, 256), torch.float32, torch.float32, device)
    expected = map_(x, params)
    shifted = [torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for t in (x, params)]
    strided = [torch.stack((t, t), dim=-1)[..., 0] for t in (x, params)]
    for given in (shifted, strided):
        for ours, reference in zip(map_(*given), expected, strict=True):
            assert torch.equal(ours, reference)


@pytest.mark.parametrize("map_", MAPS)
def test_repeats_to_the_bit_for_any_batch_and_threads(map_: Map) -> None:
    x, params = inputs((9, 40000), torch.float32, torch.float32, "cpu")
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(map_(x, params))
    finally:
        torch.set_num_threads(threads)
    one = map_(x[4:5], params[4:5])
    for first, second, alone in zip(*results, one, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[4:5], alone)


@pytest.mark.parametrize("map_", MAPS)
def test_extreme_scales_do_not_make_nan(device: torch.device, map_: Map) -> None:
    a = torch.tensor([-200.0, -95.0, -87.5, 0.0, 60.0], device=device)
    params = torch.stack((a, torch.ones(5, device=device)))[None]
    x = torch.full((1, 5), 2.0, device=device)
    y, _ = map_(x, params)
    expected, _ = ORACLES[map_](x, params)
    assert not y.isnan().any()
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-44)


# --- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("map_", MAPS)
def test_gradients_of_first_and_second_order(device: torch.device, map_: Map) -> None:
    given = [t.requires_grad_() for t in inputs((3, 2, 2), torch.float64, torch.float64, device)]
    assert torch.autograd.gradcheck(map_, given)
    assert torch.autograd.gradgradcheck(map_, given)


@pytest.mark.parametrize("map_", MAPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "params_dtype"), DTYPES)
def test_gradients_match_the_oracle(
    device: torch.device,
    map_: Map,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    params_dtype: torch.dtype,
) -> None:
    x, params = inputs(shape, dtype, params_dtype, device)
    results = []
    for function in (map_, ORACLES[map_]):
        given = [t.clone().requires_grad_() for t in (x, params)]
        y, ladj = function(*given)
        results.append(torch.autograd.grad((y.float() ** 2).sum() + 3 * ladj.sum(), given))
    ulp = max(torch.finfo(dtype).eps, torch.finfo(params_dtype).eps)
    for ours, expected in zip(*results, strict=True):
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(ours, expected, rtol=16 * ulp, atol=8 * ulp * (1 + scale))


@pytest.mark.parametrize("map_", MAPS)
def test_only_one_input_needs_a_gradient(device: torch.device, map_: Map) -> None:
    x, params = inputs((3, 5), torch.float64, torch.float64, device)
    both = [t.clone().requires_grad_() for t in (x, params)]
    expected = torch.autograd.grad(sum(t.sum() for t in map_(*both)), both)
    for index in (0, 1):
        given = [x.clone(), params.clone()]
        given[index].requires_grad_()
        y, ladj = map_(*given)
        (y.sum() + ladj.sum()).backward()
        assert torch.equal(given[index].grad, expected[index])
    # An output that nobody uses contributes nothing.
    y, _ = map_(*both)
    torch.autograd.grad(y.sum(), both)
    _, ladj = map_(*both)
    torch.autograd.grad(ladj.sum(), both[1])


@pytest.mark.parametrize("map_", MAPS)
def test_func_grad_and_compile_together(device: torch.device, map_: Map) -> None:
    x, params = inputs((4, 8), torch.float32, torch.float32, device)

    def loss(x: Tensor, params: Tensor) -> Tensor:
        y, ladj = map_(x, params)
        return y.sin().sum() + ladj.square().sum()

    expected = torch.func.grad(loss, argnums=(0, 1))(x, params)
    leaves = [t.clone().requires_grad_() for t in (x, params)]
    for ours, plain in zip(expected, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(ours, plain)
    nested = torch.func.grad(lambda x: torch.func.grad(loss)(x, params).square().sum())(x)
    leaf = x.clone().requires_grad_()
    first = torch.autograd.grad(loss(leaf, params), leaf, create_graph=True)[0]
    torch.testing.assert_close(nested, torch.autograd.grad(first.square().sum(), leaf)[0])
    # Called when the transform is over, with what it has saved.
    (y, ladj), pull_back = torch.func.vjp(map_, x, params)
    assert not y.requires_grad
    cotangents = tuple(torch.randn_like(t).requires_grad_() for t in (y, ladj))
    ours = pull_back(cotangents)
    plain = torch.autograd.grad(map_(*leaves), leaves, cotangents, create_graph=True)
    torch.testing.assert_close(ours, plain)
    seconds = [
        torch.autograd.grad(sum(g.square().sum() for g in both), cotangents)
        for both in (ours, plain)
    ]
    torch.testing.assert_close(*seconds)
    # The compiler of torch 2.10 meets the operator's registered derivative inside func.grad.
    in_func = [torch.func.grad(loss)] if torch.__version__ >= (2, 11) else []
    for function in (loss, *in_func):
        compiled = torch.compile(function, fullgraph=True)
        torch.testing.assert_close(compiled(x, params), function(x, params))


def test_forward_mode_raises_rather_than_giving_zeros(device: torch.device) -> None:
    x, params = inputs((2, 3), torch.float32, torch.float32, device)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)jvp|forward"):
        torch.func.jvp(lambda x: cf.ops.affine_coupling(x, params), (x,), (torch.ones_like(x),))
    with torch.no_grad(), pytest.raises(NotImplementedError, match="jvp"), dual_level():
        cf.ops.affine_coupling(make_dual(x, torch.ones_like(x)), params)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device: torch.device, requires_grad: bool) -> None:
    x, params = inputs((3, 4), torch.float64, torch.float64, device)
    x.requires_grad_(requires_grad)
    params.requires_grad_(requires_grad)
    grad_out, grad_ladj = torch.randn_like(x), torch.randn(3, dtype=x.dtype, device=device)
    ops = torch.ops.coopflow
    opcheck(ops.affine_coupling.default, (x, params))
    opcheck(ops.affine_coupling_inverse.default, (x, params))
    opcheck(ops.affine_coupling_backward.default, (grad_out, grad_ladj, x, params))
    opcheck(ops.affine_coupling_inverse_backward.default, (grad_out, grad_ladj, x, params))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("map_", MAPS)
@pytest.mark.parametrize(
    ("x", "params", "error", "message"),
    [
        (torch.ones(3, 4), torch.ones(3, 4), ValueError, r"params: must have shape \(B, 2"),
        (torch.ones(3, 4), torch.ones(3, 3, 4), ValueError, r"got \(3, 3, 4\)"),
        (torch.ones(3, 4), torch.ones(2, 2, 4), ValueError, r"got \(2, 2, 4\)"),
        (torch.ones(3, 4), torch.ones(3, 2, 5), ValueError, r"got \(3, 2, 5\)"),
        (torch.ones(3, 4), torch.ones(3, 2, 4).double(), TypeError, "params: .*float64"),
        (torch.ones(3, 4).half(), torch.ones(3, 2, 4), TypeError, "params: .*float32"),
        (torch.ones(3, 4).long(), torch.ones(3, 2, 4), TypeError, "int64"),
        (torch.ones(()), torch.ones(2), ValueError, "batch dimension"),
    ],
)
def test_bad_input_is_named(  # type: ignore[no-untyped-def]
    device, map_, x, params, error, message
) -> None:
    with pytest.raises(error, match=message):
        map_(x.to(device), params.to(device))


@pytest.mark.parametrize("map_", [*MAPS, *MIXTURE_MAPS])
def test_what_is_not_dense_or_has_no_data_is_named(device: torch.device, map_: Map) -> None:
    x, params = torch.ones(3, 4, device=device), torch.ones(3, 2, 4, device=device)
    with pytest.raises(ValueError, match="tensors must be dense"):
        map_(x.to_sparse(), params)
    with pytest.raises(ValueError, match="params: must be on the device of"):
        map_(x, params.to("meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("map_", MAPS)
def test_mixed_devices_are_named(map_: Map) -> None:
    with pytest.raises(ValueError, match="params: must be on the device of x"):
        map_(torch.ones(3, 4, device="cuda"), torch.ones(3, 2, 4))
