// What every coupling op checks of its state and parameters, and how it is dispatched.
#pragma once

#include <cstdint>
#include <type_traits>

#include "coopflow/scalar_types.h"
#include "ops/op_checks.h"

namespace coopflow {

// State and parameters (batch, kinds, *shape[1:]) of a coupling. The parameters have the state's
// dtype, or a half-precision one beside a float32 state, as under autocast.
class CouplingOp {
 public:
  CouplingOp(const char* name, const char* state_name, const Tensor& state, const Tensor& params)
      : check_(name), state_(state), params_(params) {
    check_.is_floating(state_name, state);
    if (state.dim() == 0) check_.fail(state_name, "must have a batch dimension, got shape ()");
    check_.is_contiguous(state_name, state);
    check_.is_floating("params", params);
    check_.same_device("params", params, state);
    check_.is_contiguous("params", params);
    const bool narrower =
        state.scalar_type() == ScalarType::Float && params.scalar_type() != ScalarType::Double;
    if (params.scalar_type() != state.scalar_type() && !narrower) {
      check_.fail_type("params", "must have dtype ", dtype_name(state.scalar_type()), " (that of ",
                       state_name, ") or be a half-precision type beside float32, got dtype ",
                       dtype_name(params.scalar_type()));
    }
    batch_ = state.size(0);
    per_chain_ = 1;
    for (int64_t i = 1; i < state.dim(); ++i) per_chain_ *= state.size(i);
  }

  void check_affine_params() const {
    if (!params_fit() || params_.size(1) != 2) {
      check_.fail("params", "must have shape (B, 2, *shape of a chain) beside a state of shape ",
                  shape_text(state_), ", got ", shape_text(params_));
    }
  }

  // Returns the number of components K.
  int64_t check_mixture_params(bool affine) const {
    const int64_t rows = params_fit() ? params_.size(1) - (affine ? 2 : 0) : 0;
    if (rows < 3 || rows % 3 != 0) {
      check_.fail("params", "must have shape (B, ", affine ? "2 + 3K" : "3K",
                  ", *shape of a chain), K >= 1, beside a state of shape ", shape_text(state_),
                  ", got ", shape_text(params_));
    }
    return rows / 3;
  }

  void check_like_state(const char* argument, const Tensor& t) const {
    check_.has_dtype(argument, t, state_.scalar_type());
    check_.same_device(argument, t, state_);
    check_.same_shape(argument, t, state_);
    check_.is_contiguous(argument, t);
  }

  void check_ladj(const char* argument, const Tensor& t) const {
    check_.has_dtype(argument, t, sum_type());
    check_.same_device(argument, t, state_);
    if (t.dim() != 1 || t.size(0) != batch_) {
      check_.fail(argument, "must have shape (", batch_, ",), got ", shape_text(t));
    }
    check_.is_contiguous(argument, t);
  }

  ScalarType sum_type() const {
    return state_.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  }

  // Calls f(TypeTag<state>(), TypeTag<params>()).
  template <typename F>
  void dispatch(const F& f) const {
    dispatch_floating(state_.scalar_type(), [&](auto state_tag) {
      if constexpr (std::is_same_v<typename decltype(state_tag)::type, float>) {
        if (params_.scalar_type() == ScalarType::Half) return f(state_tag, TypeTag<float16>());
        if (params_.scalar_type() == ScalarType::BFloat16) return f(state_tag, TypeTag<bfloat16>());
      }
      f(state_tag, state_tag);
    });
  }

  bool is_empty() const { return batch_ == 0 || per_chain_ == 0; }
  int64_t batch() const { return batch_; }
  int64_t per_chain() const { return per_chain_; }

 private:
  // Whether params have the state's shape around dimension 1.
  bool params_fit() const {
    bool fit = params_.dim() == state_.dim() + 1 && params_.size(0) == batch_;
    for (int64_t i = 1; fit && i < state_.dim(); ++i) fit = params_.size(i + 1) == state_.size(i);
    return fit;
  }

  OpChecks check_;
  const Tensor& state_;
  const Tensor& params_;
  int64_t batch_, per_chain_;
};

}  // namespace coopflow
