#!/usr/bin/env bash
# Everything worth knowing about this checkout on a machine with a GPU, in a few small files.
#
#   benchmarks/gpu_check.sh [--dry-run] OUTDIR [stage…]
#
# Stages, in this order, all of them by default; each ends within STAGE_SECONDS (570):
#   facts      device, driver, clocks, torch, compilers, commit
#   build      the native library with CUDA code, or COOPFLOW_LIBRARY=/path/to/libcoopflow_ext.so
#   tests      the tests that need a GPU, then all others that can run on it
#   memcheck   compute-sanitizer over every op on small shapes: out-of-bounds and misaligned accesses
#   racecheck  the same for races in shared memory
#   bench      the operators' cases of benchmarks/suite.py, and the kernels' resource report
#   models     its chains, flows and the rest; both add to OUTDIR/results.json case by case
#   profile    ncu over every kernel on large shapes, where the machine allows it
#   report     OUTDIR/table.md and plots from results.json
#   pack       logs into OUTDIR/logs.tar.gz; that, summary.txt, results and plots stay: 7 files
#
# OUTDIR/summary.txt says how each stage ended. A stage that ended "ok" is not run again in the same
# OUTDIR; one that ran out of time goes on with the tests or cases it lacks; one that failed, or that
# the machine refused, does not stop the rest. Nothing is downloaded: PYTHON (python3) must have torch,
# numpy, safetensors, tqdm, pytest, pytest-benchmark, pytest-timeout, hypothesis, scipy and mpmath,
# and matplotlib for the plots; what else the tests use is skipped with its name where it is missing.
# In a copy without git's history, COOPFLOW_COMMIT=… names the commit.
# --dry-run goes through the same stages on the CPU and only collects tests and benchmarks.
# Exit status: 0 unless a stage failed; a refused tool is no failure.
set -uo pipefail

usage() { sed -n '2,/^set /p' "$0" | sed -e '/^set /d' -e 's/^# \{0,1\}//'; }

dry_run=0
if [ "${1:-}" = --dry-run ]; then
  dry_run=1
  shift
fi
case ${1:-} in
  --help) usage && exit ;;
  '' | -*) usage >&2 && exit 2 ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" && touch "$1/summary.txt" || exit 1 # their message says why
