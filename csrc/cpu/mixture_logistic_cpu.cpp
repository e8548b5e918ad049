// The mixture-of-logistics coupling ops on the CPU.
#include <vector>

#include "chunks.h"
#include "mixture_logistic_loops.h"
#include "ops/mixture_logistic_op.h"

namespace coopflow {
namespace {

// An element costs about a microsecond: few make work for a thread.
constexpr int64_t kMixtureGrain = 128;

template <typename A>
std::vector<ComponentBlock<A>> mixture_scratch(const MixtureShape& shape) {
  return std::vector<ComponentBlock<A>>(shape.components);
}

struct CpuMixtureLogistic {
  template <typename T, typename P>
  static void mixture_coupling(const MixtureCouplingArgs<arithmetic_t<T>>& args,
                               const Tensor& /*state*/) {
    using A = arithmetic_t<T>;
    const MixtureLogisticLoops<T, P> loops = COOPFLOW_SELECT_ISA(mixture_logistic_loops<T, P>());
    reduce_chunks_in_order(
        args.shape.batch, args.shape.per_chain, 1, args.ladj,
        [&](A* sums, int64_t begin, int64_t end) {
          loops.map(args, mixture_scratch<A>(args.shape).data(), sums, begin, end);
        },
        kMixtureGrain);
  }

  template <typename T, typename P>
  static void mixture_coupling_backward(const MixtureCouplingBackwardArgs<arithmetic_t<T>>& args,
                                        const Tensor& /*state*/) {
    using A = arithmetic_t<T>;
    const MixtureLogisticLoops<T, P> loops = COOPFLOW_SELECT_ISA(mixture_logistic_loops<T, P>());
    parallel_chunks(
        args.shape.batch, args.shape.per_chain,
        [&](int64_t begin, int64_t end) {
          loops.backward(args, mixture_scratch<A>(args.shape).data(), begin, end);
        },
        kMixtureGrain);
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CPU, m) {
  using Cpu = coopflow::CpuMixtureLogistic;
  m.impl("mixture_logistic_coupling", TORCH_BOX(&coopflow::mixture_logistic_coupling<Cpu>));
  m.impl("mixture_logistic_coupling_inverse",
         TORCH_BOX(&coopflow::mixture_logistic_coupling_inverse<Cpu>));
  m.impl("mixture_logistic_coupling_backward",
         TORCH_BOX(&coopflow::mixture_logistic_coupling_backward<Cpu>));
  m.impl("mixture_logistic_coupling_inverse_backward",
         TORCH_BOX(&coopflow::mixture_logistic_coupling_inverse_backward<Cpu>));
}
