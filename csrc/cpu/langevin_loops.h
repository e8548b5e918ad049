// The CPU loops of the Langevin ops, built once per instruction set.
#pragma once

#include <cstdint>

#include "coopflow/langevin.h"
#include "coopflow/scalar_types.h"
#include "isa.h"

namespace coopflow {

template <typename T>
struct LangevinLoops {
  using A = arithmetic_t<T>;
  // Tiles [begin, end) of the whole state, without statistics.
  void (*update_tiles)(const LangevinArgs<A>& args, int64_t begin, int64_t end);
  // Chunks [begin, end) = chain * chunks_per_chain + chunk, with statistics into
  // partial_sums[chunk][kStatistics].
  void (*update_chunks)(const LangevinArgs<A>& args, A* partial_sums, int64_t begin, int64_t end);
  // The same chunks of the gradient alone.
  void (*reduce_chunks)(const LangevinArgs<A>& args, GradientLook<A>* looks, int64_t begin,
                        int64_t end);
  // Whether elements [begin, end) of the gradient are all finite.
  bool (*all_finite)(const LangevinArgs<A>& args, int64_t begin, int64_t end);
};

COOPFLOW_DECLARE_PER_ISA(template <typename T> LangevinLoops<T> langevin_loops())

}  // namespace coopflow
