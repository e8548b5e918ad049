// mlp_langevin_chain and mlp_mala_chain on CUDA: a block keeps the network and a tile of chains in
// its shared memory for all steps.
#include <string>

#include "coopflow/mala.h"
#include "coopflow/mlp.h"
#include "coopflow/mlp_tile.h"
#include "dynamic_shared.cuh"
#include "launch.cuh"
#include "mlp_bfloat16.cuh"
#include "ops/mlp_op.h"
#include "shared_access.cuh"

namespace coopflow {
namespace {

// A warp computes 16 rows of a product for all chains of the tile: 4 groups of lanes by rows, 8 by
// chains. A thread has 4 rows and kChains chains.
constexpr int kRows = 4;
constexpr int kRowGroups = 4;
constexpr int kChainGroups = kWarp / kRowGroups;
constexpr int kWarpRows = kRows * kRowGroups;
constexpr int kMaxThreads = kWarp * static_cast<int>(kMlpMaxSize) / kWarpRows;

// The network and the chains of one block, in float32.
template <int kChains>
class BlockNetwork {
 public:
  static constexpr int kTile = kChains * kChainGroups;
  using Sums = float[kRows][kChains];

  __device__ __forceinline__ BlockNetwork(const Mlp<float>& mlp, const MlpTile& tile)
      : mlp_(mlp), tile_(tile), memory_(dynamic_shared_floats()) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    row_group_ = lane / kChainGroups;
    first_chain_ = lane % kChainGroups * kChains;
  }

  __device__ __forceinline__ float* at(int offset) const { return memory_ + offset; }

  // A barrier must follow.
  __device__ __forceinline__ void load_parameters() const {
    const int depth = mlp_.depth;
    for (int l = 0; l < depth; ++l) {
      const int n_in = mlp_.sizes[l], n_out = mlp_.sizes[l + 1], stride = tile_.strides[l];
      for (int i = threadIdx.x; i < n_out * stride; i += blockDim.x) {
        const int row = i / stride, k = i - row * stride;
        at(tile_.weights[l])[i] = k < n_in ? mlp_.weights[l][row * n_in + k] : 0.0f;
      }
      copy(mlp_.biases[l], n_out, at(tile_.biases[l]));
    }
    copy(mlp_.weights[depth], mlp_.sizes[depth], at(tile_.last_weights));
    copy(mlp_.biases[depth], 1, at(tile_.last_bias));
  }

  // From x, the gradient of every chain's energy, and the last layer's values. Ends with a barrier.
  __device__ __forceinline__ void gradient() const {
    const int depth = mlp_.depth;
    forward_layer(0, [&](int k, float (&h)[kChains]) {
      COOPFLOW_UNROLL
      for (int c = 0; c < kChains; ++c) {
        h[c] = at(tile_.x)[(first_chain_ + c) * tile_.chain_stride + k];
      }
    });
    for (int l = 1; l < depth; ++l) {
      const float* const from = at(tile_.values[(l - 1) % 2]) + first_chain_;
      forward_layer(l, [&](int k, float (&h)[kChains]) { load_shared(from + k * kTile, h); });
    }
    for (int l = depth - 1; l > 0; --l) {
      float* const slopes = at(tile_.slopes[l - 1]) + first_chain_;
      backward_layer(l, [&](int row, const float (&sums)[kChains]) {
        float gradients[kChains];
        load_shared(slopes + row * kTile, gradients);
        COOPFLOW_UNROLL
        for (int c = 0; c < kChains; ++c) gradients[c] = sums[c] * gradients[c];
        store_shared(gradients, slopes + row * kTile);
      });
    }
    backward_layer(0, [&](int row, const float (&sums)[kChains]) {
      COOPFLOW_UNROLL
      for (int c = 0; c < kChains; ++c) {
        at(tile_.grad)[(first_chain_ + c) * tile_.chain_stride + row] = sums[c];
      }
    });
  }

  // The energy of one chain of the tile, after gradient().
  __device__ __forceinline__ float energy(int chain) const {
    const float* const values = at(tile_.values[(mlp_.depth - 1) % 2]) + chain;
    float sum = *at(tile_.last_bias);
    for (int i = 0; i < mlp_.sizes[mlp_.depth]; ++i) {
      sum = multiply_add(at(tile_.last_weights)[i], values[i * kTile], sum);
    }
    return sum;
  }

