// What memcheck must find before its silence on this library counts (tests/sanitize.sh): built as a
// library of the same name, with functions in the same namespace.
#include <cstdlib>

namespace coopflow {
namespace {

volatile int sink;

__attribute__((noinline)) void store_ones(volatile float* to, int count) {
  for (int i = 0; i < count; ++i) to[i] = 1.0f;
}

__attribute__((noinline)) void branch_on(const volatile float* value) {
  if (*value > 0.0f) sink = 1;
}

}  // namespace
}  // namespace coopflow

extern "C" {

void write_past_the_end() {
  float* const values = static_cast<float*>(std::malloc(5 * sizeof(float)));
  coopflow::store_ones(values, 6);
  std::free(values);
}

void read_unwritten() {
  float* const values = static_cast<float*>(std::malloc(5 * sizeof(float)));
  coopflow::store_ones(values, 4);
  coopflow::branch_on(values + 4);
  std::free(values);
}
}
