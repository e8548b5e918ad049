// normal_ and uniform_ on the CPU.
#include "coopflow/reduction.h"
#include "ops/random_op.h"
#include "random_loops.h"

namespace coopflow {
namespace {

struct CpuRandom {
  template <typename T>
  static void fill(const RandomArgs& args, const Tensor& /*out*/) {
    constexpr int64_t kGrain = 4096;  // quads per thread before another one pays
    const RandomLoop loop = COOPFLOW_SELECT_ISA(random_loop<T>(args.distribution));
    torch::stable::parallel_for(0, args.batch * divide_up(args.per_chain, 4), kGrain,
                                [&](int64_t begin, int64_t end) { loop(args, begin, end); });
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CPU, m) {
  m.impl("normal_", TORCH_BOX(&coopflow::normal_<coopflow::CpuRandom>));
  m.impl("uniform_", TORCH_BOX(&coopflow::uniform_<coopflow::CpuRandom>));
}
