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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import OURS, ROOT

from coopflow_ext._optional import optional

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
FASTER = "Above 1, ours is faster."
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


def runs(report: Report) -> list[Report]:
    """What each run that gave the results was: a report without figures, with its cases' names."""
    figures = ("benchmarks", "not_measured", "finished", "failed")
    only = {key: value for key, value in report.items() if key not in figures}
    return report.get("runs") or [{**only, "cases": report["finished"]}]


def by_case(report: Report) -> dict[str, dict[str, Any]]:
    """Records by case and contestant."""
    cases: dict[str, dict[str, Any]] = {}
    for record in report["benchmarks"]:
        cases.setdefault(record["group"], {})[record["name"]] = record
    return cases


def _ratio(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['p20']:.2f} to {found['p80']:.2f})"


def _cells(case: str, name: str, record: dict[str, Any], on_gpu: bool) -> list[str]:
    extra = record["extra_info"]
    ratio = extra["ratio_to_ours"]
    cells = [case, name, _ratio(ratio)]
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
    gaps = [(g["case"], g["contestant"], f"not measured: {g['reason']}") for g in
            report["not_measured"]]  # fmt: skip
    gaps += [(f["case"], "all", f"FAILED: {f['error']}") for f in report.get("failed", ())]
    rows += [[*gap, *["-"] * (len(header) - 3)] for gap in gaps]
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(c.replace("|", "/") for c in row) + " |" for row in rows)


def details(report: Report) -> str:
    """Per step and element, shares of the limits, memory: everything that is no ratio.

    Absolute times only from a GPU.
    """
    on_gpu = report["machine_info"]["device"] == "cuda"
    header = ["case", "contestant", "expected MB", "share of copy", "limited by (below 60%)"]
    header += ["share of matrix rate", "memory peak, MB"]
    header += ["µs per step", "ns per element and step"] if on_gpu else []
    rows = [header, ["---"] * len(header)]

    def cell(extra: dict[str, Any], name: str, form: str, scale: float = 1) -> str:
        return "-" if name not in extra else format(extra[name] * scale, form)

    for case, records in by_case(report).items():
        for name, record in records.items():
            extra = record["extra_info"]
            cells = [
                case,
                name,
                cell(extra, "expected_bytes", ".3g", 1e-6),
                cell(extra, "share_of_copy", ".0%"),
                extra.get("limited_by", "-"),
                cell(extra, "share_of_matmul", ".1%"),
                cell(extra, "memory_peak_bytes", ".3g", 1e-6),
            ]
            if on_gpu:
                cells += [cell(extra, "microseconds_per_step", ".4g")]
                cells += [cell(extra, "nanoseconds_per_element", ".3g")]
            rows.append(cells)
    return _markdown(rows)


def parts(report: Report) -> str:
    """Each part's share of ours, and the others' time for it divided by ours."""
    lines = []
    for case, records in by_case(report).items():
        if "parts" not in records[OURS]["extra_info"]:
            continue
        ours = records[OURS]["extra_info"]["parts"]
        others = {n: r["extra_info"]["parts"] for n, r in records.items() if n != OURS}
        rows = [["part", "share of ours", *(f"{n} / ours" for n in others)]]
        rows.append(["---"] * len(rows[0]))
        for part, seconds in ours.items():
            ratios = [f"{o[part] / seconds:.2f}" if part in o else "-" for o in others.values()]
            rows.append([part, f"{seconds / ours['whole']:.0%}", *ratios])
        lines.append(f"**{case}**\n\n{_markdown(rows)}")
    return "\n\n".join(lines)


def provenance(report: Report) -> str:
    """A paragraph for each run: machine, date, commit and command; of several, with their cases."""
    found = runs(report)
    paragraphs = []
    for run in found:
        paragraphs.append(_provenance(run))
        if len(found) > 1:
            paragraphs.append("Its cases: " + ", ".join(f"`{case}`" for case in run["cases"]))
        paragraphs.append(rates(run))
    return "\n\n".join(paragraphs)


