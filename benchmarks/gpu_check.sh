#!/usr/bin/env bash
# Everything worth knowing about this checkout on a machine with a GPU, in a few small files.
#
#   benchmarks/gpu_check.sh [--dry-run] OUTDIR [stage…]
#
# Stages, in this order, all of them by default; each ends within STAGE_SECONDS (570):
#   facts     device, driver, clocks, torch, compilers, commit
#   build     the native library with CUDA code, or COOPFLOW_LIBRARY=/path/to/libcoopflow_ext.so
#   tests     the tests that need a GPU, then all others that can run on it
#   sanitize  compute-sanitizer: memcheck, then racecheck, over every op on small shapes
#   bench     the operators' cases of benchmarks/suite.py, and the kernels' resource report
#   models    its chains, flows and the rest; both add to OUTDIR/results.json case by case
#   profile   ncu over the operators, where the machine allows it
#   report    OUTDIR/table.md and plots from results.json
#   pack      logs into OUTDIR/logs.tar.gz; that, summary.txt, results and plots stay: 8 files
#
# OUTDIR/summary.txt says how each stage ended. A stage that ended "ok" is not run again in the same
# OUTDIR, and one that ran out of time goes on with the cases it lacks; one that failed, or that the
# machine refused, does not stop the rest. Nothing is downloaded: PYTHON (python3) must have torch,
# numpy, pytest and the other test requirements.
# --dry-run goes through the same stages on the CPU and only collects tests and benchmarks.
# Exit status: 0 unless a stage failed; a refused tool is no failure.
set -uo pipefail

usage() { sed -n '2,/^set /p' "$0" | sed -e '/^set /d' -e 's/^# \{0,1\}//'; }

