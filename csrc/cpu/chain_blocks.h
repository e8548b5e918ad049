// Elements in blocks of at most kWidth: a part of one chain or, of chains so short that several
// fit, all of these, since vectors across the elements of one short chain would be nearly empty.
// For the
// *_loops.cpp files only, each compiled once per instruction set: everything here has internal
// linkage.
#pragma once

#include <cstdint>

#include "coopflow/reduction.h"
#include "tile.h"

namespace coopflow {
namespace {

// n elements of each of `chains` chains, from element e on; e = 0 where there are several.
struct Block {
  int64_t chain, e, n, chains;

  int64_t size() const { return chains * n; }

  // Its first element, in a tensor with `stride` elements a chain.
  template <typename T>
  const T* first(const void* source, int64_t stride) const {
    return static_cast<const T*>(source) + chain * stride + e;
  }
  template <typename T>
  T* first(void* destination, int64_t stride) const {
    return static_cast<T*>(destination) + chain * stride + e;
  }
};

// The block's values, one beside the other. first: where the first of them lies, stride: from one
// of its chains to the next.
template <typename T, typename A>
void gather(const Block& block, const T* first, int64_t stride, A* values) {
  if (block.chains == 1) return load<T>(first, 0, block.n, values);
  for (int64_t i = 0; i < block.n; ++i) {
    for (int64_t c = 0; c < block.chains; ++c) {
      values[c * block.n + i] = to_arithmetic(first[c * stride + i]);
    }
  }
}

template <typename T, typename A>
void scatter(const Block& block, const A* values, int64_t stride, T* first) {
  if (block.chains == 1) return store<T>(values, 0, block.n, first);
  for (int64_t i = 0; i < block.n; ++i) {
    for (int64_t c = 0; c < block.chains; ++c) {
      first[c * stride + i] = from_arithmetic<T>(values[c * block.n + i]);
    }
  }
}

// A chain's value for each of its elements.
template <typename A>
void spread(const Block& block, const A* of_chains, A* values) {
  for (int64_t c = 0; c < block.chains; ++c) {
    for (int64_t i = 0; i < block.n; ++i) values[c * block.n + i] = of_chains[block.chain + c];
  }
}

// Whether a block holds several chains, each of them one chunk.
template <int64_t kWidth>
bool chains_are_short(int64_t per_chain) {
  return per_chain <= kLanes && 2 * per_chain <= kWidth;
}

// Calls f(block) for each block of the chunks [begin, end).
template <int64_t kWidth, typename F>
void for_each_block(int64_t per_chain, int64_t begin, int64_t end, const F& f) {
  if (chains_are_short<kWidth>(per_chain)) {
    const int64_t group = kWidth / per_chain;
    for (int64_t chain = begin; chain < end; chain += group) {
      f(Block{chain, 0, per_chain, end - chain < group ? end - chain : group});
    }
    return;
  }
  for (int64_t index = begin; index < end; ++index) {
    for_each_tile_of_chunk(per_chain, index, [&](int64_t chain, int64_t e, int64_t n) {
      for (int64_t i = 0; i < n; i += kWidth) {
        f(Block{chain, e + i, n - i < kWidth ? n - i : kWidth, 1});
      }
    });
  }
}

// The same where f(block, buffer) gives where the elements' values lie, in the buffer or elsewhere:
// sums[chunk] is the sum of a chunk's.
template <int64_t kWidth, typename A, typename F>
void sum_blocks(int64_t per_chain, int64_t begin, int64_t end, A* sums, const F& f) {
  alignas(64) A buffer[kWidth];
  if (chains_are_short<kWidth>(per_chain)) {
    for_each_block<kWidth>(per_chain, begin, end, [&](const Block& block) {
      const A* values = f(block, buffer);
      for (int64_t c = 0; c < block.chains; ++c) {
        A sum = A(0);
        for (int64_t i = 0; i < per_chain; ++i) sum += values[c * per_chain + i];
        sums[block.chain + c] = sum;
      }
    });
    return;
  }
  for (int64_t index = begin; index < end; ++index) {
    alignas(64) A lanes[kLanes] = {};
    for_each_block<kWidth>(per_chain, index, index + 1, [&](const Block& block) {
      add_by_lane(f(block, buffer), block.n, lanes);
    });
    sums[index] = sum_lanes(lanes, per_chain);
  }
}

}  // namespace
}  // namespace coopflow
