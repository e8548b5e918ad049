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

// out[i] = the sum of partial_sums[part][i] over the parts, in order.
template <typename A>
void sum_parts(const A* partial_sums, int64_t parts, int64_t width, A* out) {
  for (int64_t i = 0; i < width; ++i) out[i] = A(0);
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = 0; i < width; ++i) out[i] += partial_sums[part * width + i];
  }
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
    sum_parts(sums + chain * chunks * width, chunks, width, out + chain * width);
  }
}

}  // namespace coopflow
