// Kernels of the mixture-of-logistics coupling for float16 parameters.
#include "mixture_logistic.cuh"

namespace coopflow {

template void run_mixture_coupling_kernel<float16>(const MixtureCouplingArgs<float>&, bool,
                                                   const Tensor&);
template void run_mixture_coupling_backward_kernel<float16>(
    const MixtureCouplingBackwardArgs<float>&, bool, const Tensor&);

}  // namespace coopflow
