// attention and its derivative on the CPU.
#include "attention_loops.h"
#include "coopflow/reduction.h"
#include "ops/attention_op.h"

namespace coopflow {
namespace {

// Scores for one thread before it pays to start another.
constexpr int64_t kGrain = 1 << 13;

struct CpuAttention {
  template <typename T>
  static void run(const AttentionArgs<arithmetic_t<T>>& args, const Tensor& /*q*/) {
    const AttentionLoops<T> loops = COOPFLOW_SELECT_ISA(attention_loops<T>());
    const AttentionShape& shape = args.shape;
    const int64_t tiles = divide_up(shape.length, kAttentionRows);
    torch::stable::parallel_for(
        0, shape.batch * shape.heads * tiles, divide_up(kGrain, kAttentionRows * shape.length),
        [&](int64_t begin, int64_t end) { loops.forward(args, begin, end); });
  }

  // A thread has whole heads, so that nothing is computed twice: every row adds to the gradients of
  // all keys and values.
  template <typename T>
  static void run_backward(const AttentionBackwardArgs<arithmetic_t<T>>& args,
                           const Tensor& /*lse*/) {
    const AttentionLoops<T> loops = COOPFLOW_SELECT_ISA(attention_loops<T>());
    const AttentionShape& shape = args.shape;
    torch::stable::parallel_for(
        0, shape.batch * shape.heads, divide_up(kGrain, shape.length * shape.length),
        [&](int64_t begin, int64_t end) { loops.backward(args, begin, end); });
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CPU, m) {
  m.impl("attention", TORCH_BOX(&coopflow::attention<coopflow::CpuAttention>));
  m.impl("attention_backward", TORCH_BOX(&coopflow::attention_backward<coopflow::CpuAttention>));
}
