"""Options of LangevinSampler drawn at random and together, against one loop in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coopflow_ext.samplers import LangevinSampler

SIZES = ((3,), (2, 2), (), (1, 2, 1, 2))  # elements of one chain, for each tensor of the state
BROKEN_AT = 0.9  # the energies' gradient is NaN above, where chains are to blow up


def normals(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rows(x: Tensor) -> Tensor:
    """(B, elements of a chain)."""
    return x.reshape(len(x), -1)


def energy(xs: tuple[Tensor, ...], *, breaks: bool) -> Tensor:
    """(B,): not quadratic, coupled between the tensors, with gradients of order one."""
    x = torch.cat([rows(x) for x in xs], dim=1)
    u = 0.4 * x.square() + torch.sin(2 * x) + 0.1 * x * x.mean(1, keepdim=True)
    if breaks:
        u = u + torch.where(x > BROKEN_AT, torch.nan, 0.0) * x
    return u.sum(1)


STATISTICS = ("energy", "grad_norm", "displacement", "clip_fraction", "clamp_fraction",
              "nonfinite", "active")  # fmt: skip


@dataclass
class Run:
    """A sampler's options and call, and the same as the plain loop takes them."""

    options: dict[str, Any]
    call: dict[str, Any]
    x0: tuple[Tensor, ...]
    xi: tuple[Tensor, ...]
    n_steps: int
    drift: Tensor  # (T, B), as are these
    noise: Tensor
    decay: float = 0.0
    pull: Tensor | None = None  # (B,)
    x_ref: tuple[Tensor, ...] = ()
    kind: str = "energy"
    breaks: bool = False
    differentiable: bool | str = False
    low: bool = False
    in_list: type = tuple
    clips: dict[str, float] = field(default_factory=dict)
    clamp: tuple[float, float] | None = None

    def is_on(self, name: str, value: Any) -> bool:
        return self.options.get(name) == value


