// torch's parallel_for on plain threads, to be preloaded under ThreadSanitizer: torch's own uses an
// OpenMP runtime whose barriers the sanitizer does not see, and every loop would look like a race.
#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

extern "C" __attribute__((visibility("default"))) int32_t torch_parallel_for(
    int64_t begin, int64_t end, int64_t grain, void (*f)(int64_t, int64_t, void*), void* context) {
  constexpr int64_t kThreads = 4;
  const int64_t count = end - begin;
  if (count <= 0) return 0;
  const int64_t part = std::max((count + kThreads - 1) / kThreads, std::max<int64_t>(grain, 1));
  std::vector<std::thread> threads;
  for (int64_t from = begin; from < end; from += part) {
    threads.emplace_back([=] { f(from, std::min(from + part, end), context); });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
