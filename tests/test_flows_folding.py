"""The weights of a pass's weight-normed layers, normed together before it begins."""

from __future__ import annotations

import copy
import math
import weakref
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from coopflow_ext import Key, flows
from coopflow_ext.flows import Flow, recompute
from coopflow_ext.flows.folding import folding
from coopflow_ext.flows.gated import AuxNet
from coopflow_ext.flows.weight_norm import (
    Rescale,
    WeightNormed,
    WeightNormedConv2d,
    WeightNormedLinear,
)

SMALL = {"channels": 8, "blocks": 1, "components": 3, "dequant_blocks": 1, "dequant_components": 2}


def small(**overrides: Any) -> Flow:
    torch.manual_seed(0)
    flow = flows.flowpp((1, 4, 4), **(SMALL | overrides))
    flow.initialize(torch.rand(4, 1, 4, 4), key=Key(0))
    return flow


def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes norm each weight where it is used."""
    for name in ("_forward_pass", "_inverse_pass"):
        monkeypatch.setattr(Flow, name, lambda self: nullcontext())
    monkeypatch.setattr(recompute, "folding", lambda *_: nullcontext())


class CountOps(TorchDispatchMode):
    """By name, without the namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))

    def norms(self) -> tuple[int, int, int]:
        """Of all layers at once, forward and backward, and of single layers."""
        c = self.counts
        single = sum(n for name, n in c.items() if name.startswith("_weight_norm_interface"))
        return c["weight_norm"], c["weight_norm_backward"], single


def results(flow: Flow) -> list[Tensor]:
    """log_prob and its gradients, the inverse and its gradients, samples."""
    x, z = torch.rand(3, 1, 4, 4), torch.linspace(-1, 1, 48).view(3, 1, 4, 4)
    parameters = list(flow.parameters())
    log_prob = flow.log_prob(x, key=Key(1))
    y, ladj = flow.inverse_and_ladj(z)
    return [
        log_prob,
        *torch.autograd.grad(log_prob.sum(), parameters),
        y,
        ladj,
        *torch.autograd.grad(y.sum() + ladj.sum(), list(flow.transform.parameters())),
        flow.sample(3, Key(2)),
    ]


@pytest.mark.parametrize("by_layer", [False, True])
def test_passes_are_those_with_each_weight_normed_where_it_is_used(
    monkeypatch: pytest.MonkeyPatch, by_layer: bool
) -> None:
    """To rounding; also with memory constant in depth."""
    flow = small(recompute=by_layer, dropout=0.2)
    torch.manual_seed(1)
    ours = results(flow)
    layer_by_layer(monkeypatch)
    torch.manual_seed(1)
    for one, other in zip(ours, results(flow), strict=True):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * scale)


