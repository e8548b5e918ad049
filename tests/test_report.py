"""The page that ``coopflow report`` writes: what a reader sees of a run, and of one cut short."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from coop_runs import tiny

from coopflow_ext import cli, coop
from coopflow_ext.coop.curves import CURVES, points_of
from coopflow_ext.coop.study import chart
from coopflow_ext.coop.study.report import report_run
from coopflow_ext.errors import NonFiniteError, RunError

VOID = ("img", "meta")
PHONE, DESKTOP = 420, 1280


class Page(HTMLParser):
    """What a page holds, and what of it is seen before anything is unfolded."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[dict[str, str]] = []
        self.charts: list[dict[str, str]] = []
        self.headings: list[str] = []
        self.fetched: list[str] = []
        self.seen: list[str] = []
        self.folded: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text())
        self.close()
        assert self.open == []  # every element is closed
        self.text = " ".join(" ".join(self.seen).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "img":
            self.images.append(values)
        if tag == "svg":
            self.charts.append(values)
        if tag in ("script", "link", "a", "iframe"):
            self.fetched.append(tag)
        self.fetched += [v for k, v in values.items() if k in ("src", "href") and v[:5] != "data:"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Of a line or circle in a chart."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)
        unfolded = "details" not in self.open or self.open[-1] == "summary"
        (self.seen if unfolded else self.folded).append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was evaluated and diagnosed."""
    path = tmp_path_factory.mktemp("report") / "run"
    coop.train(tiny(), path)
    assert cli.main(["evaluate", str(path), "--n", "20"]) == 0
    assert cli.main(["diagnose", str(path), "--n", "8", "--long", "2", "3"]) == 0
    return path


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """The same to change, under a name that must be escaped."""
    path = tmp_path / "<b>run_1 & co"
    shutil.copytree(run, path)
    return path


def test_the_result_comes_first_and_raw_numbers_last(run: Path) -> None:
    page = Page(report_run(run))
    assert page.fetched == []
    assert page.headings == [
        "Result",
        "In numbers",
        "Course of the training",
        "Samples over the training",
        "Evaluation",
        "Diagnosis",
        "What to do next",
        "Settings and raw numbers",
    ]
    last = (run / "samples" / "step-0000010.png").read_bytes()
    assert base64.b64decode(page.images[0]["src"].partition("base64,")[2]) == last
    assert page.images[0]["alt"].startswith("Step 10: the flow's proposals")
    fd = json.loads((run / "summary.json").read_text())["fd"]
    names = {
        "held_out": "held-out data",
        "flow": "the flow's proposals",
        "flow_start": "the flow's proposals at step 0",
    }
    others = "; ".join(f"{name}: {chart.number(fd[key])}" for key, name in names.items())
    assert (
        "The samples after Langevin have a distance of "
        f"{chart.number(fd['langevin'])} to the training data ({others})."
    ) in page.text
    assert f"coopflow sample {run} --out samples.png" in page.text
    assert "coopflow evaluate" not in page.text  # that was done


def test_words_are_seen_and_names_of_the_code_are_folded_away(run: Path) -> None:
    page = Page(report_run(run))
    seen = page.text.replace(str(run), "RUN")
    assert re.findall(r"\w+_\w+|\bfd\b", seen) == []
    assert page.text.count("less is better") >= 8
    assert "bits per dimension" in page.text
    folded = " ".join(page.folded)
    for name in (
        "langevin_steps",
        "fd.langevin",
        "fd_langevin",
        "energy.data.mean",
        "long_chains.1.fd",
    ):
        assert name in folded
        assert name not in page.text


def test_every_picture_and_chart_says_what_it_shows(run: Path) -> None:
    page = Page(report_run(run))
    assert len(page.images) >= 9
    assert all(len(image["alt"]) > 20 for image in page.images)
    labels = [svg["aria-label"] for svg in page.charts]
    assert [label.partition(",")[0] for label in labels] == [curve.title for curve in CURVES]
    assert all(svg["role"] == "img" for svg in page.charts)
    gap = [m["moment_gap"] for m in coop.RunFolder.open(run).metrics() if "moment_gap" in m]
    (said,) = (label for label in labels if label.startswith("Moment gap"))
    assert f"from {chart.number(gap[0])} at step" in said
    assert f"to {chart.number(gap[-1])} at step 10" in said


def test_charts_have_text_of_a_readable_size_on_a_phone(run: Path) -> None:
    """12 pixels or more where the page has 420, less its margins."""
    for svg in Page(report_run(run)).charts:
        width = float(svg["viewbox"].split()[2])
        assert float(svg["font-size"]) * (PHONE - 32) / width >= 12


def test_names_are_escaped(copied: Path) -> None:
    out = report_run(copied)
    assert "<b>run" not in out.read_text()
    page = Page(out)
    assert "CoopFlow run <b>run_1 & co" in page.text
    assert f"coopflow sample '{copied}' --out samples.png" in page.text


def test_a_run_that_has_not_finished(copied: Path) -> None:
    (copied / "summary.json").unlink()
    page = Page(report_run(copied))
    assert "This run has not finished. 10 of 10 steps are logged." in page.text
    assert "The samples after Langevin have a distance of" in page.text  # as last observed
    assert "--resume" in page.text
    with pytest.raises(coop.RunError, match="is not a run"):
        report_run(copied.parent)


def test_studies_from_before_a_run_went_on_are_old(copied: Path) -> None:
    """And offered again, while one of the newest checkpoint is not."""
    coop.train(tiny(steps=12), copied, resume=True)
    assert cli.main(["diagnose", str(copied), "--n", "8", "--long", "2"]) == 0
    page = Page(report_run(copied))
    assert page.text.count("From step 10, before the run went on.") == 1
    assert "coopflow evaluate" in page.text
    assert "coopflow diagnose" not in page.text


def test_a_run_that_has_only_begun(copied: Path) -> None:
    """One line of numbers, no picture, nothing measured; then no line at all."""
    (copied / "summary.json").unlink()
    for folder in ("samples", "evaluation", "diagnose"):
        shutil.rmtree(copied / folder)
    metrics = copied / "metrics.jsonl"
    line = next(text for text in metrics.read_text().splitlines() if '"flow_nll"' in text)
    metrics.write_text(line + "\n")
    page = Page(report_run(copied))
    assert "No picture of samples has been made yet." in page.text
    assert "Nothing has been measured of the samples yet." in page.text
    assert page.images == []
    assert [svg["aria-label"].partition(",")[0] for svg in page.charts] == [
        "Loss of the flow",
        "Norms of the gradients",
    ]
    assert "In numbers" not in page.headings
    metrics.unlink()
    page = Page(report_run(copied))
    assert "No line of numbers has been written yet." in page.text
    assert page.charts == []


def test_a_run_that_diverged(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(NonFiniteError):
        coop.train(tiny(energy_lr=1e30, pretrain_steps=0, flow_frozen_steps=0), path)
    step = json.loads((path / "divergence.json").read_text())["step"]
    page = Page(report_run(path))
    assert f"This run diverged by step {step}: " in page.text
    assert "There is no checkpoint yet" in page.text
    assert f"coopflow train --out {path} --resume --lr X" in page.text
    assert "Result" in page.headings


def test_an_older_divergence_is_not_told_of_a_run_that_went_on(copied: Path) -> None:
    (copied / "divergence.json").write_text(json.dumps({"step": 4, "reason": "energy"}))
    assert "diverged" not in Page(report_run(copied)).text
    (copied / "summary.json").unlink()
    page = Page(report_run(copied))
    assert "diverged" not in page.text
    assert "This run has not finished." in page.text


def test_a_run_that_was_extended_keeps_its_old_numbers_apart(copied: Path) -> None:
    coop.RunFolder.open(copied).adopt(tiny(steps=90))
    page = Page(report_run(copied))
    assert "This run has not finished. 10 of 93 steps are logged." in page.text
    assert "From before the run was extended." in page.text
    assert "steps from step 10" in " ".join(page.folded)


@pytest.mark.parametrize(
    ("changes", "subject", "missing"),
    [
        ({"start": "uniform", "pretrain_steps": 0}, "The samples after Langevin", "at step 0: "),
        ({"langevin_steps": 0, "steps": 0}, "The flow's proposals", "after Langevin have"),
    ],
)
def test_other_kinds_of_runs(
    tmp_path: Path, changes: dict[str, Any], subject: str, missing: str
) -> None:
    path = tmp_path / "run"
    coop.train(tiny(**changes), path)
    text = Page(report_run(path)).text
    assert f"{subject} have a distance of" in text
    assert missing not in text


# --- charts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 2600), (-3.1, 0.2), (1e-9, 3e-9), (5e8, 7e8), (0.999, 1.001)]
)
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = chart.nice_ticks(low, high)
    assert 3 <= len(ticks) <= 8
    slack = 1e-6 * (high - low)
    assert all(low - slack <= tick <= high + slack for tick in ticks)


@pytest.mark.parametrize("span", [1.05, 2, 9, 90, 1e4, 1e12])
@pytest.mark.parametrize("low", [1e-7, 0.93, 4e5])
def test_logarithmic_ticks_are_few_and_inside(low: float, span: float) -> None:
    ticks = chart.log_ticks(low, low * span)
    assert 2 <= len(ticks) <= 8
    assert all(low <= tick <= low * span * (1 + 1e-9) for tick in ticks)


def test_a_chart_keeps_within_its_frame() -> None:
    curve = CURVES[0]
    constant = {"after Langevin": [(0, 5.0), (10, 5.0)], "before": [(7, 5.0)]}
    wide = {"after Langevin": [(k, 10.0 ** (k % 7 - 3)) for k in range(2000)]}
    for lines in (constant, wide):
        svg = chart.line_chart(curve, lines, {"held-out data": 2.0})
        places = re.findall(r"(-?[\d.]+),(-?[\d.]+)", " ".join(re.findall(r"points='(.*?)'", svg)))
        assert 2 <= len(places) <= 300
        for x, y in places:
            assert 0 <= float(x) <= chart.WIDTH
            assert 0 <= float(y) <= chart.HEIGHT
    assert "<circle" in chart.line_chart(curve, {"before": [(0, 3.0)]})


def test_numbers_that_cannot_be_drawn_are_left_out() -> None:
    lines: list[dict[str, Any]] = [
        {"step": k, "fd_langevin": value}
        for k, value in enumerate([1.0, math.nan, math.inf, None, True, 0.0, 2])
    ]
    assert points_of(CURVES[0], lines) == {"after Langevin": [(0, 1.0), (6, 2)]}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (2.584, "2.58"),
        (96.42, "96.4"),
        (12345.6, "12,346"),
        (-0.5, "−0.500"),
        (0.9999, "1.00"),
        (9.996, "10.0"),
        (1.5e-9, "1.5e−09"),
    ],
)
def test_numbers_for_readers(value: float, text: str) -> None:
    assert chart.number(value) == text


# --- in a browser --------------------------------------------------------------------------------

# Run by the browser: what the page measures, and how many pictures it could decode.
MEASURE = """<script>onload = () => {
  const shown = [...document.images].filter(i => i.complete && i.naturalWidth > 1).length;
  const measure = () => document.documentElement.scrollWidth;
  const folded = measure();
  document.querySelectorAll('details').forEach(d => d.open = true);
  document.body.dataset.measured = [innerWidth, folded, measure(), shown].join(' ');
};</script></body>"""


def chromium() -> str:
    """Its path; the test is skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium is installed")
    return found


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_no_overflow_in_a_browser(copied: Path, tmp_path: Path, width: int) -> None:
    """At the width of a phone and of a desktop, folded and unfolded. The page stands in a frame:
    a headless window is not as narrow as a phone."""
    text = report_run(copied).read_text()
    (tmp_path / "page.html").write_text(text.replace("</body>", MEASURE))
    (tmp_path / "frame.html").write_text(
        f"<!doctype html><iframe src='page.html' width='{width}' height='900' frameborder='0'>"
        "</iframe><script>onload = () => document.body.dataset.measured = "
        "document.querySelector('iframe').contentDocument.body.dataset.measured</script>"
    )
    flags = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-sync"]
    flags += ["disable-background-networking", "disable-component-update", "window-size=1400,900"]
    flags += ["allow-file-access-from-files", f"user-data-dir={tmp_path / 'profile'}", "dump-dom"]
    command = [chromium(), *(f"--{flag}" for flag in flags), (tmp_path / "frame.html").as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (measured,) = re.findall(r'data-measured="([\d ]+)"', result.stdout)
    inner, folded, unfolded, shown = map(int, measured.split())
    assert inner == width
    assert folded <= width
    assert unfolded <= width
    assert shown == text.count("<img") >= 9


def test_a_report_of_where_one_is_bears_the_folders_name(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = copied.rename(copied.with_name(os.fsdecode(b"run\xff")))
    monkeypatch.chdir(copied)
    assert "<title>CoopFlow run run?</title>" in report_run(Path(".")).read_text()


def test_a_damaged_study_is_named(copied: Path) -> None:
    file = copied / "diagnose" / "summary.json"
    file.write_text(file.read_text().replace('"steps"', '"stops"'))
    with pytest.raises(RunError, match=r"summary.json is damaged: its long_chains: .*steps"):
        report_run(copied)
