// weight_norm and its derivative on the CPU.
#include <algorithm>

#include "chunks.h"
#include "ops/weight_norm_op.h"
#include "weight_norm_loops.h"

namespace coopflow {
namespace {

// Shares the rows of all layers among threads.
template <typename Layer>
void parallel_rows(const std::vector<Layer>& layers,
                   void (*loop)(const LayerRows<Layer>&, int64_t, int64_t)) {
  std::vector<int64_t> first_rows;
  first_rows.reserve(layers.size());
  int64_t rows = 0, elements = 0;
  for (const Layer& layer : layers) {
    first_rows.push_back(rows);
    rows += layer.rows;
    elements += layer.rows * layer.per_row;
  }
  const LayerRows<Layer> all{layers.data(), first_rows.data(), static_cast<int64_t>(layers.size())};
  const int64_t per_row = std::max<int64_t>(1, elements / rows);  // on average
  torch::stable::parallel_for(0, rows, divide_up(kGrain, per_row),
                              [&](int64_t begin, int64_t end) { loop(all, begin, end); });
}

struct CpuWeightNorm {
  template <typename T>
  static void run(const std::vector<WeightNormLayer>& layers, const Tensor& /*like*/) {
    const WeightNormLoops<T> loops = COOPFLOW_SELECT_ISA(weight_norm_loops<T>());
    parallel_rows(layers, loops.forward);
  }

  template <typename T>
  static void run(const std::vector<WeightNormBackwardLayer>& layers, const Tensor& /*like*/) {
    const WeightNormLoops<T> loops = COOPFLOW_SELECT_ISA(weight_norm_loops<T>());
    parallel_rows(layers, loops.backward);
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CPU, m) {
  using Cpu = coopflow::CpuWeightNorm;
  m.impl("weight_norm", TORCH_BOX(&coopflow::weight_norm<Cpu>));
  m.impl("weight_norm_backward", TORCH_BOX(&coopflow::weight_norm_backward<Cpu>));
}
