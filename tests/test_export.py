"""torch.export of every op, of flows and of a sampler's step, with a batch of any size; what was
saved runs in a process that has torch and the library alone."""

from __future__ import annotations

import functools
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from op_table import OPS, Arguments, Draw, Op
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import coopflow_ext as cf
from coopflow_ext import flows
from coopflow_ext._extension import library_path

DOCS = Path(__file__).parents[1] / "docs" / "export.md"
BATCH, OTHERS = 5, (1, 9)  # of the trace, and of the runs


class Program(nn.Module):
    """A function of named tensors, and lists of them, as export takes it."""

    def __init__(self, function: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.modules_used = nn.ModuleList(modules)

    def forward(self, inputs: Arguments) -> tuple[Tensor, ...]:
        return tuple(t for t in tree_leaves(self.function(**inputs)) if t is not None)


@dataclass(frozen=True)
class Case:
    """What is exported, and its inputs for a batch of chains on a device."""

    program: Program
    inputs: Callable[[int, torch.device], Arguments]


# --- the list -------------------------------------------------------------------------------------


def case_of(op: Op) -> Case:
    """The tensors of a call are inputs of the program, everything else is a constant in it."""
    constants = {
        name: value
        for name, value in op.arguments(Draw((BATCH, 6))).items()
        if not isinstance(value, (Tensor, list)) and name != "shape"
    }

    def inputs(batch: int, device: torch.device) -> Arguments:
        arguments = op.arguments(Draw((batch, 6), device=device))
        tensors = {name: value for name, value in arguments.items() if name not in constants}
        if "shape" in tensors:
            tensors["like"] = torch.zeros(tensors.pop("shape"), device=device)
        return tensors

    def call(**given: Any) -> tuple[Tensor, ...]:
        if "like" in given:
            given["shape"] = given.pop("like").shape
        return op({**constants, **given})

    return Case(Program(call), inputs)


def _chains(batch: int, device: torch.device, **others: Tensor) -> Arguments:
    draw = Draw((batch, 2), device=device)
    return {"x0": draw.normal(), "rng": draw.rng(), **{n: t.to(device) for n, t in others.items()}}


def _accept_rng() -> Tensor:
    return cf.Key(5).tensor("cpu")


def _mixture(batch: int, device: torch.device, **others: Tensor) -> Arguments:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(3, 2, generator=generator), torch.full((3, 2), 0.5), torch.zeros(3)]
    return {**_chains(batch, device, **others), "tensors": [t.to(device) for t in tensors]}


