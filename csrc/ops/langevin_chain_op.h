// What the ops of whole chains share, and those of Langevin chains: checks, a LangevinChainArgs and
// the results.
#pragma once

#include <initializer_list>
#include <tuple>

#include "coopflow/langevin_chain.h"
#include "ops/langevin_op.h"

namespace coopflow {

// The options that the schemas of these ops share (COOPFLOW_LANGEVIN_CHAIN_ARGS), in their order.
struct LangevinChainOptions {
  int64_t n_steps;
  double drift;
  OptionalTensor drift_t;
  double noise;
  OptionalTensor noise_t;
  double decay;
  OptionalTensor decay_t;
  double pull;
  OptionalTensor pull_t;
  OptionalTensor x_ref;
  std::optional<double> grad_clip, grad_norm, step_clip, clamp_low, clamp_high;
  bool clamp_end, negative_energy;
  int64_t step;
  OptionalTensor xi;
  int64_t thin;  // 0: no trajectory
  bool stats, freeze_nonfinite;
};

// x, trajectory, stats, frozen_at. What is not wanted has no rows.
using LangevinChainResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// What the ops of whole chains have in common, whatever moves them.
class ChainOp : public LangevinOp {
 public:
  ChainOp(const char* name, const Tensor& x0) : LangevinOp(name, x0, "x0") {
    const ScalarType type = x0.scalar_type();
    if (type != ScalarType::Float && type != ScalarType::Double) {
      check_.fail_type("x0", "must have dtype float32 or float64, got dtype ", dtype_name(type));
    }
    if (x0.dim() != 2) check_.fail("x0", "must have shape (B, D), got ", shape_text(x0));
  }

  const OpChecks& check() const { return check_; }
  int64_t per_chain() const { return per_chain_; }
  bool is_wide() const { return x_.scalar_type() == ScalarType::Double; }

 protected:
  // Options of the same names have the same meaning.
  template <typename Options>
  void check_steps(const Options& o) const {
    if (o.n_steps < 0) check_.fail("n_steps", "must not be negative, got ", o.n_steps);
    if (o.n_steps > (int64_t{1} << 32)) {
      check_.fail("n_steps", "must be at most 2**32, got ", o.n_steps);
    }
    check_.noise_fits(per_chain_, o.step);
    if (o.thin < 0) check_.fail("thin", "must not be negative, got ", o.thin);
    if (o.n_steps > 0) check_.noise_fits(per_chain_, o.step + o.n_steps - 1);
    if (o.xi) check_normals(*o.xi, o.n_steps);
  }

  Tensor empty_state() const { return torch::stable::empty_like(x_); }

  // What is not wanted has no rows.
  template <typename Options>
  Tensor empty_trajectory(const Options& o) const {
    return empty({o.thin > 0 ? o.n_steps / o.thin : 0, batch_, per_chain_}, x_.scalar_type());
  }

  template <typename Options>
  Tensor empty_statistics(const Options& o, int64_t columns) const {
    return empty({o.stats ? o.n_steps : 0, batch_, columns}, x_.scalar_type());
  }

  Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) const {
    return torch::stable::new_empty(x_, shape, type);
  }

  template <typename A, typename Options>
  void set_chain(const Tensor& rng, const Options& o, const Tensor& x, const Tensor& trajectory,
                 const Tensor& stats, ChainArgs<A>* args) const {
    args->x0 = static_cast<const A*>(x_.const_data_ptr());
    args->x_out = static_cast<A*>(x.mutable_data_ptr());
    args->xi = static_cast<const A*>(pointer_or_null(o.xi));
    if (o.thin > 0) args->trajectory = static_cast<A*>(trajectory.mutable_data_ptr());
    if (o.stats) args->stats = static_cast<A*>(stats.mutable_data_ptr());
    args->rng = static_cast<const int64_t*>(rng.const_data_ptr());
    args->batch = batch_;
    args->per_chain = per_chain_;
    args->n_steps = o.n_steps;
    args->thin = o.thin;
    args->step = o.step;
    args->noise_source = o.xi ? NoiseSource::kGiven : NoiseSource::kPhilox;
  }

