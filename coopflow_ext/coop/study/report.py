"""``coopflow report``: a run as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import dataclasses
import html
from pathlib import Path
from typing import Any

from coopflow_ext.coop.files import read_json, write_atomically
from coopflow_ext.coop.pictures import save_curves
from coopflow_ext.coop.run import RunFolder

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
td, th { border: 1px solid #ccc; padding: 2px 10px; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; image-rendering: pixelated; }
figure { margin: 1em 0; } figcaption { color: #555; }
"""
_SUFFIXES = {".png": "image/png", ".gif": "image/gif"}
_FOLDERS = ("evaluation", "reconstruct", "inpaint", "interpolate", "diagnose")


def report_run(path: Path) -> Path:
    """Write RUN/report.html from what the folder holds; returns its path.

    A run that has not finished is reported as far as it is.

    Raises:
        RunError: the folder is not a run.
    """
    run = RunFolder.open(path)
    metrics = run.metrics()
    if metrics:
        save_curves(run.path / "curves.png", metrics)
    sections = [
        _heading(run),
        _section("Results", _results(run)),
        _section("Curves", _figure(run.path / "curves.png", "what metrics.jsonl holds")),
        _section("Densities in the plane", _plane(run)),
        _section("Samples over training", _samples(run)),
        *(_section(name.capitalize(), _folder(run.path / name)) for name in _FOLDERS),
        _section("Settings", _table(dataclasses.asdict(run.config))),
        _section("Settings changed on the way", _changes(run)),
    ]
    page = (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(run.path.name)}</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body></html>\n"
    )
    out = run.path / "report.html"
    write_atomically(out, page.encode())
    return out


def _heading(run: RunFolder) -> str:
    config = run.config
    line = (
        f"{config.data}, {config.flow} and {config.energy}, T = {config.langevin_steps}, "
        f"{config.pretrain_steps} + {config.steps} steps, seed {config.seed}"
    )
    return f"<h1>CoopFlow run {html.escape(run.path.name)}</h1><p>{html.escape(line)}</p>"


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{content}" if content else ""


def _results(run: RunFolder) -> str:
    if not (run.path / "summary.json").exists():
        return "<p>This run has not finished.</p>"
    return _table(run.summary())


def _samples(run: RunFolder) -> str:
    """The first picture, the last, and two between."""
    found = sorted((run.path / "samples").glob("*.png"))
    chosen = sorted({round(i * (len(found) - 1) / 3) for i in range(4)}) if found else []
    return "".join(_figure(found[i], found[i].stem) for i in chosen)


def _changes(run: RunFolder) -> str:
    """What resumed runs changed, and from which step on."""
    if not run.history:
        return ""
    lines = {f"{c['setting']} from step {c['step']}": c["after"] for c in run.history}
    return _table(lines)


def _plane(run: RunFolder) -> str:
    """What a run on a toy density leaves beside its samples."""
    names = {"densities.png": "densities and points", "chain.gif": "the chain"}
    return "".join(_figure(run.path / name, caption) for name, caption in names.items())


def _folder(path: Path) -> str:
    if not path.is_dir():
        return ""
    numbers = [read_json(p) for p in sorted(path.glob("*.json"))]
    tables = "".join(_table(n) for n in numbers)
    pictures = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
    return tables + "".join(_figure(p, p.stem) for p in pictures)


def _figure(path: Path, caption: str) -> str:
    if not path.exists():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    kind, text = _SUFFIXES[path.suffix], html.escape(caption)
    image = f"<img alt='{text}' src='data:{kind};base64,{data}'>"
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _table(values: dict[str, Any], prefix: str = "") -> str:
    rows = "".join(_rows(values, prefix))
    return f"<table>{rows}</table>"


def _rows(values: dict[str, Any], prefix: str) -> list[str]:
    rows = []
    for name, value in values.items():
        label = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            rows += _rows(value, f"{label}.")
        elif isinstance(value, list) and len(value) > 8:
            continue
        else:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            style = " class='number'" if is_number else ""
            rows.append(
                f"<tr><th>{html.escape(label)}</th><td{style}>{html.escape(text)}</td></tr>"
            )
    return rows
