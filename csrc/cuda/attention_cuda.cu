// attention and its derivative on CUDA; for bfloat16 see attention_bfloat16.cuh. A block has a tile
// of scores, 64 x 64 (32 x 32 in float64), of which a thread has 4 x 4 (2 x 2); half as wide where
// vectors are long. Forward and the gradient of q walk along the keys, the gradients of k and v
// along the rows, so that every result belongs to one block and sums have a fixed order.
#include <type_traits>

#include "attention.cuh"
#include "attention_bfloat16.cuh"
#include "coopflow/attention.h"
#include "coopflow/packed.h"
#include "coopflow/reduction.h"
#include "dynamic_shared.cuh"
#include "launch.cuh"
#include "ops/attention_op.h"

namespace coopflow {
namespace {

// A block has so many threads in each direction.
constexpr int kSide = 16;
constexpr int kThreads = kSide * kSide;
static_assert(kThreads == kBlockThreads && kWarp % kSide == 0);

// What a block may have on any GPU from sm_80 on: sm_86, sm_89 and sm_120 have no more.
constexpr size_t kLeastShared = 99 * 1024;

// A tile of scores and the shared memory that it takes: vectors that the block has, by those along
// which it walks. `kDim` is the least of 32 and 64 that holds the vectors.
template <typename A, int kDim>
struct TileLayout {
  // Scores of a thread.
  static constexpr int kOwn = sizeof(A) == 4 ? 4 : 2;
  static constexpr int kWalked = kDim == 32 ? kOwn : kOwn / 2;
  static constexpr int kTile = kSide * kOwn;
  static constexpr int kPace = kSide * kWalked;
  static constexpr int kColumns = kDim / kSide;  // of a thread, in sums of vectors

  // Between numbers k and k + 1 of vectors that lie side by side; four more keep off bank
  // conflicts.
  static constexpr int kOwnStride = kTile + 4, kWalkedStride = kPace + 4;
  static constexpr int kOwnVectors = kDim * kOwnStride, kWalkedVectors = kDim * kWalkedStride;
  static constexpr int kInRows = kPace * kDim;  // walked vectors, one after the other
  static constexpr int kWeights = kPace * kOwnStride;

  static constexpr int kForward = kOwnVectors + kWalkedVectors + kInRows + kWeights;
  static constexpr int kGradient = 2 * (kOwnVectors + kWalkedVectors) + kWeights;
  static constexpr int kQueryGradient = kGradient + kInRows + 2 * kTile;
  static constexpr int kKeyGradient = kGradient + 2 * kInRows + 2 * kPace;
  static_assert(kForward <= kQueryGradient);
  static_assert(kQueryGradient * sizeof(A) <= kLeastShared);
  static_assert(kKeyGradient * sizeof(A) <= kLeastShared);

  static constexpr int64_t bytes(int count) {
    return int64_t{count} * static_cast<int64_t>(sizeof(A));
  }
};

// kCount neighbours in shared memory, in wide accesses.
template <typename A, int kCount>
__device__ __forceinline__ void store_shared(const A (&values)[kCount], A* to) {
  using Layout = PackedLayout<A, kCount>;
  typename Layout::Word words[Layout::kWords];
  memcpy(words, values, sizeof(words));
  COOPFLOW_UNROLL
  for (int w = 0; w < Layout::kWords; ++w) {
    reinterpret_cast<typename Layout::Word*>(to)[w] = words[w];
  }
}

// What the threads of one block do together. Scores (r, c) of a thread are those of its own vectors
// first_own() + r and the walked ones first_walked() + c of the tile.
template <typename T, int kDim>
class Block {
 public:
  using A = arithmetic_t<T>;
  using Layout = TileLayout<A, kDim>;
  static constexpr int kOwn = Layout::kOwn, kWalked = Layout::kWalked;
  static constexpr int kTile = Layout::kTile, kPace = Layout::kPace;
  using Scores = A[kOwn][kWalked];
  using Sums = A[kOwn][Layout::kColumns];

  __device__ __forceinline__ explicit Block(const AttentionShape& shape)
      : shape_(shape),
        free_(reinterpret_cast<A*>(dynamic_shared_floats())),
        row_(static_cast<int>(threadIdx.x) / kSide),
        column_(static_cast<int>(threadIdx.x) % kSide) {}

