// Kernels of the Langevin ops for float64 states.
#include "langevin.cuh"

namespace coopflow {

template void run_langevin_step_kernels<double>(const LangevinArgs<double>&, const Tensor&);

}  // namespace coopflow
