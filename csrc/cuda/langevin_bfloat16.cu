// Kernels of the Langevin ops for bfloat16 states.
#include "langevin.cuh"

namespace coopflow {

template void run_langevin_step_kernels<bfloat16>(const LangevinArgs<float>&, const Tensor&);

}  // namespace coopflow
