// The Langevin update of one element, and the plain description of a launch over all of them.
//   1. g = grad, clipped to +-grad_clip, scaled to the chain's norm limit
//   2. d = drift * g + decay * x + pull * (x - x_ref)
//   3. d clipped to +-step_clip   4. x - d + noise * xi   5. clamped to [clamp_low, clamp_high]
// Limits that are not wanted are infinite, so the update has no branch for them.
#pragma once

#include <cstdint>

#include "coopflow/intrinsics.h"
#include "coopflow/macros.h"
#include "coopflow/normal.h"
#include "coopflow/philox.h"
#include "coopflow/reduction.h"
#include "coopflow/scalar_types.h"

namespace coopflow {

enum class NoiseWhen : int { kWithStep = 0, kAfterStep = 1, kNone = 2 };
enum class NoiseSource : int { kNone, kPhilox, kGiven };
enum class LowPrecision : int { kNone, kBFloat16, kFloat16 };

// A coefficient of one step: one value, or a row of a (T or 1, B or 1) table.
template <typename A>
struct Coefficient {
  A value;
  const void* row;  // null: use value
  bool row_is_double;
  int64_t chain_stride;  // in elements; 0 when one value serves all chains
};

template <typename A>
COOPFLOW_HD A coefficient_at(const Coefficient<A>& c, int64_t chain) {
  if (c.row == nullptr) return c.value;
  const int64_t i = chain * c.chain_stride;
  return c.row_is_double ? static_cast<A>(static_cast<const double*>(c.row)[i])
                         : static_cast<A>(static_cast<const float*>(c.row)[i]);
}

template <typename A>
struct LangevinLimits {
  A grad_clip, step_clip, clamp_low, clamp_high;
};

// What one chain's elements share during one step.
template <typename A>
struct LangevinChain {
  A drift, noise, decay, pull, norm_scale;
};

template <typename A>
struct LangevinMove {
  A x;                   // the new state
  A settled;             // the new state without noise that belongs to the next gradient
  int clipped, clamped;  // 0 or 1; with bool here, loops with statistics do not vectorise
};

// kFull: with decay, pull, norm scaling and noise after the clamp; otherwise only the plain path.
template <bool kFull, typename A>
COOPFLOW_HD LangevinMove<A> langevin_update(const LangevinLimits<A>& limits,
                                            const LangevinChain<A>& chain, bool noise_after, A x,
                                            A grad, A xi, A x_ref, bool has_ref) {
  LangevinMove<A> move;
  A g = clamp_keep_nan(grad, -limits.grad_clip, limits.grad_clip);
  const bool clipped = grad < -limits.grad_clip || grad > limits.grad_clip;
  if (kFull) g *= chain.norm_scale;
  A d = chain.drift * g;
  if (kFull) {
    if (chain.decay != A(0)) d = multiply_add(chain.decay, x, d);
    if (has_ref) d = multiply_add(chain.pull, x - x_ref, d);
  }
  const A step = clamp_keep_nan(d, -limits.step_clip, limits.step_clip);
  move.clipped = clipped || d < -limits.step_clip || d > limits.step_clip;
  A y = x - step;
  if (!kFull || !noise_after) y = multiply_add(chain.noise, xi, y);
  move.settled = clamp_keep_nan(y, limits.clamp_low, limits.clamp_high);
  move.clamped = y < limits.clamp_low || y > limits.clamp_high;
  move.x = move.settled;
  if (kFull && noise_after) move.x = multiply_add(chain.noise, xi, move.settled);
  return move;
}

// Scales a chain's gradient to L2 norm <= limit, given its sum of squares; 1 when it is shorter.
template <typename A>
COOPFLOW_HD A norm_clip_scale(A sum_of_squares, A limit) {
  const A norm = std::sqrt(sum_of_squares);
  return norm > limit ? limit / norm : A(1);
}

// Columns of the statistics tensor.
enum LangevinStatistic : int {
  kSumGradSquared = 0,
  kSumDisplacementSquared,
  kClippedElements,
  kClampedElements,
  kNonFiniteElements,
  kStatistics
};

// Of a gradient's elements or of one.
template <typename A>
struct GradientMoments {
  A sum_of_squares;
  A nonfinite;  // how many elements are not finite
};

template <typename A>
COOPFLOW_HD GradientMoments<A> gradient_moments(A grad) {
  return {grad * grad, is_finite(grad) ? A(0) : A(1)};
}

// With the squares of what grad_clip leaves, for the norm clip.
template <typename A>
COOPFLOW_HD GradientMoments<A> clipped_gradient_moments(A grad, A limit) {
  const A g = clamp_keep_nan(grad, -limit, limit);
  return {g * g, is_finite(grad) ? A(0) : A(1)};
}

// What one element adds to each of the statistics, in their order.
template <typename A>
struct StatisticTerms {
  A of[kStatistics];
};

// T is the storage type of the state, x the state before the move.
template <typename T, typename A>
COOPFLOW_HD StatisticTerms<A> statistic_terms(A x, A grad, const LangevinMove<A>& move) {
  const A settled = to_arithmetic(from_arithmetic<T>(move.settled));
  return {{gradient_moments(grad).sum_of_squares, (settled - x) * (settled - x),
           move.clipped != 0 ? A(1) : A(0), move.clamped != 0 ? A(1) : A(0),
           gradient_moments(grad).nonfinite}};
}

// Where a gradient's elements lie, counted in the state's storage order, and their type.
struct GradientLayout {
  int64_t chain_stride, stride;
  LowPrecision type;  // kNone: the state's

