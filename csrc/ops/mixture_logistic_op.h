// The mixture-of-logistics coupling ops as the dispatcher calls them: checks and arguments, written
// once.
#pragma once

#include <optional>
#include <tuple>

#include "coopflow/mixture_logistic.h"
#include "ops/coupling_op.h"

namespace coopflow {

template <typename Backend>
std::tuple<Tensor, Tensor> run_mixture_coupling(const char* name, const char* state_name,
                                                const Tensor& in, const Tensor& params, bool affine,
                                                bool inverse, bool legacy_cdf_clamp) {
  const CouplingOp op(name, state_name, in, params);
  const MixtureShape shape{op.batch(), op.per_chain(), op.check_mixture_params(affine), affine};
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
    const MixtureCouplingArgs<A> args{in.const_data_ptr(),
                                      params.const_data_ptr(),
                                      out.mutable_data_ptr(),
                                      static_cast<A*>(ladj.mutable_data_ptr()),
                                      shape,
                                      inverse,
                                      legacy_cdf_clamp};
    Backend::template mixture_coupling<T, P>(args, in);
  });
  return {out, ladj};
}

// y is the inverse's input; the forward map has none.
template <typename Backend>
std::tuple<Tensor, Tensor> run_mixture_coupling_backward(const char* name, const char* grad_name,
                                                         const Tensor& grad_out,
                                                         const Tensor& grad_ladj, const Tensor& x,
                                                         const std::optional<Tensor>& y,
                                                         const Tensor& params, bool affine,
                                                         bool legacy_cdf_clamp) {
  const CouplingOp op(name, "x", x, params);
  const MixtureShape shape{op.batch(), op.per_chain(), op.check_mixture_params(affine), affine};
  op.check_like_state(grad_name, grad_out);
  op.check_ladj("grad_ladj", grad_ladj);
  if (y) op.check_like_state("y", *y);
  Tensor grad_in = torch::stable::empty_like(x);
  Tensor grad_params = torch::stable::empty_like(params);
  if (op.is_empty()) return {grad_in, grad_params};
  op.dispatch([&](auto state_tag, auto params_tag) {
    using T = typename decltype(state_tag)::type;
    using P = typename decltype(params_tag)::type;
    using A = arithmetic_t<T>;
    const MixtureCouplingBackwardArgs<A> args{grad_out.const_data_ptr(),
                                              static_cast<const A*>(grad_ladj.const_data_ptr()),
                                              x.const_data_ptr(),
                                              y ? y->const_data_ptr() : nullptr,
                                              params.const_data_ptr(),
                                              grad_in.mutable_data_ptr(),
                                              grad_params.mutable_data_ptr(),
                                              shape,
                                              legacy_cdf_clamp};
    Backend::template mixture_coupling_backward<T, P>(args, x);
  });
  return {grad_in, grad_params};
}

template <typename Backend>
std::tuple<Tensor, Tensor> mixture_logistic_coupling(Tensor x, Tensor params, bool affine) {
  return run_mixture_coupling<Backend>("mixture_logistic_coupling", "x", x, params, affine, false,
                                       false);
}

template <typename Backend>
std::tuple<Tensor, Tensor> mixture_logistic_coupling_inverse(Tensor y, Tensor params, bool affine,
                                                             bool legacy_cdf_clamp) {
  return run_mixture_coupling<Backend>("mixture_logistic_coupling_inverse", "y", y, params, affine,
                                       true, legacy_cdf_clamp);
}

template <typename Backend>
std::tuple<Tensor, Tensor> mixture_logistic_coupling_backward(Tensor grad_y, Tensor grad_ladj,
                                                              Tensor x, Tensor params,
                                                              bool affine) {
  return run_mixture_coupling_backward<Backend>("mixture_logistic_coupling_backward", "grad_y",
                                                grad_y, grad_ladj, x, std::nullopt, params, affine,
                                                false);
}

template <typename Backend>
std::tuple<Tensor, Tensor> mixture_logistic_coupling_inverse_backward(Tensor grad_x,
                                                                      Tensor grad_ladj, Tensor y,
                                                                      Tensor x, Tensor params,
                                                                      bool affine,
                                                                      bool legacy_cdf_clamp) {
  return run_mixture_coupling_backward<Backend>("mixture_logistic_coupling_inverse_backward",
                                                "grad_x", grad_x, grad_ladj, x, y, params, affine,
                                                legacy_cdf_clamp);
}

}  // namespace coopflow
