// The mixture-of-logistics coupling ops on CUDA. The kernels stand in a file for each parameter
// type, which can then be compiled at the same time.
#include "mixture_logistic_launch.h"
#include "ops/mixture_logistic_op.h"

namespace coopflow {
namespace {

struct CudaMixtureLogistic {
  template <typename T, typename P>
  static void mixture_coupling(const MixtureCouplingArgs<arithmetic_t<T>>& args,
                               const Tensor& state) {
    run_mixture_coupling_kernel<P>(args, std::is_same_v<T, arithmetic_t<P>>, state);
  }

  template <typename T, typename P>
  static void mixture_coupling_backward(const MixtureCouplingBackwardArgs<arithmetic_t<T>>& args,
                                        const Tensor& state) {
    run_mixture_coupling_backward_kernel<P>(args, std::is_same_v<T, arithmetic_t<P>>, state);
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CUDA, m) {
  using Cuda = coopflow::CudaMixtureLogistic;
  m.impl("mixture_logistic_coupling", TORCH_BOX(&coopflow::mixture_logistic_coupling<Cuda>));
  m.impl("mixture_logistic_coupling_inverse",
         TORCH_BOX(&coopflow::mixture_logistic_coupling_inverse<Cuda>));
  m.impl("mixture_logistic_coupling_backward",
         TORCH_BOX(&coopflow::mixture_logistic_coupling_backward<Cuda>));
  m.impl("mixture_logistic_coupling_inverse_backward",
         TORCH_BOX(&coopflow::mixture_logistic_coupling_inverse_backward<Cuda>));
}