  __device__ __forceinline__ int first_own() const { return row_ * kOwn; }
  __device__ __forceinline__ int first_walked() const { return column_ * kWalked; }

  // The next so many numbers of shared memory.
  __device__ __forceinline__ A* take(int count) {
    A* const taken = free_;
    free_ += count;
    return taken;
  }

  // The block's own vectors [first, first + kTile) of a head, times a factor, zeros where there are
  // none, side by side. A barrier must follow.
  __device__ __forceinline__ void load_own(const AttentionInput& from, int64_t head, int64_t first,
                                           A factor, A* side_by_side) const {
    load<kTile, Layout::kOwnStride>(from, head, first, factor, side_by_side, nullptr);
  }

  // The walked vectors [first, first + kPace), where a place is given also one after the other.
  __device__ __forceinline__ void load_walked(const AttentionInput& from, int64_t head,
                                              int64_t first, A factor, A* side_by_side,
                                              A* in_rows) const {
    load<kPace, Layout::kWalkedStride>(from, head, first, factor, side_by_side, in_rows);
  }

  // scores = the products of the block's own vectors and of walked ones, which lie side by side.
  __device__ __forceinline__ void multiply(const A* own, const A* walked, Scores& scores) const {
    COOPFLOW_UNROLL
    for (int r = 0; r < kOwn; ++r) {
      COOPFLOW_UNROLL
      for (int c = 0; c < kWalked; ++c) scores[r][c] = A(0);
    }
    COOPFLOW_UNROLL_4
    for (int k = 0; k < static_cast<int>(shape_.dim); ++k) {
      A x[kOwn], y[kWalked];
      load_packed<A, kOwn>(own + k * Layout::kOwnStride + first_own(), x);
      load_packed<A, kWalked>(walked + k * Layout::kWalkedStride + first_walked(), y);
      COOPFLOW_UNROLL
      for (int r = 0; r < kOwn; ++r) {
        COOPFLOW_UNROLL
        for (int c = 0; c < kWalked; ++c) scores[r][c] = multiply_add(x[r], y[c], scores[r][c]);
      }
    }
  }

  // Puts the block's weights where accumulate reads them, transposed.
  __device__ __forceinline__ void share(const Scores& weights, A* to) const {
    COOPFLOW_UNROLL
    for (int c = 0; c < kWalked; ++c) {
      A column[kOwn];
      COOPFLOW_UNROLL
      for (int r = 0; r < kOwn; ++r) column[r] = weights[r][c];
      store_shared(column, to + (first_walked() + c) * Layout::kOwnStride + first_own());
    }
  }

  // Adds to the sums of the block's rows the walked vectors, one after the other, times shared
  // weights.
  __device__ __forceinline__ void accumulate(const A* weights, const A* in_rows, Sums& sums) const {
    COOPFLOW_UNROLL_4
    for (int j = 0; j < kPace; ++j) {
      A w[kOwn], x[Layout::kColumns];
      load_packed<A, kOwn>(weights + j * Layout::kOwnStride + first_own(), w);
      load_packed<A, Layout::kColumns>(in_rows + j * kDim + column_ * Layout::kColumns, x);
      COOPFLOW_UNROLL
      for (int r = 0; r < kOwn; ++r) {
        COOPFLOW_UNROLL
        for (int c = 0; c < Layout::kColumns; ++c)
          sums[r][c] = multiply_add(w[r], x[c], sums[r][c]);
      }
    }
  }

  // The sums of rows [first, first + kTile) of a head, times a factor for each of the thread's
  // rows.
  __device__ __forceinline__ void store(const Sums& sums, const A (&factors)[kOwn], int64_t head,
                                        int64_t first, const AttentionOutput& to) const {
    T* const vectors = static_cast<T*>(to.data) + to.head_offset(shape_, head);
    COOPFLOW_UNROLL
    for (int r = 0; r < kOwn; ++r) {
      const int64_t row = first + first_own() + r;
      COOPFLOW_UNROLL
      for (int c = 0; c < Layout::kColumns; ++c) {
        const int k = column_ * Layout::kColumns + c;
        if (row < shape_.length && k < shape_.dim) {
          vectors[row * to.row_stride + k * to.dim_stride] =
              from_arithmetic<T>(factors[r] * sums[r][c]);
        }
      }
    }
  }

