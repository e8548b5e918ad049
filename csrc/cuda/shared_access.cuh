// Neighbouring floats of shared memory, moved in one access.
#pragma once

#include "coopflow/packed.h"

namespace coopflow {

template <int kCount>
__device__ __forceinline__ void load_shared(const float* from, float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    values[0] = from[0];
  } else {
    load_packed<float, kCount>(from, values);
  }
}

// store_word is for global memory alone.
template <int kCount>
__device__ __forceinline__ void store_shared(const float (&values)[kCount], float* to) {
  if constexpr (kCount == 1) {
    to[0] = values[0];
  } else {
    using Word = typename PackedLayout<float, kCount>::Word;
    Word word;
    memcpy(&word, values, sizeof(word));
    *reinterpret_cast<Word*>(to) = word;
  }
}

}  // namespace coopflow
