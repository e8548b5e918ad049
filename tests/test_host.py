"""The layer-1 headers, element by element, through the torch-free module `_host`."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest
from scipy.special import log_expit, logsumexp

_host = pytest.importorskip(
    "coopflow_ext._host", reason="coopflow_ext._host is not built (it needs pybind11 at build time)"
)

# Random123's published known answers (kat_vectors, "philox4x32 10"): counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    low, high = _words(key)
    words = _host.philox4x32_10(np.array([_words(counter)], dtype=np.uint32), high << 32 | low)
    assert words[0].tolist() == _words(expected)


def test_noise_words_lay_out_the_counter() -> None:
    seed, chain, time = 0x0123456789ABCDEF, (3 << 32) + 7, 11
    counters = np.array([[block, time, 7, 3] for block in range(5)], dtype=np.uint32)
    expected = _host.philox4x32_10(counters, seed)
    np.testing.assert_array_equal(_host.noise_words(seed, chain, time, 5), expected)


def test_fold_in_is_two_words_of_a_counter_no_chain_reaches() -> None:
    seed, data = 0xFEDCBA9876543210, (5 << 32) + 9
    words = _host.philox4x32_10(np.array([[9, 5, 0, 1 << 31]], dtype=np.uint32), seed)[0]
    assert _host.fold_in(seed, data) == int(words[1]) << 32 | int(words[0])


def test_bad_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"counters must have shape \(N, 4\)"):
        _host.philox4x32_10(np.zeros(4, dtype=np.uint32), 0)


def _hard_words() -> np.ndarray:
    """Random words, and every pair of extremes."""
    edges = np.array([0, 1, 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1], dtype=np.uint32)
    quarters = np.arange(8, dtype=np.uint64) * 2**29
    near = np.concatenate([quarters, quarters + 1, quarters[1:] - 1]).astype(np.uint32)
    values = np.concatenate([edges, near])
    pairs = np.stack(np.meshgrid(values, values), axis=-1).reshape(-1, 2)
    random = np.random.default_rng(0).integers(0, 2**32, (200_000, 4), dtype=np.uint32)
    return np.concatenate([np.concatenate([pairs, pairs[::-1]], axis=1), random])


def _box_muller(words: np.ndarray) -> np.ndarray:
    """The definition in numpy's float64."""
    w = words.astype(np.float64)
    radius = np.sqrt(-2 * np.log((w[:, 0::2] + 0.5) * 2.0**-32))
    angle = 2 * np.pi * w[:, 1::2] * 2.0**-32
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1).reshape(-1, 4)


def test_normals_float64_follow_the_definition() -> None:
    words = _hard_words()
    np.testing.assert_allclose(
        _host.normals_from_words_float64(words), _box_muller(words), rtol=0, atol=1e-14
    )


def test_normals_float32_stay_within_the_stated_error() -> None:
    words = _hard_words()
    error = np.abs(_host.normals_from_words_float32(words) - _box_muller(words))
    near_one = (words[:, 0::2] > (1 - 2.0**-9) * 2.0**32).repeat(2, axis=1)
    assert error[~near_one].max() <= 4e-6
    assert error[near_one].max() <= 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_uniforms_never_reach_either_end(dtype: str) -> None:
    words = _hard_words()
    uniforms = getattr(_host, f"uniforms_from_words_{dtype}")(words)
    assert uniforms.dtype == dtype
    assert uniforms.min() > 0
    assert uniforms.max() < 1
    np.testing.assert_allclose(uniforms, (words + 0.5) * 2.0**-32, rtol=0, atol=2.0**-23)


# --- instructions that only a GPU has ------------------------------------------------------------

