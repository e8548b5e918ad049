// How a block of a GPU keeps a network and a tile of chains in its shared memory.
#pragma once

#include <cstdint>

#include "coopflow/macros.h"
#include "coopflow/mlp.h"
#include "coopflow/reduction.h"

namespace coopflow {

// The smallest tile; others are two and four times as large.
constexpr int kMlpLeastTile = 8;
constexpr int kMlpMostTile = 32;

COOPFLOW_HD int round_up_4(int n) { return (n + 3) / 4 * 4; }

// Offsets and strides in floats. Every array begins on 16 bytes.
struct MlpTile {
  int chains;
  int weights[kMlpMaxDepth];  // of the layers' matrices: (out, stride), zeros behind each row
  int strides[kMlpMaxDepth];
  int biases[kMlpMaxDepth];
  int last_weights, last_bias;
  int values[2];             // of a layer and of the next, (units, chains)
  int slopes[kMlpMaxDepth];  // of the activations, and in the way back the gradients
  int x, grad, x_ref, xi;    // (chains, chain_stride)
  int chain_stride;          // odd, so that chains lie in different banks
  int floats;                // of all

  int64_t bytes() const { return int64_t{floats} * static_cast<int64_t>(sizeof(float)); }
};

// Four rows that are neighbours, or four apart, are read 16 bytes each from different banks: their
// distance is an odd multiple of 16 bytes.
inline int mlp_weight_stride(int n_in) {
  const int whole = round_up_4(n_in);
  return whole % 8 == 0 ? whole + 4 : whole;
}

inline MlpTile make_mlp_tile(const int (&sizes)[kMlpMaxDepth + 1], int depth, int chains) {
  MlpTile tile{};
  tile.chains = chains;
  const auto take = [&](int floats) {
    const int offset = tile.floats;
    tile.floats += round_up_4(floats);
    return offset;
  };
  int widest = 0;
  for (int l = 0; l < depth; ++l) {
    tile.strides[l] = mlp_weight_stride(sizes[l]);
    tile.weights[l] = take(sizes[l + 1] * tile.strides[l]);
    tile.biases[l] = take(sizes[l + 1]);
    tile.slopes[l] = take(sizes[l + 1] * chains);
    widest = sizes[l + 1] > widest ? sizes[l + 1] : widest;
  }
  tile.last_weights = take(sizes[depth]);
  tile.last_bias = take(1);
  for (int& values : tile.values) values = take(round_up_4(widest) * chains);
  tile.chain_stride = round_up_4(sizes[0]) + 1;
  for (int* vectors : {&tile.x, &tile.grad, &tile.x_ref, &tile.xi}) {
    *vectors = take(chains * tile.chain_stride);
  }
  return tile;
}

// The tile with which the fewest chains follow one another on a multiprocessor, the largest of
// those: it reads the weights least often. One of the least chains where none fits.
inline MlpTile choose_mlp_tile(const int (&sizes)[kMlpMaxDepth + 1], int depth, int64_t batch,
                               int64_t multiprocessors, int64_t shared_bytes) {
  MlpTile best = make_mlp_tile(sizes, depth, kMlpLeastTile);
  int64_t shortest = -1;
  for (int chains = kMlpMostTile; chains >= kMlpLeastTile; chains /= 2) {
    const MlpTile tile = make_mlp_tile(sizes, depth, chains);
    const int64_t rounds = divide_up(divide_up(batch, chains), multiprocessors);
    if (tile.bytes() > shared_bytes) continue;
    if (shortest >= 0 && rounds * chains >= shortest) continue;
    best = tile;
    shortest = rounds * chains;
  }
  return best;
}

}  // namespace coopflow
