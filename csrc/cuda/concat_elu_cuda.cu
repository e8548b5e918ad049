// concat_elu and its derivative on CUDA. A thread has some neighbours of a row: positions of a
// channel, or channels of a position.
#include <type_traits>

#include "items.cuh"
#include "launch.cuh"
#include "ops/concat_elu_op.h"

namespace coopflow {
namespace {

// Bit i: whether the plus and the minus half of an item's element i are kept.
struct KeptItem {
  uint32_t plus, minus;
};

// Draws the masks of items of kCount elements. Kernels draw first and load then: words of Philox
// and elements together would be more than the registers.
template <typename A, int kCount>
class ItemMask {
 public:
  __device__ __forceinline__ ItemMask(const ConcatEluShape& shape, const Dropout<A>& dropout)
      : shape_(shape),
        key_(make_philox_key(dropout.rng[0])),
        time_(static_cast<uint32_t>(dropout.rng[1] + dropout.step)),
        first_chain_(dropout.rng[2]),
        threshold_(dropout.threshold) {}

  // Of elements [first, first + n) of a row.
  __device__ __forceinline__ KeptItem of(int64_t row, int64_t first, int n) const {
    return shape_.channels_last ? of_channels(row / shape_.positions, first)
                                : of_positions(row, first, n);
  }

 private:
  __device__ __forceinline__ KeptItem of_channels(int64_t image, int64_t first) const {
    KeptItem kept{0, 0};
    COOPFLOW_UNROLL
    for (int i = 0; i < kCount; i += 4) {
      kept.plus |= (four(image, first + i) & 15u) << i;
      kept.minus |= (four(image, shape_.channels + first + i) & 15u) << i;
    }
    return kept;
  }

  // Most items lie within one channel.
  __device__ __forceinline__ KeptItem of_positions(int64_t image, int64_t first, int n) const {
    KeptItem kept{0, 0};
    int64_t channel = first / shape_.positions;
    int64_t left = (channel + 1) * shape_.positions - first;  // positions of this channel
    COOPFLOW_NO_UNROLL
    for (int i = 0; i < n; ++channel) {
      const int run = left < n - i ? static_cast<int>(left) : n - i;
      const uint32_t bits = ((1u << run) - 1u) << i;
      kept.plus |= one(image, channel) ? bits : 0u;
      kept.minus |= one(image, shape_.channels + channel) ? bits : 0u;
      i += run;
      left = shape_.positions;
    }
    return kept;
  }

  __device__ __forceinline__ uint32_t four(int64_t image, int64_t first) const {
    return kept_of<4>(key_, first_chain_ + image, time_, first, threshold_);
  }

  __device__ __forceinline__ bool one(int64_t image, int64_t channel) const {
    return (kept_of<1>(key_, first_chain_ + image, time_, channel, threshold_) & 1) != 0;
  }

