# Sourced: op_tests, the tests of operators, which need no training extras. Those that a stem of
# csrc/ops has are found by its name.
op_tests=(tests/test_ops.py tests/test_rng.py)
for op in csrc/ops/*_op.h; do
  for test in tests/test_"$(basename "$op" _op.h)"*.py; do
    [ ! -f "$test" ] || op_tests+=("$test")
  done
done