def column(values: Tensor, x: Tensor) -> Tensor:
    """(B,) against (B, …)."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def per_chain_norm(xs: list[Tensor]) -> Tensor:
    return torch.cat([rows(x) for x in xs], dim=1).norm(dim=1)


def share(flags: list[Tensor]) -> Tensor:
    return torch.cat([rows(f) for f in flags], dim=1).double().mean(1)


def plain_chain(run: Run, start: tuple[Tensor, ...]) -> dict[str, Any]:
    """Last state, all states and statistics; gradients flow as the option says."""
    noise_first = run.options["noise_before_gradient"]
    masked = not run.is_on("on_nonfinite", "ignore")
    xs = [x.clone() for x in start]
    active = torch.ones(len(xs[0]), dtype=torch.bool)
    states: list[list[Tensor]] = []
    stats: dict[str, list[Tensor]] = {name: [] for name in STATISTICS}
    for k in range(run.n_steps):
        through = run.differentiable is True or (
            run.differentiable == "last" and k == run.n_steps - 1
        )
        if run.differentiable is not True:
            xs = [x.detach() for x in xs]
        ys = [
            x + column(run.noise[k], x) * z[k] if noise_first else x
            for x, z in zip(xs, run.xi, strict=True)
        ]
        if run.clamp and run.options["clamp_when"] in ("noise", "both"):
            ys = [y.clamp(*run.clamp) for y in ys]
        leaves = [y if y.requires_grad else y.requires_grad_() for y in ys]
        if run.low:  # the model reads the state in low precision
            leaves = [y.detach().bfloat16().requires_grad_() for y in ys]
        u = energy(tuple(leaf.double() for leaf in leaves), breaks=run.breaks)
        gs = [g.double() for g in torch.autograd.grad(u.sum(), leaves, create_graph=through)]
        finite = torch.stack([rows(g).isfinite().all(1) for g in gs]).all(0)
        stats["energy"].append(u.detach())
        stats["grad_norm"].append(per_chain_norm(gs).detach())
        stats["nonfinite"].append(sum(rows(~g.isfinite()).sum(1) for g in gs))
        if masked:
            active = active & finite
        changed = [torch.zeros_like(g, dtype=torch.bool) for g in gs]
        if limit := run.clips.get("grad_clip"):
            changed = [g.abs() > limit for g in gs]
            gs = [g.clamp(-limit, limit) for g in gs]
        if limit := run.clips.get("grad_norm"):
            norm = per_chain_norm(gs)
            gs = [g * column((limit / norm).clamp(max=1), g) for g in gs]
        ends, clamped = [], []
        for j, (y, g, z) in enumerate(zip(ys, gs, run.xi, strict=True)):
            a = column(run.drift[k], y)
            d = a * g + a * run.decay * y
            if run.pull is not None:
                d = d + a * column(run.pull, y) * (y - run.x_ref[j])
            if limit := run.clips.get("step_clip"):
                changed[j] = changed[j] | (d.abs() > limit)
                d = d.clamp(-limit, limit)
            free = y - d if noise_first else y - d + column(run.noise[k], y) * z[k]
            end = free
            when = run.options["clamp_when"]
            last = k == run.n_steps - 1
            if run.clamp and (when in ("step", "both") or (when == "end" and last)):
                end = free.clamp(*run.clamp)
            clamped.append(end != free)
            ends.append(end)
        stats["displacement"].append(
            per_chain_norm([e - y for e, y in zip(ends, ys, strict=True)]).detach()
        )
        stats["clip_fraction"].append(share(changed))
        stats["clamp_fraction"].append(share(clamped))
        stats["active"].append(active)
        xs = (
            [torch.where(column(active, x), e, x) for e, x in zip(ends, xs, strict=True)]
            if masked
            else ends
        )
        states.append(xs)
    return {"xs": xs, "states": states, "stats": stats}


# --- drawing --------------------------------------------------------------------------------------


FORMS = ("float", "list", "steps", "(T,1)", "(1,B)", "(T,B)", "callable", "callable (B,)")


def schedules(n_steps: int, batch: int, low: float, high: float):
    """A schedule in one of its forms, and its values as (T, B)."""

    @st.composite
    def one(draw):
        form = draw(st.sampled_from(FORMS))
        seed = draw(st.integers(0, 2**16))
        values = torch.rand(
            n_steps, batch, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
        )
        table = low + (high - low) * values
        if form == "float":
            return float(table[0, 0]), table[:1, :1].expand(n_steps, batch)
        if form == "(1,B)":
            return table[:1], table[:1].expand(n_steps, batch)
        if form == "(T,B)":
            return table, table
        if form == "callable (B,)":
            return (lambda k: table[k]), table
        steps = table[:, :1]
        given = {"list": steps[:, 0].tolist(), "steps": steps[:, 0], "(T,1)": steps,
                 "callable": lambda k: float(steps[k])}[form]  # fmt: skip
        return given, steps.expand(n_steps, batch)

    return one()


@st.composite
def coefficients(draw, n_steps: int, batch: int):
    """Options that fix drift and noise in one of the four ways, and both as (T, B)."""

    def schedule(low: float, high: float):
        return draw(schedules(n_steps, batch, low, high))

    way = draw(st.sampled_from(["drift, noise", "drift", "step_size"]))
    if way == "drift, noise":
        (drift, a), (noise, s) = schedule(0.02, 0.2), schedule(0.0, 0.3)
        return {"drift": drift, "noise": noise}, a, s
    if way == "drift":
        drift, a = schedule(0.02, 0.2)
        options, s = {"drift": drift}, (2 * a).sqrt()
    else:
        delta, s = schedule(0.1, 0.5)
        options, a = {"step_size": delta}, s * s / 2
    if draw(st.booleans()):
        temperature, tau = schedule(0.0, 2.0)
        options["temperature"] = temperature
        s = s * tau.sqrt()
    return options, a, s


def maybe(draw, strategy):
    return draw(strategy) if draw(st.booleans()) else None


@st.composite
def runs(draw) -> Run:
    n_steps, batch = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    n_tensors = draw(st.sampled_from([1, 1, 2, 3, 4]))
    seed = draw(st.integers(0, 2**16))
    x0 = tuple(0.6 * normals(seed + j, batch, *SIZES[j]) for j in range(n_tensors))
    xi = tuple(normals(seed + 10 + j, n_steps, batch, *SIZES[j]) for j in range(n_tensors))
    options, drift, noise = draw(coefficients(n_steps, batch))
    run = Run(options, {}, x0, xi, n_steps, drift, noise)
    run.kind = draw(st.sampled_from(["energy", "negative", "score"]))
    run.breaks = draw(st.booleans())
    run.in_list = draw(st.sampled_from([list, tuple]))
    for name, low, high in (("grad_clip", 0.1, 2.0), ("grad_norm", 0.3, 3.0),
                            ("step_clip", 0.01, 0.3)):  # fmt: skip
        if (limit := maybe(draw, st.floats(low, high))) is not None:
            run.clips[name] = limit
    run.clamp = maybe(draw, st.sampled_from([(-0.5, 0.7), (0.0, 1.0), (-2.0, 0.3)]))
    if (sigma := maybe(draw, st.floats(0.5, 3.0))) is not None:
        options["reference_std"], run.decay = sigma, 1 / sigma**2
    if draw(st.booleans()):
        _draw_pull(draw, run, seed + 20, batch)
    on_nonfinite = st.sampled_from(["freeze"] if run.breaks else ["raise", "freeze", "ignore"])
    run.differentiable = False if run.breaks else draw(st.sampled_from([False, True, "last"]))
    noise_first = draw(st.booleans())
    clamp_when = ["step", "end", *(["noise", "both"] if noise_first else [])]
    options.update(
        **run.clips,
        n_steps=n_steps,
        clamp=run.clamp,
        clamp_when=draw(st.sampled_from(clamp_when)),
        noise_before_gradient=noise_first,
        return_trajectory=draw(st.booleans()),
        thin=draw(st.integers(1, 3)),
        stats=draw(st.booleans()),
        on_nonfinite=draw(on_nonfinite),
        differentiable=run.differentiable,
    )
    run.low = run.differentiable is False and draw(st.sampled_from([False, False, True]))
    if run.low:
        options["autocast"] = torch.bfloat16
    if run.differentiable is True:
        options["checkpoint_every"] = draw(st.sampled_from([None, 1, 3]))
    return run


def _draw_pull(draw, run: Run, seed: int, batch: int) -> None:
    strength = draw(st.sampled_from([0.0, 0.3, None]))
    values = 0.5 * normals(seed, batch).abs() if strength is None else strength
    run.x_ref = tuple(normals(seed + j, *x.shape) for j, x in enumerate(run.x0))
    run.pull = torch.as_tensor(values, dtype=torch.float64).expand(batch)
    at_the_call = draw(st.booleans())
    centre = packed(run, run.x_ref)
    run.options["pull"] = (None if at_the_call else centre, values)
    if at_the_call:
        run.call["x_ref"] = centre


# --- comparing ------------------------------------------------------------------------------------


def packed(run: Run, xs):
    return xs[0] if len(xs) == 1 else run.in_list(xs)


def unpacked(state) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


def make_sampler(run: Run) -> LangevinSampler:
    def u(state):
        return energy(tuple(x.double() for x in unpacked(state)), breaks=run.breaks)

    def score(state):
        with torch.enable_grad():
            xs = [x if x.requires_grad else x.detach().requires_grad_() for x in unpacked(state)]
            value = energy(tuple(x.double() for x in xs), breaks=run.breaks).sum()
            grads = torch.autograd.grad(value, xs, create_graph=run.differentiable is not False)
        return packed(run, [-g for g in grads])

    if run.kind == "score":
        return LangevinSampler(score=score, **run.options)
    if run.kind == "negative":
        return LangevinSampler(lambda s: -u(s)[:, None], negative_energy=True, **run.options)
    return LangevinSampler(u, **run.options)


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def check_statistics(run: Run, stats, expected: dict[str, list[Tensor]]) -> None:
    """A frozen chain's statistics mean nothing, but the step that froze it counts its NaNs."""
    active = torch.stack(expected.pop("active"))
    until = torch.cat([torch.ones_like(active[:1]), active[:-1]])
    for name, values in expected.items():
        got = getattr(stats, name)
        if name == "energy" and run.kind == "score":
            assert got is None
            continue
        assert got.shape == active.shape
        where = until if name == "nonfinite" else active
        assert_same(got[where], torch.stack(values)[where])


