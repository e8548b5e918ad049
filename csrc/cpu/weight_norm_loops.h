// The CPU loops of weight norm and its derivative, built once per instruction set.
#pragma once

#include <cstdint>

#include "coopflow/scalar_types.h"
#include "coopflow/weight_norm.h"
#include "isa.h"

namespace coopflow {

// The rows of all layers, counted through them: first_rows has a number for each.
template <typename Layer>
struct LayerRows {
  const Layer* layers;
  const int64_t* first_rows;
  int64_t count;
};

// Storage type T. Rows [begin, end).
template <typename T>
struct WeightNormLoops {
  void (*forward)(const LayerRows<WeightNormLayer>& rows, int64_t begin, int64_t end);
  void (*backward)(const LayerRows<WeightNormBackwardLayer>& rows, int64_t begin, int64_t end);
};

COOPFLOW_DECLARE_PER_ISA(template <typename T> WeightNormLoops<T> weight_norm_loops())

}  // namespace coopflow