  // Over the threads that have the same rows; all of a warp must call.
  template <typename F>
  __device__ __forceinline__ A reduce_row(A value, const F& combine) const {
    COOPFLOW_UNROLL
    for (int threads = kSide / 2; threads > 0; threads /= 2) {
      value = combine(value, __shfl_xor_sync(0xFFFFFFFFu, value, threads));
    }
    return value;
  }

 private:
  template <int kRows, int kStride>
  __device__ __forceinline__ void load(const AttentionInput& from, int64_t head, int64_t first,
                                       A factor, A* side_by_side, A* in_rows) const {
    constexpr int kOfThread = kRows * kDim / kThreads;
    static_assert(kOfThread * kThreads == kRows * kDim && kThreads % kDim == 0);
    const T* const vectors = static_cast<const T*>(from.data) + from.head_offset(shape_, head);
    const int first_row = static_cast<int>(threadIdx.x) / kDim;
    const int k = static_cast<int>(threadIdx.x) % kDim;
    A values[kOfThread] = {};  // all on their way before the first is waited for
    if (k < shape_.dim) {
      COOPFLOW_UNROLL
      for (int n = 0; n < kOfThread; ++n) {
        const int64_t row = first + first_row + n * (kThreads / kDim);
        // Those that do not exist read the last one: a branch would wait.
        const int64_t read = row < shape_.length ? row : shape_.length - 1;
        const A value =
            factor * to_arithmetic(vectors[read * from.row_stride + k * from.dim_stride]);
        values[n] = row < shape_.length ? value : A(0);
      }
    }
    COOPFLOW_UNROLL
    for (int n = 0; n < kOfThread; ++n) {
      const int row = first_row + n * (kThreads / kDim);
      if (side_by_side != nullptr) side_by_side[k * kStride + row] = values[n];
      if (in_rows != nullptr) in_rows[row * kDim + k] = values[n];
    }
  }

