// mlp_langevin_chain on the CPU.
#include <vector>

#include "mlp_loops.h"
#include "ops/mlp_op.h"

namespace coopflow {
namespace {

// matrix(row, k) of (rows, length), as the loops read it.
template <typename A, typename F>
std::vector<A> pack_matrix(int rows, int length, int block_rows, const F& matrix) {
  std::vector<A> packed(divide_up(rows, block_rows) * block_rows * length, A(0));
  for (int row = 0; row < rows; ++row) {
    A* const block = packed.data() + row / block_rows * block_rows * length;
    for (int k = 0; k < length; ++k) block[k * block_rows + row % block_rows] = matrix(row, k);
  }
  return packed;
}

template <typename A>
PackedMlp<A> pack_mlp(const Mlp<A>& mlp, int block_rows) {
  PackedMlp<A> packed;
  packed.mlp = mlp;
  for (int l = 0; l < mlp.depth; ++l) {
    const A* const weights = mlp.weights[l];
    const int n_in = mlp.sizes[l], n_out = mlp.sizes[l + 1];
    packed.weights[l] = pack_matrix<A>(n_out, n_in, block_rows,
                                       [=](int row, int k) { return weights[row * n_in + k]; });
    packed.transposed[l] = pack_matrix<A>(n_in, n_out, block_rows,
                                          [=](int row, int k) { return weights[k * n_in + row]; });
    packed.biases[l].assign(mlp.biases[l], mlp.biases[l] + n_out);
    packed.biases[l].resize(divide_up(n_out, block_rows) * block_rows);
  }
  return packed;
}

// Products for one thread before it pays to start another.
constexpr int64_t kGrain = 1 << 17;

struct CpuMlp {
  template <typename A>
  static void run(const LangevinChainArgs<A>& args, const Mlp<A>& mlp, const Tensor& /*x0*/) {
    const MlpLoops<A> loops = COOPFLOW_SELECT_ISA(mlp_loops<A>());
    const PackedMlp<A> packed = pack_mlp(mlp, loops.block_rows);
    int64_t products = 1;  // of a chain and a step
    for (int l = 0; l < mlp.depth; ++l) products += 2 * mlp.sizes[l] * mlp.sizes[l + 1];
    const int64_t work = loops.tile * products * (args.n_steps + 1);
    torch::stable::parallel_for(
        0, divide_up(args.batch, loops.tile), divide_up(kGrain, work),
        [&](int64_t begin, int64_t end) { loops.run_tiles(args, packed, begin, end); });
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CPU, m) {
  m.impl("mlp_langevin_chain", TORCH_BOX(&coopflow::mlp_langevin_chain<coopflow::CpuMlp>));
}
