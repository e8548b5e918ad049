// How a block of a GPU keeps a network and a tile of chains in its shared memory: in float32, and
// with the matrices between hidden layers in bfloat16.
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
COOPFLOW_HD int round_up_16(int n) { return (n + 15) / 16 * 16; }

using MlpSizes = int[kMlpMaxDepth + 1];  // of the state and of the hidden layers

inline int widest_hidden(const MlpSizes& sizes, int depth) {
  int widest = 0;
  for (int l = 1; l <= depth; ++l) widest = sizes[l] > widest ? sizes[l] : widest;
  return widest;
}

// Of four rows that are neighbours, or four apart, 16 bytes each are read from different banks:
// their distance is an odd multiple of 16 bytes.
inline int mlp_weight_stride(int n_in) {
  const int whole = round_up_4(n_in);
  return whole % 8 == 0 ? whole + 4 : whole;
}

// What every tile has. Offsets and strides in floats; every array begins on 16 bytes.
struct ChainTile {
  int chains;
  int x, grad, x_ref, xi;  // (chains, chain_stride)
  int chain_stride;        // odd, so that chains lie in different banks
  int floats;              // of all

  int64_t bytes() const { return int64_t{floats} * static_cast<int64_t>(sizeof(float)); }

  // The offset of so many more.
  int take(int count) {
    const int offset = floats;
    floats += round_up_4(count);
    return offset;
  }

  void take_chains(int per_chain) {
    chain_stride = round_up_4(per_chain) + 1;
    for (int* vectors : {&x, &grad, &x_ref, &xi}) *vectors = take(chains * chain_stride);
  }
};

// In float32.
struct MlpTile : ChainTile {
  int weights[kMlpMaxDepth];  // of the layers' matrices: (out, stride), zeros behind each row
  int strides[kMlpMaxDepth];
  int biases[kMlpMaxDepth];
  int last_weights, last_bias;
  int values[2];             // of a layer and of the next, (units, chains)
  int slopes[kMlpMaxDepth];  // of the activations, and in the way back the gradients

  static MlpTile make(const MlpSizes& sizes, int depth, int chains) {
    MlpTile tile{};
    tile.chains = chains;
    for (int l = 0; l < depth; ++l) {
      tile.strides[l] = mlp_weight_stride(sizes[l]);
      tile.weights[l] = tile.take(sizes[l + 1] * tile.strides[l]);
      tile.biases[l] = tile.take(sizes[l + 1]);
      tile.slopes[l] = tile.take(sizes[l + 1] * chains);
    }
    tile.last_weights = tile.take(sizes[depth]);
    tile.last_bias = tile.take(1);
    const int widest = widest_hidden(sizes, depth);
    for (int& values : tile.values) values = tile.take(round_up_4(widest) * chains);
    tile.take_chains(sizes[0]);
    return tile;
  }
};

// With matrices between hidden layers, and what they are multiplied by, in bfloat16, padded by
// zeros to multiples of 16 for tensor cores (warp_matrix.cuh). At least two hidden layers.
struct MlpBfloat16Tile : ChainTile {
  int first_weights;  // (out, first_stride), zeros behind each row
  int first_stride;
  int weights[kMlpMaxDepth];  // from 1 on: (out, stride) bfloat16
  int strides[kMlpMaxDepth];  // in bfloat16
  int biases[kMlpMaxDepth];
  int last_weights, last_bias;
  int factors[2];  // of a product with a layer's matrix and with the next: (chains, factor_stride)
  int factor_stride;             // bfloat16, and so many of them
  int slopes[kMlpMaxDepth - 1];  // of all activations but the last layer's, (units, unit_stride)
  int last_values;               // of the last hidden layer, the same
  int unit_stride;

  static MlpBfloat16Tile make(const MlpSizes& sizes, int depth, int chains) {
    MlpBfloat16Tile tile{};
    tile.chains = chains;
    tile.unit_stride = unit_stride_of(chains);
    tile.first_stride = mlp_weight_stride(sizes[0]);
    tile.first_weights = tile.take(sizes[1] * tile.first_stride);
    for (int l = 0; l < depth; ++l) {
      if (l > 0) {
        tile.strides[l] = matrix_stride(sizes[l]);
        tile.weights[l] = tile.take(round_up_16(sizes[l + 1]) * tile.strides[l] / 2);
      }
      tile.biases[l] = tile.take(sizes[l + 1]);
      const int units = tile.take(round_up_16(sizes[l + 1]) * tile.unit_stride);
      (l + 1 == depth ? tile.last_values : tile.slopes[l]) = units;
    }
    tile.last_weights = tile.take(sizes[depth]);
    tile.last_bias = tile.take(1);
    tile.factor_stride = matrix_stride(widest_hidden(sizes, depth));
    for (int& factors : tile.factors) factors = tile.take(chains * tile.factor_stride / 2);
    tile.take_chains(sizes[0]);
    return tile;
  }

 private:
  // An odd multiple of 16 bytes: see warp_matrix.cuh.
  static int matrix_stride(int length) { return round_up_16(length) + 8; }

  // Lanes hold two chains of one of eight rows. Sixteen of them, four rows of eight floats, are one
  // access of all banks where rows are 8 or 24 banks apart.
  static int unit_stride_of(int chains) { return chains == 8 ? 8 : chains + 8; }
};

// The tile with which the fewest chains follow one another on a multiprocessor, the largest of
// those: it reads the weights least often. One of the least chains where none fits.
template <typename Tile>
Tile choose_mlp_tile(const MlpSizes& sizes, int depth, int64_t batch, int64_t multiprocessors,
                     int64_t shared_bytes) {
  Tile best = Tile::make(sizes, depth, kMlpLeastTile);
  int64_t shortest = -1;
  for (int chains = kMlpMostTile; chains >= kMlpLeastTile; chains /= 2) {
    const Tile tile = Tile::make(sizes, depth, chains);
    const int64_t rounds = divide_up(divide_up(batch, chains), multiprocessors);
    if (tile.bytes() > shared_bytes) continue;
    if (shortest >= 0 && rounds * chains >= shortest) continue;
    best = tile;
    shortest = rounds * chains;
  }
  return best;
}

}  // namespace coopflow
