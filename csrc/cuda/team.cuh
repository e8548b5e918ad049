// A team of threads that holds one chain in its registers: a thread, a warp or a block.
#pragma once

#include <cstdint>

#include "items.cuh"
#include "reduce.cuh"

namespace coopflow {

struct ThreadTeam {
  static constexpr int kThreads = 1;

  // Adds sums[i] over the team; every thread of it receives the totals. All of them must call.
  template <int kWidth, typename A>
  static __device__ __forceinline__ void sum(A (&)[kWidth]) {}

  // Whether it is so for any thread of the team. All of them must call.
  static __device__ __forceinline__ bool any(bool mine) { return mine; }
};

struct WarpTeam {
  static constexpr int kThreads = kWarp;

  template <int kWidth, typename A>
  static __device__ __forceinline__ void sum(A (&sums)[kWidth]) {
    warp_sum(sums);
  }

  static __device__ __forceinline__ bool any(bool mine) {
    return __any_sync(0xFFFFFFFFu, mine) != 0;
  }
};

// The kernel is launched with blocks of kBlockThreads threads.
struct BlockTeam {
  static constexpr int kThreads = kBlockThreads;

  template <int kWidth, typename A>
  static __device__ __forceinline__ void sum(A (&sums)[kWidth]) {
    block_sum(sums);
  }

  static __device__ __forceinline__ bool any(bool mine) { return __syncthreads_or(mine) != 0; }
};

template <typename Team>
constexpr int kTeamsPerBlock = kBlockThreads / Team::kThreads;

// This thread's team among those of the grid, and how many there are.
template <typename Team>
__device__ __forceinline__ int64_t team_index() {
  return static_cast<int64_t>(blockIdx.x) * kTeamsPerBlock<Team> + threadIdx.x / Team::kThreads;
}

template <typename Team>
__device__ __forceinline__ int64_t team_count() {
  return static_cast<int64_t>(gridDim.x) * kTeamsPerBlock<Team>;
}

template <typename Team>
__device__ __forceinline__ int team_rank() {
  return static_cast<int>(threadIdx.x % Team::kThreads);
}

// Calls f(k, item) for the items that this thread holds, its k-th in registers.
template <typename Team, int kItems, typename F>
__device__ __forceinline__ void for_held_items(int items, const F& f) {
  COOPFLOW_UNROLL
  for (int k = 0; k < kItems; ++k) {
    const int item = k * Team::kThreads + team_rank<Team>();
    if (item < items) f(k, item);
  }
}

// Calls f(first element, n) for this lane's items of a row that its warp reads.
template <int kCount, typename F>
__device__ __forceinline__ void for_each_item_of_row(int64_t per_row, const F& f) {
  for (int64_t e = team_rank<WarpTeam>() * kCount; e < per_row; e += kWarp * kCount) {
    f(e, per_row - e < kCount ? static_cast<int>(per_row - e) : kCount);
  }
}

// Elements of an item that exist.
template <int kCount>
__device__ __forceinline__ int item_size(int64_t per_chain, int item) {
  const int64_t left = per_chain - int64_t{item} * kCount;
  return left < kCount ? static_cast<int>(left) : kCount;
}

}  // namespace coopflow
