// The Langevin ops as the dispatcher calls them: checks and a LangevinArgs, written once. A back
// end is a type with
//   static constexpr bool kReadsStrides;  // of a gradient, and other types than the state's
//   template <typename T>
//   static void langevin_step(const LangevinArgs<arithmetic_t<T>>& args, const Tensor& x);
// where x tells the device and gives scratch tensors.
#pragma once

#include <limits>

#include "coopflow/langevin.h"
#include "ops/op_checks.h"

namespace coopflow {

// The arguments that the in-place and the functional op share, gathered for checking.
struct LangevinOptions {
  double drift;
  OptionalTensor drift_t;
  double noise;
  OptionalTensor noise_t;
  double decay;
  OptionalTensor decay_t;
  double pull;
  OptionalTensor pull_t;
  OptionalTensor x_ref;
  bool is_score;
  std::optional<double> grad_clip, grad_norm, step_clip, clamp_low, clamp_high;
  int64_t noise_when, step;
  OptionalTensor xi, x_low, stats, active;
  bool freeze_nonfinite;
  OptionalTensor frozen_at = std::nullopt;
  bool has_rows = false;  // xi and stats are those of many steps, a row for each
};

class LangevinOp {
 public:
  LangevinOp(const char* name, const Tensor& x, const char* argument = "x") : check_(name), x_(x) {
    check_.is_floating(argument, x);
    per_chain_ = check_.chains_are_dense(argument, x);
    batch_ = x.size(0);
  }

  bool is_empty() const { return batch_ == 0 || per_chain_ == 0; }

  // Of the tensor that this op is of.
  void check_is_state(const Tensor& x) const {
    if (x.const_data_ptr() != x_.const_data_ptr() || x.numel() != batch_ * per_chain_) {
      check_.fail("x", "must be the tensor that was bound, with its shape");
    }
  }

  bool is_dense(const GradientLayout& layout) const { return layout.is_dense(batch_, per_chain_); }

  // The state's own.
  GradientLayout dense_layout() const { return {per_chain_, 1, LowPrecision::kNone}; }

  void check_state_like(const char* argument, const Tensor& t) const {
    check_.has_dtype(argument, t, x_.scalar_type());
    check_.same_device(argument, t, x_);
    check_.same_layout(argument, t, x_);
  }

  // The same, with a row for each step.
  void check_state_rows(const char* argument, const Tensor& t) const {
    check_.has_dtype(argument, t, x_.scalar_type());
    check_.same_device(argument, t, x_);
    check_.rows_have_layout(argument, t, x_);
  }

  void check_step(const Tensor& grad, const Tensor& rng, const LangevinOptions& o) const {
    check_gradient(grad);
    check_options(rng, o);
    check_rows(o);
  }

  // All but the gradient and what depends on the step.
  void check_options(const Tensor& rng, const LangevinOptions& o) const {
    check_update(rng, o);
    check_outputs(o);
  }

  // What has a row for each step reaches this one.
  void check_rows(const LangevinOptions& o) const {
    check_.noise_fits(per_chain_, o.step);
    for (const OptionalTensor* table : {&o.drift_t, &o.decay_t, &o.pull_t}) {
      check_reaches(*table, o.step);
    }
    if (static_cast<NoiseWhen>(o.noise_when) != NoiseWhen::kNone) {
      check_reaches(o.noise_t, noise_step(o));
    }
    if (!o.has_rows) return;
    if (o.xi) check_has_row("xi", *o.xi, noise_step(o));
    if (o.stats) check_has_row("stats", *o.stats, o.step);
  }

  // A table with several rows must reach the step.
  void check_reaches(const OptionalTensor& table, int64_t step) const {
    const int64_t rows = table ? table->size(0) : 1;
    if (rows > 1 && step >= rows) {
      check_.fail("step", "row ", step, " was asked of a coefficient table with ", rows, " rows");
    }
  }

  // Of a step in place; grad null: asked for apart.
  void check_memory(const Tensor* grad, const Tensor& rng, const LangevinOptions& o) const {
    check_.share_no_memory({{"x", &x_, true, true},
                            {"x_low", pointer_to(o.x_low), true, true},
                            {"stats", pointer_to(o.stats), true, false},
                            {"active", pointer_to(o.active), true, false},
                            {"frozen_at", pointer_to(o.frozen_at), true, false},
                            {"grad", grad, false, true},
                            {"x_ref", pointer_to(o.x_ref), false, true},
                            {"xi", pointer_to(o.xi), false, true},
                            {"rng", &rng, false, false},
                            {"drift", pointer_to(o.drift_t), false, false},
                            {"noise", pointer_to(o.noise_t), false, false},
                            {"decay", pointer_to(o.decay_t), false, false},
                            {"pull", pointer_to(o.pull_t), false, false}});
  }

