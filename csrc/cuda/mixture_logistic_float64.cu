// Kernels of the mixture-of-logistics coupling for float64 parameters.
#include "mixture_logistic.cuh"

namespace coopflow {

template void run_mixture_coupling_kernel<double>(const MixtureCouplingArgs<double>&, bool,
                                                  const Tensor&);
template void run_mixture_coupling_backward_kernel<double>(
    const MixtureCouplingBackwardArgs<double>&, bool, const Tensor&);

}  // namespace coopflow
