// Noise for a run of elements on the CPU, made a tile at a time so that the compiler vectorises
// over Philox counters. Included by the *_loops.cpp files only, each compiled once per instruction
// set: everything here has internal linkage.
#pragma once

#include <cstdint>

#include "coopflow/normal.h"
#include "coopflow/philox.h"
#include "simd_words.h"
#include "tile.h"

namespace coopflow {
namespace {

constexpr int64_t kQuadsPerTile = kTile / 4;

// The counters of a tile: which chain and which group of four elements each quad serves.
struct TileCounters {
  alignas(64) uint32_t block[kQuadsPerTile];
  alignas(64) uint32_t chain_low[kQuadsPerTile];
  alignas(64) uint32_t chain_high[kQuadsPerTile];

  void set(int64_t quad, int64_t chain, int64_t block_in_chain) {
    block[quad] = static_cast<uint32_t>(block_in_chain);
    chain_low[quad] = static_cast<uint32_t>(chain);
    chain_high[quad] = static_cast<uint32_t>(static_cast<uint64_t>(chain) >> 32);
  }

  // Consecutive quads of one chain.
  void set_run(int64_t chain, int64_t first_block) {
    for (int64_t i = 0; i < kQuadsPerTile; ++i) set(i, chain, first_block + i);
  }
};

struct NormalNoise {
  template <typename A>
  COOPFLOW_HD static Quad<A> from_words(PhiloxWords w) {
    return normals_from_words<A>(w);
  }

  template <typename A>
  COOPFLOW_HD static Pair<A> from_pair(uint32_t w0, uint32_t w1) {
    return box_muller(w0, w1, A());
  }
};

struct UniformNoise {
  template <typename A>
  COOPFLOW_HD static Quad<A> from_words(PhiloxWords w) {
    return uniforms_from_words<A>(w);
  }

  template <typename A>
  COOPFLOW_HD static Pair<A> from_pair(uint32_t w0, uint32_t w1) {
    return {uniform_from_word(w0, A()), uniform_from_word(w1, A())};
  }
};

// The words of a tile, word by word.
struct TileWords {
  alignas(64) uint32_t words[4][kQuadsPerTile];
};

// At least the first `quads` of them.
inline void philox_tile(const TileCounters& counters, PhiloxKey key, uint32_t time, TileWords* tile,
                        int64_t quads = kQuadsPerTile) {
  const SimdWords times = SimdWords::broadcast(time);
  for (int64_t i = 0; i < quads; i += SimdWords::kLanes) {
    const PhiloxBlock<SimdWords> block =
        philox4x32_10(PhiloxBlock<SimdWords>{SimdWords::load(counters.block + i), times,
                                             SimdWords::load(counters.chain_low + i),
                                             SimdWords::load(counters.chain_high + i)},
                      key);
    block.w0.store(tile->words[0] + i);
    block.w1.store(tile->words[1] + i);
    block.w2.store(tile->words[2] + i);
    block.w3.store(tile->words[3] + i);
  }
}

// values[4 * quad + lane]; all quads are computed, which costs less than a variable trip count.
template <typename Noise, typename A>
void fill_tile(const TileCounters& counters, PhiloxKey key, uint32_t time, A* values) {
  TileWords tile;
  philox_tile(counters, key, time, &tile);
  for (int64_t i = 0; i < kQuadsPerTile; ++i) {
    const Quad<A> q = Noise::template from_words<A>(
        PhiloxWords{tile.words[0][i], tile.words[1][i], tile.words[2][i], tile.words[3][i]});
    values[4 * i] = q.v0;
    values[4 * i + 1] = q.v1;
    values[4 * i + 2] = q.v2;
    values[4 * i + 3] = q.v3;
  }
}

// The noise of chains of one or two elements, which use the first words of their only quad, without
// gaps between the chains.
template <typename Noise, int64_t kPerChain, typename A>
void fill_tile_of_short_chains(const TileCounters& counters, PhiloxKey key, uint32_t time,
                               A* values) {
  static_assert(kPerChain == 1 || kPerChain == 2);
  TileWords tile;
  philox_tile(counters, key, time, &tile);
  for (int64_t i = 0; i < kQuadsPerTile; ++i) {
    const Pair<A> pair = Noise::template from_pair<A>(tile.words[0][i], tile.words[1][i]);
    values[kPerChain * i] = pair.first;
    if constexpr (kPerChain == 2) values[2 * i + 1] = pair.second;
  }
}

inline uint32_t noise_time(const int64_t* rng, int64_t step) {
  return static_cast<uint32_t>(rng[1] + step);
}

}  // namespace
}  // namespace coopflow