INF, NAN = np.inf, np.nan
DENORMAL, LARGEST = 2.0**-127, float(np.finfo(np.float32).max)
# The PTX manual's tables of special values, for each instruction with .ftz: denormal arguments are
# zeros of their sign, and so are denormal results.
ARGUMENTS = (-INF, -1.0, -DENORMAL, -0.0, 0.0, DENORMAL, INF, NAN)
SPECIAL_VALUES = {
    "approximate_exp2": (0.0, 0.5, 1.0, 1.0, 1.0, 1.0, INF, NAN),
    "approximate_log2": (NAN, NAN, -INF, -INF, -INF, -INF, INF, NAN),
    "approximate_reciprocal": (-0.0, -1.0, -INF, -INF, INF, INF, 0.0, NAN),
    "approximate_sqrt": (NAN, NAN, -0.0, -0.0, 0.0, 0.0, INF, NAN),
    "approximate_sine": (NAN, np.sin(-1.0), -0.0, -0.0, 0.0, 0.0, NAN, NAN),
    "approximate_cosine": (NAN, np.cos(-1.0), 1.0, 1.0, 1.0, 1.0, NAN, NAN),
}
RESULTS_OUT_OF_RANGE = (
    ("approximate_exp2", -126.0, 2.0**-126),
    ("approximate_exp2", -126.5, 0.0),
    ("approximate_exp2", -1e30, 0.0),
    ("approximate_exp2", 128.0, INF),
    ("approximate_log2", 1.0, 0.0),
    ("approximate_reciprocal", LARGEST, 0.0),
    ("approximate_reciprocal", -LARGEST, -0.0),
    ("approximate_reciprocal", 2.0**126, 2.0**-126),
)


def _same(actual: np.float32, expected: float) -> bool:
    """Equal, the sign of a zero included; NaN is NaN."""
    if np.isnan(expected):
        return bool(np.isnan(actual))
    return actual == np.float32(expected) and np.signbit(actual) == np.signbit(expected)


@pytest.mark.parametrize(
    ("instruction", "x", "expected"),
    [
        *(
            (name, x, value)
            for name, values in SPECIAL_VALUES.items()
            for x, value in zip(ARGUMENTS, values, strict=True)
        ),
        *RESULTS_OUT_OF_RANGE,
    ],
)
def test_stand_in_of_an_instruction_has_its_special_values(
    instruction: str, x: float, expected: float
) -> None:
    actual = getattr(_host, instruction)(np.float32(x))
    assert _same(actual, expected), actual


# --- elementary functions -------------------------------------------------------------------------


def test_log_float32() -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0x00800000, 0x7F7FFFFF, 500_000, dtype=np.uint32)  # every normal number
    x = np.concatenate([bits.view(np.float32), rng.uniform(0.5, 2, 500_000).astype(np.float32)])
    exact = np.log(x.astype(np.float64))
    error = np.abs(_host.log_positive_float32(x) - exact)
    assert np.all(error <= np.maximum(1e-7, np.spacing(np.abs(exact).astype(np.float32))))


def test_exp_float32() -> None:
    x = np.random.default_rng(2).uniform(-87.3, 88.7, 500_000).astype(np.float32)
    np.testing.assert_allclose(
        _host.exponential_float32(x), np.exp(x.astype(np.float64)), rtol=2.4e-7, atol=0
    )
    edges = np.array([-np.inf, -200, -104, 89, 1e30, np.inf, np.nan], dtype=np.float32)
    np.testing.assert_array_equal(
        _host.exponential_float32(edges), np.array([0, 0, 0, np.inf, np.inf, np.inf, np.nan])
    )
    denormal = np.float32(-95.0)
    assert _host.exponential_float32(denormal) == pytest.approx(np.exp(-95.0), rel=0, abs=2e-45)


def test_exp2_float32_of_what_is_not_positive() -> None:
    x = -np.random.default_rng(3).uniform(0, 125, 500_000).astype(np.float32)
    np.testing.assert_allclose(
        _host.exponential2_nonpositive_float32(x),
        np.exp2(x.astype(np.float64)),
        rtol=1e-7,
        atol=0,
    )
    edges = np.array([0, -125, -126, -1e30, -np.inf, np.nan], dtype=np.float32)
    least = 2.0**-125
    np.testing.assert_array_equal(
        _host.exponential2_nonpositive_float32(edges),
        np.array([1, least, least, least, least, np.nan], dtype=np.float32),
    )


def test_exponentials_float32_of_what_is_not_positive() -> None:
    x = -np.random.default_rng(8).uniform(0, 87, 500_000).astype(np.float32)
    x[::2] *= np.float32(10.0) ** np.random.default_rng(9).uniform(-8, 0, 250_000)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(
        _host.exponential_nonpositive_float32(x), np.exp(exact), rtol=1.2e-7, atol=0
    )
    np.testing.assert_allclose(
        _host.exponential_minus_one_float32(x), np.expm1(exact), rtol=1.5e-7, atol=0
    )
    edges = np.array([0, -87, -88, -1e30, -np.inf, np.nan], dtype=np.float32)
    least = np.exp(-87.0)
    np.testing.assert_allclose(
        _host.exponential_nonpositive_float32(edges), [1, least, least, least, least, np.nan],
        rtol=1.2e-7,
    )  # fmt: skip
    np.testing.assert_array_equal(
        _host.exponential_minus_one_float32(edges), np.float32([0, -1, -1, -1, -1, np.nan])
    )


