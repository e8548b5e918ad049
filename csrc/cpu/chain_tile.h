// Whole chains on the CPU: a tile of them moves side by side, a vector lane each. Included by the
// *_loops.cpp files only, each compiled once per instruction set: everything here has internal
// linkage.
#pragma once

#include <cstdint>
#include <new>

#include "coopflow/langevin_chain.h"
#include "coopflow/mala.h"
#include "coopflow/reduction.h"
#include "simd_words.h"

namespace coopflow {
namespace {

constexpr int kChainTile = 16;

template <typename A>
using TileLanes = ChainLanes<A, kChainTile>;

// The random numbers of a tile's chains. Where these are few, the lanes left over draw for the
// steps to come: lane l serves chain l % count, l / count steps ahead.
template <typename A>
class TileNoise {
 public:
  // `ahead`: memory for the normals of a tile and one row of zeros, which stays the caller's.
  TileNoise(const TileLanes<A>& lanes, int64_t first_chain, int64_t per_chain, A* ahead)
      : per_chain_(per_chain),
        count_(lanes.count),
        steps_(kChainTile / lanes.count),
        ahead_(ahead) {
    for (int l = 0; l < kChainTile; ++l) {
      const uint64_t chain = static_cast<uint64_t>(first_chain + lanes.first + l % count_);
      chain_low_[l] = static_cast<uint32_t>(chain);
      chain_high_[l] = static_cast<uint32_t>(chain >> 32);
      steps_ahead_[l] = static_cast<uint32_t>(l / count_);
    }
  }

  // Normals, of one time after the other.
  void operator()(TileLanes<A>& lanes, PhiloxKey key, uint32_t time) const {
    if (steps_ == 1) {
      draw(lanes.count, key, time, lanes.xi);
      return;
    }
    if (left_ == 0) {
      draw(kChainTile, key, time, ahead_);
      left_ = steps_;
    }
    const A* const drawn = ahead_ + (steps_ - left_) * count_;
    // All lanes, of which those after count_ do not matter: a load of what was just stored in part
    // would wait.
    COOPFLOW_LANES
    for (int64_t i = 0; i < per_chain_ * kChainTile; ++i) lanes.xi[i] = drawn[i];
    --left_;
  }

  // A uniform of each.
  void operator()(PhiloxKey key, uint32_t time, A (&uniforms)[kChainTile]) const {
    alignas(64) uint32_t words[4][kChainTile];
    draw_words(0, key, time, words);
    COOPFLOW_LANES
    for (int l = 0; l < kChainTile; ++l) uniforms[l] = mala_uniform<A>(words[0][l]);
  }

 private:
  // Normals of every lane; of doubles, which no compiler vectorises, in the first `wanted`.
  void draw(int wanted, PhiloxKey key, uint32_t time, A* xi) const {
    for (int64_t first = 0; first < per_chain_; first += 4) {
      alignas(64) uint32_t words[4][kChainTile];
      draw_words(static_cast<uint32_t>(first / 4), key, time, words);
      fill_pair(words[0], words[1], wanted, xi + first * kChainTile);
      if (per_chain_ - first <= 2) continue;
      fill_pair(words[2], words[3], wanted, xi + (first + 2) * kChainTile);
    }
  }

  void draw_words(uint32_t block, PhiloxKey key, uint32_t time,
                  uint32_t (&words)[4][kChainTile]) const {
    const SimdWords blocks = SimdWords::broadcast(block);
    alignas(64) uint32_t times[kChainTile];
    COOPFLOW_LANES
    for (int l = 0; l < kChainTile; ++l) times[l] = time + steps_ahead_[l];
    for (int l = 0; l < kChainTile; l += SimdWords::kLanes) {
      const PhiloxBlock<SimdWords> drawn = philox4x32_10(
          PhiloxBlock<SimdWords>{blocks, SimdWords::load(times + l),
                                 SimdWords::load(chain_low_ + l), SimdWords::load(chain_high_ + l)},
          key);
      drawn.w0.store(words[0] + l);
      drawn.w1.store(words[1] + l);
      drawn.w2.store(words[2] + l);
      drawn.w3.store(words[3] + l);
    }
  }

