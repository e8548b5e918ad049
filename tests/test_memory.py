"""Memory stays flat: after a warm-up a call leaves no byte behind. The long form is soak.py."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from soak import bytes_in_use

import coopflow_ext as cf
from coopflow_ext import flows
from coopflow_ext.energies import DoubleWellEnergy, MLPEnergy

X0 = torch.zeros(32, 2)


def sampler(energy: Any, **options: Any) -> Callable[[int], object]:
    chain = cf.LangevinSampler(energy, n_steps=4, step_size=0.1, **options)
    return lambda i: chain(X0, key=cf.Key(i))


def refused(i: int) -> None:
    with pytest.raises(ValueError, match="grad"):
        cf.ops.langevin_step_(X0, X0[:1], cf.Key(i).tensor(), drift=0.1)


def flow_step() -> Callable[[int], object]:
    flow = flows.realnvp(dim=2, couplings=2, widths=(8,))
    flow.initialize(torch.randn(16, 2))

    def step(i: int) -> None:
        flow.zero_grad()
        flow.log_prob(X0, key=cf.Key(i)).sum().backward()
        flow.sample(4, cf.Key(i))

    return step


CALLS: dict[str, Callable[[], Callable[[int], object]]] = {
    "chain in one kernel": lambda: sampler(MLPEnergy(2, (8, 8))),
    "closed form": lambda: sampler(DoubleWellEnergy(1.0)),
    "steps": lambda: sampler(MLPEnergy(2, (8, 8)), kernel=False),
    "statistics": lambda: sampler(
        MLPEnergy(2, (8, 8)), kernel=False, stats=True, return_trajectory=True, grad_norm=1.0
    ),
    "noise first": lambda: sampler(
        MLPEnergy(2, (8, 8)), kernel=False, noise_before_gradient=True, on_nonfinite="freeze"
    ),
    "differentiable": lambda: sampler(MLPEnergy(2, (8, 8)), differentiable=True),
    "autocast": lambda: sampler(MLPEnergy(2, (8, 8)), kernel=False, autocast=torch.bfloat16),
    "refused": lambda: refused,
    "flow step": flow_step,
}


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """What there is already is not looked through again at each collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_leaves_no_byte_behind(name: str) -> None:
    """Least of several rounds: what other threads of the process do at the time is not the call's.
    A leak of one object a call would be at least 16 bytes in every round."""
    call, n = CALLS[name](), 40
    for i in range(20):
        call(i)
    grown = []
    for _ in range(5):
        before = bytes_in_use()
        for i in range(n):
            call(i)
        gc.collect()
        grown.append(bytes_in_use() - before)
    assert min(grown) < 16 * n, grown
