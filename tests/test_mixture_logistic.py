"""The mixture-of-logistics coupling: accuracy against float64 and mpmath, derivatives, awkward
shapes, dtypes, determinism and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import mpmath
import pytest
import torch
from instruction_sets import fingerprints
from safetensors.torch import load_file
from torch import Tensor

import coopflow_ext as cf
from coopflow_ext import reference

GOLDEN = Path(__file__).parent / "data" / "mixture_coupling.safetensors"
FAMILIES = ("mild", "trained", "spiky")
OPS = {
    "forward": cf.ops.mixture_logistic_coupling,
    "inverse": cf.ops.mixture_logistic_coupling_inverse,
}
ULP = 2.0**-23
# Every shape holds something that blocks and vectors stumble over.
SHAPES = ((1,), (3, 1), (2, 3), (5, 127), (2, 3, 4, 6), (1, 4099), (2, 16400))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(family: str, batch: int, components: int, size: int, seed: int = 0) -> Tensor:
    """Parameters (batch, 3K, size) in float32, spread like the golden families and worse."""
    g = generator(seed)
    shape = (batch, components, size)

    def normal(scale: float) -> Tensor:
        return torch.randn(shape, generator=g) * scale

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=g) * (high - low) + low

    parts = {
        "mild": lambda: (normal(1), normal(0.5), normal(0.3)),
        "trained": lambda: (normal(1), normal(2), normal(1) - 1.5),
        "spiky": lambda: (normal(1), normal(3), uniform(-7, 1)),
        "adversarial": lambda: (normal(4), uniform(-20, 20), uniform(-7, 2)),
    }
    return torch.cat(parts[family](), dim=1)


def with_affine(params: Tensor, seed: int = 1) -> Tensor:
    """a in (−1, 1) and b put before the mixture."""
    shape = (params.shape[0], 1, *params.shape[2:])
    a, b = torch.randn((2, *shape), generator=generator(seed)).to(params)
    return torch.cat((a.tanh(), b, params), dim=1)


def case(
    batch: int, components: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    size = math.prod(shape)
    params = with_affine(mixture("trained", batch, components, size)).view(batch, -1, *shape)
    x = torch.randn((batch, *shape), generator=generator(2)) * 2
    return x.to(device, dtype), params.to(device, dtype)


def exact(x: float | mpmath.mpf, params: list[float]) -> tuple[mpmath.mpf, mpmath.mpf]:
    """logit F(x) and log d logit F/dx of a mixture (3K numbers), to 50 digits."""
    with mpmath.workdps(50):
        k = len(params) // 3
        cdf, survival, density, weight = (mpmath.mpf(0) for _ in range(4))
        for logit, mean, log_scale in zip(
            params[:k], params[k : 2 * k], params[2 * k :], strict=True
        ):
            w, rate = mpmath.exp(logit), mpmath.exp(-max(log_scale, -7.0))
            t = (mpmath.mpf(x) - mean) * rate
            below, above = 1 / (1 + mpmath.exp(-t)), 1 / (1 + mpmath.exp(t))
            cdf, survival, weight = cdf + w * below, survival + w * above, weight + w
            density += w * below * above * rate
        return mpmath.log(cdf / survival), mpmath.log(density * weight / (cdf * survival))


def logit_and_slope(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, with plain PyTorch."""
    _, _, terms = reference._mixture_parameters(params.double(), affine=False)
    below, above, density = reference.mixture_logistic_log_cdf(x.double(), *terms)
    return below - above, (density - below - above).exp()


def ulp_of(x: Tensor) -> Tensor:
    return torch.nextafter(x.abs(), torch.full_like(x, math.inf)) - x.abs()


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Tensor]]:
    stored = load_file(GOLDEN)
    families: dict[str, dict[str, Tensor]] = {}
    for name, value in stored.items():
        family, key = name.split(".")
        families.setdefault(family, {})[key] = value
    for values in families.values():
        head = torch.stack((values["a"], values["b"]), dim=1)
        values["params"] = torch.cat((head, values["pi"], values["mu"], values["log_s"]), dim=1)
    return families


