"""Every case, one file of results: what `coopflow bench` runs.

    python benchmarks/suite.py [--quick] [--device cpu|cuda] [--out DIR] [--case PATTERN] [--list]

DIR/results.json is written after every case, so an interrupted run keeps what it finished;
`--resume` goes on with the rest, and the file then says which case is from which run. A case that
fails, because a contestant's result is wrong or it cannot run, has no figures; the others are
measured, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import (
    FULL,
    OURS,
    QUICK,
    Case,
    command_line,
    full_float32,
    measure,
    measured_limits,
    new_report,
    write_json,
)
from merge import check_same, merged
from report import load

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
RESULTS = "results.json"


def all_cases() -> list[Case]:
    return [case for module in MODULES for case in importlib.import_module(module).SUITE_CASES]


def select(patterns: Sequence[str], device: str, quick: bool) -> list[Case]:
    """The cases that match a pattern and run on the device.

    Raises:
        ValueError: a pattern matches no case of this device; the message lists them.
    """
    cases = [c for c in all_cases() if device in c.devices and (c.quick or not quick)]
    for pattern in patterns:
        if not any(fnmatch.fnmatch(c.name, pattern) for c in cases):
            names = ", ".join(c.name for c in cases)
            raise ValueError(f"case must match one of {names}; got {pattern!r}")
    return [c for c in cases if not patterns or any(fnmatch.fnmatch(c.name, p) for p in patterns)]


def check_device(name: str) -> torch.device:
    """Raises ValueError when torch cannot use the device."""
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that this torch can use, got {name!r}: no CUDA here")
    return device


def open_report(path: Path, resume: bool) -> dict[str, Any] | None:
    """The report to go on with, or None for a new one; the folder is known to be writable after.

    Raises:
        ValueError: the folder cannot be written, or holds results that nobody said to continue, or
            something else.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_suffix(".tmp")
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"out cannot be written: {error}") from error
    if not path.exists():
        return None
    if not resume:
        raise ValueError(f"{path} exists: give another --out, or --resume to add what it lacks")
    return load(path)


def run(
    device: str = "cpu",
    quick: bool = False,
    out: Path | None = None,
    cases: Sequence[str] = (),
    resume: bool = False,
) -> dict[str, Any]:
    """Measure the cases, print each as it ends and write `out`/results.json.

    Cases that failed are under "failed" in the report, with the reason; a resumed run tries them
    again.

    Raises:
        ValueError: a device, a case or a folder that will not do; nothing was measured then.
        KeyboardInterrupt: with a message that says where the finished cases are.
    """
    target = check_device(device)
    selected = select(cases, target.type, quick)
    path = None if out is None else Path(out) / RESULTS
    old = None if path is None else open_report(path, resume)
    report = new_report(target, {}, command_line(), quick)
    if old:
        check_same(old, report)
        selected = [case for case in selected if case.name not in old["finished"]]
        if not selected:
            return old
    report["limits"] = measured_limits(target, quick)
    torch.manual_seed(0)
    whole = old or report
    try:
        for case in selected:
            run_case(case, target, quick, report)
            whole = merged(old, report) if old else report
            if path is not None:
                write_json(path, whole)
    except KeyboardInterrupt:
        where = f"{len(whole['finished'])} finished cases are in {path}" if path else "no --out"
        raise KeyboardInterrupt(f"interrupted; {where}") from None
    return whole


def run_case(case: Case, device: torch.device, quick: bool, report: dict[str, Any]) -> None:
    """Measure one case and add to the report what came of it."""
    try:
        with full_float32():
            records, gaps = measure(case, device, QUICK if quick else FULL, report["limits"])
    except Exception as error:
        # Whatever it is, it is in the report, and the cases after this one are measured.
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {' '.join(lines[:3])}"
        report["failed"].append({"case": case.name, "error": reason})
        print(f"{case.name}\n  FAILED: {reason}", flush=True)
        return
    report["benchmarks"] += records
    report["not_measured"] += gaps
    report["finished"].append(case.name)
    print(summary(case.name, records, gaps), flush=True)


def failures(report: dict[str, Any]) -> str:
    """One line for a report with cases that failed; else empty."""
    failed = report["failed"]
    names = ", ".join(f["case"] for f in failed)
    return f"{len(failed)} cases failed, so nothing of them was timed: {names}" if failed else ""


def summary(name: str, records: list[dict[str, Any]], gaps: list[dict[str, str]]) -> str:
    """A case in a few lines: time of ours, then each other's ratio to it."""
    lines = [name]
    for record in records:
        extra = record["extra_info"]
        if record["name"] == OURS:
            cell = f"{extra['nanoseconds_per_element']:.3g} ns per element and step"
        else:
            ratio = extra["ratio_to_ours"]
            cell = f"{ratio['median']:.2f}x ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
        if "share_of_copy" in extra:
            cell += f", {extra['expected_bytes'] / 1e6:.3g} MB: "
            cell += f"{extra['share_of_copy']:.0%} of copy bandwidth"
        if "share_of_matmul" in extra:
            cell += f", {extra['share_of_matmul']:.0%} of the matrix rate"
        lines.append(f"  {record['name']:<36}{cell}")
        if "limited_by" in extra:
            lines.append(f"    limited by {extra['limited_by']}")
        lines += [f"    {part:<34}{1e3 * t:.2f} ms" for part, t in extra.get("parts", {}).items()]
    lines += [f"  {gap['contestant']:<36}not measured: {gap['reason']}" for gap in gaps]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few cases, no compilation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder of results.json")
    parser.add_argument("--case", action="append", default=[], help="a name or pattern, repeatable")
    parser.add_argument("--resume", action="store_true", help="add to the results in --out")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    args = parser.parse_args(argv)
    try:
        if args.list:
            print("\n".join(c.name for c in select(args.case, args.device, args.quick)))
        else:
            failed = failures(run(args.device, args.quick, args.out, args.case, args.resume))
            if failed:
                print(f"suite: {failed}", file=sys.stderr)
                return 1
    except ValueError as error:
        print(f"suite: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"suite: {error}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
