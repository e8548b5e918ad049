"""The command line, as a user runs it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from coop_runs import tiny
from torch.distributed.run import get_args_parser

from coopflow_ext import Key, cli, coop
from coopflow_ext.coop import Trainer

SMALL = [
    *("--data", "digits", "--pretrain-steps", "2", "--steps", "4", "--batch-size", "16"),
    *("--langevin-steps", "2", "--n-samples", "20"),
]
OPTIONS = [
    "--flow-options",
    '{"net": "mlp", "couplings": 2, "widths": [8]}',
    "--energy-options",
    '{"widths": [8]}',
]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coopflow_ext", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    out = tmp_path_factory.mktemp("cli") / "run"
    result = run("train", "--out", str(out), *SMALL, *OPTIONS)
    assert result.returncode == 0, result.stderr
    return out, result.stdout, result.stderr


def test_train_prints_the_table_and_the_place_of_the_picture(
    trained: tuple[Path, str, str],
) -> None:
    out, printed, errors = trained
    assert "Fréchet distance to the training data (digit-classifier-64 features, 20 samples" in (
        printed
    )
    for row in ("held-out data", "after Langevin", "flow proposal", "flow proposal at step 0"):
        assert row in printed
    assert f"picture: {out / 'samples' / 'step-0000006.png'}" in printed
    assert errors == ""  # no progress bar where there is no terminal


def test_resume_with_more_steps(trained: tuple[Path, str, str]) -> None:
    out, _, _ = trained
    assert cli.main(["train", "--out", str(out), "--resume", "--steps", "5"]) == 0
    assert (out / "samples" / "step-0000007.png").exists()


def test_resume_auto_begins_a_run_and_continues_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command for those who are started again, by a scheduler or by torchrun."""
    out, original = tmp_path / "run", Trainer.train_step
    command = ["train", "--out", str(out), *SMALL, *OPTIONS, "--resume", "auto"]

    def train_step(self: Trainer) -> object:
        if self.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        assert cli.main(command) == 130
    assert "stopped at step 4 and saved" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert coop.RunFolder.open(out).is_finished
    steps = [line["step"] for line in coop.RunFolder.open(out).metrics()]
    assert steps == sorted(steps)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--out", str(out), "--resume", "maybe"])
    assert stopped.value.code == 2
    assert "argument --resume: invalid choice: 'maybe'" in capsys.readouterr().err


