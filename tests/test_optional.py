"""Without optional packages the package works, and what needs one says how to get it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

# By import name: what needs it, and the message.
NEEDS = {
    "sklearn": ("data.load('digits')", "scikit-learn", "train"),
    "matplotlib": ("pictures.check_installed()", "matplotlib", "train"),
    "PIL": ("pictures.check_installed()", "pillow", "train"),
    "arviz": ("diagnostics.to_arviz(out)", "arviz", "diagnostics"),
    "tensorboard": ("coop.train(None, 'run', log='tensorboard')", "tensorboard", "tensorboard"),
    "torchmetrics": ("fid.check_inception_installed()", "torchmetrics", "fid"),
    "zuko": ("import coopflow_ext.integrations.zuko", "zuko", "test"),
    "nflows": ("import coopflow_ext.integrations.nflows", "nflows", "test"),
    "normflows": ("import coopflow_ext.integrations.normflows", "normflows", "test"),
}

PROGRAM = """
import json, sys
missing, needs = json.loads(sys.argv[1])

sys.modules.update(dict.fromkeys(missing))  # None: not to be found
import torch
import coopflow_ext as cf
import coopflow_ext.integrations.torchebm
from coopflow_ext import coop, data, diagnostics, flows, metrics
from coopflow_ext.coop import pictures
from coopflow_ext.metrics import fid

energy = lambda x: (x * x).sum(1)
out = cf.LangevinSampler(energy, n_steps=4, step_size=0.1, return_trajectory=True)(
    torch.ones(3, 2), key=cf.Key(1)
)
assert out.x.isfinite().all()
flow = flows.realnvp(dim=2)
flow.initialize(torch.randn(8, 2))
assert flow.sample(3, cf.Key(1)).shape == (3, 2)
for name, code in needs.items():
    try:
        exec(code)
    except ImportError as error:
        print(f"{name}: {error}")
"""


def messages(missing: list[str], cwd: Path) -> dict[str, str]:
    """What is said, by package, where these are not installed."""
    needs = {name: NEEDS[name][0] for name in missing if name in NEEDS}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps([missing, needs])],
        cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def assert_says(said: dict[str, str], name: str) -> None:
    _, distribution, extra = NEEDS[name]
    expected = rf"{re.escape(distribution)} is needed.*pip install 'coopflow-ext\[{extra}\]'"
    assert re.search(expected, said[name]), said


def test_without_any_optional_package(tmp_path: Path) -> None:
    missing = [*NEEDS, "scipy", "torchebm", "torch_fidelity", "hypothesis", "tyro"]
    said = messages(missing, tmp_path)
    assert said.keys() == NEEDS.keys()
    for name in NEEDS.keys() - {"matplotlib", "tensorboard"}:  # pillow is asked for before them
        assert_says(said, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_without_one(tmp_path: Path, name: str) -> None:
    assert_says(messages([name], tmp_path), name)
