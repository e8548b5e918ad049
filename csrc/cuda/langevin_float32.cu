// Kernels of the Langevin ops for float32 states.
#include "langevin.cuh"

namespace coopflow {

template void run_langevin_step_kernels<float>(const LangevinArgs<float>&, const Tensor&);

}  // namespace coopflow