  const AttentionShape& shape_;
  A* free_;
  const int row_, column_;
};

// --- forward
// --------------------------------------------------------------------------------------

// The softmax of a thread's rows on its way through the keys. The peak is that of the whole row,
// the sum that of the thread's own columns.
template <typename A, int kOwn>
struct RunningSoftmax {
  A peak[kOwn], sum[kOwn];
};

// Scores become terms of the softmax, and sums of vectors shrink with the largest score's growth.
// `count` columns of the tile exist.
template <typename T, int kDim>
__device__ __forceinline__ void take_scores(
    const Block<T, kDim>& block, int64_t count,
    RunningSoftmax<arithmetic_t<T>, Block<T, kDim>::kOwn>& softmax,
    typename Block<T, kDim>::Scores& scores, typename Block<T, kDim>::Sums& sums) {
  using A = arithmetic_t<T>;
  constexpr int kOwn = Block<T, kDim>::kOwn, kWalked = Block<T, kDim>::kWalked;
  COOPFLOW_UNROLL
  for (int r = 0; r < kOwn; ++r) {
    A largest = softmax.peak[r];
    COOPFLOW_UNROLL
    for (int c = 0; c < kWalked; ++c) {
      if (block.first_walked() + c < count) largest = larger_score(largest, scores[r][c]);
    }
    largest = block.reduce_row(largest, [](A a, A b) { return larger_score(a, b); });
    const A shrink = softmax_term(softmax.peak[r], largest);
    softmax.peak[r] = largest;
    softmax.sum[r] *= shrink;
    COOPFLOW_UNROLL
    for (int c = 0; c < kWalked; ++c) {
      const bool exists = block.first_walked() + c < count;
      // Without a branch.
      scores[r][c] = softmax_term(exists ? scores[r][c] : static_cast<A>(-INFINITY), largest);
      softmax.sum[r] += scores[r][c];
    }
    COOPFLOW_UNROLL
    for (int c = 0; c < TileLayout<A, kDim>::kColumns; ++c) sums[r][c] *= shrink;
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 2)
    attention_kernel(const __grid_constant__ AttentionArgs<arithmetic_t<T>> args) {
  using A = arithmetic_t<T>;
  using Layout = TileLayout<A, kDim>;
  constexpr int kTile = Layout::kTile, kPace = Layout::kPace;
  constexpr int kOwn = Layout::kOwn, kWalked = Layout::kWalked;
  const AttentionShape& shape = args.shape;
  Block<T, kDim> block(shape);
  A* const queries = block.take(Layout::kOwnVectors);
  A* const keys = block.take(Layout::kWalkedVectors);
  A* const values = block.take(Layout::kInRows);
  A* const weights = block.take(Layout::kWeights);
  const int64_t tiles = divide_up(shape.length, kTile);
  for (int64_t unit = blockIdx.x; unit < shape.batch * shape.heads * tiles; unit += gridDim.x) {
    const int64_t head = unit / tiles, first_row = unit % tiles * kTile;
    const HeadMask<A> mask(args.dropout, shape, head);
    RunningSoftmax<A, kOwn> softmax;
    fill(softmax.peak, static_cast<A>(-INFINITY));
    fill(softmax.sum, A(0));
    typename Block<T, kDim>::Sums sums = {};
    __syncthreads();  // the last unit's queries have been read
    block.load_own(args.q, head, first_row, args.scale, queries);
    for (int64_t first_key = 0; first_key < shape.length; first_key += kPace) {
      __syncthreads();  // the last tile's keys, values and weights have been read
      block.load_walked(args.k, head, first_key, A(1), keys, nullptr);
      block.load_walked(args.v, head, first_key, A(1), nullptr, values);
      __syncthreads();
      typename Block<T, kDim>::Scores scores;
      block.multiply(queries, keys, scores);
      take_scores<T, kDim>(block, shape.length - first_key, softmax, scores, sums);
      COOPFLOW_UNROLL
      for (int r = 0; r < kOwn; ++r) {
        const uint32_t kept = mask.template kept<kWalked>(first_row + block.first_own() + r,
                                                          first_key + block.first_walked());
        COOPFLOW_UNROLL
        for (int c = 0; c < kWalked; ++c) scores[r][c] = kept >> c & 1 ? scores[r][c] : A(0);
      }
      block.share(scores, weights);
      __syncthreads();
      block.accumulate(weights, values, sums);
    }
    A factors[kOwn];
    COOPFLOW_UNROLL
    for (int r = 0; r < kOwn; ++r) {
      const A sum = block.reduce_row(softmax.sum[r], [](A a, A b) { return a + b; });
      factors[r] = args.dropout.factor / sum;
      const int64_t row = first_row + block.first_own() + r;
      if (block.first_walked() == 0 && row < shape.length) {
        args.lse[head * shape.length + row] = log_sum_exp(softmax.peak[r], sum);
      }
    }
    block.store(sums, factors, head, first_row, args.out);
  }
}

// --- backward
// -------------------------------------------------------------------------------------

// Writes deltas, (batch, heads, length), too.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 2) attention_query_gradient_kernel(
    const __grid_constant__ AttentionBackwardArgs<arithmetic_t<T>> args, arithmetic_t<T>* deltas) {
  using A = arithmetic_t<T>;
  using Layout = TileLayout<A, kDim>;
  constexpr int kTile = Layout::kTile, kPace = Layout::kPace;
  constexpr int kOwn = Layout::kOwn, kWalked = Layout::kWalked;
  const AttentionShape& shape = args.shape;
  Block<T, kDim> block(shape);
  A* const queries = block.take(Layout::kOwnVectors);
  A* const grad_out = block.take(Layout::kOwnVectors);
  A* const keys = block.take(Layout::kWalkedVectors);
  A* const values = block.take(Layout::kWalkedVectors);
  A* const key_rows = block.take(Layout::kInRows);
  A* const weights = block.take(Layout::kWeights);
  A* const lse = block.take(kTile);
  A* const delta = block.take(kTile);
  const int64_t tiles = divide_up(shape.length, kTile);
  for (int64_t unit = blockIdx.x; unit < shape.batch * shape.heads * tiles; unit += gridDim.x) {
    const int64_t head = unit / tiles, first_row = unit % tiles * kTile;
    const HeadMask<A> mask(args.dropout, shape, head);
    typename Block<T, kDim>::Sums sums = {};
    __syncthreads();  // the last unit's rows have been read
    block.load_own(args.q, head, first_row, args.scale, queries);
    block.load_own(args.grad_out, head, first_row, A(1), grad_out);
    load_row_sums<T, kTile>(args, head, first_row, lse, delta, deltas);
    for (int64_t first_key = 0; first_key < shape.length; first_key += kPace) {
      __syncthreads();  // the last tile's keys, values and weights have been read
      block.load_walked(args.k, head, first_key, A(1), keys, key_rows);
      block.load_walked(args.v, head, first_key, A(1), values, nullptr);
      __syncthreads();
      typename Block<T, kDim>::Scores scores, grads;
      block.multiply(queries, keys, scores);
      block.multiply(grad_out, values, grads);
      COOPFLOW_UNROLL
      for (int r = 0; r < kOwn; ++r) {
        const int row = block.first_own() + r;
        const uint32_t kept =
            mask.template kept<kWalked>(first_row + row, first_key + block.first_walked());
        COOPFLOW_UNROLL
        for (int c = 0; c < kWalked; ++c) {
          const bool exists = first_key + block.first_walked() + c < shape.length;
          const A found = weight_gradients(scores[r][c], lse[row], (kept >> c & 1) != 0,
                                           args.dropout.factor, grads[r][c], delta[row])
                              .grad_score;
          grads[r][c] = exists ? found : A(0);
        }
      }
      block.share(grads, weights);
      __syncthreads();
      block.accumulate(weights, key_rows, sums);
    }
    A factors[kOwn];
    fill(factors, args.scale);
    block.store(sums, factors, head, first_row, args.grad_q);
  }
}

// A block has a tile of keys and walks along the rows: its scores are transposed.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 2) attention_key_gradient_kernel(
    const __grid_constant__ AttentionBackwardArgs<arithmetic_t<T>> args,
    const arithmetic_t<T>* deltas) {
  using A = arithmetic_t<T>;
  using Layout = TileLayout<A, kDim>;
  constexpr int kTile = Layout::kTile, kPace = Layout::kPace;
  constexpr int kOwn = Layout::kOwn, kWalked = Layout::kWalked;
  const AttentionShape& shape = args.shape;
  Block<T, kDim> block(shape);
  A* const keys = block.take(Layout::kOwnVectors);
  A* const values = block.take(Layout::kOwnVectors);
  A* const queries = block.take(Layout::kWalkedVectors);
  A* const grad_out = block.take(Layout::kWalkedVectors);
  A* const query_rows = block.take(Layout::kInRows);
  A* const grad_out_rows = block.take(Layout::kInRows);
  A* const weights = block.take(Layout::kWeights);
  A* const lse = block.take(kPace);
  A* const delta = block.take(kPace);
  const int64_t tiles = divide_up(shape.length, kTile);
  for (int64_t unit = blockIdx.x; unit < shape.batch * shape.heads * tiles; unit += gridDim.x) {
    const int64_t head = unit / tiles, first_key = unit % tiles * kTile;
    const HeadMask<A> mask(args.dropout, shape, head);
    typename Block<T, kDim>::Sums key_sums = {}, value_sums = {};
    __syncthreads();  // the last unit's keys and values have been read
    block.load_own(args.k, head, first_key, A(1), keys);
    block.load_own(args.v, head, first_key, A(1), values);
    for (int64_t first_row = 0; first_row < shape.length; first_row += kPace) {
      __syncthreads();  // the last tile's rows and weights have been read
      block.load_walked(args.q, head, first_row, args.scale, queries, query_rows);
      block.load_walked(args.grad_out, head, first_row, A(1), grad_out, grad_out_rows);
      if (threadIdx.x < kPace) {
        const int64_t row = first_row + threadIdx.x, at = head * shape.length + row;
        lse[threadIdx.x] = row < shape.length ? args.lse[at] : A(0);
        delta[threadIdx.x] = row < shape.length ? deltas[at] : A(0);
      }
      __syncthreads();
      typename Block<T, kDim>::Scores scores, grads;
      block.multiply(keys, queries, scores);
      block.multiply(values, grad_out, grads);
      COOPFLOW_UNROLL
      for (int c = 0; c < kWalked; ++c) {
        const int row = block.first_walked() + c;
        const bool exists = first_row + row < shape.length;
        const uint32_t kept =
            mask.template kept<kOwn>(first_row + row, first_key + block.first_own());
        COOPFLOW_UNROLL
        for (int r = 0; r < kOwn; ++r) {
          const WeightGradients<A> found =
              weight_gradients(scores[r][c], lse[row], (kept >> r & 1) != 0, args.dropout.factor,
                               grads[r][c], delta[row]);
          scores[r][c] = exists ? found.dropped : A(0);
          grads[r][c] = exists ? found.grad_score : A(0);
        }
      }
      block.share(scores, weights);
      __syncthreads();
      block.accumulate(weights, grad_out_rows, value_sums);
      __syncthreads();  // the weights have been read
      block.share(grads, weights);
      __syncthreads();
      block.accumulate(weights, query_rows, key_sums);
    }
    A factors[kOwn];
    fill(factors, A(1));
    block.store(key_sums, factors, head, first_key, args.grad_k);
    block.store(value_sums, factors, head, first_key, args.grad_v);
  }
}

// --- launches
// -------------------------------------------------------------------------------------

// Calls f(std::integral_constant<int, kDim>()).
template <typename F>
void dispatch_dim(int64_t dim, const F& f) {
  if (dim <= 32) return f(std::integral_constant<int, 32>());
  f(std::integral_constant<int, 64>());
}

struct CudaAttention {
  template <typename T>
  static void run(const AttentionArgs<arithmetic_t<T>>& args, const Tensor& q) {
    dispatch_dim(args.shape.dim, [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      if constexpr (std::is_same_v<T, bfloat16>) {
        using Warp = AttentionWarp<kDim>;
        launch_with_memory<attention_bfloat16_kernel<kDim>>(q, units(args.shape, Warp::kTile),
                                                            Warp::kThreads, Warp::kBytes, args);
      } else {
        using Layout = TileLayout<arithmetic_t<T>, kDim>;
        launch_with_memory<attention_kernel<T, kDim>>(q, units(args.shape, Layout::kTile), kThreads,
                                                      Layout::bytes(Layout::kForward), args);
      }
    });
  }

