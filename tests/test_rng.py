"""Keys, and the noise that they define: words, normals, independence, distribution."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

import coopflow_ext as cf
from coopflow_ext.rng import TIME_LIMIT

WORD = 2**32 - 1


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers, from the paper's description alone."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (
            (product1 >> 32) ^ x1 ^ k0,
            product1 & WORD,
            (product0 >> 32) ^ x3 ^ k1,
            product0 & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return x0, x1, x2, x3


def expected_words(key: cf.Key, chain: int, time: int, element: int) -> int:
    """The word behind one element's uniform."""
    counter = (element // 4, time, chain & WORD, chain >> 32)
    return philox(counter, (key.seed & WORD, key.seed >> 32))[element % 4]


def expected_normal(key: cf.Key, chain: int, time: int, element: int) -> float:
    counter = (element // 4, time, chain & WORD, chain >> 32)
    words = philox(counter, (key.seed & WORD, key.seed >> 32))
    w0, w1 = words[:2] if element % 4 < 2 else words[2:]
    radius = math.sqrt(-2 * math.log((w0 + 0.5) * 2.0**-32))
    angle = 2 * math.pi * w1 * 2.0**-32
    return radius * (math.cos(angle) if element % 2 == 0 else math.sin(angle))


# --- keys -----------------------------------------------------------------------------------------


def test_key_is_immutable_and_hashable() -> None:
    key = cf.Key(3, time=4)
    with pytest.raises(AttributeError):
        key.seed = 5  # type: ignore[misc]
    assert len({cf.Key(3, time=4), key}) == 1


@pytest.mark.parametrize("data", [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF])
def test_fold_in_is_philox_at_a_reserved_counter(seed: int, data: int) -> None:
    words = philox((data & WORD, data >> 32, 0, 2**31), (seed & WORD, seed >> 32))
    folded = cf.Key(seed, time=9, chain=4).fold_in(data)
    assert folded == cf.Key(words[0] | words[1] << 32, time=9, chain=4)


def test_split_is_fold_in_beyond_the_named_uses() -> None:
    key = cf.Key(17, time=2, chain=5)
    assert key.split(3) == tuple(key.fold_in(2**63 + k) for k in range(3))
    assert key.split(0) == ()


def test_state_dict_survives_json() -> None:
    key = cf.Key(2**64 - 1, time=2**32 - 1, chain=2**63 - 1)
    assert cf.Key.from_state_dict(json.loads(json.dumps(key.state_dict()))) == key
    assert cf.Key.from_state_dict({"seed": 3, "time": 4}) == cf.Key(3, time=4)  # of old versions


def test_at_chain_is_absolute() -> None:
    key = cf.Key(17, time=2, chain=5)
    assert key.at_chain(3) == cf.Key(17, time=2, chain=3)
    assert key.at_chain(key.chain + 3) == cf.Key(17, time=2, chain=8)


def test_advance_counts_and_stops_at_the_last_time() -> None:
    assert cf.Key(1, chain=3).advance(5).advance(7) == cf.Key(1, time=12, chain=3)
    last = cf.Key(1, time=TIME_LIMIT - 1)
    assert last.advance(0) == last
    with pytest.raises(OverflowError, match=r"2\*\*32 - 1 steps.*fold_in"):
        last.advance(1)


@pytest.mark.parametrize("seed", [0, 5, 2**63, 2**64 - 1])
def test_tensor_holds_the_seed_bits(seed: int) -> None:
    rng = cf.Key(seed, time=6, chain=2**63 - 1).tensor()
    assert rng.dtype == torch.int64
    assert rng.shape == (3,)
    assert rng[0].item() % 2**64 == seed
    assert rng[1].item() == 6
    assert rng[2].item() == 2**63 - 1


def test_default_generator_reproduces_a_key() -> None:
    torch.manual_seed(4)
    first = cf.Key.from_default_generator()
    second = cf.Key.from_default_generator()
    torch.manual_seed(4)
    assert cf.Key.from_default_generator() == first
    assert first != second


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: cf.Key(-1), ValueError, r"seed must be in \[0, 18446744073709551616\), got -1"),
        (lambda: cf.Key(2**64), ValueError, "seed must be in"),
        (lambda: cf.Key(1.0), TypeError, "seed must be an int, got float"),
        (lambda: cf.Key(True), TypeError, "seed must be an int, got bool"),
        (lambda: cf.Key(0, time=2**32), ValueError, "time must be in"),
        (lambda: cf.Key(0, chain=2**63), ValueError, "chain must be in"),
        (lambda: cf.Key(0, chain=-1), ValueError, "chain must be in"),
        (lambda: cf.Key(0).at_chain(1.0), TypeError, "chain must be an int"),
        (
            lambda: cf.Key(0, chain=2**63 - 2).check_batch(3),
            ValueError,
            "key.chain must be at most",
        ),
        (lambda: cf.Key(0).fold_in(2**64), ValueError, "data must be in"),
        (lambda: cf.Key(0).fold_in(-1), ValueError, "data must be in"),
        (lambda: cf.Key(0).advance(-1), ValueError, "n must be in"),
        (lambda: cf.Key(0).split(-1), ValueError, "n must be in"),
    ],
)
def test_bad_keys_are_named(make, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        make()


# --- words and normals ----------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 2**32 - 2, 2**40 + 3, 2**63 - 8])
@pytest.mark.parametrize("time", [0, 2**32 - 3])
def test_words_are_those_of_the_definition(device: torch.device, first: int, time: int) -> None:
    key = cf.Key(0x9876543210ABCDEF, time=time, chain=first)
    drawn = cf.ops.uniform((3, 11), key.tensor(device), step=2, dtype=torch.float64)
    for chain in range(3):
        for element in range(11):
            word = expected_words(key, first + chain, time + 2, element)
            assert drawn[chain, element].item() == (word + 0.5) * 2.0**-32


def test_normals_are_those_of_the_definition(device: torch.device) -> None:
    key = cf.Key(11, time=5, chain=7)
    drawn = cf.ops.normal((2, 3, 3), key.tensor(device), step=1, dtype=torch.float64)
    flat = drawn.reshape(2, 9)
    for chain in range(2):
        for element in range(9):
            expected = expected_normal(key, 7 + chain, 6, element)
            assert flat[chain, element].item() == pytest.approx(expected, rel=1e-13, abs=1e-15)


def test_the_oracle_agrees_with_the_kernels(device: torch.device) -> None:
    rng = cf.Key(2**64 - 5, time=3, chain=2**35).tensor(device)
    shape = (5, 13)
    torch.testing.assert_close(
        cf.ops.normal(shape, rng, dtype=torch.float64),
        cf.reference.normal(shape, rng, dtype=torch.float64),
        rtol=1e-13,
        atol=1e-15,
    )
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        ours = cf.ops.uniform(shape, rng, dtype=dtype)
        assert torch.equal(ours, cf.reference.uniform(shape, rng, dtype=dtype))


def test_float32_normals_are_close_to_float64(device: torch.device) -> None:
    rng = cf.Key(3).tensor(device)
    shape = (64, 16384)
    single = cf.ops.normal(shape, rng, dtype=torch.float32).double()
    double = cf.ops.normal(shape, rng, dtype=torch.float64)
    radius = double.reshape(-1, 2).norm(dim=1).repeat_interleave(2).reshape(shape)
    # u > 1 - 2^-9 means a radius below this; there the logarithm of a rounded u is coarse.
    near_one = radius < math.sqrt(-2 * math.log(1 - 2.0**-9))
    error = (single - double).abs()
    bound = 4e-6 if device.type == "cpu" else 6e-6
    assert error[~near_one].max() <= bound
    assert error[near_one].max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_normals_are_the_rounded_float32_ones(
    device: torch.device, dtype: torch.dtype
) -> None:
    rng = cf.Key(5).tensor(device)
    single = cf.ops.normal((7, 1001), rng, dtype=torch.float32)
    assert torch.equal(cf.ops.normal((7, 1001), rng, dtype=dtype), single.to(dtype))


def test_channels_last_counts_in_storage_order(device: torch.device) -> None:
    rng = cf.Key(2).tensor(device)
    out = torch.empty(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    torch.ops.coopflow.normal_(out, rng)
    assert torch.equal(out.permute(0, 2, 3, 1), cf.ops.normal((2, 4, 5, 3), rng))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda rng: cf.ops.normal((), rng), ValueError, "out: must have a batch dimension"),
        (lambda rng: cf.ops.normal((-1, 2), rng), ValueError, r"shape must .*got \(-1, 2\)"),
        (lambda rng: cf.ops.uniform((2,), cf.Key(0)), TypeError, "rng must be a tensor.*got Key"),
        (lambda rng: cf.ops.normal((2,), rng.int()), TypeError, "rng: must have dtype int64"),
        (
            lambda rng: cf.ops.normal((2,), rng[:1]),
            ValueError,
            r"rng: must have shape \(3,\) .*Key.tensor.* got \(1,\)",
        ),
        (lambda rng: cf.ops.normal((2,), rng, step=-1), ValueError, "step: must be in"),
        (lambda rng: cf.ops.normal((2,), rng[:2]), ValueError, r"Key.tensor gives, got \(2,\)"),
        (
            lambda rng: cf.ops.normal((2,), rng, dtype=torch.int64),
            TypeError,
            "out: must have dtype float32, float64, float16 or bfloat16, got dtype int64",
        ),
        (
            lambda rng: cf.ops.uniform((2,), rng, dtype="float32"),
            TypeError,
            "dtype must be a torch.dtype, got str 'float32'",
        ),
        (lambda rng: cf.ops.normal(2, rng), TypeError, "shape must be a sequence of ints, got int"),
    ],
)
def test_bad_draws_are_named(device, call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(cf.Key(0).tensor(device))


# --- independence and distribution ----------------------------------------------------------------


def blocks_of(rng: torch.Tensor, *, steps: int, chains: int, per_chain: int) -> np.ndarray:
    """The 128-bit blocks behind many draws, one row of two 64-bit words each."""
    words = torch.cat(
        [
            cf.reference.noise_words(chains, per_chain, rng, step=t).reshape(-1, 4)
            for t in range(steps)
        ]
    )
    return (words[:, 0::2] | (words[:, 1::2] << 32)).numpy()


def test_no_block_is_drawn_twice() -> None:
    """Seeds, chains, steps and fold_ins: over 10^6 blocks of 128 bits, no two equal."""
    keys = [cf.Key(0), cf.Key(1), cf.Key(2**32), cf.Key(2**63)]
    keys += [cf.Key(0).fold_in(i) for i in (0, 1, 2**32)] + list(cf.Key(0).split(2))
    drawn = np.concatenate(
        [blocks_of(key.tensor(), steps=16, chains=64, per_chain=512) for key in keys]
    )
    assert len(drawn) > 10**6
    assert len(np.unique(drawn, axis=0)) == len(drawn)


SAMPLES = 2**20


def sample(seed: int) -> np.ndarray:
    return cf.ops.normal((256, SAMPLES // 256), cf.Key(seed).tensor()).double().numpy()


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5])
def test_moments_one_to_six(seed: int) -> None:
    z = sample(seed).ravel()
    for order in range(1, 7):
        mean = scipy.stats.norm.moment(order)
        variance = scipy.stats.norm.moment(2 * order) - mean**2
        band = 5 * math.sqrt(variance / z.size)
        assert abs((z**order).mean() - mean) < band, f"moment {order}"


@pytest.mark.parametrize("seed", [0, 7])
def test_kolmogorov_smirnov(seed: int) -> None:
    z = sample(seed).ravel()
    # 5 sigma of a two-sided test.
    assert scipy.stats.kstest(z, "norm").pvalue > 5.7e-7


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 64])
def test_no_correlation_over_elements_chains_and_steps(lag: int) -> None:
    by_element = sample(3)
    rng = cf.Key(3).tensor()
    by_step = np.stack([cf.ops.normal((64, 128), rng, step=t).numpy() for t in range(128)])
    for z in (by_element, by_element.T, by_step.reshape(128, -1)):
        a, b = z[lag:], z[:-lag]
        assert abs((a * b).mean()) < 5 / math.sqrt(a.size), "correlation"
        squares = (a**2 - 1) * (b**2 - 1)
        assert abs(squares.mean()) < 5 * 2 / math.sqrt(a.size), "correlation of squares"