 private:
  __device__ __forceinline__ static void copy(const float* from, int count, float* to) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
  }

  // Calls f(first row) for the 16 rows of this thread's warp, and again while there are rows.
  template <typename F>
  __device__ __forceinline__ void for_each_block(int rows, const F& f) const {
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    for (int first = warp * kWarpRows; first < rows; first += warps * kWarpRows) f(first);
  }

  // Values of layer l + 1 and the slopes of its activations, times the last weights where the
  // layer is the last. load(k, h) gives the layer's input. A thread's rows lie kRowGroups apart.
  template <typename Load>
  __device__ __forceinline__ void forward_layer(int l, const Load& load) const {
    const int rows = mlp_.sizes[l + 1], stride = tile_.strides[l];
    const float* const weights = at(tile_.weights[l]);
    for_each_block(rows, [&](int first) {
      Sums sums;
      const float* row_weights[kRows];
      COOPFLOW_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const int row = existing_row(first, r, rows);
        row_weights[r] = weights + row * stride;
        const float bias = at(tile_.biases[l])[row];
        COOPFLOW_UNROLL
        for (int c = 0; c < kChains; ++c) sums[r][c] = bias;
      }
      COOPFLOW_UNROLL_4
      for (int k = 0; k < mlp_.sizes[l]; k += 4) {
        float w[kRows][4], h[4][kChains];
        COOPFLOW_UNROLL
        for (int r = 0; r < kRows; ++r) load_shared(row_weights[r] + k, w[r]);
        COOPFLOW_UNROLL
        for (int j = 0; j < 4; ++j) load(k + j, h[j]);
        COOPFLOW_UNROLL
        for (int j = 0; j < 4; ++j) {
          COOPFLOW_UNROLL
          for (int r = 0; r < kRows; ++r) {
            COOPFLOW_UNROLL
            for (int c = 0; c < kChains; ++c)
              sums[r][c] = multiply_add(w[r][j], h[j][c], sums[r][c]);
          }
        }
      }
      activate_rows(l, first, sums);
    });
    __syncthreads();
  }

  // Row r of a thread in a forward layer; the last one where that does not exist.
  __device__ __forceinline__ int existing_row(int first, int r, int rows) const {
    const int row = first + row_group_ + r * kRowGroups;
    return row < rows ? row : rows - 1;
  }

  __device__ __forceinline__ void activate_rows(int l, int first, Sums& sums) const {
    const int rows = mlp_.sizes[l + 1];
    const bool is_last = l + 1 == mlp_.depth;
    float* const values = at(tile_.values[l % 2]) + first_chain_;
    float* const slopes = at(tile_.slopes[l]) + first_chain_;
    Sums factors;
    with_activation(mlp_.activation, [&](auto tag) {
      COOPFLOW_UNROLL
      for (int r = 0; r < kRows; ++r) {
        COOPFLOW_UNROLL
        for (int c = 0; c < kChains; ++c) {
          const ActivationResult<float> result =
              activate<decltype(tag)::value>(mlp_.parameters, sums[r][c]);
          sums[r][c] = result.value;
          factors[r][c] = result.slope;
        }
      }
    });
    COOPFLOW_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int row = first + row_group_ + r * kRowGroups;
      if (row < rows) {
        if (is_last) {
          const float weight = at(tile_.last_weights)[row];
          COOPFLOW_UNROLL
          for (int c = 0; c < kChains; ++c) factors[r][c] = weight * factors[r][c];
        }
        store_shared(sums[r], values + row * kTile);
        store_shared(factors[r], slopes + row * kTile);
      } else if (row < round_up_4(rows)) {  // the next layer reads units by fours
        const float zeros[kChains] = {};
        store_shared(zeros, values + row * kTile);
      }
    }
  }

  // Calls store(row, sums) with the gradients of layer l before its activation, given those of
  // layer l + 1. A thread's rows are neighbours.
  template <typename Store>
  __device__ __forceinline__ void backward_layer(int l, const Store& store) const {
    const int rows = mlp_.sizes[l], stride = tile_.strides[l];
    const float* const gradients = at(tile_.slopes[l]) + first_chain_;
    for_each_block(rows, [&](int first) {
      const int first_row = first + row_group_ * kRows;
      if (first_row >= rows) return;
      const float* const weights = at(tile_.weights[l]) + first_row;
      Sums sums = {};
      COOPFLOW_UNROLL_4
      for (int k = 0; k < mlp_.sizes[l + 1]; ++k) {
        float w[kRows], g[kChains];
        load_shared(weights + k * stride, w);
        load_shared(gradients + k * kTile, g);
        COOPFLOW_UNROLL
        for (int r = 0; r < kRows; ++r) {
          COOPFLOW_UNROLL
          for (int c = 0; c < kChains; ++c) sums[r][c] = multiply_add(w[r], g[c], sums[r][c]);
        }
      }
      COOPFLOW_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (first_row + r < rows) store(first_row + r, sums[r]);
      }
    });
    __syncthreads();
  }

  const Mlp<float>& mlp_;
  const MlpTile& tile_;
  float* const memory_;
  int row_group_, first_chain_;
};

