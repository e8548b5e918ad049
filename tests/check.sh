#!/usr/bin/env bash
# The long tier (`make check`) in three parts, all by default:
#   tests    every test that needs no GPU, the slow ones included
#   sanitize the CPU library under sanitizers and valgrind, see tests/sanitize.sh
#   wheels   the source distribution, a wheel made from it, and the tests of the operators with that
#            wheel beside other torch versions, each in a fresh virtual environment; needs the package
#            index and about 10 GB of disk while it runs
# The log of a part that passed is docs/check-PART.txt.
#
#   tests/check.sh PYTHON [PART…]      PYTHON: the project's development environment
#   CHECK_TORCH="torch==2.10.0 torch==2.11.0 torch"   the versions to try
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
parts=("$@")
[ $# -gt 0 ] || parts=(tests sanitize wheels)
versions=${CHECK_TORCH-torch==2.10.0 torch==2.11.0 torch}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p docs build

source tests/op_tests.sh

beside_torch() { # wheel, requirement
  local venv=$work/venv started=$SECONDS
  echo "=== the wheel beside $2"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$2" "$1" \
    pytest pytest-timeout pytest-benchmark hypothesis scipy mpmath
  # Away from the source tree, so that the installed package is what gets tested.
  mkdir -p "$work/tree"
  cp -r tests benchmarks conftest.py pyproject.toml "$work/tree/"
  (
    cd "$work/tree"
    "$venv/bin/python" -c "
import torch, coopflow_ext as cf
print('torch', torch.__version__, 'GPU', torch.cuda.is_available(), 'from', cf.__file__)
print(cf.build_info())" | sed "s|$work|…|g"
    "$venv/bin/python" -m pytest -q -p no:cacheprovider -m "not gpu and not slow" "${op_tests[@]}"
  )
  rm -rf "$venv" "$work/tree"
  echo "=== $2: right, $((SECONDS - started)) s"
}

part_tests() { "$python" -m pytest -q -m "not gpu" -p no:cacheprovider -n 2 --dist loadfile; }

part_sanitize() { tests/sanitize.sh "$python"; }

part_wheels() {
  echo "=== sdist, and a wheel built from it"
  "$python" -m build --sdist --no-isolation --outdir "$work/sdist" . >"$work/build.log" 2>&1 ||
    { cat "$work/build.log" && return 1; }
  COOPFLOW_BUILD_HOST=0 "$python" -m pip wheel -qq --disable-pip-version-check --no-deps \
    --no-build-isolation --wheel-dir "$work/wheel" "$work"/sdist/*.tar.gz
  ls -1 "$work/wheel"
  for version in $versions; do
    beside_torch "$(ls "$work"/wheel/*.whl)" "$version"
  done
}

run() {
  echo "part    $1"
  echo "date    $(date -u +%Y-%m-%dT%H:%M:%SZ)"
  echo "commit  $(git describe --always --dirty --abbrev=40)"
  echo "machine $(uname -sm), $(nproc) cores"
  "part_$1"
  echo "=== passed in $SECONDS s"
}

for part in "${parts[@]}"; do
  SECONDS=0
  run "$part" 2>&1 | sed -u -e "s|$work|…|g" -e "s|$PWD|.|g" | tee "build/check-$part.txt"
  cp "build/check-$part.txt" "docs/check-$part.txt"
done