def _provenance(run: Report) -> str:
    info = run["machine_info"]
    busy = ""
    if _is_provisional(run):
        busy = (
            " **Provisional: the cores were shared with other work** when it began, which delays "
            "at random what the host limits; read the percentiles, and trust no single ratio."
        )
    clocks = "".join(f", {k} {'; '.join(v)}" for k, v in info.get("nvidia_smi", {}).items())
    note = f" {run['note']}" if "note" in run else ""
    return (
        f"{info['device_name']}, {info['threads']} threads of {info['cores']} cores, load average "
        f"{info['load_average']} at the start, torch {info['torch']}, Python "
        f"{info['python_version']}, {run['datetime'][:10]}{clocks}, commit {_commit(run)}: "
        f"`{run['command']}`.{note}{busy}"
    )


def _is_provisional(run: Report) -> bool:
    """Whether other work had its cores when it began."""
    info = run["machine_info"]
    return bool(info["load_average"] > info["cores"])


def _commit(run: Report) -> str:
    found = run["commit_info"]
    named = str(found["id"])[:10] if found["id"] else "not known"
    return named + (" with uncommitted changes" if found["dirty"] else "")


def rates(run: Report) -> str:
    """The limits, which were measured in the same run; absolute only on a GPU."""
    found = run["limits"]
    names = {
        "copy_bytes_per_second": ("copy", 1e-9, "GB/s"),
        "float32_flops_per_second": ("float32 products", 1e-12, "TFLOP/s"),
        "bfloat16_flops_per_second": ("bfloat16 products", 1e-12, "TFLOP/s"),
    }
    return "Limits, measured in the same run: " + ", ".join(
        f"{label} {found[name] * scale:.4g} {unit}"
        for name, (label, scale, unit) in names.items() if name in found
    )  # fmt: skip


# --- README ---------------------------------------------------------------------------------------

COMPILED = ("torch.compile", "torch.compile, noise drawn before")
Cell = tuple[str, tuple[str, ...]]


@dataclass(frozen=True)
class Row:
    """A row of README's table: what, against what, and by device the case and its contestants.

    Of several contestants the fastest counts.
    """

    what: str
    against: str
    cells: dict[str, Cell]