out=$(cd "$1" && pwd)
shift
stages=("$@")
all=(facts build tests memcheck racecheck bench models profile report pack)
[ $# -gt 0 ] || stages=("${all[@]}")
[ -z "${COOPFLOW_LIBRARY:-}" ] || COOPFLOW_LIBRARY=$(realpath -m "$COOPFLOW_LIBRARY")
cd "$root" || exit 1

PYTHON=${PYTHON:-python3}
STAGE_SECONDS=${STAGE_SECONDS:-570}
device=cuda
[ "$dry_run" = 0 ] || device=cpu
export PYTHONPATH="$root:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
REFUSED=77 # exit status of a stage whose tool this machine lacks or refuses

# Prints a command and what it says, or that it is not there.
show() {
  echo "\$ $*"
  if command -v "$1" >/dev/null; then "$@" 2>&1 || true; else echo "not found"; fi
}

stage_facts() {
  date -u +%Y-%m-%dT%H:%M:%SZ
  [ ! -e .git ] || show git log -1 --format=%H # else it may speak of a folder further up
  echo "COOPFLOW_COMMIT=${COOPFLOW_COMMIT:-}"
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
    # A folder for each checkout: CMake refuses one that another source configured.
    local build
    build=${TMPDIR:-/tmp}/coopflow-gpu-check-$(echo "$root" | cksum | cut -d ' ' -f 1)
    COOPFLOW_CUDA=1 cmake -S . -B "$build" -DPython_EXECUTABLE="$(command -v "$PYTHON")" &&
      cmake --build "$build" --parallel "$(nproc)" &&
      cmake --install "$build" --prefix "$build/stage" &&
      mv -f "$build"/stage/coopflow_ext/*.so coopflow_ext/ || return 1
  fi
  "$PYTHON" - "$device" <<'PYTHON_CODE'
import sys

import torch

from coopflow_ext import _extension

print(_extension.load_library())
print(torch.ops.coopflow.build_info())
if sys.argv[1] == "cuda":
    from coopflow_ext import Key, ops

    print("on the GPU:", ops.normal((1, 4), Key(0).tensor("cuda")))
PYTHON_CODE
}

stage_tests() {
  local mode=() status=0
  [ "$dry_run" = 0 ] || mode=(--collect-only -q)
  # Those that passed are noted, and left out when this stage is run again.
  export COOPFLOW_TESTS_PASSED=$out/tests-passed.log
  if [ ! -f "$COOPFLOW_TESTS_PASSED" ] && [ -f "$out/logs.tar.gz" ]; then
    tar -xzf "$out/logs.tar.gz" -C "$out" tests-passed.log 2>/dev/null || true # packed before
  fi
  mode+=(-p resume_tests --continue-on-collection-errors)
  run_tests -m gpu "${mode[@]}" || status=$?
  # What compiles for minutes and never touches the device is left out.
  run_tests -m "not slow and not gpu" -k "not emulation" --ignore=tests/test_build.py \
    --durations=10 "${mode[@]}" || status=$?
  return $status
}

# pytest on the device; that nothing is left to run (5) is right.
run_tests() {
  local status=0
  "$PYTHON" -m pytest tests --device "$device" "$@" || status=$?
  [ $status = 5 ] || return $status
}

# Runs one tool of compute-sanitizer; tells a refusal of the device from a finding.
sanitizer() { # tool, its options…
  if [ "$dry_run" = 1 ]; then
    echo "dry run: without compute-sanitizer, and once for both tools"
    [ "$1" = racecheck ] || "$PYTHON" benchmarks/exercise_ops.py --device cpu
    return
  fi
  local tool log=$out/sanitizer.txt status
  tool=$(find_tool compute-sanitizer) || return $REFUSED
  # Without torch's caching allocator every tensor has its own bounds.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool "$@" --error-exitcode 9 \
    "$PYTHON" benchmarks/exercise_ops.py --device cuda >"$log" 2>&1
  status=$?
  head -n 2000 "$log" # the first finding counts
  tail -n 5 "$log"
  if grep -q -i -E "device not supported|failed to initialize|not permitted" "$log"; then
    status=$REFUSED
  fi
  rm -f "$log"
  return $status
}

# Calls that fail are no finding: the runtime asks the driver for functions that it may lack, and
# this library raises.
stage_memcheck() { sanitizer memcheck --report-api-errors no; }

stage_racecheck() { sanitizer racecheck; }

# Prints where a tool of the CUDA toolkit is; else says that it is missing.
find_tool() {
  local path
  for path in "$(command -v "$1")" "${CUDA_HOME:-/usr/local/cuda}"/bin/"$1" \
    /opt/nvidia/nsight-compute/*/"$1"; do
    if [ -x "$path" ]; then
      echo "$path"
      return
    fi
  done
  echo "$1: not found" >&2
  return 1
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
  local bench stem cases=()
  for bench in benchmarks/bench_*.py; do
    stem=${bench#benchmarks/bench_}
    stem=${stem%.py}
    [ ! -f "csrc/ops/${stem}_op.h" ] || cases+=("$stem/*")
  done
  suite "${cases[@]}"
}

stage_models() {
  suite 'chain/*' 'flowpp/*' 'coop/*'
}

stage_profile() {
  if [ "$dry_run" = 1 ]; then
    "$PYTHON" benchmarks/exercise_ops.py --large --device cpu
    return
  fi
  local tool log=$out/ncu.txt status ours
  tool=$(find_tool ncu) || return $REFUSED
  ours=$(grep -ohE '\w+_kernel\b' csrc/cuda/*.cu csrc/cuda/*.cuh | sort -u | paste -sd '|')
  # Our kernels only, by name, at the clocks that the benchmarks ran at.
  "$tool" --set basic --clock-control none --launch-count 60 \
    --kernel-name "regex:^($ours)" \
    "$PYTHON" benchmarks/exercise_ops.py --large --device cuda >"$log" 2>&1
  status=$?
  cat "$log"
  if grep -q -i "no kernels were profiled" "$log"; then status=1; fi
  if grep -q -i -E "ERR_NVGPUCTRPERM|not supported|failed to initialize" "$log"; then
    status=$REFUSED
  fi
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
  for name in {facts,build,tests,tests-passed,memcheck,racecheck,bench,models,profile,report}.log; do
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
    echo "unknown stage '$stage': one of ${all[*]}" >&2
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
  [ "$stage $verdict" != "pack ok" ] || rm -f "$out/pack.log"
  echo "$stage $verdict ($((SECONDS - started)) s)" | tee -a "$out/summary.txt"
done
exit $failed
