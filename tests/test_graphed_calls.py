"""Sampling and likelihood of a flow as graphs, with a recording of operators in CUDA's place."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from recorded_ops import RecordedOps
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from coopflow_ext import flows, graphed_calls
from coopflow_ext._recording import is_watched
from coopflow_ext.flows import Flow
from coopflow_ext.recorded_key import Streams
from coopflow_ext.rng import Key

IMAGE = (1, 8, 8)
FLOWS = {
    "vectors, context": lambda: flows.realnvp(3, widths=(16,), couplings=2, context_dim=2),
    "mlp": lambda: flows.realnvp(image_shape=IMAGE, net="mlp", widths=(16,), couplings=2),
    "images": lambda: flows.realnvp(image_shape=IMAGE, widths=(16,), couplings=2, dropout=0.2),
    "Flow++": lambda: flows.flowpp(IMAGE, channels=8, blocks=1, components=2, dropout=0.2),
    "Glow": lambda: flows.glow(IMAGE, scales=2, steps=2, channels=8),
    "sampling dropout": lambda: flows.flowpp(
        IMAGE, channels=8, blocks=1, components=2, dropout=0.2, sampling_dropout=True
    ),
}


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_calls, "Recording", RecordedOps)
    monkeypatch.setattr(
        Flow, "_can_capture", lambda self, n: self.cuda_graph and not torch.is_grad_enabled()
    )


def initialised(name: str) -> Flow:
    torch.manual_seed(0)
    flow = FLOWS[name]()
    flow.initialize(torch.rand(16, *flow.event_shape) * 2 - 1, **context_for(flow, 16))
    return flow


def context_for(flow: Flow, n: int) -> dict[str, Any]:
    return {"context": torch.randn(n, 2)} if flow.context_dim else {}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FLOWS)
def test_replays_are_calls(captured: None, name: str, training: bool) -> None:
    flow = initialised(name).train(training)
    plain = copy.deepcopy(flow)
    plain.cuda_graph = False
    for seed in range(4):
        key = Key(seed, time=seed, chain=5 * seed)
        given = context_for(flow, 5)
        assert torch.equal(flow.sample(5, key, **given), plain.sample(5, key, **given))
        x = torch.rand(5, *flow.event_shape) * 2 - 1
        with torch.no_grad():
            ours = flow.log_prob(x, key=key, **given)
            assert torch.equal(ours, plain.log_prob(x, key=key, **given))
            for one, other in zip(flow.parameters(), plain.parameters(), strict=True):
                other.copy_(one.mul_(1.01))
    assert len(flow._graphs._captured) == 2


@pytest.mark.parametrize("name", FLOWS)
def test_replays_in_the_callers_autocast_read_the_weights_as_they_are(
    captured: None, name: str
) -> None:
    """Not the casts of weights that autocast kept when the call was recorded."""
    flow = initialised(name).eval()
    plain = copy.deepcopy(flow)
    plain.cuda_graph = False
    for seed in range(4):
        key, given = Key(seed), context_for(flow, 5)
        x = torch.rand(5, *flow.event_shape) * 2 - 1
        results = []
        for model in (flow, plain):
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                sample = model.sample(5, key, **given)
                results.append((sample, model.log_prob(x, key=key, **given)))
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours, expected), seed
        with torch.no_grad():
            for one, other in zip(flow.parameters(), plain.parameters(), strict=True):
                other.copy_(one.mul_(1.02))
    assert len(flow._graphs._captured) == 2


def test_results_stay_when_the_next_call_is_made(captured: None) -> None:
    flow = initialised("images")
    samples = [flow.sample(3, Key(seed)) for seed in range(4)]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(samples))


def test_what_is_captured(captured: None) -> None:
    flow = initialised("images")
    x = torch.rand(4, *IMAGE)

    def kinds() -> int:
        return len(flow._graphs._captured)

    flow.sample(4)
    assert kinds() == 0  # what is called once
    flow.sample(4)
    flow.sample(4, Key(1))
    assert kinds() == 1
    flow.log_prob(x), flow.log_prob(x), flow.log_prob(x)
    assert kinds() == 1  # with gradients
    with torch.no_grad():
        flow.log_prob(x), flow.log_prob(x)
        assert kinds() == 2
        flow.log_prob(x, eps=torch.rand(4, *IMAGE)), flow.log_prob(x, eps=torch.rand(4, *IMAGE))
        assert kinds() == 3
    flow.eval()
    for n in (2, 3):
        flow.sample(n), flow.sample(n)
    assert kinds() == 4  # the oldest was dropped
    assert flow._graphs._recording is not None
    assert len(flow._graphs._recording.pieces) == 4
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert len(other._graphs._captured) == 0
        assert torch.equal(other.sample(3, Key(2)), flow.sample(3, Key(2)))
    flow.cuda_graph = False
    flow.sample(7), flow.sample(7)
    assert kinds() == 4


def test_with_a_recorded_key_the_pass_is_the_caller_s_to_record(captured: None) -> None:
    flow = initialised("images").eval()
    streams = Streams()
    samples = [flow.sample(3, streams.record(Key(1))) for _ in range(3)]
    assert not flow._graphs._captured
    assert torch.equal(samples[2], flow.sample(3, Key(1)))


def test_inside_of_folded_nothing_is_captured_nor_replayed(captured: None) -> None:
    """A graph would keep, or would not know, the weights that were folded outside of it."""
    flow, key = initialised("Flow++").eval(), Key(3)
    with flow.folded():
        inside = [flow.sample(3, key) for _ in range(3)]
        assert not flow._graphs._captured
    samples = [flow.sample(3, key) for _ in range(3)]
    assert len(flow._graphs._captured) == 1
    assert all(torch.equal(s, samples[0]) for s in (*inside, *samples))
    with flow.folded():
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.mul_(1.5)
        assert torch.equal(flow.sample(3, key), flow._sample(3, key))
    plain = copy.deepcopy(flow)
    plain.cuda_graph = False
    assert torch.equal(flow.sample(3, key), plain.sample(3, key))
    assert len(flow._graphs._captured) == 1


def test_inference_mode_and_bad_input(captured: None) -> None:
    flow = initialised("images").eval()
    x = torch.rand(4, *IMAGE)
    with torch.inference_mode():
        inside = [flow.log_prob(x, key=Key(1)) for _ in range(3)]
    with torch.no_grad():
        outside = flow.log_prob(x, key=Key(1))
    assert all(torch.equal(a, outside) for a in inside)
    with torch.no_grad():
        with pytest.raises(ValueError, match="x must have shape"):
            flow.log_prob(torch.rand(4, 2))
        with pytest.raises(TypeError, match="eps must be a tensor"):
            flow.log_prob(x, eps=[0.5])
    with pytest.raises(ValueError, match=r"key.chain must be at most"):
        flow.sample(4, Key(1, chain=2**63 - 1))


def test_a_flow_that_cannot_be_captured_says_so_once(captured: None) -> None:
    flow = initialised("images").eval()
    flow.transform.register_forward_hook(lambda *_: None)
    original = flow.to_data
    flow.to_data = lambda y: original(y) * float(y.sum() != 0.123)  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="a pass of the flow cannot be captured.*on the host"):
        samples = [flow.sample(3, Key(1)) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples.append(flow.sample(3, Key(1)))
    assert torch.equal(samples[0], samples[1])
    assert torch.equal(samples[0], samples[2])


def move_weights(flow: Flow) -> None:
    for parameter in flow.parameters():
        parameter.data = parameter.data.clone()


def hook_all_modules(flow: Flow) -> None:
    torch.nn.modules.module.register_module_forward_hook(_times_two)


def _times_two(module: nn.Module, _: object, out: Any) -> Any:
    return 2 * out if isinstance(module, nn.Conv2d) else None


def reload_other_masks(flow: Flow) -> None:
    flow.load_state_dict(
        {k: v.flip(0) if k.endswith("split.mask") else v for k, v in flow.state_dict().items()}
    )


def transpose(flow: Flow) -> None:
    for layer in flow.modules():
        if isinstance(layer, flows.InvertibleConv1x1):
            layer.weight.data = layer.weight.data.mT


class NoFlip(flows.Flip):
    def rearrange(self, x: torch.Tensor) -> torch.Tensor:
        return x


def replace_flips(flow: Flow) -> None:
    for steps in list(flow.modules()):
        if isinstance(steps, flows.Compose):
            for i, layer in enumerate(steps.transforms):
                if isinstance(layer, flows.Flip):
                    steps.transforms[i] = NoFlip()


def forget_the_start(flow: Flow) -> None:
    for layer in flow.modules():
        if isinstance(layer, flows.ActNorm):
            layer.initialized.fill_(0)


def there_and_back(flow: Flow) -> None:
    """The weights are where they were, the positions are not."""
    state = flow.state_dict()
    flow.bfloat16()
    flow.load_state_dict(state, assign=True)


def set_attributes(kind: type, **values: object) -> Callable[[Flow], None]:
    def change(flow: Flow) -> None:
        for module in flow.modules():
            if isinstance(module, kind):
                for name, value in values.items():
                    setattr(module, name, value)

    return change


CHANGES: dict[str, tuple[str, Callable[[Flow], None]]] = {
    "weights elsewhere": ("Glow", move_weights),
    "hooks of all modules": ("Glow", hook_all_modules),
    "other masks": ("mlp", reload_other_masks),
    "other strides": ("Glow", transpose),
    "other layers without weights": ("Flow++", replace_flips),
    "positions elsewhere": ("Flow++", there_and_back),
    "ActNorm set back": ("Glow", forget_the_start),
    "dropout": ("Flow++", set_attributes(flows.Dropout, p=0.5)),
    "grey levels": ("Glow", set_attributes(flows.Dequantize, levels=16)),
    "bound": ("Glow", set_attributes(flows.Logit, bound=0.7)),
    "contrast": ("Glow", set_attributes(Flow, legacy_contrast=True)),
    "split": ("Glow", set_attributes(flows.ChannelSplit, flip=True)),
}


@pytest.fixture
def no_hooks_of_all_modules() -> Iterator[None]:
    yield
    torch.nn.modules.module._global_forward_hooks.clear()


def check_that_replays_follow(name: str, device: str) -> None:
    of, change = CHANGES[name]
    flow = initialised(of).train().to(device)
    with torch.no_grad():
        for parameter in flow.parameters():  # conditioners begin as the zero map
            parameter += 0.1 * torch.randn_like(parameter)
    plain = copy.deepcopy(flow)
    plain.cuda_graph = False
    x = torch.rand(5, *flow.event_shape, device=device) * 2 - 1

    def results(of: Flow) -> list[torch.Tensor]:
        with torch.no_grad():
            return [of.log_prob(x, key=Key(1)), of.sample(5, Key(1))]

    for _ in range(3):
        before = results(flow)
    assert len(flow._graphs._captured) == 2
    change(flow)
    if change is not hook_all_modules:
        change(plain)
    for _ in range(4):  # the first may start ActNorms
        expected = results(plain)
        for ours, theirs in zip(results(flow), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    same = [torch.allclose(*pair, rtol=1e-3) for pair in zip(before, expected, strict=True)]
    assert all(same) == (change in (move_weights, there_and_back))  # others change the results


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.usefixtures("no_hooks_of_all_modules")
def test_replays_follow_what_changes(captured: None, name: str) -> None:
    check_that_replays_follow(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.usefixtures("no_hooks_of_all_modules")
def test_gpu_replays_follow_what_changes(name: str) -> None:
    """There freed memory is used again, and strides are what they were in the capture."""
    check_that_replays_follow(name, "cuda")


class Counting(nn.Module):
    """Has a state that changes with each pass, by BatchNorm and by torch's own dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4)
        )

    def forward(self, x: torch.Tensor, context: object) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