def test_resume_at_other_rates(
    trained: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, _ = trained
    asked = []
    monkeypatch.setattr(coop, "train", lambda config, *_, **__: asked.append(config))
    command = ["train", "--out", str(out), "--resume", "--lr", "1e-5"]
    assert cli.main(command) == 0
    assert cli.main([*command, "--flow-lr", "2e-5"]) == 0
    before = coop.RunFolder.open(out).config
    rates = {"pretrain_lr": 1e-5, "flow_lr": 1e-5, "energy_lr": 1e-5}
    assert asked[0] == dataclasses.replace(before, **rates)
    assert asked[1] == dataclasses.replace(before, **{**rates, "flow_lr": 2e-5})


def test_resume_refuses_another_preset(
    trained: tuple[Path, str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, _, _ = trained
    command = ["train", "--out", str(out), "--resume"]
    assert cli.main([*command, "--preset", "patches-small"]) == 1
    assert "was made with data='digits'; --resume cannot change it" in capsys.readouterr().err
    # The command that made the run, with --resume at its end, goes on; so do settings in pairs.
    asked = []
    monkeypatch.setattr(coop, "train", lambda config, *_, **__: asked.append(config))
    betas = ["--flow-betas", "0.9", "0.999"]
    assert cli.main([*command, "--preset", "digits-small", *SMALL, *OPTIONS, *betas]) == 0
    assert asked[0].langevin_steps == 2
    assert asked[0] == dataclasses.replace(coop.RunFolder.open(out).config, steps=4)


def test_sample(trained: tuple[Path, str, str], tmp_path: Path) -> None:
    out, _, _ = trained
    assert cli.main(["sample", str(out), "--n", "9", "--out", str(tmp_path / "s.png")]) == 0
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["sample", str(out), "-n", "9", "--out", str(tmp_path / "s.npy")]) == 0
    numbers = np.load(tmp_path / "s.npy")
    assert numbers.shape == (9, 1, 8, 8)
    assert np.abs(numbers).max() <= 1


def test_sample_writes_the_results_of_its_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = coop.CoopFlow.from_config(tiny(), coop.model.EventSpec((1, 8, 8), 17))
    file, out = tmp_path / "model.safetensors", tmp_path / "s.npy"
    model.save(file)
    assert cli.main(["sample", str(file), "-n", "3", "--seed", "5", "--out", str(out)]) == 0
    proposals, results = model.sample_pairs(3, Key(5))
    assert np.array_equal(np.load(out), results.numpy())
    shown = {}
    monkeypatch.setattr(cli.pictures, "save_panels", lambda _, panels: shown.update(panels))
    assert cli.main(["sample", str(file), "-n", "3", "--out", str(tmp_path / "s.png")]) == 0
    proposals, results = model.sample_pairs(3, Key(0))
    assert list(shown) == ["flow proposal", "after Langevin"]
    assert torch.equal(shown["flow proposal"], proposals)
    assert torch.equal(shown["after Langevin"], results)


def test_every_option_of_a_study_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, object]] = []

    def study(run: Path, *, n: int = 0, **options: object) -> dict[str, object]:
        given.append({"run": run, "n": n, **options})
        return {}

    for name in ("reconstruct_run", "inpaint_run", "interpolate_run"):
        monkeypatch.setattr(cli.experiments, name, study)
    for name in ("evaluate_run", "diagnose_run"):
        monkeypatch.setattr(cli, name, study)
    common = ["RUN", "-n", "7", "--seed", "3", "--device", "cpu"]
    always = {"run": Path("RUN"), "n": 7, "seed": 3, "device": "cpu"}
    step, long, where = ["--step-size", "0.1"], ["--long", "2", "3"], ["--export-png", "a"]
    where += ["--export-training", "b", "--fid-stats", "c", "--fid"]
    for name, words, expected in (
        ("reconstruct", step, {"step_size": 0.1}),
        ("inpaint", [*step, "--chains", "2", "--mask", "m"], {"step_size": 0.1, "chains": 2,
                                                               "mask": Path("m")}),
        ("interpolate", [*step, "--points", "4"], {"step_size": 0.1, "points": 4}),
        ("diagnose", long, {"factors": (2, 3)}),
        ("evaluate", where, {"export_png": Path("a"), "export_training": Path("b"),
                             "fid_stats": Path("c"), "inception": True}),
    ):  # fmt: skip
        assert cli.main([name, *common, *words]) == 0
        assert given.pop() == {**always, **expected}
    assert cli.main(["inpaint", "RUN"]) == 0
    assert given == [{"run": Path("RUN"), "n": 0, "device": given[0]["device"]}]


