// analytic_langevin_chain and analytic_mala_chain on the CPU.
#include <vector>

#include "analytic_langevin_chain_loops.h"
#include "coopflow/reduction.h"
#include "ops/analytic_langevin_chain_op.h"

namespace coopflow {
namespace {

struct CpuAnalyticChain {
  static void check_chains(const ChainOp& /*op*/) {}

  template <typename Energy, typename A>
  static void run(const LangevinChainArgs<A>& args, const Energy& energy, const Tensor& /*x0*/) {
    run_tiles<A>(args, energy,
                 COOPFLOW_SELECT_ISA(
                     analytic_langevin_loop<A>(Energy::kName, args.is_plain(), args.per_chain)));
  }

  template <typename Energy, typename A>
  static void run(const MalaChainArgs<A>& args, const Energy& energy, const Tensor& /*x0*/) {
    run_tiles<A>(args, energy, COOPFLOW_SELECT_ISA(analytic_mala_loop<A>(Energy::kName)));
  }

 private:
  template <typename A, typename Args, typename Energy>
  static void run_tiles(const Args& args, const Energy& energy, AnalyticLoop<Args, A> loop) {
    // Elements' steps for one thread before it pays to start another.
    constexpr int64_t kGrain = 4096;
    std::vector<A> table(static_cast<std::size_t>(energy.table_size()));
    for (std::size_t i = 0; i < table.size(); ++i) table[i] = energy.table_entry(i);
    const int64_t work = kChainsPerTile * args.per_chain * (args.n_steps + 1);
    torch::stable::parallel_for(
        0, divide_up(args.batch, kChainsPerTile), divide_up(kGrain, work),
        [&](int64_t begin, int64_t end) { loop(args, &energy, table.data(), begin, end); });
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CPU, m) {
  m.impl("analytic_langevin_chain",
         TORCH_BOX(&coopflow::analytic_langevin_chain<coopflow::CpuAnalyticChain>));
  m.impl("analytic_mala_chain",
         TORCH_BOX(&coopflow::analytic_mala_chain<coopflow::CpuAnalyticChain>));
}
