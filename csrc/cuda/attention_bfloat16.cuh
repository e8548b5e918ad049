// attention and its derivative in bfloat16, with the products on tensor cores. Scores, their
// softmax and all sums are in float32; weights, and the gradients of scores, are rounded before
// they become factors. A block has 64 vectors of one kind, a warp 16 of them, and walks along those
// of the other in tiles of 64: forward and the gradient of q along the keys, the gradients of k and
// v along the rows. What a warp's product returns is laid out as the factor of the next one, so
// that weights never leave their registers.
#pragma once

#include "attention.cuh"
#include "dynamic_shared.cuh"
#include "items.cuh"
#include "warp_matrix.cuh"

namespace coopflow {

// `kDim` is the least of 32 and 64 that holds the vectors.
template <int kDim>
class AttentionWarp {
 public:
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kTile = kWarps * kFragmentRows;
  // Between the vectors of a tile.
  static constexpr int kStride = kDim + 8;
  static_assert(kStride % 16 == 8, "an odd multiple of 8, see warp_matrix.cuh");
  static constexpr int kHalves = kTile * kStride;  // of a tile
  // Two tiles, and two numbers for each row.
  static constexpr int64_t kBytes = int64_t{2 * kHalves} * 2 + int64_t{2 * kTile} * 4;

  using Vectors = MatrixA[kDim / kFragmentLength];  // the warp's
  using Sums = MatrixSums[kDim / kFragmentColumns];

  __device__ __forceinline__ explicit AttentionWarp(const AttentionShape& shape)
      : shape_(shape),
        lane_(static_cast<int>(threadIdx.x) % kWarp),
        first_(static_cast<int>(threadIdx.x) / kWarp * kFragmentRows),
        place_(fragment_place(lane_)) {}

  __device__ __forceinline__ bfloat16* tile(int which) const {
    return reinterpret_cast<bfloat16*>(dynamic_shared_floats()) + which * kHalves;
  }

  __device__ __forceinline__ float* row_numbers(int which) const {
    return reinterpret_cast<float*>(tile(2)) + which * kTile;
  }

  // Of the block's vectors, the warp's first; and of the warp's, this lane's first: it has that one
  // and the eighth behind it.
  __device__ __forceinline__ int first() const { return first_; }
  __device__ __forceinline__ int own(int half) const { return first_ + place_.row + 8 * half; }

  // Of eight of the others, the first of the two whose scores this lane has.
  __device__ __forceinline__ int column() const { return place_.column; }