def test_a_pass_norms_all_weights_by_one_operator() -> None:
    flow = small()
    x, z = torch.rand(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    with CountOps() as counted:
        flow.log_prob(x, key=Key(1)).sum().backward()
    assert counted.norms() == (1, 1, 0)
    with CountOps() as counted:
        flow.inverse_and_ladj(z)[0].sum().backward()
    assert counted.norms() == (1, 1, 0)
    with CountOps() as counted:
        flow.sample(3, Key(1))
    assert counted.norms() == (1, 0, 0)
    with torch.no_grad(), CountOps() as counted:
        flow.log_prob(x, key=Key(1))
    assert counted.norms() == (1, 0, 0)
    with flow.folded(), CountOps() as counted:
        flow.log_prob(x, key=Key(1)), flow.sample(3, Key(1)), flow.inverse_and_ladj(z)
    assert counted.norms() == (0, 0, 0)


def test_a_pass_takes_the_determinants_of_matrices_of_a_size_by_one_operator() -> None:
    """And the logarithms of all scales of a number of channels; large matrices stay alone. Only
    inverse passes need inverses."""
    flow, x = small(), torch.rand(3, 1, 4, 4)
    sizes = {m.weight.shape for m in flow.modules() if isinstance(m, flows.InvertibleConv1x1)}
    assert len(sizes) > 1
    with CountOps() as counted:
        flow.log_prob(x, key=Key(1)).sum().backward()
    assert counted.counts["_linalg_slogdet"] == len(sizes)
    assert counted.counts["linalg_inv_ex"] == 0
    with CountOps() as counted:
        flow.sample(3, Key(1))
    assert counted.counts["_linalg_slogdet"] == counted.counts["linalg_inv_ex"] == len(sizes)
    norms = [m for m in flow.modules() if isinstance(m, flows.ActNorm)]
    with CountOps() as counted, folding(nn.ModuleList(norms)):
        pass
    assert counted.counts["log"] == len({norm.inv_std.shape for norm in norms})
    for rows, calls in ((16, 1), (17, 3)):
        layers = nn.ModuleList(flows.InvertibleConv1x1(rows) for _ in range(3))
        with CountOps() as counted, folding(layers):
            found = [layer.folded() for layer in layers]
        assert counted.counts["_linalg_slogdet"] == counted.counts["linalg_inv_ex"] == calls
        for layer, values in zip(layers, found, strict=True):
            assert all(map(torch.equal, values, layer.fold()))


def test_frozen_determinants_are_not_differentiated() -> None:
    layers = nn.ModuleList([flows.InvertibleConv1x1(2), flows.InvertibleConv1x1(2)])
    layers.extend([flows.ActNorm(2), flows.ActNorm(2)])
    layers[0].requires_grad_(False), layers[2].requires_grad_(False)
    with folding(layers):
        learning = [layer.call_and_ladj(torch.ones(3, 2))[1].requires_grad for layer in layers]
    assert learning == [False, True, False, True]


def test_an_actnorm_that_starts_in_a_pass_has_its_new_determinant() -> None:
    torch.manual_seed(0)
    flow, x = flows.Flow(flows.ActNorm(3), (3, 4, 4)), 5 * torch.randn(7, 3, 4, 4)
    z, ladj = flow.call_and_ladj(x)  # it starts here
    again, expected = flow.call_and_ladj(x)
    assert torch.equal(z, again)
    assert torch.equal(ladj, expected)
    torch.testing.assert_close(ladj.mean().item(), 16 * -3 * math.log(5), rtol=0.05, atol=0)


@pytest.mark.parametrize("by_layer", [False, True])
def test_autocast_finds_its_weights_rounded(by_layer: bool) -> None:
    """All at once, to the bits of one at a time; with autocast off they are as they were."""
    flow, x = small(recompute=by_layer, dropout=0.2), torch.rand(3, 1, 4, 4)
    parameters = list(flow.parameters())

    def step() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = flow.log_prob(x, key=Key(1)).sum()
        return [loss, *torch.autograd.grad(loss, parameters)]

    ours = step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightNormed, "_is_factor", False)
        expected = step()
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)
    net = next(m for m in flow.modules() if isinstance(m, flows.FlowPPConditioner))
    with torch.autocast("cpu", torch.bfloat16), flow.folded():
        assert net.first.weight.dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert net.first.weight.dtype == torch.float32
    half = small().bfloat16()
    with half.folded():
        half.inverse_and_ladj(torch.randn(2, 1, 4, 4).bfloat16())


def test_autocast_rounds_no_weight_and_no_bias_by_itself() -> None:
    flow, x = small(), torch.rand(3, 1, 4, 4)

    class Casts(TorchDispatchMode):
        """Of parameters, as they are or as an effective weight, and of their gradients."""

        found: int = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default:
                self.found += tuple(args[0].shape) in sizes
            return func(*args, **(kwargs or {}))

    layers = [m for m in flow.modules() if isinstance(m, (WeightNormedConv2d, WeightNormedLinear))]
    sizes = {tuple(t.shape) for m in layers for t in m.affine() if t is not None}
    assert {len(size) for size in sizes} == {1, 2, 4}
    for module in flow.modules():  # a plain layer, whose parameters autocast rounds
        if isinstance(module, AuxNet):
            module.layers[0] = WeightNormedConv2d(2, 32, 3)
    with Casts() as casts:
        with torch.autocast("cpu", torch.bfloat16):
            loss = flow.log_prob(x, key=Key(1)).sum()
        loss.backward()
    assert casts.found == 0


