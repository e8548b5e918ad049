"""The layer-1 headers, element by element, through the torch-free module `_host`."""

from __future__ import annotations

import numpy as np
import pytest

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


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1.2e-7), ("float64", 1e-15)])
def test_sincos_turns(dtype: str, tolerance: float) -> None:
    turns = _hard_words().ravel()
    sine, cosine = getattr(_host, f"sincos_turns_{dtype}")(turns)
    angle = 2 * np.pi * turns.astype(np.float64) * 2.0**-32
    # float64 computes with one rounded product of the turns, so its own error is part of both.
    np.testing.assert_allclose(sine, np.sin(angle), rtol=0, atol=tolerance)
    np.testing.assert_allclose(cosine, np.cos(angle), rtol=0, atol=tolerance)
