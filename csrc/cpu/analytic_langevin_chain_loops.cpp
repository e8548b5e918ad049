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

template <typename Energy, typename A>
void run_mala_tiles_of(const MalaChainArgs<A>& args, const void* energy, const A* table,
                       int64_t begin, int64_t end) {
  const Energy functor = *static_cast<const Energy*>(energy);
  run_mala_tiles(args, begin, end, [&](TileLanes<A>& lanes) {
    functor.template operator()<true>(table, args.per_chain, lanes);
  });
}

// Chains of two elements, the most usual of all, have loops of their own.
template <typename Energy, typename A>
AnalyticLangevinLoop<A> choose_loop(bool plain, int64_t per_chain) {
  if (plain && per_chain == 2) return run_tiles_of<Energy, true, 2, A>;
  return plain ? run_tiles_of<Energy, true, 0, A> : run_tiles_of<Energy, false, 0, A>;
}

// Calls f(EnergyTag<Energy>()) with the energy of this name.
template <typename F>
void with_energy(const char* name, const F& f) {
  AnalyticEnergies::for_each([&](auto tag) {
    if (std::strcmp(name, decltype(tag)::template type<float>::kName) == 0) f(tag);
  });
}

}  // namespace

template <typename A>
AnalyticLangevinLoop<A> analytic_langevin_loop(const char* energy, bool plain, int64_t per_chain) {
  AnalyticLangevinLoop<A> found = nullptr;
  with_energy(energy, [&](auto tag) {
    found = choose_loop<typename decltype(tag)::template type<A>, A>(plain, per_chain);
  });
  return found;
}

template <typename A>
AnalyticMalaLoop<A> analytic_mala_loop(const char* energy) {
  AnalyticMalaLoop<A> found = nullptr;
  with_energy(energy, [&](auto tag) {
    found = run_mala_tiles_of<typename decltype(tag)::template type<A>, A>;
  });
  return found;
}

template AnalyticLangevinLoop<float> analytic_langevin_loop<float>(const char*, bool, int64_t);
template AnalyticLangevinLoop<double> analytic_langevin_loop<double>(const char*, bool, int64_t);
template AnalyticMalaLoop<float> analytic_mala_loop<float>(const char*);
template AnalyticMalaLoop<double> analytic_mala_loop<double>(const char*);

}  // namespace COOPFLOW_ISA
}  // namespace coopflow
