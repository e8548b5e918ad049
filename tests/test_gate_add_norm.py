"""LayerNorm of a gated residual sum: beside torch's own operators, rows of any length and layout,
parameters of another dtype, what is kept, what is not finite, and bad input. The laws of every op
are in test_ops.py; blocks of a flow, in test_flows_flowpp.py."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from instruction_sets import fingerprints
from thread_counts import by_threads
from torch import Tensor
from torch.nn import functional

from coopflow_ext import ops

# Rows that a warp's items fill and such that they do not; several tiles of a CPU with a
# rest; one row; several parts of the parameters' sums, the last of which is not full.
SHAPES = (
    (2, 5, 24), (2, 5, 32), (7, 96), (5, 33), (2, 3, 4, 6), (1, 600), (2, 1031),
    (300, 20), (129, 7), (1024, 64),
)  # fmt: skip


class Given(NamedTuple):
    """Leaves."""

    x: Tensor
    gates: Tensor
    weight: Tensor
    bias: Tensor

    def to(self, dtype: torch.dtype) -> Given:
        return Given(*(t.detach().to(dtype).requires_grad_() for t in self))


def given(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    parameters: torch.dtype | None = None,
) -> Given:
    g = torch.Generator().manual_seed(0)

    def leaf(*shape: int, dtype: torch.dtype) -> Tensor:
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        return x.to(device, dtype).requires_grad_()

    *rows, channels = shape
    of_parameters = dtype if parameters is None else parameters
    return Given(
        leaf(*shape, dtype=dtype),
        leaf(*rows, 2 * channels, dtype=dtype),
        leaf(channels, dtype=of_parameters),
        leaf(channels, dtype=of_parameters),
    )


def plain(x: Tensor, gates: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    sums = x + functional.glu(gates, -1)
    return functional.layer_norm(sums, weight.shape, weight, bias, eps)


def gradients(y: Tensor, of: Given, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Of a sum in which every element counts, differently, with weights that the dtype holds."""
    numbers = torch.arange(y.numel(), dtype=torch.float64).mul(1.7).sin().view(y.shape)
    return torch.autograd.grad(y, of, numbers.to(dtype or y.dtype).to(y))


def assert_near(ours: Tensor, exact: Tensor, bound: float) -> None:
    """The bound is a part of the largest number."""
    torch.testing.assert_close(
        ours.double(), exact.double(), rtol=0, atol=bound * max(1.0, exact.abs().max().item())
    )


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (torch.float32, 2e-6),
        (torch.float64, 4e-15),
        (torch.bfloat16, 4.1e-3),
        (torch.float16, 6e-4),
    ],
)
def test_is_torchs_own_to_rounding(
    device: torch.device, dtype: torch.dtype, bound: float, shape: tuple[int, ...]
) -> None:
    """Half precision is rounded once: a half of its eps, where torch rounds each operator's."""
    of = given(shape, dtype, device)
    exact_of = of.to(torch.float64)
    y, exact = ops.gate_add_norm(*of), plain(*exact_of)
    assert (y.shape, y.dtype, y.is_contiguous()) == (shape, dtype, True)
    assert_near(y, exact, bound)
    found, expected = gradients(y, of), gradients(exact, exact_of, dtype)
    for ours, wanted, like in zip(found, expected, of, strict=True):
        assert (ours.shape, ours.dtype) == (like.shape, dtype)
        assert_near(ours, wanted, bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_may_be_wider_than_the_rest(device: torch.device, dtype: torch.dtype) -> None:
    """As in autocast. They are not rounded."""
    of = given((9, 48), dtype, device, parameters=torch.float32)
    exact_of = of.to(torch.float64)
    y = ops.gate_add_norm(*of)
    assert y.dtype == dtype
    assert_near(y, plain(*exact_of), torch.finfo(dtype).eps * 0.51)
    found = gradients(y, of)
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32, torch.float32]
    wanted = gradients(plain(*exact_of), exact_of, dtype)
    for ours, exact in zip(found[2:], wanted[2:], strict=True):
        assert_near(ours, exact, 2e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.3])
