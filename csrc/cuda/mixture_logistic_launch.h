// What the ops of the mixture-of-logistics coupling call on CUDA: kernels for parameters of type P.
#pragma once

#include "coopflow/mixture_logistic.h"
#include "ops/op_checks.h"

namespace coopflow {

// arithmetic_state: the state is of the arithmetic type, as beside half-precision parameters; else
// it is of type P too.
template <typename P>
void run_mixture_coupling_kernel(const MixtureCouplingArgs<arithmetic_t<P>>& args,
                                 bool arithmetic_state, const Tensor& state);

template <typename P>
void run_mixture_coupling_backward_kernel(const MixtureCouplingBackwardArgs<arithmetic_t<P>>& args,
                                          bool arithmetic_state, const Tensor& state);

}  // namespace coopflow
