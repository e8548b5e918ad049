// The step of a chain's loop. Its options and tensors are checked once and kept here under a
// number, so that a step is a call with the state, the gradient and two numbers: torch takes longer
// to hand over the tensors of a step than a small step takes to run.
#pragma once

#include <pthread.h>

#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "ops/langevin_op.h"

namespace coopflow {

// What every step of one loop has. One thread at a time makes its steps.
class LangevinBound {
 public:
  LangevinBound(Tensor x, Tensor rng, LangevinOptions options)
      : x_(std::move(x)),
        rng_(std::move(rng)),
        options_(std::move(options)),
        op_("langevin_bound_step_", x_) {
    options_.has_rows = true;
    op_.check_options(rng_, options_);
    op_.check_memory(nullptr, rng_, options_);
  }

  LangevinBound(const LangevinBound&) = delete;
  LangevinBound& operator=(const LangevinBound&) = delete;

  template <typename Backend>
  void step(const Tensor& x, const Tensor& grad, int64_t step) {
    op_.check_is_state(x);
    op_.check_gradient(grad);
    options_.step = step;
    op_.check_rows(options_);
    if (op_.gradient_is_overwritten(grad, options_)) {  // a score may be a view of the state
      Tensor copy = torch::stable::empty_like(grad);
      torch::stable::copy_(copy, grad);
      return run_langevin_step<Backend>(op_, x_, x_, copy, rng_, options_);
    }
    run_langevin_step<Backend>(op_, x_, x_, grad, rng_, options_);
  }

 private:
  const Tensor x_, rng_;
  LangevinOptions options_;
  const LangevinOp op_;
};

// Those of all loops that are running.
class LangevinBounds {
 public:
  // Never destroyed: at the end of a process CUDA may be gone before what lies in its memory.
  static LangevinBounds& all() {
    static auto& bounds = *made();
    return bounds;
  }

  int64_t add(std::shared_ptr<LangevinBound> bound) {
    const std::lock_guard<std::mutex> lock(mutex_);
    bounds_.emplace(++last_, std::move(bound));
    return last_;
  }

  std::shared_ptr<LangevinBound> find(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = bounds_.find(number);
    return found == bounds_.end() ? nullptr : found->second;
  }

  void remove(int64_t number) {
    std::shared_ptr<LangevinBound> removed;  // whose tensors go after the lock does
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = bounds_.find(number);
    if (found == bounds_.end()) return;
    removed = std::move(found->second);
    bounds_.erase(found);
  }

 private:
  // A process that is forked while another thread has the lock must find it free.
  static LangevinBounds* made() {
    const auto unlock = [] { all().mutex_.unlock(); };
    pthread_atfork([] { all().mutex_.lock(); }, unlock, unlock);
    return new LangevinBounds;
  }

  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<LangevinBound>> bounds_;
  int64_t last_ = 0;
};

inline int64_t langevin_bind(Tensor x, Tensor rng, double drift, OptionalTensor drift_t,
                             double noise, OptionalTensor noise_t, double decay,
                             OptionalTensor decay_t, double pull, OptionalTensor pull_t,
                             OptionalTensor x_ref, bool is_score, std::optional<double> grad_clip,
                             std::optional<double> grad_norm, std::optional<double> step_clip,
                             std::optional<double> clamp_low, std::optional<double> clamp_high,
                             int64_t noise_when, int64_t step, OptionalTensor xi,
                             OptionalTensor x_low, OptionalTensor stats, OptionalTensor active,
                             bool freeze_nonfinite, OptionalTensor frozen_at) {
  LangevinOptions o{drift,     drift_t,   noise,      noise_t,         decay,     decay_t,
                    pull,      pull_t,    x_ref,      is_score,        grad_clip, grad_norm,
                    step_clip, clamp_low, clamp_high, noise_when,      step,      xi,
                    x_low,     stats,     active,     freeze_nonfinite};
  o.frozen_at = frozen_at;
  return LangevinBounds::all().add(std::make_shared<LangevinBound>(x, rng, std::move(o)));
}

template <typename Backend>
void langevin_bound_step_(Tensor x, Tensor grad, int64_t bound, int64_t step) {
  const std::shared_ptr<LangevinBound> found = LangevinBounds::all().find(bound);
  if (!found) OpChecks("langevin_bound_step_").fail("bound", "nothing is bound as ", bound);
  found->step<Backend>(x, grad, step);
}

inline void langevin_unbind(int64_t bound) { LangevinBounds::all().remove(bound); }

}  // namespace coopflow