  // Vectors [first, first + kTile) of a head, zeros where there are none. A barrier must follow.
  __device__ __forceinline__ void load(const AttentionInput& from, int64_t head, int64_t first,
                                       bfloat16* to) const {
    const bfloat16* const vectors = static_cast<const bfloat16*>(from.data) +
                                    from.head_offset(shape_, head) + first * from.row_stride;
    const int64_t count = shape_.length - first;
    if (lies_in_words(from)) {
      constexpr int kWords = kDim / 8;  // of a vector
      constexpr int kOfThread = kTile * kWords / kThreads;
      static_assert(kOfThread * kThreads == kTile * kWords && kThreads % kWords == 0);
      const int first_row = static_cast<int>(threadIdx.x) / kWords;
      const int k = static_cast<int>(threadIdx.x) % kWords * 8;
      constexpr int kAtOnce = 2;  // on their way before the first is waited for
      COOPFLOW_NO_UNROLL
      for (int n = 0; n < kOfThread; n += kAtOnce) {
        Word16 words[kAtOnce] = {};
        COOPFLOW_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int row = first_row + (n + i) * (kThreads / kWords);
          if (row < count && k < shape_.dim) {
            words[i] = *reinterpret_cast<const Word16*>(vectors + row * from.row_stride + k);
          }
        }
        COOPFLOW_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int row = first_row + (n + i) * (kThreads / kWords);
          *reinterpret_cast<Word16*>(to + row * kStride + k) = words[i];
        }
      }
    } else {
      for (int i = static_cast<int>(threadIdx.x); i < kTile * kDim; i += kThreads) {
        const int row = i / kDim, k = i % kDim;
        to[row * kStride + k] = row < count && k < shape_.dim
                                    ? vectors[row * from.row_stride + k * from.dim_stride]
                                    : from_arithmetic<bfloat16>(0.0f);
      }
    }
  }

  // The warp's vectors of a tile.
  __device__ __forceinline__ void take(const bfloat16* tile, Vectors& vectors) const {
    COOPFLOW_UNROLL
    for (int s = 0; s < kDim / kFragmentLength; ++s) {
      vectors[s] = load_a<false>(tile + first_ * kStride + s * kFragmentLength, kStride, lane_);
    }
  }

  // Products of the warp's vectors with eight of a tile, from number `first` on, and eight more.
  __device__ __forceinline__ void multiply(const Vectors& own, const bfloat16* tile, int first,
                                           MatrixSums& left, MatrixSums& right) const {
    fill(left, 0.0f);
    fill(right, 0.0f);
    COOPFLOW_UNROLL
    for (int s = 0; s < kDim / kFragmentLength; ++s) {
      MatrixB others[2];
      load_b_pair<false>(tile + first * kStride + s * kFragmentLength, kStride, lane_, others);
      multiply_accumulate(own[s], others[0], left);
      multiply_accumulate(own[s], others[1], right);
    }
  }

  // Adds to the sums of the warp's vectors 16 of a tile, from number `first` on, times weights.
  __device__ __forceinline__ void accumulate(const MatrixA& weights, const bfloat16* tile,
                                             int first, Sums& sums) const {
    COOPFLOW_UNROLL
    for (int s = 0; s < kDim / kFragmentLength; ++s) {
      MatrixB others[2];
      load_b_pair<true>(tile + first * kStride + s * kFragmentLength, kStride, lane_, others);
      multiply_accumulate(weights, others[0], sums[2 * s]);
      multiply_accumulate(weights, others[1], sums[2 * s + 1]);
    }
  }

  // Where rows of weights are the warp's vectors: bit i says whether score i of this lane is kept,
  // of rows from `row` and eight keys from `key` on. The lanes draw four neighbours each.
  __device__ __forceinline__ uint32_t kept_by_row(const HeadMask<float>& mask, int64_t row,
                                                  int64_t key) const {
    uint32_t votes[4];
    mask.vote(row + lane_ % 16, key + 4 * (lane_ / 16), votes);
    const bool is_right = place_.column % 4 != 0;  // of four
    const int at = 16 * (place_.column / 4) + place_.row;
    const uint32_t first = (is_right ? votes[2] : votes[0]) >> at;
    const uint32_t second = (is_right ? votes[3] : votes[1]) >> at;
    return (first & 1) | (second & 1) << 1 | (first >> 8 & 1) << 2 | (second >> 8 & 1) << 3;
  }

  // The same where the warp's vectors are keys, from `key` on, of eight rows.
  __device__ __forceinline__ uint32_t kept_by_key(const HeadMask<float>& mask, int64_t row,
                                                  int64_t key) const {
    uint32_t votes[4];
    mask.vote(row + lane_ % 8, key + 4 * (lane_ / 8), votes);
    const bool odd = place_.row % 2 != 0, high = place_.row / 2 % 2 != 0;
    const uint32_t of_four = high ? (odd ? votes[3] : votes[2]) : (odd ? votes[1] : votes[0]);
    const uint32_t own = of_four >> (8 * (place_.row / 4) + place_.column);
    return (own & 3) | (own >> 16 & 3) << 2;
  }

  // Over the lanes that have scores of the same vector.
  template <typename F>
  __device__ __forceinline__ static float reduce(float value, const F& combine) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, 1));
    return combine(value, __shfl_xor_sync(kAllLanes, value, 2));
  }

  // The sums of the block's vectors, which are a head's from `first` on, times a factor for each of
  // the lane's two.
  __device__ __forceinline__ void store(const Sums& sums, const float (&factors)[2], int64_t head,
                                        int64_t first, const AttentionOutput& to) const {
    bfloat16* const vectors =
        static_cast<bfloat16*>(to.data) + to.head_offset(shape_, head) + first * to.row_stride;
    COOPFLOW_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (first + own(half) >= shape_.length) continue;
      COOPFLOW_UNROLL
      for (int n = 0; n < kDim / kFragmentColumns; ++n) {
        const int k = n * kFragmentColumns + place_.column;
        bfloat16 pair[2];
        from_arithmetic_pair<bfloat16>(factors[half] * sums[n][2 * half],
                                       factors[half] * sums[n][2 * half + 1], pair);
        bfloat16* const at = vectors + own(half) * to.row_stride + k * to.dim_stride;
        if (k < shape_.dim) at[0] = pair[0];
        if (k + 1 < shape_.dim) at[to.dim_stride] = pair[1];
      }
    }
  }

 private:
  // Whether every vector can be read in words of 16 bytes.
  __device__ __forceinline__ bool lies_in_words(const AttentionInput& t) const {
    const auto address = reinterpret_cast<uintptr_t>(t.data);
    const int64_t strides = t.batch_stride | t.head_stride | t.row_stride | shape_.dim;
    return t.dim_stride == 1 && address % 16 == 0 && strides % 8 == 0;
  }

  const AttentionShape& shape_;
  const int lane_, first_;
  const FragmentPlace place_;
};

