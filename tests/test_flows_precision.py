"""Flows under autocast and in half precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import coopflow_ext as cf
from coopflow_ext.samplers import LangevinSampler

KEY = cf.Key(3)


def images(batch: int = 6) -> Tensor:
    return torch.rand(batch, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def randomised(flow: nn.Module) -> nn.Module:
    """Parameters away from their start, where couplings are the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.03 * torch.randn(p.shape, generator=generator)
    return flow


def flowpp(**options) -> nn.Module:
    torch.manual_seed(0)
    flow = cf.flows.flowpp(
        image_shape=(1, 8, 8), scales=((0, 1), (1, 1)), channels=16, blocks=1, components=4,
        dequant_blocks=1, dropout=0.0, **options,
    )  # fmt: skip
    flow.initialize(images(), key=KEY)
    return randomised(flow)


def glow() -> nn.Module:
    torch.manual_seed(0)
    flow = cf.flows.glow((1, 8, 8), scales=2, steps=2, channels=16, blocks=1)
    flow.initialize(images(), key=KEY)
    return randomised(flow)


MAKERS = {"Flow++": flowpp, "Glow": glow}


@pytest.mark.parametrize("name", MAKERS)
def test_autocast_reaches_the_networks_and_not_the_maps(name):
    """log p within bfloat16's rounding of the networks; state and log-determinant in float32."""
    flow, x = MAKERS[name](), images()
    exact = flow.log_prob(x, key=KEY)
    seen = []
    for module in flow.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = flow.log_prob(x, key=KEY)
        z, _ = flow.call_and_ladj(x, key=KEY)
        y, ladj = flow.inverse_and_ladj(z)
        again, back = flow.transform.call_and_ladj(y)
        samples = flow.sample(4, cf.Key(5))
    assert set(seen) == {torch.bfloat16}
    assert {t.dtype for t in (rounded, z, ladj, samples)} == {torch.float32}
    bits = (rounded - exact).abs() / (64 * math.log(2))
    assert 0 < bits.max() < 0.02
    assert samples.isfinite().all()
    # A network that rounds its input differently on the way back may differ by its own rounding.
    torch.testing.assert_close(again, z, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(back, -ladj, rtol=2e-2, atol=0.5)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_recompute_enters_autocast_again(name, inside):
    """Also where loss.backward() stands outside of autocast, as torch advises. A pass without
    gradients leaves no casts behind: torch 2.10 gave their weights none."""
    flow, x = MAKERS[name](), images()
    gradients = {}
    for recompute in (False, True):
        for module in (flow, flow.dequantize):
            if hasattr(module, "recompute"):
                module.recompute = recompute
        flow.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = -flow.log_prob(x, key=KEY).mean()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients[recompute] = torch.cat([p.grad.flatten() for p in flow.parameters()])
    error = (gradients[True] - gradients[False]).norm() / gradients[False].norm()
    assert error < 2e-2


def test_checkpointed_chains_enter_autocast_again():
    network = cf.energies.MLPEnergy(2, widths=(16,))
    in_autocast = []

    def energy(x: Tensor) -> Tensor:
        in_autocast.append(torch.is_autocast_enabled("cpu"))
        return network(x)

    sampler = LangevinSampler(
        energy, n_steps=4, step_size=0.3, differentiable=True, checkpoint_every=2
    )
    with torch.autocast("cpu", torch.bfloat16):
        end = sampler(torch.randn(5, 2, requires_grad=True), key=KEY).x
    forward = len(in_autocast)
    end.sum().backward()
    assert len(in_autocast) > forward, "nothing was run again"
    assert all(in_autocast)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_autocast_in_one_compiled_graph(backend):
    flow, x = flowpp(), images()

    def log_prob(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return flow.log_prob(x, key=KEY)

    with torch.no_grad():
        compiled = torch.compile(log_prob, fullgraph=True, backend=backend)(x)
        torch.testing.assert_close(compiled, log_prob(x), rtol=1e-2, atol=1.0)


@pytest.mark.parametrize("name", MAKERS)
def test_a_flow_of_bfloat16_parameters(name):
    """Coarse, but finite, and its log p in float32."""
    flow, x = MAKERS[name](), images()
    exact = flow.log_prob(x, key=KEY)
    half = flow.bfloat16()
    ours = half.log_prob(x.bfloat16(), key=KEY)
    assert ours.dtype == torch.float32
    assert ours.isfinite().all()
    assert ((ours - exact).abs() / (64 * math.log(2))).max() < 0.5
    ours.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())
    assert half.sample(3, KEY).isfinite().all()
