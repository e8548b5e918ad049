"""What got slower between two results of the suite, beyond noise.

    python benchmarks/compare.py BASE.json NEW.json

Compared is what both runs measured in pairs: each baseline's time divided by ours. Ours got slower
where the new ratio's 80th percentile lies below the base's 20th by more than 1%. Two runs on one
GPU are compared by time as well. Cases that only one file has are named. Exit status 1 when
something got slower, 2 when the files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from harness import OURS, RESOLUTION
from report import by_case, load


def is_slower_ratio(base: dict[str, float], new: dict[str, float]) -> bool:
    return new["p80"] < base["p20"] * (1 - RESOLUTION)


def is_slower_time(base: dict[str, float], new: dict[str, float]) -> bool:
    return new["p20"] > base["p80"] * (1 + RESOLUTION)


def regressions(base: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each case and contestant that got slower beyond noise."""
    lines = []
    old_cases, new_cases = by_case(base), by_case(new)
    same_gpu = (
        base["machine_info"]["device"] == "cuda"
        and base["machine_info"]["device_name"] == new["machine_info"]["device_name"]
    )
    for case in old_cases.keys() & new_cases.keys():
        for name in old_cases[case].keys() & new_cases[case].keys():
            old_record, new_record = old_cases[case][name], new_cases[case][name]
            if name == OURS:
                old, now = old_record["stats"], new_record["stats"]
                if same_gpu and is_slower_time(old, now):
                    times = f"{1e6 * old['median']:.1f} to {1e6 * now['median']:.1f} µs"
                    lines.append(f"{case}: ours went from {times}")
                continue
            old = old_record["extra_info"]["ratio_to_ours"]
            now = new_record["extra_info"]["ratio_to_ours"]
            if is_slower_ratio(old, now):
                ratios = f"{old['median']:.2f} to {now['median']:.2f}"
                lines.append(f"{case}: {name} / ours went from {ratios}")
    return sorted(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("new", type=Path)
    args = parser.parse_args()
    try:
        base, new = load(args.base), load(args.new)
        devices = [r["machine_info"]["device"] for r in (base, new)]
        if devices[0] != devices[1]:
            raise ValueError(f"the devices differ: {devices[0]} and {devices[1]}")
        if not by_case(base).keys() & by_case(new).keys():
            raise ValueError("the files have no case in common")
    except ValueError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    for path, mine, other in ((args.base, base, new), (args.new, new, base)):
        for case in by_case(mine).keys() - by_case(other).keys():
            print(f"only in {path}: {case}")
    lines = regressions(base, new)
    print("\n".join(lines) if lines else "nothing got slower beyond noise")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
