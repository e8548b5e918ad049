#!/usr/bin/env bash
# The CPU library under memory and thread checkers (`make sanitize`, part of `make check`).
#
#   tests/sanitize.sh PYTHON [address|thread|valgrind]…
#
# address   AddressSanitizer and UndefinedBehaviorSanitizer, over the tests of operators
# thread    ThreadSanitizer, over those of them that use several threads
# valgrind  memcheck of every op on small shapes, with the library that is built for use, after a
#           program with mistakes, which it must find
#
# Builds go to build/sanitize-*, or BUILD-*. Needs gcc's sanitizer runtimes and valgrind, and says
# which is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
shift
checks=("$@")
[ $# -gt 0 ] || checks=(address thread valgrind)
build=${BUILD:-build/sanitize}
cxx=${CXX:-c++}
PATH=$(dirname "$python"):$PATH
export OMP_NUM_THREADS=1 PYTHONPATH=$root

# Compiling with torch.compile under a preloaded sanitizer checks the compiler, not this library.
tests=(tests/test_rng.py tests/test_langevin.py tests/test_affine_coupling.py
  tests/test_mixture_logistic.py)
select="not slow and not gpu"

# The library built with -fsanitize=$1.
build_with() {
  cmake -S . -B "$build-${1%%,*}" -G Ninja --log-level=NOTICE -DPython_EXECUTABLE="$python" \
    -DCOOPFLOW_CUDA=0 -DCOOPFLOW_BUILD_HOST=0 -DCMAKE_BUILD_TYPE=Sanitize \
    -DCMAKE_CXX_FLAGS_SANITIZE="-O1 -g1 -fsanitize=$1 -fno-sanitize-recover=all"
  cmake --build "$build-${1%%,*}"
  export COOPFLOW_LIBRARY=$root/$build-${1%%,*}/libcoopflow_ext.so
  [[ $build != /* ]] || COOPFLOW_LIBRARY=$build-${1%%,*}/libcoopflow_ext.so
}

runtime() {
  local path
  path=$("$cxx" -print-file-name="$1")
  [ -f "$path" ] || { echo "missing: $1 of $cxx (Debian: it comes with g++)" >&2; exit 1; }
  echo "$path"
}

check_address() {
  build_with address,undefined
  # Python frees nothing at exit, so leaks are not looked for.
  LD_PRELOAD="$(runtime libasan.so) $(runtime libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
    UBSAN_OPTIONS=print_stacktrace=1 "$python" -m pytest -q -p no:cacheprovider -m "$select" \
    -k "not compile" --timeout=900 "${tests[@]}"
}

check_thread() {
  build_with thread
  "$cxx" -std=c++17 -O1 -g1 -fPIC -shared -fsanitize=thread tests/sanitizers/parallel_for.cpp \
    -o "$build-thread/libparallel_for.so"
  # The sanitizer of gcc 12 cannot live with much randomness in the address space.
  LD_PRELOAD="$(runtime libtsan.so) $(runtime libstdc++.so) $(realpath "$build-thread")/libparallel_for.so" \
    TSAN_OPTIONS="halt_on_error=1" \
    setarch --addr-no-randomize "$python" -m pytest -q -p no:cacheprovider -m "$select" \
    -k "thread and not instruction" --timeout=900 "${tests[@]}"
}

# Runs Python under memcheck. Python and torch have findings of their own, thousands of them, which
# is why there must be no limit; one with a frame of this library, by its file or, where that has
# debug information, by its namespace, is an error. Returns 1 then, 2 if the program failed.
memcheck() { # log, Python's arguments…
  local log=$1 ours='^==[0-9]+== +(at|by) 0x.*(libcoopflow_ext|coopflow::)'
  shift
  PYTHONMALLOC=malloc COOPFLOW_CPU_ISA=avx2 valgrind --tool=memcheck --error-limit=no \
    --num-callers=30 --log-file="$log" "$python" "$@" || return 2
  if grep -q -E "$ours" "$log"; then
    grep -B 20 -A 10 -E "$ours" "$log" | head -200
    return 1
  fi
  tail -n 1 "$log"
}

check_valgrind() {
  command -v valgrind >/dev/null || { echo "missing: valgrind (Debian: apt install valgrind)" >&2; exit 1; }
  unset COOPFLOW_LIBRARY
  mkdir -p "$build-mistakes"
  local mistake debug status mistakes
  mistakes=$(realpath "$build-mistakes")/libcoopflow_ext.so
  for debug in -g0 -g; do
    "$cxx" -std=c++17 -O1 "$debug" -fPIC -shared tests/sanitizers/mistakes.cpp -o "$mistakes"
    for mistake in write_past_the_end read_unwritten; do
      status=0
      memcheck "$build-mistakes/valgrind.log" -c "import ctypes, sys
getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])()" "$mistakes" "$mistake" >/dev/null || status=$?
      if [ $status != 1 ]; then
        echo "memcheck does not find $mistake of tests/sanitizers/mistakes.cpp ($debug)" >&2
        return 1
      fi
    done
  done
  echo "memcheck finds the mistakes of tests/sanitizers/mistakes.cpp"
  memcheck "$build-valgrind.log" benchmarks/exercise_ops.py
}

mkdir -p build
for check in "${checks[@]}"; do
  echo "=== $check"
  "check_$check"
done
