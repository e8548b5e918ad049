"""Weight norm of many layers at once: beside torch's, row by row, unused and frozen layers, what is
not finite, and bad input. The laws of every op are in test_ops.py; flows, in
test_flows_folding.py."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import fingerprints
from thread_counts import by_threads
from torch import Tensor

from coopflow_ext import ops

# Convolutions, a linear layer, a factor per channel, rows of several tiles with a rest; more layers
# than one launch of a GPU has.
SHAPES = (
    (8, 6, 3, 3), (5, 7, 1, 1), (12, 20), (3, 1, 1), (2, 16411), *[(2, 4)] * 61, (4,), (0, 3),
)  # fmt: skip

Layers = tuple[list[Tensor], list[Tensor]]


def layers(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Layers:
    """Leaves: directions and gains."""
    g = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        return x.to(device, dtype).requires_grad_()

    return (
        [leaf(*shape) for shape in SHAPES],
        [leaf(shape[0], *[1] * (len(shape) - 1)) for shape in SHAPES],
    )


def layer_by_layer(directions: list[Tensor], gains: list[Tensor]) -> list[Tensor]:
    """With torch's operator, which divides by zero (the process ends) without rows.

    Of doubles always the CPU's: on an H100 that of torch 2.11 and ours differed by 3.5e-8, as if
    one of them took a root in float.
    """

    def weight(v: Tensor, g: Tensor) -> Tensor:
        if not v.numel():
            return v * g
        if v.dtype == torch.float64:
            return torch._weight_norm(v.cpu(), g.cpu(), 0).to(v.device)
        return torch._weight_norm(v, g, 0)

    return [weight(v, g) for v, g in zip(directions, gains, strict=True)]


Weights = list[Tensor] | tuple[Tensor, ...]


def cotangents(weights: Weights) -> list[Tensor]:
    """Every element's differs."""
    numbers = [torch.arange(w.numel(), dtype=torch.float64).mul(1.7).sin() for w in weights]
    return [n.view(w.shape).to(w) for n, w in zip(numbers, weights, strict=True)]


def gradients(weights: Weights, given: Layers) -> tuple[Tensor, ...]:
    return torch.autograd.grad(weights, [*given[0], *given[1]], cotangents(weights))


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-6), (torch.float64, 1e-15), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)],
)
def test_is_torchs_own_to_rounding(device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """Each bound is a part of a layer's largest number; of gradients, ten times as much."""
    given = layers(dtype, device)
    weights, expected = ops.weight_norm(*given), layer_by_layer(*given)
    for ours, other in zip(weights, expected, strict=True):
        assert (ours.shape, ours.dtype) == (other.shape, dtype)
        scale = other.abs().max().item() if other.numel() else 0.0
        torch.testing.assert_close(ours, other, rtol=0, atol=bound * scale)
    for ours, other in zip(gradients(weights, given), gradients(expected, given), strict=True):
        # Of a row of one number the direction has no gradient but for rounding.
        scale = max(1.0, other.abs().max().item()) if other.numel() else 0.0
        torch.testing.assert_close(ours, other, rtol=0, atol=10 * bound * scale)


def test_directions_of_ones_stay_where_they_are(device: torch.device) -> None:
    """Factors per channel start so; the gain takes all of their gradient."""
    v, g = torch.ones(5, 1, 1, device=device), torch.rand(5, 1, 1, device=device)
    (w,) = ops.weight_norm([v.requires_grad_()], [g.requires_grad_()])
    grad_v, grad_g = torch.autograd.grad(w.square().sum(), (v, g))
    assert torch.equal(w, g)
    assert torch.equal(grad_v, torch.zeros_like(v))
    assert torch.equal(grad_g, 2 * g)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf, 1e30, 1e-30])
