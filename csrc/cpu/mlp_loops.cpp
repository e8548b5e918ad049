#include "mlp_loops.h"

#include <memory>

#include "chain_tile.h"
#include "simd_reals.h"
#include "tile.h"

namespace coopflow {
namespace COOPFLOW_ISA {
namespace {

// Chains lie side by side: unit i of a layer, of chain l of the tile, stands at [i * kChainTile +
// l]. A block of kSimdRows units by kColumns vectors of chains keeps its sums in registers.
template <typename A>
constexpr int kColumns = SimdReals<A>::kLanes >= kChainTile ? 1 : 2;

// One block of rows of `out`, for one block of columns: see multiply.
template <typename A>
void multiply_block(const A* matrix, const A* start, int rows, int length, const A* in, A* out) {
  using Reals = SimdReals<A>;
  Reals sums[kSimdRows][kColumns<A>];
  COOPFLOW_UNROLL
  for (int r = 0; r < kSimdRows; ++r) {
    const Reals first = Reals::broadcast(start == nullptr ? A(0) : start[r]);
    COOPFLOW_UNROLL
    for (int c = 0; c < kColumns<A>; ++c) sums[r][c] = first;
  }
  for (int k = 0; k < length; ++k) {
    Reals x[kColumns<A>];
    COOPFLOW_UNROLL
    for (int c = 0; c < kColumns<A>; ++c)
      x[c] = Reals::load(in + k * kChainTile + c * Reals::kLanes);
    COOPFLOW_UNROLL
    for (int r = 0; r < kSimdRows; ++r) {
      const Reals w = Reals::broadcast(matrix[k * kSimdRows + r]);
      COOPFLOW_UNROLL
      for (int c = 0; c < kColumns<A>; ++c) sums[r][c] = multiply_add(w, x[c], sums[r][c]);
    }
  }
  COOPFLOW_UNROLL
  for (int r = 0; r < kSimdRows; ++r) {
    if (r >= rows) continue;
    COOPFLOW_UNROLL
    for (int c = 0; c < kColumns<A>; ++c)
      sums[r][c].store(out + r * kChainTile + c * Reals::kLanes);
  }
}

// out (rows) = start + matrix * in (length). Each sum runs over k in order, so that it depends on
// nothing else. start is null for zeros.
template <typename A>
void multiply(const A* matrix, const A* start, int rows, int length, const A* in, A* out) {
  constexpr int kWidth = kColumns<A> * SimdReals<A>::kLanes;
  static_assert(kChainTile % kWidth == 0);
  for (int column = 0; column < kChainTile; column += kWidth) {
    for (int row = 0; row < rows; row += kSimdRows) {
      multiply_block(matrix + row * length, start == nullptr ? nullptr : start + row, rows - row,
                     length, in + column, out + row * kChainTile + column);
    }
  }
}

// values <- activation(values), slopes <- its derivative.
template <typename A>
void activate_layer(const Mlp<A>& mlp, int size, A* values, A* slopes) {
  const ActivationParameters<A> parameters = mlp.parameters;
  with_activation(mlp.activation, [&](auto tag) {
    COOPFLOW_ELEMENTWISE
    for (int i = 0; i < size * kChainTile; ++i) {
      const ActivationResult<A> result = activate<decltype(tag)::value>(parameters, values[i]);
      values[i] = result.value;
      slopes[i] = result.slope;
    }
  });
}

// What one thread needs beside the chains' memory: the values of a layer and of the next, and the
// slopes of every layer's activation.
template <typename A>
struct MlpScratch {
  static constexpr int64_t kLayer = kMlpMaxSize * kChainTile;
  alignas(64) A layers[2][kLayer];
  alignas(64) A slopes[kMlpMaxDepth][kLayer];
};

// Sets values to those of the last hidden layer; returns them.
template <typename A>
A* forward(const PackedMlp<A>& packed, const A* x, MlpScratch<A>& scratch) {
  const Mlp<A>& mlp = packed.mlp;
  A* to = nullptr;
  for (int l = 0; l < mlp.depth; ++l) {
    const A* const from = l == 0 ? x : to;
    to = scratch.layers[l % 2];
    multiply(packed.weights[l], packed.biases[l], mlp.sizes[l + 1], mlp.sizes[l], from, to);
    activate_layer(mlp, mlp.sizes[l + 1], to, scratch.slopes[l]);
  }
  return to;
}

template <typename A>
void energies(const Mlp<A>& mlp, const A* hidden, A* energy) {
  const A* const weights = mlp.weights[mlp.depth];
  for (int c = 0; c < kChainTile; ++c) energy[c] = mlp.biases[mlp.depth][0];
  for (int i = 0; i < mlp.sizes[mlp.depth]; ++i) {
    for (int c = 0; c < kChainTile; ++c) {
      energy[c] = multiply_add(weights[i], hidden[i * kChainTile + c], energy[c]);
    }
  }
}

// Overwrites the layers' values.
template <typename A>
void backward(const PackedMlp<A>& packed, A* hidden, MlpScratch<A>& scratch, A* grad) {
  const Mlp<A>& mlp = packed.mlp;
  const A* const last_weights = mlp.weights[mlp.depth];
  A* from = hidden;
  A* to = from == scratch.layers[0] ? scratch.layers[1] : scratch.layers[0];
  for (int i = 0; i < mlp.sizes[mlp.depth]; ++i) {
    for (int c = 0; c < kChainTile; ++c) {
      const int at = i * kChainTile + c;
      from[at] = last_weights[i] * scratch.slopes[mlp.depth - 1][at];
    }
  }
  for (int l = mlp.depth - 1; l > 0; --l) {
    multiply<A>(packed.transposed[l], nullptr, mlp.sizes[l], mlp.sizes[l + 1], from, to);
    const A* const slopes = scratch.slopes[l - 1];
    for (int i = 0; i < mlp.sizes[l] * kChainTile; ++i) to[i] *= slopes[i];
    A* const read = from;
    from = to;
    to = read;
  }
  multiply<A>(packed.transposed[0], nullptr, mlp.sizes[0], mlp.sizes[1], from, grad);
}

// The gradient, and where they are wanted the energies, of a tile's chains.
template <typename A>
class MlpGradient {
 public:
  MlpGradient(const PackedMlp<A>& packed, bool wants_energies)
      : packed_(packed), wants_energies_(wants_energies), scratch_(new MlpScratch<A>) {}

