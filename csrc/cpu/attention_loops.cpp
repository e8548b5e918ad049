// Rows of scores lie side by side in the lanes of vectors, so that what is done to a row (its
// largest score, its sum, its mask) is done to a vector, and products with keys and values multiply
// their numbers one by one into such vectors.
#include "attention_loops.h"

#include <algorithm>
#include <vector>

#include "noise_tile.h"
#include "simd_reals.h"

namespace coopflow {
namespace COOPFLOW_ISA {
namespace {

// A tile of scores: score j of row `lane` stands at [j][lane].
constexpr int64_t kRows = kAttentionRows;
constexpr int64_t kKeys = 64;

template <typename A>
using TileOf = A[kKeys][kRows];

// --- products ---

// Element (r, k) stands at [r * row_stride + k * column_stride].
template <typename A>
struct Matrix {
  const A* at;
  int64_t row_stride, column_stride;
};

// A block of kSimdRows rows by kColumns vectors keeps its sums in registers.
template <typename A>
constexpr int kColumns = SimdReals<A>::kLanes >= kRows ? 1 : 2;

template <bool kAdd, typename A>
void multiply_block(const Matrix<A>& matrix, int64_t length, const A* in, int64_t in_stride, A* out,
                    int64_t out_stride) {
  using Reals = SimdReals<A>;
  Reals sums[kSimdRows][kColumns<A>];
  COOPFLOW_UNROLL
  for (int r = 0; r < kSimdRows; ++r) {
    COOPFLOW_UNROLL
    for (int c = 0; c < kColumns<A>; ++c) {
      sums[r][c] =
          kAdd ? Reals::load(out + r * out_stride + c * Reals::kLanes) : Reals::broadcast(A(0));
    }
  }
  for (int64_t k = 0; k < length; ++k) {
    Reals x[kColumns<A>];
    COOPFLOW_UNROLL
    for (int c = 0; c < kColumns<A>; ++c)
      x[c] = Reals::load(in + k * in_stride + c * Reals::kLanes);
    COOPFLOW_UNROLL
    for (int r = 0; r < kSimdRows; ++r) {
      const Reals w = Reals::broadcast(matrix.at[r * matrix.row_stride + k * matrix.column_stride]);
      COOPFLOW_UNROLL
      for (int c = 0; c < kColumns<A>; ++c) sums[r][c] = multiply_add(w, x[c], sums[r][c]);
    }
  }
  COOPFLOW_UNROLL
  for (int r = 0; r < kSimdRows; ++r) {
    COOPFLOW_UNROLL
    for (int c = 0; c < kColumns<A>; ++c)
      sums[r][c].store(out + r * out_stride + c * Reals::kLanes);
  }
}

// out (rows, columns) = matrix (rows, length) * in (length, columns), or added to what is there.
// Each sum runs over the length in order. Rows are rounded up to kSimdRows, columns to 16: there
// must be room.
template <bool kAdd, typename A>
void multiply(const Matrix<A>& matrix, int64_t rows, int64_t length, const A* in, int64_t in_stride,
              int64_t columns, A* out, int64_t out_stride) {
  constexpr int64_t kWidth = kColumns<A> * SimdReals<A>::kLanes;
  static_assert(kRows % kWidth == 0);
  for (int64_t column = 0; column < columns; column += kWidth) {
    for (int64_t row = 0; row < rows; row += kSimdRows) {
      multiply_block<kAdd, A>(
          {matrix.at + row * matrix.row_stride, matrix.row_stride, matrix.column_stride}, length,
          in + column, in_stride, out + row * out_stride + column, out_stride);
    }
  }
}

// --- a head's tensors ---

// The rows of one head in arithmetic type, side by side, and zeros around them.
template <typename A>
class HeadRows {
 public:
  HeadRows(int64_t length, int64_t dim)
      : width(divide_up(dim, kRows) * kRows),
        length_(length),
        dim_(dim),
        values_(divide_up(length, kRows) * kRows * width, A(0)) {}

  A* row(int64_t i) { return values_.data() + i * width; }