def test_one_line_for_an_error_and_a_traceback_on_request(
    trained: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _, _ = trained
    command = ["train", "--out", str(out), *SMALL, *OPTIONS]
    assert cli.main(command) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith(f"coopflow: {out} exists: continue it with --resume")
    with pytest.raises(RuntimeError, match="exists"):
        cli.main([*command, "--debug"])


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["fly"],
        ["train"],
        ["train", "--out", "x", "--steps", "many"],
        ["train", "--out", "x", "--preset", "huge"],
        ["train", "--out", "x", "--flow-options", "[1]"],
        ["sample", "x"],
    ],
)
def test_bad_usage_is_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(args)
    assert stopped.value.code == 2
    assert "usage: coopflow" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--steps", "many"], "argument --steps: must be INT, got 'many'"),
        (["--step-clip", "small"], "argument --step-clip: must be FLOAT|none, got 'small'"),
        (["--flip", "yes"], "argument --flip: must be true|false, got 'yes'"),
        (["--flow-betas", "0.9", "x"], "argument --flow-betas: must be FLOAT, got 'x'"),
        (["--flow-options", "[1]"], "argument --flow-options: must be JSON-OBJECT, got '[1]'"),
        (["--flow-options", '{"a":' * 9999], "argument --flow-options: must be JSON-OBJECT, got"),
    ],
)
def test_usage_says_what_a_setting_may_be(
    option: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--out", "x", *option])
    assert message in capsys.readouterr().err


def test_resume_with_another_preset_is_refused(
    trained: tuple[Path, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _, _ = trained
    resume = ["train", "--out", str(out), "--resume", *OPTIONS]
    assert cli.main([*resume, "--preset", "patches-small"]) == 1
    assert "was made with data='digits'; --resume cannot change it" in capsys.readouterr().err
    assert cli.main([*resume, *SMALL, "--preset", "digits-small", "--steps", "6"]) == 0


def test_a_warning_is_one_line() -> None:
    layout = warnings.formatwarning
    with cli._plain_warnings():
        text = warnings.formatwarning("left out:\n3.png", UserWarning, "folder.py", 131)
        other = warnings.formatwarning("old", DeprecationWarning, "folder.py", 131)
    assert text == "coopflow: warning: left out: 3.png\n"
    assert other.startswith("folder.py:131: DeprecationWarning")
    assert warnings.formatwarning is layout


def test_errors_of_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", str(tmp_path), "--out", str(tmp_path / "s.gif")]) == 1
    assert "out must end in .png or .npy" in capsys.readouterr().err
    assert cli.main(["sample", str(tmp_path), "--out", str(tmp_path / "s.png")]) == 1
    assert "is not a run" in capsys.readouterr().err
    nowhere = tmp_path / "nowhere" / "s.png"
    assert cli.main(["sample", str(tmp_path), "--out", str(nowhere)]) == 1
    assert "out must be in a folder that exists" in capsys.readouterr().err
    command = ["sample", str(tmp_path), "--out", str(tmp_path / "s.png"), "--device", "tpu"]
    assert cli.main(command) == 1
    assert "device must be cpu, cuda, cuda:1, … or auto, got 'tpu'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_bad_setting_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert cli.main(["train", "--out", str(out), "--batch-size", "0"]) == 1
    assert "batch_size must be finite and ≥ 1, got 0" in capsys.readouterr().err
    assert not out.exists()


def test_an_interrupt_is_130(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Trainer.train_step

    def train_step(self: Trainer) -> object:
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    out = tmp_path / "run"
    assert cli.main(["train", "--out", str(out), *SMALL, *OPTIONS]) == 130
    expected = f"stopped at step 4 and saved; go on with: coopflow train --out {out} --resume"
    assert expected in capsys.readouterr().err


def test_an_interrupt_before_anything_was_made_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_device", interrupted)
    assert cli.main(["sample", "run", "--out", "s.png"]) == 130
    assert capsys.readouterr().err == "coopflow: interrupted\n"


@pytest.mark.parametrize("name", ["tpu", "meta", "cuda:99", "cuda:x"])
def test_a_bad_device_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", "run", "--out", "s.png", "--device", name]) == 1
    message = capsys.readouterr().err
    assert "device must be" in message
    assert f"got '{name}'" in message


def test_info_names_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out


# --- under torchrun -------------------------------------------------------------------------------

ROOT = Path(__file__).parent.parent
_COMMAND = re.compile(r"^ *(?:torchrun .*-m coopflow_ext|coopflow) (.+?)(?:  +#.*)?$", re.MULTILINE)


def commands() -> dict[str, argparse.ArgumentParser]:
    (group,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(group.choices)


def documented() -> list[list[str]]:
    """The arguments of every command line in README and docs, without the signs of a synopsis."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    lines = [line for page in pages for line in _COMMAND.findall(page.read_text())]
    return [shlex.split(re.sub(r"[][…]|\|\w+", "", line)) for line in lines]


def under_torchrun(arguments: list[str]) -> list[str]:
    """What reaches the module through torchrun's own parser; SystemExit where that refuses."""
    launch = ["--nproc-per-node", "2", "-m", "coopflow_ext", *arguments]
    parsed = get_args_parser().parse_args(launch)
    assert (parsed.training_script, parsed.nproc_per_node) == ("coopflow_ext", "2")
    return list(parsed.training_script_args)


def test_documented_lines_reach_their_command_also_through_torchrun() -> None:
    lines = documented()
    assert {line[0] for line in lines} >= {"train", "sample", "evaluate", "diagnose", "ablate"}
    required = ["--out", "RUN"]
    for line in lines:
        assert under_torchrun(line) == line
        cli._parser().parse_args(line if line[0] != "train" or "--out" in line else line + required)


def test_every_option_has_a_spelling_that_torchrun_lets_through() -> None:
    """And every number of samples the same ones."""
    refused = set()
    for name, parser in commands().items():
        for action in parser._actions:
            through = []
            for option in action.option_strings:
                try:
                    through.append(under_torchrun([name, "RUN", option, "1"])[2])
                except SystemExit:
                    refused.add(option)
            assert action.option_strings[:1] == through[:1]
    assert refused <= {"--n", "--log", "--start"}
    for name in ("sample", "evaluate", "reconstruct", "inpaint", "interpolate", "diagnose"):
        spellings = ("-n", "--n-samples", "--n")
        out = ["--out", "s.png"] if name == "sample" else []
        for option in spellings:
            assert cli._parser().parse_args([name, "RUN", option, "7", *out]).n == 7


def test_both_spellings_of_a_setting_are_that_setting() -> None:
    for option in ("--start", "--chain-start"):
        given = cli._parser().parse_args(["train", "--out", "x", option, "uniform", "-n", "20"])
        assert cli._settings(given) == {"start": "uniform", "n_samples": 20}


def test_switches_of_a_preset_can_be_turned_off(tmp_path: Path) -> None:
    asked = []
    with mock.patch.object(coop, "train", lambda config, *_, **__: asked.append(config)):
        for given in ([], ["--no-flow-restart"], ["--flow-restart"]):
            command = ["train", "--out", str(tmp_path), "--preset", "cifar10-pre", *given]
            assert cli.main(command) == 0
    assert [config.flow_restart for config in asked] == [True, False, True]


def test_an_empty_path_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["train", "--out", ""])
    assert error.value.code == 2
    assert "argument --out: must name a file or folder, got ''" in capsys.readouterr().err


def test_results_are_added_to_those_that_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--resume", "--quick"]) == 1
    assert "--resume must be given with the --out" in capsys.readouterr().err


def test_no_output_or_one_without_the_letters_is_no_reason_to_fail() -> None:
    command = f"{shlex.quote(sys.executable)} -m coopflow_ext"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for line, code, printed in (
        ("reconstruct --help", 0, b"\\u03b4"),
        ("info | true; exit ${PIPESTATUS[0]}", cli.EXIT_UNREAD, b""),
        ("info 2>&- >&-", 0, b""),
    ):
        result = subprocess.run(["bash", "-c", f"{command} {line}"], capture_output=True,
                                env=environment, check=False)  # fmt: skip
        assert (result.returncode, result.stderr) == (code, b"")
        assert printed in result.stdout


def test_another_broken_pipe_is_an_error_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.object(cli.coop, "train", side_effect=BrokenPipeError(32, "Broken pipe")):
        assert cli.main(["train", "--out", str(tmp_path / "run")]) == cli.EXIT_FAILED
    assert "Broken pipe" in capsys.readouterr().err