// The normals of step k for the tile of chains from `first` on, by all threads.
__device__ __forceinline__ void fill_noise(const ChainArgs<float>& args, const ChainTile& tile,
                                           int64_t first, int64_t k, float* xi) {
  const int per_chain = static_cast<int>(args.per_chain);
  if (args.noise_source == NoiseSource::kPhilox) {
    const PhiloxKey key = make_philox_key(args.rng[0]);
    const uint32_t time = args.noise_time(k);
    for (int i = threadIdx.x; i < tile.chains * round_up_4(per_chain) / 4; i += blockDim.x) {
      const int quad = i / tile.chains, chain = i - quad * tile.chains;
      const Quad<float> z = normals_from_words<float>(
          noise_words(key, args.rng[2] + first + chain, time, static_cast<uint32_t>(quad)));
      float* const to = xi + chain * tile.chain_stride + 4 * quad;
      to[0] = z.v0;
      to[1] = z.v1;
      to[2] = z.v2;
      to[3] = z.v3;
    }
    return;
  }
  for (int i = threadIdx.x; i < tile.chains * per_chain; i += blockDim.x) {
    const int chain = i / per_chain, e = i - chain * per_chain;
    const bool given = args.noise_source == NoiseSource::kGiven && first + chain < args.batch;
    xi[chain * tile.chain_stride + e] =
        given ? args.xi[(k * args.batch + first + chain) * args.per_chain + e] : 0.0f;
  }
}

// The chains of a tile, as one of its first threads sees its own: which exist is in `count`, 1 or
// 0.
__device__ __forceinline__ ChainLanes<float, 1> thread_chain(const ChainTile& tile, float* memory,
                                                             int64_t first, int64_t batch) {
  const int own = static_cast<int>(threadIdx.x), offset = own * tile.chain_stride;
  ChainLanes<float, 1> lanes{};
  lanes.first = first + own;
  lanes.count = first + own < batch ? 1 : 0;
  lanes.x = memory + tile.x + offset;
  lanes.grad = memory + tile.grad + offset;
  lanes.x_ref = memory + tile.x_ref + offset;
  lanes.xi = memory + tile.xi + offset;
  lanes.norm_scale[0] = lanes.active[0] = 1.0f;
  return lanes;
}

// A chain's vector, and zeros behind it up to a multiple of four, which the first layer reads; that
// of a chain that does not exist is zero.
__device__ __forceinline__ void load_padded(const float* from, const ChainLanes<float, 1>& lanes,
                                            int per_chain, float* to) {
  for (int e = 0; e < round_up_4(per_chain); ++e) {
    to[e] = lanes.count > 0 && e < per_chain ? from[lanes.first * per_chain + e] : 0.0f;
  }
}

__device__ __forceinline__ void load_chain(const LangevinChainArgs<float>& args,
                                           const ChainLanes<float, 1>& lanes) {
  const int per_chain = static_cast<int>(args.per_chain);
  load_padded(args.x0, lanes, per_chain, lanes.x);
  if (args.x_ref != nullptr) load_padded(args.x_ref, lanes, per_chain, lanes.x_ref);
  if (lanes.count > 0) args.frozen_at[lanes.first] = args.step + args.n_steps;
}