  template <typename T>
  void load(const AttentionInput& from, const AttentionShape& shape, int64_t head,
            A factor = A(1)) {
    const T* const first = static_cast<const T*>(from.data) + from.head_offset(shape, head);
    for (int64_t i = 0; i < length_; ++i) {
      const T* const source = first + i * from.row_stride;
      A* const to = row(i);
      for (int64_t k = 0; k < dim_; ++k) {
        to[k] = factor * to_arithmetic(source[k * from.dim_stride]);
      }
    }
  }

  template <typename T>
  void store(const AttentionOutput& to, const AttentionShape& shape, int64_t head) {
    T* const first = static_cast<T*>(to.data) + to.head_offset(shape, head);
    for (int64_t i = 0; i < length_; ++i) {
      for (int64_t k = 0; k < dim_; ++k) {
        first[i * to.row_stride + k * to.dim_stride] = from_arithmetic<T>(row(i)[k]);
      }
    }
  }

  void set_to_zero() { std::fill(values_.begin(), values_.end(), A(0)); }

  const int64_t width;  // of a row, a multiple of 16

 private:
  int64_t length_, dim_;
  std::vector<A> values_;
};

// Vectors of a tile's rows, (dim, rows): element k of row `lane` stands at [k][lane].
template <typename A>
struct RowTile {
  alignas(64) A values[kAttentionMaxDim][kRows] = {};

  // From rows that lie one after the other.
  void transpose(const A* rows, int64_t width, int64_t dim) {
    for (int64_t k = 0; k < dim; ++k) {
      for (int64_t lane = 0; lane < kRows; ++lane) values[k][lane] = rows[lane * width + k];
    }
  }

  void set_to_zero(int64_t dim) {
    for (int64_t k = 0; k < dim; ++k) {
      for (int64_t lane = 0; lane < kRows; ++lane) values[k][lane] = A(0);
    }
  }

  // Rows that exist, times a factor each.
  template <typename T>
  void store(const AttentionOutput& to, const AttentionShape& shape, int64_t head,
             int64_t first_row, const A* factors) const {
    T* const first =
        static_cast<T*>(to.data) + to.head_offset(shape, head) + first_row * to.row_stride;
    const int64_t rows = std::min(kRows, shape.length - first_row);
    for (int64_t lane = 0; lane < rows; ++lane) {
      for (int64_t k = 0; k < shape.dim; ++k) {
        first[lane * to.row_stride + k * to.dim_stride] =
            from_arithmetic<T>(factors[lane] * values[k][lane]);
      }
    }
  }
};

// --- the mask ---

// The words behind a tile's weights: that of weight j of row `lane` stands at [j][lane].
class TileOfWords {
 public:
  template <typename A>
  TileOfWords(const Dropout<A>& dropout, const AttentionShape& shape)
      : shape_(shape),
        key_(make_philox_key(dropout.rng[0])),
        time_(noise_time(dropout.rng, dropout.step)),
        first_chain_(dropout.rng[2]) {}

  // For keys [first_key, first_key + n) of rows [first_row, first_row + 16).
  void draw(int64_t head, int64_t first_row, int64_t first_key, int64_t n) {
    alignas(64) uint32_t block[kRows], shift[kRows];
    uint32_t most = 0;
    const int64_t row = head % shape_.heads * shape_.length + first_row;
    for (int64_t lane = 0; lane < kRows; ++lane) {
      const int64_t element = (row + lane) * shape_.length + first_key;
      block[lane] = static_cast<uint32_t>(element / 4);
      shift[lane] = static_cast<uint32_t>(element % 4);
      most = std::max(most, shift[lane]);
    }
    draw_blocks(first_chain_ + head / shape_.heads, block, divide_up(n + most, 4));
    if (most > 0) move_up(shift, n);
  }

  uint32_t at(int64_t j, int64_t lane) const { return words_[j][lane]; }

