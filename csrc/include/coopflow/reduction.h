// How sums over a chain are split: in parts of fixed length, so that a sum's order depends on
// nothing but the chain's length.
#pragma once

#include <cstdint>

#include "coopflow/macros.h"

namespace coopflow {

constexpr int64_t kReductionChunk = 16384;

COOPFLOW_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename A>
COOPFLOW_HD bool is_finite(A x) {
  return x - x == A(0);
}

}  // namespace coopflow
