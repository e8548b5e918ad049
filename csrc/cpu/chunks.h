// Sharing a chain-wise reduction among threads: chunks of chains in parallel, their sums in order.
#pragma once

#include <cstdint>
#include <vector>

#include "coopflow/reduction.h"
#include "ops/op_checks.h"

namespace coopflow {

// Work for one thread before it pays to start another, in elements.
constexpr int64_t kGrain = 16384;

// Calls f(begin, end) on ranges of chunks = batch * divide_up(per_chain, kReductionChunk).
template <typename F>
void parallel_chunks(int64_t batch, int64_t per_chain, const F& f, int64_t grain = kGrain) {
  torch::stable::parallel_for(0, batch * divide_up(per_chain, kReductionChunk),
                              per_chain >= grain ? 1 : divide_up(grain, per_chain), f);
}

// Calls f(partial_sums, begin, end), which writes `width` sums per chunk, and adds each chain's
// chunks up into out (batch, width).
template <typename A, typename F>
void reduce_chunks_in_order(int64_t batch, int64_t per_chain, int64_t width, A* out, const F& f,
                            int64_t grain = kGrain) {
  const int64_t chunks = divide_up(per_chain, kReductionChunk);
  std::vector<A> storage(chunks > 1 ? batch * chunks * width : 0);
  A* sums = chunks > 1 ? storage.data() : out;
  parallel_chunks(
      batch, per_chain, [&](int64_t begin, int64_t end) { f(sums, begin, end); }, grain);
  if (chunks == 1) return;
  for (int64_t chain = 0; chain < batch; ++chain) {
    for (int64_t w = 0; w < width; ++w) {
      A total = A(0);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        total += sums[(chain * chunks + chunk) * width + w];
      }
      out[chain * width + w] = total;
    }
  }
}

}  // namespace coopflow