def test_eps_is_added_to_the_variance(device: torch.device, eps: float) -> None:
    of = given((6, 40), torch.float64, device)
    y, expected = ops.gate_add_norm(*of, eps=eps), plain(*of, eps=eps)
    torch.testing.assert_close(y, expected)
    for ours, wanted in zip(gradients(y, of), gradients(expected, of), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_single_channel_is_its_bias(device: torch.device, dtype: torch.dtype) -> None:
    of = given((3, 1), dtype, device)
    y = ops.gate_add_norm(*of)
    assert torch.equal(y, of.bias.expand(3, 1))
    *others, grad_bias = torch.autograd.grad(y.sum(), of)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in others)
    assert grad_bias == 3


def test_rows_far_from_zero_keep_their_differences(device: torch.device) -> None:
    """The variance is taken around the mean: as a difference of squares it would be off by a half.
    The sums themselves are rounded, by 1e-4."""
    of = given((4, 64), device=device)
    with torch.no_grad():
        of.x.add_(3000)
    exact = plain(*of.to(torch.float64))
    assert_near(ops.gate_add_norm(*of), exact, 3e-4)


def test_gates_far_from_zero_are_shut_or_open(device: torch.device) -> None:
    """And their gradients vanish smoothly: 1 - sigma is not a difference."""
    of = given((2, 8), device=device)
    with torch.no_grad():
        of.gates[:, 8:] = torch.tensor([-200.0, -80, -20, -1, 1, 20, 80, 200])
    exact_of = of.to(torch.float64)
    y, exact = ops.gate_add_norm(*of), plain(*exact_of)
    assert_near(y, exact, 1e-6)
    ours = gradients(y, of)[1][:, 13].double()
    wanted = gradients(exact, exact_of)[1][:, 13]
    assert (wanted.abs() < 1e-7).all()
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_what_is_not_finite_stays_in_its_row(
    device: torch.device, value: float, where: int
) -> None:
    of = given((5, 12), device=device)
    expected = ops.gate_add_norm(*of).detach()
    with torch.no_grad():
        of[where][1, 3] = value
    y = ops.gate_add_norm(*of)
    assert y[1].isnan().all()
    others = torch.tensor([0, 2, 3, 4])
    assert torch.equal(y[others], expected[others])
    grad_x, grad_gates, *_ = gradients(y, of)
    assert grad_x[1].isnan().all()
    assert grad_x[others].isfinite().all()
    assert grad_gates[others].isfinite().all()


