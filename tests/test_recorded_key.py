"""Keys whose streams follow other keys."""

from __future__ import annotations

import pytest
import torch

import coopflow_ext as cf
from coopflow_ext.recorded_key import Streams
from coopflow_ext.rng import USE_CHAIN, USE_DROPOUT, Key, stream

CPU = torch.device("cpu")
KEYS = [Key(5), Key(2**64 - 1, 7, 3), Key(5, 8), Key(6, 8, 2**62)]


def draw(key: Key) -> list[torch.Tensor]:
    """Streams as the package derives them."""
    first, second = key.split(2)
    return [
        key.tensor(CPU), key.tensor(), key.at_chain(4).tensor(CPU), key.advance(3).tensor(CPU),
        first.tensor(CPU), second.fold_in(1).tensor(CPU),
        stream(key, USE_CHAIN, device=CPU, batch=3),
        stream(key, USE_DROPOUT, device=CPU, fold_time=True),
    ]  # fmt: skip


def test_streams_follow_the_key_that_they_are_filled_with() -> None:
    streams = Streams()
    tensors = draw(streams.record(KEYS[0]))
    for key in KEYS:
        streams.fill(key)
        for ours, expected in zip(tensors, draw(key), strict=True):
            assert torch.equal(ours, expected)
    again = draw(streams.record(KEYS[1]))
    assert [t.data_ptr() for t in again] == [t.data_ptr() for t in tensors]
    assert torch.equal(again[-1], draw(KEYS[1])[-1])  # recording fills too


def test_a_recorded_key_is_a_key() -> None:
    key = Streams().record(KEYS[1])
    assert (key.seed, key.time, key.chain) == (2**64 - 1, 7, 3)
    assert key.state_dict() == KEYS[1].state_dict()
    assert key.derivation == ()
    derived = key.advance(2).at_chain(9).fold_time()
    assert derived.derivation == (("advance", (2,)), ("at_chain", (9,)), ("fold_time", ()))
    plain = KEYS[1].advance(2).at_chain(9).fold_time()
    assert (derived.seed, derived.time, derived.chain) == (plain.seed, plain.time, plain.chain)


def test_a_sampler_draws_from_them() -> None:
    streams = Streams()
    sampler = cf.LangevinSampler(lambda x: x.square().sum(1), n_steps=3, step_size=0.1)
    x0 = torch.randn(4, 2)
    recorded = streams.record(KEYS[0])
    assert torch.equal(sampler(x0, key=recorded).x, sampler(x0, key=KEYS[0]).x)
    streams.fill(KEYS[1])
    assert torch.equal(sampler(x0, key=recorded).x, sampler(x0, key=KEYS[1]).x)


def test_a_stream_has_the_numbers_of_its_key_on_every_device_that_asks() -> None:
    key, streams = Key(1, time=2, chain=3), Streams()
    recorded = streams.record(key)
    ours = recorded.tensor("cpu")
    assert torch.equal(ours, key.tensor("cpu"))
    assert torch.equal(recorded.advance(4).tensor("cpu"), key.advance(4).tensor("cpu"))
    assert recorded.tensor("meta").device.type == "meta"
    assert recorded.tensor("cpu") is ours
    with torch.device("meta"):
        assert recorded.fold_in(1).tensor().device.type == "meta"


def test_closed_streams_make_no_other() -> None:
    streams = Streams()
    recorded = streams.record(Key(1))
    ours = recorded.tensor("cpu")
    streams.closed = True
    assert recorded.tensor("cpu") is ours
    with pytest.raises(RuntimeError, match=r"fold_in.* was not drawn before the capture"):
        recorded.fold_in(1).tensor("cpu")
