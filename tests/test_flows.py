"""Flows: log-determinants against autograd, both directions, initialisation, saving, errors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from coopflow_ext import Key, flows, ops
from coopflow_ext.flows.builders import random_masks
from coopflow_ext.flows.layers import ActNorm
from coopflow_ext.rng import USE_PRIOR

DOUBLE = torch.float64


def _randomise(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Move every parameter, so that no coupling is the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=DOUBLE)
            parameter.add_(scale * noise.to(parameter.dtype))
    return module


def _ladj_by_autograd(transform: flows.Transform, x: Tensor) -> Tensor:
    rows = []
    for row in x:

        def one(flat: Tensor, shape: torch.Size = row.shape) -> Tensor:
            return transform.call_and_ladj(flat.reshape(1, *shape))[0].flatten()

        jacobian = torch.autograd.functional.jacobian(one, row.flatten())
        rows.append(torch.linalg.slogdet(jacobian).logabsdet)
    return torch.stack(rows)


def _affine(n_change: int, n_keep: int, split: flows.Split | str, flip: bool = False):
    net = flows.MLPConditioner(n_keep, 2 * n_change, (8,))
    return flows.AffineCoupling(net, n_change, split, flip)


def _affine_image(n_change: int, n_keep: int, split: str, flip: bool = False):
    net = flows.ConvConditioner(n_keep, 2 * n_change, 6, 1)
    return flows.AffineCoupling(net, n_change, split, flip)


MASK = torch.tensor([True, False, False, True, False])
LAYERS = {
    "actnorm_vector": lambda: (ActNorm(5), (5,)),
    "actnorm_image": lambda: (ActNorm(2), (2, 4, 4)),
    "conv1x1_vector": lambda: (flows.InvertibleConv1x1(5), (5,)),
    "conv1x1_image": lambda: (flows.InvertibleConv1x1(2), (2, 4, 4)),
    "affine_mask": lambda: (_affine(2, 3, flows.VectorSplit(MASK)), (5,)),
    "affine_vector_halves": lambda: (_affine(2, 2, "channel"), (4,)),
    "affine_channel": lambda: (_affine_image(1, 1, "channel"), (2, 4, 4)),
    "affine_channel_flip": lambda: (_affine_image(1, 1, "channel", True), (2, 4, 4)),
    "affine_checkerboard": lambda: (_affine_image(2, 2, "checkerboard"), (2, 4, 4)),
    "affine_checkerboard_flip": lambda: (_affine_image(2, 2, "checkerboard", True), (2, 4, 4)),
    "squeeze": lambda: (flows.Squeeze(), (2, 4, 4)),
    "checkerboard": lambda: (flows.Checkerboard(), (2, 3, 4)),
    "flip": lambda: (flows.Flip(), (2, 3, 4)),
    "flatten": lambda: (flows.Flatten((2, 2, 2)), (2, 2, 2)),
    "split_prior": lambda: (flows.SplitPrior(ActNorm(2)), (4, 2, 2)),
    "inverse": lambda: (flows.Inverse(ActNorm(4)), (4, 2, 2)),
    "realnvp_vector": lambda: (flows.realnvp(6, couplings=3, widths=(8,)).transform, (6,)),
    "realnvp_mlp": lambda: (
        flows.realnvp(image_shape=(1, 3, 3), net="mlp", couplings=3, widths=(8,)).transform,
        (1, 3, 3),
    ),
    "realnvp_conv": lambda: (
        flows.realnvp(image_shape=(1, 4, 4), channels=4, blocks=1).transform,
        (1, 4, 4),
    ),
    "glow": lambda: (
        flows.glow((1, 4, 4), steps=2, channels=4, blocks=1).transform,
        (1, 4, 4),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_ladj_is_that_of_the_jacobian_and_the_inverse_undoes_the_map(name):
    torch.manual_seed(0)
    transform, shape = LAYERS[name]()
    transform = _randomise(transform.double()).eval()
    x = torch.randn(3, *shape, dtype=DOUBLE)
    z, ladj = transform.call_and_ladj(x)
    assert ladj.shape == (3,)
    torch.testing.assert_close(ladj, _ladj_by_autograd(transform, x), rtol=1e-9, atol=1e-9)
    back, ladj_back = transform.inverse_and_ladj(z)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ladj_back, -ladj, rtol=1e-9, atol=1e-9)
    z = torch.randn_like(z)
    there, _ = transform.call_and_ladj(transform.inverse_and_ladj(z)[0])
    torch.testing.assert_close(there, z, rtol=1e-9, atol=1e-9)


def test_squeeze_orders_channels_as_published():
    x = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    z, _ = flows.Squeeze().call_and_ladj(x)
    for c in range(2):
        for dy in range(2):
            for dx in range(2):
                assert torch.equal(z[:, 4 * c + 2 * dy + dx], x[:, c, dy::2, dx::2])


def test_checkerboard_puts_equal_parities_first():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    z, _ = flows.Checkerboard().call_and_ladj(x)
    assert z[0, 0].tolist() == [[0, 2], [5, 7], [8, 10], [13, 15]]
    assert z[0, 1].tolist() == [[1, 3], [4, 6], [9, 11], [12, 14]]


@pytest.mark.parametrize("split", ["channel", "checkerboard"])
@pytest.mark.parametrize("flip", [False, True])
def test_a_coupling_leaves_the_other_half_alone(split, flip):
    coupling = _randomise(_affine_image(2 if split == "checkerboard" else 1, 2, split, flip))
    coupling = coupling if split == "checkerboard" else _randomise(_affine_image(1, 1, split, flip))
    x = torch.randn(2, 2, 4, 4)
    z, _ = coupling.call_and_ladj(x)
    same = z == x
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    if split == "checkerboard":
        changed = ((rows + columns) % 2 == 0).expand_as(x)
    else:
        changed = (torch.arange(2) == 0)[:, None, None].expand_as(x)
    assert torch.equal(same, changed if flip else ~changed)


def test_random_masks_are_halves_and_complements():
    masks = random_masks(7, 5, seed=3)
    assert [int(m.sum()) for m in masks] == [3, 4, 3, 4, 3]
    assert torch.equal(masks[0], ~masks[1])
    assert torch.equal(masks[2], ~masks[3])
    assert not torch.equal(masks[0], masks[2])
    again = random_masks(7, 5, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(masks, again, strict=True))


@pytest.mark.parametrize("shape", [(64, 3), (16, 3, 4, 4)])
def test_actnorm_initialises_from_the_first_batch_only(shape):
    norm = ActNorm(3)
    x = 5 + 3 * torch.randn(shape)
    z, _ = norm.call_and_ladj(x)
    rows = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.std(1, unbiased=False), torch.ones(3), rtol=0, atol=1e-4)
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    norm.call_and_ladj(100 * x)
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())


@pytest.mark.parametrize("layer", [flows.ActNorm, flows.InvertibleConv1x1])
def test_ladj_counts_the_positions_of_images_that_are_not_square(layer):
    """Of scales below 0 too."""
    torch.manual_seed(0)
    layer = layer(2).double().eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(-torch.rand_like(p) - 0.5)
    x = torch.randn(1, 2, 3, 5, dtype=torch.float64)
    _, ladj = layer.call_and_ladj(x)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer.call_and_ladj(x)[0], x)
    torch.testing.assert_close(ladj[0], torch.linalg.slogdet(jacobian.view(30, 30)).logabsdet)
    torch.testing.assert_close(layer.inverse_and_ladj(x)[1], -ladj)


def test_actnorm_adds_eps_to_the_deviation():
    layer = flows.ActNorm(1, eps=0.5)
    layer.initialize(torch.tensor([[1.0], [5.0]]))  # 3 ± 2
    assert layer.mean.item() == 3
    assert layer.inv_std.item() == pytest.approx(1 / 2.5)


def test_actnorm_does_not_start_from_nothing():
    norm = ActNorm(2)
    with pytest.raises(ValueError, match=r"ActNorm: x must hold at least two.*got shape \(0, 2\)"):
        norm.call_and_ladj(torch.zeros(0, 2))
    assert not norm.initialized
    assert norm.eval().call_and_ladj(torch.zeros(0, 2))[1].shape == (0,)


@pytest.mark.parametrize("shape", [(64, 3), (16, 3, 4, 4)])
def test_a_channel_that_does_not_vary_keeps_its_scale(shape):
    """Nor one that varies by its rounding; its mean is taken off all the same."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    flat = x.transpose(0, 1)
    flat[0], flat[1] = 0.1, 1000 + 1e-4 * flat[1]
    norm = ActNorm(3)
    z, _ = norm.call_and_ladj(x)
    assert norm.inv_std[:2].tolist() == [1, 1]
    assert norm.inv_std[2] != 1
    assert z[:, :2].abs().max() < 1e-3
    flow = flows.realnvp(4, couplings=8, widths=(8,))
    good = torch.randn(64, 4)
    first = good.clone()
    first[:, 2] = 5.0
    flow.initialize(first)
    assert flow.log_prob(good).mean() > -40


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 3), r"ActNorm: x must hold at least two values.*got shape \(1, 3\)"),
        (torch.tensor([[0.0, math.nan, 1.0]]).expand(4, 3), r"must be finite.*: \[1\]"),
        (torch.tensor([[math.inf, 0.0, -math.inf]]).expand(4, 3), r"must be finite.*: \[0, 2\]"),
    ],
)
@pytest.mark.parametrize("start", [flows.Flow.initialize, flows.Flow.log_prob])
def test_a_first_batch_that_tells_nothing_is_refused(x, message, start):
    flow = flows.realnvp(3, couplings=2, widths=(8,))
    before = copy.deepcopy(flow.state_dict())
    with pytest.raises(ValueError, match=message):
        start(flow, x)
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())
    x = torch.randn(8, 3)
    flow.initialize(x)
    flow.log_prob(x[:1])  # one row is enough from then on
    image = flows.glow((1, 8, 8), steps=1, channels=4)
    image.initialize(torch.rand(1, 1, 8, 8))  # whose one row has many values of each channel
    with pytest.raises(ValueError, match=r"beyond torch\.float16: \[1\]"):
        ActNorm(2).half().call_and_ladj(torch.tensor([[1.0, 1e6], [2.0, 2e6]]))


