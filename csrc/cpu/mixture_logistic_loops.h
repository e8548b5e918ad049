// The CPU loops of the mixture-of-logistics coupling, built once per instruction set.
#pragma once

#include <cstdint>

#include "coopflow/mixture_logistic.h"
#include "coopflow/scalar_types.h"
#include "isa.h"

namespace coopflow {

// What a call needs to hold one block of elements: values per component.
constexpr int64_t kMixtureScratch = 8 * 16;

// State type T, parameter type P. Chunks [begin, end) = chain * chunks_per_chain + chunk.
template <typename T, typename P>
struct MixtureLogisticLoops {
  using A = arithmetic_t<T>;
  // partial_sums[chunk] is the chunk's part of ladj. scratch: kMixtureScratch values per component.
  void (*map)(const MixtureCouplingArgs<A>& args, A* scratch, A* partial_sums, int64_t begin,
              int64_t end);
  void (*backward)(const MixtureCouplingBackwardArgs<A>& args, A* scratch, int64_t begin,
                   int64_t end);
};

COOPFLOW_DECLARE_PER_ISA(
    template <typename T, typename P> MixtureLogisticLoops<T, P> mixture_logistic_loops())

}  // namespace coopflow
