// What the checkers of tests/sanitize.sh must find before their silence on this library counts:
// built as a library of the same name, with functions in the same namespace.
#include <cstdint>
#include <cstdlib>

// Present in torch and in parallel_for.cpp.
extern "C" __attribute__((weak)) int32_t torch_parallel_for(int64_t begin, int64_t end,
                                                            int64_t grain,
                                                            void (*f)(int64_t, int64_t, void*),
                                                            void* context);

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

// Threads of one loop write to the same place, as where chunks overlap.
void share_an_element() {
  float value = 0.0f;
  torch_parallel_for(
      0, 4, 1,
      [](int64_t, int64_t, void* context) {
        coopflow::store_ones(static_cast<volatile float*>(context), 1);
      },
      &value);
}
}
