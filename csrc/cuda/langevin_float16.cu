// Kernels of the Langevin ops for float16 states.
#include "langevin.cuh"

namespace coopflow {

template void run_langevin_step_kernels<float16>(const LangevinArgs<float>&, const Tensor&);

}  // namespace coopflow
