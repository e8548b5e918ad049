"""Evaluation and the paper's experiments, through the command line, on a small run."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from coopflow_ext import Key, LangevinSampler, cli, coop
from coopflow_ext.coop import inversion
from coopflow_ext.coop.judge import Judge
from coopflow_ext.coop.pictures import grid
from coopflow_ext.coop.study.evaluate import evaluate_run, export, neighbour_distances
from coopflow_ext.coop.study.experiments import inpaint_run, interpolate_run
from coopflow_ext.data import load
from coopflow_ext.data.dataset import to_bytes
from coopflow_ext.metrics import (
    FeatureStatistics,
    bits_per_dim,
    feature_space,
    frechet_distance,
)
from coopflow_ext.metrics.fid import check_inception_installed, read_statistics
from coopflow_ext.metrics.neighbours import nearest_neighbours
from coopflow_ext.rng import USE_EVALUATION

image_module = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluate") / "run"
    config = coop.TrainConfig.from_dict(
        {
            "preset": "digits-small",
            "flow_options": {"net": "mlp", "couplings": 2, "widths": [16]},
            "energy_options": {"widths": [16]},
            "batch_size": 32,
            "langevin_steps": 3,
            "pretrain_steps": 20,
            "flow_frozen_steps": 5,
            "steps": 10,
            "n_samples": 40,
        }
    )
    coop.train(config, path)
    return path


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_evaluate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "png"
    command = ["evaluate", str(run), "--n", "30", "--export-png", str(folder)]
    command += ["--export-training", str(tmp_path / "training")]
    assert cli.main(command) == 0
    assert '"feature_space": "digit-classifier-64"' in capsys.readouterr().out
    summary = json.loads((run / "evaluation" / "summary.json").read_text())
    assert summary["n"] == summary["fd"]["n"] == summary["fd"]["n_held_out"] == 30
    for name in ("held_out", "flow", "langevin"):
        assert summary["fd"][name] > 0
    assert set(summary["energy"]) == {"data", "proposals", "samples"}
    assert summary["bits_per_dim"] > 0
    assert summary["neighbours"]["smallest_distance_of_samples"] > 0
    assert is_png(run / "evaluation" / "neighbours.png")
    assert is_png(run / "evaluation" / "energies.png")
    files = sorted(p.name for p in folder.iterdir())
    assert files == [f"{i:06d}.png" for i in range(30)]
    assert len(list((tmp_path / "training").iterdir())) == len(load("digits").train)
    pixels = np.array(image_module.open(folder / "000007.png"))
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8
    assert cli.main(command) == 1  # the folder is not empty any more
    assert "must be a new or empty folder" in capsys.readouterr().err


def test_exported_png_hold_the_samples_or_there_is_no_folder(tmp_path: Path) -> None:
    x = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (tmp_path / "png").mkdir()
    export(x, tmp_path / "png")
    pixels = np.array(image_module.open(tmp_path / "png" / "000002.png"))
    assert np.array_equal(pixels, to_bytes(x)[2].permute(1, 2, 0).numpy())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(OSError, match="full"):
        export(x, tmp_path / "full")
    assert sorted(p.name for p in tmp_path.rglob("*.txt")) == ["mine.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "png"]


def test_evaluation_draws_the_same_samples_every_time(run: Path) -> None:
    first, second = evaluate_run(run, n=20), evaluate_run(run, n=20)
    assert first == second
    assert evaluate_run(run, n=20, seed=1)["fd"]["flow"] != first["fd"]["flow"]


def test_the_judge_counts_what_it_has(run: Path, tmp_path: Path) -> None:
    config, data = coop.RunFolder.open(run).config, load("digits")
    model = coop.CoopFlow.load(run)
    few = Judge(dataclasses.replace(data, held_out=data.held_out[:30]), config)
    assert few.n == 30
    _, kinds = few.observe(model, tmp_path / "few.png")
    assert {len(x) for x in kinds.values()} == {30}
    judge = Judge(data, config)
    assert judge.n == config.n_samples == 40
    space, first = feature_space(data), data.decode(data.held_out[:40])
    training = space.statistics(data.decode(data.train))
    values, kinds = judge.observe(model, tmp_path / "picture.png")
    for name, x in zip(("fd_flow", "fd_langevin"), kinds.values(), strict=True):
        assert values[name] == frechet_distance(training, space.statistics(x))
    assert values["bits_per_dim"] == bits_per_dim(model.flow, first, judge.key)
    facts = judge.facts(model)
    assert facts["fd"]["held_out"] == frechet_distance(training, space.statistics(first))
    everything = data.decode(data.held_out)
    assert facts["bits_per_dim"] == bits_per_dim(model.flow, everything, judge.key)
    assert judge.key == Key(config.seed).fold_in(USE_EVALUATION)


def test_evaluation_measures_what_it_says(run: Path) -> None:
    data, model = load("digits"), coop.CoopFlow.load(run)
    summary = evaluate_run(run, n=20)
    training, held_out = data.decode(data.train), data.decode(data.held_out[:20])
    proposals, samples = model.sample_pairs(20, Key(0).fold_in(USE_EVALUATION))
    for name, x in (("data", held_out), ("proposals", proposals), ("samples", samples)):
        u = model.energy(x).detach()
        assert summary["energy"][name].keys() == {"mean", "std"}
        assert summary["energy"][name]["mean"] == pytest.approx(float(u.mean()), rel=1e-5)
        assert summary["energy"][name]["std"] == pytest.approx(float(u.std()), rel=1e-4)
    for name, x in (("held_out", held_out), ("samples", samples)):
        median = nearest_neighbours(x, training)[:, 1].median()
        assert summary["neighbours"][f"median_distance_of_{name}"] == pytest.approx(float(median))
    many = evaluate_run(run, n=len(data.held_out) + 1)
    assert (many["fd"]["n"], many["fd"]["n_held_out"]) == (451, 450)


def test_fid_says_what_is_missing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        import torch_fidelity  # noqa: F401
        import torchmetrics  # noqa: F401
    except ImportError:
        assert cli.main(["evaluate", str(run), "--fid"]) == 1
        assert "pip install 'coopflow-ext[fid]'" in capsys.readouterr().err
    else:
        pytest.skip("torchmetrics and torch-fidelity are here; the message is for where they lack")


def test_fid_says_that_torchvision_does_not_fit_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = {
        "torchmetrics/__init__.py": "",
        "torchmetrics/image/__init__.py": "",
        "torchmetrics/image/fid.py": "",
        "torch_fidelity.py": "raise RuntimeError('operator torchvision::nms does not exist')",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    for name in [
        m for m in sys.modules if m.partition(".")[0] in ("torchmetrics", "torch_fidelity")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    expected = rf"a torchvision made for this torch {re.escape(torch.__version__)}; .*::nms"
    with pytest.raises(ImportError, match=expected):
        check_inception_installed()
    for name in [m for m in sys.modules if m.partition(".")[0] == "torchmetrics"]:
        del sys.modules[name]


def test_fid_code_path_with_features_of_our_own(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics", reason="FID is computed by torchmetrics")
    data = load("digits")
    samples = coop.CoopFlow.load(run).sample(20, Key(0).fold_in(USE_EVALUATION))
    statistics = [
        FeatureStatistics.of(Corners()(to_bytes(x)))
        for x in (data.decode(data.train), samples.detach())
    ]
    want = frechet_distance(*statistics)
    own = evaluate_run(run, n=20, inception=True, fid_features=Corners())
    assert own["fid"] == pytest.approx(want, rel=1e-6)
    assert own["fid_of"] == "training images"
    file = tmp_path / "stats.npz"
    np.savez(file, mu=statistics[0].mean.numpy(), sigma=statistics[0].covariance.numpy())
    stored = evaluate_run(run, n=20, fid_stats=file, fid_features=Corners())
    assert stored["fid"] == pytest.approx(want, rel=1e-6)
    assert stored["fid_of"] == str(file)


class Corners(torch.nn.Module):
    """Four grey values: features of our own in the place of the Inception network's."""

    num_features = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0, 2:6:3, 2:6:3].flatten(1).double()


