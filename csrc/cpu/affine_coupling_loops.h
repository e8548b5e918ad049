// The CPU loops of the affine coupling, built once per instruction set.
#pragma once

#include <cstdint>

#include "coopflow/affine_coupling.h"
#include "coopflow/scalar_types.h"
#include "isa.h"

namespace coopflow {

// State type T, parameter type P. Chunks [begin, end) = chain * chunks_per_chain + chunk.
template <typename T, typename P>
struct AffineCouplingLoops {
  using A = arithmetic_t<T>;
  // partial_sums[chunk] is the chunk's part of ladj.
  void (*map)(const AffineCouplingArgs<A>& args, A* partial_sums, int64_t begin, int64_t end);
  void (*backward)(const AffineCouplingBackwardArgs<A>& args, int64_t begin, int64_t end);
};

COOPFLOW_DECLARE_PER_ISA(
    template <typename T, typename P> AffineCouplingLoops<T, P> affine_coupling_loops())

}  // namespace coopflow