README_ROWS = (
    Row(
        "Langevin update, float32 (GPU 16384×3072, CPU 256×3072)",
        "tuned in-place eager",
        {
            "cuda": ("langevin/fp32/16384x3072/cold", ("in-place eager",)),
            "cpu": ("langevin/fp32/256x3072", ("in-place eager",)),
        },
    ),
    Row(
        "the same",
        "torch.compile, the faster of two ways",
        {
            "cuda": ("langevin/fp32/16384x3072/cold", COMPILED),
            "cpu": ("langevin/fp32/256x3072", COMPILED),
        },
    ),
    Row(
        "affine coupling and log-det, forward + backward (8192×1536, 256×1536)",
        "eager",
        {
            "cuda": ("affine_coupling/forward+backward/fp32/8192x1536/cold", ("eager",)),
            "cpu": ("affine_coupling/forward+backward/fp32/256x1536", ("eager",)),
        },
    ),
    Row(
        "mixture coupling, K = 32, forward (2²⁰ elements, 2¹⁴)",
        "torch.compile",
        {
            "cuda": ("mixture_logistic/forward/fp32/K32/1048576", COMPILED[:1]),
            "cpu": ("mixture_logistic/forward/fp32/K32/16384", COMPILED[:1]),
        },
    ),
    Row(
        "the same, forward + backward",
        "torch.compile",
        {
            "cuda": ("mixture_logistic/forward+backward/fp32/K32/1048576", COMPILED[:1]),
            "cpu": ("mixture_logistic/forward+backward/fp32/K32/16384", COMPILED[:1]),
        },
    ),
    Row(
        "its inverse",
        "the published bisection",
        {
            "cuda": ("mixture_logistic/inverse/fp32/K32/1048576", ("published bisection",)),
            "cpu": ("mixture_logistic/inverse/fp32/K32/16384", ("published bisection",)),
        },
    ),
    Row(
        "chain on a mixture of Gaussians by its energy, 1,024 chains",
        "torchebm, by autograd; on the CPU ours knows the closed form",
        dict.fromkeys(("cuda", "cpu"), ("chain/mixture, autograd", ("torchebm",))),
    ),
    Row(
        "the same by its score",
        "torchebm, by the same score",
        dict.fromkeys(("cuda", "cpu"), ("chain/mixture, closed form", ("torchebm",))),
    ),
    Row(
        "one chain of two numbers with a score that costs nothing",
        "a plain loop, on the GPU as one CUDA graph",
        {
            "cuda": ("chain/cheap score, one chain", ("CUDA graph of plain loop",)),
            "cpu": ("chain/cheap score, one chain", ("plain loop",)),
        },
    ),
    Row(
        "chain on an MLP (GPU 4,096 chains, CPU 1,024)",
        "a plain loop",
        {
            "cuda": ("chain/MLP, 4096 chains", ("plain loop",)),
            "cpu": ("chain/MLP", ("plain loop",)),
        },
    ),
    Row(
        "the same, `compile=True`",
        "a loop of the compiled gradient, on the GPU as one CUDA graph",
        {
            "cuda": ("chain/MLP, 4096 chains, compiled", ("CUDA graph of compiled gradient",)),
            "cpu": ("chain/MLP, compiled", ("compiled gradient",)),
        },
    ),
    Row(
        "Langevin update of a small state, 28×3072",
        "in-place eager, on the GPU as one CUDA graph",
        {
            "cuda": ("langevin/fp32/28x3072", ("CUDA graph of in-place",)),
            "cpu": ("langevin/fp32/28x3072", ("in-place eager",)),
        },
    ),
)


_MARK = " *"  # of a provisional run


def _readme_cell(report: Report, row: Row) -> str:
    """The ratio to ours of the row's fastest contestant in these results."""
    case, contestants = row.cells[report["machine_info"]["device"]]
    records = by_case(report).get(case, {})
    ratios = [records[n]["extra_info"]["ratio_to_ours"] for n in contestants if n in records]
    if not ratios:
        return "not measured"
    provisional = any(case in run["cases"] for run in runs(report) if _is_provisional(run))
    return _ratio(min(ratios, key=lambda r: r["median"])) + provisional * _MARK


def _readme_source(folder: str, report: Report) -> str:
    info = report["machine_info"]
    commits = " and ".join(dict.fromkeys(_commit(run) for run in runs(report)))
    return (
        f"{folder}: {info['device_name']}, {info['cores']} cores, torch {info['torch']}, "
        f"{report['datetime'][:10]}, commit {commits}."
    )


