"""ReplayBuffer: what is drawn, what comes back, and that both follow from the key."""

from __future__ import annotations

import pytest
import torch

import coopflow_ext as cf
from coopflow_ext.samplers import ReplayBuffer


def test_draws_are_different_chains_of_the_buffer():
    buffer = ReplayBuffer((2, 3), size=50, reinit_probability=0.0, key=cf.Key(1))
    x, index = buffer.draw(50)
    assert sorted(index.tolist()) == list(range(50))
    assert torch.equal(x, buffer.states[index])
    again = buffer.draw(50)
    assert again.indices.tolist() != index.tolist()


def test_written_states_come_back():
    buffer = ReplayBuffer((4,), size=20, reinit_probability=0.0, key=cf.Key(1))
    x, index = buffer.draw(8)
    before = buffer.states.clone()
    buffer.write(index, x + 10)
    assert torch.equal(buffer.states[index], x + 10)
    others = [i for i in range(20) if i not in index.tolist()]
    assert torch.equal(buffer.states[others], before[others])


def test_share_of_chains_that_start_anew():
    buffer = ReplayBuffer((1,), size=1000, reinit_probability=0.05, key=cf.Key(1))
    buffer.write(torch.arange(1000), torch.full((1000, 1), 7.0))
    fresh = torch.cat([buffer.draw(500).x for _ in range(40)]).flatten() != 7.0
    expected, n = 0.05, 20_000
    assert abs(fresh.double().mean() - expected) < 5 * (expected * 0.95 / n) ** 0.5
    assert (buffer.states == 7.0).all()
    all_new = ReplayBuffer((1,), size=10, reinit_probability=1.0, key=cf.Key(1))
    assert not torch.equal(all_new.draw(10).x, all_new.draw(10).x)


@pytest.mark.parametrize("init", ["uniform", "normal"])
def test_kinds_of_new_chains(init):
    states = ReplayBuffer((8,), size=5000, init=init, key=cf.Key(3)).states
    var = 1 / 3 if init == "uniform" else 1.0
    assert states.mean().item() == pytest.approx(0, abs=5 * (var / 40_000) ** 0.5)
    assert states.var().item() == pytest.approx(var, rel=0.05)
    assert (states.abs().max() <= 1) == (init == "uniform")


def test_own_initialisation():
    buffer = ReplayBuffer(
        (2,), size=10, init=lambda shape, key: torch.full(shape, 3.0), reinit_probability=1.0
    )
    assert (buffer.draw(4).x == 3).all()
    with pytest.raises(ValueError, match="init must return shape"):
        ReplayBuffer((2,), size=10, init=lambda shape, key: torch.zeros(3))


def test_the_key_and_the_state_dict_determine_everything():
    def run(buffer, n):
        draws = []
        for _ in range(n):
            x, index = buffer.draw(8)
            buffer.write(index, 0.9 * x)
            draws.append(x)
        return torch.stack(draws)

    a, b = (ReplayBuffer((3,), size=30, key=cf.Key(4)) for _ in range(2))
    assert torch.equal(run(a, 5), run(b, 5))
    saved = a.state_dict()
    rest = run(a, 5)
    c = ReplayBuffer((3,), size=30, key=cf.Key(99))
    c.load_state_dict(saved)
    assert torch.equal(run(c, 5), rest)
    other = ReplayBuffer((3,), size=30, key=cf.Key(5))
    assert not torch.equal(other.states, b.states)


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.enable_grad])
def test_modes_in_which_it_is_used_leave_no_trace(inside):
    """Made, drawn from, written to and saved in one mode, it can be used in every other."""
    scale = torch.ones(2, requires_grad=True)

    def init(shape, key):
        return scale * torch.ones(shape)

    def use(buffer):
        x, indices = buffer.draw(4)
        buffer.write(indices, 2 * x)
        buffer.load_state_dict(buffer.state_dict())
        return x, buffer.states, buffer.state_dict()["states"]

    def make(key):
        return ReplayBuffer((2,), size=10, init=init, reinit_probability=0.5, key=cf.Key(key))

    with inside():
        buffer, other = make(0), make(1)
        tensors = use(buffer)
        x, indices = buffer.draw(4)
        loaded, doubled = buffer.state_dict(), 2 * x
    tensors += use(buffer)
    buffer.write(indices, doubled)  # with tensors of the mode
    other.load_state_dict(loaded)
    tensors += use(other)
    assert not any(t.is_inference() or t.requires_grad for t in tensors)


def test_bad_arguments():
    with pytest.raises(ValueError, match="size"):
        ReplayBuffer((1,), size=0)
    with pytest.raises(ValueError, match="reinit_probability"):
        ReplayBuffer((1,), reinit_probability=1.5)
    with pytest.raises(ValueError, match="init"):
        ReplayBuffer((1,), init="zeros")
    with pytest.raises(TypeError, match=r"shape must be a sequence of ints, such as \(3,\)"):
        ReplayBuffer(3)
    for shape, error, match in (
        ("32", TypeError, "shape must be a sequence of ints, got str"),
        (None, TypeError, "shape must be a sequence of ints, got NoneType"),
        (torch.zeros(2), TypeError, "shape must be a sequence of ints, got Tensor"),
        ((3, 2.0), TypeError, r"shape\[1\] must be an int, got float"),
        ((True,), TypeError, r"shape\[0\] must be an int, got bool"),
        ((3, -1), ValueError, r"shape\[1\] must be ≥ 0, got -1"),
    ):
        with pytest.raises(error, match=match):
            ReplayBuffer(shape)
    with pytest.raises(TypeError, match=r"dtype must be floating point, got 'float32'"):
        ReplayBuffer((1,), dtype="float32")
    with pytest.raises(TypeError, match=r"dtype must be floating point, got torch\.int64"):
        ReplayBuffer((1,), dtype=torch.int64)
    with pytest.raises(TypeError, match="key must be a Key"):
        ReplayBuffer((1,), key=0)
    with pytest.raises(TypeError, match="init must return a tensor, got float"):
        ReplayBuffer((1,), init=lambda shape, key: 0.0)
    with pytest.raises(RuntimeError, match=rf"buffer of shape .* would take {2**52:,} bytes"):
        ReplayBuffer((2**20,), size=2**30)
    buffer = ReplayBuffer((1,), size=10)
    with pytest.raises(ValueError, match="n must be ≥ 1"):
        buffer.draw(0)
    with pytest.raises(TypeError, match=r"indices must be an int64 tensor.*got list"):
        buffer.write([1], torch.zeros(1, 1))
    with pytest.raises(TypeError, match=r"indices must be an int64 tensor.*got torch\.float32"):
        buffer.write(torch.zeros(1), torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"indices must have shape \(n,\), got \(\)"):
        buffer.write(torch.tensor(1), torch.zeros(1, 1))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        buffer.write(torch.tensor([1]), [[0.0]])
    with pytest.raises(IndexError, match="out of bounds"):
        buffer.write(torch.tensor([10]), torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"state must have seed, time, got \['states'\]"):
        buffer.load_state_dict({"states": buffer.states})
    with pytest.raises(ValueError, match="n must be at most"):
        buffer.draw(11)
    with pytest.raises(ValueError, match="x must have shape"):
        buffer.write(torch.arange(3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="states must have shape"):
        buffer.load_state_dict(ReplayBuffer((2,), size=10).state_dict())
