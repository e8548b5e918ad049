"""A training does not depend on torch's modes and defaults, which are the caller's."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from coop_runs import tiny
from torch import Tensor

from coopflow_ext import Key, coop
from coopflow_ext.coop.model import EventSpec
from coopflow_ext.coop.study.diagnose import diagnose_run
from coopflow_ext.coop.study.evaluate import evaluate_run
from coopflow_ext.coop.study.experiments import reconstruct_run


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def trained(
    mode: AbstractContextManager[object], out: Path, **settings: object
) -> dict[str, Tensor]:
    with mode:
        coop.train(tiny(**settings), out)
    _, last = coop.RunFolder.open(out).checkpoints()[-1]
    weights: dict[str, Tensor] = coop.CoopFlow.load(last).state_dict()
    return weights


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return trained(nullcontext(), tmp_path_factory.mktemp("usual") / "run")


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("name", MODES)
def test_training_is_the_same_in_every_mode(
    tmp_path: Path, usual: dict[str, Tensor], name: str
) -> None:
    weights = trained(MODES[name](), tmp_path / "run")
    assert weights.keys() == usual.keys()
    assert all(torch.equal(weights[key], value) for key, value in usual.items())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_precision_is_the_same_in_the_callers_autocast(tmp_path: Path, precision: str) -> None:
    """Which keeps casts of weights to its end, when they have long changed."""
    given = {"precision": precision, "flow_precision": precision}
    alone = trained(nullcontext(), tmp_path / "alone", **given)
    inside = trained(MODES["autocast"](), tmp_path / "inside", **given)
    assert all(torch.equal(inside[key], value) for key, value in alone.items())


@pytest.mark.parametrize("name", ["default float64", "inference_mode"])
def test_a_run_is_loaded_and_studied_in_every_mode(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run"
    coop.train(tiny(), run)
    model = coop.CoopFlow.load(run)
    expected, studied = model.sample(4, Key(0)), evaluate_run(run, n=20)
    with MODES[name]():
        model = coop.CoopFlow.load(run)
        assert torch.equal(model.sample(4, Key(0)), expected)
        assert evaluate_run(run, n=20) == studied
        reconstruct_run(run, n=2)
        diagnose_run(run, n=4, factors=(2,))


@pytest.mark.parametrize("flow", ["float32", "bfloat16"])
@pytest.mark.parametrize("energy", ["float32", "bfloat16"])
def test_samples_are_those_of_the_settings_in_the_callers_autocast(flow: str, energy: str) -> None:
    model = coop.CoopFlow.from_config(
        tiny(precision=energy, flow_precision=flow), EventSpec((1, 8, 8), 16)
    )
    expected = model.sample_pairs(4, Key(0))
    with MODES["autocast"]():
        for inside, alone in zip(model.sample_pairs(4, Key(0)), expected, strict=True):
            assert torch.equal(inside, alone)


def test_a_model_is_loaded_in_the_dtype_in_which_it_was_saved(tmp_path: Path) -> None:
    coop.train(tiny(start="buffer", buffer_size=20), tmp_path / "run")
    for dtype in (torch.float64, torch.bfloat16):
        model = coop.CoopFlow.load(tmp_path / "run").to(dtype)
        model.save(tmp_path / "model.safetensors")
        again = coop.CoopFlow.load(tmp_path / "model.safetensors")
        state, expected = again.state_dict(), model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
        assert {p.dtype for p in again.parameters()} == {dtype}
        copied = pickle.loads(pickle.dumps(again))
        assert torch.equal(copied.energy(torch.zeros(1, 1, 8, 8, dtype=dtype)),
                           again.energy(torch.zeros(1, 1, 8, 8, dtype=dtype)))  # fmt: skip


def test_the_callers_modes_are_restored(tmp_path: Path) -> None:
    with default_dtype(torch.float64), torch.no_grad():
        with pytest.raises(ValueError, match="config must be given"):
            coop.train(None, tmp_path / "run")
        assert torch.get_default_dtype() == torch.float64
        assert not torch.is_grad_enabled()


def test_another_default_device_is_refused_at_once(tmp_path: Path) -> None:
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="default device to be the CPU, got meta"),
    ):
        coop.train(tiny(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_models_made_by_several_threads_have_the_weights_of_their_seed() -> None:
    """Both draw from torch's one generator, and leave it, and those of GPUs, as they were."""

    def weights(_: int) -> list[Tensor]:
        model = coop.CoopFlow.from_config(tiny(), EventSpec((1, 8, 8), 17))
        return list(model.state_dict().values())

    expected = weights(0)
    state = torch.random.get_rng_state()
    with (
        mock.patch("torch.cuda.manual_seed_all", side_effect=AssertionError),
        ThreadPoolExecutor(4) as pool,
    ):
        found = list(pool.map(weights, range(24)))
    assert torch.equal(torch.random.get_rng_state(), state)
    for theirs in found:
        assert all(map(torch.equal, theirs, expected))
