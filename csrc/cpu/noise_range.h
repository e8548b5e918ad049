// A tile of noise for a flat range of quads over all chains, so that short chains share one. For
// the *_loops.cpp files only, each compiled once per instruction set: everything here has internal
// linkage.
#pragma once

#include <cstdint>

#include "coopflow/reduction.h"
#include "noise_tile.h"
#include "tile.h"

namespace coopflow {
namespace {

// Where one run of quads of a single chain lies within a tile.
struct Run {
  int64_t chain, first_block, blocks, quad;  // quad: index of its first quad in the tile
};

// Calls f(Run) for each chain's part of the flat range [begin, end) of quads.
template <typename F>
void for_each_run(int64_t quads_per_chain, int64_t begin, int64_t end, const F& f) {
  int64_t chain = begin / quads_per_chain;
  int64_t block = begin % quads_per_chain;
  for (int64_t quad = begin; quad < end;) {
    const int64_t left = quads_per_chain - block;
    const int64_t blocks = left < end - quad ? left : end - quad;
    f(Run{chain, block, blocks, quad - begin});
    quad += blocks;
    ++chain;
    block = 0;
  }
}

// The counters of the quads [begin, end) of the flat range.
inline void set_counters(int64_t first_chain, int64_t quads_per_chain, int64_t begin, int64_t end,
                         TileCounters* counters) {
  if (quads_per_chain == 1) {  // a plain loop, which the compiler vectorises
    for (int64_t i = 0; i < kQuadsPerTile; ++i) counters->set(i, first_chain + begin + i, 0);
    return;
  }
  for_each_run(quads_per_chain, begin, end, [&](const Run& run) {
    for (int64_t i = 0; i < run.blocks; ++i) {
      counters->set(run.quad + i, first_chain + run.chain, run.first_block + i);
    }
  });
}

// Elements that a run has; its last quad may not be full.
inline int64_t run_elements(const Run& run, int64_t per_chain) {
  const int64_t left = per_chain - 4 * run.first_block;
  return left < 4 * run.blocks ? left : 4 * run.blocks;
}

// Moves the noise of the quads [begin, end) together where chains do not fill their last quad.
template <typename A>
void close_gaps(int64_t per_chain, int64_t begin, int64_t end, A* values) {
  if (per_chain % 4 == 0) return;
  if (per_chain == 3) {
    for (int64_t quad = 1; quad < kQuadsPerTile; ++quad) {
      for (int64_t lane = 0; lane < 3; ++lane) values[3 * quad + lane] = values[4 * quad + lane];
    }
    return;
  }
  int64_t n = 0;
  for_each_run(divide_up(per_chain, 4), begin, end, [&](const Run& run) {
    const int64_t count = run_elements(run, per_chain);
    for (int64_t i = 0; i < count; ++i) values[n + i] = values[4 * run.quad + i];
    n += count;
  });
}

// Where a quad's first element lies in a tensor of whole chains; of the quad behind the last
// chain's too.
inline int64_t first_element(int64_t per_chain, int64_t quad) {
  const int64_t quads_per_chain = divide_up(per_chain, 4);
  return (quad / quads_per_chain) * per_chain + 4 * (quad % quads_per_chain);
}

// The noise of the quads [begin, end), at most a tile, each chain's behind the one before it.
template <typename Noise, typename A>
void fill_without_gaps(const int64_t* rng, int64_t step, int64_t per_chain, int64_t begin,
                       int64_t end, A* values) {
  const PhiloxKey key = make_philox_key(rng[0]);
  const uint32_t time = noise_time(rng, step);
  TileCounters counters{};
  set_counters(rng[2], divide_up(per_chain, 4), begin, end, &counters);
  if (per_chain == 1) return fill_tile_of_short_chains<Noise, 1>(counters, key, time, values);
  if (per_chain == 2) return fill_tile_of_short_chains<Noise, 2>(counters, key, time, values);
  fill_tile<Noise>(counters, key, time, values);
  close_gaps(per_chain, begin, end, values);
}

}  // namespace
}  // namespace coopflow
