"""ReplayBuffer: what is drawn, what comes back, and that both follow from the key."""

from __future__ import annotations

import pytest
import torch

import coopflow_ext as cf
from coopflow_ext.rng import USE_BUFFER, stream
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


def test_the_chain_of_a_key_is_saved_with_it():
    a, b = (ReplayBuffer((3,), size=30, key=key) for key in (cf.Key(4, chain=7), cf.Key(9)))
    b.load_state_dict(a.state_dict())
    assert b.key == a.key
    assert b.key.chain == 7
    assert torch.equal(a.draw(8).indices, b.draw(8).indices)


def test_a_saved_state_does_not_follow_the_buffer():
    buffer = ReplayBuffer((3,), size=5, key=cf.Key(4))
    saved = buffer.state_dict()["states"]
    before = saved.clone()
    buffer.write(torch.arange(5), torch.zeros(5, 3))
    assert torch.equal(saved, before)


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


@pytest.mark.parametrize("structure", [list, tuple])
def test_a_state_of_several_tensors(structure):
    shapes = structure([(2, 3), [4]])

    def make(key, **more):
        return ReplayBuffer(shapes, size=20, key=cf.Key(key), **more)

    buffer = make(1, reinit_probability=0.0)
    alone = ReplayBuffer((2, 3), size=20, reinit_probability=0.0, key=cf.Key(1))
    assert torch.equal(buffer.states[0], alone.states)  # as tensor 0 of a sampler has its noise
    assert buffer.states[1].unique().numel() == 80
    x, indices = buffer.draw(8)
    assert type(x) is structure
    assert torch.equal(indices, alone.draw(8).indices)
    assert all(torch.equal(a, b[indices]) for a, b in zip(x, buffer.states, strict=True))

    def energy(x):
        return x[0].square().sum((1, 2)) + x[1].square().sum(1)

    moved = cf.LangevinSampler(energy, n_steps=3, step_size=0.3)(x, key=cf.Key(2)).x
    buffer.write(indices, moved)
    assert all(torch.equal(a[indices], b) for a, b in zip(buffer.states, moved, strict=True))
    other = make(5)
    other.load_state_dict(buffer.state_dict())
    torch.testing.assert_close(other.states, buffer.states, rtol=0, atol=0)
    assert other.key == buffer.key
    everything_new = make(1, reinit_probability=1.0).draw(20).x
    assert all(part.unique().numel() == part.numel() for part in everything_new)
    for part, shape in zip(everything_new, shapes, strict=True):
        assert part.shape == (20, *shape)


def test_new_chains_of_several_tensors_are_made_together():
    def init(shapes, key, y):
        assert type(shapes) is tuple
        z = cf.ops.normal(shapes[1], key.tensor())
        return [z.sum(1, keepdim=True) + y[:, None], z]

    buffer = ReplayBuffer(((1,), (3,)), size=12, init=init, n_classes=4, reinit_probability=0.5)
    for x, labels in (
        (buffer.states, buffer.labels),
        (draw := buffer.draw(6)).x and (draw.x, draw.y),
    ):
        torch.testing.assert_close(x[0][:, 0], x[1].sum(1) + labels)


def test_labels_stay_with_their_chains():
    """States that tell their class: drawn by label, kept when a chain starts anew."""

    def init(shape, key, y):
        return y[:, None].expand(shape).float() + 100

    buffer = ReplayBuffer((2,), size=23, init=init, n_classes=5, reinit_probability=0.3,
                          key=cf.Key(3))  # fmt: skip
    assert torch.equal(buffer.labels, torch.arange(23) % 5)
    buffer.write(torch.arange(23), (torch.arange(23) % 5).float()[:, None].expand(23, 2))
    y = torch.tensor([4, 0, 4, 2, 4, 1, 0])
    seen, new = set(), 0
    for _ in range(50):
        x, indices = draw = buffer.draw(7, y=y)
        assert torch.equal(draw.y, y)
        assert torch.equal(indices % 5, y)
        assert len(set(indices.tolist())) == 7
        assert torch.equal(x[:, 0] % 100, y.float())
        new += int((x[:, 0] >= 100).sum())
        seen |= set(indices.tolist())
    assert seen == {i for i in range(23) if i % 5 != 3}
    assert abs(new / 350 - 0.3) < 5 * (0.3 * 0.7 / 350) ** 0.5
    x, indices = draw = buffer.draw(9)  # of any class
    assert torch.equal(draw.y, indices % 5)
    assert torch.equal(x[:, 0] % 100, draw.y.float())
    assert torch.equal(buffer.draw(4, y=1).y, torch.full((4,), 1))
    assert buffer.draw(2, y=[3, 0]).y.tolist() == [3, 0]
    everything = buffer.draw(23, y=torch.arange(22, -1, -1) % 5).indices
    assert sorted(everything.tolist()) == list(range(23))