  // Whether it is the state's own.
  COOPFLOW_HD bool is_dense(int64_t batch, int64_t per_chain) const {
    return type == LowPrecision::kNone && stride == 1 && (chain_stride == per_chain || batch == 1);
  }
};

// Everything a back end needs for one step. Pointers are to the back end's memory; x, x_out, x_ref,
// xi share one dense layout (chains of per_chain elements), x_low has it too.
template <typename A>
struct LangevinArgs {
  const void* x;
  void* x_out;
  const void* grad;   // null: noise alone is added
  const void* x_ref;  // may be null, as may all below
  const void* xi;
  void* x_low;
  A* stats;            // (batch, kStatistics)
  bool* active;        // (batch)
  int64_t* frozen_at;  // (batch)
  A* norm_scale;       // (batch), of a back end that finds it in a pass of its own
  const int64_t* rng;  // seed, time, number of the first chain
  Coefficient<A> drift, noise, decay, pull;
  LangevinLimits<A> limits;
  A grad_norm;
  GradientLayout grad_layout;
  int64_t batch, per_chain;
  int64_t step;         // of the noise: already one later when the noise comes after
  int64_t freeze_step;  // what frozen_at is given
  NoiseSource noise_source;
  NoiseWhen noise_when;
  LowPrecision low_precision;
  bool negate_drift;  // the gradient given is a score
  bool clips_norm, freeze_nonfinite;

  // Whether a chain's whole gradient must be known before it moves.
  COOPFLOW_HD bool needs_gradient_moments() const { return clips_norm || freeze_nonfinite; }

  // Whether all chains move by the same coefficients.
  COOPFLOW_HD bool shares_coefficients() const {
    return !clips_norm && drift.chain_stride == 0 && noise.chain_stride == 0 &&
           decay.chain_stride == 0 && pull.chain_stride == 0;
  }

  // Whether the state may be taken as one: no element's update asks for its chain's number.
  COOPFLOW_HD bool is_uniform() const { return active == nullptr && shares_coefficients(); }

  // Whether the plain path of langevin_update is enough.
  COOPFLOW_HD bool is_plain() const {
    return x_ref == nullptr && !clips_norm && decay.row == nullptr && decay.value == A(0) &&
           noise_when != NoiseWhen::kAfterStep;
  }

  COOPFLOW_HD bool gradient_is_dense() const { return grad_layout.is_dense(batch, per_chain); }
};

// One element of a gradient that does not lie like the state, whose storage type is T.
template <typename T, typename A>
COOPFLOW_HD A gradient_at(const LangevinArgs<A>& args, int64_t offset) {
  switch (args.grad_layout.type) {
    case LowPrecision::kBFloat16:
      return static_cast<A>(to_arithmetic(static_cast<const bfloat16*>(args.grad)[offset]));
    case LowPrecision::kFloat16:
      return static_cast<A>(to_arithmetic(static_cast<const float16*>(args.grad)[offset]));
    default:
      return to_arithmetic(static_cast<const T*>(args.grad)[offset]);
  }
}

// A chain whose gradient is not finite stops before this step.
template <typename A>
COOPFLOW_HD void freeze_chain(const LangevinArgs<A>& args, int64_t chain) {
  if (args.frozen_at != nullptr && args.active[chain]) args.frozen_at[chain] = args.freeze_step;
  args.active[chain] = false;
}

// What a pass over a chain's gradient leaves for the step: its norm's scale, and whether it moves.
template <typename A>
COOPFLOW_HD void apply_gradient_moments(const LangevinArgs<A>& args, int64_t chain,
                                        const GradientMoments<A>& moments) {
  if (args.clips_norm) {
    args.norm_scale[chain] = norm_clip_scale(moments.sum_of_squares, args.grad_norm);
  }
  if (args.freeze_nonfinite && moments.nonfinite != A(0)) freeze_chain(args, chain);
}

template <typename A>
COOPFLOW_HD LangevinChain<A> langevin_chain(const LangevinArgs<A>& args, int64_t chain) {
  const A drift = coefficient_at(args.drift, chain);
  return {args.negate_drift ? -drift : drift, coefficient_at(args.noise, chain),
          coefficient_at(args.decay, chain), coefficient_at(args.pull, chain),
          args.norm_scale == nullptr ? A(1) : args.norm_scale[chain]};
}

}  // namespace coopflow
