"""A flow keeps its state through all that people do with modules, whatever the builder."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from coopflow_ext import Key, energies, flows
from coopflow_ext.flows.layers import ActNorm
from coopflow_ext.flows.weight_norm import WeightNormedConv2d

Make = Callable[[], flows.Flow]
IMAGE = {"image_shape": (1, 4, 4)}
FLOWPP = {
    **IMAGE, "scales": ((0, 1), (1, 1)), "channels": 8, "blocks": 1, "components": 2,
    "dropout": 0.0, "dequant_blocks": 1, "dequant_components": 2,
}  # fmt: skip
BUILDERS: dict[str, Make] = {
    "vectors": lambda: flows.realnvp(5, couplings=3, widths=(8,)),
    "mlp": lambda: flows.realnvp(**IMAGE, net="mlp", couplings=2, widths=(8,)),
    "conv": lambda: flows.realnvp(**IMAGE, channels=4, blocks=1),
    "glow": lambda: flows.glow(**IMAGE, steps=1, channels=4, blocks=1),
    "flowpp": lambda: flows.flowpp(**FLOWPP),
    "flowpp uniform": lambda: flows.flowpp(**(FLOWPP | {"dequant_blocks": 0, "attention": False})),
    "context": lambda: flows.flowpp(**(FLOWPP | {"dequant_blocks": 0, "context_dim": 3})),
}
builders = pytest.mark.parametrize("name", BUILDERS)


def batch(flow: flows.Flow, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(8, *flow.event_shape, generator=generator) * (2 - seed % 2) - 1
    inputs = {"x": x}
    if flow.context_dim:
        inputs["context"] = torch.randn(8, flow.context_dim, generator=generator)
    return inputs


def log_prob(flow: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """In training mode: a layer that takes itself for new would start from this batch."""
    return flow.train()(**inputs, key=Key(7)).detach()


def started(name: str, seed: int = 0) -> flows.Flow:
    """A flow that saw data, its parameters numbers of half precision and no coupling trivial."""
    torch.manual_seed(seed)
    flow = BUILDERS[name]()
    flow.initialize(**batch(flow, seed=2 * seed), key=Key(0))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
            parameter.copy_(parameter.half())
    return flow


def tensors(flow: nn.Module) -> list[Tensor]:
    return [*flow.parameters(), *flow.buffers()]


def copied(source: flows.Flow, make: Make, write: Callable[[Tensor, Tensor], object]) -> nn.Module:
    target = make()
    with torch.no_grad():
        for there, here in zip(tensors(target), tensors(source), strict=True):
            write(there, here)
    return target


def loaded(source: flows.Flow, target: nn.Module, *, assign: bool = False) -> nn.Module:
    target.load_state_dict(source.state_dict(), assign=assign)
    return target


def on_meta(make: Make) -> flows.Flow:
    with torch.device("meta"):
        return make()


def saved_and_loaded(source: flows.Flow, make: Make) -> nn.Module:
    file = io.BytesIO()
    torch.save(source, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def old_checkpoint(source: flows.Flow) -> dict[str, Tensor]:
    """As it was before: bool flags, and three tensors of indices for a mask."""
    state = {}
    for key, value in source.state_dict().items():
        name = key.rpartition(".")[2]
        if name == "mask":
            changed, kept = (value > 0.5).nonzero()[:, 0], (value < 0.5).nonzero()[:, 0]
            parent = key.removesuffix("mask")
            state |= {f"{parent}changed": changed, f"{parent}kept": kept}
            state[f"{parent}order"] = torch.cat((changed, kept)).argsort()
        else:
            state[key] = value > 0 if name == "initialized" else value
    return state


def from_old_checkpoint(source: flows.Flow, target: nn.Module, *, assign: bool) -> nn.Module:
    target.load_state_dict(old_checkpoint(source), assign=assign)
    return target


def averaged_model(source: flows.Flow, make: Make, **options: bool) -> nn.Module:
    """The copy is made before the first batch, as at the start of a training run."""
    average = AveragedModel(make(), **options)
    for _ in range(3):
        average.update_parameters(source)
    return average


def mean_of_states(a: flows.Flow, b: flows.Flow, decay: float) -> dict[str, Tensor]:
    theirs = b.state_dict()
    return {
        name: decay * value + (1 - decay) * theirs[name] for name, value in a.state_dict().items()
    }


def mean_loaded(source: flows.Flow, make: Make, decay: float) -> nn.Module:
    target = make()
    target.load_state_dict(mean_of_states(source, source, decay))
    return target


def with_ddp(source: flows.Flow, make: Make) -> nn.Module:
    """DDP sends every buffer from the first process before each pass."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(source))
        log_prob(parallel, batch(source, 3))
        return parallel.module
    finally:
        dist.destroy_process_group()


