"""Random calls, right and wrong, of every op and of the sampler: see fuzz.py."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import one_call
from hypothesis import given, settings
from hypothesis import strategies as st

TESTS = Path(__file__).parent


@settings(max_examples=1000)
@given(st.randoms(use_true_random=False))
def test_random_calls_are_answered_right_or_refused(chance: random.Random) -> None:
    one_call(chance)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_random_calls_in_a_process_of_their_own() -> None:
    """A crash shows as the process's end, with the place by faulthandler."""
    calls = os.environ.get("FUZZ_CALLS", "1000000")
    command = [sys.executable, "-X", "faulthandler", str(TESTS / "fuzz.py"), "--calls", calls]
    path = [str(TESTS.parent), str(TESTS.parent / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"{calls} calls of seed 0: right\n"
