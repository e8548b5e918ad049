// Kernels of the mixture-of-logistics coupling for float32 parameters.
#include "mixture_logistic.cuh"

namespace coopflow {

template void run_mixture_coupling_kernel<float>(const MixtureCouplingArgs<float>&, bool,
                                                 const Tensor&);
template void run_mixture_coupling_backward_kernel<float>(const MixtureCouplingBackwardArgs<float>&,
                                                          bool, const Tensor&);

}  // namespace coopflow
