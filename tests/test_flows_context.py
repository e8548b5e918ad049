"""Conditional flows: the context reaches every network, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from coopflow_ext import Key, flows

IMAGE = {"image_shape": (2, 4, 4)}
FLOWPP = {
    **IMAGE, "channels": 8, "blocks": 1, "components": 2, "dropout": 0.0,
    "dequant_blocks": 1, "dequant_components": 2,
}  # fmt: skip
BUILDERS: dict[str, Callable[..., flows.Flow]] = {
    "vectors": lambda **options: flows.realnvp(5, couplings=2, widths=(8,), **options),
    "linear": lambda **options: flows.realnvp(5, couplings=2, widths=(), **options),
    "mlp": lambda **options: flows.realnvp(**IMAGE, net="mlp", couplings=2, widths=(8,), **options),
    "conv": lambda **options: flows.realnvp(**IMAGE, channels=4, blocks=1, **options),
    "glow": lambda **options: flows.glow(**IMAGE, steps=1, channels=4, blocks=1, **options),
    "flowpp": lambda **options: flows.flowpp(**FLOWPP, scales=((0, 1), (1, 1)), **options),
}
builders = pytest.mark.parametrize("name", BUILDERS)


def conditional(name: str, **options) -> tuple[flows.Flow, Tensor, Tensor]:
    torch.manual_seed(0)
    flow = BUILDERS[name](context_dim=3, **options)
    x, context = torch.rand(6, *flow.event_shape) * 2 - 1, torch.randn(6, 3)
    flow.initialize(x, key=Key(0), context=context)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return flow, x, context


@builders
def test_every_coupling_reads_the_context(name):
    """Of each row its own; x and z come back under the same context."""
    flow, x, context = conditional(name)
    other = context.clone()
    other[2] += 1
    same = flow.log_prob(x, key=Key(1), context=context) == flow.log_prob(
        x, key=Key(1), context=other
    )
    assert same.tolist() == [True, True, False, True, True, True]
    z = torch.randn_like(x)
    y, ladj = flow.inverse_and_ladj(z, context=context)
    back, ladj_back = flow.transform.call_and_ladj(y, flows.Context(context))
    torch.testing.assert_close(back, z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ladj_back, -ladj, rtol=1e-3, atol=1e-2)
    samples = flow.sample(6, Key(2), context=context)
    changed = (samples != flow.sample(6, Key(2), context=other)).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False, False, False]
    bits = flow.bits_per_dim(x, key=Key(1), context=context)
    torch.testing.assert_close(
        bits * flow.dim * 0.6931471805599453,
        -flow.log_prob(x, key=Key(1), context=context).mean(),
    )
    couplings = [m for m in flow.transform.modules() if hasattr(m, "net")]
    seen = []
    for coupling in couplings:
        coupling.net.register_forward_pre_hook(lambda _, args: seen.append(args[1].aux))
    flow.log_prob(x, key=Key(1), context=context)
    assert len(seen) == len(couplings)
    assert all(aux is context for aux in seen)


@builders
def test_gradients_reach_the_context_also_when_passes_are_recomputed(name):
    flow, x, context = conditional(name)
    twin = BUILDERS[name](context_dim=3, recompute=True)
    twin.load_state_dict(flow.state_dict())
    assert twin.recompute
    gradients = []
    for model in (flow, twin):
        c = context.clone().requires_grad_()
        model.log_prob(x, key=Key(1), context=c).sum().backward()
        gradients.append(c.grad)
    assert (gradients[0].abs().sum(1) > 0).all()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)


@builders
def test_without_a_context_nothing_is_new(name):
    """The parameters of a flow without one are drawn as if there were no such option."""
    torch.manual_seed(0)
    plain = BUILDERS[name]()
    torch.manual_seed(0)
    zero = BUILDERS[name](context_dim=0)
    for (a, value), (b, other) in zip(
        plain.state_dict().items(), zero.state_dict().items(), strict=True
    ):
        assert a == b
        assert torch.equal(value, other)


@builders
def test_a_context_that_does_not_fit_is_refused(name):
    flow, x, context = conditional(name)
    calls = {
        "log_prob": lambda flow, c: flow.log_prob(x, context=c),
        "inverse": lambda flow, c: flow.inverse_and_ladj(x, context=c),
        "sample": lambda flow, c: flow.sample(6, context=c),
        "bits": lambda flow, c: flow.bits_per_dim(x, context=c),
        "initialize": lambda flow, c: flow.initialize(x, context=c),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match=r"context must be a tensor \(B, 3\), got None"):
            call(flow, None)
        for bad in (context[:5], context[:, :2], context[..., None]):
            with pytest.raises(ValueError, match=r"context must have shape \(6, 3\), got"):
                call(flow, bad)
        with pytest.raises(ValueError, match=r"flow that takes none; make it with context_dim"):
            call(BUILDERS[name](), context)
    with pytest.raises(ValueError, match="context_dim must be ≥ 0, got -1"):
        BUILDERS[name](context_dim=-1)


def nets(context_dim: int) -> list[tuple[flows.Conditioner, Tensor]]:
    return [
        (flows.MLPConditioner(2, 4, (8,), context_dim=context_dim), torch.randn(5, 2)),
        (flows.ConvConditioner(2, 4, 8, context_dim=context_dim), torch.randn(5, 2, 3, 4)),
        (
            flows.FlowPPConditioner(2, 4, (3, 4), channels=8, blocks=1, aux_channels=context_dim),
            torch.randn(5, 2, 3, 4),
        ),
    ]


def test_a_network_does_not_drop_a_context():
    for net, x in nets(0):
        net(x)
        with pytest.raises(ValueError, match=r"context of shape \(5, 3\) is given to a network"):
            net(x, flows.Context(torch.randn(5, 3)))
    for net, x in nets(3):
        with pytest.raises(ValueError, match=r"context must be a tensor \(B, 3\), got None"):
            net(x)
        for shape in ((4, 3), (5, 2), (5, 3, 1), (5,)):
            with pytest.raises(ValueError, match=r"context must have shape \(5, 3\), or also"):
                net(x, flows.Context(torch.randn(shape)))
    with pytest.raises(ValueError, match="blocks must be ≥ 1 for a network with context"):
        flows.FlowPPConditioner(2, 4, (3, 4), channels=8, blocks=0, aux_channels=3)


def test_a_vector_is_a_map_that_is_the_same_everywhere():
    context = torch.randn(5, 3)
    for net, x in nets(3)[1:]:
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        as_map = context[:, :, None, None].expand(-1, -1, 3, 4)
        torch.testing.assert_close(net(x, flows.Context(as_map)), net(x, flows.Context(context)))


def test_a_conditional_flow_is_one_graph():
    flow, x, context = conditional("flowpp")
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="eager")
    ours = compiled(x, key=Key(1), context=context)
    torch.testing.assert_close(ours, flow.log_prob(x, key=Key(1), context=context))


def test_a_conditional_flow_learns_which_is_which():
    """Two narrow clusters, told by the context: better than any density that does not know."""
    torch.manual_seed(0)
    label = torch.randint(0, 2, (512, 1)).float()
    x = 4 * label - 2 + 0.3 * torch.randn(512, 2)
    flow = flows.realnvp(2, couplings=4, widths=(16,), context_dim=1)
    flow.initialize(x, context=label)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = -flow.log_prob(x, context=label).mean()
        loss.backward()
        optimizer.step()
    normal = torch.distributions.Normal(4 * label - 2, 0.3)
    best_without = -(normal.log_prob(x).sum(1).mean() - torch.log(torch.tensor(2.0)))
    assert loss < best_without
    samples = flow.sample(512, Key(0), context=label)
    assert ((samples.mean(1) > 0).float() == label[:, 0]).float().mean() > 0.98
