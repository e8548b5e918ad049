// y = LayerNorm(x + a * sigma(b)) * weight + bias over rows of channels, where a row of the gates
// is (a, b): one element, and what a row's elements have in common.
#pragma once

#include <cmath>
#include <cstdint>

#include "coopflow/elementary.h"
#include "coopflow/intrinsics.h"
#include "coopflow/macros.h"

namespace coopflow {

// sigma(b) and its derivative.
template <typename A>
struct Gate {
  A value, slope;
};

template <typename A>
COOPFLOW_HD Gate<A> gate(A b) {
  const Sigmoid<A> s = sigmoid(b);
  return {s.below, s.below * s.above};
}

template <typename A>
COOPFLOW_HD A gated_sum(A x, A a, A gate_value) {
  return multiply_add(a, gate_value, x);
}

// The gradients of a and b, from that of the sum.
template <typename A>
struct GateGradient {
  A a, b;
};

template <typename A>
COOPFLOW_HD GateGradient<A> gate_gradient(A grad_sum, A a, const Gate<A>& gate) {
  return {grad_sum * gate.value, grad_sum * a * gate.slope};
}

// Mean of a row's sums, and one over their standard deviation.
template <typename A>
struct NormRow {
  A mean, factor;

  COOPFLOW_HD A normalized(A sum) const { return (sum - mean) * factor; }
};

template <typename A>
COOPFLOW_HD A norm_factor(A variance, A eps) {
  return A(1) / std::sqrt(variance + eps);
}

// The means over a row of the gradient of what was normalized, and of its products with that.
template <typename A>
struct NormGradient {
  A mean, product;
};

// The gradient of a sum: that of its normalized value without what moves or stretches the row.
template <typename A>
COOPFLOW_HD A sum_gradient(const NormRow<A>& row, const NormGradient<A>& gradient, A grad,
                           A normalized) {
  return row.factor * multiply_add(-normalized, gradient.product, grad - gradient.mean);
}

// The gradients of weight and bias are sums over rows: over so many first, then over these parts.
constexpr int64_t kGateAddNormRows = 128;

// x, y and their gradients are (rows, channels), gates and theirs (rows, 2, channels), norms
// (rows).
template <typename A>
struct GateAddNormArgs {
  const void* x;
  const void* gates;
  const A* weight;
  const A* bias;
  void* y;
  NormRow<A>* norms;
  int64_t rows, channels;
  A eps;
};

// partial_sums: (parts, 2, channels), gradients of weight and of bias of kGateAddNormRows rows
// each.
template <typename A>
struct GateAddNormBackwardArgs {
  const void* grad_y;
  const void* x;
  const void* gates;
  const A* weight;
  const NormRow<A>* norms;
  void* grad_x;
  void* grad_gates;
  A* partial_sums;
  int64_t rows, channels;
};

}  // namespace coopflow