// All tiles of a block. One thread a chain of the tile moves it; all compute its gradient.
template <bool kFull, typename Network>
__device__ __forceinline__ void run_tiles(const LangevinChainArgs<float>& args,
                                          const ChainTile& tile, const Network& network) {
  const bool moves = static_cast<int>(threadIdx.x) < tile.chains;
  const int64_t state_size = args.batch * args.per_chain;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * tile.chains;
  network.load_parameters();
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * tile.chains; first < args.batch;
       first += stride) {
    ChainLanes<float, 1> lanes = thread_chain(tile, network.at(0), first, args.batch);
    if (moves) load_chain(args, lanes);
    for (int64_t k = 0; k < args.n_steps; ++k) {
      __syncthreads();  // x has moved
      fill_noise(args, tile, first, k, network.at(tile.xi));
      network.gradient();
      if (!moves || lanes.count == 0) continue;
      if (k == 0 || args.coefficients_vary()) load_coefficients(args, k, lanes);
      if (kFull && args.stats != nullptr) {
        lanes.energy[0] = network.energy(static_cast<int>(threadIdx.x));
      }
      move_lanes<kFull>(args, k, args.per_chain, lanes);
      const int64_t row = args.trajectory_row(k);
      if (row >= 0) {
        store_lanes(lanes.x, lanes, args.per_chain, args.trajectory + row * state_size);
      }
    }
    if (moves) store_lanes(lanes.x, lanes, args.per_chain, args.x_out);
  }
}

// The uniform that accepts step k of a chain.
__device__ __forceinline__ float uniform_of(const MalaChainArgs<float>& args, int64_t k,
                                            int64_t chain) {
  const PhiloxKey key = make_philox_key(args.accept_rng[0]);
  return mala_uniform<float>(
      noise_words(key, args.accept_rng[2] + chain, args.accept_time(k), 0).w0);
}

// All tiles of a block, of chains that accept their moves. Their proposals lie where the network
// reads x.
template <typename Network>
__device__ __forceinline__ void run_mala_tiles(const MalaChainArgs<float>& args,
                                               const ChainTile& tile, const Network& network) {
  const bool has_chain = static_cast<int>(threadIdx.x) < tile.chains;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * tile.chains;
  network.load_parameters();
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * tile.chains; first < args.batch;
       first += stride) {
    MalaLanes<float, 1> lanes(thread_chain(tile, network.at(0), first, args.batch));
    const bool moves = has_chain && lanes.proposal.count > 0;
    if (has_chain) {
      load_padded(args.x0, lanes.proposal, static_cast<int>(args.per_chain), lanes.proposal.x);
    }
    // Before the first step the start itself is evaluated.
    for (int64_t k = -1; k < args.n_steps; ++k) {
      if (k >= 0) {
        __syncthreads();  // the proposals before were accepted or not
        fill_noise(args, tile, first, k, network.at(tile.x));
        __syncthreads();
        if (moves) propose_lanes(args, k, args.per_chain, lanes);
      }
      __syncthreads();
      network.gradient();
      if (!moves) continue;
      lanes.proposal.energy[0] = network.energy(static_cast<int>(threadIdx.x));
      if (k < 0) {
        start_lanes(args, args.per_chain, lanes);
        continue;
      }
      const float uniform[1] = {uniform_of(args, k, lanes.proposal.first)};
      accept_lanes(args, k, args.per_chain, uniform, lanes);
      record_lanes(args, k, args.per_chain, lanes.proposal, lanes.x);
    }
    if (moves) finish_lanes(args, args.per_chain, lanes);
  }
}

template <bool kFull, int kChains>
__global__ void __launch_bounds__(kMaxThreads)
    mlp_chain_kernel(const __grid_constant__ LangevinChainArgs<float> args,
                     const __grid_constant__ Mlp<float> mlp, const __grid_constant__ MlpTile tile) {
  run_tiles<kFull>(args, tile, BlockNetwork<kChains>(mlp, tile));
}

// kColumns is 1 for tiles of 8 chains and 2 for others, where two warps may have the same rows.
// Shared memory has room for few blocks: told so, ptxas does not spill to save registers.
template <int kColumns>
constexpr int kMaxTensorCoreThreads = kMaxThreads * kColumns;

template <bool kFull, int kColumns>
__global__ void __launch_bounds__(kMaxTensorCoreThreads<kColumns>, 1)
    mlp_bfloat16_chain_kernel(const __grid_constant__ LangevinChainArgs<float> args,
                              const __grid_constant__ Mlp<float> mlp,
                              const __grid_constant__ MlpBfloat16Tile tile) {
  run_tiles<kFull>(args, tile, TensorCoreNetwork<kColumns>(mlp, tile));
}