def _assert_within_ulps(ulps: float, actual: Any, exact: Any) -> None:
    """``exact`` has more digits than float64."""
    assert np.all(np.abs(actual - exact) <= ulps * np.spacing(np.abs(exact).astype(np.float64)))


def test_log_float64() -> None:
    rng = np.random.default_rng(10)
    bits = rng.integers(1, 0x7FEFFFFFFFFFFFFF, 500_000, dtype=np.uint64)  # denormal numbers too
    close = [rng.uniform(0, 2, 500_000), rng.uniform(0.99, 1.01, 100_000)]
    x = np.concatenate([bits.view(np.float64), rng.uniform(0, 1e-308, 1_000), *close])
    _assert_within_ulps(1, _host.log_positive_float64(x), np.log(x.astype(np.longdouble)))
    edges = np.array([0.0, -0.0, 5e-324, 1.0, np.inf, -1.0, -np.inf, np.nan])
    lowest = np.log(np.longdouble(5e-324)).astype(np.float64)
    np.testing.assert_array_equal(
        _host.log_positive_float64(edges),
        [-np.inf, -np.inf, lowest, 0, np.inf, np.nan, np.nan, np.nan],
    )


def test_exponentials_float64() -> None:
    rng = np.random.default_rng(11)
    x = np.concatenate([rng.uniform(-745, 709.7, 500_000), rng.uniform(-1, 1, 500_000)])
    _assert_within_ulps(1.1, _host.exponential_float64(x), np.exp(x.astype(np.longdouble)))
    negative = -np.abs(x) * rng.choice([1.0, 1e-5, 1e-12], x.size)
    exact = negative.astype(np.longdouble)
    _assert_within_ulps(1.1, _host.exponential_nonpositive_float64(negative), np.exp(exact))
    _assert_within_ulps(1.2, _host.exponential_minus_one_float64(negative), np.expm1(exact))
    _assert_within_ulps(1.2, _host.exponential2_nonpositive_float64(negative), np.exp2(exact))
    edges = np.array([-np.inf, -1e300, -745.2, -745.1, 0.0, 709.79, np.inf, np.nan])
    np.testing.assert_array_equal(
        _host.exponential_float64(edges), [0, 0, 0, 5e-324, 1, np.inf, np.inf, np.nan]
    )
    edges = np.array([-np.inf, -1e300, -1076.0, -1074.0, -1.0, 0.0, np.nan])
    np.testing.assert_array_equal(
        _host.exponential2_nonpositive_float64(edges), [0, 0, 0, 5e-324, 0.5, 1, np.nan]
    )
    np.testing.assert_array_equal(
        _host.exponential_minus_one_float64(edges)[[0, 1, 2, 5, 6]], [-1, -1, -1, 0, np.nan]
    )


def _sincos_of_turns(turns: Any) -> tuple[Any, Any]:
    """In long double: of 2 pi times uint32 words * 2^-32, less than a quarter turn at a time."""
    quadrant = (turns + np.uint32(0x20000000)) >> np.uint32(30)
    rest = (turns - (quadrant << np.uint32(30))).view(np.int32).astype(np.longdouble)
    angle = rest * (2 * np.arccos(np.longdouble(-1)) * np.longdouble(2.0) ** -32)
    s, c = np.sin(angle), np.cos(angle)
    return np.choose(quadrant % 4, [s, c, -s, -c]), np.choose(quadrant % 4, [c, -s, -c, s])


def test_sincos_turns() -> None:
    words = np.random.default_rng(12).integers(0, 2**32, 500_000, dtype=np.uint32)
    turns = np.concatenate([_hard_words().ravel(), words])
    exact = _sincos_of_turns(turns)
    for actual, wanted in zip(_host.sincos_turns_float32(turns), exact, strict=True):
        np.testing.assert_allclose(actual, wanted.astype(np.float64), rtol=0, atol=1.2e-7)
    for actual, wanted in zip(_host.sincos_turns_float64(turns), exact, strict=True):
        _assert_within_ulps(2, actual, wanted)