def readme_block(reports: dict[str, Report]) -> str:
    """What stands between the markers: README's rows, with a column for every folder's results.

    GPUs come first.
    """
    order = sorted(reports, key=lambda folder: reports[folder]["machine_info"]["device"] == "cpu")
    links = [f"[{folder}](benchmarks/results/{folder}/table.md)" for folder in order]
    rows = [["operation", "against", *links], ["---"] * (2 + len(links))]
    for row in README_ROWS:
        cells = [_readme_cell(reports[folder], row) for folder in order]
        rows.append([row.what, row.against, *cells])
    about = f"Its time / ours: median (20th to 80th percentile). {FASTER}"
    sources = [_readme_source(folder, reports[folder]) for folder in order]
    if any(_MARK in cell for row in rows[2:] for cell in row):
        about += " *: provisional, of a run beside other work."
    about = " ".join((about, "The columns link to all cases, with command and limits.", *sources))
    if not any(r["machine_info"]["device"] == "cuda" for r in reports.values()):
        about += "\n\nGPU: not measured."
    return f"{_markdown(rows)}\n\n{about}"


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
    figure, axes = plt.subplots(figsize=(10, 1 + 0.24 * len(bars)))
    for row, (_, ratio) in enumerate(bars):
        color = "tab:blue" if ratio["median"] >= 1 else "tab:orange"
        axes.barh(row, ratio["median"] - 1, left=1, color=color)
        axes.plot([ratio["p20"], ratio["p80"]], [row, row], color="black", linewidth=1.5)
        at = max(1.0, ratio["p80"])
        axes.annotate(f" {ratio['median']:.3g}", (at, row), va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("time / ours, median and 20th to 80th percentile (above 1, ours is faster)")
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.margins(x=0.1)
    _save(figure, path)


def plot_sizes(report: Report, path: Path) -> None:
    """Time per call against the number of elements, of what was measured at several sizes.

    A panel for each family and dtype, a line for each contestant.
    """
    plt = _pyplot()
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for case, records in by_case(report).items():
        family = case.removesuffix("/cold").rpartition("/")[0]
        for name, record in records.items():
            point = (record["extra_info"]["elements"], record["stats"]["median"])
            panels.setdefault(family, {}).setdefault(name, []).append(point)
    several = {
        family: {name: sorted(points) for name, points in lines.items() if len(points) > 1}
        for family, lines in panels.items()
        if family and family != "chain" and len({size for size, _ in lines[OURS]}) > 1
    } or panels
    figure, grid = plt.subplots(
        (len(several) + 1) // 2, 2, figsize=(11, 3.6 * ((len(several) + 1) // 2)), squeeze=False
    )
    for axes, (family, lines) in zip(grid.flat, several.items(), strict=False):
        for name, points in lines.items():
            width = 2.5 if name == OURS else 1
            axes.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=width)
        axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="seconds per call")
        axes.set_title(family, fontsize=9)
        axes.legend(fontsize=6)
    for axes in list(grid.flat)[len(several) :]:
        axes.set_axis_off()
    _save(figure, path)


def plot_roofline(report: Report, path: Path) -> None:
    """Bytes per second that each memory-bound contestant reached, under the copy's."""
    plt = _pyplot()
    limits = [run["limits"]["copy_bytes_per_second"] for run in runs(report)]
    points: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    for case, records in by_case(report).items():
        for name, record in records.items():
            extra = record["extra_info"]
            if "share_of_copy" in extra:
                key = (case.partition("/")[0], name == OURS)
                reached = extra["expected_bytes"] / record["stats"]["median"]
                point = (extra["expected_bytes"], reached)
                points.setdefault(key, []).append(point)
    figure, axes = plt.subplots(figsize=(8, 5))
    families = list(dict.fromkeys(family for family, _ in points))
    for (family, is_ours), found in points.items():
        color, marker = f"C{families.index(family)}", "o" if is_ours else "x"
        label = f"{family}, {'ours' if is_ours else 'others'}"
        axes.scatter(*zip(*found, strict=True), label=label, color=color, marker=marker)
    for limit in limits:
        axes.axhline(limit, color="black", linewidth=1)
    axes.plot([], [], color="black", linewidth=1, label="copy, measured in the same run")
    sizes = [size for found in points.values() for size, _ in found]
    if sizes:
        ends = [min(sizes), max(sizes)]
        axes.plot(ends, [0.6 * max(limits)] * 2, color="grey", linestyle=":", label="60% of it")
    axes.set(xscale="log", yscale="log", xlabel="expected bytes", ylabel="bytes per second")
    axes.legend(fontsize=7)
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
    sections = [table(report), FASTER, provenance(report), parts(report), details(report)]
    (folder / "table.md").write_text("\n\n".join(filter(None, sections)) + "\n")
    if not report["benchmarks"]:
        return
    if optional("matplotlib") is None:
        print("no plots: matplotlib is not installed")
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