@pytest.mark.parametrize("lane", range(4))
def test_every_lane_is_normal(lane: int) -> None:
    z = sample(9).reshape(-1, 4)[:, lane]
    assert scipy.stats.kstest(z, "norm").pvalue > 5.7e-7


def test_words_equal_those_of_torchs_stateless_philox() -> None:
    """torch >= 2.14 has the same generator as a function; found by calling it."""
    try:
        from torch.func import _random

        drawn = _random.uniform(_random.key(0x123456789ABCDEF), (64,))
    except (ImportError, AttributeError, NotImplementedError) as error:
        reason = str(error).split(". ")[0]
        pytest.skip(f"torch {torch.__version__} has no stateless Philox on the CPU: {reason}")
    key = cf.Key(0x123456789ABCDEF)
    # torch keeps the low 24 bits of a word for a float32.
    words = [expected_words(key, 0, 0, element) & (2**24 - 1) for element in range(64)]
    assert (drawn.double() * 2**24).tolist() == words


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


def _compiled(function: Any) -> Any:
    return torch.compile(function, backend="aot_eager")


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_has_the_numbers_of_its_key() -> None:
    """Also of seeds beyond 32 and 63 bits, which change from call to call, and of folded ones."""
    seeds = (2**40 + 1, 2**40 + 2, 2**41 + 2, 2, 2**63 + 7)
    for device in ("cpu", None):
        tensor = _compiled(lambda key, device=device: key.tensor(device) + 0)
        for seed in seeds:
            key = cf.Key(seed, time=seed % 5, chain=seed % 7)
            assert torch.equal(tensor(key), key.tensor(device))


