"""Every example runs in its smoke mode and prints what it promises."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs an example as a program, in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(name: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, "--smoke"])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_every_example_is_tested():
    tested = set(re.findall(r'run\("(\w+)"\)', Path(__file__).read_text()))
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested


def test_jem_loop(run):
    printed = run("jem_loop")
    before, after = map(float, re.findall(r"chain: before (\S+), after (\S+)", printed)[0])
    assert before == pytest.approx(after, abs=0.05)
    assert re.search(r"before \d+\.\d+ ms, after \d+\.\d+ ms", printed)


def test_density_2d(run):
    pytest.importorskip("matplotlib")
    counts = re.search(r"modes: \[(.*?)\]", run("density_2d")).group(1)
    assert all(int(c) > 100 for c in counts.split(","))
    assert Path("density_2d.png").stat().st_size > 10_000


def test_annealed_score_2d(run):
    pytest.importorskip("matplotlib")
    plain, annealed = map(float, re.findall(r": (0\.\d+) of the chains", run("annealed_score_2d")))
    assert plain == pytest.approx(0.5, abs=0.05)  # of where they start, not of the density's 0.8
    assert annealed == pytest.approx(0.8, abs=0.07)
    assert Path("annealed_score_2d.png").stat().st_size > 10_000


def test_torchebm_energy(run):
    pytest.importorskip("torchebm")
    printed = run("torchebm_energy")
    assert float(re.search(r"mean \|x\| = (\S+)", printed).group(1)) == pytest.approx(0.95, abs=0.1)


def test_persistent_digits(run):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    assert "U(chains) - U(data)" in run("persistent_digits")
    assert Path("persistent_digits.png").stat().st_size > 1000


def test_long_chains(run):
    pytest.importorskip("matplotlib")
    printed = run("long_chains")
    assert len(re.findall(r"effective size \d+, split R-hat \d\.\d+", printed)) == 2
    mala, exact = re.findall(r"E\[x²\] = (\S+)", printed)[1:]
    assert float(mala) == pytest.approx(float(exact), abs=0.1)
    assert Path("long_chains.png").stat().st_size > 1000
