"""Blocks of a Flow++ compiled once for all of a kind."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from coopflow_ext import flows
from coopflow_ext.coop.config import TrainConfig
from coopflow_ext.coop.model import EventSpec, build_flow
from coopflow_ext.flows import compiled
from coopflow_ext.rng import Key

KEY = Key(3, time=2)


def flowpp(blocks: int = 2, **options: Any) -> flows.Flow:
    """Blocks of two kinds, those of the dequantiser and the others; of weights that are not those
    of the start, where couplings are the identity."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"channels": 8, "components": 2, "dequant_components": 2}
    options = {"scales": ((0, 2),), "dequant_blocks": 2, **sizes, **options}
    flow = flows.flowpp((1, 4, 4), blocks=blocks, **options)
    flow.initialize(images(4), key=Key(0))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return flow


def images(n: int) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1


def loss_and_gradients(flow: nn.Module, x: Tensor) -> list[Tensor]:
    loss = flow.log_prob(x, key=KEY).sum()
    return [loss, *torch.autograd.grad(loss, list(flow.parameters()))]


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Of what torch.compile is asked for inside, which is not optimised."""
    torch.compiler.reset()
    compiled._of_kind.cache_clear()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    return counter


@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_is_the_eager_one_and_compiles_each_kind_once(
    counter: CompileCounterWithBackend, recompute: bool
) -> None:
    """Dropout included; a deeper flow of the same kinds finds them compiled."""
    kinds = 4 if recompute else 2  # without gradients too, to go forth and back
    for blocks in (2, 3):
        flow, x = flowpp(blocks, dropout=0.3, recompute=recompute), images(2)
        expected = loss_and_gradients(flow, x)
        flow.compile_blocks = True
        for ours, theirs in zip(loss_and_gradients(flow, x), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert counter.frame_count == kinds


def test_autocast_reaches_compiled_blocks(counter: CompileCounterWithBackend) -> None:
    flow, x = flowpp(attention=False), images(2)
    exact = loss_and_gradients(flow, x)
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_and_gradients(flow, x)
        flow.compile_blocks = True
        ours = loss_and_gradients(flow, x)
    assert not torch.equal(expected[0], exact[0])
    torch.testing.assert_close(ours, expected)
    assert counter.frame_count == 2


def test_samples_of_any_batch_take_two_compilations(counter: CompileCounterWithBackend) -> None:
    """One for the first batch and one for all others, folded or not. torch.compile would have
    given up after eight variants."""
    flow = flowpp(sampling_dropout=True)
    plain = copy.deepcopy(flow)
    flow.compile_blocks = True
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for n in range(2, 13):
            torch.testing.assert_close(flow.sample(n, KEY), plain.sample(n, KEY))
    with flow.folded():
        torch.testing.assert_close(flow.sample(5, KEY), plain.sample(5, KEY))
    assert counter.frame_count == 2


def test_kinds_differ_by_dropout_and_gradients(counter: CompileCounterWithBackend) -> None:
    """And a flow that was compiled can be copied and pickled."""
    flow, x = flowpp(dropout=0.3, attention=False), images(2)
    flow.compile_blocks = True
    flow.log_prob(x, key=KEY)
    with torch.no_grad():
        trained = flow.log_prob(x, key=KEY)
    assert counter.frame_count == 4
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        with torch.no_grad():
            assert torch.equal(other.log_prob(x, key=KEY), trained)
    flow.eval().log_prob(x, key=KEY)
    assert counter.frame_count == 6


def test_blocks_that_cannot_be_compiled_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    compiled._of_kind.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    flow, x = flowpp(dropout=0.3), images(2)
    expected = flow.log_prob(x, key=KEY)
    flow.compile_blocks = True
    with pytest.warns(UserWarning, match="could not compile a block of the flow.*no compiler") as w:
        found = [flow.log_prob(x, key=KEY) for _ in range(2)]
    torch.testing.assert_close(found, [expected, expected])
    assert len([one for one in w if "block of the flow" in str(one.message)]) == 2  # kinds
    compiled._of_kind.cache_clear()


def test_the_compiler_of_a_whole_pass_compiles_the_blocks_in_it() -> None:
    flow = flowpp(1, dropout=0.3, attention=False, scales=((0, 1),), dequant_blocks=0)
    x = images(2)
    expected = flow.log_prob(x, key=KEY)
    flow.compile_blocks = True
    whole = torch.compile(flow.log_prob, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(x, key=KEY), expected, rtol=1e-4, atol=1e-4)


def test_the_setting_reaches_the_flow() -> None:
    for wanted in (True, False):
        config = TrainConfig.from_dict({"preset": "digits-flowpp", "compile": wanted})
        assert build_flow(config, EventSpec((1, 8, 8), 17)).compile_blocks is wanted


class _Count(TorchDispatchMode):
    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op, self.calls = op, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.overloadpacket is self.op
        return func(*args, **(kwargs or {}))


def test_the_context_of_all_blocks_is_activated_once() -> None:
    net = flows.FlowPPConditioner(2, 4, (4, 4), channels=8, blocks=3, aux_channels=5)
    x, context = torch.randn(2, 2, 4, 4), flows.Context(torch.randn(2, 5))
    with torch.no_grad(), _Count(torch.ops.coopflow.concat_elu) as count:
        net(x, context)
    assert count.calls == 2 * 3 + 1


@pytest.mark.slow
def test_a_step_of_the_compiler_that_users_have() -> None:
    torch.compiler.reset()
    compiled._of_kind.cache_clear()
    flow, x = flowpp(dropout=0.3), images(2)
    expected = loss_and_gradients(flow, x)
    samples = flow.sample(2, KEY)
    flow.compile_blocks = True
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile=True")
        for ours, theirs in zip(loss_and_gradients(flow, x), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(flow.sample(2, KEY), samples, rtol=0, atol=1e-5)