def test_fid_statistics_that_are_none(tmp_path: Path) -> None:
    file = tmp_path / "stats.npz"
    with pytest.raises(ValueError, match=r"fid_stats .* cannot be read as an .npz file with mu"):
        read_statistics(file)
    np.savez(file, mu=np.zeros(3))
    with pytest.raises(ValueError, match=r"cannot be read as an .npz file with mu and sigma"):
        read_statistics(file)
    np.savez(file, mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"mu \(d,\) and sigma \(d, d\), got \(3,\) and \(2, 2\)"):
        read_statistics(file)
    for sigma, message in (
        (np.full((2, 2), np.nan), "must be finite"),
        (np.array([[1.0, 2.0], [0.0, 1.0]]), "must have a symmetric sigma"),
        (np.eye(2) * 1j, "cannot be read"),
    ):
        np.savez(file, mu=np.zeros(2), sigma=sigma)
        with pytest.raises(ValueError, match=message):
            read_statistics(file)


def test_images_become_bytes_as_in_a_png() -> None:
    x = torch.tensor([-1.0, 1.0, 0.0, 2.0]).view(1, 1, 2, 2)
    assert to_bytes(x).shape == (1, 3, 2, 2)
    assert to_bytes(x)[0, 2].flatten().tolist() == [0, 255, 128, 255]