def test_actnorm_waits_for_training_mode():
    norm = ActNorm(2).eval()
    x = torch.randn(8, 2) + 3
    assert torch.equal(norm.call_and_ladj(x)[0], x)
    assert not norm.initialized
    norm.train().call_and_ladj(x)
    assert norm.initialized


@pytest.mark.parametrize("assign", [False, True])
def test_initialisation_survives_save_and_load(tmp_path, assign):
    """A layer that was loaded must not initialise itself again from the next batch."""
    flow = flows.realnvp(6, couplings=2, widths=(8,))
    flow.initialize(2 + torch.randn(64, 6))
    torch.save(flow.state_dict(), tmp_path / "flow.pt")
    loaded = flows.realnvp(6, couplings=2, widths=(8,), mask_seed=9)
    loaded.load_state_dict(torch.load(tmp_path / "flow.pt", weights_only=True), assign=assign)
    assert loaded.training
    x = -3 + 4 * torch.randn(5, 6)
    torch.testing.assert_close(loaded.log_prob(x), flow.log_prob(x), rtol=0, atol=0)
    fresh = flows.realnvp(6, couplings=2, widths=(8,))
    fresh.load_state_dict(flows.realnvp(6, couplings=2, widths=(8,)).state_dict())
    fresh.log_prob(x)
    assert all(m.initialized for m in fresh.modules() if isinstance(m, ActNorm))


