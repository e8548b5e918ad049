// concat-ELU, (elu(x), elu(-x)), and its derivative, taken from the result as it is kept for the
// next layer. With dropout whole channels of a chain are zero.
#pragma once

#include <cstdint>

#include "coopflow/dropout.h"
#include "coopflow/elementary.h"
#include "coopflow/intrinsics.h"
#include "coopflow/macros.h"

namespace coopflow {

template <typename A>
struct EluPair {
  A plus, minus;  // elu(x), elu(-x)
};

// One of the two is |x|, the other the exponential.
template <typename A>
COOPFLOW_HD EluPair<A> elu_pair(A x) {
  const A below = exponential_minus_one(-absolute(x));
  return {x > A(0) ? x : below, x > A(0) ? below : -x};
}

// dy/dx of y = factor * elu(x); the factor is 0 where x was dropped, as y is. NaN stays NaN.
template <typename A>
COOPFLOW_HD A elu_slope(A y, A factor) {
  return y > A(0) ? factor : y + factor;
}

// The channels of x (batch, channels, positions). channels_last: they are innermost in memory.
struct ConcatEluShape {
  int64_t batch, channels, positions;
  bool channels_last;

  // x in memory is (rows, row_size), the result (rows, 2, row_size).
  COOPFLOW_HD int64_t rows() const { return channels_last ? batch * positions : batch; }
  COOPFLOW_HD int64_t row_size() const { return channels_last ? channels : channels * positions; }
};

// dropout: of the result's channels, (2 * channels) a chain; without it rng is null, the factor 1.
template <typename A>
struct ConcatEluArgs {
  const void* x;
  void* y;
  ConcatEluShape shape;
  Dropout<A> dropout;
};

template <typename A>
struct ConcatEluBackwardArgs {
  const void* grad_y;
  const void* y;
  void* grad_x;
  ConcatEluShape shape;
  Dropout<A> dropout;
};

}  // namespace coopflow