  bool gradient_is_overwritten(const Tensor& grad, const LangevinOptions& o) const {
    return check_.shares_memory(grad, {{"x", &x_, true, true},
                                       {"x_low", pointer_to(o.x_low), true, true},
                                       {"stats", pointer_to(o.stats), true, false},
                                       {"active", pointer_to(o.active), true, false},
                                       {"frozen_at", pointer_to(o.frozen_at), true, false}});
  }

  // Of noise added in place.
  void check_memory(const Tensor& rng, const OptionalTensor& noise_t, const OptionalTensor& xi,
                    const OptionalTensor& active) const {
    check_.share_no_memory({{"x", &x_, true, true},
                            {"xi", pointer_to(xi), false, true},
                            {"rng", &rng, false, false},
                            {"noise", pointer_to(noise_t), false, false},
                            {"active", pointer_to(active), false, false}});
  }

  // What steps and whole chains are given alike.
  void check_update(const Tensor& rng, const LangevinOptions& o) const {
    check_noise(rng, o.noise, o.noise_t, o.step, o.has_rows ? std::nullopt : o.xi);
    if (o.has_rows && o.xi) check_state_rows("xi", *o.xi);
    check_coefficient("drift", o.drift, o.drift_t);
    check_coefficient("decay", o.decay, o.decay_t);
    check_coefficient("pull", o.pull, o.pull_t);
    if (o.x_ref) {
      check_state_like("x_ref", *o.x_ref);
    } else if (o.pull != 0 || o.pull_t) {
      check_.fail("pull", "needs x_ref");
    }
    check_limits(o);
    if (o.noise_when < 0 || o.noise_when > 2) {
      check_.fail("noise_when", "must be 0, 1 or 2, got ", o.noise_when);
    }
  }

  // Of any strides; beside a wider state half precision will do, the type that a model computes in.
  void check_gradient(const Tensor& grad) const {
    check_.is_tensor("grad", grad);
    check_.same_device("grad", grad, x_);
    const bool wide =
        x_.scalar_type() == ScalarType::Float || x_.scalar_type() == ScalarType::Double;
    if (!wide || half_precision(grad) == LowPrecision::kNone) {
      check_.has_dtype("grad", grad, x_.scalar_type());
    }
    check_.same_shape("grad", grad, x_);
  }

  // A gradient's place, if the elements of each chain lie one stride apart in the state's order.
  std::optional<GradientLayout> gradient_layout(const Tensor& grad) const {
    GradientLayout layout{grad.stride(0), 1, LowPrecision::kNone};
    if (grad.scalar_type() != x_.scalar_type()) layout.type = half_precision(grad);
    for (int64_t i = 1; i < x_.dim(); ++i) {
      if (x_.size(i) > 1 && x_.stride(i) == 1) layout.stride = grad.stride(i);
    }
    for (int64_t i = 1; i < x_.dim(); ++i) {
      if (x_.size(i) > 1 && grad.stride(i) != layout.stride * x_.stride(i)) return std::nullopt;
    }
    return layout;
  }

  void check_noise(const Tensor& rng, double noise, const OptionalTensor& noise_t, int64_t step,
                   const OptionalTensor& xi) const {
    check_.is_rng(rng, x_);
    check_.noise_fits(per_chain_, step);
    check_coefficient("noise", noise, noise_t);
    if (!noise_t) check_.is_non_negative("noise", noise);
    if (xi) check_state_like("xi", *xi);
  }

  void check_active(const OptionalTensor& active) const {
    if (active) check_is_per_chain("active", *active, ScalarType::Bool);
  }