def _network(batch: int, device: torch.device, **others: Tensor) -> Arguments:
    generator = torch.Generator().manual_seed(1)
    layers = {"weights": [(4, 2), (1, 4)], "biases": [(4,), (1,)]}
    parameters = {
        name: [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        for name, shapes in layers.items()
    }
    return {**_chains(batch, device, **others), **parameters}


def chain_cases() -> Iterator[tuple[str, Case]]:
    langevin = {"n_steps": 4, "drift": 0.1, "noise": 0.2}
    mala = {"n_steps": 4, "step_size": 0.2}
    of_energies: dict[str, tuple[Any, dict[str, Any]]] = {
        "analytic": (_mixture, {"energy": "gaussian_mixture"}),
        "mlp": (_network, {"activation": "silu"}),
    }
    for stem, (inputs, energy) in of_energies.items():
        for records in ({}, {"thin": 2, "stats": True}):
            variant = "-recorded" if records else ""
            chain, moves = (
                getattr(cf.ops, f"{stem}_{kind}_chain") for kind in ("langevin", "mala")
            )
            yield (
                f"{stem}_langevin_chain{variant}",
                Case(Program(functools.partial(chain, **energy, **langevin, **records)), inputs),
            )
            yield (
                f"{stem}_mala_chain{variant}",
                Case(
                    Program(functools.partial(moves, **energy, **mala, **records)),
                    functools.partial(inputs, accept_rng=_accept_rng()),
                ),
            )


OP_CASES = {
    **{str(op): case_of(op) for op in OPS if not op.variant.startswith(("K4", "K32", "d40"))},
    **dict(chain_cases()),
}

IMAGE = (1, 4, 4)
FLOWS: dict[str, Callable[[], cf.flows.Flow]] = {
    "realnvp": lambda: flows.realnvp(6, couplings=2, widths=(8,)),
    "realnvp-image": lambda: flows.realnvp(image_shape=IMAGE, net="mlp", couplings=1, widths=(8,)),
    "glow": lambda: flows.glow(IMAGE, scales=2, steps=1, channels=4, blocks=1),
    "flowpp": lambda: flows.flowpp(
        IMAGE, scales=((0, 1),), channels=4, blocks=1, components=3, dequant_blocks=1,
        dequant_components=2,
    ),
}  # fmt: skip


@functools.cache
def flow_of(name: str) -> cf.flows.Flow:
    """With weights that make every layer do something."""
    generator = torch.Generator().manual_seed(2)
    flow = FLOWS[name]().eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return flow


def log_prob_case(name: str) -> Case:
    flow = flow_of(name)

    def inputs(batch: int, device: torch.device) -> Arguments:
        x = torch.rand(batch, *flow.event_shape, generator=torch.Generator().manual_seed(3))
        return {"x": 2 * x - 1, **({"eps": 1 - x} if flow.is_image_flow else {})}

    return Case(Program(flow.log_prob, flow), inputs)


def sample_case(name: str) -> Case:
    flow = flow_of(name)

    def inputs(batch: int, device: torch.device) -> Arguments:
        return {
            "z": torch.randn(batch, *flow.event_shape, generator=torch.Generator().manual_seed(4))
        }

    return Case(Program(lambda z: flow.to_data(flow.inverse_and_ladj(z)[0]), flow), inputs)


def drawn_case(name: str) -> Case:
    """The noise of the dequantiser drawn in the program."""
    flow, inputs_of = flow_of(name), log_prob_case(name).inputs

    def inputs(batch: int, device: torch.device) -> Arguments:
        return {"x": inputs_of(batch, device)["x"], "rng": cf.Key(6).tensor(device)}

    def log_prob(x: Tensor, rng: Tensor) -> Tensor:
        return flow.log_prob(x, eps=cf.ops.uniform(x.shape, rng))

    return Case(Program(log_prob, flow), inputs)


def step_case() -> Case:
    """A step of :class:`LangevinSampler` with the options of an image model."""

    def step(x: Tensor, grad: Tensor, rng: Tensor) -> Tensor:
        return cf.ops.langevin_step(
            x, grad, rng, drift=0.1, noise=0.3, grad_norm=2.0, clamp=(-1.0, 1.0)
        )

    def inputs(batch: int, device: torch.device) -> Arguments:
        draw = Draw((batch, 1, 4, 4), device=device)
        return {"x": draw.normal(), "grad": draw.normal(), "rng": draw.rng()}

    return Case(Program(step), inputs)


CPU = torch.device("cpu")


KINDS = {"log_prob": log_prob_case, "sample": sample_case, "drawn": drawn_case}


@functools.cache
def model_case(name: str) -> Case:
    of, _, kind = name.rpartition("/")
    return KINDS[kind](of) if of else step_case()


MODELS = (
    "step",
    "realnvp-image/drawn",
    *(f"{name}/{kind}" for name in FLOWS for kind in ("log_prob", "sample")),
)


# --- exporting ------------------------------------------------------------------------------------


def dynamic(case: Case, device: torch.device) -> Any:
    """Every size that changes with the batch."""

    def sizes(one: Tensor, other: Tensor) -> dict[int, Any] | None:
        pairs = enumerate(zip(one.shape, other.shape, strict=True))
        return {i: torch.export.Dim.DYNAMIC for i, (a, b) in pairs if a != b} or None

    return (tree_map(sizes, case.inputs(BATCH, device), case.inputs(BATCH + 1, device)),)


@functools.cache
def export(case: Case, device: torch.device = CPU, *, strict: bool = False) -> Any:
    with torch.no_grad():
        return torch.export.export(
            case.program,
            (case.inputs(BATCH, device),),
            dynamic_shapes=dynamic(case, device),
            strict=strict,
        )


def assert_equal(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one, other)


def assert_as_eager(name: str, ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """To the bit; to rounding in Flow++, whose weights a traced graph norms by another operator."""
    if name.startswith("flowpp"):
        torch.testing.assert_close(ours, expected)
    else:
        assert_equal(ours, expected)


def operators(program: Any) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


MODES = [
    pytest.param(False, id="non-strict"),
    pytest.param(True, id="strict", marks=[pytest.mark.slow]),
]


def test_every_op_is_in_the_list() -> None:
    faces = {
        name: getattr(cf.ops, name)
        for name in cf.ops.__all__
        if inspect.isfunction(getattr(cf.ops, name)) and name != "mlp_shared_bytes"  # no tensors
    }
    assert {name.partition("-")[0] for name in OP_CASES} == set(faces)
    stems = {path.stem for path in Path(cf.ops.__file__).parent.glob("[!_]*.py")}
    assert {face.__module__.rpartition(".")[2] for face in faces.values()} == stems


@pytest.mark.parametrize("strict", MODES)
@pytest.mark.parametrize("name", OP_CASES)
def test_ops(device: torch.device, name: str, strict: bool) -> None:
    """The program calls the library's own operator, at every batch with eager's bits."""
    case = OP_CASES[name]
    program = export(case, device, strict=strict)
    op = name.partition("-")[0]
    raw = f"{op}_" if op in ("normal", "uniform") else op
    assert f"coopflow.{raw}.default" in operators(program)
    for batch in OTHERS:
        inputs = case.inputs(batch, device)
        assert_equal(program.module()(inputs), case.program(inputs))


@pytest.mark.parametrize("strict", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_flows_and_steps(name: str, strict: bool) -> None:
    case = model_case(name)
    program = export(case, strict=strict)
    assert any(op.startswith("coopflow.") for op in operators(program))
    with torch.no_grad():
        for batch in OTHERS:
            inputs = case.inputs(batch, CPU)
            assert_as_eager(name, program.module()(inputs), case.program(inputs))


def test_the_state_is_changed_in_place() -> None:
    case = step_case()

    def step(x: Tensor, grad: Tensor, rng: Tensor) -> Tensor:
        return cf.ops.langevin_step_(x, grad, rng, drift=0.1, noise=0.3)

    program = export(Case(Program(step), case.inputs)).module()
    for batch in OTHERS:
        ours, expected = case.inputs(batch, CPU), case.inputs(batch, CPU)
        program(ours)
        step(**expected)
        assert torch.equal(ours["x"], expected["x"])


# --- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["normal", "uniform", "step", "realnvp-image/drawn"])
def test_noise_follows_the_tensor_rng(name: str) -> None:
    case = OP_CASES[name] if name in OP_CASES else model_case(name)
    program = export(case).module()
    results = []
    with torch.no_grad():
        for key in (cf.Key(1), cf.Key(2), cf.Key(1, time=1), cf.Key(1, chain=1)):
            inputs = {**case.inputs(BATCH, CPU), "rng": key.tensor()}
            assert_equal(program(inputs), case.program(inputs))
            results.append(program(inputs)[0])
    for i, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[:i])


def test_no_key_draws_afresh_at_each_run() -> None:
    flow = flow_of("realnvp-image")
    case = Case(Program(flow.log_prob, flow), lambda batch, _: {"x": torch.zeros(batch, *IMAGE)})
    program = export(case).module()
    with torch.no_grad():
        assert not torch.equal(*(program(case.inputs(BATCH, CPU))[0] for _ in range(2)))


KEY = cf.Key(0)
SAMPLER = cf.LangevinSampler(cf.energies.DoubleWellEnergy(1.0), n_steps=2, step_size=0.1)
KEYED: dict[str, Callable[[cf.flows.Flow, Tensor], Any]] = {
    "log_prob": lambda flow, x: flow.log_prob(x, key=KEY),
    "sample": lambda flow, x: x + flow.sample(BATCH, KEY),
    "step": lambda flow, x: cf.ops.langevin_step(x, x, KEY.tensor(), drift=0.1, noise=0.1),
    "fold_in": lambda flow, x: cf.ops.normal(x.shape, KEY.fold_in(1).tensor("cpu")),
    "sampler": lambda flow, x: SAMPLER(x.flatten(1), key=KEY).x,
    "sampler without a key": lambda flow, x: SAMPLER(x.flatten(1)).x,
}


@pytest.mark.parametrize("name", KEYED)
def test_a_key_in_the_program_is_refused(name: str) -> None:
    flow, x = flow_of("realnvp-image"), torch.zeros(BATCH, *IMAGE)
    function = functools.partial(KEYED[name], flow)
    program = Program(lambda x: function(x), flow)
    text = "a key would become a constant of the exported program"
    given = ({"x": x},)
    with pytest.raises(ValueError, match=text):
        torch.export.export(program, given)
    with pytest.raises(Exception, match=text):  # dynamo's, around ours
        torch.export.export(program, given, strict=True)
    function(x)  # the key serves outside


def test_a_flow_that_would_start_from_the_batch_is_refused() -> None:
    flow = FLOWS["realnvp"]().train()
    case = Case(Program(flow.log_prob, flow), log_prob_case("realnvp").inputs)
    with pytest.raises(ValueError, match=r"call flow\.initialize\(x\) or flow\.eval\(\)"):
        export(case)
    with pytest.raises(Exception, match=r"call flow\.initialize\(x\)"):
        export(case, strict=True)
    assert not any(m.initialized for m in flow.modules() if isinstance(m, flows.ActNorm))
    export(Case(Program(flow.eval().log_prob, flow), case.inputs))


# --- with torch and the library alone -------------------------------------------------------------

ALONE = """
import sys
from pathlib import Path
import torch

library, folder = sys.argv[1:]
torch.ops.load_library(library)
for path in Path(folder).glob("*.pt2"):
    compiled = path.stem.endswith("-compiled")
    load = torch._inductor.aoti_load_package if compiled else torch.export.load
    program = load(str(path)) if compiled else load(path).module()
    given = torch.load(path.with_suffix(".inputs"))
    with torch.no_grad():
        torch.save([program(inputs) for inputs in given], path.with_suffix(".outputs"))
assert not [name for name in sys.modules if name.startswith("coopflow")]
"""


def run_alone(code: str, *arguments: object, folder: Path) -> str:
    """Runs it where nothing of this source tree is on the path; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def saved(case: Case, path: Path) -> list[tuple[Tensor, ...]]:
    """The inputs of some runs, beside a program; what they give here."""
    given = [case.inputs(batch, CPU) for batch in OTHERS]
    torch.save(given, path.with_suffix(".inputs"))
    with torch.no_grad():
        return [case.program(inputs) for inputs in given]


def test_saved_programs_run_with_torch_alone(tmp_path: Path) -> None:
    """All ops, and models that use each kind of them."""
    models = ("step", "realnvp-image/drawn", "realnvp-image/sample")
    cases = {**OP_CASES, **{name: model_case(name) for name in models}}
    expected = {}
    for i, (name, case) in enumerate(cases.items()):
        path = tmp_path / f"{i}.pt2"
        torch.export.save(export(case), path)
        expected[name] = saved(case, path)
    run_alone(ALONE, library_path(), tmp_path, folder=tmp_path)
    for i, name in enumerate(cases):
        outputs = torch.load(tmp_path / f"{i}.outputs")
        for ours, theirs in zip(outputs, expected[name], strict=True):
            assert_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    names = ("step", "realnvp-image/drawn", "realnvp-image/sample", "glow/log_prob")
    expected = {}
    for i, name in enumerate(names):
        case, path = model_case(name), tmp_path / f"{i}-compiled.pt2"
        torch._inductor.aoti_compile_and_package(export(case), package_path=str(path))
        expected[path] = saved(case, path)
    run_alone(ALONE, library_path(), tmp_path, folder=tmp_path)
    for path, theirs in expected.items():
        for ours, results in zip(torch.load(path.with_suffix(".outputs")), theirs, strict=True):
            torch.testing.assert_close(tuple(ours), results)


def test_the_lines_in_the_documentation_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    there, elsewhere = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(there, names)
    path = str(names["library"])
    lines = elsewhere.replace('"libcoopflow_ext.so"', repr(path))
    assert lines != elsewhere
    printed = run_alone(lines, folder=tmp_path)
    x, rng = torch.zeros(32, 1, 8, 8), torch.tensor([7, 0, 0])
    with torch.no_grad():
        expected = names["LogProb"](names["flow"])(x, rng).mean().item()
    assert float(printed) == pytest.approx(expected, rel=1e-5)
