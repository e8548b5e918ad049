// Weight norm, w = g * v / |v| for every row of a layer's weights (Salimans and Kingma 2016): one
// row and one element of it. A launch has the rows of many layers, one after the other.
#pragma once

#include <cmath>
#include <cstdint>

#include "coopflow/intrinsics.h"
#include "coopflow/macros.h"

namespace coopflow {

// Factor of a row, from its gain and the sum of its squares. A row of zeros becomes NaN.
template <typename A>
COOPFLOW_HD A weight_norm_factor(A gain, A squares) {
  return gain / std::sqrt(squares);
}

// What a row's gradients have in common.
template <typename A>
struct WeightNormGradient {
  A gain;      // the gradient of the gain
  A factor;    // of the row
  A parallel;  // part of the weights' gradient along the row, in rows
};

// From the gain, the sum of squares, and the sum of products of the row with its weights' gradient.
template <typename A>
COOPFLOW_HD WeightNormGradient<A> weight_norm_gradient(A gain, A squares, A products) {
  const A norm = std::sqrt(squares);
  return {products / norm, gain / norm, products / squares};
}

// The gradient of an element v: that of its weight without what only lengthens the row.
template <typename A>
COOPFLOW_HD A direction_gradient(const WeightNormGradient<A>& row, A grad_weight, A v) {
  return row.factor * multiply_add(-row.parallel, v, grad_weight);
}

// (rows, per_row) and, of gains, (rows).
struct WeightNormLayer {
  const void* direction;
  const void* gain;
  void* weight;
  int64_t rows, per_row;
};

struct WeightNormBackwardLayer {
  const void* grad_weight;
  const void* direction;
  const void* gain;
  void* grad_direction;
  void* grad_gain;
  int64_t rows, per_row;
};

// The layer that a row belongs to, where rows are counted through all layers: the last of those
// whose first row is not behind it.
COOPFLOW_HD int64_t layer_of_row(const int64_t* first_rows, int64_t layers, int64_t row) {
  int64_t low = 0, high = layers;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (first_rows[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace coopflow
