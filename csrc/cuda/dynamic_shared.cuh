// The shared memory whose size a launch chooses.
#pragma once

#include "coopflow/intrinsics.h"

namespace coopflow {

#if defined(__CUDACC__)
extern __shared__ Word16 dynamic_shared_words[];

__device__ __forceinline__ float* dynamic_shared_floats() {
  return reinterpret_cast<float*>(dynamic_shared_words);
}
#else
inline float* dynamic_shared_floats() {
  return static_cast<float*>(cuda_emulation::dynamic_shared());
}
#endif

}  // namespace coopflow