def test_every_chain_of_a_class_is_as_likely():
    buffer = ReplayBuffer((1,), size=40, n_classes=4, key=cf.Key(2), reinit_probability=0.0)
    y = torch.tensor([1, 1, 1, 2, 3])
    counts = torch.zeros(40)
    for _ in range(2000):
        counts[buffer.draw(5, y=y).indices] += 1
    for label, asked in ((0, 0), (1, 3), (2, 1), (3, 1)):
        share = asked / 10
        got = counts[label::4] / 2000
        assert (got - share).abs().max() <= 5 * (share * (1 - share) / 2000) ** 0.5


def test_a_saved_buffer_with_labels_goes_on():
    def make(key=4, n_classes=3):
        return ReplayBuffer((3,), size=30, n_classes=n_classes, key=cf.Key(key))

    a, y = make(), torch.arange(6) % 3
    a.draw(6, y=y)
    b = make(9)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a.draw(6, y=y).x, b.draw(6, y=y).x)
    assert not torch.equal(a.draw(6, y=y).x, a.draw(6, y=y).x)
    for other in (2, None):
        with pytest.raises(ValueError, match=f"n_classes must be {other}, got 3"):
            make(n_classes=other).load_state_dict(a.state_dict())
    old = {"states": torch.ones(30, 3), "seed": 1, "time": 2}  # before classes and chains
    plain = make(n_classes=None)
    plain.load_state_dict(old)
    assert plain.key == cf.Key(1, 2)
    assert plain.draw(3).y is None
    with pytest.raises(ValueError, match="n_classes must be 3, got None"):
        a.load_state_dict(old)


