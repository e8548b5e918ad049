"""The benchmark suite: its method, its files, and what it says to bad input."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

harness = pytest.importorskip("harness", reason="needs the source tree's benchmarks/")
import compare  # noqa: E402
import report  # noqa: E402
import suite  # noqa: E402

from coopflow_ext import cli  # noqa: E402

CPU = torch.device("cpu")
LIMITS = {"copy_bytes_per_second": 1e10, "matmul_flops_per_second": 1e11}


def work(a: torch.Tensor) -> None:
    a.sin()


def make_case(name: str = "toy/fp32/64x64", check: Any = lambda: None) -> Any:
    def build(device: torch.device, with_compile: bool) -> Any:
        a = torch.rand(64, 64, device=device)
        runs = {"ours": lambda: work(a), "twin": lambda: work(a)}
        gaps = {"absent": "not installed"}
        return harness.Contest(runs, check, {"ours": 8 * a.numel()}, gaps)

    return harness.Case(name, build, 64 * 64, quick=True)


@pytest.fixture
def toy_suite(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    cases = [make_case("toy/fp32/64x64"), make_case("toy/fp32/other")]
    monkeypatch.setattr(suite, "all_cases", lambda: cases)
    monkeypatch.setattr(suite, "measured_limits", lambda *_: LIMITS)
    tiny = harness.Effort(rounds=3, sample_seconds=1e-4, with_compile=False)
    monkeypatch.setattr(suite, "QUICK", tiny)
    return cases


def test_equal_functions_have_ratio_one() -> None:
    # P(20th percentile of 41 fair pairs is above 1) = P(Binomial(41, ½) ≤ 8) < 1e-4, and as much
    # on the other side: only a bias beyond the resolution fails this, however noisy the machine.
    effort = harness.Effort(rounds=41, sample_seconds=2e-4)
    records, _ = harness.measure(make_case(), CPU, effort, LIMITS)
    (twin,) = (r for r in records if r["name"] == "twin")
    ratio = twin["extra_info"]["ratio_to_ours"]
    assert ratio["p20"] <= 1 + harness.RESOLUTION
    assert ratio["p80"] >= 1 - harness.RESOLUTION


def test_a_slower_function_is_seen() -> None:
    def build(device: torch.device, with_compile: bool) -> Any:
        a = torch.rand(64, 64)
        runs = {"ours": lambda: work(a), "slow": lambda: [work(a) for _ in range(10)]}
        return harness.Contest(runs, lambda: None)

    effort = harness.Effort(rounds=21, sample_seconds=5e-4)
    records, _ = harness.measure(harness.Case("toy", build, 64 * 64), CPU, effort, LIMITS)
    assert records[1]["extra_info"]["ratio_to_ours"]["p20"] > 2


def test_a_wrong_result_is_a_failure() -> None:
    def wrong() -> None:
        raise AssertionError("twin: off by one")

    with pytest.raises(harness.WrongResultError, match="off by one"):
        harness.measure(make_case(check=wrong), CPU, harness.QUICK, LIMITS)


def test_cold_cases_work_beyond_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "cache_bytes", lambda _: 64 * 64 * 8)
    case = make_case()
    contest = case.build(CPU, False)
    assert harness.copies_beyond_cache(case, contest, CPU) == 1
    cold = harness.Case("toy", case.build, 64 * 64, cold=True)
    assert harness.copies_beyond_cache(cold, contest, CPU) == 5
    seen: list[int] = []
    run = harness.in_rotation([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(4):
        run()
    assert seen == [0, 1, 2, 0]


def test_the_checks_find_wrong_updates() -> None:
    import bench_langevin

    x, grad = torch.rand(64, 256), torch.randn(64, 256)

    def step(drift: float, noise: float, limit: float) -> Any:
        def run() -> None:
            x.sub_(drift * grad).add_(noise * torch.randn_like(x)).clamp_(-limit, limit)

        return run

    bench_langevin.check({"right": step(0.1, 0.1, 1)}, x, grad)
    for wrong in ((-0.1, 0.1, 1), (0.1, 0.12, 1), (0.1, 0.1, 2)):
        with pytest.raises(AssertionError, match="wrong"):
            bench_langevin.check({"wrong": step(*wrong)}, x, grad)


@pytest.mark.parametrize(
    "name",
    [
        "langevin/fp32/1024x2",
        "langevin/bf16/256x3072",
        "affine_coupling/forward+backward/fp32/256x1536",
        "affine_coupling/inverse/fp32/256x1536",
        "affine_coupling/forward/bf16/256x1536",
        "mixture_logistic/inverse/K32/16384",
        "chain/mixture, closed form",
        "flowpp/sampling/digits/64",
        "coop/digits-small",
    ],
)
def test_cases_give_right_results(name: str, device: torch.device) -> None:
    (case,) = (c for c in suite.all_cases() if c.name == name)
    if device.type not in case.devices:
        pytest.skip(f"measured on {', '.join(case.devices)} only")
    contest = harness.checked(case, device, with_compile=False)
    assert next(iter(contest.runs)) == "ours"
    for run in contest.runs.values():
        run()


def test_names_are_unique_and_cover_every_family() -> None:
    names = [c.name for c in suite.all_cases()]
    assert len(set(names)) == len(names)
    assert {n.partition("/")[0] for n in names} >= {
        "langevin", "affine_coupling", "mixture_logistic", "chain", "flowpp", "coop",
    }  # fmt: skip


@pytest.mark.usefixtures("toy_suite")
def test_results_are_in_pytest_benchmarks_format(tmp_path: Path) -> None:
    suite.run(quick=True, out=tmp_path / "new", cases=["toy/fp32/64x64"])
    written = report.load(tmp_path / "new" / "results.json")
    for field in ("machine_info", "commit_info", "benchmarks", "datetime", "version"):
        assert field in written
    ours, twin = written["benchmarks"]
    fields = {"min", "max", "mean", "stddev", "median", "iqr", "q1", "q3", "ops", "rounds"}
    assert fields | {"p20", "p80", "iterations"} <= ours["stats"].keys()
    assert ours["group"] == twin["group"] == "toy/fp32/64x64"
    bandwidth = 8 * 4096 / ours["stats"]["median"]
    assert ours["extra_info"]["share_of_copy"] == pytest.approx(bandwidth / 1e10)
    assert written["not_measured"][0]["reason"] == "not installed"
    assert "not measured: not installed" in report.table(written)


def test_an_interrupted_run_keeps_what_it_finished(
    toy_suite: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(device: torch.device, with_compile: bool) -> Any:
        raise KeyboardInterrupt

    whole = toy_suite[1]
    toy_suite[1] = harness.Case(whole.name, interrupt, 1, quick=True)
    assert suite.main(["--quick", "--out", str(tmp_path)]) == 130
    assert "1 finished cases are in" in capsys.readouterr().err
    path = tmp_path / "results.json"
    first = report.load(path)
    assert first["finished"] == [toy_suite[0].name]
    toy_suite[1] = whole
    assert suite.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "--resume" in capsys.readouterr().err
    assert suite.main(["--quick", "--out", str(tmp_path), "--resume"]) == 0
    second = report.load(path)
    assert second["finished"] == [c.name for c in toy_suite]
    assert second["benchmarks"][:2] == first["benchmarks"]


@pytest.mark.usefixtures("toy_suite")
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="case must match one of toy"):
        suite.run(quick=True, cases=["nothing/*"])
    with pytest.raises(ValueError, match="device must be cpu or cuda"):
        suite.run("meta")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out cannot be written"):
        suite.run(quick=True, out=tmp_path / "file")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA here"):
            suite.run("cuda")
        assert cli.main(["bench", "--device", "cuda"]) == 1
        assert "no CUDA" in capsys.readouterr().err


@pytest.mark.usefixtures("toy_suite")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert "toy/fp32/other" in capsys.readouterr().out
    assert (tmp_path / "results.json").is_file()
    assert "| toy/fp32/64x64 | twin |" in (tmp_path / "table.md").read_text()


@pytest.fixture
def measured(toy_suite: list[Any]) -> Any:
    return suite.run(quick=True)


def set_ratio(result: Any, low: float, middle: float, high: float) -> None:
    for record in result["benchmarks"]:
        if record["name"] == "twin":
            record["extra_info"]["ratio_to_ours"] = {"p20": low, "median": middle, "p80": high}


def test_compare_tells_regressions_from_noise(
    measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    set_ratio(measured, 4.5, 5.0, 5.5)
    noisy, slower = copy.deepcopy(measured), copy.deepcopy(measured)
    set_ratio(noisy, 4.2, 4.4, 4.6)
    set_ratio(slower, 3.0, 3.2, 4.4)
    assert compare.regressions(measured, noisy) == []
    assert compare.regressions(measured, slower) == [
        "toy/fp32/64x64: twin / ours went from 5.00 to 3.20",
        "toy/fp32/other: twin / ours went from 5.00 to 3.20",
    ]
    paths = [tmp_path / "base.json", tmp_path / "new.json"]
    for path, result in zip(paths, (measured, slower), strict=True):
        path.write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, paths)])
    assert compare.main() == 1
    paths[1].write_text("{")
    assert compare.main() == 2
    assert "cannot be read as results" in capsys.readouterr().err


def test_plots(measured: Any, tmp_path: Path) -> None:
    report.write(measured, tmp_path)
    for name in ("ratios.png", "sizes.png", "roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_readme_agrees_with_the_committed_results() -> None:
    text = report.README.read_text()
    assert report.with_block(text, report.readme_block(report.committed())) == text


def test_readme_needs_its_markers(measured: Any) -> None:
    with pytest.raises(ValueError, match="must hold"):
        report.with_block("no markers", "block")
    block = report.readme_block({"toy": measured})
    text = report.with_block(f"a\n{report.BEGIN}\nold\n{report.END}\nb", block)
    assert "old" not in text
    assert text.endswith(f"GPU: not measured.\n{report.END}\nb")