  // The arguments of one step for arithmetic type A. Call after check_step.
  template <typename A>
  LangevinArgs<A> step_args(const Tensor& x_out, const Tensor& grad, const GradientLayout& layout,
                            const Tensor& rng, const LangevinOptions& o) const {
    LangevinArgs<A> args = noise_args<A>(x_out, rng, o.noise, o.noise_t, o.step, o.xi,
                                         static_cast<NoiseWhen>(o.noise_when));
    if (o.has_rows && o.xi) {
      args.xi = static_cast<const char*>(args.xi) +
                args.step * o.xi->stride(0) * static_cast<int64_t>(o.xi->element_size());
    }
    args.grad = grad.const_data_ptr();
    args.grad_layout = layout;
    args.x_ref = pointer_or_null(o.x_ref);
    if (o.x_low) {
      args.x_low = o.x_low->mutable_data_ptr();
      args.low_precision = half_precision(*o.x_low);
    }
    if (o.stats) args.stats = static_cast<A*>(o.stats->mutable_data_ptr()) + stats_offset(o);
    if (o.active) args.active = static_cast<bool*>(o.active->mutable_data_ptr());
    // The score is the negative gradient. All limits are symmetric, so its sign can move into the
    // coefficient.
    args.drift = coefficient<A>(o.drift, o.drift_t, o.step);
    args.negate_drift = o.is_score;
    args.decay = coefficient<A>(o.decay, o.decay_t, o.step);
    args.pull = coefficient<A>(o.pull, o.pull_t, o.step);
    args.limits = limits<A>(o.grad_clip, o.step_clip, o.clamp_low, o.clamp_high);
    args.grad_norm = static_cast<A>(o.grad_norm.value_or(kNoLimit));
    args.clips_norm = o.grad_norm.has_value();
    args.freeze_nonfinite = o.freeze_nonfinite;
    if (o.frozen_at) args.frozen_at = static_cast<int64_t*>(o.frozen_at->mutable_data_ptr());
    args.freeze_step = o.step;
    return args;
  }

  template <typename A>
  LangevinArgs<A> noise_args(const Tensor& x_out, const Tensor& rng, double noise,
                             const OptionalTensor& noise_t, int64_t step, const OptionalTensor& xi,
                             NoiseWhen when) const {
    LangevinArgs<A> args{};
    args.x = x_.const_data_ptr();
    args.x_out = x_out.mutable_data_ptr();
    args.xi = pointer_or_null(xi);
    args.rng = static_cast<const int64_t*>(rng.const_data_ptr());
    args.step = noise_step(step, when);
    args.noise_when = when;
    args.noise_source = NoiseSource::kNone;
    if (when != NoiseWhen::kNone && (noise != 0 || noise_t)) {
      args.noise = coefficient<A>(noise, noise_t, args.step);
      args.noise_source = xi ? NoiseSource::kGiven : NoiseSource::kPhilox;
    }
    args.limits = limits<A>(std::nullopt, std::nullopt, std::nullopt, std::nullopt);
    args.batch = batch_;
    args.per_chain = per_chain_;
    args.grad_layout = dense_layout();
    return args;
  }

 protected:
  static constexpr double kNoLimit = std::numeric_limits<double>::infinity();

  template <typename A>
  static LangevinLimits<A> limits(std::optional<double> grad_clip, std::optional<double> step_clip,
                                  std::optional<double> low, std::optional<double> high) {
    return {static_cast<A>(grad_clip.value_or(kNoLimit)),
            static_cast<A>(step_clip.value_or(kNoLimit)), static_cast<A>(low.value_or(-kNoLimit)),
            static_cast<A>(high.value_or(kNoLimit))};
  }

  void check_has_row(const char* argument, const Tensor& t, int64_t row) const {
    if (row >= t.size(0)) {
      check_.fail(argument, "row ", row, " was asked of a tensor with ", t.size(0), " rows");
    }
  }

  // The step whose noise an update adds.
  static int64_t noise_step(int64_t step, NoiseWhen when) {
    return step + (when == NoiseWhen::kAfterStep ? 1 : 0);
  }

  static int64_t noise_step(const LangevinOptions& o) {
    return noise_step(o.step, static_cast<NoiseWhen>(o.noise_when));
  }

  int64_t stats_offset(const LangevinOptions& o) const {
    return o.has_rows ? o.step * batch_ * kStatistics : 0;
  }

  static LowPrecision half_precision(const Tensor& t) {
    if (t.scalar_type() == ScalarType::BFloat16) return LowPrecision::kBFloat16;
    return t.scalar_type() == ScalarType::Half ? LowPrecision::kFloat16 : LowPrecision::kNone;
  }

  static const void* pointer_or_null(const OptionalTensor& t) {
    return t ? t->const_data_ptr() : nullptr;
  }