# --- rows, layouts and their order ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_in_channels_last_are_not_copied(device: torch.device, dtype: torch.dtype) -> None:
    """Their channels seen as rows lie so already; contiguous images are copied first."""
    of = given((2, 3, 5, 8), dtype, device)
    y = ops.gate_add_norm(*of)
    image = of.x.detach().permute(0, 3, 1, 2)
    gates = of.gates.detach().permute(0, 3, 1, 2).contiguous()
    spread = gates.permute(0, 2, 3, 1)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert not spread.is_contiguous()
    assert torch.equal(ops.gate_add_norm(image.permute(0, 2, 3, 1), spread, *of[2:]), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_does_not_know_the_others(device: torch.device, dtype: torch.dtype) -> None:
    of = given((300, 24), dtype, device)
    y = ops.gate_add_norm(*of)
    grad_x, grad_gates, *_ = torch.autograd.grad(y, of, torch.ones_like(y))
    part = Given(*(t.detach()[17:29].requires_grad_() for t in of[:2]), *of[2:])
    few = ops.gate_add_norm(*part)
    assert torch.equal(few, y[17:29])
    found = torch.autograd.grad(few, part, torch.ones_like(few))
    assert torch.equal(found[0], grad_x[17:29])
    assert torch.equal(found[1], grad_gates[17:29])


def test_gradients_do_not_know_the_threads() -> None:
    of = given((2000, 40))
    # Nothing but our ops runs on several threads: torch's own are no business of a race detector.
    fixed = torch.randn(2000, 40, generator=torch.Generator().manual_seed(1))
    one, *others = by_threads(lambda: torch.autograd.grad(ops.gate_add_norm(*of), of, fixed))
    assert all(all(map(torch.equal, one, other)) for other in others)


_FINGERPRINT = """
import hashlib, torch
import coopflow_ext as cf
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for rows, channels in ((5, 24), (200, 33), (2, 600)):
        g = torch.Generator().manual_seed(0)
        x, gates, weight, bias = (torch.randn(s, generator=g).to(dtype).requires_grad_()
                                  for s in ((rows, channels), (rows, 2 * channels), (channels,),
                                            (channels,)))
        y = cf.ops.gate_add_norm(x, gates, weight, bias)
        grad_y = torch.randn(y.shape, generator=g).to(dtype)
        for t in (y, *torch.autograd.grad(y, (x, gates, weight, bias), grad_y)):
            digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_instruction_sets_give_the_same_bits() -> None:
    prints = fingerprints(_FINGERPRINT)
    assert len(set(prints.values())) == 1, prints


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_nothing_to_norm(device: torch.device, shape: tuple[int, ...]) -> None:
    """Parameters that no row used have zeros for gradients."""
    of = given(shape, device=device)
    y = ops.gate_add_norm(*of)
    assert y.shape == shape
    found = torch.autograd.grad(y.sum(), of)
    assert [t.shape for t in found] == [t.shape for t in of]
    assert all(torch.equal(t, torch.zeros_like(t)) for t in found)


# --- what is kept ---------------------------------------------------------------------------------


def test_little_is_kept_but_the_arguments(device: torch.device) -> None:
    """Two numbers a row."""
    of, kept = given((50, 96), device=device), []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = ops.gate_add_norm(*of)
    assert y.requires_grad
    arguments = {t.untyped_storage()._cdata for t in of}
    new = [t for t in kept if t.untyped_storage()._cdata not in arguments]
    assert [t.shape for t in new] == [(50, 2)]


# --- bad input ------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    x, gates = torch.ones(2, 3, device=device), torch.ones(2, 6, device=device)
    w = torch.ones(3, device=device)
    for arguments, error, message in (
        ((x.long(), gates, w, w), TypeError, "x: must have dtype float32, .* got dtype int64"),
        ((x[0, 0], gates, w, w), ValueError, r"x: must have shape \(\.\.\., C\), got \(\)"),
        ((x, gates.half(), w, w), TypeError, "gates: must have dtype float32, got dtype float16"),
        ((x, x, w, w), ValueError, r"gates: must have 6 in the last dimension .*\(2, 3\), got \(2"),
        ((x, gates[:1], w, w), ValueError, r"gates: must have 6 .* the others of x, \(2, 3\), got"),
        (
            (x, gates, w[:2], w),
            ValueError,
            r"weight: must have shape \(C,\) .*, got \(2,\)",
        ),
        ((x, gates, w, x), ValueError, r"bias: must have shape \(C,\) .*\(2, 3\), got \(2, 3\)"),
        ((x, gates, w.long(), w), TypeError, "weight: must have dtype float32, got dtype int64"),
        ((x, gates, w, w.cfloat()), TypeError, "bias: must have dtype float32, got"),
        ((x, None, w, w), TypeError, "gates must be a tensor, got NoneType"),
    ):
        with pytest.raises(error, match=message):
            ops.gate_add_norm(*arguments)
    for eps, error, message in (
        (-1e-5, ValueError, "eps: must not be negative, got -1e-05"),
        (float("nan"), ValueError, "eps: must be finite, got nan"),
        (1e300, ValueError, r"eps: must be finite in float32, got 1e\+300"),
        ("small", TypeError, "eps"),
    ):
        with pytest.raises(error, match=message):
            ops.gate_add_norm(x, gates, w, w, eps=eps)


def test_the_raw_ops_check_what_they_are_given() -> None:
    x, gates, w, norms = torch.ones(2, 3), torch.ones(2, 6), torch.ones(3), torch.ones(2, 2)
    raw = torch.ops.coopflow.gate_add_norm_backward
    for arguments, message in (
        ((x[:1], x, gates, w, norms), r"grad_y: must have the shape of x, \(2, 3\), got \(1, 3\)"),
        ((x.double(), x, gates, w, norms), "grad_y: must have dtype float32, got dtype float64"),
        ((x, x, gates, w, norms[:1]), "norms: must have 2 in the last dimension"),
        ((x, x, gates, w, norms.double()), "norms: must have dtype float32, got dtype float64"),
        ((x, x, gates, w.half(), norms), "weight: must have dtype float32, got dtype float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw(*arguments)
    half = x.bfloat16(), gates.bfloat16(), w.bfloat16(), w
    with pytest.raises(RuntimeError, match="weight: must have dtype float32, got dtype bfloat16"):
        torch.ops.coopflow.gate_add_norm(*half)
