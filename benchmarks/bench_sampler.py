"""Whole chains: LangevinSampler and MALASampler beside loops on the same energy or score.

    pytest benchmarks/bench_sampler.py --benchmark-only [--device cuda]
    python benchmarks/suite.py --case 'chain/*'

In the cases named "compiled" ours has ``compile=True`` and meets loops whose gradient is compiled
too; elsewhere ours has its defaults, and the compiled gradient is one of the others. Energies in
closed form run as one kernel by default, and step by step as a contestant of its own. On CUDA ours
step by step runs as the graph that it captures by itself, and loops take part with and without one.

Before anything is timed, every contestant takes the same supplied normals to the same state, or,
where it draws its own and noise can be turned off, moves as the plain loop does without noise. A
loop's graph ends where the loop ends from the same seed. In the cases named MALA every contestant
accepts the same proposals, given the normals and the uniforms of ours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax_chain
import torch
from harness import (
    NOT_COMPILED,
    OURS,
    Case,
    Contest,
    add_graph,
    counted_flops,
    run_pytest,
)
from torch import Tensor, nn

from coopflow_ext import Key, LangevinSampler, MALASampler, ops
from coopflow_ext.energies import (
    DoubleWellEnergy,
    GaussianMixtureEnergy,
    MLPEnergy,
    ResEnergy,
)
from coopflow_ext.rng import USE_ACCEPT

STEP_SIZE, MALA_STEP_SIZE = 0.05, 0.3
KEY = Key(0)
TORCHEBM, JAX, COMPILED = "torchebm", "JAX scan", "compiled gradient"
OURS_COMPILED, OURS_BY_STEPS = "ours, compile=True", "ours, kernel=False"
GRAPH, COMPILED_GRAPH = "CUDA graph of plain loop", "CUDA graph of compiled gradient"
Run = Callable[[], Any]
Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """An energy, or a score in closed form, and where its chains start.

    Attributes:
        low_precision: the gradient is taken in bfloat16 and channels_last.
        has_kernel: one kernel makes all the steps.
    """

    function: Callable[[Tensor], Tensor]
    x0: Tensor
    n_steps: int
    is_score: bool = False
    low_precision: bool = False
    has_kernel: bool = False

    def sampler(self, **options: Any) -> LangevinSampler:
        """Ours, with a graph or an error on CUDA."""
        if self.low_precision:
            options |= {"autocast": torch.bfloat16, "channels_last": True}
        if self.x0.is_cuda:
            options["cuda_graph"] = True
        name = "score" if self.is_score else "energy"
        return LangevinSampler(
            **{name: self.function}, n_steps=self.n_steps, step_size=STEP_SIZE, **options
        )

    def model(self) -> Callable[[Tensor], Tensor]:
        """The function as a loop calls it: in low precision a copy of its weights, made once."""
        if not self.low_precision:
            return self.function
        assert isinstance(self.function, nn.Module)
        layout = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
        return copy.deepcopy(self.function).to(**layout)

    def score(self) -> Score:
        """∇log p by autograd, or as given."""
        if self.is_score:
            return self.function
        model = self.model()

        def by_autograd(x: Tensor) -> Tensor:
            leaf = self.cast(x).requires_grad_()
            (grad,) = torch.autograd.grad(model(leaf).sum(), leaf)
            return grad.neg_().to(x.dtype)

        return by_autograd

    def compiled_score(self) -> Score:
        """∇log p as one compiled function."""
        model = self.model()
        gradient = torch.compile(torch.func.grad(lambda x: model(x).sum()), dynamic=False)
        return lambda x: gradient(self.cast(x)).neg().to(x.dtype)

    def cast(self, x: Tensor) -> Tensor:
        return x.detach().to(torch.bfloat16) if self.low_precision else x.detach()

    def start(self) -> Tensor:
        """A new copy of x0, in the layout that a tuned loop would give it."""
        layout = torch.channels_last if self.low_precision else torch.preserve_format
        return self.x0.clone(memory_format=layout)


# --- problems -------------------------------------------------------------------------------------


def points(batch: int, device: torch.device) -> Tensor:
    return torch.randn(batch, 2, generator=torch.Generator().manual_seed(0)).to(device)


def images(batch: int, device: torch.device) -> Tensor:
    shape = (batch, 3, 32, 32)
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(device)


def mixture_energy(device: torch.device) -> GaussianMixtureEnergy:
    angle = torch.arange(8) * (math.pi / 4)
    means = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixtureEnergy(means, 0.3).to(device)


def mixture(device: torch.device) -> Problem:
    return Problem(mixture_energy(device), points(1024, device), 50, has_kernel=True)


def closed_form(device: torch.device) -> Problem:
    score = mixture_energy(device).score
    return Problem(score, points(1024, device), 50, is_score=True, has_kernel=True)


def double_well(device: torch.device) -> Problem:
    score = DoubleWellEnergy().score
    return Problem(score, points(1, device), 400, is_score=True, has_kernel=True)


def cheap_score(device: torch.device) -> Problem:
    """One chain and a score that costs next to nothing: what is left is the sampler's own time."""
    return Problem(torch.neg, points(1, device), 400, is_score=True)


