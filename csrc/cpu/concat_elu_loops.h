// The CPU loops of concat_elu, built once per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "coopflow/concat_elu.h"
#include "coopflow/macros.h"
#include "coopflow/reduction.h"
#include "coopflow/scalar_types.h"
#include "isa.h"

namespace coopflow {

// A block is one thread's share at a time: some channels of one image, whose mask is drawn once,
// and some of its positions.
struct ConcatEluBlocks {
  static constexpr int64_t kChannels =
      252;  // their words fill a tile of noise, wherever they begin
  static constexpr int64_t kElements = 16384;

  COOPFLOW_HD explicit ConcatEluBlocks(const ConcatEluShape& shape)
      : channels(std::min(shape.channels, kChannels)),
        positions(std::min(shape.positions, divide_up(kElements, channels))),
        of_channels(divide_up(shape.channels, channels)),
        of_positions(divide_up(shape.positions, positions)),
        count(shape.batch * of_channels * of_positions) {}

  int64_t channels, positions;  // of a block
  int64_t of_channels, of_positions, count;
};

// Blocks [begin, end).
template <typename T>
struct ConcatEluLoops {
  using A = arithmetic_t<T>;
  void (*forward)(const ConcatEluArgs<A>& args, int64_t begin, int64_t end);
  void (*backward)(const ConcatEluBackwardArgs<A>& args, int64_t begin, int64_t end);
};

COOPFLOW_DECLARE_PER_ISA(template <typename T> ConcatEluLoops<T> concat_elu_loops())

}  // namespace coopflow
