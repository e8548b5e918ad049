#!/usr/bin/env bash
# The noise through dieharder's tests, one after the other: words and normals, with neighbours along
# elements, chains and steps. Writes a report to standard output; hours on one core with -a.
#
#   tests/noise_battery.sh PYTHON [dieharder's options…]      default: -a
#
# Needs dieharder (Debian: apt install dieharder).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift
[ $# -gt 0 ] || set -- -a
command -v dieharder >/dev/null || { echo "missing: dieharder (Debian: apt install dieharder)" >&2; exit 1; }
count=$(mktemp)
trap 'rm -f "$count"' EXIT
export PYTHONPATH=$PWD OMP_NUM_THREADS=1

echo "date    $(date -u +%Y-%m-%dT%H:%M:%SZ)"
echo "commit  $(git describe --always --dirty --abbrev=40)"
for kind in words normals; do
  for fastest in element chain step; do
    echo "=== $kind, $fastest by $fastest: noise_stream.py $kind --fastest $fastest | dieharder $* -g 200"
    "$python" tests/noise_stream.py "$kind" --fastest "$fastest" --count "$count" |
      dieharder "$@" -g 200
    echo "=== bytes $(cat "$count")"
  done
done