def mlp(batch: int) -> Callable[[torch.device], Problem]:
    def make(device: torch.device) -> Problem:
        torch.manual_seed(0)
        energy = MLPEnergy(2, (64, 64, 64)).to(device).requires_grad_(False)
        return Problem(energy, points(batch, device), 100)

    return make


def convolutional(
    batch: int, width: int, n_steps: int, low_precision: bool = False
) -> Callable[[torch.device], Problem]:
    """The paper's network has width 128."""

    def make(device: torch.device) -> Problem:
        torch.manual_seed(0)
        energy = ResEnergy(width=width, image_size=32).to(device).requires_grad_(False)
        return Problem(energy, images(batch, device), n_steps, low_precision=low_precision)

    return make


# --- contestants ----------------------------------------------------------------------------------


def plain_loop(problem: Problem, score: Score, xi: Tensor | None = None) -> Tensor:
    """In place, noise into one buffer, no check of anything."""
    x = problem.start()
    noise = torch.empty_like(x)
    for k in range(problem.n_steps):
        x.add_(score(x), alpha=STEP_SIZE**2 / 2)
        x.add_(noise.normal_() if xi is None else xi[k], alpha=STEP_SIZE)
    return x


def torchebm_chain(problem: Problem) -> tuple[Run, Callable[[], Tensor]] | str:
    """(its sampler; the same with hardly any noise), or why it cannot compete."""
    try:
        from torchebm.core import BaseModel
        from torchebm.samplers import LangevinDynamics
    except ImportError as error:
        return f"not installed: {error}"
    if problem.low_precision:
        return "its state would be in bfloat16"

    class Model(BaseModel):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return problem.function(x)

    class ScoreModel(Model):
        def gradient(self, x: Tensor) -> Tensor:
            return -problem.function(x)

    model = (ScoreModel if problem.is_score else Model)(device=problem.x0.device)

    def chain(noise_scale: float) -> Callable[[], Tensor]:
        sampler = LangevinDynamics(
            model, step_size=STEP_SIZE**2 / 2, noise_scale=noise_scale, device=problem.x0.device
        )
        return lambda: sampler.sample(problem.x0.clone(), n_steps=problem.n_steps)

    return chain(1.0), chain(1e-20)


def case(
    name: str,
    make: Callable[[torch.device], Problem],
    elements: int,
    steps: int,
    *,
    compiled: bool = False,
    **kw: Any,
) -> Case:
    """A chain as a case of the suite; all contestants make the same number of steps."""

    def build(device: torch.device, with_compile: bool) -> Contest:
        problem = make(device)
        assert (problem.x0.numel(), problem.n_steps) == (elements, steps), name
        score = problem.score()
        runs: dict[str, Run] = {}
        missing: dict[str, str] = {}
        scores = {"plain loop": score}
        samplers = {OURS: problem.sampler(compile=compiled)}
        if problem.has_kernel and not compiled:
            samplers[OURS_BY_STEPS] = problem.sampler(kernel=False)
        runs |= {n: lambda s=s: s(problem.x0, key=KEY).x for n, s in samplers.items()}
        if not compiled:
            runs["plain loop"] = lambda: plain_loop(problem, score)
        if with_compile and not problem.is_score:
            fast = scores[COMPILED] = problem.compiled_score()
            runs[COMPILED] = lambda: plain_loop(problem, fast)
        elif not problem.is_score:
            missing[COMPILED] = NOT_COMPILED
        if name.startswith("mixture, closed form"):
            by_autograd = mixture(device).score()
            scores["plain loop, autograd"] = by_autograd
            runs["plain loop, autograd"] = lambda: plain_loop(problem, by_autograd)
        if problem.function is torch.neg:
            runs["the score alone"] = lambda: [torch.neg(problem.x0) for _ in range(steps)]
        quiet = None
        if not compiled:
            theirs = torchebm_chain(problem)
            if isinstance(theirs, str):
                missing[TORCHEBM] = theirs
            else:
                runs[TORCHEBM], quiet = theirs
        captured: dict[str, tuple[Run, Run]] = {}
        loops = {GRAPH: "plain loop", COMPILED_GRAPH: COMPILED} if device.type == "cuda" else {}
        for graph, loop in loops.items():
            if loop in runs:
                add_graph(graph, runs[loop], runs, missing)
            if graph in runs:
                captured[graph] = runs[graph], runs[loop]
        supplied = {n: lambda xi, s=s: s(problem.x0, xi=xi).x for n, s in samplers.items()}
        supplied |= {n: lambda xi, s=s: plain_loop(problem, s, xi) for n, s in scores.items()}
        unseen = {GRAPH, COMPILED_GRAPH} | (set(samplers) if device.type == "cuda" else set())
        return Contest(
            runs,
            lambda: check(problem, supplied, {} if quiet is None else {TORCHEBM: quiet}, captured),
            missing=missing,
            flops=steps * counted_flops(lambda: score(problem.start())),
            low_precision=problem.low_precision,
            own_memory=frozenset(unseen),
        )

    return Case(f"chain/{name}", build, elements, steps, **kw)


