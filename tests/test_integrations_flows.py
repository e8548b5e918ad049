"""Our couplings in other flow libraries, each with that library itself."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

from coopflow_ext.flows import AffineCoupling, Flow, MixtureLogisticCoupling, realnvp
from coopflow_ext.flows.couplings import VectorSplit


def couplings() -> list[AffineCoupling]:
    """Two couplings of 3-vectors that change different coordinates, not the identity."""
    layers = []
    for seed, mask in enumerate(([True, True, False], [False, False, True])):
        torch.manual_seed(seed)
        changed = sum(mask)
        net = _Net(3 - changed, 2 * changed)
        layers.append(AffineCoupling(net, changed, VectorSplit(torch.tensor(mask))))
    return layers


class _Net(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(n_in, 16), nn.Tanh(), nn.Linear(16, n_out))

    def forward(self, kept: Tensor, context) -> Tensor:
        h = self.body(kept)
        return h if context.aux is None else h + context.aux.mean(1, keepdim=True)


def direct_log_prob(layers: list[AffineCoupling], x: Tensor) -> Tensor:
    total = 0
    for layer in layers:
        x, ladj = layer.call_and_ladj(x)
        total = total + ladj
    return torch.distributions.Normal(0, 1).log_prob(x).sum(1) + total


def check_training(log_prob, parameters) -> None:
    """Gradients reach every parameter through the other library's flow."""
    (-log_prob.mean()).backward()
    assert all(p.grad is not None for p in parameters)
    assert any(p.grad.abs().sum() > 0 for p in parameters)


@pytest.mark.parametrize(
    ("library", "name"),
    [("zuko", "ZukoTransform"), ("nflows", "NflowsTransform"), ("normflows", "NormflowsFlow")],
)
def test_what_is_no_layer_is_named(library, name):
    pytest.importorskip(library)
    adapter = getattr(importlib.import_module(f"coopflow_ext.integrations.{library}"), name)
    with pytest.raises(
        TypeError, match=r"must be a Transform, got Flow; its layers are flow\.tran"
    ):
        adapter(realnvp(3, couplings=2, widths=(8,)))
    with pytest.raises(TypeError, match=r"must be a Transform, got Linear$"):
        adapter(nn.Linear(2, 2))


def test_zuko():
    zuko = pytest.importorskip("zuko")
    from coopflow_ext.integrations.zuko import ZukoTransform

    layers = couplings()
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(3), torch.ones(3), buffer=True
    )
    own = zuko.flows.Flow([ZukoTransform(layer) for layer in layers], base)
    x = torch.randn(7, 3)
    torch.testing.assert_close(own().log_prob(x), direct_log_prob(layers, x))
    samples, log_prob = own().rsample_and_log_prob((5, 2))
    assert samples.shape == (5, 2, 3)
    torch.testing.assert_close(own().log_prob(samples), log_prob, rtol=1e-4, atol=1e-4)
    # Among zuko's own layers.
    rotation = zuko.lazy.UnconditionalTransform(
        zuko.transforms.RotationTransform, torch.randn(3, 3)
    )
    mixed = zuko.flows.Flow([ZukoTransform(layers[0]), rotation, ZukoTransform(layers[1])], base)
    d = mixed()
    torch.testing.assert_close(d.transform.inv(d.transform(x)), x, rtol=1e-4, atol=1e-5)
    check_training(d.log_prob(x), list(layers[0].parameters()) + list(layers[1].parameters()))
    context = torch.randn(7, 4)
    assert not torch.allclose(own(context).log_prob(x), own().log_prob(x))


def test_nflows():
    pytest.importorskip("nflows")
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, ReversePermutation

    from coopflow_ext.integrations.nflows import NflowsTransform

    layers = couplings()
    x = torch.randn(7, 3)
    own = Flow(CompositeTransform([NflowsTransform(c) for c in layers]), StandardNormal([3]))
    torch.testing.assert_close(own.log_prob(x), direct_log_prob(layers, x))
    samples, log_prob = own.sample_and_log_prob(6)
    torch.testing.assert_close(own.log_prob(samples), log_prob, rtol=1e-4, atol=1e-4)
    mixed = Flow(
        CompositeTransform(
            [NflowsTransform(layers[0]), ReversePermutation(3), NflowsTransform(layers[1])]
        ),
        StandardNormal([3]),
    )
    assert mixed.sample(4).shape == (4, 3)
    check_training(mixed.log_prob(x), list(mixed.parameters()))


