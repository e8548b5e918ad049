// What the ops of whole MALA chains share: checks, a MalaChainArgs and the results.
#pragma once

#include <cmath>
#include <tuple>

#include "coopflow/mala.h"
#include "ops/langevin_chain_op.h"

namespace coopflow {

// The options that the schemas of these ops share (COOPFLOW_MALA_CHAIN_ARGS), in their order.
struct MalaChainOptions {
  int64_t n_steps;
  double step_size;
  OptionalTensor step_size_t;
  double temperature;
  int64_t adapt_steps;
  double target_accept;
  bool negative_energy;
  int64_t step;
  OptionalTensor xi;
  int64_t thin;  // 0: no trajectory
  bool stats;
};

// x, trajectory, stats, step_size, finite. What is not wanted has no rows.
using MalaChainResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

class MalaChainOp : public ChainOp {
 public:
  using ChainOp::ChainOp;

  bool has_chains() const { return batch_ > 0; }

  void check_options(const Tensor& rng, const Tensor& accept_rng, const MalaChainOptions& o) const {
    check_.is_rng(rng, x_);
    check_.is_rng(accept_rng, x_, "x0", "accept_rng");
    check_.noise_fits(per_chain_, o.step);
    check_steps(o);
    check_coefficient("step_size", o.step_size, o.step_size_t);
    if (!o.step_size_t) check_.is_positive("step_size", o.step_size);
    check_.is_finite("temperature", o.temperature, x_);
    check_.is_positive("temperature", o.temperature);
    if (o.adapt_steps < 0 || o.adapt_steps > o.n_steps) {
      check_.fail("adapt_steps", "must be in [0, n_steps = ", o.n_steps, "], got ", o.adapt_steps);
    }
    if (o.adapt_steps > 0 && o.step_size_t && o.step_size_t->size(0) > 1) {
      check_.fail("adapt_steps", "needs a step_size that is the same at every step");
    }
    if (!(o.target_accept > 0 && o.target_accept < 1)) {
      check_.fail("target_accept", "must be between 0 and 1, got ", o.target_accept);
    }
  }

  // Not yet filled: the kernel writes all of them.
  MalaChainResults results(const MalaChainOptions& o) const {
    return {empty_state(), empty_trajectory(o), empty_statistics(o, kMalaStatistics),
            empty({batch_}, x_.scalar_type()), empty({batch_}, ScalarType::Bool)};
  }

  // The arguments for arithmetic type A, which is the state's type. Call after check_options.
  template <typename A>
  MalaChainArgs<A> args(const Tensor& rng, const Tensor& accept_rng, const MalaChainOptions& o,
                        const MalaChainResults& results) const {
    const auto& [x, trajectory, stats, step_size, finite] = results;
    MalaChainArgs<A> args{};
    set_chain<A>(rng, o, x, trajectory, stats, &args);
    args.accept_rng = static_cast<const int64_t*>(accept_rng.const_data_ptr());
    args.step_size_out = static_cast<A*>(step_size.mutable_data_ptr());
    args.finite = static_cast<bool*>(finite.mutable_data_ptr());
    args.step_size = table<A>(o.step_size, o.step_size_t, o);
    args.temperature = static_cast<A>(o.temperature);
    args.root_temperature = static_cast<A>(std::sqrt(o.temperature));
    args.sign = o.negative_energy ? A(-1) : A(1);
    args.adapt_steps = o.adapt_steps;
    args.target_accept = static_cast<A>(o.target_accept);
    return args;
  }
};

// Checks, allocates the results, and calls run(args) where there is a chain to run; args are those
// of the state's type.
template <typename Run>
MalaChainResults run_mala_chain(const MalaChainOp& op, const Tensor& rng, const Tensor& accept_rng,
                                const MalaChainOptions& o, const Run& run) {
  MalaChainResults results = op.results(o);
  if (!op.has_chains()) return results;
  if (op.is_wide()) {
    run(op.args<double>(rng, accept_rng, o, results));
  } else {
    run(op.args<float>(rng, accept_rng, o, results));
  }
  return results;
}

}  // namespace coopflow