def test_bad_labels_and_bad_states_of_several_tensors():
    buffer = ReplayBuffer((1,), size=10, n_classes=4)
    for y, error, match in (
        (torch.tensor([0.5, 1.0]), TypeError, r"y must be integers, got torch\.float32"),
        (True, TypeError, r"y must be integers, got torch\.bool"),
        ("ab", TypeError, "y must be integers, got 'ab'"),
        (
            torch.zeros(3, dtype=torch.int64),
            ValueError,
            r"y must be one label or .*\(2,\), got \(3,\)",
        ),
        ([0, 4], ValueError, r"y must be labels in \[0, 4\), got 0 to 4"),
        ([-1, 2], ValueError, r"y must be labels in \[0, 4\), got -1 to 2"),
    ):
        with pytest.raises(error, match=match):
            buffer.draw(2, y=y)
    with pytest.raises(ValueError, match=r"y asks for 3 chains of label 2, of which .* has 2"):
        buffer.draw(4, y=[2, 1, 2, 2])
    with pytest.raises(ValueError, match="y needs a buffer with classes; give it n_classes"):
        ReplayBuffer((1,), size=10).draw(2, y=0)
    with pytest.raises(ValueError, match="n_classes must be at most the buffer's size 10, got 11"):
        ReplayBuffer((1,), size=10, n_classes=11)
    with pytest.raises(TypeError, match="n_classes must be an int"):
        ReplayBuffer((1,), size=10, n_classes=2.0)
    pair = ReplayBuffer(((1,), (2,)), size=10)
    index = torch.arange(3)
    for x, error, match in (
        (torch.zeros(3, 1), TypeError, "x must be a list or tuple of 2 tensors, got Tensor"),
        ([torch.zeros(3, 1)], TypeError, "x must be a list or tuple of 2 tensors, got 1"),
        ([torch.zeros(3, 1), 0.0], TypeError, "x must be a tensor, got float"),
        ([torch.zeros(3, 1), torch.zeros(3, 2) * 1j], TypeError, "x must be real, got"),
        ([torch.zeros(3, 1)] * 2, ValueError, r"x must have shape \(3, 2\), got \(3, 1\)"),
    ):
        before = [state.clone() for state in pair.states]
        with pytest.raises(error, match=match):
            pair.write(index, x)
        assert all(map(torch.equal, pair.states, before))
    with pytest.raises(TypeError, match=r"shape\[1\] must be a sequence of ints, such as \(2,\)"):
        ReplayBuffer(((1,), 2))
    with pytest.raises(ValueError, match=r"shape\[1\]\[0\] must be ≥ 0, got -1"):
        ReplayBuffer(((1,), (-1,)))
    with pytest.raises(TypeError, match="states must be a list or tuple of 2 tensors, got Tensor"):
        pair.load_state_dict(buffer.state_dict() | {"n_classes": None})
    with pytest.raises(
        TypeError, match="init must return a list or tuple of 2 tensors, got Tensor"
    ):
        ReplayBuffer(((1,), (2,)), init=lambda shapes, key: torch.zeros(shapes[0]))


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
    with pytest.raises(IndexError, match=r"indices must be in \[0, "):
        buffer.write(torch.tensor([10]), torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"state must have seed, time, got \['states'\]"):
        buffer.load_state_dict({"states": buffer.states})
    with pytest.raises(ValueError, match="n must be at most"):
        buffer.draw(11)
    with pytest.raises(ValueError, match="x must have shape"):
        buffer.write(torch.arange(3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="states must have shape"):
        buffer.load_state_dict(ReplayBuffer((2,), size=10).state_dict())


def test_what_is_refused_changes_nothing():
    pair = ReplayBuffer([(1,), (1,)], size=3, key=cf.Key(0))
    before = [state.clone() for state in pair.states]
    for indices in ([0, 9], [-1, 0]):
        with pytest.raises(IndexError, match=r"indices must be in \[0, 3\)"):
            pair.write(torch.tensor(indices), [torch.full((2, 1), 7.0)] * 2)
    with pytest.raises(ValueError, match="seed must be"):
        pair.load_state_dict({"states": [torch.full((3, 1), 7.0)] * 2, "seed": -1, "time": 0})
    assert all(map(torch.equal, pair.states, before))


def test_states_may_come_from_the_buffer_itself():
    """All are read before the first is written."""
    buffer = ReplayBuffer(((1,), (2,)), size=6, key=cf.Key(0))
    a, b = (state.clone() for state in buffer.states)
    buffer.write(torch.tensor([0, 1, 2]), [buffer.states[0][1:4], buffer.states[1][1:4]])
    assert torch.equal(buffer.states[0], torch.cat((a[1:4], a[3:])))
    assert torch.equal(buffer.states[1], torch.cat((b[1:4], b[3:])))


def test_states_of_another_dtype_become_the_buffers():
    buffer = ReplayBuffer(
        (2,), size=6, init=lambda shape, key: torch.ones(shape, dtype=torch.float64),
        reinit_probability=0.5, key=cf.Key(0),
    )  # fmt: skip
    x, indices = buffer.draw(4)
    assert x.dtype == buffer.states.dtype == torch.float32
    buffer.write(indices, torch.full((4, 2), 3.0, dtype=torch.float64))
    assert buffer.states.dtype == torch.float32
    assert torch.equal(buffer.states[indices], torch.full((4, 2), 3.0))


def drawn_by(shape, key):
    return cf.ops.normal(shape, key.tensor())


@pytest.mark.parametrize("init", ["uniform", "normal", drawn_by])
def test_new_chains_are_not_those_that_the_buffer_began_with(init):
    """Each use of the buffer's key has a stream of its own, and none is the key's itself."""
    key = cf.Key(4)
    buffer = ReplayBuffer((3,), size=10, init=init, reinit_probability=1.0, key=key)
    assert buffer.key == key.fold_in(USE_BUFFER)
    first, second = (buffer.draw(10).x for _ in range(2))
    everything = torch.cat((buffer.states, first, second))
    assert everything.unique().numel() == everything.numel()


def test_which_chains_start_anew_does_not_depend_on_which_are_drawn():
    buffer = ReplayBuffer((1,), size=64, reinit_probability=0.5, key=cf.Key(4))
    buffer.write(torch.arange(64), torch.full((64, 1), 7.0))
    chances = cf.ops.uniform((64,), stream(buffer.key, 1))
    x, indices = buffer.draw(64)
    assert torch.equal(indices, chances.argsort(descending=True))
    assert not torch.equal(x[:, 0] != 7.0, chances < 0.5)


def test_new_chains_are_made_on_the_buffers_device():
    seen = []

    def init(shape, key):
        seen.append(torch.empty(0).device.type)
        return torch.zeros(shape)

    assert ReplayBuffer((2,), size=3, init=init, device="meta").states.is_meta
    assert seen == ["meta"]


def test_a_class_for_each_chain():
    assert ReplayBuffer((1,), size=3, n_classes=3).labels.tolist() == [0, 1, 2]