def mala_loop(
    problem: Problem, n_steps: int, xi: Tensor | None = None, uniforms: Tensor | None = None
) -> Tensor:
    """MALA as it is written with torch: one evaluation a step, what is rejected kept by a mask."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        u = problem.function(leaf)
        (grad,) = torch.autograd.grad(u.sum(), leaf)
        return u.detach(), grad

    drift = MALA_STEP_SIZE**2 / 2
    x = problem.start()
    u, grad = evaluate(x)
    for k in range(n_steps):
        noise = torch.randn_like(x) if xi is None else xi[k]
        move = noise.mul(MALA_STEP_SIZE).sub_(grad, alpha=drift)
        y = x + move
        u_y, grad_y = evaluate(y)
        forward = move.add(grad, alpha=drift).square_().sum(1)
        backward = move.sub_(grad_y, alpha=drift).square_().sum(1)
        log_ratio = u - u_y + (forward - backward) / (4 * drift)
        uniform = torch.rand_like(u) if uniforms is None else uniforms[k]
        accepted = uniform.log() < log_ratio
        u = torch.where(accepted, u_y, u)
        chains = accepted[:, None]
        x, grad = torch.where(chains, y, x), torch.where(chains, grad_y, grad)
    return x


def mala_case(
    name: str, make: Callable[[torch.device], Problem], elements: int, steps: int, **kw: Any
) -> Case:
    """Chains that accept their moves, in one kernel and step by step."""

    def build(device: torch.device, with_compile: bool) -> Contest:
        problem = make(device)
        assert (problem.x0.numel(), problem.n_steps) == (elements, steps), name

        def sampler(kernel: bool, n_steps: int = steps) -> MALASampler:
            return MALASampler(
                problem.function, n_steps=n_steps, step_size=MALA_STEP_SIZE, kernel=kernel
            )

        samplers = {OURS: sampler(True), OURS_BY_STEPS: sampler(False)}
        runs: dict[str, Run] = {
            n: lambda s=s: s(problem.x0, key=KEY).x for n, s in samplers.items()
        }
        runs["plain loop"] = lambda: mala_loop(problem, steps)
        missing: dict[str, str] = {}
        if device.type == "cuda":
            add_graph(GRAPH, runs["plain loop"], runs, missing)

        def check_few() -> None:
            """So few steps that rounding does not change a decision."""
            rng, accept_rng = (k.tensor(device) for k in (KEY, KEY.fold_in(USE_ACCEPT)))
            few = range(5)
            xi = torch.stack([ops.normal(problem.x0.shape, rng, step=k) for k in few])
            uniforms = [ops.uniform((len(problem.x0),), accept_rng, step=k) for k in few]
            end = mala_loop(problem, len(few), xi, torch.stack(uniforms))
            assert not torch.equal(end, problem.x0)
            for kernel in (True, False):
                ended = sampler(kernel, len(few))(problem.x0, xi=xi, key=KEY).x
                torch.testing.assert_close(ended, end, rtol=1e-4, atol=1e-4)

        return Contest(
            runs,
            check_few,
            missing=missing,
            flops=(steps + 1) * counted_flops(lambda: problem.score()(problem.start())),
            own_memory=frozenset({GRAPH} & runs.keys()),
        )

    return Case(f"chain/{name}, MALA", build, elements, steps, **kw)


def jax_case(
    name: str, make: Callable[[torch.device], Problem], elements: int, steps: int, **kw: Any
) -> Case:
    """A chain beside JAX and no other contestant, because JAX disturbs whoever comes after it."""

    def build(device: torch.device, with_compile: bool) -> Contest:
        problem = make(device)
        assert (problem.x0.numel(), problem.n_steps) == (elements, steps), name
        samplers = {OURS: problem.sampler(compile=False)}
        missing: dict[str, str] = {}
        if with_compile:
            samplers[OURS_COMPILED] = problem.sampler(compile=True)
        else:
            missing[OURS_COMPILED] = NOT_COMPILED
        runs: dict[str, Run] = {
            n: lambda s=s: s(problem.x0, key=KEY).x for n, s in samplers.items()
        }
        supplied = {n: lambda xi, s=s: s(problem.x0, xi=xi).x for n, s in samplers.items()}
        if reason := jax_chain.why_not(device, problem.function):
            missing[JAX] = reason
        else:
            runs[JAX], supplied[JAX] = jax_chain.make_chain(
                problem.function, problem.x0, steps, STEP_SIZE
            )
        unseen = {JAX} | (set(samplers) if device.type == "cuda" else set())
        return Contest(
            runs,
            lambda: check(problem, supplied, {}, {}),
            missing=missing,
            flops=steps * counted_flops(lambda: problem.score()(problem.start())),
            own_memory=frozenset(unseen),
        )

    return Case(f"chain/{name}, JAX", build, elements, steps, **kw)


def check(
    problem: Problem,
    supplied: dict[str, Callable[[Tensor], Tensor]],
    quiet: dict[str, Callable[[], Tensor]],
    captured: dict[str, tuple[Run, Run]],
) -> None:
    """Every contestant against the plain loop: with the same normals, and by its drift alone.

    Graphs against the loop that each was captured from, with the same seed. The drift is compared
    by itself because noise is many times as large: a wrong gradient of a network with weights as
    initialised would hide behind it.
    """
    reference = replace(problem, low_precision=False)
    exact = reference.score()
    shape = (problem.n_steps, *problem.x0.shape)
    xi, zeros = torch.randn(shape, device=problem.x0.device), torch.zeros(shape).to(problem.x0)
    end, still = (plain_loop(reference, exact, noise) for noise in (xi, zeros))
    drift = still - problem.x0
    tolerance = 5e-2 if problem.low_precision else 1e-3
    for name, run in supplied.items():
        torch.testing.assert_close(
            run(xi), end, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, moved in {
        **{n: lambda r=r: r(zeros) for n, r in supplied.items()}, **quiet,
    }.items():  # fmt: skip
        error = ((moved() - still).norm() / drift.norm()).item()
        assert error <= tolerance, f"{name}: its drift is off by {error:.2g} of its size"
    for name, pair in captured.items():
        torch.manual_seed(0)
        replayed = pair[0]().clone()
        torch.manual_seed(0)
        torch.testing.assert_close(
            replayed, pair[1](), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


SUITE_CASES = (
    case("mixture, autograd", mixture, 2048, 50),
    case("mixture, closed form", closed_form, 2048, 50),
    case("mixture, compiled", mixture, 2048, 50, compiled=True),
    case("cheap score, one chain", cheap_score, 2, 400),
    case("double well, one chain", double_well, 2, 400),
    case("MLP", mlp(1024), 2048, 100, quick=True),
    case("MLP, compiled", mlp(1024), 2048, 100, compiled=True),
    case("ResEnergy", convolutional(8, 16, 4), 8 * 3072, 4),
    case("ResEnergy, compiled", convolutional(8, 16, 4), 8 * 3072, 4, compiled=True),
    case("MLP, 4096 chains", mlp(4096), 8192, 100, devices=("cuda",)),
    case("MLP, 4096 chains, compiled", mlp(4096), 8192, 100, compiled=True, devices=("cuda",)),
    case("paper's network, 28", convolutional(28, 128, 30), 28 * 3072, 30, devices=("cuda",)),
    case(
        "paper's network, 28, bf16", convolutional(28, 128, 30, True), 28 * 3072, 30,
        devices=("cuda",),
    ),
    case(
        "paper's network, 28, bf16, compiled", convolutional(28, 128, 30, True), 28 * 3072, 30,
        compiled=True, devices=("cuda",),
    ),
    case(
        "paper's network, 128, bf16, compiled", convolutional(128, 128, 30, True), 128 * 3072, 30,
        compiled=True, devices=("cuda",),
    ),
    mala_case("mixture", mixture, 2048, 50),
    mala_case("MLP", mlp(1024), 2048, 100),
    mala_case("MLP, 4096 chains", mlp(4096), 8192, 100, devices=("cuda",)),
    jax_case("mixture, autograd", mixture, 2048, 50),
    jax_case("mixture, closed form", closed_form, 2048, 50),
    jax_case("MLP", mlp(1024), 2048, 100),
    jax_case("MLP, 4096 chains", mlp(4096), 8192, 100, devices=("cuda",)),
)  # fmt: skip


def test_chain(benchmark: Any, case: Case, device: torch.device) -> None:
    run_pytest(benchmark, case, device)