def test_normflows():
    normflows = pytest.importorskip("normflows")
    from coopflow_ext.integrations.normflows import NormflowsFlow

    layers = couplings()
    x = torch.randn(7, 3)
    base = normflows.distributions.DiagGaussian(3, trainable=False)
    # normflows lists layers from latent to data.
    own = normflows.NormalizingFlow(base, [NormflowsFlow(c) for c in reversed(layers)])
    torch.testing.assert_close(own.log_prob(x), direct_log_prob(layers, x))
    samples, log_prob = own.sample(6)
    torch.testing.assert_close(own.log_prob(samples), log_prob, rtol=1e-4, atol=1e-4)
    permute = normflows.flows.Permute(3)
    mixed = normflows.NormalizingFlow(
        base, [NormflowsFlow(layers[0]), permute, NormflowsFlow(layers[1])]
    )
    check_training(mixed.log_prob(x), list(layers[0].parameters()) + list(layers[1].parameters()))


class _ConvNet(nn.Module):
    def __init__(self, n_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, n_out, 3, padding=1)

    def forward(self, kept: Tensor, context) -> Tensor:
        return self.conv(kept)


def image_flow(library: str, layers: list[MixtureLogisticCoupling], shape: tuple[int, ...]):
    """log_prob and n → (samples, their log_prob) of the other library's flow of our layers."""
    if library == "zuko":
        zuko = pytest.importorskip("zuko")
        from coopflow_ext.integrations.zuko import ZukoTransform

        class Base(nn.Module):
            def forward(self, context=None):
                normal = torch.distributions.Normal(torch.zeros(shape), torch.ones(shape))
                return torch.distributions.Independent(normal, 3)

        flow = zuko.flows.Flow([ZukoTransform(layer, event_dim=3) for layer in layers], Base())
        return flow().log_prob, lambda n: flow().rsample_and_log_prob((n,))
    if library == "nflows":
        pytest.importorskip("nflows")
        from nflows.distributions import StandardNormal
        from nflows.flows import Flow
        from nflows.transforms import CompositeTransform

        from coopflow_ext.integrations.nflows import NflowsTransform

        flow = Flow(CompositeTransform([NflowsTransform(c) for c in layers]), StandardNormal(shape))
        return flow.log_prob, flow.sample_and_log_prob
    normflows = pytest.importorskip("normflows")
    from coopflow_ext.integrations.normflows import NormflowsFlow

    base = normflows.distributions.DiagGaussian(shape, trainable=False)
    flow = normflows.NormalizingFlow(base, [NormflowsFlow(c) for c in reversed(layers)])
    return flow.log_prob, flow.sample


def conditional_flow() -> Flow:
    torch.manual_seed(0)
    flow = realnvp(3, couplings=3, widths=(8,), context_dim=2)
    flow.initialize(torch.randn(20, 3), context=torch.randn(20, 2))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return flow


def test_zuko_with_context():
    """zuko's context has any batch dimensions, which x is broadcast against."""
    zuko = pytest.importorskip("zuko")
    from coopflow_ext.integrations.zuko import ZukoTransform

    flow = conditional_flow()
    base = zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal, torch.zeros(3), torch.ones(3), buffer=True
    )
    theirs = zuko.flows.Flow([ZukoTransform(t) for t in flow.transform.transforms], base)
    x, context = torch.randn(7, 3), torch.randn(7, 2)
    expected = flow.log_prob(x, context=context)
    torch.testing.assert_close(theirs(context).log_prob(x), expected)
    torch.testing.assert_close(
        theirs(context[0]).log_prob(x), flow.log_prob(x, context=context[:1].expand(7, 2))
    )
    torch.testing.assert_close(
        theirs(context).log_prob(x[0]), flow.log_prob(x[:1].expand(7, 3), context=context)
    )
    torch.testing.assert_close(
        theirs(context[:, None]).log_prob(x),
        torch.stack([flow.log_prob(x, context=c.expand(7, 2)) for c in context]),
    )
    samples, log_probs = theirs(context).rsample_and_log_prob((5,))
    assert samples.shape == (5, 7, 3)
    torch.testing.assert_close(theirs(context).log_prob(samples), log_probs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flow.log_prob(samples[1], context=context), log_probs[1])
    with pytest.raises(ValueError, match="context must be a tensor"):
        theirs().log_prob(x)