def test_a_capture_leaves_buffers_and_generators_as_they_were(captured: None) -> None:
    torch.manual_seed(0)
    flow = Flow(flows.Compose([flows.AffineCoupling(Counting(), 2)]), (4,))
    plain, x = copy.deepcopy(flow), torch.randn(6, 4)
    plain.cuda_graph = False
    for each in (flow, plain):
        torch.manual_seed(1)
        with torch.no_grad():
            for _ in range(2):  # the second is captured
                each.log_prob(x, key=Key(0))
    assert flow._graphs._captured
    for (name, a), b in zip(flow.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_a_network_may_call_its_flow(captured: None) -> None:
    """From a hook, say; the call inside is made as it is."""
    flow = initialised("images").eval()
    seen = []

    def hook(*_: object) -> None:
        if not seen:
            seen.append(None)
            seen.append(flow.sample(2, Key(1)))

    flow.sample(3, Key(0))
    coupling = next(m for m in flow.modules() if isinstance(m, flows.AffineCoupling))
    handle = coupling.net.last.register_forward_hook(hook)
    for _ in range(3):
        flow.sample(3, Key(0))
    handle.remove()
    assert torch.equal(seen[1], flow.sample(2, Key(1)))


def test_without_a_key_one_is_drawn_a_call(captured: None) -> None:
    """From torch's generator, by a graph or not; none where nothing is drawn from it."""
    for name, draws in (("Flow++", True), ("vectors", False)):
        if name == "vectors":
            torch.manual_seed(0)
            flow = flows.realnvp(3, widths=(16,), couplings=2)
        else:
            flow = initialised(name)
        flow.initialize(torch.rand(16, *flow.event_shape) * 2 - 1)
        plain = copy.deepcopy(flow.train())
        plain.cuda_graph = False
        x = torch.rand(5, *flow.event_shape) * 2 - 1
        for seed in range(3):
            results = []
            for each in (flow, plain):
                torch.manual_seed(seed)
                with torch.no_grad():
                    results.append((each.log_prob(x), torch.rand(())))
            (a, after), (b, expected) = results
            assert torch.equal(a, b)
            assert after == expected
        torch.manual_seed(seed)
        assert (after != torch.rand(())) == draws


def test_counters_of_operations_see_every_call() -> None:
    flow = initialised("images").eval()
    assert not is_watched()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert is_watched()
        flow.log_prob(torch.zeros(2, *IMAGE), key=Key(0))
    assert counter.get_total_flops() > 0
    assert torch.func.vmap(lambda x: x * is_watched())(torch.ones(2)).all()


def test_a_flow_without_parameters_runs_without_graphs() -> None:
    flow = Flow(flows.Flip(), (4,))
    assert not flow._can_capture(3)


@pytest.mark.gpu
@pytest.mark.parametrize("low", [False, True], ids=["float32", "in the caller's autocast"])
@pytest.mark.parametrize("name", FLOWS)
def test_gpu_replays_are_calls(name: str, low: bool) -> None:
    flow = initialised(name).cuda().eval()
    plain = copy.deepcopy(flow)
    plain.cuda_graph = False
    for seed in range(4):
        given = {name: t.cuda() for name, t in context_for(flow, 5).items()}
        x = torch.rand(5, *flow.event_shape, device="cuda") * 2 - 1
        results = []
        for model in (flow, plain):
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=low):
                sample = model.sample(5, Key(seed), **given)
                results.append((sample, model.log_prob(x, key=Key(seed), **given)))
        (a, p), (b, q) = results
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2 if low else 1e-4)
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-1 if low else 1e-2)
        with torch.no_grad():
            for one, other in zip(flow.parameters(), plain.parameters(), strict=True):
                other.copy_(one.mul_(1.02))
    assert len(flow._graphs._captured) == 2
