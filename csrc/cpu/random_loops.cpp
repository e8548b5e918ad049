#include "random_loops.h"

#include "coopflow/reduction.h"
#include "noise_tile.h"

namespace coopflow {
namespace COOPFLOW_ISA {
namespace {

static_assert(kRandomTile == kTile, "a tile of random_cpu.cpp is a tile of noise_tile.h");

template <typename T, typename Noise>
void fill_tiles(const RandomArgs& args, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t tiles_per_chain = divide_up(args.per_chain, kTile);
  const PhiloxKey key = make_philox_key(args.rng[0]);
  const uint32_t time = noise_time(args.rng, args.step);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t chain = index / tiles_per_chain;
    const int64_t first = (index % tiles_per_chain) * kTile;
    const int64_t left = args.per_chain - first;
    TileCounters counters;
    counters.set_run(args.rng[2] + chain, first / 4);
    alignas(64) A values[kTile];
    fill_tile<Noise>(counters, key, time, values);
    T* out = static_cast<T*>(args.out) + chain * args.per_chain + first;
    for (int64_t i = 0; i < (left < kTile ? left : kTile); ++i) {
      out[i] = from_arithmetic<T>(values[i]);
    }
  }
}

}  // namespace

template <typename T>
RandomLoop random_loop(Distribution distribution) {
  return distribution == Distribution::kNormal ? fill_tiles<T, NormalNoise>
                                               : fill_tiles<T, UniformNoise>;
}

template RandomLoop random_loop<float>(Distribution);
template RandomLoop random_loop<double>(Distribution);
template RandomLoop random_loop<bfloat16>(Distribution);
template RandomLoop random_loop<float16>(Distribution);

}  // namespace COOPFLOW_ISA
}  // namespace coopflow