def test_rows_without_a_norm_are_torchs_own(device: torch.device, value: float) -> None:
    """Of zeros, of numbers that are not finite, and of squares out of range; others stay."""
    v, g = torch.rand(4, 9, device=device), torch.rand(4, 1, device=device)
    plain = ops.weight_norm([v], [g])
    v[1] = value
    given = [v.requires_grad_()], [g.requires_grad_()]
    weights, expected = ops.weight_norm(*given), layer_by_layer(*given)
    torch.testing.assert_close(weights[0], expected[0], equal_nan=True)
    assert torch.equal(weights[0][2:], plain[0][2:])
    if value == 0:
        assert weights[0][1].isnan().all()
    for ours, other in zip(gradients(weights, given), gradients(expected, given), strict=True):
        assert torch.equal(ours.isfinite(), other.isfinite())
        finite = other.isfinite()
        torch.testing.assert_close(ours[finite], other[finite], rtol=1e-5, atol=1e-6)


# --- rows, layers and their order -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_layer_does_not_know_the_others(device: torch.device, dtype: torch.dtype) -> None:
    given = layers(dtype, device)
    together = ops.weight_norm(*given)
    found = gradients(together, given)
    count = len(SHAPES)
    for i in range(count):
        alone = [given[0][i]], [given[1][i]]
        (weight,) = ops.weight_norm(*alone)
        assert torch.equal(weight, together[i])
        for ours, other in zip(gradients([weight], alone), found[i::count], strict=True):
            assert torch.equal(ours, other)


def test_gradients_do_not_know_the_threads() -> None:
    given = layers()
    # Nothing but our ops runs on several threads: torch's own are no business of a race detector.
    fixed = cotangents(given[0])
    leaves = [*given[0], *given[1]]
    one, *others = by_threads(lambda: torch.autograd.grad(ops.weight_norm(*given), leaves, fixed))
    assert all(all(map(torch.equal, one, other)) for other in others)


