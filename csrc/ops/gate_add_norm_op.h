// gate_add_norm and its derivative as the dispatcher calls them: checks and arguments, written
// once. A back end is a type with
//   template <typename T> static void run(const GateAddNormArgs<arithmetic_t<T>>& args,
//                                         const Tensor& x);
//   template <typename T> static void run_backward(
//       const GateAddNormBackwardArgs<arithmetic_t<T>>& args, arithmetic_t<T>* grad_parameters,
//       const Tensor& x);
// where there are rows and channels, and x tells the device; grad_parameters receives the sum of
// args.partial_sums over its parts.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "coopflow/gate_add_norm.h"
#include "coopflow/reduction.h"
#include "ops/op_checks.h"

namespace coopflow {

// The arguments that both ops have.
class GateAddNormOp {
 public:
  GateAddNormOp(const char* name, const Tensor& x, const Tensor& gates, const Tensor& weight,
                double eps)
      : check_(name), x_(x) {
    check_.is_floating("x", x);
    if (x.dim() == 0) check_.fail("x", "must have shape (..., C), got ()");
    channels = x.size(x.dim() - 1);
    for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
    check_.has_dtype("gates", gates, x.scalar_type());
    check_.same_device("gates", gates, x);
    check_rows("gates", gates, 2 * channels);
    check_parameter("weight", weight);
    check_.is_finite("eps", eps, x);
    check_.is_non_negative("eps", eps);
  }

  // One number a channel, of the type of sums.
  void check_parameter(const char* argument, const Tensor& t) const {
    check_.has_dtype(argument, t, sum_type());
    check_.same_device(argument, t, x_);
    if (t.dim() != 1 || t.size(0) != channels) {
      check_.fail(argument, "must have shape (C,) for x of shape ", shape_text(x_), ", got ",
                  shape_text(t));
    }
  }

  void check_grad_y(const Tensor& t) const {
    check_.has_dtype("grad_y", t, x_.scalar_type());
    check_.same_device("grad_y", t, x_);
    check_.same_shape("grad_y", t, x_);
  }

  void check_norms(const Tensor& t) const {
    check_.has_dtype("norms", t, sum_type());
    check_.same_device("norms", t, x_);
    check_rows("norms", t, 2);
  }

  // A number of rows' last dimension, of the shape of x but for that.
  Tensor new_rows(int64_t last, ScalarType type) const {
    std::vector<int64_t> sizes(x_.sizes().begin(), x_.sizes().end());
    sizes.back() = last;
    return torch::stable::new_empty(x_, sizes, type);
  }

  Tensor new_norms() const { return new_rows(2, sum_type()); }
  // Of weight and bias: their gradients, or the parts of these.
  Tensor new_parameter_sums() const {
    return torch::stable::new_empty(x_, {2, channels}, sum_type());
  }
  Tensor new_partial_sums(int64_t parts) const {
    return torch::stable::new_empty(x_, {parts, 2, channels}, sum_type());
  }

  bool is_empty() const { return rows * channels == 0; }

  int64_t rows = 1, channels;

 private:
  ScalarType sum_type() const {
    return x_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  void check_rows(const char* argument, const Tensor& t, int64_t last) const {
    bool fits = t.dim() == x_.dim() && t.size(t.dim() - 1) == last;
    for (int64_t i = 0; fits && i + 1 < t.dim(); ++i) fits = t.size(i) == x_.size(i);
    if (!fits) {
      check_.fail(argument, "must have ", last, " in the last dimension and the others of x, ",
                  shape_text(x_), ", got ", shape_text(t));
    }
  }

  OpChecks check_;
  const Tensor& x_;
};

// Without a dispatcher's call where nothing is to be done.
inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// The result, and of each row the mean and one over the standard deviation.
template <typename Backend>
std::tuple<Tensor, Tensor> gate_add_norm(Tensor x, Tensor gates, Tensor weight, Tensor bias,
                                         double eps) {
  const GateAddNormOp op("gate_add_norm", x, gates, weight, eps);
  op.check_parameter("bias", bias);
  Tensor y = op.new_rows(op.channels, x.scalar_type());
  Tensor norms = op.new_norms();
  if (op.is_empty()) return {y, norms};
  const Tensor x_rows = dense(x), gate_rows = dense(gates);
  const Tensor weights = dense(weight), biases = dense(bias);
  dispatch_floating(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = arithmetic_t<T>;
    static_assert(sizeof(NormRow<A>) == 2 * sizeof(A));
    const GateAddNormArgs<A> args{x_rows.const_data_ptr(),
                                  gate_rows.const_data_ptr(),
                                  static_cast<const A*>(weights.const_data_ptr()),
                                  static_cast<const A*>(biases.const_data_ptr()),
                                  y.mutable_data_ptr(),
                                  static_cast<NormRow<A>*>(norms.mutable_data_ptr()),
                                  op.rows,
                                  op.channels,
                                  static_cast<A>(eps)};
    Backend::template run<T>(args, x);
  });
  return {y, norms};
}

// Gradients of x, of the gates, and of weight and bias, (2, C); norms are those of gate_add_norm
// for the other arguments.
template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> gate_add_norm_backward(Tensor grad_y, Tensor x, Tensor gates,
                                                          Tensor weight, Tensor norms, double eps) {
  const GateAddNormOp op("gate_add_norm_backward", x, gates, weight, eps);
  op.check_grad_y(grad_y);
  op.check_norms(norms);
  Tensor grad_x = op.new_rows(op.channels, x.scalar_type());
  Tensor grad_gates = op.new_rows(2 * op.channels, x.scalar_type());
  Tensor grad_parameters = op.new_parameter_sums();
  if (op.is_empty()) {
    torch::stable::fill_(grad_parameters, 0.0);
    return {grad_x, grad_gates, grad_parameters};
  }
  const Tensor grad_rows = dense(grad_y), x_rows = dense(x), gate_rows = dense(gates);
  const Tensor weights = dense(weight), norm_rows = dense(norms);
  const int64_t parts = divide_up(op.rows, kGateAddNormRows);
  const Tensor partial_sums = parts == 1 ? grad_parameters : op.new_partial_sums(parts);
  dispatch_floating(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = arithmetic_t<T>;
    const GateAddNormBackwardArgs<A> args{
        grad_rows.const_data_ptr(),
        x_rows.const_data_ptr(),
        gate_rows.const_data_ptr(),
        static_cast<const A*>(weights.const_data_ptr()),
        static_cast<const NormRow<A>*>(norm_rows.const_data_ptr()),
        grad_x.mutable_data_ptr(),
        grad_gates.mutable_data_ptr(),
        static_cast<A*>(partial_sums.mutable_data_ptr()),
        op.rows,
        op.channels};
    Backend::template run_backward<T>(args, static_cast<A*>(grad_parameters.mutable_data_ptr()), x);
  });
  return {grad_x, grad_gates, grad_parameters};
}

}  // namespace coopflow
