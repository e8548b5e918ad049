// mlp_langevin_chain and mlp_mala_chain on the CPU.
#include <vector>

#include "mlp_loops.h"
#include "ops/mlp_op.h"

namespace coopflow {
namespace {

// A network as the loops read it, and the memory that it takes.
template <typename A>
class MlpPacker {
 public:
  MlpPacker(const Mlp<A>& mlp, int block_rows) : block_rows_(block_rows) {
    packed.mlp = mlp;
    for (int l = 0; l < mlp.depth; ++l) {
      const A* const weights = mlp.weights[l];
      const int n_in = mlp.sizes[l], n_out = mlp.sizes[l + 1];
      packed.weights[l] =
          pack(n_out, n_in, [=](int row, int k) { return weights[row * n_in + k]; });
      packed.transposed[l] =
          pack(n_in, n_out, [=](int row, int k) { return weights[k * n_in + row]; });
      packed.biases[l] = pack(n_out, 1, [&](int row, int) { return mlp.biases[l][row]; });
    }
  }

  PackedMlp<A> packed{};

 private:
  // matrix(row, k) of (rows, length).
  template <typename F>
  const A* pack(int rows, int length, const F& matrix) {
    storage_.emplace_back(divide_up(rows, block_rows_) * block_rows_ * length, A(0));
    A* const entries = storage_.back().data();
    for (int row = 0; row < rows; ++row) {
      A* const block = entries + row / block_rows_ * block_rows_ * length;
      for (int k = 0; k < length; ++k) block[k * block_rows_ + row % block_rows_] = matrix(row, k);
    }
    return entries;
  }

  int block_rows_;
  std::vector<std::vector<A>> storage_;
};

// Products for one thread before it pays to start another.
constexpr int64_t kGrain = 1 << 17;

struct CpuMlp {
  template <typename A>
  static void run(const OpChecks& /*check*/, const LangevinChainArgs<A>& args, const Mlp<A>& mlp,
                  const Tensor& /*x0*/) {
    run_tiles(args, mlp, &MlpLoops<A>::run_tiles);
  }

  template <typename A>
  static void run(const OpChecks& /*check*/, const MalaChainArgs<A>& args, const Mlp<A>& mlp,
                  const Tensor& /*x0*/) {
    run_tiles(args, mlp, &MlpLoops<A>::run_mala_tiles);
  }

 private:
  template <typename Args, typename A, typename Loop>
  static void run_tiles(const Args& args, const Mlp<A>& mlp, Loop MlpLoops<A>::* loop) {
    const MlpLoops<A> loops = COOPFLOW_SELECT_ISA(mlp_loops<A>());
    const MlpPacker<A> packer(mlp, loops.block_rows);
    int64_t products = 1;  // of a chain and a step
    for (int l = 0; l < mlp.depth; ++l) products += 2 * mlp.sizes[l] * mlp.sizes[l + 1];
    const int64_t work = loops.tile * products * (args.n_steps + 1);
    torch::stable::parallel_for(
        0, divide_up(args.batch, loops.tile), divide_up(kGrain, work),
        [&](int64_t begin, int64_t end) { (loops.*loop)(args, packer.packed, begin, end); });
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CPU, m) {
  m.impl("mlp_langevin_chain", TORCH_BOX(&coopflow::mlp_langevin_chain<coopflow::CpuMlp>));
  m.impl("mlp_mala_chain", TORCH_BOX(&coopflow::mlp_mala_chain<coopflow::CpuMlp>));
}
