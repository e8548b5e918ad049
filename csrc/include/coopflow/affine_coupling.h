// The affine coupling y = x * e^a + b of one element, its inverse, and their derivatives.
#pragma once

#include <cstdint>

#include "coopflow/elementary.h"
#include "coopflow/macros.h"

namespace coopflow {

template <typename A>
COOPFLOW_HD A affine_forward(A x, A a, A b) {
  return multiply_add(x, exponential(a), b);
}

template <typename A>
COOPFLOW_HD A affine_inverse(A y, A a, A b) {
  return (y - b) * exponential(-a);
}

template <typename A>
struct AffineGradient {
  A input, a, b;
};

// From the gradients of y and of ladj.
template <typename A>
COOPFLOW_HD AffineGradient<A> affine_forward_gradient(A grad_y, A grad_ladj, A x, A a) {
  const A grad_x = grad_y * exponential(a);
  return {grad_x, multiply_add(grad_x, x, grad_ladj), grad_y};
}

// From the gradients of x, the inverse's output, and of its ladj.
template <typename A>
COOPFLOW_HD AffineGradient<A> affine_inverse_gradient(A grad_x, A grad_ladj, A x, A a) {
  const A grad_y = grad_x * exponential(-a);
  return {grad_y, -multiply_add(grad_x, x, grad_ladj), -grad_y};
}

// One launch. `in`, `out` are (batch, per_chain); params and grad_params (batch, 2, per_chain).
// The parameters may have another storage type than the state.
template <typename A>
struct AffineCouplingArgs {
  const void* in;
  const void* params;
  void* out;
  A* ladj;  // (batch)
  int64_t batch, per_chain;
  bool inverse;
};

template <typename A>
struct AffineCouplingBackwardArgs {
  const void* grad_out;
  const A* grad_ladj;  // (batch)
  const void* x;       // the forward map's input, which is the inverse's output
  const void* params;
  void* grad_in;
  void* grad_params;
  int64_t batch, per_chain;
  bool inverse;
};

}  // namespace coopflow
