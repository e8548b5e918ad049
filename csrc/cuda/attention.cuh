// What the kernels of attention have in common, whatever makes their products.
#pragma once

#include <cmath>
#include <cstdint>

#include "coopflow/attention.h"
#include "coopflow/macros.h"
#include "coopflow/philox.h"
#include "coopflow/scalar_types.h"

namespace coopflow {

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// The mask of one head's weights.
template <typename A>
class HeadMask {
 public:
  __device__ __forceinline__ HeadMask(const Dropout<A>& dropout, const AttentionShape& shape,
                                      int64_t head)
      : dropout_(dropout),
        length_(shape.length),
        key_(make_philox_key(dropout.rng[0])),
        time_(static_cast<uint32_t>(dropout.rng[1] + dropout.step)),
        chain_(dropout.rng[2] + head / shape.heads),
        first_(head % shape.heads * shape.length * shape.length) {}

  // Votes of a warp, of which each lane draws four neighbours: bit l of number i says whether the
  // weight of key first_key + i of lane l is kept. All lanes must call; first_key is a multiple
  // of 4.
  __device__ __forceinline__ void vote(int64_t row, int64_t first_key, uint32_t (&votes)[4]) const {
    const uint32_t threshold = dropout_.threshold;
    if (length_ % 4 == 0) {  // then no four lie in two blocks of words
      const auto block = static_cast<uint32_t>((first_ + row * length_ + first_key) / 4);
      const PhiloxWords words = noise_words(key_, chain_, time_, block);
      votes[0] = __ballot_sync(kAllLanes, is_kept(words.w0, threshold));
      votes[1] = __ballot_sync(kAllLanes, is_kept(words.w1, threshold));
      votes[2] = __ballot_sync(kAllLanes, is_kept(words.w2, threshold));
      votes[3] = __ballot_sync(kAllLanes, is_kept(words.w3, threshold));
    } else {
      const uint32_t four = kept<4>(row, first_key);
      COOPFLOW_UNROLL
      for (int i = 0; i < 4; ++i) votes[i] = __ballot_sync(kAllLanes, (four >> i & 1) != 0);
    }
  }

  // Bit i: whether the weight of key first_key + i is kept, i < kCount.
  template <int kCount>
  __device__ __forceinline__ uint32_t kept(int64_t row, int64_t first_key) const {
    return kept_of<kCount>(key_, chain_, time_, first_ + row * length_ + first_key,
                           dropout_.threshold);
  }

 private:
  const Dropout<A>& dropout_;
  const int64_t& length_;
  const PhiloxKey key_;
  const uint32_t time_;
  const int64_t chain_, first_;
};

template <typename A, int kCount>
__device__ __forceinline__ void fill(A (&values)[kCount], A value) {
  COOPFLOW_UNROLL
  for (int i = 0; i < kCount; ++i) values[i] = value;
}

// Of rows that exist: delta, and lse beside it, into shared memory; delta is kept for the gradients
// of keys and values. A barrier must follow.
template <typename T, int kTile>
__device__ __forceinline__ void load_row_sums(const AttentionBackwardArgs<arithmetic_t<T>>& args,
                                              int64_t head, int64_t first_row, arithmetic_t<T>* lse,
                                              arithmetic_t<T>* delta, arithmetic_t<T>* deltas) {
  using A = arithmetic_t<T>;
  const AttentionShape& shape = args.shape;
  const int64_t row = first_row + threadIdx.x;
  if (threadIdx.x >= kTile) return;
  A sum = A(0);
  const int64_t at = head * shape.length + row;
  if (row < shape.length) {
    const T* const out = static_cast<const T*>(args.out.data) + args.out.head_offset(shape, head) +
                         row * args.out.row_stride;
    const T* const grad = static_cast<const T*>(args.grad_out.data) +
                          args.grad_out.head_offset(shape, head) + row * args.grad_out.row_stride;
    for (int64_t k = 0; k < shape.dim; ++k) {
      sum = multiply_add(to_arithmetic(grad[k * args.grad_out.dim_stride]),
                         to_arithmetic(out[k * args.out.dim_stride]), sum);
    }
    deltas[at] = sum;
  }
  delta[threadIdx.x] = sum;
  lse[threadIdx.x] = row < shape.length ? args.lse[at] : A(0);
}

}  // namespace coopflow
