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

// Sums from which the L2 norm of a chain's gradient follows, whatever its size. The squares of
// floats neither overflow nor vanish in double; those of doubles are summed apart for small,
// middling and large elements, the first and the last scaled (Blue, ACM TOMS 4, 1978).
template <typename A>
constexpr int kNormSums = 1;
template <>
constexpr int kNormSums<double> = 3;

constexpr double kSmallElement = 0x1p-511, kLargeElement = 0x1p486;
constexpr double kSmallScale = 0x1p537, kLargeScale = 0x1p-538;

// What one element adds to them.
template <typename A>
struct NormTerms {
  double of[kNormSums<A>];
};

COOPFLOW_HD NormTerms<float> norm_terms(float g) {
  const double wide = g;
  return {{wide * wide}};
}

COOPFLOW_HD NormTerms<double> norm_terms(double g) {
  const bool is_small = g > -kSmallElement && g < kSmallElement;
  const bool is_large = g < -kLargeElement || g > kLargeElement;
  const double small = is_small ? g * kSmallScale : 0.0;
  const double middling = is_small || is_large ? 0.0 : g;
  const double large = is_large ? g * kLargeScale : 0.0;
  return {{small * small, middling * middling, large * large}};
}

// Of what grad_clip leaves of an element.
template <typename A>
COOPFLOW_HD NormTerms<A> clipped_norm_terms(A grad, A limit) {
  return norm_terms(clamp_keep_nan(grad, -limit, limit));
}

template <typename A>
COOPFLOW_HD void add_norm_terms(A grad, A limit, double (&sums)[kNormSums<A>]) {
  const NormTerms<A> terms = clipped_norm_terms(grad, limit);
  COOPFLOW_UNROLL
  for (int i = 0; i < kNormSums<A>; ++i) sums[i] += terms.of[i];
}

// Scales a gradient to L2 norm <= limit; 1 when it is shorter. Below 2^-126 (2^-1022 for double) a
// scale has fewer bits.
COOPFLOW_HD float norm_clip_scale(const double (&sums)[1], float limit) {
  const double norm = std::sqrt(sums[0]);
  return norm > limit ? static_cast<float>(limit / norm) : 1.0f;
}

COOPFLOW_HD double norm_clip_scale(const double (&sums)[3], double limit) {
  // The norm and the limit, both in the scale of the elements that decide it.
  double norm, scaled_limit;
  if (sums[2] > 0) {
    norm = std::sqrt(sums[2] + sums[1] * kLargeScale * kLargeScale);
    scaled_limit = limit * kLargeScale;
  } else if (sums[1] == 0) {
    norm = std::sqrt(sums[0]);
    scaled_limit = limit * kSmallScale;
  } else {
    norm = std::sqrt(sums[1] + sums[0] / kSmallScale / kSmallScale);
    scaled_limit = limit;
  }
  return norm > scaled_limit ? scaled_limit / norm : 1.0;
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
  COOPFLOW_HD bool needs_gradient_look() const { return clips_norm || freeze_nonfinite; }

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

// What a look at a chain's gradient, or at a part of it, finds: the sums of its norm and how many
// of its elements are not finite.
template <typename A>
struct GradientLook {
  double norm[kNormSums<A>];
  double nonfinite;

  COOPFLOW_HD void add(const GradientLook& part) {
    COOPFLOW_UNROLL
    for (int i = 0; i < kNormSums<A>; ++i) norm[i] += part.norm[i];
    nonfinite += part.nonfinite;
  }
};

// What it leaves for the step: the scale of its norm, and whether the chain moves.
template <typename A>
COOPFLOW_HD void apply_gradient_look(const LangevinArgs<A>& args, int64_t chain,
                                     const GradientLook<A>& look) {
  if (args.clips_norm) args.norm_scale[chain] = norm_clip_scale(look.norm, args.grad_norm);
  if (args.freeze_nonfinite && look.nonfinite != 0) freeze_chain(args, chain);
}

template <typename A>
COOPFLOW_HD LangevinChain<A> langevin_chain(const LangevinArgs<A>& args, int64_t chain) {
  const A drift = coefficient_at(args.drift, chain);
  return {args.negate_drift ? -drift : drift, coefficient_at(args.noise, chain),
          coefficient_at(args.decay, chain), coefficient_at(args.pull, chain),
          args.norm_scale == nullptr ? A(1) : args.norm_scale[chain]};
}

}  // namespace coopflow
