// The CPU loops of the mixture-of-logistics coupling, built once per instruction set.
#pragma once

#include <cstdint>

#include "coopflow/mixture_logistic.h"
#include "coopflow/scalar_types.h"
#include "isa.h"

namespace coopflow {

constexpr int64_t kMixtureWidth = 16;  // elements of a block

// One component's values for a block of elements. They lie side by side: what is written to one
// row would hold up reads of another a multiple of 4,096 bytes away.
template <typename A>
struct alignas(64) ComponentBlock {
  using Row = A[kMixtureWidth];
  Row log_weight;  // relative to the largest
  Row mean;
  Row log_scale;  // as given
  Row weight, inv_scale;
  Row t, below, above;  // the logistic at x
};

// State type T, parameter type P. Chunks [begin, end) = chain * chunks_per_chain + chunk.
template <typename T, typename P>
struct MixtureLogisticLoops {
  using A = arithmetic_t<T>;
  // partial_sums[chunk] is the chunk's part of ladj. scratch: room for each component.
  void (*map)(const MixtureCouplingArgs<A>& args, ComponentBlock<A>* scratch, A* partial_sums,
              int64_t begin, int64_t end);
  void (*backward)(const MixtureCouplingBackwardArgs<A>& args, ComponentBlock<A>* scratch,
                   int64_t begin, int64_t end);
};

COOPFLOW_DECLARE_PER_ISA(
    template <typename T, typename P> MixtureLogisticLoops<T, P> mixture_logistic_loops())

}  // namespace coopflow