DTYPES = [("float32", 2.0**-23), ("float64", 2.0**-52)]


@pytest.mark.parametrize(("dtype", "eps"), DTYPES)
def test_langevin_update_of_elements(dtype: str, eps: float) -> None:
    rng = np.random.default_rng(4)
    x, grad, xi = rng.standard_normal((3, 10_000)).astype(dtype) * 2
    drift, noise, clip, limit = 0.3, 0.2, 1.5, 2.0
    updated = getattr(_host, f"langevin_update_{dtype}")(x, grad, xi, drift, noise, clip, limit)
    x, grad, xi = (v.astype(np.float64) for v in (x, grad, xi))
    exact = np.clip(x - drift * np.clip(grad, -clip, clip) + noise * xi, -limit, limit)
    assert updated.dtype == dtype
    np.testing.assert_allclose(updated, exact, rtol=0, atol=16 * eps)
    assert 0 < (np.abs(updated) == limit).sum() < updated.size


@pytest.mark.parametrize(("dtype", "eps"), DTYPES)
def test_affine_coupling_of_elements(dtype: str, eps: float) -> None:
    rng = np.random.default_rng(5)
    x, a, b = rng.standard_normal((3, 10_000)).astype(dtype)
    y = getattr(_host, f"affine_forward_{dtype}")(x, a, b)
    back = getattr(_host, f"affine_inverse_{dtype}")(y, a, b)
    exact = x.astype(np.float64) * np.exp(a.astype(np.float64)) + b
    scale = np.abs(x * np.exp(a)) + np.abs(b)
    assert np.all(np.abs(y - exact) <= 4 * eps * scale)
    assert np.all(np.abs(back - x) <= 8 * eps * scale * np.exp(-a))


