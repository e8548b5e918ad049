"""Flow(recompute=True): the same gradients from the output alone."""

from __future__ import annotations

import pytest
import torch

from coopflow_ext import Key, flows
from coopflow_ext.flows.recompute import deferred_checks, primitive_steps

DOUBLE = torch.float64


def _flowpp(steps: int = 1, **overrides) -> flows.Flow:
    torch.manual_seed(0)
    options = {"channels": 8, "blocks": 1, "components": 3, "dropout": 0.2}
    options |= {"dequant_blocks": 1, "dequant_components": 2, "scales": ((0, steps), (1, steps))}
    return flows.flowpp((1, 4, 4), **(options | overrides))


FLOWS = {
    "vector": lambda: flows.realnvp(6, couplings=4, widths=(8,)),
    "conv": lambda: flows.realnvp(image_shape=(1, 4, 4), channels=4, blocks=1),
    "glow": lambda: flows.glow((1, 4, 4), steps=2, channels=4, blocks=1),
    "flowpp": _flowpp,
}


def _gradients(flow: flows.Flow, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_(True)
    loss = -flow.log_prob(x, key=Key(3)).mean()
    return [loss, *torch.autograd.grad(loss, [x, *flow.parameters()])]


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_gradients_are_the_ordinary_ones(name, dtype):
    """Dropout included: its masks come from the key, so the second pass draws the same."""
    torch.manual_seed(0)
    flow = FLOWS[name]().to(dtype)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.rand(8, *flow.event_shape, dtype=dtype) * 1.8 - 0.9
    flow.initialize(x, key=Key(0))
    ordinary = _gradients(flow, x)
    other = flows.Flow(
        flow.transform, flow.event_shape, dequantize=flow.dequantize, logit=flow.logit,
        recompute=True,
    )  # fmt: skip
    rebuilt = _gradients(other, x)
    # float64: rounding; float32: an inverse rebuilds its input to about 1e-4 here.
    tolerance = 1e-8 if dtype == DOUBLE else 2e-3
    for a, b in zip(rebuilt, ordinary, strict=True):
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def _saved_bytes(flow: flows.Flow, x: torch.Tensor) -> int:
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = flow.log_prob(x, key=Key(0)).mean()
    total = sum(sizes.values())
    loss.backward()
    return total


def test_saved_memory_does_not_grow_with_depth():
    """8 and 16 steps save the same number of bytes; ordinarily 16 save twice as many as 8."""
    x = torch.rand(16, 1, 4, 4) * 2 - 1
    saved = {}
    for recompute in (False, True):
        for steps in (4, 8):
            flow = _flowpp(steps, recompute=recompute, dequant_blocks=0)
            flow.initialize(x, key=Key(0))
            saved[recompute, steps] = _saved_bytes(flow, x)
    assert saved[True, 8] == saved[True, 4]
    assert saved[False, 8] > 1.8 * saved[False, 4]
    assert saved[True, 8] < saved[False, 4] / 20


def test_the_variational_dequantiser_is_rebuilt_too():
    """More blocks in its conditioners save no more; the features of the image are kept."""
    x = torch.rand(16, 1, 4, 4) * 2 - 1
    saved = []
    for blocks in (1, 3):
        flow = _flowpp(recompute=True, dequant_blocks=blocks)
        flow.initialize(x, key=Key(0))
        saved.append(_saved_bytes(flow, x))
    assert saved[0] == saved[1]


def test_passes_without_gradients_are_ordinary_passes():
    flow = _flowpp(recompute=True)
    x = torch.rand(4, 1, 4, 4)
    flow.initialize(x, key=Key(0))
    flow.eval()
    with torch.no_grad():
        plain = flow.log_prob(x, key=Key(1))
    torch.testing.assert_close(flow.log_prob(x, key=Key(1)), plain)


def test_chains_and_factor_outs_are_taken_apart():
    steps = list(primitive_steps(flows.glow((1, 8, 8), steps=1, channels=4).transform))
    assert not any(isinstance(step, flows.Compose | flows.SplitPrior) for step in steps)
    assert len(steps) == 2 * (1 + 3 + 1) + 2


class _Lossy(flows.Transform):
    """A layer whose inverse does not give back what went in."""

    def call_and_ladj(self, x, context=None):
        return 0.5 * x, x.new_zeros(x.shape[0])

    def inverse_and_ladj(self, z, context=None):
        return 2.1 * z, z.new_zeros(z.shape[0])


def test_wrong_reconstruction_raises():
    layers = [flows.ActNorm(4), _Lossy(), flows.ActNorm(4)]
    flow = flows.Flow(flows.Compose(layers), (4,), recompute=True)
    loss = flow.log_prob(torch.randn(16, 4)).sum()
    with pytest.raises(RuntimeError, match="rebuilt by the inverse are off by"):
        loss.backward()


class _Kept(flows.Transform):
    """A layer whose inverse gives exactly what went in, but for what ``error`` adds to it."""

    def __init__(self, error=None):
        super().__init__()
        self.gain, self.error = torch.nn.Parameter(torch.ones(())), error

    def call_and_ladj(self, x, context=None):
        if not torch.is_grad_enabled():  # of the forward pass, which is made again with gradients
            self.x = x.detach().clone()
        return x * self.gain, x.new_zeros(x.shape[0])

    def inverse_and_ladj(self, z, context=None):
        x = self.x.clone()
        if self.error is not None:
            x[-1, 0] += self.error
        return x, z.new_zeros(z.shape[0])


def _backward(layers, dtype=torch.float32):
    """Of rows of few elements, of which the first is compared."""
    flow = flows.Flow(flows.Compose(layers), (4,), recompute=True).to(dtype)
    flow.log_prob(torch.zeros(5, 4, dtype=dtype)).sum().backward()


@pytest.mark.parametrize("place", range(6))
def test_the_input_of_every_layer_of_few_is_compared(place):
    """Also where the layer before it would give back what went in, whatever comes out."""
    _backward([_Kept() for _ in range(6)])
    with pytest.raises(RuntimeError, match=r"off by 1\.0e\+02 times what is allowed"):
        _backward([_Kept(1.0 if i == place else None) for i in range(6)])


def test_what_is_not_a_number_is_a_wrong_input():
    with pytest.raises(RuntimeError, match="off by nan times what is allowed"):
        _backward([_Kept(), _Kept(float("nan")), _Kept()])


def test_float64_is_rebuilt_to_float64():
    _backward([_Kept(1e-4), _Kept()])
    _backward([_Kept(1e-7), _Kept()], DOUBLE)
    with pytest.raises(RuntimeError, match=r"off by 1\.0e\+02 times what is allowed"):
        _backward([_Kept(1e-4), _Kept()], DOUBLE)


def test_errors_are_relative_to_one_and_to_what_is_large():
    class Large(_Kept):
        def call_and_ladj(self, x, context=None):
            z, ladj = super().call_and_ladj(x + 999, context)
            self.x = self.x - 999 if not torch.is_grad_enabled() else self.x
            return z, ladj

    with pytest.raises(RuntimeError, match=r"off by 1\.1e\+00 times what is allowed"):
        _backward([_Kept(0.011), _Kept()])
    _backward([_Kept(0.009), _Kept()])
    _backward([Large(), _Kept(9.0)])
    with pytest.raises(RuntimeError, match=r"off by 1\.1e\+00 times what is allowed"):
        _backward([Large(), _Kept(11.0)])


def test_checks_are_deferred_inside_only():
    with pytest.raises(ZeroDivisionError), deferred_checks():
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="rebuilt by the inverse"):
        _backward([_Kept(1.0)])
    with deferred_checks() as errors:
        flow = flows.Flow(_Kept(1.0), (4,), recompute=True)
        loss = flow.log_prob(torch.zeros(5, 4)).sum()
        assert not errors
    loss.backward()  # of a pass that was made inside
    assert [float(error) for error in errors] == pytest.approx([100])


def test_inexact_inverses_are_refused():
    with pytest.raises(ValueError, match="legacy_cdf_clamp must be False"):
        _flowpp(recompute=True, legacy_cdf_clamp=True)


def test_an_empty_batch_passes():
    flow = flows.realnvp(4, couplings=2, widths=(8,), recompute=True).eval()
    flow.log_prob(torch.zeros(0, 4)).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in flow.parameters())
