// The CPU loops of analytic_langevin_chain, built once per instruction set.
#pragma once

#include <cstdint>

#include "coopflow/langevin_chain.h"
#include "isa.h"

namespace coopflow {

constexpr int64_t kChainsPerTile = 16;

// Tiles [begin, end) of the chains. `energy` is the functor of the name that the loop was found by.
template <typename A>
using AnalyticLoop = void (*)(const LangevinChainArgs<A>& args, const void* energy, const A* table,
                              int64_t begin, int64_t end);

COOPFLOW_DECLARE_PER_ISA(template <typename A> AnalyticLoop<A> analytic_loop(const char* energy,
                                                                             bool plain,
                                                                             int64_t per_chain))

}  // namespace coopflow