 private:
  // `count` blocks of four words for each row, from its first.
  void draw_blocks(int64_t chain, uint32_t* block, int64_t count) {
    const uint64_t bits = static_cast<uint64_t>(chain);
    const SimdWords low = SimdWords::broadcast(static_cast<uint32_t>(bits));
    const SimdWords high = SimdWords::broadcast(static_cast<uint32_t>(bits >> 32));
    const SimdWords time = SimdWords::broadcast(time_);
    for (int64_t q = 0; q < count; ++q) {
      for (int64_t lane = 0; lane < kRows; lane += SimdWords::kLanes) {
        const PhiloxBlock<SimdWords> drawn = philox4x32_10(
            PhiloxBlock<SimdWords>{SimdWords::load(block + lane), time, low, high}, key_);
        drawn.w0.store(words_[4 * q] + lane);
        drawn.w1.store(words_[4 * q + 1] + lane);
        drawn.w2.store(words_[4 * q + 2] + lane);
        drawn.w3.store(words_[4 * q + 3] + lane);
      }
      for (int64_t lane = 0; lane < kRows; ++lane) ++block[lane];
    }
  }

  // Where a row does not begin with a block, its words lie up to three places behind.
  void move_up(const uint32_t* shift, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      COOPFLOW_LANES
      for (int64_t lane = 0; lane < kRows; ++lane) {
        const uint32_t low = shift[lane] & 1 ? words_[j + 1][lane] : words_[j][lane];
        const uint32_t high = shift[lane] & 1 ? words_[j + 3][lane] : words_[j + 2][lane];
        words_[j][lane] = shift[lane] & 2 ? high : low;
      }
    }
  }

  const AttentionShape shape_;
  const PhiloxKey key_;
  const uint32_t time_;
  const int64_t first_chain_;
  alignas(64) uint32_t words_[kKeys + 4][kRows] = {};
};

// --- forward ---

// One tile of rows on its way through the keys.
template <typename A>
struct RunningRows {
  alignas(64) A peak[kRows], sum[kRows];
  RowTile<A> out;  // sums of dropped weights times values

  void start(int64_t dim) {
    for (int64_t lane = 0; lane < kRows; ++lane) {
      peak[lane] = -INFINITY;
      sum[lane] = A(0);
    }
    out.set_to_zero(dim);
  }