@settings(max_examples=120)
@given(runs())
def test_any_combination_equals_the_plain_loop(run: Run) -> None:
    """Supplied normals, float64: equal to rounding, which seven steps enlarge a little."""
    before = [x.clone() for x in run.x0]
    wants = run.differentiable is True
    start = tuple(x.clone().requires_grad_(wants) for x in run.x0)
    out = make_sampler(run)(packed(run, start), xi=packed(run, run.xi), **run.call)
    again = tuple(x.clone().requires_grad_(wants) for x in run.x0)
    expected = plain_chain(run, again)

    assert type(out.x) is (Tensor if len(run.x0) == 1 else run.in_list)
    for x, other in zip(unpacked(out.x), expected["xs"], strict=True):
        assert_same(x, other)
    thin, kept = run.options["thin"], expected["states"]
    if run.options["return_trajectory"]:
        for j, states in enumerate(unpacked(out.trajectory)):
            assert states.shape == (run.n_steps // thin, *run.x0[j].shape)
            for row, state in zip(states, kept[thin - 1 :: thin], strict=True):
                assert_same(row, state[j])
    else:
        assert out.trajectory is None
    if run.options["stats"]:
        check_statistics(run, out.stats, expected["stats"])
    else:
        assert out.stats is None
    assert all(map(torch.equal, start, before))
    if wants:
        losses = [sum(x.sin().sum() for x in unpacked(state)) for state in (out.x, expected["xs"])]
        grads = torch.autograd.grad(losses[0], start)
        for a, b in zip(grads, torch.autograd.grad(losses[1], again), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
