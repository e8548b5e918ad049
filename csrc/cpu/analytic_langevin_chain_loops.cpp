#include "analytic_langevin_chain_loops.h"

#include <cstring>

#include "chain_tile.h"
#include "coopflow/analytic_energies.h"

namespace coopflow {
namespace COOPFLOW_ISA {
namespace {

static_assert(kChainsPerTile == kChainTile, "a tile of ..._cpu.cpp is a tile of chain_tile.h");

template <typename Energy, bool kPlain, int64_t kPerChain, typename A>
void run_tiles_of(const LangevinChainArgs<A>& args, const void* energy, const A* table,
                  int64_t begin, int64_t end) {
  const Energy functor = *static_cast<const Energy*>(energy);
  const int64_t per_chain = kPerChain == 0 ? args.per_chain : kPerChain;
  run_tiles<!kPlain, kPerChain>(args, begin, end, [&](TileLanes<A>& lanes) {
    functor.template operator()<!kPlain>(table, per_chain, lanes);
  });
}

// Chains of two elements, the most usual of all, have loops of their own.
template <typename Energy, typename A>
AnalyticLoop<A> choose_loop(bool plain, int64_t per_chain) {
  if (plain && per_chain == 2) return run_tiles_of<Energy, true, 2, A>;
  return plain ? run_tiles_of<Energy, true, 0, A> : run_tiles_of<Energy, false, 0, A>;
}

}  // namespace

template <typename A>
AnalyticLoop<A> analytic_loop(const char* energy, bool plain, int64_t per_chain) {
  AnalyticLoop<A> found = nullptr;
  AnalyticEnergies::for_each([&](auto tag) {
    using Energy = typename decltype(tag)::template type<A>;
    if (std::strcmp(energy, Energy::kName) == 0) found = choose_loop<Energy, A>(plain, per_chain);
  });
  return found;
}

template AnalyticLoop<float> analytic_loop<float>(const char*, bool, int64_t);
template AnalyticLoop<double> analytic_loop<double>(const char*, bool, int64_t);

}  // namespace COOPFLOW_ISA
}  // namespace coopflow
