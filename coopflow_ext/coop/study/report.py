"""``coopflow report``: a run as one HTML page for readers, which needs nothing else."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from coopflow_ext.coop.curves import CURVES, is_finite_number, points_of
from coopflow_ext.coop.files import read_object, write_atomically
from coopflow_ext.coop.run import RunFolder
from coopflow_ext.coop.study import page
from coopflow_ext.coop.study.chart import LINES, line_chart, number
from coopflow_ext.coop.study.quantities import LESS, PLANE, RUN, STUDIES, rows_of
from coopflow_ext.errors import RunError, reason

# How pages call what chains start from, in the middle of a sentence.
_STARTS = {
    "flow": "the flow's proposals",
    "uniform": "the noise that chains start from",
    "buffer": "the persistent chains' states",
}


def report_run(path: Path) -> Path:
    """Write RUN/report.html from what the folder holds; returns its path.

    What is seen at once is for readers: the last pictures, the result beside its references,
    quantities in words, curves. Settings and raw numbers are folded away. A run that has not
    finished, or that diverged, is reported as far as it is, and the page says so.

    Raises:
        RunError: the folder is not a run, or a file in it is damaged.
    """
    report = _Report(RunFolder.open(path))
    text = page.document(report.title, report.parts())
    out = path / "report.html"
    write_atomically(out, text.encode(errors="replace"))  # of a folder's name that is no text
    return out


class _Report:
    """What a run's folder holds, read once."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.config = run.config
        self.title = f"CoopFlow run {run.path.resolve().name}"
        self.metrics = run.metrics()
        self.summary = run.summary() if (run.path / "summary.json").exists() else {}
        self.done = max((line["step"] for line in self.metrics), default=0)
        self.finished = run.is_finished
        self.pictures = run.pictures()
        self.studies = {
            name: read_object(run.path / name / study.file)
            for name, study in STUDIES.items()
            if (run.path / name / study.file).exists()
        }

    def parts(self) -> list[str]:
        """The page from top to bottom."""
        return [
            self.heading(),
            page.section("Result", self.state(), *self.last_picture(), *self.result()),
            page.section("In numbers", self.numbers()),
            page.section("What was learned of the density", self.plane()),
            page.section("Course of the training", self.charts()),
            page.section("Samples over the training", self.samples()),
            *(page.section(STUDIES[name].title, self.study(name)) for name in self.studies),
            page.section("What to do next", self.next_steps()),
            page.section("Settings and raw numbers", *self.raw()),
        ]

    def heading(self) -> str:
        config = self.config
        chain = f"chains of {config.langevin_steps} Langevin steps"
        phases = f"{config.steps:,} cooperative steps"
        if config.pretrain_steps:
            phases = f"{config.pretrain_steps:,} steps of pre-training and {phases}"
        line = f"Data: {config.data}. {phases}, {chain}, seed {config.seed}."
        return page.heading(self.title, line)

    def state(self) -> str:
        """Whether it has finished, where it has not."""
        if self.finished:
            return ""
        total = self.config.total_steps
        so_far = f"{self.done:,} of {total:,} steps are logged."
        diverged = self.divergence()
        if diverged:
            kept = (
                "Its last checkpoint is from before"
                if self.run.checkpoints()
                else ("There is no checkpoint yet")
            )
            return page.paragraph(
                f"This run diverged by step {diverged['step']:,}: {diverged['reason']}. {so_far} "
                f"{kept}; “What to do next” below says how to go on.",
                "warning",
            )
        return page.paragraph(f"This run has not finished. {so_far}", "warning")

    def divergence(self) -> dict[str, Any]:
        """What was left when it diverged, unless it went beyond that since."""
        path = self.run.divergence_path
        facts = read_object(path) if path.exists() and not self.finished else {}
        return facts if facts and facts["step"] >= self.done else {}

    def picture(self, step: int, path: Path, style: str = "") -> str:
        start = _STARTS[self.config.start]
        text = f"Step {step:,}: {start}, and the same after {self.config.langevin_steps} steps"
        has_chain = self.config.langevin_steps > 0
        caption = f"{text} of Langevin" if has_chain else f"Step {step:,}: {start}"
        return page.figure(path, caption, style)

    def last_picture(self) -> list[str]:
        if not self.pictures:
            return [page.paragraph("No picture of samples has been made yet.")]
        return [self.picture(*self.pictures[-1], "large")]

    def distances(self) -> dict[str, float]:
        """Fréchet distances of the end, or as far as the run is, by what they are of."""
        lines = [line for line in self.metrics if "fd_langevin" in line and "fd_flow" in line]
        known = self.summary.get("fd", {}) if self.finished else {}
        if lines and not known:
            known = {
                "langevin": lines[-1]["fd_langevin"],
                "flow": lines[-1]["fd_flow"],
                "flow_start": lines[0]["fd_flow"] if lines[0]["step"] == 0 else None,
            }
        found = {name: value for name, value in known.items() if is_finite_number(value)}
        if self.config.langevin_steps == 0:
            found.pop("langevin", None)  # it is that of the flow
        if self.config.start == "uniform":
            found.pop("flow_start", None)  # noise stays noise
        return found

    def result(self) -> list[str]:
        """One sentence beside its references, and the same numbers below each other."""
        fd = self.distances()
        ours = "langevin" if "langevin" in fd else "flow"
        if ours not in fd:
            return [page.paragraph("Nothing has been measured of the samples yet.")]
        start = _STARTS[self.config.start]
        names = {
            "langevin": "the samples after Langevin",
            "held_out": "held-out data",
            "flow": start,
            "flow_start": f"{start} at step 0",
        }
        others = "; ".join(f"{names[k]}: {number(fd[k])}" for k in names if k in fd and k != ours)
        compared = f" ({others})" if others else ""
        subject = _capital(names[ours])
        space, n = (self.summary.get("fd", {}).get(k) for k in ("feature_space", "n"))
        how = "Fréchet distance to the training data"
        if space and n:
            where = "" if space == "identity" else f" in the features of {space}"
            how = f"{how}{where}, from {n:,} events of each kind"
        rows = [(_capital(names[k]), "", number(fd[k])) for k in names if k in fd]
        return [
            page.paragraph(
                f"{subject} have a distance of {number(fd[ours])} to the training data{compared}.",
                "lead",
            ),
            page.paragraph(f"{how}; {LESS}.", "quiet"),
            page.table(rows, strong=[0], head="distance"),
        ]

    def numbers(self) -> str:
        rows = rows_of(self.summary, RUN)
        old = "" if self.finished or not rows else "From before the run was extended."
        return page.paragraph(old, "quiet") + page.table(rows)

    def plane(self) -> str:
        """What a run on a toy density leaves beside its samples."""
        return "".join(page.figure(self.run.path / name, text) for name, text in PLANE.items())

    def charts(self) -> str:
        references = {}
        held_out = self.summary.get("fd", {}).get("held_out")
        if is_finite_number(held_out) and held_out > 0:
            references[CURVES[0].title] = {"held-out data": held_out}
        figures = []
        for curve in CURVES:
            lines = points_of(curve, self.metrics)
            if not lines:
                continue
            beside = references.get(curve.title, {})
            keys = [*zip(LINES, lines, strict=False), *(("reference", name) for name in beside)]
            shown = "".join(page.key(style, label) for style, label in keys)
            figures.append(
                page.chart(curve.title, curve.note, shown, line_chart(curve, lines, beside))
            )
        if not figures:
            return page.paragraph("No line of numbers has been written yet.")
        split = self.config.pretrain_steps
        text = f"The first {split:,} steps are the pre-training of the flow." if split else ""
        return page.paragraph(text, "quiet") + page.side_by_side(figures, "charts")

    def samples(self) -> str:
        """The first picture, the last, and two between."""
        found = self.pictures
        chosen = sorted({round(i * (len(found) - 1) / 3) for i in range(4)}) if found else []
        if len(chosen) < 2:  # that stands above already
            return ""
        return page.side_by_side(self.picture(*found[i]) for i in chosen)

    def is_old(self, name: str) -> bool:
        """Whether the run went on after it was studied; older versions did not write when."""
        newest: int = self.run.opened_at
        return bool(self.studies[name].get("step", newest) < newest)

    def study(self, name: str) -> str:
        study, values = STUDIES[name], self.studies[name]
        old = f"From step {values['step']:,}, before the run went on." if self.is_old(name) else ""
        pictures = (
            page.figure(self.run.path / name / file, caption)
            for file, caption in study.pictures.items()
        )
        table = page.table(rows_of(values, study.quantities))
        try:
            chains = _chains(values.get("long_chains") or [])
        except (KeyError, TypeError, ValueError) as error:
            file = self.run.path / name / study.file
            raise RunError(f"{file} is damaged: its long_chains: {reason(error)}") from error
        return page.paragraph(old, "warning") + table + chains + "".join(pictures)

    def next_steps(self) -> str:
        run = shlex.quote(str(self.run.path))
        if self.divergence():
            return page.paragraph("Go on at a lower rate X:") + (
                page.commands([f"coopflow train --out {run} --resume --lr X"])
            )
        if not self.finished:
            return page.commands([f"coopflow train --out {run} --resume"])
        lines = [f"coopflow sample {run} --out samples.png"]
        current = {name for name in self.studies if not self.is_old(name)}
        if "evaluation" not in current:
            lines.append(f"coopflow evaluate {run}")
        if "diagnose" not in current and self.config.langevin_steps:
            lines.append(f"coopflow diagnose {run}")
        return page.commands(lines)

    def raw(self) -> Iterable[str]:
        """By their names in the code."""
        changes = {f"{c['setting']} from step {c['step']}": c["after"] for c in self.run.history}
        yield page.folded("Settings", dataclasses.asdict(self.config))
        yield page.folded("Settings that were changed on the way", changes)
        yield page.folded("Numbers of the run", self.summary)
        yield page.folded("Last line of the metrics", self.metrics[-1] if self.metrics else {})
        for name, values in self.studies.items():
            yield page.folded(f"Numbers of the {name} folder", values)


def _chains(chains: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        [
            f"{chain['steps']:,}",
            number(chain["fd"]),
            number(chain["energy"]),
            "–" if chain["energy_rhat"] is None else number(chain["energy_rhat"]),
        ]
        for chain in chains
    ]
    if not rows:
        return ""
    head = ["steps of a chain", "Fréchet distance", "mean energy", "R-hat of the energy"]
    note = f"Distance: {LESS}. R-hat: near 1 where the chains agree, above it where they do not."
    return page.columns(head, rows) + page.paragraph(note, "quiet")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