  // Scores become terms of the softmax; those that were there shrink with the largest score's
  // growth.
  void take(int64_t n, int64_t dim, TileOf<A>& scores) {
    alignas(64) A largest[kRows], shrink[kRows];
    for (int64_t lane = 0; lane < kRows; ++lane) largest[lane] = peak[lane];
    for (int64_t j = 0; j < n; ++j) {
      COOPFLOW_LANES
      for (int64_t lane = 0; lane < kRows; ++lane) {
        largest[lane] = larger_score(largest[lane], scores[j][lane]);
      }
    }
    COOPFLOW_LANES
    for (int64_t lane = 0; lane < kRows; ++lane) {
      shrink[lane] = softmax_term(peak[lane], largest[lane]);
      peak[lane] = largest[lane];
      sum[lane] *= shrink[lane];
    }
    for (int64_t j = 0; j < n; ++j) {
      COOPFLOW_LANES
      for (int64_t lane = 0; lane < kRows; ++lane) {
        scores[j][lane] = softmax_term(scores[j][lane], largest[lane]);
        sum[lane] += scores[j][lane];
      }
    }
    for (int64_t k = 0; k < dim; ++k) {
      COOPFLOW_LANES
      for (int64_t lane = 0; lane < kRows; ++lane) out.values[k][lane] *= shrink[lane];
    }
  }
};

template <typename T>
void finish_rows(const AttentionArgs<arithmetic_t<T>>& args, int64_t head, int64_t first_row,
                 const RunningRows<arithmetic_t<T>>& rows) {
  using A = arithmetic_t<T>;
  alignas(64) A factors[kRows];
  for (int64_t lane = 0; lane < kRows; ++lane) factors[lane] = args.dropout.factor / rows.sum[lane];
  rows.out.template store<T>(args.out, args.shape, head, first_row, factors);
  A* const lse = args.lse + head * args.shape.length + first_row;
  const int64_t count = std::min(kRows, args.shape.length - first_row);
  for (int64_t lane = 0; lane < count; ++lane) {
    lse[lane] = log_sum_exp(rows.peak[lane], rows.sum[lane]);
  }
}

template <typename T>
void forward_tiles(const AttentionArgs<arithmetic_t<T>>& args, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const AttentionShape shape = args.shape;
  const int64_t tiles = divide_up(shape.length, kRows);
  const uint32_t threshold = args.dropout.threshold;
  HeadRows<A> queries(shape.length, shape.dim), keys(shape.length, shape.dim);
  HeadRows<A> values(shape.length, shape.dim);
  TileOfWords words(args.dropout, shape);
  RowTile<A> query_tile;
  RunningRows<A> rows;
  alignas(64) TileOf<A> scores = {};
  for (int64_t index = begin; index < end; ++index) {
    const int64_t head = index / tiles, first_row = index % tiles * kRows;
    if (index == begin || first_row == 0) {
      queries.template load<T>(args.q, shape, head, args.scale);
      keys.template load<T>(args.k, shape, head);
      values.template load<T>(args.v, shape, head);
    }
    query_tile.transpose(queries.row(first_row), queries.width, shape.dim);
    rows.start(shape.dim);
    for (int64_t first_key = 0; first_key < shape.length; first_key += kKeys) {
      const int64_t n = std::min(kKeys, shape.length - first_key);
      multiply<false, A>({keys.row(first_key), keys.width, 1}, n, shape.dim, query_tile.values[0],
                         kRows, kRows, scores[0], kRows);
      rows.take(n, shape.dim, scores);
      words.draw(head, first_row, first_key, n);
      for (int64_t j = 0; j < n; ++j) {
        COOPFLOW_LANES
        for (int64_t lane = 0; lane < kRows; ++lane) {
          scores[j][lane] = is_kept(words.at(j, lane), threshold) ? scores[j][lane] : A(0);
        }
      }
      multiply<true, A>({values.row(first_key), 1, values.width}, shape.dim, n, scores[0], kRows,
                        kRows, rows.out.values[0], kRows);
    }
    finish_rows<T>(args, head, first_row, rows);
  }
}

// --- backward ---

// What the backward pass knows of a tile's rows beside their vectors.
template <typename A>
struct RowSums {
  alignas(64) A lse[kRows] = {}, delta[kRows] = {};

  // delta = the sum of grad_out * out.
  template <typename T>
  void load(const AttentionBackwardArgs<A>& args, int64_t head, int64_t first_row, int64_t count,
            const A* grad_out, int64_t width) {
    const AttentionInput& from = args.out;
    const T* const out = static_cast<const T*>(from.data) + from.head_offset(args.shape, head) +
                         first_row * from.row_stride;
    for (int64_t lane = 0; lane < count; ++lane) {
      lse[lane] = args.lse[head * args.shape.length + first_row + lane];
      A sum = A(0);
      for (int64_t k = 0; k < args.shape.dim; ++k) {
        sum = multiply_add(grad_out[lane * width + k],
                           to_arithmetic(out[lane * from.row_stride + k * from.dim_stride]), sum);
      }
      delta[lane] = sum;
    }
  }
};

// One head's tensors and gradients, and a tile of each kind.
template <typename T>
class BackwardHead {
 public:
  using A = arithmetic_t<T>;

  explicit BackwardHead(const AttentionBackwardArgs<A>& args)
      : args_(args),
        queries_(args.shape.length, args.shape.dim),
        keys_(args.shape.length, args.shape.dim),
        values_(args.shape.length, args.shape.dim),
        grad_out_(args.shape.length, args.shape.dim),
        grad_keys_(args.shape.length, args.shape.dim),
        grad_values_(args.shape.length, args.shape.dim),
        words_(args.dropout, args.shape) {
    for (A& scale : scales_) scale = args.scale;
  }