# --- accuracy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_meets_the_stored_float64(
    family: str, golden: dict[str, dict[str, Tensor]], device: torch.device
) -> None:
    g = golden[family]
    y, ladj = cf.ops.mixture_logistic_coupling(g["x"].to(device), g["params"].to(device))
    a, b, expected = g["a"].double(), g["b"].double(), g["y_float64"]
    logit = expected * (-a).exp() - b
    bound = 1e-6 * (1 + logit.abs() + b.abs()) * a.exp()
    assert ((y.cpu() - expected).abs() <= bound).all()
    torch.testing.assert_close(ladj.cpu().double(), g["logdet_float64"], rtol=2e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_meets_the_stored_float64(
    family: str, golden: dict[str, dict[str, Tensor]], device: torch.device
) -> None:
    g = golden[family]
    x, params = g["x"].to(device).double(), g["params"].to(device).double()
    y, ladj = cf.ops.mixture_logistic_coupling(x, params)
    torch.testing.assert_close(y.cpu(), g["y_float64"], rtol=1e-12, atol=1e-12)
    # The stored log-determinant of the spiky family is itself 2.5e-12 from the exact one, which the
    # next test has.
    rtol = 3e-12 if family == "spiky" else 1e-12
    torch.testing.assert_close(ladj.cpu(), g["logdet_float64"], rtol=rtol, atol=0)


def test_float64_log_det_of_the_spiky_family_is_exact(
    golden: dict[str, dict[str, Tensor]], device: torch.device
) -> None:
    g = golden["spiky"]
    _, ladj = cf.ops.mixture_logistic_coupling(
        g["x"].to(device).double(), g["params"].to(device).double()
    )
    for row in range(g["x"].shape[0]):
        columns = g["params"][row, 2:].flatten(1).T.double().tolist()
        total = sum(
            exact(x, column)[1] + a
            for x, a, column in zip(
                g["x"][row].flatten().double().tolist(),
                g["a"][row].flatten().double().tolist(),
                columns,
                strict=True,
            )
        )
        assert float(abs(ladj[row].item() - total) / abs(total)) <= 1e-12


@pytest.mark.parametrize("components", [1, 4, 5, 8, 16, 32, 33])
@pytest.mark.parametrize("reach", [1.0, 8.0, 40.0])
@pytest.mark.parametrize("family", ["mild", "trained"])
def test_inverse_solves_for_every_target(
    family: str, reach: float, components: int, device: torch.device
) -> None:
    params = mixture(family, 16, components, 200, seed=3)
    v = (torch.rand((16, 200), generator=generator(4)) * 2 - 1) * reach
    x, _ = cf.ops.mixture_logistic_coupling_inverse(v.to(device), params.to(device), affine=False)
    x = x.cpu()
    logit, slope = logit_and_slope(x, params)
    bound = 8 * ULP * v.abs().clamp(min=1) + 2 * ulp_of(x) * slope
    assert ((logit - v).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", [*FAMILIES, "adversarial"])
def test_inverse_solves_as_mpmath_sees_it(
    family: str, dtype: torch.dtype, device: torch.device
) -> None:
    """The exact logit F reaches the target within two units in the last place of x."""
    params = mixture(family, 1, 8, 40, seed=5).to(dtype)
    v = torch.linspace(-40, 40, 40, dtype=dtype).unsqueeze(0)
    x, _ = cf.ops.mixture_logistic_coupling_inverse(v.to(device), params.to(device), affine=False)
    ulp = ulp_of(x.cpu())[0].tolist()
    for i, column in enumerate(params[0].T.double().tolist()):
        target = v[0, i].item()
        slack = 8 * torch.finfo(dtype).eps * max(1, abs(target))
        with mpmath.workdps(50):
            root, step = mpmath.mpf(x[0, i].item()), 2 * ulp[i]
            low, high = exact(root - step, column)[0], exact(root + step, column)[0]
            assert low - slack <= target <= high + slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["spiky", "adversarial"])
def test_inverse_converges_on_sharp_components(
    family: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Neighbouring numbers around each root enclose it, or logit F(root) is the target."""
    params = mixture(family, 8, 32, 100, seed=6)
    v = (torch.rand((8, 100), generator=generator(7), dtype=torch.float64) * 2 - 1) * 40
    v, params = v.to(dtype), params.to(dtype)
    x, _ = cf.ops.mixture_logistic_coupling_inverse(v.to(device), params.to(device), affine=False)
    x = x.cpu()
    assert x.isfinite().all()
    ulp = torch.finfo(dtype).eps
    tolerance = 8 * ulp * v.abs().clamp(min=1)
    low, high = (
        logit_and_slope(x.double() + n * ulp * x.double().abs(), params)[0] for n in (-2, 2)
    )
    assert ((low <= v + tolerance) & (high >= v - tolerance)).all()


# The log-determinant's own error, and scales of down to e^-7 which the last step (at most 4 ulp of
# max(1, |x|)) changes: at most 2 e^7 times as much.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", [*FAMILIES, "adversarial"])
@pytest.mark.parametrize("components", [4, 32])
def test_ladj_of_the_inverse_belongs_to_its_root(
    components: int, family: str, dtype: torch.dtype, device: torch.device
) -> None:
    params = mixture(family, 20000, components, 1, seed=3).to(dtype)
    v = (torch.rand((20000, 1), generator=generator(4), dtype=torch.float64) * 6 - 3).to(dtype)
    x, ladj = cf.ops.mixture_logistic_coupling_inverse(
        v.to(device), params.to(device), affine=False
    )
    x, ladj = x.cpu(), ladj.cpu().double()
    _, slope = logit_and_slope(x, params)
    error = (ladj + slope[:, 0].log()).abs()
    eps = torch.finfo(dtype).eps
    sharpest = params[:, 2 * components :, 0].amin(1).clamp(min=-7).neg().exp().double()
    moved = 2 * sharpest * 4 * eps * x[:, 0].double().abs().clamp(min=1)
    assert (error <= 32 * eps * ladj.abs().clamp(min=1) + moved).all()


@pytest.mark.parametrize("family", ["mild", "trained"])
def test_round_trip_where_the_density_is_not_flat(family: str, device: torch.device) -> None:
    params = with_affine(mixture(family, 8, 32, 300, seed=8)).to(device)
    x = (torch.randn((8, 300), generator=generator(9))).to(device)
    y, ladj = cf.ops.mixture_logistic_coupling(x, params)
    back, inverse_ladj = cf.ops.mixture_logistic_coupling_inverse(y, params)
    _, slope = logit_and_slope(x, params[:, 2:])
    steep = slope > 0.3
    assert steep.float().mean() > 0.8
    assert (back - x).abs()[steep].max() <= 1e-5
    torch.testing.assert_close(inverse_ladj, -ladj, rtol=2e-5, atol=2e-5)


def test_round_trip_in_float64(device: torch.device) -> None:
    params = with_affine(mixture("trained", 4, 16, 100, seed=8)).to(device).double()
    y = torch.randn((4, 100), generator=generator(9), dtype=torch.float64).to(device)
    x, ladj = cf.ops.mixture_logistic_coupling_inverse(y, params)
    again, forward_ladj = cf.ops.mixture_logistic_coupling(x, params)
    torch.testing.assert_close(again, y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(forward_ladj, -ladj, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPS)
def test_half_parameters_are_computed_in_float(
    name: str, half: torch.dtype, device: torch.device
) -> None:
    x, params = case(3, 8, (50,), device, torch.float32)
    params = params.to(half)
    grads = []
    for given in (params, params.float()):
        leaves = (x.clone().requires_grad_(), given.clone().requires_grad_())
        out, ladj = OPS[name](*leaves)
        gx, gparams = torch.autograd.grad((out.sum() + ladj.sum()), leaves)
        grads.append((out, ladj, gx, gparams.to(half)))
    for mixed, full in zip(*grads, strict=True):
        assert torch.equal(mixed, full)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPS)
def test_half_state_is_rounded_once(name: str, half: torch.dtype, device: torch.device) -> None:
    x, params = (t.to(half) for t in case(3, 8, (50,), device, torch.float32))
    out, ladj = OPS[name](x, params)
    expected, expected_ladj = OPS[name](x.float(), params.float())
    assert (out.dtype, ladj.dtype) == (half, torch.float32)
    assert torch.equal(out, expected.to(half))
    assert torch.equal(ladj, expected_ladj)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPS)
def test_gradients_of_a_half_state_are_those_of_float(
    name: str, half: torch.dtype, device: torch.device
) -> None:
    """Those of the inverse are taken at the root, not where its rounding to half lies."""
    x, params = (t.to(half) for t in case(3, 8, (50,), device, torch.float32))
    grads = []
    for dtype in (half, torch.float32):
        leaves = tuple(t.to(dtype).requires_grad_() for t in (x, params))
        out, ladj = OPS[name](*leaves)
        grads.append(torch.autograd.grad(out.float().sum() + ladj.sum(), leaves))
    for got, expected in zip(*grads, strict=True):
        assert torch.equal(got, expected.to(half))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("components", [1, 2, 3, 4, 5, 8, 16, 32, 33, 40])
@pytest.mark.parametrize("name", OPS)
def test_equals_the_reference_for_every_k(
    name: str, components: int, affine: bool, device: torch.device
) -> None:
    x, params = case(2, components, (37,), device, torch.float64)
    params = params if affine else params[:, 2:]
    out, ladj = OPS[name](x, params, affine=affine)
    oracle = getattr(reference, OPS[name].__name__)
    expected, expected_ladj = oracle(x, params, affine=affine)
    if name == "inverse":  # the oracle's bisection stops at 1e-10
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ladj, expected_ladj, rtol=1e-7, atol=1e-7)
    else:
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(ladj, expected_ladj, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_awkward_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Each element depends on itself alone: a flat batch of chains gives the same numbers."""
    x, params = case(2, 3, shape, device, dtype)
    for op in OPS.values():
        out, ladj = op(x, params)
        alone, parts = op(
            x.reshape(-1, 1), params.flatten(2).movedim(2, 1).reshape(-1, params.shape[1], 1)
        )
        assert torch.equal(out.flatten(), alone.flatten())
        torch.testing.assert_close(ladj, parts.view(2, -1).sum(1), rtol=1e-5, atol=1e-4)


# --- derivatives ----------------------------------------------------------------------------------


def test_gradients_of_the_legacy_inverse(device: torch.device) -> None:
    """Some targets beyond the clamp, some inside."""
    y, params = case(2, 3, (6,), device, torch.float64)
    y[:, ::2] *= 30
    inputs = (y.requires_grad_(), params.requires_grad_())

    def legacy(y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return cf.ops.mixture_logistic_coupling_inverse(y, params, legacy_cdf_clamp=True)

    assert torch.autograd.gradcheck(legacy, inputs)
    assert torch.autograd.gradgradcheck(legacy, inputs)


@pytest.mark.parametrize("name", OPS)
def test_float32_gradients(name: str, device: torch.device) -> None:
    gradients = []
    for dtype in (torch.float32, torch.float64):
        inputs = tuple(t.requires_grad_() for t in case(4, 32, (60,), device, dtype))
        out, ladj = OPS[name](*inputs)
        loss = (out * torch.linspace(-1, 1, 60, device=device)).sum() + ladj.sum()
        gradients.append(torch.autograd.grad(loss, inputs))
    for got, expected in zip(*gradients, strict=True):
        scale = expected.abs().max()
        assert (got - expected).abs().max() <= (1e-4 if name == "inverse" else 2e-6) * scale


@pytest.mark.parametrize("name", OPS)
def test_clamped_log_scales_have_no_gradient(name: str, device: torch.device) -> None:
    x, params = case(2, 4, (10,), device, torch.float64)
    params[:, -1] = -7.5
    params[:, -2] = -7.0
    params.requires_grad_()
    out, ladj = OPS[name](x, params)
    clamped, ladj_clamped = OPS[name](x, params.detach().clamp(min=-7.0))
    assert torch.equal(out, clamped)
    assert torch.equal(ladj, ladj_clamped)
    (gradient,) = torch.autograd.grad(out.sum() + ladj.sum(), params)
    assert (gradient[:, -1] == 0).all()
    assert (gradient[:, -2] != 0).any()


def test_backward_keeps_no_tensor_of_components(device: torch.device) -> None:
    x, params = (t.requires_grad_() for t in case(2, 32, (50,), device, torch.float32))
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        for op in OPS.values():
            op(x, params)
    large = [t for t in kept if t.numel() > x.numel()]
    assert large
    assert all(t.data_ptr() == params.data_ptr() for t in large)


# --- the published inverse's clamp ----------------------------------------------------------------


def test_legacy_cdf_clamp(device: torch.device) -> None:
    """The root is that of the clamped CDF value, the log-determinant takes the unclamped one."""
    params = mixture("trained", 3, 4, 20, seed=11).to(device).double()
    v = torch.linspace(-30, 30, 60, dtype=torch.float64, device=device).view(3, 20)
    x, ladj = cf.ops.mixture_logistic_coupling_inverse(
        v, params, affine=False, legacy_cdf_clamp=True
    )
    limit = math.log((1 - 1e-5) / 1e-5)
    clamped, _ = cf.ops.mixture_logistic_coupling_inverse(
        v.clamp(-limit, limit), params, affine=False
    )
    torch.testing.assert_close(x, clamped, rtol=1e-13, atol=1e-13)
    expected_x, expected_ladj = reference.mixture_logistic_coupling_inverse(
        v, params, affine=False, legacy_cdf_clamp=True
    )
    torch.testing.assert_close(x, expected_x, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ladj, expected_ladj, rtol=1e-7, atol=1e-7)
    inside = v.abs() < limit
    free, _ = cf.ops.mixture_logistic_coupling_inverse(v, params, affine=False)
    assert torch.equal(x[inside], free[inside])
    assert (x != free)[~inside].all()


# --- extremes and bad input -----------------------------------------------------------------------


def extremes(components: int, dtype: torch.dtype, log_uniform: bool) -> tuple[Tensor, Tensor]:
    """|x|, |means| ≤ 1e6, |log-scales| ≤ 30, |logits|, |b| ≤ 1e4, |a| ≤ 20, often at the limit."""
    g = generator(components)
    batch, size = 16, 100

    def draw(rows: int, limit: float) -> Tensor:
        u = torch.rand((batch, rows, size), generator=g, dtype=torch.float64) * 2 - 1
        u = torch.where(torch.rand(u.shape, generator=g) < 0.3, u.sign(), u)
        return (u.sign() * 10 ** (8 * u.abs() - 8) if log_uniform else u) * limit

    params = torch.cat(
        (
            draw(1, 20.0),
            draw(1, 1e4),
            draw(components, 1e4),
            draw(components, 1e6),
            draw(components, 30.0),
        ),
        dim=1,
    )
    return draw(1, 1e6)[:, 0].to(dtype), params.to(dtype)


@pytest.mark.parametrize("log_uniform", [False, True])
@pytest.mark.parametrize("components", [1, 4, 7, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_inputs_stay_finite(
    dtype: torch.dtype, components: int, log_uniform: bool, device: torch.device
) -> None:
    x, params = (t.to(device) for t in extremes(components, dtype, log_uniform))
    y, _ = cf.ops.mixture_logistic_coupling(x, params)
    for op, value in (("forward", x), ("inverse", x), ("inverse", y)):
        inputs = (value.clone().requires_grad_(), params.clone().requires_grad_())
        out, ladj = OPS[op](*inputs)
        gradients = torch.autograd.grad(
            (out, ladj), inputs, (torch.ones_like(out), torch.ones_like(ladj))
        )
        assert all(t.isfinite().all() for t in (out, ladj, *gradients))


# The first and the last of the rows that hold a parameter, for K components.
ROWS: dict[str, Callable[[int], int]] = {
    "a": lambda _: 0,
    "b": lambda _: 1,
    "first logit": lambda _: 2,
    "last logit": lambda k: 1 + k,
    "first mean": lambda k: 2 + k,
    "last mean": lambda k: 1 + 2 * k,
    "first log_scale": lambda k: 2 + 2 * k,
    "last log_scale": lambda k: 1 + 3 * k,
}


def with_gradients(name: str, x: Tensor, params: Tensor) -> tuple[Tensor, ...]:
    """The op's results, and the gradients of their sum."""
    inputs = (x.clone().requires_grad_(), params.clone().requires_grad_())
    out, ladj = OPS[name](*inputs)
    gradients = torch.autograd.grad(
        (out, ladj), inputs, (torch.ones_like(out), torch.ones_like(ladj))
    )
    return out.detach(), ladj.detach(), *gradients


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", ["state", *ROWS])
@pytest.mark.parametrize(
    ("dtype", "k"), [(torch.float32, 4), (torch.float64, 5), (torch.bfloat16, 32)]
)
@pytest.mark.parametrize("name", OPS)
def test_what_is_not_finite_is_nan_in_its_element_and_row(
    name: str, dtype: torch.dtype, k: int, row: str, bad: float, device: torch.device
) -> None:
    x, params = case(3, k, (40,), device, dtype)
    params[:, -k:] = params[:, -k:].clamp(min=-6)  # none is clamped, which would have no gradient
    expected = with_gradients(name, x, params)
    x, params = x.clone(), params.clone()
    if row == "state":
        x[1, 17] = bad
    else:
        params[1, ROWS[row](k), 17] = bad
    results = with_gradients(name, x, params)
    out, ladj, grad_x, grad_params = results
    clamped = "log_scale" in row and bad == -math.inf
    of_element = grad_params[1, :, 17]
    assert out[1, 17].isnan()
    assert ladj[1].isnan()
    assert grad_x[1, 17].isnan()
    if clamped:
        assert of_element[ROWS[row](k)] == 0
        of_element = of_element[torch.arange(len(of_element)) != ROWS[row](k)]
    assert of_element.isnan().all()
    for result, good in zip(results, expected, strict=True):
        index = (1, ..., 17) if result.ndim > 1 else 1
        result[index] = good[index]
        assert torch.equal(result, good)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_target_of_the_inverse_that_overflows_is_nan_in_its_element_and_row(
    dtype: torch.dtype, legacy: bool, device: torch.device
) -> None:
    y, params = case(3, 4, (40,), device, dtype)
    y[1, 17], params[1, 0, 17] = torch.finfo(dtype).max / 2, -2
    x, ladj = cf.ops.mixture_logistic_coupling_inverse(y, params, legacy_cdf_clamp=legacy)
    assert x.isnan().nonzero().tolist() == [[1, 17]]
    assert ladj.isnan().tolist() == [False, True, False]


Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
BAD_ARGUMENTS: dict[str, tuple[Change, type[Exception], str]] = {
    "K = 0": (lambda x, p: (x, p[:, :2]), ValueError, r"params: must have shape \(B, 2 \+ 3K"),
    "rows": (lambda x, p: (x, p[:, :-1]), ValueError, r"params: .* got \(2, 10, 5\)"),
    "batch": (lambda x, p: (x, p[:1]), ValueError, "params: must have shape"),
    "shape": (lambda x, p: (x, p[..., :4]), ValueError, "params: must have shape"),
    "dimensions": (lambda x, p: (x[0, 0], p), ValueError, "must have a batch dimension"),
    "integer state": (lambda x, p: (x.long(), p), TypeError, "must have dtype float32"),
    "integer params": (lambda x, p: (x, p.int()), TypeError, "params: must have dtype"),
    "wider params": (lambda x, p: (x, p.double()), TypeError, "params: must have dtype float32"),
    "a list": (lambda x, p: (x.tolist(), p), TypeError, "[xy] must be a tensor, got list"),
    "an array": (
        lambda x, p: (x, p.cpu().numpy()),
        TypeError,
        "params must be a tensor, got nu",
    ),
    "other half": (lambda x, p: (x.bfloat16(), p.half()), TypeError, "params: must have dtype"),
}


@pytest.mark.parametrize("what", BAD_ARGUMENTS)
@pytest.mark.parametrize("name", OPS)
def test_bad_arguments_are_named(name: str, what: str, device: torch.device) -> None:
    change, error, message = BAD_ARGUMENTS[what]
    with pytest.raises(error, match=message):
        OPS[name](*change(*case(2, 3, (5,), device, torch.float32)))


def test_bad_arguments_of_the_backward_ops(device: torch.device) -> None:
    x, params = case(2, 3, (5,), device, torch.float64)
    grad, grad_ladj = torch.randn_like(x), torch.randn_like(x[:, 0])
    backward = torch.ops.coopflow.mixture_logistic_coupling_backward
    with pytest.raises(RuntimeError, match="grad_y: must have the shape of x"):
        backward(grad[:1], grad_ladj, x, params, True)
    with pytest.raises(RuntimeError, match=r"grad_ladj: must have shape \(2,\)"):
        backward(grad, grad_ladj[:1], x, params, True)
    inverse = torch.ops.coopflow.mixture_logistic_coupling_inverse_backward
    with pytest.raises(RuntimeError, match="y: must have dtype float64"):
        inverse(grad, grad_ladj, x.float(), x, params, True, False)


# --- the same bits --------------------------------------------------------------------------------

_FINGERPRINT = """
import hashlib, sys, torch
import coopflow_ext as cf
torch.set_num_threads(int(sys.argv[1]))
digest = hashlib.sha256()
for family_scale in (0.0, -4.0):
    for dtype in (torch.float32, torch.bfloat16):
        g = torch.Generator().manual_seed(0)
        params = torch.randn((2, 2 + 3 * 2, 16500), generator=g)
        params[:, 6:] += family_scale
        params[:, 0].tanh_()
        x = torch.randn((2, 16500), generator=g)
        for op in (cf.ops.mixture_logistic_coupling, cf.ops.mixture_logistic_coupling_inverse):
            leaves = (x.clone().requires_grad_(), params.to(dtype).requires_grad_())
            out, ladj = op(*leaves)
            gradients = torch.autograd.grad(out.sum() + ladj.sum(), leaves)
            for t in (out, ladj, *gradients):
                digest.update(t.detach().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_and_thread_counts_give_the_same_bits() -> None:
    prints = fingerprints(_FINGERPRINT, two_threads=True)
    assert len(set(prints.values())) == 1, prints
