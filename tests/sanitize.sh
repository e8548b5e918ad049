#!/usr/bin/env bash
# The CPU library under memory and thread checkers (`make sanitize`, part of `make check`).
#
#   tests/sanitize.sh PYTHON [address|thread|valgrind]…
#
# address   AddressSanitizer and UndefinedBehaviorSanitizer, over the tests of operators
# thread    ThreadSanitizer, over those of them that use several threads
# valgrind  memcheck of every op on small shapes, with the library that is built for use
#
# Each must first find a mistake of tests/sanitizers/mistakes.cpp in the same circumstances.
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
source tests/op_tests.sh
select="not slow and not gpu"
# A report ends the process, so that pytest must not keep what it says.
shown=(-q --capture=sys -p no:cacheprovider)

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

# Builds the mistakes with these flags as a library of the same name, and sets $call to the arguments
# with which Python makes one of them.
mistake() { # name, flags…
  local library=$build-mistakes/libcoopflow_ext.so
  mkdir -p "$build-mistakes"
  "$cxx" -std=c++17 -O1 "${@:2}" -fPIC -shared tests/sanitizers/mistakes.cpp -o "$library"
  call=(-c "import ctypes, sys; getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])()"
    "$(realpath "$library")" "$1")
}

# Fails unless the command, run over a mistake, ends it with a report that says so.
must_find() { # name, sign, flag, command…
  local report
  mistake "$1" -g1 "$3"
  if report=$("${@:4}" "${call[@]}" 2>&1) || ! grep -q "$2" <<<"$report"; then
    printf '%s\nno report of %s in %s of tests/sanitizers/mistakes.cpp\n' "$report" "$2" "$1" >&2
    return 1
  fi
  echo "found: $2 in $1 of tests/sanitizers/mistakes.cpp"
}

check_address() {
  build_with address,undefined
  local preloaded
  preloaded=$(runtime libasan.so)\ $(runtime libstdc++.so)
  # Python frees nothing at exit, so leaks are not looked for.
  local checked=(env "LD_PRELOAD=$preloaded" ASAN_OPTIONS=detect_leaks=0
    UBSAN_OPTIONS=print_stacktrace=1 "$python")
  must_find write_past_the_end heap-buffer-overflow -fsanitize=address "${checked[@]}"
  "${checked[@]}" -m pytest "${shown[@]}" -m "$select" -k "not compile" --timeout=900 \
    "${op_tests[@]}"
}

check_thread() {
  build_with thread
  "$cxx" -std=c++17 -O1 -g1 -fPIC -shared -fsanitize=thread tests/sanitizers/parallel_for.cpp \
    -o "$build-thread/libparallel_for.so"
  local preloaded
  preloaded=$(runtime libtsan.so)\ $(runtime libstdc++.so)
  preloaded+=\ $(realpath "$build-thread")/libparallel_for.so
  # The sanitizer of gcc 12 cannot live with much randomness in the address space.
  local options=halt_on_error=1:suppressions=$PWD/tests/sanitizers/thread.supp
  local checked=(env "LD_PRELOAD=$preloaded" "TSAN_OPTIONS=$options"
    setarch --addr-no-randomize "$python")
  must_find share_an_element "data race" -fsanitize=thread "${checked[@]}"
  "${checked[@]}" -m pytest "${shown[@]}" -m "$select" -k "thread and not instruction" \
    --timeout=900 "${op_tests[@]}"
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
  local name debug status
  for debug in -g0 -g; do
    for name in write_past_the_end read_unwritten; do
      mistake "$name" "$debug"
      status=0
      memcheck "$build-mistakes/valgrind.log" "${call[@]}" >/dev/null || status=$?
      [ $status = 1 ] || { echo "memcheck does not find $name ($debug)" >&2; return 1; }
    done
  done
  echo "found: the mistakes of tests/sanitizers/mistakes.cpp"
  memcheck "$build-valgrind.log" benchmarks/exercise_ops.py
}

mkdir -p build
for check in "${checks[@]}"; do
  echo "=== $check"
  "check_$check"
done