  // A table with several rows must reach the last step.
  template <typename A, typename Options>
  CoefficientTable<A> table(double value, const OptionalTensor& rows, const Options& o) const {
    if (!rows || rows->size(0) == 1 || o.n_steps == 0) return {coefficient<A>(value, rows, 0), 0};
    check_reaches(rows, o.step + o.n_steps - 1);
    return {coefficient<A>(value, rows, o.step), rows->stride(0)};
  }

 private:
  void check_normals(const Tensor& xi, int64_t n_steps) const {
    check_.has_dtype("xi", xi, x_.scalar_type());
    check_.same_device("xi", xi, x_);
    if (xi.dim() != 3 || xi.size(0) != n_steps || xi.size(1) != batch_ ||
        xi.size(2) != per_chain_) {
      check_.fail("xi", "must have shape (n_steps, B, D) = (", n_steps, ", ", batch_, ", ",
                  per_chain_, "), got ", shape_text(xi));
    }
    check_.is_contiguous("xi", xi);
  }
};

class LangevinChainOp : public ChainOp {
 public:
  using ChainOp::ChainOp;

  void check_options(const Tensor& rng, const LangevinChainOptions& o) const {
    LangevinOptions update{};
    update.drift = o.drift, update.drift_t = o.drift_t;
    update.noise = o.noise, update.noise_t = o.noise_t;
    update.decay = o.decay, update.decay_t = o.decay_t;
    update.pull = o.pull, update.pull_t = o.pull_t;
    update.x_ref = o.x_ref;
    update.grad_clip = o.grad_clip, update.grad_norm = o.grad_norm;
    update.step_clip = o.step_clip;
    update.clamp_low = o.clamp_low, update.clamp_high = o.clamp_high;
    update.step = o.step;
    check_update(rng, update);
    check_steps(o);
  }

  // The results, not yet filled: the kernel writes all of them.
  LangevinChainResults results(const LangevinChainOptions& o) const {
    return {empty_state(), empty_trajectory(o), empty_statistics(o, kChainStatistics),
            empty({batch_}, ScalarType::Long)};
  }

  // The arguments for arithmetic type A, which is the state's type. Call after check_options.
  template <typename A>
  LangevinChainArgs<A> args(const Tensor& rng, const LangevinChainOptions& o,
                            const LangevinChainResults& results) const {
    const auto& [x, trajectory, stats, frozen_at] = results;
    LangevinChainArgs<A> args{};
    set_chain<A>(rng, o, x, trajectory, stats, &args);
    args.x_ref = static_cast<const A*>(pointer_or_null(o.x_ref));
    args.frozen_at = static_cast<int64_t*>(frozen_at.mutable_data_ptr());
    args.drift = table<A>(o.drift, o.drift_t, o);
    args.decay = table<A>(o.decay, o.decay_t, o);
    args.pull = table<A>(o.pull, o.pull_t, o);
    if (o.noise != 0 || o.noise_t) {
      args.noise = table<A>(o.noise, o.noise_t, o);
    } else {
      args.noise_source = NoiseSource::kNone;
    }
    args.last_limits = limits<A>(o.grad_clip, o.step_clip, o.clamp_low, o.clamp_high);
    args.limits = o.clamp_end ? limits<A>(o.grad_clip, o.step_clip, std::nullopt, std::nullopt)
                              : args.last_limits;
    args.grad_norm = static_cast<A>(o.grad_norm.value_or(kNoLimit));
    args.negate_drift = o.negative_energy;
    args.freeze_nonfinite = o.freeze_nonfinite;
    return args;
  }
};

// Checks, allocates the results, and calls run(args) where there is a chain to run; args are those
// of the state's type.
template <typename Run>
LangevinChainResults run_langevin_chain(const LangevinChainOp& op, const Tensor& rng,
                                        const LangevinChainOptions& o, const Run& run) {
  LangevinChainResults results = op.results(o);
  if (op.is_empty()) {
    torch::stable::fill_(std::get<2>(results), 0.0);
    torch::stable::fill_(std::get<3>(results), static_cast<double>(o.step + o.n_steps));
    return results;
  }
  if (op.is_wide()) {
    run(op.args<double>(rng, o, results));
  } else {
    run(op.args<float>(rng, o, results));
  }
  return results;
}

}  // namespace coopflow
