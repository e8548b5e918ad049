// The CPU loops of attention and its derivative, built once per instruction set.
#pragma once

#include <cstdint>

#include "coopflow/attention.h"
#include "coopflow/scalar_types.h"
#include "isa.h"

namespace coopflow {

// Rows of scores that are computed side by side.
constexpr int64_t kAttentionRows = 16;

template <typename T>
struct AttentionLoops {
  // Row tiles [begin, end) = head * tiles of a head + tile, heads counted through the batch.
  void (*forward)(const AttentionArgs<arithmetic_t<T>>& args, int64_t begin, int64_t end);
  // Heads [begin, end).
  void (*backward)(const AttentionBackwardArgs<arithmetic_t<T>>& args, int64_t begin, int64_t end);
};

COOPFLOW_DECLARE_PER_ISA(template <typename T> AttentionLoops<T> attention_loops())

}  // namespace coopflow