def test_nflows_with_context():
    """nflows embeds the context, and samples a number for each row of it."""
    pytest.importorskip("nflows")
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow as NflowsFlow
    from nflows.transforms import CompositeTransform

    from coopflow_ext.integrations.nflows import NflowsTransform

    flow, embedding = conditional_flow(), nn.Linear(4, 2)
    theirs = NflowsFlow(
        CompositeTransform([NflowsTransform(t) for t in flow.transform.transforms]),
        StandardNormal([3]),
        embedding_net=embedding,
    )
    x, raw = torch.randn(7, 3), torch.randn(7, 4)
    torch.testing.assert_close(theirs.log_prob(x, raw), flow.log_prob(x, context=embedding(raw)))
    samples, log_probs = theirs.sample_and_log_prob(5, context=raw)
    assert samples.shape == (7, 5, 3)
    assert theirs.sample(5, context=raw).shape == (7, 5, 3)
    torch.testing.assert_close(
        flow.log_prob(samples[:, 1], context=embedding(raw)), log_probs[:, 1], rtol=1e-4, atol=1e-4
    )
    check_training(theirs.log_prob(x, raw), list(theirs.parameters()))


def test_normflows_with_context():
    """normflows calls each layer with context=, one row for a sample."""
    normflows = pytest.importorskip("normflows")
    from coopflow_ext.integrations.normflows import NormflowsFlow

    flow = conditional_flow()
    base = normflows.distributions.DiagGaussian(3, trainable=False)
    layers = [NormflowsFlow(t) for t in reversed(flow.transform.transforms)]
    theirs = normflows.ConditionalNormalizingFlow(base, layers)
    x, context = torch.randn(7, 3), torch.randn(7, 2)
    torch.testing.assert_close(theirs.log_prob(x, context), flow.log_prob(x, context=context))
    samples, log_probs = theirs.sample(7, context=context)
    torch.testing.assert_close(
        flow.log_prob(samples, context=context), log_probs, rtol=1e-4, atol=1e-4
    )
    check_training(-theirs.forward_kld(x, context=context), list(flow.parameters()))
    unconditional = NormflowsFlow(realnvp(3, couplings=1).transform.eval())
    with pytest.raises(ValueError, match=r"context of shape .* is given to a network"):
        normflows.ConditionalNormalizingFlow(base, [unconditional]).log_prob(x, context)


@pytest.mark.parametrize("library", ["zuko", "nflows", "normflows"])
def test_mixture_couplings_of_images(library):
    """Three dimensions of an event, and an inverse that is found by iteration."""
    torch.manual_seed(0)
    layers = [MixtureLogisticCoupling(_ConvNet(14), 1, 4, flip=flip) for flip in (False, True)]
    log_prob, sample = image_flow(library, layers, (2, 4, 4))
    x = torch.randn(5, 2, 4, 4)
    expected, y = 0, x
    for layer in layers:
        y, ladj = layer.call_and_ladj(y)
        expected = expected + ladj
    expected = expected + torch.distributions.Normal(0, 1).log_prob(y).flatten(1).sum(1)
    torch.testing.assert_close(log_prob(x), expected)
    samples, log_probs = sample(6)
    assert samples.shape == (6, 2, 4, 4)
    torch.testing.assert_close(log_prob(samples), log_probs, rtol=1e-4, atol=1e-3)
    check_training(log_prob(x), [p for layer in layers for p in layer.parameters()])
