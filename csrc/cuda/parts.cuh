// Threads of a warp that share an element, each with a part of what the element consists of: kParts
// lanes that lie kWarp / kParts apart, so that the lanes of one part have neighbouring elements.
#pragma once

#include <cstdint>
#include <cstring>

#include "items.cuh"

namespace coopflow {

// The value of the lane whose number differs in these bits; a struct's members are all of type A.
template <typename A>
__device__ __forceinline__ A shuffle_xor(A value, int lanes) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, lanes);
}

template <template <typename> class Members, typename A>
__device__ __forceinline__ Members<A> shuffle_xor(const Members<A>& value, int lanes) {
  constexpr int kMembers = sizeof(Members<A>) / sizeof(A);
  static_assert(sizeof(Members<A>) == kMembers * sizeof(A));
  A members[kMembers];
  memcpy(members, &value, sizeof(members));
  COOPFLOW_UNROLL
  for (int i = 0; i < kMembers; ++i) members[i] = shuffle_xor(members[i], lanes);
  Members<A> other;
  memcpy(&other, members, sizeof(members));
  return other;
}

template <int kParts>
struct Parts {
  static constexpr int kElements = kWarp / kParts;  // of a warp

  static __device__ __forceinline__ int part() {
    return kParts == 1 ? 0 : static_cast<int>(threadIdx.x % kWarp) / kElements;
  }

  // This thread's element among those of its block.
  static __device__ __forceinline__ int element() {
    return static_cast<int>(threadIdx.x / kWarp * kElements + threadIdx.x % kElements);
  }

  // Merges the parts' values two by two. As merge(a, b) is merge(b, a), all parts of an element
  // receive the same bits. All lanes must call, but for one part.
  template <typename T, typename F>
  static __device__ __forceinline__ T merged(T value, const F& merge) {
    COOPFLOW_UNROLL
    for (int lanes = kWarp / 2; lanes >= kElements; lanes /= 2) {
      value = merge(value, shuffle_xor(value, lanes));
    }
    return value;
  }

  // Whether it is so for any thread that the warp's shuffles concern: for one part, for this one.
  // All lanes must call, but for one part.
  static __device__ __forceinline__ bool any(bool mine) {
    return kParts == 1 ? mine : __any_sync(0xFFFFFFFFu, mine) != 0;
  }
};

}  // namespace coopflow