// --- forward -------------------------------------------------------------------------------------

// The softmax of a lane's two rows on its way through the keys. The peak is that of the whole row,
// the sum that of the lane's own columns.
struct RowSoftmax {
  float peak[2], sum[2];
};

// Products of a tile become terms of the softmax, and sums of vectors shrink with the largest
// score's growth. `count` columns of the tile exist.
template <int kDim>
__device__ __forceinline__ void take_scores(const AttentionWarp<kDim>& warp, int64_t count,
                                            float scale, RowSoftmax& softmax,
                                            MatrixSums (&scores)[AttentionWarp<kDim>::kTile / 8],
                                            typename AttentionWarp<kDim>::Sums& sums) {
  using Warp = AttentionWarp<kDim>;
  COOPFLOW_UNROLL
  for (int half = 0; half < 2; ++half) {
    float largest = softmax.peak[half];
    COOPFLOW_UNROLL
    for (int j = 0; j < Warp::kTile / 8; ++j) {
      COOPFLOW_UNROLL
      for (int e = 0; e < 2; ++e) {
        float& score = scores[j][2 * half + e];
        score *= scale;
        if (8 * j + warp.column() + e < count) largest = larger_score(largest, score);
      }
    }
    largest = Warp::reduce(largest, [](float a, float b) { return larger_score(a, b); });
    const float shrink = softmax_term(softmax.peak[half], largest);
    softmax.peak[half] = largest;
    softmax.sum[half] *= shrink;
    COOPFLOW_UNROLL
    for (int j = 0; j < Warp::kTile / 8; ++j) {
      COOPFLOW_UNROLL
      for (int e = 0; e < 2; ++e) {
        float& score = scores[j][2 * half + e];
        const bool exists = 8 * j + warp.column() + e < count;
        score = softmax_term(exists ? score : -INFINITY, largest);  // without a branch
        softmax.sum[half] += score;
      }
    }
    COOPFLOW_UNROLL
    for (int n = 0; n < kDim / kFragmentColumns; ++n) {
      sums[n][2 * half] *= shrink;
      sums[n][2 * half + 1] *= shrink;
    }
  }
}