  const ConcatEluShape& shape_;
  const PhiloxKey key_;
  const uint32_t time_;
  const int64_t first_chain_;
  const uint32_t threshold_;
};

// Without dropout nothing is drawn, and every factor is the constant 1.
template <typename A, int kCount>
struct NoMask {
  __device__ __forceinline__ NoMask(const ConcatEluShape& /*shape*/,
                                    const Dropout<A>& /*dropout*/) {}
  __device__ __forceinline__ KeptItem of(int64_t /*row*/, int64_t /*first*/, int /*n*/) const {
    return {~0u, ~0u};
  }
};

template <bool kDropout, typename A>
__device__ __forceinline__ A factor_of(uint32_t kept, int element, const Dropout<A>& dropout) {
  if constexpr (kDropout) {
    return kept >> element & 1u ? dropout.factor : A(0);
  } else {
    return A(1);
  }
}

template <bool kDropout, typename A, int kCount>
using Mask = std::conditional_t<kDropout, ItemMask<A, kCount>, NoMask<A, kCount>>;

template <typename T, int kVec, bool kDropout>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    concat_elu_kernel(const __grid_constant__ ConcatEluArgs<arithmetic_t<T>> args,
                      const __grid_constant__ ItemGrid grid) {
  using A = arithmetic_t<T>;
  constexpr int kCount = kItem<T>;
  const Mask<kDropout, A, kCount> mask(args.shape, args.dropout);
  for (ItemCursor<kCount> at(grid); at.valid(); at.next()) {
    const int n = at.size();
    const KeptItem kept = mask.of(at.chain(), at.item() * kCount, n);
    const int64_t plus_at = at.offset() + at.chain() * grid.per_chain;
    const int64_t minus_at = plus_at + grid.per_chain;
    A x[kCount], plus[kCount], minus[kCount];
    load_item<T, kVec>(args.x, at.offset(), n, x);
    COOPFLOW_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const EluPair<A> elu = elu_pair(x[i]);
      plus[i] = elu.plus * factor_of<kDropout>(kept.plus, i, args.dropout);
      minus[i] = elu.minus * factor_of<kDropout>(kept.minus, i, args.dropout);
    }
    store_item<T, kVec>(plus, plus_at, n, args.y);
    store_item<T, kVec>(minus, minus_at, n, args.y);
  }
}

template <typename T, int kVec, bool kDropout>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    concat_elu_backward_kernel(const __grid_constant__ ConcatEluBackwardArgs<arithmetic_t<T>> args,
                               const __grid_constant__ ItemGrid grid) {
  using A = arithmetic_t<T>;
  constexpr int kCount = kItem<T>;
  const Mask<kDropout, A, kCount> mask(args.shape, args.dropout);
  for (ItemCursor<kCount> at(grid); at.valid(); at.next()) {
    const int n = at.size();
    const KeptItem kept = mask.of(at.chain(), at.item() * kCount, n);
    const int64_t plus_at = at.offset() + at.chain() * grid.per_chain;
    const int64_t minus_at = plus_at + grid.per_chain;
    A y_plus[kCount], y_minus[kCount], grad_plus[kCount], grad_minus[kCount], grad_x[kCount];
    load_item<T, kVec>(args.y, plus_at, n, y_plus);
    load_item<T, kVec>(args.y, minus_at, n, y_minus);
    load_item<T, kVec>(args.grad_y, plus_at, n, grad_plus);
    load_item<T, kVec>(args.grad_y, minus_at, n, grad_minus);
    COOPFLOW_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const A plus = factor_of<kDropout>(kept.plus, i, args.dropout);
      const A minus = factor_of<kDropout>(kept.minus, i, args.dropout);
      grad_x[i] =
          grad_plus[i] * elu_slope(y_plus[i], plus) - grad_minus[i] * elu_slope(y_minus[i], minus);
    }
    store_item<T, kVec>(grad_x, at.offset(), n, args.grad_x);
  }
}

struct CudaConcatElu {
  template <typename T>
  static void run(const ConcatEluArgs<arithmetic_t<T>>& args, const Tensor& x) {
    const bool packed = can_pack<T>(args.shape.row_size(), {args.x, args.y});
    const bool dropout = args.dropout.rng != nullptr;
    const auto launch_kernel =
        packed ? (dropout ? launch_concat_elu<T, kItem<T>, true>
                          : launch_concat_elu<T, kItem<T>, false>)
               : (dropout ? launch_concat_elu<T, 1, true> : launch_concat_elu<T, 1, false>);
    launch_kernel(args, x);
  }

  template <typename T>
  static void run_backward(const ConcatEluBackwardArgs<arithmetic_t<T>>& args, const Tensor& y) {
    const bool packed = can_pack<T>(args.shape.row_size(), {args.grad_y, args.y, args.grad_x});
    const bool dropout = args.dropout.rng != nullptr;
    const auto launch_kernel = packed ? (dropout ? launch_concat_elu_backward<T, kItem<T>, true>
                                                 : launch_concat_elu_backward<T, kItem<T>, false>)
                                      : (dropout ? launch_concat_elu_backward<T, 1, true>
                                                 : launch_concat_elu_backward<T, 1, false>);
    launch_kernel(args, y);
  }

 private:
  template <typename T, int kVec, bool kDropout>
  static void launch_concat_elu(const ConcatEluArgs<arithmetic_t<T>>& args, const Tensor& x) {
    launch_over_items<concat_elu_kernel<T, kVec, kDropout>, kItem<T>>(x, args.shape.rows(),
                                                                      args.shape.row_size(), args);
  }

  template <typename T, int kVec, bool kDropout>
  static void launch_concat_elu_backward(const ConcatEluBackwardArgs<arithmetic_t<T>>& args,
                                         const Tensor& y) {
    launch_over_items<concat_elu_backward_kernel<T, kVec, kDropout>, kItem<T>>(
        y, args.shape.rows(), args.shape.row_size(), args);
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CUDA, m) {
  m.impl("concat_elu", TORCH_BOX(&coopflow::concat_elu<coopflow::CudaConcatElu>));
  m.impl("concat_elu_backward", TORCH_BOX(&coopflow::concat_elu_backward<coopflow::CudaConcatElu>));
}