  void operator()(TileLanes<A>& lanes) const {
    A* const hidden = forward(packed_, lanes.x, *scratch_);
    if (wants_energies_) energies(packed_.mlp, hidden, lanes.energy);
    backward(packed_, hidden, *scratch_, lanes.grad);
  }

 private:
  const PackedMlp<A>& packed_;
  const bool wants_energies_;
  const std::unique_ptr<MlpScratch<A>> scratch_;
};

template <typename A>
void run_mlp_tiles(const LangevinChainArgs<A>& args, const PackedMlp<A>& packed, int64_t begin,
                   int64_t end) {
  const MlpGradient<A> gradient(packed, args.stats != nullptr);
  if (args.is_plain()) {
    run_tiles<false, 0>(args, begin, end, gradient);
  } else {
    run_tiles<true, 0>(args, begin, end, gradient);
  }
}

template <typename A>
void run_mlp_mala_tiles(const MalaChainArgs<A>& args, const PackedMlp<A>& packed, int64_t begin,
                        int64_t end) {
  run_mala_tiles(args, begin, end, MlpGradient<A>(packed, true));
}

}  // namespace

template <typename A>
MlpLoops<A> mlp_loops() {
  return {kChainTile, kSimdRows, run_mlp_tiles<A>, run_mlp_mala_tiles<A>};
}

template MlpLoops<float> mlp_loops<float>();
template MlpLoops<double> mlp_loops<double>();

}  // namespace COOPFLOW_ISA
}  // namespace coopflow