  void check_coefficient(const char* name, double value, const OptionalTensor& table) const {
    if (!table) return check_.is_finite(name, value, x_);
    if (value != 0) check_.fail(name, "give a float or a tensor, not both");
    const ScalarType type = table->scalar_type();
    if (type != ScalarType::Float && type != ScalarType::Double) {
      check_.fail_type(name, "must have dtype float32 or float64, got dtype ", dtype_name(type));
    }
    check_.same_device(name, *table, x_);
    if (table->dim() != 2 || (table->size(1) != 1 && table->size(1) != batch_) ||
        table->size(0) < 1) {
      check_.fail(name, "must have shape (T or 1, B or 1) with B = ", batch_, ", got ",
                  shape_text(*table));
    }
  }

  void check_is_per_chain(const char* name, const Tensor& t, ScalarType type) const {
    check_.has_dtype(name, t, type);
    check_.same_device(name, t, x_);
    if (t.dim() != 1 || t.size(0) != batch_) {
      check_.fail(name, "must have shape (", batch_, ",), got ", shape_text(t));
    }
    check_.is_contiguous(name, t);
  }

  void check_limits(const LangevinOptions& o) const {
    if (o.grad_clip) check_.is_positive("grad_clip", *o.grad_clip);
    if (o.grad_norm) check_.is_positive("grad_norm", *o.grad_norm);
    if (o.step_clip) check_.is_positive("step_clip", *o.step_clip);
    const double low = o.clamp_low.value_or(-kNoLimit);
    const double high = o.clamp_high.value_or(kNoLimit);
    if (!(low <= high)) {
      check_.fail("clamp", "must be (low, high) with low <= high, got (", low, ", ", high, ")");
    }
  }

  void check_outputs(const LangevinOptions& o) const {
    const bool wide = x_.scalar_type() == ScalarType::Double;
    if (o.x_low) {
      if (half_precision(*o.x_low) == LowPrecision::kNone) {
        check_.fail_type("x_low", "must have dtype bfloat16 or float16, got dtype ",
                         dtype_name(o.x_low->scalar_type()));
      }
      check_.same_device("x_low", *o.x_low, x_);
      check_.same_layout("x_low", *o.x_low, x_);
    }
    if (o.stats) {
      check_.has_dtype("stats", *o.stats, wide ? ScalarType::Double : ScalarType::Float);
      check_.same_device("stats", *o.stats, x_);
      const int64_t rows = o.has_rows;
      if (o.stats->dim() != rows + 2 || o.stats->size(rows) != batch_ ||
          o.stats->size(rows + 1) != kStatistics) {
        check_.fail("stats", "must have shape (", rows ? "T, " : "", batch_, ", ", int{kStatistics},
                    "), got ", shape_text(*o.stats));
      }
      check_.is_contiguous("stats", *o.stats);
    }
    check_active(o.active);
    if (o.freeze_nonfinite && !o.active) {
      check_.fail("freeze_nonfinite", "needs active, the mask to clear");
    }
    check_frozen_at(o);
  }

  void check_frozen_at(const LangevinOptions& o) const {
    if (!o.frozen_at) return;
    if (!o.freeze_nonfinite) check_.fail("frozen_at", "needs freeze_nonfinite");
    check_is_per_chain("frozen_at", *o.frozen_at, ScalarType::Long);
  }

  // The row of one step.
  template <typename A>
  Coefficient<A> coefficient(double value, const OptionalTensor& table, int64_t step) const {
    if (!table) return {static_cast<A>(value), nullptr, false, 0};
    const bool wide = table->scalar_type() == ScalarType::Double;
    const int64_t offset = table->size(0) > 1 ? step * table->stride(0) : 0;
    const char* data = static_cast<const char*>(table->const_data_ptr());
    return {A(0), data + offset * (wide ? sizeof(double) : sizeof(float)), wide,
            table->size(1) > 1 ? table->stride(1) : 0};
  }