  void run(int64_t head) {
    const AttentionShape& shape = args_.shape;
    queries_.template load<T>(args_.q, shape, head, args_.scale);
    keys_.template load<T>(args_.k, shape, head);
    values_.template load<T>(args_.v, shape, head);
    grad_out_.template load<T>(args_.grad_out, shape, head);
    grad_keys_.set_to_zero();
    grad_values_.set_to_zero();
    for (int64_t row = 0; row < shape.length; row += kRows) run_rows(head, row);
    grad_keys_.template store<T>(args_.grad_k, shape, head);
    grad_values_.template store<T>(args_.grad_v, shape, head);
  }

 private:
  void run_rows(int64_t head, int64_t first_row) {
    const AttentionShape& shape = args_.shape;
    const int64_t count = std::min(kRows, shape.length - first_row), width = keys_.width;
    query_tile_.transpose(queries_.row(first_row), width, shape.dim);
    grad_out_tile_.transpose(grad_out_.row(first_row), width, shape.dim);
    sums_.template load<T>(args_, head, first_row, count, grad_out_.row(first_row), width);
    grad_query_tile_.set_to_zero(shape.dim);
    for (int64_t first_key = 0; first_key < shape.length; first_key += kKeys) {
      const int64_t n = std::min(kKeys, shape.length - first_key);
      words_.draw(head, first_row, first_key, n);
      differentiate_weights(first_key, n);
      // Rows that do not exist have no part in the sums over rows.
      multiply<true, A>({dropped_[0], kRows, 1}, n, count, grad_out_.row(first_row), width, width,
                        grad_values_.row(first_key), width);
      multiply<true, A>({grad_scores_[0], kRows, 1}, n, count, queries_.row(first_row), width,
                        width, grad_keys_.row(first_key), width);
      multiply<true, A>({keys_.row(first_key), 1, width}, shape.dim, n, grad_scores_[0], kRows,
                        kRows, grad_query_tile_.values[0], kRows);
    }
    grad_query_tile_.template store<T>(args_.grad_q, shape, head, first_row, scales_);
  }

  // Sets dropped_ and grad_scores_ for n keys.
  void differentiate_weights(int64_t first_key, int64_t n) {
    const int64_t dim = args_.shape.dim, width = keys_.width;
    const uint32_t threshold = args_.dropout.threshold;
    const A factor = args_.dropout.factor;
    multiply<false, A>({keys_.row(first_key), width, 1}, n, dim, query_tile_.values[0], kRows,
                       kRows, dropped_[0], kRows);
    multiply<false, A>({values_.row(first_key), width, 1}, n, dim, grad_out_tile_.values[0], kRows,
                       kRows, grad_scores_[0], kRows);
    for (int64_t j = 0; j < n; ++j) {
      COOPFLOW_LANES
      for (int64_t lane = 0; lane < kRows; ++lane) {
        const WeightGradients<A> found = weight_gradients(
            dropped_[j][lane], sums_.lse[lane], is_kept(words_.at(j, lane), threshold), factor,
            grad_scores_[j][lane], sums_.delta[lane]);
        dropped_[j][lane] = found.dropped;
        grad_scores_[j][lane] = found.grad_score;
      }
    }
  }

  const AttentionBackwardArgs<A>& args_;
  HeadRows<A> queries_, keys_, values_, grad_out_, grad_keys_, grad_values_;
  TileOfWords words_;
  RowTile<A> query_tile_, grad_out_tile_, grad_query_tile_;
  RowSums<A> sums_;
  alignas(64) TileOf<A> dropped_ = {}, grad_scores_ = {};
  A scales_[kRows];
};

template <typename T>
void backward_heads(const AttentionBackwardArgs<arithmetic_t<T>>& args, int64_t begin,
                    int64_t end) {
  BackwardHead<T> of(args);
  for (int64_t head = begin; head < end; ++head) of.run(head);
}

}  // namespace

template <typename T>
AttentionLoops<T> attention_loops() {
  return {forward_tiles<T>, backward_heads<T>};
}

template AttentionLoops<float> attention_loops<float>();
template AttentionLoops<double> attention_loops<double>();
template AttentionLoops<bfloat16> attention_loops<bfloat16>();
template AttentionLoops<float16> attention_loops<float16>();

}  // namespace COOPFLOW_ISA
}  // namespace coopflow