_FINGERPRINT = """
import hashlib, torch
import coopflow_ext as cf
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = ((5, 7, 3, 3), (3, 1), (4, 600))
    v, gains = ([torch.randn(s, generator=g).to(dtype).requires_grad_() for s in of]
                for of in (shapes, [(s[0], *[1] * (len(s) - 1)) for s in shapes]))
    w = cf.ops.weight_norm(v, gains)
    for t in (*w, *torch.autograd.grad(sum(t.sin().sum() for t in w), [*v, *gains])):
        digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_instruction_sets_give_the_same_bits() -> None:
    prints = fingerprints(_FINGERPRINT)
    assert len(set(prints.values())) == 1, prints


def test_directions_in_channels_last(device: torch.device) -> None:
    """And gradients of weights that lie so, as cudnn gives them."""
    v = torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    g = torch.rand(4, 1, 1, 1, device=device, requires_grad=True)
    (expected,) = ops.weight_norm([v], [g])
    (weight,) = ops.weight_norm([v.contiguous(memory_format=torch.channels_last)], [g])
    assert torch.equal(weight, expected)
    plain = torch.randn_like(weight, memory_format=torch.contiguous_format)
    spread = plain.contiguous(memory_format=torch.channels_last)
    assert not spread.is_contiguous()
    for one, other in zip(
        torch.autograd.grad(weight, (v, g), spread),
        torch.autograd.grad(expected, (v, g), plain),
        strict=True,
    ):
        assert torch.equal(one, other)


# --- what is kept, and what is not wanted ---------------------------------------------------------


def test_nothing_is_kept_but_the_parameters(device: torch.device) -> None:
    given, kept = layers(device=device), set()

    def keep(t: Tensor) -> Tensor:
        kept.add(t.untyped_storage()._cdata)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        weights = ops.weight_norm(*given)
    assert all(w.requires_grad for w in weights)
    assert kept <= {t.untyped_storage()._cdata for of in given for t in of}


def test_layers_that_nobody_used_get_no_gradients(device: torch.device) -> None:
    directions, gains = layers(device=device)
    weights = ops.weight_norm(directions, gains)
    (weights[2].sum() + weights[4].square().sum()).backward()
    for i, (v, g) in enumerate(zip(directions, gains, strict=True)):
        assert (v.grad is None, g.grad is None) == (i not in (2, 4),) * 2
    alone = [v.detach().requires_grad_() for v in (directions[2], gains[2])]
    ops.weight_norm(alone[:1], alone[1:])[0].sum().backward()
    assert torch.equal(directions[2].grad, alone[0].grad)
    assert torch.equal(gains[2].grad, alone[1].grad)


def test_parameters_that_are_frozen_get_no_gradients(device: torch.device) -> None:
    directions, gains = layers(device=device)
    expected = gradients(ops.weight_norm(directions, gains), (directions, gains))
    for i in range(len(SHAPES)):
        directions[i].requires_grad_(i % 3 != 0)
        gains[i].requires_grad_(i % 3 == 0)
    weights = ops.weight_norm(directions, gains)
    leaves = [t for t in (*directions, *gains) if t.requires_grad]
    wanted = [
        grad for t, grad in zip((*directions, *gains), expected, strict=True) if t.requires_grad
    ]
    numbers = [torch.arange(w.numel(), dtype=torch.float64).mul(1.7).sin() for w in weights]
    loss = sum((w * n.view(w.shape).to(w)).sum() for w, n in zip(weights, numbers, strict=True))
    loss.backward()
    assert all(torch.equal(t.grad, grad) for t, grad in zip(leaves, wanted, strict=True))
    assert all(t.grad is None for t in (*directions, *gains) if not t.requires_grad)


def test_no_layers() -> None:
    assert ops.weight_norm([], []) == ()


# --- bad input ------------------------------------------------------------------------------------


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    v, g = torch.ones(3, 4, device=device), torch.ones(3, 1, device=device)
    for directions, gains, error, message in (
        ([v, v], [g], ValueError, "gains must be as many as the directions, 2, got 1"),
        (v, [g], TypeError, "directions must be a sequence of tensors, got Tensor"),
        ([v], {0: g}, TypeError, "gains must be a sequence of tensors, got dict"),
        ([v, None], [g, g], TypeError, r"directions\[1\] must be a tensor, got NoneType"),
        ([v.long()], [g], TypeError, r"directions\[0\]: must have dtype float32, .*got .*int64"),
        ([v, v.double()], [g, g], TypeError, r"directions\[1\]: must have dtype float32, got .*64"),
        ([v], [g.half()], TypeError, r"gains\[0\]: must have dtype float32, got dtype float16"),
        ([v[0, 0]], [g], ValueError, r"directions\[0\]: must have rows, got shape \(\)"),
        ([v, v], [g, g[:2]], ValueError, r"gains\[1\]: must have shape \(rows, 1, \.\.\.\) beside"),
        ([v], [g[:, 0]], ValueError, r"directions\[0\] of shape \(3, 4\), got \(3,\)"),
        ([v], [v], ValueError, r"gains\[0\]: .*\(3, 4\), got \(3, 4\)"),
    ):
        with pytest.raises(error, match=message):
            ops.weight_norm(directions, gains)


def test_the_raw_ops_check_what_they_are_given() -> None:
    v, g = torch.ones(3, 4), torch.ones(3, 1)
    raw = torch.ops.coopflow.weight_norm_backward
    for arguments, message in (
        (([v], [v, v], [g, g]), "grads: must be as many as the directions, 2, got 1"),
        (([v], [v], [g, g]), "gains: must be as many as the directions, 1, got 2"),
        (([v[:2]], [v], [g]), r"grads\[0\]: must have the shape of directions\[0\], \(3, 4\)"),
        (([v.double()], [v], [g]), r"grads\[0\]: must have dtype float32"),
        (([v.t().contiguous().t()], [v], [g]), r"grads\[0\]: must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw(*arguments)
    with pytest.raises(RuntimeError, match=r"directions\[1\]: must be contiguous"):
        torch.ops.coopflow.weight_norm([v, v.t().contiguous().t()], [g, g])