dry_run=0
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
if [ $# -lt 1 ] || [ "$1" = --help ]; then
  usage
  [ "${1:-}" = --help ]
  exit
fi
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd)
shift
stages=("$@")
[ $# -gt 0 ] || stages=(facts build tests sanitize bench models profile report pack)
cd "$root" || exit 1

PYTHON=${PYTHON:-python3}
STAGE_SECONDS=${STAGE_SECONDS:-570}
device=cuda
[ "$dry_run" = 0 ] || device=cpu
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
REFUSED=77 # exit status of a stage whose tool this machine lacks or refuses

# Prints a command and what it says, or that it is not there.
show() {
  echo "\$ $*"
  if command -v "$1" >/dev/null; then "$@" 2>&1 || true; else echo "not found"; fi
}

stage_facts() {
  date -u +%Y-%m-%dT%H:%M:%SZ
  show git log -1 --format=%H
  show uname -a
  show nvidia-smi
  show nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit \
    --format=csv
  show nvcc --version
  show "${CXX:-c++}" --version
  show cmake --version
  "$PYTHON" - <<'PYTHON_CODE'
import platform

import torch

print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
else:
    print("torch sees no CUDA device")
PYTHON_CODE
}

stage_build() {
  if [ -n "${COOPFLOW_LIBRARY:-}" ]; then
    echo "using COOPFLOW_LIBRARY=$COOPFLOW_LIBRARY"
  elif [ "$dry_run" = 1 ]; then
    echo "dry run: using the library in coopflow_ext/"
  else
    local build=${TMPDIR:-/tmp}/coopflow-gpu-check-build
    COOPFLOW_CUDA=1 cmake -S . -B "$build" -DPython_EXECUTABLE="$(command -v "$PYTHON")" &&
      cmake --build "$build" --parallel &&
      cmake --install "$build" --prefix "$build/stage" &&
      mv -f "$build"/stage/coopflow_ext/*.so coopflow_ext/ || return 1
  fi
  "$PYTHON" -c "
import torch
from coopflow_ext import _extension
print(_extension.load_library())
print(torch.ops.coopflow.build_info())"
}

stage_tests() {
  local mode=() status=0
  [ "$dry_run" = 0 ] || mode=(--collect-only -q)
  "$PYTHON" -m pytest tests --device "$device" -m gpu "${mode[@]}" || status=$?
  # What compiles for minutes and never touches the device is left out.
  "$PYTHON" -m pytest tests --device "$device" -m "not slow and not gpu" -k "not emulation" \
    --ignore=tests/test_build.py --continue-on-collection-errors --durations=10 "${mode[@]}" ||
    status=$?
  return $status
}

# Runs one tool of compute-sanitizer; tells a refusal of the device from a finding.
sanitizer() { # tool, its options…
  local log=$out/sanitize-$1.txt status
  echo "--- compute-sanitizer --tool $*"
  # Without torch's caching allocator every tensor has its own bounds.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$@" --error-exitcode 9 \
    "$PYTHON" benchmarks/exercise_ops.py --device cuda >"$log" 2>&1
  status=$?
  tail -n 40 "$log"
  if grep -q -i -E "device not supported|failed to initialize|not permitted" "$log"; then
    status=$REFUSED
  fi
  rm -f "$log"
  return $status
}

stage_sanitize() {
  if [ "$dry_run" = 1 ]; then
    "$PYTHON" benchmarks/exercise_ops.py --device cpu
    return
  fi
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer: not found"
    return $REFUSED
  fi
  # Calls that fail are no finding: the runtime asks the driver for functions that it may lack, and
  # this library raises.
  sanitizer memcheck --report-api-errors no || return
  sanitizer racecheck
}

# Adds the cases that match the patterns to OUTDIR/results.json.
suite() {
  local mode=(--device "$device" --out "$out" --resume) pattern
  [ "$dry_run" = 0 ] || mode=(--list)
  for pattern in "$@"; do mode+=(--case "$pattern"); done
  "$PYTHON" benchmarks/suite.py "${mode[@]}"
}

stage_bench() {
  "$PYTHON" benchmarks/sass_report.py || echo "sass_report: no report"
  suite 'langevin/*' 'affine_coupling/*' 'mixture_logistic/*'
}

stage_models() {
  suite 'chain/*' 'flowpp/*' 'coop/*'
}

stage_profile() {
  if [ "$dry_run" = 1 ]; then
    echo "dry run: ncu would profile benchmarks/exercise_ops.py, which sanitize has run"
    return
  fi
  if ! command -v ncu >/dev/null; then
    echo "ncu: not found"
    return $REFUSED
  fi
  local log=$out/ncu.txt status
  ncu --set basic --launch-count 60 "$PYTHON" benchmarks/exercise_ops.py --device cuda >"$log" 2>&1
  status=$?
  cat "$log"
  ! grep -q -i -E "ERR_NVGPUCTRPERM|not supported" "$log" || status=$REFUSED
  rm -f "$log"
  return $status
}

stage_report() {
  if [ ! -f "$out/results.json" ]; then
    echo "no results.json to report on"
    [ "$dry_run" = 1 ]
    return
  fi
  "$PYTHON" benchmarks/report.py "$out/results.json" --out "$out"
}

stage_pack() {
  local logs=() name
  cd "$out" || return 1
  [ ! -f logs.tar.gz ] || tar -xzf logs.tar.gz --skip-old-files # those of an earlier run
  for name in {facts,build,tests,sanitize,bench,models,profile,report}.log; do
    [ ! -f "$name" ] || logs+=("$name")
  done
  [ ${#logs[@]} -gt 0 ] || return 0
  tar -czf logs.tar.gz "${logs[@]}" && rm -f "${logs[@]}"
}

# As `timeout` runs programs, not functions, each stage is this script again.
if [ "${GPU_CHECK_STAGE:-}" = inner ]; then
  "stage_${stages[0]}"
  exit
fi

failed=0
for stage in "${stages[@]}"; do
  if ! declare -F "stage_$stage" >/dev/null; then
    echo "unknown stage '$stage': facts, build, tests, sanitize, bench, models, profile, report or pack" >&2
    exit 2
  fi
  if [ "$stage" != pack ] && grep -q "^$stage ok" "$out/summary.txt" 2>/dev/null; then
    echo "$stage: done before"
    continue
  fi
  started=$SECONDS
  flags=()
  [ "$dry_run" = 0 ] || flags=(--dry-run)
  GPU_CHECK_STAGE=inner timeout -k 10 "$STAGE_SECONDS" \
    bash "$root/benchmarks/gpu_check.sh" "${flags[@]}" "$out" "$stage" >"$out/$stage.log" 2>&1
  status=$?
  case $status in
    0) verdict=ok ;;
    "$REFUSED") verdict="refused by this machine: $(tail -n 1 "$out/$stage.log")" ;;
    124 | 137) verdict="failed: over $STAGE_SECONDS s" failed=1 ;;
    *) verdict="failed: exit status $status" failed=1 ;;
  esac
  [ "$verdict" = ok ] || tail -n 20 "$out/$stage.log"
  echo "$stage $verdict ($((SECONDS - started)) s)" | tee -a "$out/summary.txt"
done
exit $failed
