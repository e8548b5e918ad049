// Sums over a chain in a fixed order: one block adds up one chunk of one chain, a second kernel
// adds a chain's chunks. No atomics.
#pragma once

#include <cstdint>

#include "coopflow/reduction.h"
#include "items.cuh"

namespace coopflow {

constexpr int kMaxWarps = kBlockThreads / kWarp;

// Threads of a block that reduces chains of this length; part of the sum's order.
inline int reduction_threads(int64_t per_chain) { return per_chain <= 512 ? kWarp : kBlockThreads; }

inline int64_t reduction_chunks(int64_t per_chain) { return divide_up(per_chain, kReductionChunk); }

// Adds sums[i] over the warp; every lane receives the totals. All lanes must call.
template <int kWidth, typename A>
__device__ __forceinline__ void warp_sum(A (&sums)[kWidth]) {
  COOPFLOW_UNROLL
  for (int i = 0; i < kWidth; ++i) {
    COOPFLOW_UNROLL
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      sums[i] += __shfl_xor_sync(0xFFFFFFFFu, sums[i], lanes);
    }
  }
}

// Adds sums[i] over the block; every thread receives the totals. All threads must call.
template <int kWidth, typename A>
__device__ __forceinline__ void block_sum(A (&sums)[kWidth]) {
  __shared__ A by_warp[kMaxWarps][kWidth];
  warp_sum(sums);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (warps == 1) return;
  if (threadIdx.x % kWarp == 0) {
    COOPFLOW_UNROLL
    for (int i = 0; i < kWidth; ++i) by_warp[threadIdx.x / kWarp][i] = sums[i];
  }
  __syncthreads();
  COOPFLOW_UNROLL
  for (int i = 0; i < kWidth; ++i) sums[i] = by_warp[0][i];
  for (int w = 1; w < warps; ++w) {
    COOPFLOW_UNROLL
    for (int i = 0; i < kWidth; ++i) sums[i] += by_warp[w][i];
  }
  __syncthreads();  // by_warp is free for the next sum
}

// Walks one block through the chunks of all chains, without a division in the loop.
class ChunkCursor {
 public:
  __device__ __forceinline__ ChunkCursor(int64_t batch, int64_t per_chain)
      : batch_(batch), per_chain_(per_chain), chunks_(divide_up(per_chain, kReductionChunk)) {
    chain_ = blockIdx.x / chunks_;
    chunk_ = blockIdx.x - chain_ * chunks_;
    chain_stride_ = gridDim.x / chunks_;
    chunk_stride_ = gridDim.x - chain_stride_ * chunks_;
  }

  __device__ __forceinline__ bool valid() const { return chain_ < batch_; }

  __device__ __forceinline__ void next() {
    chain_ += chain_stride_;
    chunk_ += chunk_stride_;
    if (chunk_ >= chunks_) {
      chunk_ -= chunks_;
      ++chain_;
    }
  }

  __device__ __forceinline__ int64_t chain() const { return chain_; }
  // Position among all chunks.
  __device__ __forceinline__ int64_t index() const { return chain_ * chunks_ + chunk_; }
  // The chunk's elements [begin, end), counted in the chain.
  __device__ __forceinline__ int64_t begin() const { return chunk_ * kReductionChunk; }
  __device__ __forceinline__ int64_t end() const {
    const int64_t full = begin() + kReductionChunk;
    return full < per_chain_ ? full : per_chain_;
  }

 private:
  int64_t batch_, per_chain_, chunks_, chain_, chunk_, chain_stride_, chunk_stride_;
};

// Calls f(first element, n) for this thread's items of a chunk.
template <int kCount, typename F>
__device__ __forceinline__ void for_each_item(const ChunkCursor& at, const F& f) {
  const int64_t end = at.end();
  const int64_t stride = static_cast<int64_t>(blockDim.x) * kCount;
  for (int64_t e = at.begin() + threadIdx.x * kCount; e < end; e += stride) {
    f(e, end - e < kCount ? static_cast<int>(end - e) : kCount);
  }
}

// out[chain][i] = the sum of partial_sums[chain][chunk][i] over its chunks, in order.
template <typename A>
__global__ void __launch_bounds__(kBlockThreads)
    sum_chunks_kernel(const A* partial_sums, A* out, int64_t batch, int64_t chunks, int width) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; k < batch * width;
       k += stride) {
    const int64_t chain = k / width;
    const int64_t i = k - chain * width;
    A total = A(0);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      total += partial_sums[(chain * chunks + chunk) * width + i];
    }
    out[k] = total;
  }
}

}  // namespace coopflow