@pytest.mark.usefixtures("fresh_compiler")
def test_samplers_in_compiled_code_have_the_noise_of_their_key() -> None:
    def energy(state: Any) -> torch.Tensor:
        return sum(x.square().sum(1) for x in (state if isinstance(state, list) else [state])) / 2

    x0 = torch.zeros(3, 2)
    options = {"n_steps": 2, "step_size": 0.1}
    sampler, mala = cf.LangevinSampler(energy, **options), cf.MALASampler(energy, **options)
    one = _compiled(lambda key: sampler(x0, key=key).x)
    two = _compiled(lambda key: sampler([x0, x0], key=key).x)
    accepted = _compiled(lambda key: mala(x0, key=key).x)
    for i in range(3):
        key = cf.Key(0).fold_in(i)
        assert torch.equal(one(key), sampler(x0, key=key).x)
        assert all(map(torch.equal, two(key), sampler([x0, x0], key=key).x))
        assert torch.equal(accepted(key), mala(x0, key=key).x)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_buffer_in_compiled_code_draws_what_it_draws_elsewhere() -> None:
    buffer, twin = (cf.ReplayBuffer((2,), size=50, key=cf.Key(3)) for _ in range(2))
    draw = _compiled(lambda: buffer.draw(5).indices)
    for _ in range(3):
        assert torch.equal(draw(), twin.draw(5).indices)


def test_a_key_without_a_device_is_traced_in_one_graph():
    def draw(key: cf.Key) -> torch.Tensor:
        return cf.ops.normal((2, 3), key.tensor())

    compiled = torch.compile(draw, fullgraph=True, backend="eager")
    for key in (cf.Key(3), cf.Key(2**64 - 1, time=4, chain=7)):
        assert torch.equal(compiled(key), draw(key))


def test_the_last_chains_have_numbers():
    key = cf.Key(0, chain=2**63 - 4)
    key.check_batch(4)
    with pytest.raises(ValueError, match=r"key.chain must be at most 2\*\*63 - 5 for 5 chains"):
        key.check_batch(5)
