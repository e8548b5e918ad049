// concat_elu and its derivative as the dispatcher calls them: checks and arguments, written once.
#pragma once

#include <cstdint>
#include <vector>

#include "coopflow/concat_elu.h"
#include "ops/op_checks.h"

namespace coopflow {

// The arguments that both ops have. `t` is x, or the result, which has twice its channels.
class ConcatEluOp {
 public:
  ConcatEluOp(const char* name, const char* t_name, const Tensor& t, bool is_result,
              const OptionalTensor& rng, double p, int64_t step)
      : check_(name) {
    check_.is_floating(t_name, t);
    if (t.dim() < 2) check_.fail(t_name, "must have shape (B, C, ...), got ", shape_text(t));
    if (is_result && t.size(1) % 2 != 0) {
      check_.fail(t_name, "must have an even number of channels, got shape ", shape_text(t));
    }
    if (!(p >= 0 && p < 1)) check_.fail("p", "must be in [0, 1), got ", p);
    sizes_.assign(t.sizes().begin(), t.sizes().end());
    channels_ = is_result ? t.size(1) / 2 : t.size(1);
    check_.noise_fits(2 * channels_, step);
    if (rng) check_.is_rng(*rng, t, t_name);
    if (rng && p > 0) {
      rng_ = static_cast<const int64_t*>(rng->const_data_ptr());
      p_ = p;
      step_ = step;
    }
    positions_ = 1;
    for (int64_t i = 2; i < t.dim(); ++i) positions_ *= t.size(i);
    channels_last_ = is_channels_last(t);
  }

  void check_like_result(const char* argument, const Tensor& t, const Tensor& y) const {
    check_.has_dtype(argument, t, y.scalar_type());
    check_.same_device(argument, t, y, "y");
    check_.same_shape(argument, t, y, "y");
  }

  // The tensor, or a copy of it, lying as results of this op do.
  Tensor laid_out(const Tensor& t) const {
    if (is_channels_last(t) == channels_last_ && (channels_last_ || t.is_contiguous())) return t;
    Tensor copy = new_tensor(t, t.size(1));
    torch::stable::copy_(copy, t);
    return copy;
  }

  Tensor new_result(const Tensor& x) const { return new_tensor(x, 2 * channels_); }
  Tensor new_grad_x(const Tensor& y) const { return new_tensor(y, channels_); }

  bool is_empty() const { return sizes_[0] * channels_ * positions_ == 0; }

  // Of a single position both layouts are the same memory; the rows are those of channels_last.
  ConcatEluShape shape() const {
    return {sizes_[0], channels_, positions_, channels_last_ || positions_ == 1};
  }

  template <typename A>
  Dropout<A> dropout() const {
    return {rng_, step_, dropout_threshold(p_), static_cast<A>(1 / (1 - p_))};
  }

 private:
  // Whether memory is dense with the channels innermost. Where there is a single position or none,
  // it is contiguous as well, and counts as that. The fake kernel in
  // coopflow_ext/ops/concat_elu.py decides alike.
  static bool is_channels_last(const Tensor& t) {
    if (t.numel() == 0 || t.stride(1) != 1) return false;
    int64_t expected = t.size(1);
    for (int64_t i = t.dim() - 1; i >= 2; --i) {
      if (t.size(i) > 1 && t.stride(i) != expected) return false;
      expected *= t.size(i);
    }
    return expected > t.size(1) && (t.size(0) == 1 || t.stride(0) == expected);
  }

  Tensor new_tensor(const Tensor& like, int64_t channels) const {
    std::vector<int64_t> sizes = sizes_;
    sizes[1] = channels;
    if (!channels_last_) return torch::stable::new_empty(like, sizes);
    sizes.erase(sizes.begin() + 1);
    sizes.push_back(channels);
    Tensor t = torch::stable::new_empty(like, sizes);
    for (int64_t i = t.dim() - 1; i >= 2; --i) t = torch::stable::transpose(t, i - 1, i);
    return t;
  }

  OpChecks check_;
  std::vector<int64_t> sizes_;
  int64_t channels_, positions_;
  bool channels_last_;
  const int64_t* rng_ = nullptr;
  int64_t step_ = 0;
  double p_ = 0;
};

template <typename Backend>
Tensor concat_elu(Tensor x, OptionalTensor rng, double p, int64_t step) {
  const ConcatEluOp op("concat_elu", "x", x, false, rng, p, step);
  Tensor y = op.new_result(x);
  if (op.is_empty()) return y;
  const Tensor source = op.laid_out(x);
  dispatch_floating(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = arithmetic_t<T>;
    const ConcatEluArgs<A> args{source.const_data_ptr(), y.mutable_data_ptr(), op.shape(),
                                op.template dropout<A>()};
    Backend::template run<T>(args, source);
  });
  return y;
}

// y is the result of concat_elu for the other arguments.
template <typename Backend>
Tensor concat_elu_backward(Tensor grad_y, Tensor y, OptionalTensor rng, double p, int64_t step) {
  const ConcatEluOp op("concat_elu_backward", "y", y, true, rng, p, step);
  op.check_like_result("grad_y", grad_y, y);
  Tensor grad_x = op.new_grad_x(y);
  if (op.is_empty()) return grad_x;
  const Tensor source = op.laid_out(y);
  const Tensor grad_source = op.laid_out(grad_y);
  dispatch_floating(y.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = arithmetic_t<T>;
    const ConcatEluBackwardArgs<A> args{grad_source.const_data_ptr(), source.const_data_ptr(),
                                        grad_x.mutable_data_ptr(), op.shape(),
                                        op.template dropout<A>()};
    Backend::template run_backward<T>(args, source);
  });
  return grad_x;
}

}  // namespace coopflow
