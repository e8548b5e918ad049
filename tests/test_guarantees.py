"""Every test that docs/guarantees.md names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "guarantees.md").read_text()
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", TEXT)))


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_a_promise_names_a_test_that_is_there(file: str, test: str) -> None:
    source = (ROOT / "tests" / file).read_text()
    assert re.search(rf"^def {test or 'test_'}", source, re.MULTILINE)


def test_every_promise_names_one() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "---" not in line]
    promises = [row for row in rows if not row.startswith("| promise")]
    assert len(promises) > 15
    for row in promises:
        assert re.search(r"test_\w+\.py|make sanitize", row), row