def test_weights_that_nobody_used_are_not_rounded_back() -> None:
    flow, x = small(), torch.rand(3, 1, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        v, _ = flow.dequantize.call_and_ladj(x, torch.randn_like(x), flow._context(None))
        with folding(flow, WeightNormed):
            inside, _ = flow.dequantize.call_and_ladj(x, torch.randn_like(x), flow._context(None))
    assert v.shape == inside.shape
    inside.float().sum().backward()
    assert all(p.grad is None for p in flow.transform.parameters())
    assert any(p.grad is not None for p in flow.dequantize.parameters())


def test_with_memory_constant_in_depth_it_is_one_for_each_step() -> None:
    """Once in the forward pass, once in the backward pass; there is never more than one step's."""
    flow = small(recompute=True, dequant_blocks=0)
    couplings = sum(isinstance(m, flows.MixtureLogisticCoupling) for m in flow.modules())
    with CountOps() as counted:
        flow.log_prob(torch.rand(3, 1, 4, 4), key=Key(1)).sum().backward()
    assert counted.norms() == (2 * couplings, couplings, 0)


def test_weights_do_not_outlive_their_pass() -> None:
    """Neither those of a pass without gradients, nor those whose graph is gone."""
    flow, alive = small(), []
    forward = flows.FlowPPConditioner.forward

    def spy(self: Any, *args: Any) -> Tensor:
        alive.append(weakref.ref(self.first.weight))
        return forward(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flows.FlowPPConditioner, "forward", spy)
        flow.sample(2, Key(0))
        loss = flow.log_prob(torch.rand(2, 1, 4, 4), key=Key(1)).sum()
    loss.backward()
    del loss
    assert len(alive) > 8
    assert all(reference() is None for reference in alive)


def test_frozen_layers_are_not_differentiated() -> None:
    flow, x = small(), torch.rand(3, 1, 4, 4)
    frozen = flow.transform.transforms[1].transforms[2].net
    learning = [p for p in flow.parameters() if not any(p is q for q in frozen.parameters())]
    expected = torch.autograd.grad(flow.log_prob(x, key=Key(1)).sum(), learning)
    frozen.requires_grad_(False)
    seen = []
    frozen.register_forward_pre_hook(
        lambda net, _: seen.append((net.first.weight.requires_grad, net.last.weight.requires_grad))
    )
    with CountOps() as counted:
        found = torch.autograd.grad(flow.log_prob(x, key=Key(1)).sum(), learning)
    assert counted.norms() == (2, 1, 0)
    assert seen == [(False, False)]
    torch.testing.assert_close(found, expected)


def test_layers_of_several_dtypes_are_normed_with_their_own() -> None:
    layers = nn.ModuleList(WeightNormedLinear(5, 3, bias=False) for _ in range(5))
    layers[1].double(), layers[3].bfloat16(), layers[4].requires_grad_(False)
    with folding(layers, WeightNormed):
        for layer in layers:
            alone, _ = layer.fold()
            assert layer.weight.dtype == alone.dtype
            assert layer.weight.requires_grad == alone.requires_grad
            bound = 2 * torch.finfo(alone.dtype).eps
            torch.testing.assert_close(layer.weight, alone, rtol=bound, atol=0)


def test_biases_are_rounded_with_their_weights() -> None:
    """But those that are no factor's, or of another dtype than the weight."""
    layers = nn.ModuleList(WeightNormedLinear(5, 3, bias=i < 3) for i in range(4))
    layers[1].bias.data = layers[1].bias.data.double()
    layers[2].bias.requires_grad_(False)
    for given, autocast in ((torch.float32, False), (torch.bfloat16, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), folding(layers):
            biases = [layer.affine()[1] for layer in layers]
        assert biases[0].dtype == biases[2].dtype == given
        assert torch.equal(biases[0], layers[0].bias.to(given))
        assert biases[1] is layers[1].bias
        assert biases[3] is None
    (grad,) = torch.autograd.grad(biases[0].float().sum(), layers[0].bias)
    assert torch.equal(grad, torch.ones(3))


def test_modes_and_copies() -> None:
    """Autocast, inference mode, functional calls; a pass leaves nothing in the flow."""
    flow, x = small().eval(), torch.rand(3, 1, 4, 4)
    before = copy.deepcopy(flow)
    with torch.no_grad():
        expected = flow.log_prob(x, key=Key(1))
    with torch.inference_mode():
        assert torch.equal(flow.log_prob(x, key=Key(1)), expected)
    assert torch.equal(flow.log_prob(x, key=Key(1)), expected)  # with gradients afterwards
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), folding(flow, WeightNormed):
        dtypes = {type(m): m.weight.dtype for m in flow.modules() if isinstance(m, WeightNormed)}
    assert dtypes.pop(Rescale) == torch.float32  # of the maps
    assert set(dtypes.values()) == {torch.bfloat16}
    scaled = {name: 1.05 * p.detach() for name, p in flow.named_parameters()}
    with torch.no_grad():
        by_call = torch.func.functional_call(flow, scaled, (x,), {"key": Key(1)})
        assert torch.equal(flow.log_prob(x, key=Key(1)), expected)
        flow.load_state_dict({**flow.state_dict(), **scaled})
        assert torch.equal(flow.log_prob(x, key=Key(1)), by_call)
    assert not torch.equal(by_call, expected)
    assert torch.equal(before.log_prob(x, key=Key(1)), expected)
    assert flow.__dict__.keys() == before.__dict__.keys()


def test_parts_of_a_flow_can_be_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's reentrant kind, whose second pass norms the weights where they are used."""
    flow, x = small(dequant_blocks=0).double(), torch.rand(3, 1, 4, 4).double().requires_grad_()
    given = [x, *flow.parameters()]
    expected = torch.autograd.grad(flow.log_prob(x, key=Key(1)).sum(), given)
    forward = flows.FlowPPConditioner.forward

    def in_two_passes(self: Any, x: Tensor, context: Any) -> Any:
        return checkpoint(lambda x: forward(self, x, context), x, use_reentrant=True)

    monkeypatch.setattr(flows.FlowPPConditioner, "forward", in_two_passes)
    flow.log_prob(x, key=Key(1)).sum().backward()
    torch.testing.assert_close([t.grad for t in given], list(expected))


def test_func_grad_goes_through_a_pass() -> None:
    flow, x = small(dequant_blocks=0).eval().double(), torch.rand(3, 1, 4, 4).double()
    parameters = dict(flow.named_parameters())

    def loss(given: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(flow, given, (x,), {"key": Key(1)}).sum()

    found = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    torch.testing.assert_close(list(found.values()), list(expected))


@pytest.mark.parametrize("inverted", [False, True])
def test_an_actnorm_that_is_used_twice_starts_once(inverted: bool) -> None:
    torch.manual_seed(0)
    norm = flows.ActNorm(4)
    again = flows.Inverse(norm) if inverted else norm
    transform = flows.Compose([norm, flows.InvertibleConv1x1(4), again])
    flow, x = Flow(transform, (4,)), torch.randn(64, 4) * torch.arange(1.0, 5.0) + 1
    z, ladj = flow.call_and_ladj(x)
    expected = flow.call_and_ladj(x)
    assert torch.equal(z, expected[0])
    assert torch.equal(ladj, expected[1])


def test_an_actnorm_that_starts_in_a_frozen_flow_is_not_frozen_as_it_was() -> None:
    flow, x = Flow(flows.ActNorm(4), (4,)), torch.randn(64, 4) * torch.arange(1.0, 5.0)
    with flow.folded():
        found = [flow.log_prob(x) for _ in range(3)]
    assert all(torch.equal(one, flow.log_prob(x)) for one in found)


def test_a_frozen_flow_stays_its_own_inverse_while_it_is_trained() -> None:
    flow = small(dequant_blocks=0).eval()
    z = torch.randn(2, 1, 4, 4)
    expected = flow.inverse_and_ladj(z)
    with flow.folded(), torch.no_grad():
        for layer in flow.modules():
            if isinstance(layer, flows.InvertibleConv1x1):
                layer.weight.mul_(2)
            if isinstance(layer, flows.ActNorm):
                layer.inv_std.mul_(3)
        y, ladj = flow.inverse_and_ladj(z)
        torch.testing.assert_close((y, ladj), expected)
        back, forward = flow.transform.call_and_ladj(y)
    torch.testing.assert_close(back, z, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(forward, -ladj, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_frozen_flow_sees_its_new_biases(autocast: bool) -> None:
    flow, x = small(dequant_blocks=0).eval(), torch.rand(2, 1, 4, 4)
    bias = next(m for m in flow.modules() if isinstance(m, flows.FlowPPConditioner)).last.bias
    # Autocast itself would keep what it once made of a parameter.
    options = {"enabled": autocast, "cache_enabled": False}
    with torch.autocast("cpu", torch.bfloat16, **options), flow.folded():
        before = flow.log_prob(x, key=Key(0))
        (grad,) = torch.autograd.grad(before.sum(), bias)
        with torch.no_grad():
            bias.add_(0.5)
        assert not torch.equal(before, flow.log_prob(x, key=Key(0)))
    assert grad.any()


@pytest.mark.parametrize("by_layer", [False, True])
def test_folded_weights_get_no_gradient_from_a_backward_pass_outside(by_layer: bool) -> None:
    flow, x = small(recompute=by_layer, dequant_blocks=0), torch.rand(2, 1, 4, 4)
    with flow.folded():
        loss = flow.log_prob(x, key=Key(0)).sum()
    loss.backward()
    learned = {name for name, p in flow.named_parameters() if p.grad is not None}
    assert learned
    assert not [name for name in learned if "original" in name]
