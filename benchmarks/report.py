"""Results as a Markdown table and plots, and README's table from the committed results.

    python benchmarks/report.py RESULTS.json [--out DIR]     table.md and plots
    python benchmarks/report.py --readme                     write README's block
    python benchmarks/report.py --readme --check             exit 1 when it differs

Figures of a CPU are ratios only: others may share it, and a ratio of paired rounds survives that.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from harness import OURS, ROOT

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
Report = dict[str, Any]


def load(path: Path) -> Report:
    """Read a report.

    Raises:
        ValueError: the file is missing, broken, or not of this suite.
    """
    try:
        report: Report = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read as results: {error}") from error
    if report.get("version") != "coopflow-bench-1":
        raise ValueError(f"{path} is not a file of this suite: version {report.get('version')!r}")
    return report


def by_case(report: Report) -> dict[str, dict[str, Any]]:
    """Records by case and contestant."""
    cases: dict[str, dict[str, Any]] = {}
    for record in report["benchmarks"]:
        cases.setdefault(record["group"], {})[record["name"]] = record
    return cases


def _cells(case: str, name: str, record: dict[str, Any], on_gpu: bool) -> list[str]:
    extra = record["extra_info"]
    ratio = extra["ratio_to_ours"]
    cells = [case, name, f"{ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"]
    share = f"{extra['share_of_copy']:.0%}" if on_gpu and "share_of_copy" in extra else "-"
    return [*cells, share] if on_gpu else cells


def table(report: Report) -> str:
    """Every contestant's time divided by ours, per case, and what was not measured."""
    on_gpu = report["machine_info"]["device"] == "cuda"
    header = ["case", "against", "its time / ours: median (20th to 80th percentile)"]
    header += ["its share of copy bandwidth"] if on_gpu else []
    rows = [header, ["---"] * len(header)]
    for case, records in by_case(report).items():
        if on_gpu:
            ours = records[OURS]
            share = ours["extra_info"].get("share_of_copy")
            time = f"1 ({1e6 * ours['stats']['median']:.1f} µs)"
            rows.append([case, OURS, time, "-" if share is None else f"{share:.0%}"])
        rows += [_cells(case, n, r, on_gpu) for n, r in records.items() if n != OURS]
    for gap in report["not_measured"]:
        cells = [gap["case"], gap["contestant"], f"not measured: {gap['reason']}"]
        rows.append(cells + ["-"] * (len(header) - 3))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def provenance(report: Report) -> str:
    """Machine, date, commit and command in one paragraph."""
    info, commit = report["machine_info"], report["commit_info"]
    state = " with uncommitted changes" if commit["dirty"] else ""
    busy = ""
    if info["device"] == "cpu" and info["load_average"] > info["cores"]:
        busy = (
            " **Provisional: the cores were shared with other work**, which delays two-thread "
            "loops at random; read the percentiles, and trust no single ratio."
        )
    return (
        f"{info['device_name']}, {info['threads']} threads of {info['cores']} cores, load average "
        f"{info['load_average']} at the start, torch {info['torch']}, {report['datetime'][:10]}, "
        f"commit {str(commit['id'])[:10]}{state}: `{report['command']}`. Above 1, ours is faster."
        f"{busy}"
    )


def readme_block(reports: dict[str, Report]) -> str:
    """What stands between the markers, for the results of every folder."""
    parts = [f"{table(report)}\n\n{provenance(report)}" for report in reports.values()]
    if not any(r["machine_info"]["device"] == "cuda" for r in reports.values()):
        parts.append("GPU: not measured.")
    return "\n\n".join(parts)


def committed() -> dict[str, Report]:
    return {p.parent.name: load(p) for p in sorted(RESULTS.glob("*/results.json"))}


def with_block(text: str, block: str) -> str:
    """README's text with the block in place of the old one.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must hold {BEGIN} and then {END}")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


# --- plots ----------------------------------------------------------------------------------------


def plot_ratios(report: Report, path: Path) -> None:
    """Horizontal bars of every ratio, with its 20th to 80th percentile."""
    plt = _pyplot()
    bars = [
        (f"{case}  {name}", r["extra_info"]["ratio_to_ours"])
        for case, records in by_case(report).items()
        for name, r in records.items()
        if name != OURS
    ]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.28 * len(bars)))
    medians = [ratio["median"] for _, ratio in bars]
    below = [r["median"] - r["p20"] for _, r in bars]
    above = [r["p80"] - r["median"] for _, r in bars]
    axes.barh([label for label, _ in bars], medians, xerr=[below, above])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("time / ours (above 1, ours is faster)")
    axes.invert_yaxis()
    _save(figure, path)


def plot_sizes(report: Report, path: Path) -> None:
    """Time per call of ours against the number of elements, one line per family and dtype."""
    plt = _pyplot()
    lines: dict[str, list[tuple[int, float]]] = {}
    for case, records in by_case(report).items():
        record = records[OURS]
        family = case.removesuffix("/cold").rpartition("/")[0]
        point = (record["extra_info"]["elements"], record["stats"]["median"])
        lines.setdefault(family, []).append(point)
    figure, axes = plt.subplots(figsize=(8, 5))
    for family, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=family)
    axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="seconds per call")
    axes.legend(fontsize=7)
    _save(figure, path)


def plot_roofline(report: Report, path: Path) -> None:
    """Bytes per second that each memory-bound contestant reached, under the copy's."""
    plt = _pyplot()
    limit = report["limits"]["copy_bytes_per_second"]
    points = [
        (r["extra_info"]["expected_bytes"], r["extra_info"]["share_of_copy"] * limit, name == OURS)
        for records in by_case(report).values()
        for name, r in records.items()
        if "share_of_copy" in r["extra_info"]
    ]
    figure, axes = plt.subplots(figsize=(8, 5))
    for ours, label in ((True, OURS), (False, "others")):
        chosen = [(size, rate) for size, rate, is_ours in points if is_ours == ours]
        axes.scatter(*(zip(*chosen, strict=True) if chosen else ((), ())), label=label)
    axes.axhline(limit, color="black", linewidth=1, label="copy, measured in the same run")
    axes.set(xscale="log", yscale="log", xlabel="expected bytes", ylabel="bytes per second")
    axes.legend()
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    _pyplot().close(figure)


def write(report: Report, folder: Path) -> None:
    """table.md, ratios.png, sizes.png and roofline.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(f"{table(report)}\n\n{provenance(report)}\n")
    if not report["benchmarks"]:
        return
    plot_ratios(report, folder / "ratios.png")
    plot_sizes(report, folder / "sizes.png")
    plot_roofline(report, folder / "roofline.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path)
    parser.add_argument("--out", type=Path, help="default: the folder of the results")
    parser.add_argument("--readme", action="store_true", help="write README's block")
    parser.add_argument("--check", action="store_true", help="with --readme: only compare")
    args = parser.parse_args()
    if bool(args.results) == args.readme:
        parser.error("give RESULTS.json or --readme")
    try:
        if args.results:
            write(load(args.results), args.out or args.results.parent)
            return 0
        old = README.read_text()
        new = with_block(old, readme_block(committed()))
    except ValueError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    if args.check:
        print("README.md agrees" if old == new else "README.md differs: run report.py --readme")
        return int(old != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
