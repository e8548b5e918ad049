// weight_norm and its derivative on CUDA: a warp a row. A launch has the pointers of many layers in
// its parameters, so that nothing is copied to the device before it.
#include <vector>

#include "items.cuh"
#include "launch.cuh"
#include "ops/weight_norm_op.h"
#include "team.cuh"

namespace coopflow {
namespace {

constexpr int kTableLayers = 60;

template <typename Layer>
struct LayerTable {
  Layer layers[kTableLayers];
  int64_t first_rows[kTableLayers];
  int64_t count, rows;
};
static_assert(sizeof(LayerTable<WeightNormBackwardLayer>) <= 4096, "parameters of a launch");

// Calls f(layer, its row) for the rows of this thread's warp.
template <typename Layer, typename F>
__device__ __forceinline__ void for_each_row(const LayerTable<Layer>& table, const F& f) {
  for (int64_t row = team_index<WarpTeam>(); row < table.rows; row += team_count<WarpTeam>()) {
    const int64_t l = layer_of_row(table.first_rows, table.count, row);
    const Layer layer = table.layers[l];
    f(layer, row - table.first_rows[l]);
  }
}

template <typename T>
__device__ __forceinline__ arithmetic_t<T> gain_of(const void* gains, int64_t row) {
  return to_arithmetic(static_cast<const T*>(gains)[row]);
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    weight_norm_kernel(const __grid_constant__ LayerTable<WeightNormLayer> table) {
  using A = arithmetic_t<T>;
  constexpr int kCount = kItem<T>;
  for_each_row(table, [](const WeightNormLayer& layer, int64_t row) {
    const int64_t first = row * layer.per_row;
    A sums[1] = {};
    for_each_item_of_row<kCount>(layer.per_row, [&](int64_t e, int n) {
      A v[kCount];
      load_item<T, kVec>(layer.direction, first + e, n, v);
      COOPFLOW_UNROLL
      for (int i = 0; i < kCount; ++i) sums[0] = multiply_add(v[i], v[i], sums[0]);
    });
    warp_sum(sums);
    const A factor = weight_norm_factor(gain_of<T>(layer.gain, row), sums[0]);
    for_each_item_of_row<kCount>(layer.per_row, [&](int64_t e, int n) {
      A v[kCount], w[kCount];
      load_item<T, kVec>(layer.direction, first + e, n, v);
      COOPFLOW_UNROLL
      for (int i = 0; i < kCount; ++i) w[i] = v[i] * factor;
      store_item<T, kVec>(w, first + e, n, layer.weight);
    });
  });
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    weight_norm_backward_kernel(const __grid_constant__ LayerTable<WeightNormBackwardLayer> table) {
  using A = arithmetic_t<T>;
  constexpr int kCount = kItem<T>;
  for_each_row(table, [](const WeightNormBackwardLayer& layer, int64_t row) {
    const int64_t first = row * layer.per_row;
    A sums[2] = {};
    for_each_item_of_row<kCount>(layer.per_row, [&](int64_t e, int n) {
      A v[kCount], grad[kCount];
      load_item<T, kVec>(layer.direction, first + e, n, v);
      load_item<T, kVec>(layer.grad_weight, first + e, n, grad);
      COOPFLOW_UNROLL
      for (int i = 0; i < kCount; ++i) {
        sums[0] = multiply_add(v[i], v[i], sums[0]);
        sums[1] = multiply_add(v[i], grad[i], sums[1]);
      }
    });
    warp_sum(sums);
    const WeightNormGradient<A> gradient =
        weight_norm_gradient(gain_of<T>(layer.gain, row), sums[0], sums[1]);
    if (team_rank<WarpTeam>() == 0) {
      static_cast<T*>(layer.grad_gain)[row] = from_arithmetic<T>(gradient.gain);
    }
    for_each_item_of_row<kCount>(layer.per_row, [&](int64_t e, int n) {
      A v[kCount], grad[kCount], out[kCount];
      load_item<T, kVec>(layer.direction, first + e, n, v);
      load_item<T, kVec>(layer.grad_weight, first + e, n, grad);
      COOPFLOW_UNROLL
      for (int i = 0; i < kCount; ++i) out[i] = direction_gradient(gradient, grad[i], v[i]);
      store_item<T, kVec>(out, first + e, n, layer.grad_direction);
    });
  });
}

template <typename T>
bool can_pack_layer(const WeightNormLayer& layer) {
  return can_pack<T>(layer.per_row, {layer.direction, layer.weight});
}

template <typename T>
bool can_pack_layer(const WeightNormBackwardLayer& layer) {
  return can_pack<T>(layer.per_row, {layer.grad_weight, layer.direction, layer.grad_direction});
}

// A table at a time.
template <auto kKernel, typename Layer>
void launch_layers(const std::vector<Layer>& layers, const Tensor& like) {
  for (std::size_t begin = 0; begin < layers.size(); begin += kTableLayers) {
    LayerTable<Layer> table{};
    for (std::size_t l = begin; l < layers.size() && l < begin + kTableLayers; ++l) {
      table.layers[table.count] = layers[l];
      table.first_rows[table.count++] = table.rows;
      table.rows += layers[l].rows;
    }
    launch<kKernel>(like, divide_up(table.rows, kTeamsPerBlock<WarpTeam>), kBlockThreads, table);
  }
}

// Those of packed accesses and the others.
template <auto kPackedKernel, auto kKernel, typename T, typename Layer>
void launch_both_kinds(const std::vector<Layer>& layers, const Tensor& like) {
  std::vector<Layer> packed, others;
  for (const Layer& layer : layers) (can_pack_layer<T>(layer) ? packed : others).push_back(layer);
  launch_layers<kPackedKernel>(packed, like);
  launch_layers<kKernel>(others, like);
}

struct CudaWeightNorm {
  template <typename T>
  static void run(const std::vector<WeightNormLayer>& layers, const Tensor& like) {
    launch_both_kinds<weight_norm_kernel<T, kItem<T>>, weight_norm_kernel<T, 1>, T>(layers, like);
  }

  template <typename T>
  static void run(const std::vector<WeightNormBackwardLayer>& layers, const Tensor& like) {
    launch_both_kinds<weight_norm_backward_kernel<T, kItem<T>>, weight_norm_backward_kernel<T, 1>,
                      T>(layers, like);
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CUDA, m) {
  using Cuda = coopflow::CudaWeightNorm;
  m.impl("weight_norm", TORCH_BOX(&coopflow::weight_norm<Cuda>));
  m.impl("weight_norm_backward", TORCH_BOX(&coopflow::weight_norm_backward<Cuda>));
}
