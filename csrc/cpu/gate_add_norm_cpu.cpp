// gate_add_norm and its derivative on the CPU.
#include <vector>

#include "chunks.h"
#include "gate_add_norm_loops.h"
#include "ops/gate_add_norm_op.h"

namespace coopflow {
namespace {

struct CpuGateAddNorm {
  template <typename T>
  static void run(const GateAddNormArgs<arithmetic_t<T>>& args, const Tensor& /*x*/) {
    const GateAddNormLoops<T> loops = COOPFLOW_SELECT_ISA(gate_add_norm_loops<T>());
    torch::stable::parallel_for(0, args.rows, divide_up(kGrain, args.channels),
                                [&](int64_t begin, int64_t end) {
                                  loops.forward(args, scratch<T>(args.channels).data(), begin, end);
                                });
  }

  template <typename T>
  static void run_backward(const GateAddNormBackwardArgs<arithmetic_t<T>>& args,
                           arithmetic_t<T>* grad_parameters, const Tensor& /*x*/) {
    const GateAddNormLoops<T> loops = COOPFLOW_SELECT_ISA(gate_add_norm_loops<T>());
    const int64_t parts = divide_up(args.rows, kGateAddNormRows);
    torch::stable::parallel_for(0, parts, divide_up(kGrain, kGateAddNormRows * args.channels),
                                [&](int64_t begin, int64_t end) {
                                  loops.backward(args, scratch<T>(args.channels).data(), begin,
                                                 end);
                                });
    if (parts > 1) sum_parts(args.partial_sums, parts, 2 * args.channels, grad_parameters);
  }

 private:
  template <typename T>
  static std::vector<arithmetic_t<T>> scratch(int64_t channels) {
    return std::vector<arithmetic_t<T>>(kGateAddNormScratch * kGateAddNormBlock * channels);
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CPU, m) {
  using Cpu = coopflow::CpuGateAddNorm;
  m.impl("gate_add_norm", TORCH_BOX(&coopflow::gate_add_norm<Cpu>));
  m.impl("gate_add_norm_backward", TORCH_BOX(&coopflow::gate_add_norm_backward<Cpu>));
}