OPERATIONS: dict[str, Callable[[flows.Flow, Make], nn.Module]] = {
    "deepcopy": lambda source, make: copy.deepcopy(source),
    "pickle": lambda source, make: pickle.loads(pickle.dumps(source)),
    "save": saved_and_loaded,
    "load": lambda source, make: loaded(source, make()),
    "load into a deepcopy": lambda source, make: loaded(source, copy.deepcopy(make())),
    "assign": lambda source, make: loaded(source, make(), assign=True),
    "assign to meta": lambda source, make: loaded(source, on_meta(make), assign=True),
    "from meta": lambda source, make: loaded(source, on_meta(make).to_empty(device="cpu")),
    "copy_": lambda source, make: copied(source, make, lambda there, here: there.copy_(here)),
    # Unseen by the version counter, like what a broadcast between processes writes.
    "broadcast": lambda source, make: copied(source, make, lambda t, s: t.data.copy_(s.data)),
    "swap": lambda source, make: copied(source, make, lambda t, s: setattr(t, "data", s.clone())),
    "old checkpoint": lambda source, make: from_old_checkpoint(source, make(), assign=False),
    "assign old": lambda source, make: from_old_checkpoint(source, on_meta(make), assign=True),
    "half": lambda source, make: copy.deepcopy(source).half().float(),
    "double": lambda source, make: copy.deepcopy(source).to(torch.float64).float(),
    "average": averaged_model,
    "average buffers": lambda source, make: averaged_model(source, make, use_buffers=True),
    "mean": lambda source, make: mean_loaded(source, make, 0.5),
    "ddp": with_ddp,
}


@builders
@pytest.mark.parametrize("operation", OPERATIONS)
def test_state_survives(name, operation):
    source = started(name)
    before, inputs = log_prob(source, batch(source, 3)), batch(source, 3)
    target = OPERATIONS[operation](source, BUILDERS[name])
    for _ in range(2):
        assert torch.equal(log_prob(target, inputs), before)
    assert torch.equal(log_prob(source, inputs), before)


@builders
@pytest.mark.parametrize("decay", [0.1, 0.9, 0.999, 0.9999])
def test_a_mean_of_equal_states_is_the_state(name, decay):
    source = started(name)
    inputs = batch(source, 3)
    target = mean_loaded(source, BUILDERS[name], decay)
    torch.testing.assert_close(log_prob(target, inputs), log_prob(source, inputs))


@builders
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("partner", ["started", "new"])
def test_an_average_of_different_states_is_their_average(name, use_buffers, partner):
    """Also of a flow that saw data and one that did not: it never starts from a batch."""
    first, decay = started(name), 0.999
    second = started(name, seed=1) if partner == "started" else BUILDERS[name]()
    average = AveragedModel(
        first, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=use_buffers
    )
    average.update_parameters(first)
    average.update_parameters(second)
    expected = [
        decay * a + (1 - decay) * b
        for a, b in zip(first.parameters(), second.parameters(), strict=True)
    ]
    if use_buffers:
        assert_never_starts(average.module, expected)
    mean = BUILDERS[name]()
    mean.load_state_dict(mean_of_states(first, second, decay))
    assert_never_starts(mean, expected)
    mean.load_state_dict(mean_of_states(second, first, decay))
    assert log_prob(mean, batch(mean, 3)).isfinite().all()


