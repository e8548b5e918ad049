"""What is particular to the affine coupling: its rounding in half precision, extreme scales, bad
input. The laws of every op are in test_ops.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_table import DTYPES, MIXED_DTYPES, Draw, affine_params
from torch import Tensor

import coopflow_ext as cf

MAPS = [cf.ops.affine_coupling, cf.ops.affine_coupling_inverse]
ORACLES = {
    cf.ops.affine_coupling: cf.reference.affine_coupling,
    cf.ops.affine_coupling_inverse: cf.reference.affine_coupling_inverse,
}
Map = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, params_dtype: torch.dtype, device: Any
) -> tuple[Tensor, Tensor]:
    draw = Draw(shape, dtype, params_dtype, device)
    return draw.normal(), affine_params(draw)


@pytest.mark.parametrize(("dtype", "params_dtype"), [*DTYPES[2:], *MIXED_DTYPES])
def test_half_precision_errs_at_most_twice_as_much_as_plain_torch(
    device: torch.device, dtype: torch.dtype, params_dtype: torch.dtype
) -> None:
    x, params = inputs((64, 300), dtype, params_dtype, device)
    exact, _ = cf.reference.affine_coupling(x.double(), params.double())
    ours, _ = cf.ops.affine_coupling(x, params)
    a, b = params.unbind(1)
    plain = x * a.exp() + b
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize(("dtype", "params_dtype"), DTYPES + MIXED_DTYPES)
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
def test_extreme_scales_do_not_make_nan(device: torch.device, map_: Map) -> None:
    a = torch.tensor([-200.0, -95.0, -87.5, 0.0, 60.0], device=device)
    params = torch.stack((a, torch.ones(5, device=device)))[None]
    x = torch.full((1, 5), 2.0, device=device)
    y, _ = map_(x, params)
    expected, _ = ORACLES[map_](x, params)
    assert not y.isnan().any()
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-44)


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