def test_a_grid_has_every_image_at_its_place() -> None:
    """On white, enlarged by whole factors to 32 pixels or more, borders of 2 pixels between."""
    x = torch.linspace(-1, 0.5, 5).view(5, 1, 1, 1).expand(5, 3, 12, 12)
    picture, tiles = grid(x, 2), to_bytes(x)[:, 0, 0, 0].tolist()
    assert picture.shape == (3 * 38, 2 * 38, 3)
    for i, tile in enumerate(tiles):
        top, left = i // 2 * 38, i % 2 * 38
        assert (picture[top : top + 36, left : left + 36] == tile).all()
        assert (picture[top + 36 : top + 38] == 255).all()
    assert (picture[76:, 38:] == 255).all()
    assert grid(x[:4], 2).shape == (2 * 38, 2 * 38, 3)
    assert grid(x.expand(5, 3, 12, 12).repeat(1, 1, 3, 3), 5).shape == (38, 5 * 38, 3)


def test_nearest_neighbours() -> None:
    training = torch.tensor([[0.0, 0.0], [3.0, 4.0], [9.0, 9.0]])
    x = torch.tensor([[3.0, 4.0], [0.0, 1.0], [8.0, 9.0]])
    found = nearest_neighbours(x, training, batch_size=2)
    assert found[:, 0].tolist() == [1, 0, 2]
    assert found[:, 1].tolist() == pytest.approx([0, 1, 1])
    images = torch.rand(60, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert bool((nearest_neighbours(images, images)[:, 1] == 0).all())  # of copies


def test_every_sample_is_shown_beside_its_nearest_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, shown = load("digits"), {}
    rows = torch.arange(20) * 7 + 3
    copies = data.decode(data.train[rows])
    monkeypatch.setattr(
        "coopflow_ext.coop.study.evaluate.save_panels",
        lambda _, panels, **options: shown.update(panels),
    )
    found = neighbour_distances(data, copies, copies[:2], tmp_path / "n.png")
    assert set(found.values()) == {0.0}
    (pairs,) = shown.values()
    assert torch.equal(pairs, copies[:16].repeat_interleave(2, 0))


def test_reconstruct_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reconstruct", str(run), "--n", "4"]) == 0
    errors = json.loads((run / "reconstruct" / "errors.json").read_text())
    assert len(errors["errors"]) == 4
    assert errors["steps"] == 200
    assert errors["step_size"] == coop.RunFolder.open(run).config.step_size
    assert errors["error_per_pixel"] < errors["error_per_pixel_of_flow_proposals"]
    assert is_png(run / "reconstruct" / "reconstruct.png")
    assert json.loads(capsys.readouterr().out)["n"] == 4


def test_inpaint_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.ones((8, 8), dtype=bool)
    mask[2:4, 3:6] = False
    np.save(tmp_path / "mask.npy", mask)
    arguments = ["inpaint", str(run), "--n", "2", "--chains", "2", "--mask"]
    assert cli.main([*arguments, str(tmp_path / "mask.npy")]) == 0
    errors = json.loads((run / "inpaint" / "errors.json").read_text())
    assert errors["unknown_pixels"] == 6
    assert errors["best_of_chains"] <= errors["error_per_unknown_pixel"]
    assert is_png(run / "inpaint" / "inpaint.png")
    capsys.readouterr()
    np.save(tmp_path / "whole.npy", np.ones_like(mask))
    assert cli.main([*arguments, str(tmp_path / "whole.npy")]) == 1
    assert "mask must leave a pixel unknown" in capsys.readouterr().err
    np.save(tmp_path / "small.npy", mask[:4])
    assert cli.main([*arguments, str(tmp_path / "small.npy")]) == 1
    assert "mask must have shape (8, 8)" in capsys.readouterr().err
    np.save(tmp_path / "three.npy", mask[None])
    assert cli.main([*arguments, str(tmp_path / "three.npy")]) == 1
    assert "mask must have shape (8, 8), got (1, 8, 8)" in capsys.readouterr().err
    np.save(tmp_path / "numbers.npy", mask.astype(float))
    assert cli.main([*arguments, str(tmp_path / "numbers.npy")]) == 1
    assert "must be bool, got float64" in capsys.readouterr().err
    (tmp_path / "text.npy").write_text("no array")
    assert cli.main([*arguments, str(tmp_path / "text.npy")]) == 1
    assert "cannot be read as a .npy array" in capsys.readouterr().err


def test_the_error_of_a_filling_is_that_of_the_hole(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, known = load("digits"), inversion.centre_hole(8, 8)
    observed = data.decode(data.held_out[:2])
    filled = torch.stack((observed + 0.1 * ~known, observed + 0.3 * ~known), 1)
    filled[1, 0, 0, 3, 3] += 0.2
    seen = {}

    def inpaint(model: object, x: torch.Tensor, known: torch.Tensor, key: Key, **options: object):
        seen.update(observed=x, known=known, key=key, **options)
        return filled

    monkeypatch.setattr(inversion, "inpaint", inpaint)
    errors = inpaint_run(run, n=2, chains=2, seed=5)
    assert torch.equal(seen["observed"], observed)
    assert torch.equal(seen["known"], known)
    assert (seen["key"], seen["chains"]) == (Key(5), 2)
    assert errors["unknown_pixels"] == 16
    changed = 0.01 + (0.3**2 - 0.1**2) / 16
    assert errors["error_per_unknown_pixel"] == pytest.approx((0.01 + changed + 2 * 0.09) / 4)
    assert errors["best_of_chains"] == pytest.approx((0.01 + changed) / 2)


def test_interpolate_command(run: Path) -> None:
    arguments = ["interpolate", str(run), "--n", "2", "--points", "5", "--step-size", "0.4"]
    assert cli.main(arguments) == 0
    errors = json.loads((run / "interpolate" / "errors.json").read_text())
    assert errors["step_size"] == 0.4
    assert errors["largest_difference_of_ends_to_reconstructions"] < 0.02
    assert is_png(run / "interpolate" / "images.png")
    assert is_png(run / "interpolate" / "random.png")


def test_bad_requests(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = len(load("digits").held_out)
    assert cli.main(["reconstruct", str(run), "--n", str(held_out + 1)]) == 1
    assert f"n must be in [1, {held_out}]" in capsys.readouterr().err
    assert cli.main(["interpolate", str(run), "--n", str(held_out)]) == 1
    assert f"n must be in [1, {held_out // 2}], got {held_out}" in capsys.readouterr().err
    assert cli.main(["inpaint", str(run), "--chains", "0"]) == 1
    assert "chains must be ≥ 1, got 0" in capsys.readouterr().err
    assert cli.main(["evaluate", str(run), "--n", "1"]) == 1
    assert "n must be ≥ 2, got 1" in capsys.readouterr().err


@pytest.mark.parametrize("study", ["evaluate", "reconstruct", "inpaint", "interpolate", "diagnose"])
def test_a_study_that_could_not_be_written_is_not_begun(
    run: Path, tmp_path: Path, study: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=lambda *_: [study, "evaluation"])
    (copy / {"evaluate": "evaluation"}.get(study, study)).write_text("in the way")
    with mock.patch.object(LangevinSampler, "__call__", side_effect=AssertionError("begun")):
        assert cli.main([study, str(copy)]) == 1
    assert re.search(r"File exists: '.*run/", capsys.readouterr().err)


def test_what_a_command_prints_is_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["evaluate", "-n", "4"], ["reconstruct", "-n", "2"], ["inpaint", "-n", "1"]):
        assert cli.main([command[0], str(run), *command[1:]]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert all((run / printed[name]).is_file() for name in ("picture",) if name in printed)


def test_export_into_a_linked_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    export(torch.zeros(2, 1, 4, 4), tmp_path / "link")
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["000000.png", "000001.png"]
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileExistsError, match="must be another folder than the working directory"):
        evaluate_run(tmp_path, export_png=Path("."))


def test_points_of_a_line_are_counted_before_the_search(run: Path) -> None:
    with (
        mock.patch.object(inversion, "reconstruct", side_effect=AssertionError("begun")),
        pytest.raises(ValueError, match="points must be ≥ 2, got 1"),
    ):
        interpolate_run(run, points=1)


def test_lines_of_random_samples_begin_without_dropout(run: Path) -> None:
    asked = []
    original = coop.CoopFlow.propose

    def propose(self: coop.CoopFlow, *args: Any) -> torch.Tensor:
        asked.append(self.training)
        return original(self, *args)

    with mock.patch.object(coop.CoopFlow, "propose", propose):
        interpolate_run(run, n=1, points=2)
    assert asked
    assert not any(asked)


def test_masks_that_are_no_array(run: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "mask.npz", a=np.ones((8, 8), bool))
    with pytest.raises(ValueError, match=r"mask.npz must be one .npy array"):
        inpaint_run(run, mask=tmp_path / "mask.npz")
    (tmp_path / "mask.npy").touch()
    with pytest.raises(ValueError, match=r"mask .*mask.npy cannot be read as a .npy array"):
        inpaint_run(run, mask=tmp_path / "mask.npy")