  // Two elements of every lane.
  static void fill_pair(const uint32_t* w0, const uint32_t* w1, int wanted, A* xi) {
    const int n = sizeof(A) == sizeof(double) ? wanted : kChainTile;
    COOPFLOW_LANES
    for (int l = 0; l < n; ++l) {
      const Pair<A> pair = box_muller(w0[l], w1[l], A());
      xi[l] = pair.first;
      xi[kChainTile + l] = pair.second;
    }
  }

  int64_t per_chain_;
  int count_, steps_;     // one draw serves so many
  A* ahead_;              // what it drew
  mutable int left_ = 0;  // of its steps
  alignas(64) uint32_t chain_low_[kChainTile], chain_high_[kChainTile], steps_ahead_[kChainTile];
};

// The memory of a tile's lanes. Its functions come from the C++ library: an instance of a template
// of the standard library could be one that was compiled for another instruction set.
template <typename A>
class TileMemory {
 public:
  explicit TileMemory(int64_t per_chain) {
    const int64_t part = divide_up(per_chain, 4) * 4 * kChainTile;
    memory_ =
        ::operator new(static_cast<std::size_t>(5 * part + kChainTile) * sizeof(A), kAlignment);
    lanes.x = static_cast<A*>(memory_);
    lanes.grad = lanes.x + part;
    lanes.x_ref = lanes.x + 2 * part;
    lanes.xi = lanes.x + 3 * part;
    ahead = lanes.x + 4 * part;
    for (int64_t i = 0; i < part + kChainTile; ++i) ahead[i] = A(0);
  }
  ~TileMemory() { ::operator delete(memory_, kAlignment); }
  TileMemory(const TileMemory&) = delete;
  TileMemory& operator=(const TileMemory&) = delete;

  alignas(64) TileLanes<A> lanes{};
  A* ahead;  // what TileNoise draws, and a row more

 private:
  static constexpr std::align_val_t kAlignment{64};
  void* memory_;
};

// Calls run(lanes, ahead) for the chains of each of the tiles [begin, end).
template <typename A, typename Run>
void for_each_tile(const ChainArgs<A>& args, int64_t begin, int64_t end, const Run& run) {
  TileMemory<A> memory(args.per_chain);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kChainTile, left = args.batch - first;
    memory.lanes.first = first;
    memory.lanes.count = static_cast<int>(left < kChainTile ? left : kChainTile);
    run(memory.lanes, memory.ahead);
  }
}

// Tiles [begin, end) of the chains. gradient(lanes) sets grad and energy from x.
template <bool kFull, int64_t kPerChain, typename A, typename Gradient>
void run_tiles(const LangevinChainArgs<A>& args, int64_t begin, int64_t end,
               const Gradient& gradient) {
  for_each_tile(args, begin, end, [&](TileLanes<A>& lanes, A* ahead) {
    const int64_t per_chain = kPerChain == 0 ? args.per_chain : kPerChain;
    const TileNoise<A> noise(lanes, args.rng[2], per_chain, ahead);
    run_lanes<kFull, kPerChain>(args, lanes, gradient, noise);
  });
}

// The same of chains that accept their moves.
template <typename A, typename Gradient>
void run_mala_tiles(const MalaChainArgs<A>& args, int64_t begin, int64_t end,
                    const Gradient& gradient) {
  for_each_tile(args, begin, end, [&](TileLanes<A>& lanes, A* ahead) {
    const TileNoise<A> noise(lanes, args.rng[2], args.per_chain, ahead);
    const TileNoise<A> uniforms(lanes, args.accept_rng[2], 1, nullptr);
    run_mala_lanes(args, lanes, gradient, noise, uniforms);
  });
}

}  // namespace
}  // namespace coopflow