def _mixtures(n: int, k: int, dtype: str) -> list[np.ndarray]:
    """Values, then logits, means and log-scales, from mild to far outside every component."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal(n) * 10.0 ** rng.uniform(-1, 2, n)
    return [
        v.astype(dtype)
        for v in (x, rng.normal(0, 2, (n, k)), rng.normal(0, 3, (n, k)), rng.normal(-1, 1, (n, k)))
    ]


def _exact_logit(
    x: np.ndarray, logits: np.ndarray, means: np.ndarray, log_scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    x, logits, means, log_scales = (v.astype(np.float64) for v in (x, logits, means, log_scales))
    t = (x[:, None] - means) * np.exp(-log_scales)
    log_cdf = logsumexp(logits + log_expit(t), axis=1)
    log_survival = logsumexp(logits + log_expit(-t), axis=1)
    log_density = logsumexp(logits + log_expit(t) + log_expit(-t) - log_scales, axis=1)
    # The weights sum to W, not to one: the slope is density * W / (cdf * survival).
    return log_cdf - log_survival, log_density + logsumexp(logits, axis=1) - log_cdf - log_survival


@pytest.mark.parametrize(("dtype", "eps"), DTYPES)
def test_mixture_logit_of_elements(dtype: str, eps: float) -> None:
    x, *params = _mixtures(4_000, 5, dtype)
    value, log_slope = getattr(_host, f"mixture_logit_{dtype}")(x, *params)
    exact, exact_slope = _exact_logit(x, *params)
    tolerance = 32 * eps * (1 + np.abs(exact))
    assert np.all(np.abs(value - exact) <= tolerance)
    assert np.all(np.abs(log_slope - exact_slope) <= tolerance + 32 * eps * np.abs(exact_slope))
    assert np.abs(exact).max() > 100  # far outside the reach of a CDF


@pytest.mark.parametrize(("dtype", "eps"), DTYPES)
def test_mixture_quantile_of_elements(dtype: str, eps: float) -> None:
    _, *params = _mixtures(2_000, 5, dtype)
    target = np.random.default_rng(7).uniform(-40, 40, 2_000).astype(dtype)
    x = getattr(_host, f"mixture_quantile_{dtype}")(target, *params)
    logit, log_slope = _exact_logit(x, *params)
    spacing = eps * np.abs(x) * np.exp(log_slope)
    allowed = 8 * eps * np.maximum(1, np.abs(target)) + 2 * spacing
    # scipy's own rounding, where float64 is what is judged
    allowed += 16 * 2.0**-52 * (1 + np.abs(target) + np.abs(log_slope))
    assert np.all(np.abs(logit - target) <= allowed)


def test_mixture_logit_against_mpmath() -> None:
    x, logits, means, log_scales = _mixtures(40, 3, "float64")
    value, _ = _host.mixture_logit_float64(x, logits, means, log_scales)
    with mpmath.workdps(400):
        for i in range(x.size):
            cdf = survival = mpmath.mpf(0)
            for k in range(3):
                t = (mpmath.mpf(x[i]) - means[i, k]) / mpmath.exp(log_scales[i, k])
                weight = mpmath.exp(logits[i, k])
                cdf += weight / (1 + mpmath.exp(-t))
                survival += weight / (1 + mpmath.exp(t))
            exact = float(mpmath.log(cdf / survival))
            assert abs(value[i] - exact) <= 16 * 2.0**-52 * (1 + abs(exact))


def test_mixture_parameters_of_another_shape_are_named() -> None:
    x, logits, means, log_scales = _mixtures(3, 2, "float32")
    with pytest.raises(ValueError, match=r"must have shape \(N, K\)"):
        _host.mixture_logit_float32(x, logits, means[:, :1], log_scales)
    with pytest.raises(ValueError, match=r"must have shape \(N, K\)"):
        _host.mixture_quantile_float32(x[:2], logits, means, log_scales)


# --- activations ----------------------------------------------------------------------------------

# Number, (shape, threshold), and the function in mpmath.
ACTIVATIONS = {
    "silu": (0, (), lambda z: z / (1 + mpmath.exp(-z))),
    "relu": (1, (), lambda z: max(z, 0)),
    "leaky_relu": (2, (0.2,), lambda z: z if z > 0 else mpmath.mpf(0.2) * z),
    "elu": (3, (0.75,), lambda z: z if z > 0 else 0.75 * mpmath.expm1(z)),
    "tanh": (4, (), mpmath.tanh),
    "softplus": (
        5, (2.5, 20.0), lambda z: z if 2.5 * z > 20 else mpmath.log1p(mpmath.exp(2.5 * z)) / 2.5
    ),
    "gelu": (6, (), lambda z: z * mpmath.ncdf(z)),
    "gelu_tanh": (
        7, (),
        lambda z: (
            z / 2
            * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (z + mpmath.mpf("0.044715") * z**3)))
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "eps"), DTYPES)
def test_activations_against_mpmath(name: str, dtype: str, eps: float) -> None:
    """Values to a few roundings of their own size, slopes to a few roundings of one.

    The tails of gelu to a few of their argument; that of softplus is an exponential, of an argument
    that has been rounded.
    """
    number, parameters, function = ACTIVATIONS[name]
    rng = np.random.default_rng(10)
    z = np.concatenate([rng.uniform(-12, 12, 300), rng.normal(0, 1e-3, 50), rng.normal(0, 60, 50)])
    z = z.astype(dtype)
    value, slope = getattr(_host, f"activate_{dtype}")(number, z, *parameters)
    assert value.dtype == slope.dtype == dtype
    with mpmath.workdps(60):
        points = [mpmath.mpf(float(v)) for v in z]
        exact = np.array([float(function(p)) for p in points])
        derivative = np.array([float(mpmath.diff(function, p)) for p in points])
    allowed = 4 * eps * np.abs(exact) + 1e-30
    if name.startswith("gelu"):
        allowed += 4 * eps * np.abs(z)
    if name == "softplus":
        allowed += eps * np.abs(2.5 * z * exact)
    assert np.all(np.abs(value - exact) <= allowed)
    assert np.all(np.abs(slope - derivative) <= 8 * eps)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_activations_keep_nan_whatever_its_bits(name: str, dtype: str) -> None:
    number, parameters, _ = ACTIVATIONS[name]
    ones = np.array([-1], dtype=f"int{8 * np.dtype(dtype).itemsize}").view(dtype)
    z = np.concatenate([ones, np.array([np.nan, -np.nan], dtype=dtype)])
    value, slope = getattr(_host, f"activate_{dtype}")(number, z, *parameters)
    assert np.isnan(value).all()
    if name not in ("relu", "leaky_relu"):  # whose slope is a constant on either side, as in torch
        assert np.isnan(slope).all()
