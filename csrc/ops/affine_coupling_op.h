// The affine coupling ops as the dispatcher calls them: checks and arguments, written once.
#pragma once

#include <tuple>

#include "coopflow/affine_coupling.h"
#include "ops/coupling_op.h"

namespace coopflow {

template <typename Backend>
std::tuple<Tensor, Tensor> run_affine_coupling(const char* name, const char* state_name,
                                               const Tensor& in, const Tensor& params,
                                               bool inverse) {
  const CouplingOp op(name, state_name, in, params);
  op.check_affine_params();
  Tensor out = torch::stable::empty_like(in);
  Tensor ladj = torch::stable::new_empty(in, {op.batch()}, op.sum_type());
  if (op.is_empty()) {
    torch::stable::fill_(ladj, 0.0);
    return {out, ladj};
  }
  op.dispatch([&](auto state_tag, auto params_tag) {
    using T = typename decltype(state_tag)::type;
    using P = typename decltype(params_tag)::type;
    using A = arithmetic_t<T>;
    const AffineCouplingArgs<A> args{in.const_data_ptr(),
                                     params.const_data_ptr(),
                                     out.mutable_data_ptr(),
                                     static_cast<A*>(ladj.mutable_data_ptr()),
                                     op.batch(),
                                     op.per_chain(),
                                     inverse};
    Backend::template affine_coupling<T, P>(args, in);
  });
  return {out, ladj};
}

template <typename Backend>
std::tuple<Tensor, Tensor> run_affine_coupling_backward(const char* name, const char* grad_name,
                                                        const Tensor& grad_out,
                                                        const Tensor& grad_ladj, const Tensor& x,
                                                        const Tensor& params, bool inverse) {
  const CouplingOp op(name, "x", x, params);
  op.check_affine_params();
  op.check_like_state(grad_name, grad_out);
  op.check_ladj("grad_ladj", grad_ladj);
  Tensor grad_in = torch::stable::empty_like(x);
  Tensor grad_params = torch::stable::empty_like(params);
  if (op.is_empty()) return {grad_in, grad_params};
  op.dispatch([&](auto state_tag, auto params_tag) {
    using T = typename decltype(state_tag)::type;
    using P = typename decltype(params_tag)::type;
    using A = arithmetic_t<T>;
    const AffineCouplingBackwardArgs<A> args{grad_out.const_data_ptr(),
                                             static_cast<const A*>(grad_ladj.const_data_ptr()),
                                             x.const_data_ptr(),
                                             params.const_data_ptr(),
                                             grad_in.mutable_data_ptr(),
                                             grad_params.mutable_data_ptr(),
                                             op.batch(),
                                             op.per_chain(),
                                             inverse};
    Backend::template affine_coupling_backward<T, P>(args, x);
  });
  return {grad_in, grad_params};
}

template <typename Backend>
std::tuple<Tensor, Tensor> affine_coupling(Tensor x, Tensor params) {
  return run_affine_coupling<Backend>("affine_coupling", "x", x, params, false);
}

template <typename Backend>
std::tuple<Tensor, Tensor> affine_coupling_inverse(Tensor y, Tensor params) {
  return run_affine_coupling<Backend>("affine_coupling_inverse", "y", y, params, true);
}

template <typename Backend>
std::tuple<Tensor, Tensor> affine_coupling_backward(Tensor grad_y, Tensor grad_ladj, Tensor x,
                                                    Tensor params) {
  return run_affine_coupling_backward<Backend>("affine_coupling_backward", "grad_y", grad_y,
                                               grad_ladj, x, params, false);
}

template <typename Backend>
std::tuple<Tensor, Tensor> affine_coupling_inverse_backward(Tensor grad_x, Tensor grad_ladj,
                                                            Tensor x, Tensor params) {
  return run_affine_coupling_backward<Backend>("affine_coupling_inverse_backward", "grad_x", grad_x,
                                               grad_ladj, x, params, true);
}

}  // namespace coopflow
