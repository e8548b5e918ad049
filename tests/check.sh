#!/usr/bin/env bash
# The long tier (`make check`) in three parts, all by default:
#   tests    every test that needs no GPU, the slow ones included
#   sanitize the CPU library under sanitizers and valgrind, see tests/sanitize.sh
#   wheels   the source distribution, a manylinux wheel made from it, and the quick tests with that
#            wheel beside other torch versions, each in a fresh virtual environment, but for those of
#            the sources, and those that need a GPU on a stand-in (tests/stand_in_gpu/run.sh); the
#            wheel imported by the other Python versions that are found; needs the package index and
#            about 10 GB of disk while it runs
# The log of a part that passed is docs/check-PART.txt.
#
#   tests/check.sh PYTHON [PART…]      PYTHON: the project's development environment
#   CHECK_TORCH="torch==2.10.0 torch==2.11.0 torch"   the versions to try
#   CHECK_PYTHON="3.10 3.13"                          the same of Python
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
parts=("$@")
[ $# -gt 0 ] || parts=(tests sanitize wheels)
versions=${CHECK_TORCH-torch==2.10.0 torch==2.11.0 torch}
pythons=${CHECK_PYTHON-3.10 3.13}
stdlib=$("$python" -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p docs build

# Without the tests of what lies in csrc/, in the package's source text, or in a folder where it was
# built.
without_sources=()
for name in architecture build emulation_checks emulation_ops instruction_counts sass_report; do
  without_sources+=("--ignore=tests/test_$name.py")
done

# Makes $work/venv with this Python, the wheel and these packages, and imports it away from the source
# tree.
install() { # python, wheel, package…
  rm -rf "$work/venv" "$work/tree"
  "$1" -m venv "$work/venv"
  "$work/venv/bin/python" -m pip install -qq --disable-pip-version-check "${@:2}"
  mkdir -p "$work/tree"
  (cd "$work/tree" && "$work/venv/bin/python" -c "
import torch, coopflow_ext as cf
print('torch', torch.__version__, 'GPU', torch.cuda.is_available(), 'from', cf.__file__)
print(cf.build_info())
assert cf.ops.normal((2, 3), cf.Key(0).tensor()).isfinite().all()")
}

beside_torch() { # wheel, requirement
  local started=$SECONDS
  echo "=== the wheel beside $2"
  install "$python" "$1[train,diagnostics]" "$2" pytest pytest-timeout pytest-xdist \
    pytest-benchmark hypothesis scipy mpmath
  git ls-files -z -- . ':!coopflow_ext' ':!csrc' | xargs -0 cp --parents -t "$work/tree"
  (cd "$work/tree" && "$work/venv/bin/python" -m pytest -q -p no:cacheprovider -n 2 --dist loadfile \
    -m "not gpu and not slow" -k "not gpu_check" "${without_sources[@]}")
  on_the_stand_in_gpu
  echo "=== $2: right, $((SECONDS - started)) s"
}

# The tests for a GPU, where the headers are those of the CUDA that torch was built with.
on_the_stand_in_gpu() {
  local cuda headers=${CUDA_HOME:-/usr/local/cuda}/include/cuda_runtime_api.h
  cuda=$("$work/venv/bin/python" -c 'import torch; print((torch.version.cuda or "none").split(".")[0])')
  if ! grep -qs "define CUDART_VERSION *${cuda}0" "$headers"; then
    echo "=== no stand-in GPU: no headers of CUDA $cuda, for which this torch was built"
    return
  fi
  echo "=== the stand-in GPU"
  (cd "$work/tree" && tests/stand_in_gpu/run.sh "$work/venv/bin/python" -q -n 2 -p no:cacheprovider \
    "${without_sources[@]}")
}

find_python() { # 3.10: prints a program of that version, of the system, uv or pyenv
  local candidate
  for candidate in "python$1" "$(uv python find --no-python-downloads "$1" 2>/dev/null)" \
    "$HOME/.pyenv/versions/$1".*/bin/python; do
    if [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$1" ]
    then
      echo "$candidate"
      return
    fi
  done
}

with_python() { # wheel, version
  local found
  found=$(find_python "$2")
  if [ -z "$found" ]; then
    echo "=== Python $2: not found"
    return
  fi
  echo "=== the wheel in Python $2"
  install "$found" "$1" torch
}

part_tests() {
  "$python" -m pytest -q -m "not gpu" -p no:cacheprovider -n 2 --dist loadfile --durations=40
}

part_sanitize() { tests/sanitize.sh "$python"; }

part_wheels() {
  echo "=== sdist, and a wheel built from it"
  "$python" -m build --sdist --no-isolation --outdir "$work/sdist" . >"$work/build.log" 2>&1 ||
    { cat "$work/build.log" && return 1; }
  COOPFLOW_BUILD_HOST=0 "$python" -m pip wheel -qq --disable-pip-version-check --no-deps \
    --no-build-isolation --wheel-dir "$work/linux" "$work"/sdist/*.tar.gz
  PATH=$(dirname "$python"):$PATH auditwheel repair --plat manylinux_2_28_x86_64 --only-plat \
    --exclude 'libtorch*.so' --wheel-dir "$work/wheel" "$work"/linux/*.whl
  local wheel version
  wheel=$(ls "$work"/wheel/*.whl)
  basename "$wheel"
  for version in $versions; do
    beside_torch "$wheel" "$version"
  done
  for version in $pythons; do
    with_python "$wheel" "$version"
  done
}

run() {
  echo "part    $1"
  echo "date    $(date -u +%Y-%m-%dT%H:%M:%SZ)"
  echo "commit  $commit"
  echo "machine $(uname -sm), $(nproc) cores"
  "part_$1"
  echo "=== passed in $SECONDS s"
}

commit=$(git describe --always --dirty --abbrev=40)  # before a part's log changes the tree
paths="s|$work|…|g; s|$PWD|.|g; s|$stdlib|…|g"  # logs do not hold those of a machine
for part in "${parts[@]}"; do
  SECONDS=0
  run "$part" 2>&1 | sed -u "$paths" | tee "build/check-$part.txt"
  cp "build/check-$part.txt" "docs/check-$part.txt"
done
