#include "mlp_loops.h"

#include "simd_reals.h"
#include "tile.h"

namespace coopflow {
namespace COOPFLOW_ISA {
namespace {

// Chains lie side by side: unit i of a layer, of chain l of the tile, stands at [i * kMlpTile + l].
// A block of kRows units by kColumns vectors of chains keeps its sums in registers.
constexpr int kColumns = 2;
constexpr int kRows = kSimdSums / kColumns;

inline int whole_blocks(int rows) { return (rows + kRows - 1) / kRows * kRows; }

// matrix(row, k) of (rows, length) in the order of the blocks: for each block, for each k, its
// kRows entries. Rows that do not exist are zero.
template <typename A, typename F>
std::vector<A> pack_matrix(int rows, int length, const F& matrix) {
  std::vector<A> packed(static_cast<size_t>(whole_blocks(rows)) * length, A(0));
  for (int row = 0; row < rows; ++row) {
    A* const block = packed.data() + static_cast<int64_t>(row / kRows) * kRows * length;
    for (int k = 0; k < length; ++k) block[k * kRows + row % kRows] = matrix(row, k);
  }
  return packed;
}

template <typename A>
PackedMlp<A> pack(const Mlp<A>& mlp) {
  PackedMlp<A> packed;
  packed.mlp = mlp;
  for (int l = 0; l < mlp.depth; ++l) {
    const A* const weights = static_cast<const A*>(mlp.weights[l]);
    const int n_in = mlp.sizes[l], n_out = mlp.sizes[l + 1];
    packed.weights[l] =
        pack_matrix<A>(n_out, n_in, [=](int row, int k) { return weights[row * n_in + k]; });
    packed.transposed[l] =
        pack_matrix<A>(n_in, n_out, [=](int row, int k) { return weights[k * n_in + row]; });
    const A* const biases = static_cast<const A*>(mlp.biases[l]);
    packed.biases[l].assign(whole_blocks(n_out), A(0));
    for (int row = 0; row < n_out; ++row) packed.biases[l][row] = biases[row];
  }
  packed.last_weights = static_cast<const A*>(mlp.weights[mlp.depth]);
  packed.last_bias = *static_cast<const A*>(mlp.biases[mlp.depth]);
  return packed;
}

// out = start + matrix * in, in whole blocks of rows; each sum runs over k in order, so that it
// depends on nothing else. start: of the rows, null for zeros.
template <typename A>
void multiply(const A* matrix, const A* start, int rows, int length, const A* in, A* out) {
  using Reals = SimdReals<A>;
  constexpr int kWidth = kColumns * Reals::kLanes;
  static_assert(kMlpTile % kWidth == 0);
  for (int column = 0; column < kMlpTile; column += kWidth) {
    for (int row = 0; row < rows; row += kRows) {
      Reals sums[kRows][kColumns];
      COOPFLOW_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Reals first = Reals::broadcast(start == nullptr ? A(0) : start[row + r]);
        COOPFLOW_UNROLL
        for (int c = 0; c < kColumns; ++c) sums[r][c] = first;
      }
      const A* weight = matrix + static_cast<int64_t>(row) * length;
      const A* from = in + column;
      for (int k = 0; k < length; ++k, weight += kRows, from += kMlpTile) {
        Reals x[kColumns];
        COOPFLOW_UNROLL
        for (int c = 0; c < kColumns; ++c) x[c] = Reals::load(from + c * Reals::kLanes);
        COOPFLOW_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const Reals w = Reals::broadcast(weight[r]);
          COOPFLOW_UNROLL
          for (int c = 0; c < kColumns; ++c) sums[r][c] = multiply_add(w, x[c], sums[r][c]);
        }
      }
      A* const to = out + static_cast<int64_t>(row) * kMlpTile + column;
      COOPFLOW_UNROLL
      for (int r = 0; r < kRows; ++r) {
        COOPFLOW_UNROLL
        for (int c = 0; c < kColumns; ++c) sums[r][c].store(to + r * kMlpTile + c * Reals::kLanes);
      }
    }
  }
}

// values <- activation(values), slopes <- its derivative.
template <typename A>
void activate_layer(const Mlp<A>& mlp, int size, A* values, A* slopes) {
  const ActivationParameters<A> parameters = mlp.parameters;
  with_activation(mlp.activation, [&](auto tag) {
    COOPFLOW_ELEMENTWISE
    for (int i = 0; i < size * kMlpTile; ++i) {
      const ActivationResult<A> result = activate<decltype(tag)::value>(parameters, values[i]);
      values[i] = result.value;
      slopes[i] = result.slope;
    }
  });
}

// What one thread needs beside the chains: the values of a layer and of the next, and the
// activations' slopes of all.
template <typename A>
struct MlpScratch {
  static constexpr int64_t kLayer = kMlpMaxSize * kMlpTile;
  alignas(64) A layers[2][kLayer];
  alignas(64) A slopes[kMlpMaxDepth][kLayer];
  alignas(64) A x[kLayer], grad[kLayer], x_ref[kLayer], xi[kLayer];
};

// The energies, and their gradients in whole blocks of rows.
template <bool kEnergy, typename A>
void energy_gradient(const PackedMlp<A>& packed, MlpScratch<A>& scratch, const A* x, A* grad,
                     A* energy) {
  const Mlp<A>& mlp = packed.mlp;
  const int depth = mlp.depth;
  const A* from = x;
  for (int l = 0; l < depth; ++l) {
    A* const to = scratch.layers[l % 2];
    multiply(packed.weights[l].data(), packed.biases[l].data(), mlp.sizes[l + 1], mlp.sizes[l],
             from, to);
    activate_layer(mlp, mlp.sizes[l + 1], to, scratch.slopes[l]);
    from = to;
  }
  const int last = mlp.sizes[depth];
  if (kEnergy) {
    for (int c = 0; c < kMlpTile; ++c) energy[c] = packed.last_bias;
    for (int i = 0; i < last; ++i) {
      const A w = packed.last_weights[i];
      for (int c = 0; c < kMlpTile; ++c) {
        energy[c] = multiply_add(w, from[i * kMlpTile + c], energy[c]);
      }
    }
  }
  A* back = scratch.layers[depth % 2];
  for (int i = 0; i < last; ++i) {
    for (int c = 0; c < kMlpTile; ++c) {
      const int64_t at = i * kMlpTile + c;
      back[at] = packed.last_weights[i] * scratch.slopes[depth - 1][at];
    }
  }
  for (int l = depth - 1; l > 0; --l) {
    A* const to = scratch.layers[l % 2];
    multiply<A>(packed.transposed[l].data(), nullptr, mlp.sizes[l], mlp.sizes[l + 1], back, to);
    const A* const slopes = scratch.slopes[l - 1];
    for (int i = 0; i < mlp.sizes[l] * kMlpTile; ++i) to[i] *= slopes[i];
    back = to;
  }
  multiply<A>(packed.transposed[0].data(), nullptr, mlp.sizes[0], mlp.sizes[1], back, grad);
}
