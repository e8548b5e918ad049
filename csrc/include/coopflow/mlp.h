// A fully connected network to one number, Linear - activation - ... - Linear(., 1), whose energy's
// gradient moves a chain: the activations with their derivatives, and the plain description of the
// network.
#pragma once

#include <cmath>
#include <cstdint>

#include "coopflow/elementary.h"
#include "coopflow/intrinsics.h"
#include "coopflow/macros.h"

namespace coopflow {

// Numbered as coopflow_ext/ops/mlp.py numbers them.
enum class Activation : int {
  kSilu,
  kRelu,
  kLeakyRelu,
  kElu,
  kTanh,
  kSoftplus,
  kGelu,
  kGeluTanh,
  kActivations
};

// shape: negative_slope of leaky_relu, alpha of elu, beta of softplus. threshold: of softplus.
template <typename A>
struct ActivationParameters {
  A shape, threshold;
};

template <typename A>
struct ActivationResult {
  A value, slope;
};

// The upper tail of a standard normal, for a >= 0; e = exp(-a^2 / 2).
COOPFLOW_HD float normal_tail(float a, float e) {
  // R(t), t = 1 / (1 + 0.35 a), with relative error 7e-8 in float for a <= 14.
  const float t = reciprocal(multiply_add(0.35f, a, 1.0f));
  float p = -2.914593942e-2f;
  p = multiply_add(p, t, 1.439717416e-1f);
  p = multiply_add(p, t, -2.557143435e-1f);
  p = multiply_add(p, t, 1.591742610e-1f);
  p = multiply_add(p, t, -2.310990383e-2f);
  p = multiply_add(p, t, 1.055080330e-1f);
  p = multiply_add(p, t, 1.198328603e-1f);
  p = multiply_add(p, t, 1.398618707e-1f);
  p = multiply_add(p, t, 1.396214042e-1f);
  return p * t * e;
}

COOPFLOW_HD double normal_tail(double a, double /*e*/) {
  return 0.5 * std::erfc(a * 0.70710678118654752440);
}

// An activation at z and its derivative there.
template <Activation kActivation, typename A>
COOPFLOW_HD ActivationResult<A> activate(const ActivationParameters<A>& parameters, A z) {
  if constexpr (kActivation == Activation::kSilu) {
    const Sigmoid<A> s = sigmoid(z);
    const A value = z * s.below;
    return {value, multiply_add(value, s.above, s.below)};
  } else if constexpr (kActivation == Activation::kRelu) {
    return {z <= A(0) ? A(0) : z, z <= A(0) ? A(0) : A(1)};
  } else if constexpr (kActivation == Activation::kLeakyRelu) {
    const A slope = z > A(0) ? A(1) : parameters.shape;
    return {z * slope, slope};
  } else if constexpr (kActivation == Activation::kElu) {
    const A m = exponential_minus_one(z > A(0) ? A(0) : z);
    const A alpha = parameters.shape;
    return {z > A(0) ? z : alpha * m, z > A(0) ? A(1) : multiply_add(alpha, m, alpha)};
  } else if constexpr (kActivation == Activation::kTanh) {
    const A m = exponential_minus_one(A(-2) * absolute(z));
    const A size = -m * reciprocal(A(2) + m);
    return {z < A(0) ? -size : size, multiply_add(-size, size, A(1))};
  } else if constexpr (kActivation == Activation::kSoftplus) {
    const A t = parameters.shape * z;
    const Sigmoid<A> s = sigmoid(t);
    // log(1 + e), with what rounding took from 1 + e.
    const A u = A(1) + s.e;
    const A log_u = multiply_add(s.e - (u - A(1)), s.r, log_positive(u));
    const A value = ((t < A(0) ? A(0) : t) + log_u) * reciprocal(parameters.shape);
    const bool linear = t > parameters.threshold;
    return {linear ? z : value, linear ? A(1) : s.below};
  } else if constexpr (kActivation == Activation::kGelu) {
    const A a = absolute(z);
    const A e = exponential_nonpositive(A(-0.5) * a * a);
    const A tail = normal_tail(a, e);
    const A cdf = z < A(0) ? tail : A(1) - tail;
    return {z * cdf, multiply_add(A(0.39894228040143267794) * z, e, cdf)};
  } else {
    static_assert(kActivation == Activation::kGeluTanh);
    // (1 + tanh(t / 2)) / 2 = sigma(t)
    constexpr A kLinear = A(1.59576912160573071176), kCubic = A(0.044715);
    const A square = z * z;
    const Sigmoid<A> s = sigmoid(kLinear * z * multiply_add(kCubic, square, A(1)));
    const A value = z * s.below;
    const A inner = kLinear * multiply_add(A(3) * kCubic, square, A(1));
    return {value, multiply_add(value * s.above, inner, s.below)};
  }
}

// An activation passed as a value, so that a generic lambda can receive it.
template <Activation kActivation>
struct ActivationTag {
  static constexpr Activation value = kActivation;
};

// Calls f(ActivationTag<activation>()).
template <typename F>
COOPFLOW_HD void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kSilu:
      return f(ActivationTag<Activation::kSilu>());
    case Activation::kRelu:
      return f(ActivationTag<Activation::kRelu>());
    case Activation::kLeakyRelu:
      return f(ActivationTag<Activation::kLeakyRelu>());
    case Activation::kElu:
      return f(ActivationTag<Activation::kElu>());
    case Activation::kTanh:
      return f(ActivationTag<Activation::kTanh>());
    case Activation::kSoftplus:
      return f(ActivationTag<Activation::kSoftplus>());
    case Activation::kGelu:
      return f(ActivationTag<Activation::kGelu>());
    default:
      return f(ActivationTag<Activation::kGeluTanh>());
  }
}

constexpr int kMlpMaxDepth = 4;  // hidden layers
constexpr int64_t kMlpMaxSize = 128;

// weights[l] (sizes[l + 1], sizes[l]), row-major, and biases[l] (sizes[l + 1]) lead from layer l to
// the next; layer 0 is the state, the last weights lead from layer `depth` to the energy.
template <typename A>
struct Mlp {
  const A* weights[kMlpMaxDepth + 1];
  const A* biases[kMlpMaxDepth + 1];
  int sizes[kMlpMaxDepth + 1];
  int depth;
  Activation activation;
  ActivationParameters<A> parameters;
  bool bfloat16;  // whether a GPU may take the products between hidden layers in bfloat16
};

// One hidden layer has no such product.
COOPFLOW_HD bool has_bfloat16_products(bool allowed, int depth) { return allowed && depth > 1; }

}  // namespace coopflow
