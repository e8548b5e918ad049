// The gradient of a network's energy for a tile of chains, with the products between hidden layers
// on tensor cores: their factors, the weights, activations and gradients, are rounded to bfloat16,
// everything else is float32.
#pragma once

#include "coopflow/mlp.h"
#include "coopflow/mlp_tile.h"
#include "dynamic_shared.cuh"
#include "items.cuh"
#include "shared_access.cuh"
#include "warp_matrix.cuh"

namespace coopflow {

// A warp has 16 units of each layer and kColumns times 8 chains: the rows and columns of its sums
// (warp_matrix.cuh), of which a thread has two rows and in each kColumns pairs of chains. They are
// the same in all layers, so a thread itself reads again the slopes that it has stored.
template <int kColumns>
class TensorCoreNetwork {
 public:
  static constexpr int kWarpChains = kColumns * kFragmentColumns;
  using Sums = MatrixSums[kColumns];

  // Warps of a block for a network whose widest layer has so many units.
  static int warps(int widest, const MlpBfloat16Tile& tile) {
    return round_up_16(widest) / kFragmentRows * (tile.chains / kWarpChains);
  }

  __device__ __forceinline__ TensorCoreNetwork(const Mlp<float>& mlp, const MlpBfloat16Tile& tile)
      : mlp_(mlp), tile_(tile), memory_(dynamic_shared_floats()) {
    lane_ = static_cast<int>(threadIdx.x) % kWarp;
    warp_ = static_cast<int>(threadIdx.x) / kWarp;
    warps_ = static_cast<int>(blockDim.x) / kWarp;
    const int warps_by_rows = warps_ / (tile.chains / kWarpChains);
    first_row_ = warp_ % warps_by_rows * kFragmentRows;
    first_chain_ = warp_ / warps_by_rows * kWarpChains;
  }

  __device__ __forceinline__ float* at(int offset) const { return memory_ + offset; }

  // A barrier must follow.
  __device__ __forceinline__ void load_parameters() const {
    const int depth = mlp_.depth;
    const int n_in = mlp_.sizes[0], stride = tile_.first_stride;
    for (int i = threadIdx.x; i < mlp_.sizes[1] * stride; i += blockDim.x) {
      const int row = i / stride, k = i - row * stride;
      at(tile_.first_weights)[i] = k < n_in ? mlp_.weights[0][row * n_in + k] : 0.0f;
    }
    for (int l = 1; l < depth; ++l) load_matrix(l);
    for (int l = 0; l < depth; ++l) copy(mlp_.biases[l], mlp_.sizes[l + 1], at(tile_.biases[l]));
    copy(mlp_.weights[depth], mlp_.sizes[depth], at(tile_.last_weights));
    copy(mlp_.biases[depth], 1, at(tile_.last_bias));
  }

  // From x, the gradient of every chain's energy, and the last layer's values. Ends with a barrier.
  __device__ __forceinline__ void gradient() const {
    for (int l = 0; l < mlp_.depth; ++l) forward_layer(l);
    for (int l = mlp_.depth - 1; l > 0; --l) backward_layer(l);
    first_layer_gradient();
  }

  // The energy of one chain of the tile, after gradient().
  __device__ __forceinline__ float energy(int chain) const {
    const float* const values = at(tile_.last_values) + chain;
    float sum = *at(tile_.last_bias);
    for (int i = 0; i < mlp_.sizes[mlp_.depth]; ++i) {
      sum = multiply_add(at(tile_.last_weights)[i], values[i * tile_.unit_stride], sum);
    }
    return sum;
  }

 private:
  __device__ __forceinline__ bfloat16* halves_at(int offset) const {
    return reinterpret_cast<bfloat16*>(at(offset));
  }

  __device__ __forceinline__ static void copy(const float* from, int count, float* to) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
  }

  // Rounded, and zeros up to multiples of 16.
  __device__ __forceinline__ void load_matrix(int l) const {
    const int n_in = mlp_.sizes[l], n_out = mlp_.sizes[l + 1], columns = round_up_16(n_in);
    bfloat16* const to = halves_at(tile_.weights[l]);
    for (int i = threadIdx.x; i < round_up_16(n_out) * columns; i += blockDim.x) {
      const int row = i / columns, k = i - row * columns;
      const bool exists = row < n_out && k < n_in;
      to[row * tile_.strides[l] + k] =
          from_arithmetic<bfloat16>(exists ? mlp_.weights[l][row * n_in + k] : 0.0f);
    }
  }

