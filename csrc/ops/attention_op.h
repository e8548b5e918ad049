// attention and its derivative as the dispatcher calls them: checks and arguments, written once.
#pragma once

#include <cmath>
#include <optional>
#include <tuple>

#include "coopflow/attention.h"
#include "ops/op_checks.h"

namespace coopflow {

// The arguments that both ops have.
class AttentionOp {
 public:
  AttentionOp(const char* name, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& rng, double p, int64_t step, std::optional<double> scale)
      : check_(name), q_(q) {
    check_.is_floating("q", q);
    if (q.dim() != 4) {
      check_.fail("q", "must have shape (B, H, L, d), got ", shape_text(q));
    }
    shape = {q.size(0), q.size(1), q.size(2), q.size(3)};
    if (shape.dim < 1 || shape.dim > kAttentionMaxDim) {
      check_.fail("q", "must have d from 1 to ", kAttentionMaxDim, ", got ", shape.dim);
    }
    check_like_q("k", k);
    check_like_q("v", v);
    check_.is_rng(rng, q, "q");
    if (!(p >= 0 && p < 1)) check_.fail("p", "must be in [0, 1), got ", p);
    if (scale) check_.is_finite("scale", *scale, q_);
    const int64_t rows = shape.heads * shape.length;
    if (shape.length > 0 && rows > (int64_t{1} << 34) / shape.length) {
      check_.fail("q", "must have H * L * L of at most 2**34, got shape ", shape_text(q));
    }
    check_.noise_fits(rows * shape.length, step);
    rng_ = static_cast<const int64_t*>(rng.const_data_ptr());
    p_ = p;
    step_ = step;
    scale_ = scale ? *scale : 1 / std::sqrt(static_cast<double>(shape.dim));
  }

  // Of the shape, dtype and device of q.
  void check_like_q(const char* argument, const Tensor& t) const {
    check_.has_dtype(argument, t, q_.scalar_type());
    check_.same_device(argument, t, q_, "q");
    check_.same_shape(argument, t, q_, "q");
  }

  void check_lse(const Tensor& lse) const {
    check_.has_dtype("lse", lse, sum_type());
    check_.same_device("lse", lse, q_, "q");
    if (lse.dim() != 3 || lse.size(0) != shape.batch || lse.size(1) != shape.heads ||
        lse.size(2) != shape.length) {
      check_.fail("lse", "must have shape (B, H, L) of q, ", shape_text(q_), ", got ",
                  shape_text(lse));
    }
    check_.is_contiguous("lse", lse);
  }

  Tensor new_lse() const {
    return torch::stable::new_empty(q_, {shape.batch, shape.heads, shape.length}, sum_type());
  }

  // (B, H, L, d) that lies as (B, L, H, d), so that joining the heads again moves no data.
  Tensor new_like_q() const {
    Tensor rows = torch::stable::new_empty(q_, {shape.batch, shape.length, shape.heads, shape.dim});
    return torch::stable::transpose(rows, 1, 2);
  }

  // Gradients side by side, (B, L, 3, H, d): of k, v and q, the order of a Flow++ projection, whose
  // own gradient they are then without a copy.
  Tensor new_gradients() const {
    return torch::stable::new_empty(q_, {shape.batch, shape.length, 3, shape.heads, shape.dim});
  }

  template <typename A>
  Dropout<A> dropout() const {
    return {rng_, step_, dropout_threshold(p_), static_cast<A>(1 / (1 - p_))};
  }

  double scale() const { return scale_; }
  bool is_empty() const { return shape.batch * shape.heads * shape.length == 0; }

  AttentionShape shape;

 private:
  ScalarType sum_type() const {
    return q_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  OpChecks check_;
  const Tensor& q_;
  const int64_t* rng_;
  int64_t step_;
  double p_, scale_;
};

inline AttentionInput attention_input(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline AttentionOutput attention_output(const Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// One of those side by side, as (B, H, L, d).
inline AttentionOutput attention_output(const Tensor& gradients, int64_t which) {
  return attention_output(
      torch::stable::transpose(torch::stable::select(gradients, 2, which), 1, 2));
}

template <typename Backend>
std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, Tensor rng, double p,
                                     int64_t step, std::optional<double> scale) {
  const AttentionOp op("attention", q, k, v, rng, p, step, scale);
  Tensor out = op.new_like_q();
  Tensor lse = op.new_lse();
  if (op.is_empty()) return {out, lse};
  dispatch_floating(q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = arithmetic_t<T>;
    const AttentionArgs<A> args{attention_input(q),
                                attention_input(k),
                                attention_input(v),
                                attention_output(out),
                                static_cast<A*>(lse.mutable_data_ptr()),
                                op.shape,
                                op.template dropout<A>(),
                                static_cast<A>(op.scale())};
    Backend::template run<T>(args, q);
  });
  return {out, lse};
}

// out and lse are those of attention for the other arguments.
template <typename Backend>
Tensor attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor rng, Tensor out,
                          Tensor lse, double p, int64_t step, std::optional<double> scale) {
  const AttentionOp op("attention_backward", q, k, v, rng, p, step, scale);
  op.check_like_q("grad_out", grad_out);
  op.check_like_q("out", out);
  op.check_lse(lse);
  Tensor gradients = op.new_gradients();
  if (op.is_empty()) return gradients;
  const AttentionOutput grad_k = attention_output(gradients, 0);
  const AttentionOutput grad_v = attention_output(gradients, 1);
  const AttentionOutput grad_q = attention_output(gradients, 2);
  dispatch_floating(q.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = arithmetic_t<T>;
    const AttentionBackwardArgs<A> args{attention_input(grad_out),
                                        attention_input(q),
                                        attention_input(k),
                                        attention_input(v),
                                        attention_input(out),
                                        static_cast<const A*>(lse.const_data_ptr()),
                                        grad_q,
                                        grad_k,
                                        grad_v,
                                        op.shape,
                                        op.template dropout<A>(),
                                        static_cast<A>(op.scale())};
    Backend::template run_backward<T>(args, lse);
  });
  return gradients;
}

}  // namespace coopflow