def _image_flows() -> dict[str, flows.Flow]:
    return {
        "mlp": flows.realnvp(image_shape=(1, 4, 4), net="mlp", couplings=4, widths=(16,)),
        "conv": flows.realnvp(image_shape=(3, 8, 8), channels=8),
        "glow": flows.glow((1, 8, 8), steps=2, channels=8),
    }


@pytest.mark.parametrize("name", ["mlp", "conv", "glow"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_image_flow_goes_to_z_and_back(name, dtype):
    """Law 6: data → z → data, after data-dependent initialisation."""
    torch.manual_seed(0)
    flow = _randomise(_image_flows()[name].to(dtype), 0.05)
    shape = flow.event_shape
    x = torch.rand(16, *shape, dtype=dtype) * 2 - 1
    flow.initialize(x)
    eps = torch.rand(16, *shape, dtype=dtype)
    z, ladj = flow.call_and_ladj(x, eps=eps)
    assert z.shape == x.shape
    assert z.dtype == dtype
    assert ladj.dtype == dtype
    y, ladj_back = flow.inverse_and_ladj(z)
    v = (255 * (x + 1) / 2 + eps) / 256
    p = (0.9 * (2 * v - 1) + 1) / 2
    tolerance = 1e-9 if dtype == DOUBLE else 2e-4
    torch.testing.assert_close(y, p.logit(), rtol=0, atol=tolerance)
    # The two directions differ by the logit map alone, whose derivative is 0.9 / (p (1 − p)).
    log_slope = (0.9 / (p * (1 - p))).log().flatten(1).sum(1)
    torch.testing.assert_close(ladj + ladj_back, log_slope, rtol=tolerance, atol=tolerance)
    # Back in image space the dequantisation noise of at most one grey level is left.
    assert (flow.to_data(y) - x).abs().max() <= 1 / 128 + tolerance


def test_image_ladj_is_that_of_the_jacobian():
    torch.manual_seed(0)
    flow = flows.realnvp(image_shape=(1, 3, 3), net="mlp", couplings=2, widths=(8,))
    flow = _randomise(flow.double()).eval()
    x = torch.rand(2, 1, 3, 3, dtype=DOUBLE) * 2 - 1
    eps = torch.rand_like(x)
    _, ladj = flow.call_and_ladj(x, eps=eps)
    for i in range(2):

        def z_of_x(flat: Tensor, i: int = i) -> Tensor:
            z, _ = flow.call_and_ladj(flat.reshape(1, 1, 3, 3), eps=eps[i : i + 1])
            return z.flatten()

        jacobian = torch.autograd.functional.jacobian(z_of_x, x[i].flatten())
        # ladj starts at v = (255 (x + 1)/2 + u)/256, so dv/dx = 255/512 is not part of it.
        expected = torch.linalg.slogdet(jacobian).logabsdet - 9 * math.log(255 / 512)
        torch.testing.assert_close(ladj[i], expected)


def test_bits_per_dim_of_a_vector_flow_by_hand():
    norm = ActNorm(2).eval()
    with torch.no_grad():
        norm.mean.copy_(torch.tensor([1.0, 0.0]))
        norm.inv_std.copy_(torch.tensor([2.0, 1.0]))
    flow = flows.Flow(norm, (2,)).eval()
    x = torch.tensor([[2.0, 3.0], [1.0, 0.0]])  # z = (2, 3) and (0, 0)
    expected = torch.tensor([-6.5, 0.0]) - math.log(2 * math.pi) + math.log(2)
    torch.testing.assert_close(flow.log_prob(x), expected)
    bits = -expected.mean() / (2 * math.log(2))
    torch.testing.assert_close(flow.bits_per_dim(x), bits)
    torch.testing.assert_close(flow(x), expected)


def test_bits_per_dim_of_an_image_flow_by_hand():
    identity = flows.Compose([flows.Squeeze(), flows.Inverse(flows.Squeeze())])
    flow = flows.Flow(identity, (1, 2, 2), dequantize=flows.Dequantize(), logit=flows.Logit())
    x = torch.tensor([-1.0, -0.5, 0.0, 1.0]).reshape(1, 1, 2, 2)
    eps = torch.full_like(x, 0.25)
    total = 0.0
    for value in (-1.0, -0.5, 0.0, 1.0):
        v = (255 * (value + 1) / 2 + 0.25) / 256
        p = (0.9 * (2 * v - 1) + 1) / 2
        y = math.log(p / (1 - p))
        total += -0.5 * y * y - 0.5 * math.log(2 * math.pi) + math.log(0.9 / (p * (1 - p)))
        total -= math.log(256)
    assert flow.log_prob(x, eps=eps).item() == pytest.approx(total, rel=1e-5)
    bits = -total / (4 * math.log(2))
    assert flow.bits_per_dim(x, eps=eps).item() == pytest.approx(bits, rel=1e-5)


def test_log_prob_bounds_the_probability_of_discrete_data():
    """Averaged over the noise, exp(log_prob) is the prior's mass of the pixel's cell."""
    parts = {"dequantize": flows.Dequantize(levels=2), "logit": flows.Logit()}
    flow = flows.Flow(ActNorm(1), (1, 1, 1), **parts).eval()
    u = (torch.arange(1000.0) + 0.5).reshape(-1, 1, 1, 1) / 1000
    # The cells [0, ½] and [½, 1] of v go to [−logit 0.95, 0] and [0, logit 0.95].
    mass = 0.5 * math.erf(math.log(0.95 / 0.05) / math.sqrt(2))
    for level in (-1.0, 1.0):
        log_prob = flow.log_prob(torch.full_like(u, level), eps=u)
        assert log_prob.exp().mean().item() == pytest.approx(mass, rel=1e-5)
        assert log_prob.mean().item() < math.log(mass)


def test_vector_samples_are_the_inverse_of_the_prior():
    flow = _randomise(flows.realnvp(4, couplings=2, widths=(8,))).eval()
    x = flow.sample(6, Key(3))
    z, _ = flow.call_and_ladj(x)
    prior = ops.normal((6, 4), Key(3).fold_in(USE_PRIOR).tensor())
    torch.testing.assert_close(z, prior, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mlp", "conv", "glow"])
def test_image_samples_are_images(name):
    flow = _image_flows()[name]
    x = flow.sample(5, Key(1))
    assert x.shape == (5, *flow.event_shape)
    assert x.abs().max() <= 1
    assert not x.requires_grad
    assert flow.sample(0, Key(1)).shape == (0, *flow.event_shape)


def test_legacy_contrast_shrinks_samples_by_the_bound():
    legacy = flows.realnvp(image_shape=(1, 4, 4), net="mlp", legacy_contrast=True)
    correct = flows.realnvp(image_shape=(1, 4, 4), net="mlp")
    correct.load_state_dict(legacy.state_dict())
    shrunk, full = legacy.sample(8, Key(0)), correct.sample(8, Key(0))
    torch.testing.assert_close((shrunk / 0.9).clamp(-1, 1), full, rtol=0, atol=1e-6)
    y = torch.linspace(-9, 9, 5).reshape(1, 5)
    torch.testing.assert_close(legacy.to_data(y), 2 * y.sigmoid() - 1)


def test_samples_of_few_grey_levels_are_grey_levels():
    """Rounding undoes dequantisation exactly, for every level and noise."""
    flow = flows.realnvp(image_shape=(1, 4, 4), net="mlp", couplings=2, widths=(8,), levels=17)
    levels = torch.arange(17.0).repeat(16)[:256].reshape(16, 1, 4, 4)
    x = levels / 8 - 1
    for u in (0.01, 0.5, 0.99):
        z, _ = flow.call_and_ladj(x, eps=torch.full_like(x, u))
        torch.testing.assert_close(flow.to_data(flow.inverse_and_ladj(z)[0]), x, rtol=0, atol=1e-6)
    samples = (flow.sample(8, Key(0)) + 1) * 8
    torch.testing.assert_close(samples, samples.round(), rtol=0, atol=1e-5)
    assert not flows.realnvp(image_shape=(1, 4, 4), net="mlp").round_samples


def test_keys_decide_every_draw():
    flow = flows.realnvp(image_shape=(1, 4, 4), net="mlp", couplings=2, widths=(8,))
    x = torch.zeros(4, 1, 4, 4)
    flow.initialize(torch.rand(32, 1, 4, 4), key=Key(0))
    assert torch.equal(flow.log_prob(x, key=Key(5)), flow.log_prob(x, key=Key(5)))
    assert not torch.equal(flow.log_prob(x, key=Key(5)), flow.log_prob(x, key=Key(6)))
    assert torch.equal(flow.sample(3, Key(5)), flow.sample(3, Key(5)))
    torch.manual_seed(0)
    first = flow.sample(3), flow.log_prob(x)
    torch.manual_seed(0)
    second = flow.sample(3), flow.log_prob(x)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_a_split_batch_draws_what_the_whole_batch_draws():
    flow = flows.realnvp(image_shape=(1, 4, 4), net="mlp", couplings=2, widths=(8,), dropout=0.3)
    x = torch.rand(6, 1, 4, 4)
    flow.initialize(x, key=Key(0))
    whole = flow.log_prob(x, key=Key(2))
    halves = [flow.log_prob(x[i : i + 3], key=Key(2, chain=i)) for i in (0, 3)]
    torch.testing.assert_close(torch.cat(halves), whole)
    samples = torch.cat([flow.sample(3, Key(2, chain=i)) for i in (0, 3)])
    torch.testing.assert_close(samples, flow.sample(6, Key(2)))


def test_dropout_follows_the_key_and_the_mode():
    flow = _randomise(flows.realnvp(6, couplings=2, widths=(16,), dropout=0.5))
    x = torch.randn(4, 6)
    flow.initialize(x)
    assert torch.equal(flow.log_prob(x, key=Key(1)), flow.log_prob(x, key=Key(1)))
    assert not torch.equal(flow.log_prob(x, key=Key(1)), flow.log_prob(x, key=Key(2)))
    assert not torch.equal(flow.log_prob(x, key=Key(1)), flow.log_prob(x, key=Key(1, time=1)))
    without = flow.sample(4, Key(1))
    flow.sampling_dropout = True
    assert not torch.equal(flow.sample(4, Key(1)), without)
    flow.eval()
    assert torch.equal(flow.log_prob(x, key=Key(1)), flow.log_prob(x, key=Key(2)))
    assert torch.equal(flow.sample(4, Key(1)), without)


def test_dropout_keeps_the_mean():
    dropout = flows.Dropout(0.25)
    y = dropout(torch.ones(100, 1000), flows.Context(dropout_rng=Key(0).tensor()))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    # 10⁵ draws: one standard deviation of the mean is 1.8e-3.
    assert y.mean().item() == pytest.approx(1, abs=5 * 1.8e-3)


def test_log_prob_reads_nothing_back_from_the_device():
    """No .item()-like call, so that a GPU never waits (ActNorm's flag, range check, dropout)."""

    class CountReads(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (
                torch.ops.aten._local_scalar_dense,
                torch.ops.aten.is_nonzero,
                torch.ops.aten.nonzero,
            ):
                self.reads += 1
            return func(*args, **(kwargs or {}))

    flow = flows.glow((1, 8, 8), steps=2, channels=8)
    x = torch.rand(8, 1, 8, 8)
    flow.initialize(x)
    with CountReads() as mode:
        flow.log_prob(x, key=Key(0)).sum().backward()
        flow.sample(4, Key(1))
    assert mode.reads == 0


def test_maximum_likelihood_learns_a_curved_density():
    """A ring-shaped density: better than its best Gaussian by a clear margin."""
    torch.manual_seed(0)
    flow = flows.realnvp(2, couplings=6, widths=(32, 32))
    angle = 6.2832 * torch.rand(2000)
    radius = 1 + 0.1 * torch.randn(2000)
    x = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=1)
    flow.initialize(x)
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    for i in range(200):
        loss = -flow.log_prob(x[(i % 8) * 250 :][:250]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best_gaussian = -torch.distributions.MultivariateNormal(x.mean(0), x.T.cov()).log_prob(x)
    assert loss.item() < best_gaussian.mean().item() - 0.5


def test_the_prior_of_half_precision_is_summed_in_float32():
    flow = flows.realnvp(512, couplings=2, widths=(8,)).eval().to(torch.bfloat16)
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    log_prob = flow.log_prob(x)  # the couplings begin as the identity
    assert log_prob.dtype == torch.float32
    exact = torch.distributions.Normal(0, 1).log_prob(x.double()).sum(1)
    torch.testing.assert_close(log_prob.double(), exact, rtol=1e-6, atol=0)


def test_a_flow_is_initialised_in_evaluation_mode_too():
    flow = flows.realnvp(6, couplings=2, widths=(8,)).eval()
    flow.initialize(torch.randn(50, 6) * 3 + 1)
    starts = [layer for layer in flow.modules() if isinstance(layer, flows.ActNorm)]
    assert [bool(layer.initialized > 0) for layer in starts] == [True, True]
    assert not any(module.training for module in flow.modules())


def test_nothing_is_drawn_where_nothing_is_random():
    """With the noise given and without dropout torch's generator stays as it is."""
    flow = flows.realnvp(image_shape=(1, 4, 4), net="mlp", couplings=2, widths=(8,)).eval()
    x = torch.rand(2, 1, 4, 4)
    before = torch.get_rng_state()
    flow.log_prob(x, eps=torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    flow.call_and_ladj(x, key=Key(0))
    assert torch.equal(torch.get_rng_state(), before)
    flow.log_prob(x)
    assert not torch.equal(torch.get_rng_state(), before)


def test_bad_input_is_refused():
    flow = flows.realnvp(image_shape=(1, 4, 4), net="mlp", couplings=2, widths=(8,))
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, 4, 4\)"):
        flow.log_prob(torch.zeros(2, 16))
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\], got values from 0 to 255"):
        flow.log_prob(torch.linspace(0, 255, 16).reshape(1, 1, 4, 4))
    with pytest.raises(ValueError, match="must lie in"):
        flow.log_prob(torch.full((1, 1, 4, 4), torch.nan))
    with pytest.raises(ValueError, match="eps must have the shape of x"):
        flow.log_prob(torch.zeros(2, 1, 4, 4), eps=torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="n must be ≥ 0"):
        flow.sample(-1)
    with pytest.raises(ValueError, match="z must have shape"):
        flow.inverse_and_ladj(torch.zeros(2, 4, 4))
    vectors = flows.realnvp(4, couplings=2, widths=(8,))
    with pytest.raises(ValueError, match="this flow has none"):
        vectors.log_prob(torch.zeros(2, 4), eps=torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_messages_about_types_name_argument_and_types(dtype):
    other = {torch.float32: DOUBLE, DOUBLE: torch.float32}[dtype]
    flow = flows.realnvp(
        image_shape=(1, 4, 4), net="mlp", couplings=2, widths=(8,), context_dim=2
    ).to(dtype)
    x, context = torch.zeros(2, 1, 4, 4, dtype=dtype), torch.zeros(2, 2, dtype=dtype)
    calls = {
        "x": lambda v: flow.log_prob(v, context=context),
        "eps": lambda v: flow.bits_per_dim(x, eps=v, context=context),
        "z": lambda v: flow.inverse_and_ladj(v, context=context),
        "context": lambda v: flow.sample(2, context=v),
    }
    for name, call in calls.items():
        good = context if name == "context" else x
        for value, message in (
            (good.numpy(), r"must be a tensor, got numpy\.ndarray"),
            (good.tolist(), r"must be a tensor, got list"),
            (good.byte(), r"must be a floating-point tensor, got torch\.uint8"),
            (good.to(other), rf"must be {dtype}, the dtype of the parameters, got {other}"),
        ):
            with pytest.raises(TypeError, match=f"^{name} {message}"):
                call(value)
    with torch.autocast("cpu", torch.bfloat16):
        flow.float().log_prob(x.bfloat16(), context=context.bfloat16())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: flows.realnvp(), "either dim or image_shape"),
        (lambda: flows.realnvp(2, image_shape=(1, 8, 8)), "either dim or image_shape"),
        (lambda: flows.realnvp(1), "dim must be ≥ 2"),
        (lambda: flows.realnvp(4, net="conv"), "needs image_shape"),
        (lambda: flows.realnvp(4, net="lstm"), "net must be"),
        (lambda: flows.realnvp(4, couplings=0), "couplings must be ≥ 1"),
        (lambda: flows.realnvp(4, widths=(8, 0)), r"widths\[1\] must be ≥ 1, got 0"),
        (lambda: flows.realnvp(4, dropout=1.0), "dropout must be"),
        (lambda: flows.realnvp(image_shape=(1, 6, 6)), "multiples of 4"),
        (lambda: flows.glow((8, 8)), r"image_shape must be \(C, H, W\)"),
        (lambda: flows.glow((1, 7, 8)), "multiples of 4"),
        (lambda: flows.Dequantize(1), "levels must be ≥ 2"),
        (lambda: flows.Logit(1.0), "bound must be in"),
        (lambda: ActNorm(0), "channels must be ≥ 1"),
        (lambda: flows.Compose([]), "at least one transform"),
        (lambda: flows.VectorSplit(torch.ones(3, dtype=torch.bool)), "with both values"),
        (lambda: flows.VectorSplit(torch.ones(3)), "mask must be a bool tensor"),
        (lambda: _affine(2, 2, "rows"), "split must be"),
        (lambda: flows.Flow(ActNorm(2), (2,), legacy_contrast=True), "image flows only"),
        (lambda: flows.Flow(ActNorm(2), (2,), round_samples=True), "image flows only"),
        (lambda: flows.Flow(ActNorm(2), (2,), logit=flows.Logit()), "go together"),
        (lambda: flows.Squeeze().call_and_ladj(torch.zeros(1, 1, 3, 4)), "Squeeze: x must be"),
        (lambda: flows.Checkerboard().call_and_ladj(torch.zeros(1, 1, 4, 3)), "Checkerboard: x"),
        (lambda: flows.Flip().call_and_ladj(torch.zeros(1, 3)), "must be even"),
        (lambda: flows.SplitPrior(ActNorm(1)).call_and_ladj(torch.zeros(1, 3)), "must be even"),
        (lambda: ActNorm(3).call_and_ladj(torch.zeros(2, 4)), r"ActNorm: x must be \(B, 3"),
        (
            lambda: flows.InvertibleConv1x1(3).call_and_ladj(torch.zeros(2, 3, 4)),
            r"\(B, D\) or \(B, C, H, W\)",
        ),
        (
            lambda: flows.AffineCoupling(flows.MLPConditioner(2, 3), 2).call_and_ladj(
                torch.zeros(1, 4)
            ),
            "net must return 2·2 channels",
        ),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_flow_without_parameters(device):
    flow, x = flows.Flow(flows.Flip(), (4,)), torch.randn(2, 4, device=device)
    with torch.no_grad():
        assert flow.log_prob(x).shape == (2,)
    assert flow.sample(3, Key(0)).shape == (3, 4)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["glow", "flowpp", "realnvp"])
def test_autocast_takes_its_own_dtype(name, given):
    torch.manual_seed(0)
    shape = (4,) if name == "realnvp" else (1, 4, 4)
    make = {
        "realnvp": lambda: flows.realnvp(dim=4, couplings=2, widths=(8,)),
        "glow": lambda: flows.glow(shape, steps=2, channels=4, blocks=1),
        "flowpp": lambda: flows.flowpp(
            shape, scales=((0, 1),), channels=8, blocks=1, components=2, dequant_blocks=0
        ),
    }
    flow = make[name]()
    x = torch.rand(4, *shape) * 1.8 - 0.9
    flow.initialize(x, key=Key(0))
    flow.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert flow.log_prob(x.to(given), key=Key(0)).isfinite().all()
        assert flow.inverse_and_ladj(x.to(given))[0].isfinite().all()
        for other in (torch.float64, torch.float16):
            with pytest.raises(TypeError, match=r"float32 or torch\.bfloat16 under this autocast"):
                flow.log_prob(x.to(other), key=Key(0))


def test_a_mixture_of_coordinates_has_a_rescale_for_each():
    class Net(flows.Conditioner):
        def forward(self, x, context=None):
            return x.sum(1, keepdim=True).expand(-1, 16)

    mask = torch.tensor([True, False, True, False])
    coupling = flows.MixtureLogisticCoupling(Net(), 2, 2, flows.VectorSplit(mask))
    with torch.no_grad():
        coupling.rescale.parametrizations["weight"].original0.copy_(
            torch.tensor([0.5, 2.0]).view(2, 1, 1)
        )
    rows = [coupling.call_and_ladj(torch.ones(batch, 4)) for batch in (1, 2, 3)]
    for z, ladj in rows:
        torch.testing.assert_close(z, rows[0][0].expand_as(z))
        torch.testing.assert_close(ladj, rows[0][1].expand_as(ladj))
    back, _ = coupling.inverse_and_ladj(rows[2][0])
    torch.testing.assert_close(back, torch.ones(3, 4))
