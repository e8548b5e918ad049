"""A list of settings, each trained with several seeds: table, plot and pictures."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coopflow_ext._optional import require
from coopflow_ext.coop.config import TrainConfig
from coopflow_ext.coop.files import parse_json, write_atomically, write_json
from coopflow_ext.coop.model import CoopFlow, EventSpec
from coopflow_ext.coop.pictures import figure_bytes
from coopflow_ext.coop.run import RunFolder
from coopflow_ext.coop.train import TrainingInterrupted, train
from coopflow_ext.coop.trainer import captures_steps
from coopflow_ext.errors import NonFiniteError


@dataclass(frozen=True)
class Ablation:
    """What a file of configurations says.

    Attributes:
        seeds: every row is trained once with each.
        rows: settings by the name of the row, without the seed.
    """

    seeds: tuple[int, ...]
    rows: dict[str, TrainConfig]

    @classmethod
    def read(cls, path: Path) -> Ablation:
        """``{"seeds": [...], "base": {settings}, "rows": {name: {settings}}}``, JSON.

        Raises:
            ValueError: not such a file, or settings that make no sense; the row is named.
            OSError: it cannot be read.
        """
        try:
            content = parse_json(path.read_bytes())
            seeds, base, rows = content["seeds"], content.get("base", {}), content["rows"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} must be JSON with seeds, rows and maybe base: {error!r}"
            ) from error
        if not (isinstance(seeds, list) and isinstance(base, dict) and isinstance(rows, dict)):
            raise ValueError(f"{path}: seeds must be a list, base and rows objects")
        if not seeds or not rows:
            raise ValueError(f"{path} must have at least one seed and one row")
        if unknown := sorted(content.keys() - {"seeds", "base", "rows"}):
            raise ValueError(f"{path} has {unknown[0]!r}; known are seeds, base and rows")
        if len(set(map(repr, seeds))) < len(seeds):
            raise ValueError(f"{path}: seeds must differ, got {seeds}")
        configs = {}
        for name, settings in rows.items():
            if not isinstance(settings, dict):
                raise ValueError(f"{path}, row {name!r} must be an object, got {settings!r:.40}")
            try:
                if "seed" in {**base, **settings}:
                    raise ValueError("seed must not be among the settings: seeds says which")
                for seed in seeds:
                    configs[name] = TrainConfig.from_dict({**base, **settings, "seed": seed})
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, row {name!r}: {error}") from error
        if len({_file_name(name) for name in configs}) < len(configs):
            raise ValueError(f"{path}: rows must differ in the letters and digits of their names")
        _check_comparable(path, configs)
        return cls(tuple(seeds), configs)

    def check(self, device: torch.device) -> None:
        """Load the data and build the models of every row, so that no mistake shows after hours.

        Raises:
            ValueError, OSError: as training would; the row is named where it is a ValueError.
        """
        data = next(iter(self.rows.values())).load_data()
        event = EventSpec(data.event_shape, data.levels)
        for name, config in self.rows.items():
            try:
                captures_steps(config, device)
                CoopFlow.from_config(config, event)
            except ValueError as error:
                raise ValueError(f"row {name!r}: {error}") from error


# What must not differ between rows: else their distances are not those to the same data.
_COMMON = ("data", "data_dir", "image_size", "skip_bad", "max_pixels", "n_samples")


def _check_comparable(path: Path, rows: dict[str, TrainConfig]) -> None:
    for name in _COMMON:
        values = {getattr(config, name) for config in rows.values()}
        if len(values) > 1:
            raise ValueError(f"{path}: {name} must be the same in all rows, got {values}")


def run_ablation(
    ablation: Ablation, out: Path, *, device: torch.device | str = "cpu"
) -> list[dict[str, Any]]:
    """Train every row with every seed below ``out``; write table.md, table.json, ablation.png.

    What was finished before is kept and what was begun is continued, so an interrupted ablation
    goes on when it is started again.

    Returns:
        One dictionary for each row, as in table.json.
    """
    ablation.check(torch.device(device))
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, config in ablation.rows.items():
        summaries = [_one_run(name, config, seed, out, device) for seed in ablation.seeds]
        rows.append(_row(name, config, summaries))
    write_json(out / "table.json", rows)
    write_atomically(out / "table.md", table(rows).encode())
    save_plot(out / "ablation.png", rows)
    return rows


def _one_run(
    name: str, config: TrainConfig, seed: int, out: Path, device: torch.device | str
) -> dict[str, Any]:
    path = out / "runs" / f"{_file_name(name)}-seed{seed}"
    config = dataclasses.replace(config, seed=seed)
    try:
        return _run_there(path, config, device)
    except TrainingInterrupted as error:
        raise TrainingInterrupted(
            f"row {name!r}, seed {seed}, was stopped and saved; the same command goes on"
        ) from error
    except NonFiniteError as error:  # whose cause is without the advice for a single run
        raise NonFiniteError(
            f"row {name!r}, seed {seed}, diverged by step {error.step}: {error.__cause__}; rows "
            "are compared, so none may go on at other rates: lower its rates in the file, delete "
            f"{path} and start again",
            step=error.step,
            chains=error.chains,
        ) from error


def _run_there(path: Path, config: TrainConfig, device: torch.device | str) -> dict[str, Any]:
    """The summary of a run that is begun, continued, or finished already."""
    if not (path / "config.json").exists():
        return train(config, path, device=device)
    run = RunFolder.open(path)
    # Rows are compared, so none may have been trained at other rates for a part of its steps.
    changes = run.changes(config, adjustable=("steps",))
    if not changes and run.is_finished:
        return run.summary()
    return train(config, path, resume=True, device=device)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower()


def _spread(values: list[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": spread}


def _row(name: str, config: TrainConfig, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    gaps = [s["moment_gap"] for s in summaries if s["moment_gap"] is not None]
    return {
        "name": name,
        "langevin_steps": config.langevin_steps,
        "step_size": config.step_size,
        "flow_updates": summaries[0]["flow_updates"],
        "energy_updates": summaries[0]["energy_updates"],
        "seeds": len(summaries),
        "held_out": _spread([s["fd"]["held_out"] for s in summaries]),
        "flow": _spread([s["fd"]["flow"] for s in summaries]),
        "langevin": _spread([s["fd"]["langevin"] for s in summaries]),
        "moment_gap": _spread(gaps) if gaps else None,
        "seconds": _spread([s["seconds"] for s in summaries]),
        "starts_from_flow": config.start == "flow",
        "feature_space": summaries[0]["fd"]["feature_space"],
        "n": summaries[0]["fd"]["n"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table, mean ± standard deviation over the seeds."""

    def cell(value: dict[str, float] | None) -> str:
        return "–" if value is None else f"{value['mean']:.2f} ± {value['std']:.2f}"

    head = rows[0]
    lines = [
        f"Fréchet distance to the training data ({head['feature_space']} features, {head['n']} "
        f"samples each, {head['seeds']} seeds, mean ± standard deviation); "
        f"held-out data: {head['held_out']['mean']:.2f}",
        "",
        "| | T | δ | flow updates | energy updates | proposal | after Langevin | moment gap |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        has_chain = row["langevin_steps"] > 0
        name = row["name"].replace("|", r"\|")
        lines.append(
            f"| {name} | {row['langevin_steps']} | {row['step_size'] if has_chain else '–'} "
            f"| {row['flow_updates']} | {row['energy_updates']} "
            f"| {cell(row['flow']) if row['starts_from_flow'] else '–'} "
            f"| {cell(row['langevin']) if has_chain else '–'} | {cell(row['moment_gap'])} |"
        )
    updates = {row["flow_updates"] for row in rows if row["starts_from_flow"]}
    if len(updates) > 1:
        lines += ["", "The rows with a flow differ in its updates: they are not equally trained."]
    return "\n".join(lines) + "\n"


def save_plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Quality of every row, and against the number of Langevin steps and the step size.

    The second panel has the rows of the commonest step size, the third those of the commonest
    number of steps: what else differs between rows is for the reader to keep apart.
    """
    figure_module = require("matplotlib.figure", extra="train", distribution="matplotlib")
    ticker = require("matplotlib.ticker", extra="train", distribution="matplotlib")
    figure = figure_module.Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    chains = [row for row in rows if row["langevin_steps"] > 0] or rows
    step_size = statistics.mode([row["step_size"] for row in chains])
    steps = statistics.mode([row["langevin_steps"] for row in chains])
    for kind, label in (("flow", "proposal"), ("langevin", "after Langevin")):
        style: dict[str, Any] = {"fmt": "o", "capsize": 3, "label": label}
        shown = [row for row in rows if _has(row, kind)]
        mean, std = [r[kind]["mean"] for r in shown], [r[kind]["std"] for r in shown]
        axes[0].errorbar(mean, [rows.index(r) for r in shown], xerr=std, **style)
        for axis, against, constant in (
            (axes[1], "langevin_steps", ("step_size", step_size)),
            (axes[2], "step_size", ("langevin_steps", steps)),
        ):
            dots = [r for r in shown if r[constant[0]] == constant[1]]
            mean, std = [r[kind]["mean"] for r in dots], [r[kind]["std"] for r in dots]
            axis.errorbar([r[against] for r in dots], mean, yerr=std, **style)
    axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows], parse_math=False)
    axes[0].invert_yaxis()
    axes[1].set_xlabel(f"number of Langevin steps T (step size {step_size:g})")
    axes[2].set_xlabel(f"step size δ (T = {steps})")
    for axis, along in zip(axes, "xyy", strict=True):
        held_out = axis.axvline if along == "x" else axis.axhline
        held_out(rows[0]["held_out"]["mean"], color="grey", linestyle=":", label="held-out data")
        axis.set(**{f"{along}scale": "log", f"{along}label": "Fréchet distance"})
        scale = axis.xaxis if along == "x" else axis.yaxis
        scale.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        scale.set_minor_formatter(ticker.NullFormatter())
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    write_atomically(path, figure_bytes(figure))


def _has(row: dict[str, Any], kind: str) -> bool:
    """Whether the row has proposals of a flow ("flow"), or the end of a chain ("langevin")."""
    return bool(row["starts_from_flow"] if kind == "flow" else row["langevin_steps"] > 0)