  OpChecks check_;
  const Tensor& x_;
  int64_t batch_, per_chain_;
};

struct ReadableGradient {
  Tensor grad;
  GradientLayout layout;
};

// The gradient itself, or a copy that lies like x where the back end cannot read it.
template <typename Backend>
ReadableGradient readable_gradient(const LangevinOp& op, const Tensor& x, const Tensor& grad) {
  const std::optional<GradientLayout> layout = op.gradient_layout(grad);
  if (layout && (Backend::kReadsStrides || op.is_dense(*layout))) return {grad, *layout};
  Tensor copy = torch::stable::empty_like(x);
  return {torch::stable::copy_(copy, grad), op.dense_layout()};
}

template <typename Backend>
void run_langevin_step(const LangevinOp& op, const Tensor& x, const Tensor& x_out,
                       const Tensor& grad, const Tensor& rng, const LangevinOptions& o) {
  if (op.is_empty()) {
    if (o.stats) {
      Tensor stats = o.has_rows ? torch::stable::select(*o.stats, 0, o.step) : *o.stats;
      torch::stable::fill_(stats, 0.0);
    }
    return;
  }
  const ReadableGradient readable = readable_gradient<Backend>(op, x, grad);
  dispatch_floating(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = arithmetic_t<T>;
    Backend::template langevin_step<T>(
        op.step_args<A>(x_out, readable.grad, readable.layout, rng, o), x);
  });
}

template <typename Backend>
void langevin_step_(Tensor x, Tensor grad, Tensor rng, double drift, OptionalTensor drift_t,
                    double noise, OptionalTensor noise_t, double decay, OptionalTensor decay_t,
                    double pull, OptionalTensor pull_t, OptionalTensor x_ref, bool is_score,
                    std::optional<double> grad_clip, std::optional<double> grad_norm,
                    std::optional<double> step_clip, std::optional<double> clamp_low,
                    std::optional<double> clamp_high, int64_t noise_when, int64_t step,
                    OptionalTensor xi, OptionalTensor x_low, OptionalTensor stats,
                    OptionalTensor active, bool freeze_nonfinite, OptionalTensor frozen_at) {
  LangevinOptions o{drift,     drift_t,   noise,      noise_t,         decay,     decay_t,
                    pull,      pull_t,    x_ref,      is_score,        grad_clip, grad_norm,
                    step_clip, clamp_low, clamp_high, noise_when,      step,      xi,
                    x_low,     stats,     active,     freeze_nonfinite};
  o.frozen_at = frozen_at;
  const LangevinOp op("langevin_step_", x);
  op.check_step(grad, rng, o);
  op.check_memory(&grad, rng, o);
  run_langevin_step<Backend>(op, x, x, grad, rng, o);
}

template <typename Backend>
Tensor langevin_step(Tensor x, Tensor grad, Tensor rng, double drift, OptionalTensor drift_t,
                     double noise, OptionalTensor noise_t, double decay, OptionalTensor decay_t,
                     double pull, OptionalTensor pull_t, OptionalTensor x_ref, bool is_score,
                     std::optional<double> grad_clip, std::optional<double> grad_norm,
                     std::optional<double> step_clip, std::optional<double> clamp_low,
                     std::optional<double> clamp_high, int64_t noise_when, int64_t step,
                     OptionalTensor xi) {
  const LangevinOptions o{
      drift, drift_t,  noise,        noise_t,      decay,        decay_t,   pull,       pull_t,
      x_ref, is_score, grad_clip,    grad_norm,    step_clip,    clamp_low, clamp_high, noise_when,
      step,  xi,       std::nullopt, std::nullopt, std::nullopt, false};
  const LangevinOp op("langevin_step", x);
  op.check_step(grad, rng, o);
  Tensor x_out = torch::stable::empty_like(x);
  run_langevin_step<Backend>(op, x, x_out, grad, rng, o);
  return x_out;
}

template <typename Backend>
void langevin_noise_(Tensor x, Tensor rng, double noise, OptionalTensor noise_t, int64_t step,
                     OptionalTensor xi, OptionalTensor active) {
  const LangevinOp op("langevin_noise_", x);
  op.check_noise(rng, noise, noise_t, step, xi);
  op.check_reaches(noise_t, step);
  op.check_active(active);
  op.check_memory(rng, noise_t, xi, active);
  if (op.is_empty()) return;
  dispatch_floating(x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    LangevinArgs<arithmetic_t<T>> args =
        op.noise_args<arithmetic_t<T>>(x, rng, noise, noise_t, step, xi, NoiseWhen::kWithStep);
    if (active) args.active = static_cast<bool*>(active->mutable_data_ptr());
    if (args.noise_source == NoiseSource::kNone) return;
    Backend::template langevin_step<T>(args, x);
  });
}

}  // namespace coopflow