  template <typename T>
  static void run_backward(const AttentionBackwardArgs<arithmetic_t<T>>& args, const Tensor& lse) {
    using A = arithmetic_t<T>;
    Tensor deltas = torch::stable::empty_like(lse);
    A* const at = static_cast<A*>(deltas.mutable_data_ptr());
    dispatch_dim(args.shape.dim, [&](auto dim) {
      constexpr int kDim = decltype(dim)::value;
      if constexpr (std::is_same_v<T, bfloat16>) {
        using Warp = AttentionWarp<kDim>;
        const int64_t blocks = units(args.shape, Warp::kTile);
        launch_with_memory<attention_query_gradient_bfloat16_kernel<kDim>>(
            lse, blocks, Warp::kThreads, Warp::kBytes, args, at);
        launch_with_memory<attention_key_gradient_bfloat16_kernel<kDim>>(
            lse, blocks, Warp::kThreads, Warp::kBytes, args, at);
      } else {
        using Layout = TileLayout<A, kDim>;
        const int64_t blocks = units(args.shape, Layout::kTile);
        launch_with_memory<attention_query_gradient_kernel<T, kDim>>(
            lse, blocks, kThreads, Layout::bytes(Layout::kQueryGradient), args, at);
        launch_with_memory<attention_key_gradient_kernel<T, kDim>>(
            lse, blocks, kThreads, Layout::bytes(Layout::kKeyGradient), args, at);
      }
    });
  }

 private:
  static int64_t units(const AttentionShape& shape, int64_t tile) {
    return shape.batch * shape.heads * divide_up(shape.length, tile);
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CUDA, m) {
  m.impl("attention", TORCH_BOX(&coopflow::attention<coopflow::CudaAttention>));
  m.impl("attention_backward", TORCH_BOX(&coopflow::attention_backward<coopflow::CudaAttention>));
}
