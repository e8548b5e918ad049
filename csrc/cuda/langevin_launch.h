// What the Langevin ops call on CUDA: kernels for states of type T.
#pragma once

#include "coopflow/langevin.h"
#include "ops/op_checks.h"

namespace coopflow {

template <typename T>
void run_langevin_step_kernels(const LangevinArgs<arithmetic_t<T>>& args, const Tensor& x);

}  // namespace coopflow
