"""A step that does not fit the memory names the batch and what would help."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_coop_train import tiny

from coopflow_ext.cli import main
from coopflow_ext.coop.memory import naming_memory, savings
from coopflow_ext.coop.trainer import Trainer
from coopflow_ext.data import load


def test_out_of_memory_names_the_batch_and_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")

    monkeypatch.setattr(Trainer, "_take_step", too_large)
    trainer = Trainer(tiny(), load("digits"), "cpu")
    with pytest.raises(torch.OutOfMemoryError) as refused:
        trainer.train_step()
    message = str(refused.value)
    for part in ("batch_size 16", "bfloat16", "accumulate above 1", "recompute", "3.00 GiB"):
        assert part in message
    assert trainer.step == 0


def test_on_a_cpu_too() -> None:
    expected = pytest.raises(torch.OutOfMemoryError, match="batch_size 16; less is taken with")
    with expected, naming_memory(tiny()):
        torch.empty(2**45)


def test_other_errors_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^something else$"), naming_memory(tiny()):
        raise RuntimeError("something else")


def test_what_is_on_already_is_not_advised() -> None:
    config = tiny(
        precision="bfloat16", flow_precision="bfloat16", accumulate=16,
        flow_options={"net": "mlp", "recompute": True},
    )  # fmt: skip
    assert savings(config) == ["batch_size below 16"]


def test_the_command_says_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "_take_step", too_large)
    arguments = ["train", "--data", "digits", "--preset", "digits-small"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.strip()
    assert "batch_size" in error.splitlines()[-1]
