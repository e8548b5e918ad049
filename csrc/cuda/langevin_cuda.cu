// The Langevin ops on CUDA. The kernels stand in a file for each type of state, which can then be
// compiled at the same time.
#include "langevin_launch.h"
#include "ops/langevin_bound_op.h"

namespace coopflow {
namespace {

struct CudaLangevin {
  static constexpr bool kReadsStrides = true;

  template <typename T>
  static void langevin_step(const LangevinArgs<arithmetic_t<T>>& args, const Tensor& x) {
    run_langevin_step_kernels<T>(args, x);
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CUDA, m) {
  using coopflow::CudaLangevin;
  m.impl("langevin_step_", TORCH_BOX(&coopflow::langevin_step_<CudaLangevin>));
  m.impl("langevin_bind", TORCH_BOX(&coopflow::langevin_bind));
  m.impl("langevin_bound_step_", TORCH_BOX(&coopflow::langevin_bound_step_<CudaLangevin>));
  m.impl("langevin_step", TORCH_BOX(&coopflow::langevin_step<CudaLangevin>));
  m.impl("langevin_noise_", TORCH_BOX(&coopflow::langevin_noise_<CudaLangevin>));
}
