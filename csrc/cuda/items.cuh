// How threads share a (batch, per_chain) state. An item is a few neighbouring elements of one
// chain, one thread's share of one loop turn: 16 bytes of the state's type, at least one quad of
// noise.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "coopflow/packed.h"
#include "coopflow/reduction.h"
#include "coopflow/scalar_types.h"

namespace coopflow {

constexpr int kWarp = 32;
constexpr int kBlockThreads = 256;  // the most that a kernel is launched with

// Resident blocks that a kernel's registers must allow: 64 registers a thread, for double 128.
template <typename T>
constexpr int kMinBlocks = sizeof(T) == 8 ? 2 : 4;

template <typename T>
constexpr int kItem = sizeof(T) == 2 ? 8 : 4;

// Whether every pointer (null ones do not count) and every chain begins on an access boundary.
template <typename T>
bool can_pack(int64_t per_chain, std::initializer_list<const void*> pointers) {
  bool aligned = per_chain % kItem<T> == 0;
  for (const void* pointer : pointers) {
    aligned = aligned && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  }
  return aligned;
}

// kVec = kCount: packed accesses, the item is full. kVec = 1: element by element, n may be less.
template <typename T, int kVec, int kCount>
__device__ __forceinline__ void load_item(const void* base, int64_t offset, int n,
                                          arithmetic_t<T> (&values)[kCount]) {
  const T* from = static_cast<const T*>(base) + offset;
  if constexpr (kVec == kCount) {
    load_packed<T, kCount>(from, values);
  } else {
    COOPFLOW_UNROLL
    for (int i = 0; i < kCount; ++i)
      values[i] = i < n ? to_arithmetic(from[i]) : arithmetic_t<T>(0);
  }
}

template <typename T, int kVec, int kCount>
__device__ __forceinline__ void store_item(const arithmetic_t<T> (&values)[kCount], int64_t offset,
                                           int n, void* base) {
  T* to = static_cast<T*>(base) + offset;
  if constexpr (kVec == kCount) {
    store_packed<T, kCount>(values, to);
  } else {
    COOPFLOW_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (i < n) to[i] = from_arithmetic<T>(values[i]);
    }
  }
}

// How a grid of threads strides over the items of all chains. Made on the host, so that the loop
// has no division and finds its constants in the parameter bank.
struct ItemGrid {
  int64_t batch, per_chain, items;  // items: of a chain
  int64_t chain_stride, item_stride, offset_stride;
  int64_t wrap;  // what the offset gains over whole items at a chain's end, negative or zero
};

template <int kCount>
ItemGrid make_item_grid(int64_t batch, int64_t per_chain, int64_t threads) {
  const int64_t items = divide_up(per_chain, kCount);
  const int64_t chains = threads / items;
  const int64_t rest = threads % items;
  return {batch,
          per_chain,
          items,
          chains,
          rest,
          chains * per_chain + rest * kCount,
          per_chain - items * kCount};
}

// Walks one thread through its items.
template <int kCount>
class ItemCursor {
 public:
  __device__ __forceinline__ explicit ItemCursor(const ItemGrid& grid) : grid_(grid) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    chain_ = first / grid.items;
    item_ = first - chain_ * grid.items;
    offset_ = chain_ * grid.per_chain + item_ * kCount;
  }

  __device__ __forceinline__ bool valid() const { return chain_ < grid_.batch; }

  __device__ __forceinline__ void next() {
    chain_ += grid_.chain_stride;
    item_ += grid_.item_stride;
    offset_ += grid_.offset_stride;
    if (item_ >= grid_.items) {
      item_ -= grid_.items;
      ++chain_;
      offset_ += grid_.wrap;
    }
  }

  __device__ __forceinline__ int64_t chain() const { return chain_; }
  __device__ __forceinline__ int64_t item() const { return item_; }
  __device__ __forceinline__ int64_t offset() const { return offset_; }
  // Elements of this item that exist.
  __device__ __forceinline__ int size() const {
    const int64_t left = grid_.per_chain - item_ * kCount;
    return left < kCount ? static_cast<int>(left) : kCount;
  }

 private:
  const ItemGrid& grid_;
  int64_t chain_, item_, offset_;
};

}  // namespace coopflow
