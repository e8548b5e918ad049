"""One file of results out of several runs on one machine, each case with the run it is from.

    python benchmarks/merge.py OUT.json RUN.json RUN.json…

The runs must agree in what makes figures comparable: device, torch, commit, --quick; no two may
hold the same case. A run that did not have the commit as it stands says so: "dirty" in its
`commit_info`, and what was different in its "note".
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

from harness import write_json
from report import load, runs

Report = dict[str, Any]


def check_same(first: Report, second: Report) -> None:
    """Raises ValueError unless results of both can stand in one file."""
    facts = {
        "the device": lambda r: r["machine_info"]["device_name"],
        "torch": lambda r: r["machine_info"]["torch"],
        "the commit": lambda r: r["commit_info"]["id"],
        "--quick": lambda r: r.get("quick"),
    }
    for name, fact in facts.items():
        if fact(first) != fact(second):
            raise ValueError(
                f"{name} was {fact(first)} and is {fact(second)}: these results need two files"
            )


def merged(first: Report, second: Report) -> Report:
    """The results of both, and what each run was.

    What failed in one run and was measured in the other has not failed.

    Raises:
        ValueError: the runs cannot be compared, or both measured one case.
    """
    check_same(first, second)
    if twice := set(first["finished"]) & set(second["finished"]):
        raise ValueError(f"measured in both runs: {', '.join(sorted(twice))}")
    lists = {
        name: [*first[name], *second[name]] for name in ("benchmarks", "not_measured", "finished")
    }
    failed = {f["case"]: f for f in (*first["failed"], *second["failed"])}
    still = [f for case, f in failed.items() if case not in lists["finished"]]
    measured = [run for run in (*runs(first), *runs(second)) if run["cases"]]
    return {**first, **lists, "failed": still, "runs": measured}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    args = parser.parse_args()
    try:
        write_json(args.out, functools.reduce(merged, [load(path) for path in args.runs]))
    except ValueError as error:
        print(f"merge: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
