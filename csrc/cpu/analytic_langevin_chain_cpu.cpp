// analytic_langevin_chain on the CPU.
#include <vector>

#include "analytic_langevin_chain_loops.h"
#include "coopflow/reduction.h"
#include "ops/analytic_langevin_chain_op.h"

namespace coopflow {
namespace {

struct CpuAnalyticChain {
  static void check_chains(const LangevinChainOp& /*op*/) {}

  template <typename Energy, typename A>
  static void run(const LangevinChainArgs<A>& args, const Energy& energy, const Tensor& /*x0*/) {
    // Elements' steps for one thread before it pays to start another.
    constexpr int64_t kGrain = 4096;
    std::vector<A> table(static_cast<std::size_t>(energy.table_size()));
    for (std::size_t i = 0; i < table.size(); ++i) table[i] = energy.table_entry(i);
    const AnalyticLoop<A> loop =
        COOPFLOW_SELECT_ISA(analytic_loop<A>(Energy::kName, args.is_plain(), args.per_chain));
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
}
