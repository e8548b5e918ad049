"""Instruction counts: what a busy machine cannot blur."""

from __future__ import annotations

import json
from typing import Any

import pytest

counts = pytest.importorskip("instruction_counts", reason="needs the source tree's benchmarks/")


@pytest.mark.slow
def test_no_count_of_a_cpu_loop_grew() -> None:
    """Those of the kernels: test_sass_report.py, which disassembles them anyway."""
    try:
        assert counts.compare("cpu") == []
    except counts.CannotCountError as error:
        pytest.skip(str(error))


def test_growth_is_told_from_slack_and_from_gain() -> None:
    kept = {"same": 10.0, "slack": 10.0, "fewer": 10.0, "more": 10.0, "gone": 10.0}
    now = {"same": 10.0, "slack": 10.005, "fewer": 8.0, "more": 10.5, "new": 1.0}
    assert counts.grown(kept, now) == ["more: 10.0 to 10.5 instructions per element"]


def test_other_tools_are_not_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    path = tmp_path / "kept.json"
    path.write_text(json.dumps({"cpu": {"tools": {"compiler": "old"}, "counts": {}}}))
    monkeypatch.setattr(counts, "KEPT", path)
    sides = {name: (lambda: {"compiler": "new"}, dict) for name in ("cpu", "cuda")}
    monkeypatch.setattr(counts, "SIDES", sides)
    with pytest.raises(counts.CannotCountError, match=r"kept with .*old.*, here is .*new"):
        counts.compare("cpu")
    with pytest.raises(counts.CannotCountError, match="no cuda counts are kept"):
        counts.compare("cuda")