def assert_never_starts(flow: flows.Flow, parameters: list[Tensor]) -> None:
    assert log_prob(flow, batch(flow, 3)).isfinite().all()
    for ours, expected in zip(flow.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@builders
def test_there_is_nothing_but_floating_point_state(name):
    flow = BUILDERS[name]()
    assert all(tensor.is_floating_point() for tensor in tensors(flow))
    assert (
        set(flow.state_dict()) == dict([*flow.named_parameters(), *flow.named_buffers()]).keys()
    ), "a buffer that is not saved is lost on the meta device"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_energy_of_ours_has_floating_point_state(dtype):
    for energy in (
        energies.ResEnergy(1, width=2, image_size=8),
        energies.MLPEnergy(2),
        energies.GaussianMixtureEnergy(torch.zeros(2, 2)),
    ):
        assert {tensor.dtype for tensor in tensors(energy.to(dtype))} == {dtype}


def test_weights_norm_like_torchs():
    """Names, numbers and gradients of torch's parametrization, whose state loads into ours."""
    from torch.nn.utils.parametrizations import weight_norm

    from coopflow_ext.flows.weight_norm import WeightNormedConv2d, WeightNormedLinear

    for ours, theirs, x in (
        (WeightNormedConv2d(2, 4, 3), nn.Conv2d(2, 4, 3, padding=1), torch.randn(2, 2, 4, 4)),
        (WeightNormedLinear(3, 4, bias=True), nn.Linear(3, 4), torch.randn(2, 3)),
    ):
        weight_norm(theirs)
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        ours.load_state_dict(theirs.state_dict())
        outputs = ours(x), theirs(x)
        assert torch.equal(*outputs)
        for a, b in zip(
            torch.autograd.grad(outputs[0].square().sum(), list(ours.parameters())),
            torch.autograd.grad(outputs[1].square().sum(), list(theirs.parameters())),
            strict=True,
        ):
            assert torch.equal(a, b)


class CountReads(TorchDispatchMode):
    """Counts the values that the host reads."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.is_nonzero,
            torch.ops.aten.nonzero,
        )
        return func(*args, **(kwargs or {}))


def reads(flow: flows.Flow) -> int:
    with CountReads() as count:
        flow(**batch(flow, 3), key=Key(1)).sum().backward()
    return count.reads


@builders
def test_the_host_reads_each_flag_once_after_a_change_and_none_in_evaluation(name):
    flow = started(name)
    n_flags = sum(isinstance(module, ActNorm) for module in flow.modules())
    assert reads(flow) == 0
    twin = BUILDERS[name]()
    twin.load_state_dict(flow.state_dict())
    assert reads(twin) == 0
    twin = copy.deepcopy(flow)
    assert reads(twin.eval()) == 0
    assert reads(twin.train()) == n_flags
    assert reads(twin) == 0
    optimizer = torch.optim.SGD(twin.parameters(), 1e-4)
    optimizer.step()
    assert reads(twin) == 0
    twin.double().float()
    assert [reads(twin), reads(twin)] == [n_flags, 0]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_state_from_before_the_first_batch_starts_again(compiled):
    flow = flows.realnvp(3, couplings=2, widths=(8,))
    new = copy.deepcopy(flow.state_dict())
    x = torch.randn(64, 3) + 5
    flow.initialize(x)
    forward = torch.compile(flow, backend="eager") if compiled else flow
    expected = forward(x)
    flow.load_state_dict(new)
    assert not any(m.initialized for m in flow.modules() if isinstance(m, ActNorm))
    assert torch.equal(forward(x), expected)
    assert all(m.initialized for m in flow.modules() if isinstance(m, ActNorm))


@pytest.fixture
def no_graphs():
    """Graphs of other tests, which are taken where they fit, are gone."""
    torch._dynamo.reset()


def test_compiling_before_the_first_batch(no_graphs):
    """The graph is broken once, for the start, and whole from then on."""
    flow, x = flows.realnvp(3, couplings=2, widths=(8,)), torch.randn(64, 3) + 5
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call flow\.initialize\(x\) before"):
        torch.compile(flow.log_prob, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(flow.log_prob, backend=counter)
    compiled(x)
    assert all(m.initialized for m in flow.modules() if isinstance(m, ActNorm))
    start = [p.clone() for p in flow.parameters()]
    compiled(x)
    frames = counter.frame_count
    for seed in range(3):
        other = torch.randn(64, 3, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(compiled(other), flow.log_prob(other))
    assert counter.frame_count == frames
    assert all(torch.equal(a, b) for a, b in zip(flow.parameters(), start, strict=True))


def test_graphs_are_not_taken_for_a_flow_that_has_to_start(no_graphs):
    """Flows of the same layers share graphs; what one has seen must not count for another."""
    flow, x = started("vectors"), torch.randn(64, 5) + 5
    compiled = torch.compile(flows.Flow.log_prob, backend="eager")
    for copy_of_it in (flow, copy.deepcopy(flow), OPERATIONS["copy_"](flow, BUILDERS["vectors"])):
        assert torch.equal(compiled(copy_of_it, x), flow.log_prob(x))
    fresh = BUILDERS["vectors"]()
    compiled(fresh, x)
    assert all(m.initialized for m in fresh.modules() if isinstance(m, ActNorm))
    assert torch.equal(compiled(fresh, x), fresh.log_prob(x))


@pytest.mark.parametrize("strict", [False, True])
def test_a_flow_that_saw_data_is_exported_in_training_mode(strict):
    flow = started("vectors")
    inputs = batch(flow, 3)
    exported = torch.export.export(flow, (inputs["x"],), strict=strict).module()
    assert torch.equal(exported(inputs["x"]), flow(**inputs))


def test_a_first_pass_in_another_mode_leaves_nothing_of_it_behind():
    """Inference mode, a transform of torch.func: what they keep is used with autograd later."""
    flow, x = started("flowpp"), batch(BUILDERS["flowpp"](), 3)["x"]
    vectors, v = started("vectors"), torch.randn(8, 5)
    expected = log_prob(vectors, {"x": v})
    modes = (
        torch.inference_mode()(lambda flow, x: flow.log_prob(x, key=Key(0))),
        torch.func.grad(lambda x, flow: flow.log_prob(x, key=Key(0)).sum(), argnums=0),
    )
    for model, data, first in (
        (flow, x, lambda f, x: modes[0](f, x)),
        (vectors, v, lambda f, x: modes[0](f, x)),
        (vectors, v, lambda f, x: modes[1](x, f)),
    ):
        for moved in (copy.deepcopy(model), copy.deepcopy(model).double().float()):
            first(moved, data)
            moved.log_prob(data, key=Key(0)).sum().backward()
            assert all(p.grad is not None for p in moved.parameters())
    assert torch.equal(log_prob(vectors, {"x": v}), expected)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(vectors).log_prob(v), expected)


def test_masks_that_do_not_fit_are_refused():
    flow = flows.realnvp(5, couplings=2, widths=(8,))
    state = flow.state_dict()
    name = next(name for name in state if name.endswith("mask"))
    with pytest.raises(RuntimeError, match=r"mask must be above 0\.5 for exactly 2 coordinates"):
        flow.load_state_dict(state | {name: torch.ones(5)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        flow.load_state_dict(state | {name: torch.tensor([1.0, 1.0, 0.0])})
    with pytest.raises(RuntimeError, match=r"Missing key.*split\.mask"):
        flow.load_state_dict({key: value for key, value in state.items() if key != name})


def test_a_split_has_its_indices_where_the_events_are():
    split = flows.VectorSplit(torch.tensor([True, False, False, True]))
    x = torch.arange(8.0).view(2, 4)
    for device in ("meta", "cpu", "meta", "cpu"):
        changed, kept = split.split(x.to(device))
        assert changed.device.type == kept.device.type == device
        merged = split.merge(changed, kept)
    assert torch.equal(changed, x[:, [0, 3]])
    assert torch.equal(kept, x[:, [1, 2]])
    assert torch.equal(merged, x)


def test_a_mask_that_is_written_moves_the_split():
    split = flows.VectorSplit(torch.tensor([True, False, False]))
    x = torch.tensor([[1.0, 2.0, 3.0]])
    assert split.split(x)[0].tolist() == [[1.0]]
    with torch.no_grad():
        split.mask.copy_(torch.tensor([0.0, 0.0, 1.0]))
    changed, kept = split.split(x)
    assert (changed.tolist(), kept.tolist()) == ([[3.0]], [[1.0, 2.0]])
    assert torch.equal(split.merge(changed, kept), x)
    assert flows.VectorSplit([True, False]).split(x[:, :2])[0].tolist() == [[1.0]]


def test_initialize_leaves_every_modules_mode():
    flow = flows.realnvp(3, couplings=2, widths=(8,), dropout=0.1)
    flow.transform.transforms[1].eval()
    modes = [module.training for module in flow.modules()]
    flow.initialize(torch.randn(8, 3))
    assert [module.training for module in flow.modules()] == modes
    assert {True, False} <= set(modes)


def flowpp_layer() -> tuple[flows.Flow, nn.Module, Tensor]:
    """A flow++, one of its weight-normed convolutions with a bias that counts, and a batch."""
    flow = BUILDERS["flowpp"]()
    x = batch(flow, 0)["x"]
    flow.initialize(x, key=Key(0))
    layer = next(m for m in flow.modules() if isinstance(m, WeightNormedConv2d))
    with torch.no_grad():
        layer.bias.fill_(0.5)
    return flow.eval(), layer, x


def test_a_bias_that_is_no_parameter_counts():
    """Pruning and replicas of DataParallel make it a plain tensor."""
    flow, layer, x = flowpp_layer()
    before = flow.log_prob(x, key=Key(1)).detach()
    prune.identity(layer, "bias")
    assert "bias" not in layer._parameters
    torch.testing.assert_close(flow.log_prob(x, key=Key(1)).detach(), before)


def test_a_parametrization_is_refused_before_it_changes_the_class():
    flow, layer, x = flowpp_layer()
    for name in ("weight", "bias"):
        with pytest.raises(TypeError, match=f"takes no parametrization of its {name}"):
            parametrize.register_parametrization(layer, name, nn.Identity())
    with pytest.raises(TypeError, match="takes no parametrization of its weight"):
        nn.utils.parametrizations.spectral_norm(layer)
    assert flow.log_prob(x, key=Key(1)).isfinite().all()
    BUILDERS["flowpp"]()


def test_recompute_refuses_what_is_learned_and_no_parameter():
    flow = flows.glow(**IMAGE, steps=1, channels=4, blocks=1, recompute=True)
    x = batch(flow, 0)["x"]
    flow.initialize(x, key=Key(0))
    layer = next(m for m in flow.modules() if isinstance(m, nn.Conv2d))
    prune.identity(layer, "bias")
    with pytest.raises(RuntimeError, match=r"recompute needs every tensor .* bias of a Conv2d"):
        flow.log_prob(x, key=Key(1))


@pytest.mark.parametrize("name", ["glow", "flowpp"])
def test_shapes_are_found_on_the_meta_device(name):
    with torch.device("meta"):
        flow = BUILDERS[name]().eval()
        assert flow.log_prob(torch.rand(3, *flow.event_shape), key=Key(0)).shape == (3,)
        assert flow.sample(2, Key(0)).shape == (2, *flow.event_shape)


def test_copies_and_pickles_of_a_split_start_without_its_indices():
    split = flows.VectorSplit(torch.tensor([True, False, False, True]))
    fresh = len(pickle.dumps(split))
    x = torch.arange(8.0).view(2, 4)
    halves = split.split(x)
    assert len(pickle.dumps(split)) == fresh
    for other in (copy.deepcopy(split), pickle.loads(pickle.dumps(split))):
        assert all(map(torch.equal, other.split(x), halves))