template <int kDim>
__global__ void __launch_bounds__(AttentionWarp<kDim>::kThreads, kDim == 32 ? 4 : 3)
    attention_bfloat16_kernel(const __grid_constant__ AttentionArgs<float> args) {
  using Warp = AttentionWarp<kDim>;
  constexpr int kTile = Warp::kTile;
  const AttentionShape& shape = args.shape;
  const Warp warp(shape);
  bfloat16* const keys = warp.tile(0);
  bfloat16* const values = warp.tile(1);
  const int64_t tiles = divide_up(shape.length, kTile);
  for (int64_t unit = blockIdx.x; unit < shape.batch * shape.heads * tiles; unit += gridDim.x) {
    const int64_t head = unit / tiles, first_row = unit % tiles * kTile;
    const HeadMask<float> mask(args.dropout, shape, head);
    RowSoftmax softmax{{-INFINITY, -INFINITY}, {}};
    typename Warp::Sums sums = {};
    typename Warp::Vectors queries;
    __syncthreads();  // the last unit's keys have been read
    warp.load(args.q, head, first_row, keys);
    __syncthreads();
    warp.take(keys, queries);
    for (int64_t first_key = 0; first_key < shape.length; first_key += kTile) {
      __syncthreads();  // the last tile's keys and values, or the queries, have been read
      warp.load(args.k, head, first_key, keys);
      warp.load(args.v, head, first_key, values);
      __syncthreads();
      MatrixSums scores[kTile / 8];
      COOPFLOW_UNROLL
      for (int j = 0; j < kTile / 8; j += 2) {
        warp.multiply(queries, keys, 8 * j, scores[j], scores[j + 1]);
      }
      take_scores<kDim>(warp, shape.length - first_key, args.scale, softmax, scores, sums);
      COOPFLOW_UNROLL
      for (int j = 0; j < kTile / 8; ++j) {
        const uint32_t kept = warp.kept_by_row(mask, first_row + warp.first(), first_key + 8 * j);
        COOPFLOW_UNROLL
        for (int i = 0; i < 4; ++i) scores[j][i] = kept >> i & 1 ? scores[j][i] : 0.0f;
      }
      COOPFLOW_UNROLL
      for (int j = 0; j < kTile / 8; j += 2) {
        warp.accumulate(round_to_a(scores[j], scores[j + 1]), values, 8 * j, sums);
      }
    }
    float factors[2];
    COOPFLOW_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = Warp::reduce(softmax.sum[half], [](float a, float b) { return a + b; });
      factors[half] = args.dropout.factor / sum;
      const int64_t row = first_row + warp.own(half);
      if (warp.column() == 0 && row < shape.length) {
        args.lse[head * shape.length + row] = log_sum_exp(softmax.peak[half], sum);
      }
    }
    warp.store(sums, factors, head, first_row, args.out);
  }
}

// --- backward ------------------------------------------------------------------------------------

// Writes deltas, (batch, heads, length), too.
template <int kDim>
__global__ void __launch_bounds__(AttentionWarp<kDim>::kThreads, kDim == 32 ? 4 : 3)
    attention_query_gradient_bfloat16_kernel(
        const __grid_constant__ AttentionBackwardArgs<float> args, float* deltas) {
  using Warp = AttentionWarp<kDim>;
  constexpr int kTile = Warp::kTile;
  const AttentionShape& shape = args.shape;
  const Warp warp(shape);
  bfloat16* const keys = warp.tile(0);
  bfloat16* const values = warp.tile(1);
  const int64_t tiles = divide_up(shape.length, kTile);
  for (int64_t unit = blockIdx.x; unit < shape.batch * shape.heads * tiles; unit += gridDim.x) {
    const int64_t head = unit / tiles, first_row = unit % tiles * kTile;
    const HeadMask<float> mask(args.dropout, shape, head);
    typename Warp::Sums sums = {};
    typename Warp::Vectors queries, grad_out;
    __syncthreads();  // the last unit's keys and values have been read
    warp.load(args.q, head, first_row, keys);
    warp.load(args.grad_out, head, first_row, values);
    load_row_sums<bfloat16, kTile>(args, head, first_row, warp.row_numbers(0), warp.row_numbers(1),
                                   deltas);
    __syncthreads();
    warp.take(keys, queries);
    warp.take(values, grad_out);
    float lse[2], delta[2];
    COOPFLOW_UNROLL
    for (int half = 0; half < 2; ++half) {
      lse[half] = warp.row_numbers(0)[warp.own(half)];
      delta[half] = warp.row_numbers(1)[warp.own(half)];
    }
    for (int64_t first_key = 0; first_key < shape.length; first_key += kTile) {
      __syncthreads();  // the last tile's keys and values, or the rows, have been read
      warp.load(args.k, head, first_key, keys);
      warp.load(args.v, head, first_key, values);
      __syncthreads();
      COOPFLOW_NO_UNROLL
      for (int first = 0; first < kTile; first += 16) {
        MatrixSums scores[2], grads[2];
        warp.multiply(queries, keys, first, scores[0], scores[1]);
        warp.multiply(grad_out, values, first, grads[0], grads[1]);
        COOPFLOW_UNROLL
        for (int j = 0; j < 2; ++j) {
          const int64_t key = first_key + first + 8 * j;
          const uint32_t kept = warp.kept_by_row(mask, first_row + warp.first(), key);
          COOPFLOW_UNROLL
          for (int i = 0; i < 4; ++i) {
            const bool exists = key + warp.column() + i % 2 < shape.length;
            const float found =
                weight_gradients(args.scale * scores[j][i], lse[i / 2], (kept >> i & 1) != 0,
                                 args.dropout.factor, grads[j][i], delta[i / 2])
                    .grad_score;
            grads[j][i] = exists ? found : 0.0f;
          }
        }
        warp.accumulate(round_to_a(grads[0], grads[1]), keys, first, sums);
      }
    }
    const float factors[2] = {args.scale, args.scale};
    warp.store(sums, factors, head, first_row, args.grad_q);
  }
}

