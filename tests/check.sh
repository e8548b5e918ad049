#!/usr/bin/env bash
# The long tier (`make check`): every test, the source distribution, and the wheel beside other torch
# versions in fresh virtual environments. Needs the package index and about 15 GB of disk while it
# runs. The log goes to docs/check-log.txt.
#
#   tests/check.sh PYTHON      PYTHON: the project's development environment
#   CHECK_TORCH="torch==2.10.0 torch==2.11.0 torch"   the versions to try; empty: none
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
versions=${CHECK_TORCH-torch==2.10.0 torch==2.11.0 torch}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=docs/check-log.txt
mkdir -p docs build

# The tests of operators, which need no training extras.
op_tests=(tests/test_rng.py tests/test_langevin.py tests/test_affine_coupling.py)

beside_torch() { # wheel, requirement
  local venv=$work/venv started=$SECONDS
  echo "=== the wheel beside $2"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install -qq --disable-pip-version-check "$2" "$1" \
    pytest pytest-timeout pytest-benchmark hypothesis scipy mpmath
  # Away from the source tree, so that the installed package is what gets tested.
  mkdir -p "$work/tree"
  cp -r tests conftest.py pyproject.toml "$work/tree/"
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

run() {
  echo "date    $(date -u +%Y-%m-%dT%H:%M:%SZ)"
  echo "commit  $(git describe --always --dirty --abbrev=40)"
  echo "machine $(uname -sm), $(nproc) cores"
  echo "=== every test"
  "$python" -m pytest -m "not gpu"
  echo "=== sdist, and a wheel built from it"
  "$python" -m build --sdist --no-isolation --outdir "$work/sdist" . >"$work/build.log" 2>&1 ||
    { cat "$work/build.log" && return 1; }
  COOPFLOW_BUILD_HOST=0 "$python" -m pip wheel -qq --disable-pip-version-check --no-deps \
    --no-build-isolation --wheel-dir "$work/wheel" "$work"/sdist/*.tar.gz
  ls -1 "$work/wheel"
  for version in $versions; do
    beside_torch "$(ls "$work"/wheel/*.whl)" "$version"
  done
  echo "=== make check: everything passed"
}

run 2>&1 | sed -e "s|$work|…|g" -e "s|$PWD|.|g" | tee build/check-log.txt
cp build/check-log.txt "$log"