// Two blocks leave each thread 128 registers; without this number some would be spilled.
template <int kChains>
__global__ void __launch_bounds__(kMaxThreads, 2)
    mlp_mala_kernel(const __grid_constant__ MalaChainArgs<float> args,
                    const __grid_constant__ Mlp<float> mlp, const __grid_constant__ MlpTile tile) {
  run_mala_tiles(args, tile, BlockNetwork<kChains>(mlp, tile));
}

// Of the hidden layers and the state.
int widest(const Mlp<float>& mlp) {
  const int hidden = widest_hidden(mlp.sizes, mlp.depth);
  return mlp.sizes[0] > hidden ? mlp.sizes[0] : hidden;
}

template <auto kKernel, typename Args, typename Tile>
void launch_tiles(const Args& args, const Mlp<float>& mlp, const Tile& tile, int warps,
                  const Tensor& x0) {
  launch_with_memory<kKernel>(x0, divide_up(args.batch, tile.chains), kWarp * warps, tile.bytes(),
                              args, mlp, tile);
}

template <int kChains>
void launch_float32(const LangevinChainArgs<float>& args, const Mlp<float>& mlp,
                    const MlpTile& tile, int warps, const Tensor& x0) {
  if (args.is_plain()) {
    launch_tiles<mlp_chain_kernel<false, kChains>>(args, mlp, tile, warps, x0);
  } else {
    launch_tiles<mlp_chain_kernel<true, kChains>>(args, mlp, tile, warps, x0);
  }
}

template <int kChains>
void launch_float32(const MalaChainArgs<float>& args, const Mlp<float>& mlp, const MlpTile& tile,
                    int warps, const Tensor& x0) {
  launch_tiles<mlp_mala_kernel<kChains>>(args, mlp, tile, warps, x0);
}

template <int kColumns>
void launch_bfloat16(const LangevinChainArgs<float>& args, const Mlp<float>& mlp,
                     const MlpBfloat16Tile& tile, const Tensor& x0) {
  const int warps = TensorCoreNetwork<kColumns>::warps(widest(mlp), tile);
  if (args.is_plain()) {
    launch_tiles<mlp_bfloat16_chain_kernel<false, kColumns>>(args, mlp, tile, warps, x0);
  } else {
    launch_tiles<mlp_bfloat16_chain_kernel<true, kColumns>>(args, mlp, tile, warps, x0);
  }
}

// The tile for a batch on the device of x0.
template <typename Tile>
Tile tile_for(const OpChecks& check, const Mlp<float>& mlp, int64_t batch, const Tensor& x0) {
  const int device = x0.get_device_index();
  const int64_t available = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const Tile tile =
      choose_mlp_tile<Tile>(mlp.sizes, mlp.depth, batch,
                            device_attribute(cudaDevAttrMultiProcessorCount, device), available);
  if (tile.bytes() > available) {
    check.fail("weights", "a tile of ", tile.chains, " chains needs ", tile.bytes(),
               " bytes of shared memory, and there are ", available);
  }
  return tile;
}

struct CudaMlp {
  // Chains of either kind.
  template <typename Args, typename A>
  static void run(const OpChecks& check, const Args& args, const Mlp<A>& mlp, const Tensor& x0) {
    if constexpr (std::is_same_v<A, double>) {
      check.fail_type("x0", "must have dtype float32 on CUDA, got dtype float64");
    } else {
      if constexpr (std::is_same_v<Args, LangevinChainArgs<float>>) {  // MALA's are in float32
        if (has_bfloat16_products(mlp.bfloat16, mlp.depth)) {
          const auto tile = tile_for<MlpBfloat16Tile>(check, mlp, args.batch, x0);
          if (tile.chains == 8) return launch_bfloat16<1>(args, mlp, tile, x0);
          return launch_bfloat16<2>(args, mlp, tile, x0);
        }
      }
      const auto tile = tile_for<MlpTile>(check, mlp, args.batch, x0);
      const int warps = static_cast<int>(divide_up(widest(mlp), kWarpRows));
      if (tile.chains == 8) return launch_float32<1>(args, mlp, tile, warps, x0);
      if (tile.chains == 16) return launch_float32<2>(args, mlp, tile, warps, x0);
      launch_float32<4>(args, mlp, tile, warps, x0);
    }
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CUDA, m) {
  m.impl("mlp_langevin_chain", TORCH_BOX(&coopflow::mlp_langevin_chain<coopflow::CudaMlp>));
  m.impl("mlp_mala_chain", TORCH_BOX(&coopflow::mlp_mala_chain<coopflow::CudaMlp>));
}
