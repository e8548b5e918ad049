// The affine coupling ops on the CPU.
#include "affine_coupling_loops.h"
#include "chunks.h"
#include "ops/affine_coupling_op.h"

namespace coopflow {
namespace {

struct CpuAffineCoupling {
  template <typename T, typename P>
  static void affine_coupling(const AffineCouplingArgs<arithmetic_t<T>>& args,
                              const Tensor& /*state*/) {
    const AffineCouplingLoops<T, P> loops = COOPFLOW_SELECT_ISA(affine_coupling_loops<T, P>());
    reduce_chunks_in_order(args.batch, args.per_chain, 1, args.ladj,
                           [&](arithmetic_t<T>* sums, int64_t begin, int64_t end) {
                             loops.map(args, sums, begin, end);
                           });
  }

  template <typename T, typename P>
  static void affine_coupling_backward(const AffineCouplingBackwardArgs<arithmetic_t<T>>& args,
                                       const Tensor& /*state*/) {
    const AffineCouplingLoops<T, P> loops = COOPFLOW_SELECT_ISA(affine_coupling_loops<T, P>());
    parallel_chunks(args.batch, args.per_chain,
                    [&](int64_t begin, int64_t end) { loops.backward(args, begin, end); });
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CPU, m) {
  using Cpu = coopflow::CpuAffineCoupling;
  m.impl("affine_coupling", TORCH_BOX(&coopflow::affine_coupling<Cpu>));
  m.impl("affine_coupling_inverse", TORCH_BOX(&coopflow::affine_coupling_inverse<Cpu>));
  m.impl("affine_coupling_backward", TORCH_BOX(&coopflow::affine_coupling_backward<Cpu>));
  m.impl("affine_coupling_inverse_backward",
         TORCH_BOX(&coopflow::affine_coupling_inverse_backward<Cpu>));
}
