// The CPU loops of analytic_langevin_chain and analytic_mala_chain, built once per instruction set.
#pragma once

#include <cstdint>

#include "coopflow/langevin_chain.h"
#include "coopflow/mala.h"
#include "isa.h"

namespace coopflow {

constexpr int64_t kChainsPerTile = 16;

// Tiles [begin, end) of the chains. `energy` is the functor of the name that the loop was found by.
template <typename Args, typename A>
using AnalyticLoop = void (*)(const Args& args, const void* energy, const A* table, int64_t begin,
                              int64_t end);
template <typename A>
using AnalyticLangevinLoop = AnalyticLoop<LangevinChainArgs<A>, A>;
template <typename A>
using AnalyticMalaLoop = AnalyticLoop<MalaChainArgs<A>, A>;

COOPFLOW_DECLARE_PER_ISA(
    template <typename A> AnalyticLangevinLoop<A> analytic_langevin_loop(const char* energy,
                                                                         bool plain,
                                                                         int64_t per_chain);
    template <typename A> AnalyticMalaLoop<A> analytic_mala_loop(const char* energy))

}  // namespace coopflow