  // Calls f(row, chain, j, i) for this thread's sums: [j][i] and [j][i + 1] are those of unit `row`
  // for two chains, from `chain` on.
  template <typename F>
  __device__ __forceinline__ void for_each_pair(const F& f) const {
    const FragmentPlace place = fragment_place(lane_);
    COOPFLOW_UNROLL
    for (int i = 0; i < 2; ++i) {
      COOPFLOW_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        f(first_row_ + place.row + 8 * i, first_chain_ + place.column + kFragmentColumns * j, j,
          2 * i);
      }
    }
  }

  // Values and slopes of layer l + 1: of the last one, what it passes back in place of its values.
  __device__ __forceinline__ void forward_layer(int l) const {
    if (first_row_ < mlp_.sizes[l + 1]) {
      Sums sums;
      for_each_pair([&](int row, int /*chain*/, int j, int i) {
        sums[j][i] = sums[j][i + 1] = at(tile_.biases[l])[existing_row(l + 1, row)];
      });
      if (l == 0) {
        multiply_state(sums);
      } else {
        multiply<false>(l, l - 1, mlp_.sizes[l], sums);
      }
      activate(l, sums);
    }
    __syncthreads();
  }

  // A row of a layer; the last one where that does not exist: what comes of it is not used.
  __device__ __forceinline__ int existing_row(int layer, int row) const {
    return row < mlp_.sizes[layer] ? row : mlp_.sizes[layer] - 1;
  }

  // sums += the first layer's weights * x.
  __device__ __forceinline__ void multiply_state(Sums& sums) const {
    COOPFLOW_NO_UNROLL
    for (int k = 0; k < mlp_.sizes[0]; k += 4) {
      for_each_pair([&](int row, int chain, int j, int i) {
        float w[4];
        load_shared(at(tile_.first_weights) + existing_row(1, row) * tile_.first_stride + k, w);
        const float* const x = at(tile_.x) + chain * tile_.chain_stride + k;
        COOPFLOW_UNROLL
        for (int e = 0; e < 4; ++e) {
          sums[j][i] = multiply_add(w[e], x[e], sums[j][i]);
          sums[j][i + 1] = multiply_add(w[e], x[tile_.chain_stride + e], sums[j][i + 1]);
        }
      });
    }
  }

  // sums += the matrix of layer l, or its transpose, * factors, over so many of these.
  template <bool kTransposed>
  __device__ __forceinline__ void multiply(int l, int parity, int length, Sums& sums) const {
    const int stride = tile_.strides[l], factor_stride = tile_.factor_stride;
    const bfloat16* weights =
        halves_at(tile_.weights[l]) + (kTransposed ? first_row_ : first_row_ * stride);
    const bfloat16* const factors =
        halves_at(tile_.factors[parity % 2]) + first_chain_ * factor_stride;
    COOPFLOW_UNROLL_4
    for (int k = 0; k < length; k += kFragmentLength) {
      const MatrixA a = load_a<kTransposed>(weights, stride, lane_);
      weights += kTransposed ? kFragmentLength * stride : kFragmentLength;
      COOPFLOW_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        const MatrixB b =
            load_b(factors + j * kFragmentColumns * factor_stride + k, factor_stride, lane_);
        multiply_accumulate(a, b, sums[j]);
      }
    }
  }

  __device__ __forceinline__ void activate(int l, Sums& sums) const {
    const bool is_last = l + 1 == mlp_.depth;
    Sums slopes;
    with_activation(mlp_.activation, [&](auto tag) {
      COOPFLOW_UNROLL
      for (int j = 0; j < kColumns; ++j) {
        COOPFLOW_UNROLL
        for (int i = 0; i < 4; ++i) {
          const ActivationResult<float> result =
              coopflow::activate<decltype(tag)::value>(mlp_.parameters, sums[j][i]);
          sums[j][i] = result.value;
          slopes[j][i] = result.slope;
        }
      }
    });
    const int kept_at = is_last ? tile_.last_values : tile_.slopes[l];
    for_each_pair([&](int row, int chain, int j, int i) {
      float kept[2], factors[2];
      const float weight = at(tile_.last_weights)[existing_row(mlp_.depth, row)];
      COOPFLOW_UNROLL
      for (int c = 0; c < 2; ++c) {
        const float value = sums[j][i + c], slope = slopes[j][i + c];
        kept[c] = is_last ? value : slope;
        factors[c] = is_last ? weight * slope : value;
      }
      store_shared(kept, unit(kept_at, row, chain));
      store_factors(l, row < mlp_.sizes[l + 1], row, chain, factors);
    });
  }

  __device__ __forceinline__ float* unit(int offset, int row, int chain) const {
    return at(offset) + row * tile_.unit_stride + chain;
  }

  // For the next product; zero for a unit that does not exist.
  __device__ __forceinline__ void store_factors(int parity, bool exists, int row, int chain,
                                                const float (&factors)[2]) const {
    bfloat16 pair[2];
    from_arithmetic_pair<bfloat16>(exists ? factors[0] : 0.0f, exists ? factors[1] : 0.0f, pair);
    bfloat16* const to = halves_at(tile_.factors[parity % 2]) + chain * tile_.factor_stride + row;
    to[0] = pair[0];
    to[tile_.factor_stride] = pair[1];
  }

  // The gradients of layer l before its activation, given those of layer l + 1: for the next
  // product, and those of the first layer in float32 in the place of its slopes.
  __device__ __forceinline__ void backward_layer(int l) const {
    if (first_row_ < mlp_.sizes[l]) {
      Sums sums = {};
      multiply<true>(l, l, mlp_.sizes[l + 1], sums);
      for_each_pair([&](int row, int chain, int j, int i) {
        float* const slopes = unit(tile_.slopes[l - 1], row, chain);
        float gradients[2];
        load_shared(slopes, gradients);
        gradients[0] *= sums[j][i];
        gradients[1] *= sums[j][i + 1];
        if (l == 1) {
          store_shared(gradients, slopes);
        } else {
          store_factors(l - 1, row < mlp_.sizes[l], row, chain, gradients);
        }
      });
    }
    __syncthreads();
  }

  // x's gradient. A warp takes four elements of eight chains at a time; each quarter of its lanes
  // sums over every fourth unit, so that a short state keeps many threads at work.
  __device__ __forceinline__ void first_layer_gradient() const {
    constexpr int kParts = 4;
    const int part = lane_ / 8, column_groups = tile_.chains / 8;
    const int blocks = round_up_4(mlp_.sizes[0]) / 4 * column_groups;
    for (int block = warp_; block < blocks; block += warps_) {
      const int first = block / column_groups * 4;
      const int chain = block % column_groups * 8 + lane_ % 8;
      float sums[4] = {};
      COOPFLOW_UNROLL_4
      for (int k = part; k < mlp_.sizes[1]; k += kParts) {
        float w[4];
        load_shared(at(tile_.first_weights) + k * tile_.first_stride + first, w);
        const float gradient = *unit(tile_.slopes[0], k, chain);
        COOPFLOW_UNROLL
        for (int e = 0; e < 4; ++e) sums[e] = multiply_add(w[e], gradient, sums[e]);
      }
      float own = 0.0f;
      COOPFLOW_UNROLL
      for (int e = 0; e < 4; ++e) {
        sums[e] += __shfl_xor_sync(0xFFFFFFFFu, sums[e], 8);
        sums[e] += __shfl_xor_sync(0xFFFFFFFFu, sums[e], 16);
        own = part == e ? sums[e] : own;
      }
      if (first + part < mlp_.sizes[0]) {
        at(tile_.grad)[chain * tile_.chain_stride + first + part] = own;
      }
    }
    __syncthreads();
  }

  const Mlp<float>& mlp_;
  const MlpBfloat16Tile& tile_;
  float* const memory_;
  int lane_, warp_, warps_, first_row_, first_chain_;
};

}  // namespace coopflow
