"""A pytest plugin that goes on where an earlier run was stopped (`-p resume_tests`).

Tests named in the file COOPFLOW_TESTS_PASSED are left out, and those that pass are added to it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PASSED = Path(os.environ["COOPFLOW_TESTS_PASSED"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = set(PASSED.read_text().splitlines()) if PASSED.exists() else set()
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        with PASSED.open("a") as file:
            file.write(f"{report.nodeid}\n")
