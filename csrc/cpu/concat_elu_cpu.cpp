// concat_elu and its derivative on the CPU.
#include "chunks.h"
#include "concat_elu_loops.h"
#include "ops/concat_elu_op.h"

namespace coopflow {
namespace {

struct CpuConcatElu {
  template <typename T>
  static void run(const ConcatEluArgs<arithmetic_t<T>>& args, const Tensor& /*x*/) {
    const ConcatEluLoops<T> loops = COOPFLOW_SELECT_ISA(concat_elu_loops<T>());
    parallel_blocks(args.shape,
                    [&](int64_t begin, int64_t end) { loops.forward(args, begin, end); });
  }

  template <typename T>
  static void run_backward(const ConcatEluBackwardArgs<arithmetic_t<T>>& args,
                           const Tensor& /*y*/) {
    const ConcatEluLoops<T> loops = COOPFLOW_SELECT_ISA(concat_elu_loops<T>());
    parallel_blocks(args.shape,
                    [&](int64_t begin, int64_t end) { loops.backward(args, begin, end); });
  }

 private:
  template <typename F>
  static void parallel_blocks(const ConcatEluShape& shape, const F& f) {
    const ConcatEluBlocks blocks(shape);
    torch::stable::parallel_for(0, blocks.count,
                                divide_up(kGrain, blocks.channels * blocks.positions), f);
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CPU, m) {
  m.impl("concat_elu", TORCH_BOX(&coopflow::concat_elu<coopflow::CpuConcatElu>));
  m.impl("concat_elu_backward", TORCH_BOX(&coopflow::concat_elu_backward<coopflow::CpuConcatElu>));
}