// The warp's vectors are keys: its scores are transposed.
template <int kDim>
__global__ void __launch_bounds__(AttentionWarp<kDim>::kThreads, kDim == 32 ? 4 : 3)
    attention_key_gradient_bfloat16_kernel(
        const __grid_constant__ AttentionBackwardArgs<float> args, const float* deltas) {
  using Warp = AttentionWarp<kDim>;
  constexpr int kTile = Warp::kTile;
  const AttentionShape& shape = args.shape;
  const Warp warp(shape);
  bfloat16* const queries = warp.tile(0);
  bfloat16* const grad_out = warp.tile(1);
  float* const lse = warp.row_numbers(0);
  float* const delta = warp.row_numbers(1);
  const int64_t tiles = divide_up(shape.length, kTile);
  for (int64_t unit = blockIdx.x; unit < shape.batch * shape.heads * tiles; unit += gridDim.x) {
    // A row's number fits 32 bits: a mask has at most 2^34 weights.
    const int64_t head = unit / tiles;
    const int first_key = static_cast<int>(unit % tiles) * kTile;
    const HeadMask<float> mask(args.dropout, shape, head);
    typename Warp::Sums key_sums = {}, value_sums = {};
    typename Warp::Vectors keys, values;
    __syncthreads();  // the last unit's rows have been read
    warp.load(args.k, head, first_key, queries);
    warp.load(args.v, head, first_key, grad_out);
    __syncthreads();
    warp.take(queries, keys);
    warp.take(grad_out, values);
    for (int first_row = 0; first_row < static_cast<int>(shape.length); first_row += kTile) {
      __syncthreads();  // the last tile's rows, or the keys and values, have been read
      warp.load(args.q, head, first_row, queries);
      warp.load(args.grad_out, head, first_row, grad_out);
      if (threadIdx.x < kTile) {
        const int64_t row = first_row + threadIdx.x, at = head * shape.length + row;
        lse[threadIdx.x] = row < shape.length ? args.lse[at] : 0.0f;
        delta[threadIdx.x] = row < shape.length ? deltas[at] : 0.0f;
      }
      __syncthreads();
      COOPFLOW_NO_UNROLL
      for (int first = 0; first < kTile; first += 16) {
        MatrixSums scores[2], grads[2];
        warp.multiply(keys, queries, first, scores[0], scores[1]);
        warp.multiply(values, grad_out, first, grads[0], grads[1]);
        COOPFLOW_UNROLL
        for (int j = 0; j < 2; ++j) {
          const uint32_t kept =
              warp.kept_by_key(mask, first_row + first + 8 * j, first_key + warp.first());
          COOPFLOW_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int row = first + 8 * j + warp.column() + i % 2;
            const bool exists = first_row + row < shape.length;
            const WeightGradients<float> found =
                weight_gradients(args.scale * scores[j][i], lse[row], (kept >> i & 1) != 0,
                                 args.dropout.factor, grads[j][i], delta[row]);
            scores[j][i] = exists ? found.dropped : 0.0f;
            grads[j][i] = exists ? found.grad_score : 0.0f;
          }
        }
        warp.accumulate(round_to_a(scores[0], scores[1]), grad_out, first, value_sums);
        warp.accumulate(round_to_a(grads[0], grads[1]), queries, first, key_sums);
      }
    }
    const float of_keys[2] = {args.scale, args.scale}, of_values[2] = {1.0f, 1.0f};
    warp.store(key_sums, of_keys, head, first_key, args.grad_k);
    warp.store(value_sums, of_values, head, first_key, args.grad_v);
  }
}

}  // namespace coopflow
