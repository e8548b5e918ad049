// The mixture-of-logistics coupling y = (logit F(x) + b) * e^a of one element, its inverse, and
// their derivatives (Ho et al. 2019). With t_k = (x - mean_k) / scale_k and weights w_k,
//   F(x) = sum_k w_k sigma(t_k),  S(x) = sum_k w_k sigma(-t_k),  logit F = log F - log S,
//   slope = d logit F / dx = D (1/F + 1/S),  D(x) = sum_k w_k sigma(t_k) sigma(-t_k) / scale_k.
// Every sum has positive terms only, so no tail is lost; 1 - F is never formed. The weights are
// relative to the largest: slope and logit F need no others.
//
// Sums come in two forms. The direct one costs one exponential per component and holds while F, S
// and D stay above kSmallestSum. The scaled one divides each sum by its largest term first, and
// holds everywhere.
//
// Lengths are measured in "units": t is multiplied by kUnit, so that float needs powers of 2 only.
// Members in units say so.
#pragma once

#include <cmath>
#include <cstdint>

#include "coopflow/elementary.h"
#include "coopflow/intrinsics.h"
#include "coopflow/macros.h"
#include "coopflow/reduction.h"

namespace coopflow {

template <typename A>
struct MixtureConstants;

template <>
struct MixtureConstants<float> {
  static constexpr float kUnit = 1.44269504f;  // log2(e)
  static constexpr float kPerUnit = 0.69314718f;
  static constexpr float kLogUnit = 0.36651292f;
  static constexpr float kEpsilon = 0x1p-23f;
  // Terms are rounded to zero, or up to 2^-110, below 2^-110: negligible beside this.
  static constexpr float kSmallestSum = 0x1p-55f;
  static constexpr float kSmallestSlope = 0x1p-64f;
  static constexpr int kMaxEvaluations = 96;
};

template <>
struct MixtureConstants<double> {
  static constexpr double kUnit = 1.0;
  static constexpr double kPerUnit = 1.0;
  static constexpr double kLogUnit = 0.0;
  static constexpr double kEpsilon = 0x1p-52;
  static constexpr double kSmallestSum = 0x1p-500;
  static constexpr double kSmallestSlope = 0x1p-512;
  static constexpr int kMaxEvaluations = 192;
};

// --- what is not finite ---
// An element with an input that is not finite, or whose logit F overflows, is NaN in every result,
// whatever arithmetic would make of it: e^-inf = 0, for one, hides an infinite a, and functions of
// ordinary numbers give anything for others. So each input by itself, and logit F, goes into the
// element's poison, 0 or NaN, which is added to the results.

template <typename A>
COOPFLOW_HD A poisoned(A poison, A input) {
  return multiply_add(A(0), input, poison);
}

// By the state and the coupling's own parameters.
template <typename A>
COOPFLOW_HD A coupling_poison(A state, A a, A b) {
  return poisoned(poisoned(poisoned(A(0), b), a), state);
}

// And by the parameters of one component.
template <typename A>
COOPFLOW_HD A component_poison(A poison, A logit, A mean, A log_scale) {
  return poisoned(poisoned(poisoned(poison, logit), mean), log_scale);
}

// Log-scales are clamped from below; they have no gradient there.
template <typename A>
COOPFLOW_HD bool log_scale_is_clamped(A log_scale) {
  return log_scale < A(-7);
}

template <typename A>
COOPFLOW_HD A clamp_log_scale(A log_scale) {
  return log_scale_is_clamped(log_scale) ? A(-7) : log_scale;
}

// One component as every evaluation needs it.
template <typename A>
struct Component {
  A weight;  // relative to the largest
  A mean;
  A inv_scale;  // in units
};

// What the scaled form needs beside it.
template <typename A>
struct LogComponent {
  A log_weight;  // in units
  A log_scale;   // in units, clamped
};

// log_weight is relative to the largest, and neither it nor log_scale is in units.
template <typename A>
COOPFLOW_HD Component<A> make_component(A log_weight, A mean, A log_scale) {
  return {exponential_normal(log_weight), mean,
          exponential_normal(-clamp_log_scale(log_scale)) * MixtureConstants<A>::kUnit};
}

template <typename A>
COOPFLOW_HD LogComponent<A> make_log_component(A log_weight, A log_scale) {
  constexpr A kUnit = MixtureConstants<A>::kUnit;
  return {log_weight * kUnit, clamp_log_scale(log_scale) * kUnit};
}

// e^x for x <= 0 in units; float rounds results below 2^-110 to anything up to that. Smaller ones
// would make denormal products, which slow a CPU down.
COOPFLOW_HD float power(float x) { return exponential2_nonpositive<-110>(x); }
COOPFLOW_HD double power(double x) { return exponential(x); }

// One logistic at x: sigma(t), sigma(-t), and the larger of the two.
template <typename A>
struct Logistic {
  A t;  // in units
  A below, above, larger;
};

template <typename A>
COOPFLOW_HD Logistic<A> logistic(A x, const Component<A>& c) {
  const A t = (x - c.mean) * c.inv_scale;
  const A small = power(-absolute(t));
  const A larger = reciprocal(A(1) + small);
  const A smaller = small * larger;
  const bool right = t >= A(0);
  return {t, right ? larger : smaller, right ? smaller : larger, larger};
}

// --- the direct form ---

template <typename A>
struct MixtureSums {
  A cdf = A(0), survival = A(0);
  A density = A(0);  // in units
};

template <typename A>
COOPFLOW_HD void add(MixtureSums<A>& sums, A x, const Component<A>& c) {
  const Logistic<A> at = logistic(x, c);
  const A below = c.weight * at.below;
  sums.cdf += below;
  sums.survival = multiply_add(c.weight, at.above, sums.survival);
  sums.density = multiply_add(below * at.above, c.inv_scale, sums.density);
}

// Of two parts of the components.
template <typename A>
COOPFLOW_HD MixtureSums<A> merge(const MixtureSums<A>& a, const MixtureSums<A>& b) {
  return {a.cdf + b.cdf, a.survival + b.survival, a.density + b.density};
}

template <typename A>
COOPFLOW_HD bool logit_is_direct(const MixtureSums<A>& sums) {
  constexpr A kLeast = MixtureConstants<A>::kSmallestSum;
  return (sums.cdf >= kLeast) & (sums.survival >= kLeast);
}

template <typename A>
COOPFLOW_HD bool all_is_direct(const MixtureSums<A>& sums) {
  return logit_is_direct(sums) & (sums.density >= MixtureConstants<A>::kSmallestSum);
}

// logit F and its slope.
template <typename A>
struct MixtureLogit {
  A value;
  A slope;  // in units
};

template <typename A>
COOPFLOW_HD MixtureLogit<A> direct_logit(const MixtureSums<A>& sums) {
  const A shared = reciprocal(sums.cdf * sums.survival);
  return {quick_log_positive(sums.cdf * sums.cdf * shared),
          sums.density * (sums.cdf + sums.survival) * shared};
}

template <typename A>
COOPFLOW_HD A direct_log_slope(const MixtureLogit<A>& logit) {
  return log_positive(logit.slope) - MixtureConstants<A>::kLogUnit;
}

// --- the scaled form ---

// Logarithms of about the largest term of each sum, in units.
template <typename A>
struct MixturePeaks {
  A cdf = -INFINITY, survival = -INFINITY, density = -INFINITY;
};

template <typename A>
COOPFLOW_HD A larger_of(A a, A b) {
  return a > b ? a : b;
}

template <typename A>
COOPFLOW_HD A smaller_of(A a, A b) {
  return a < b ? a : b;
}

template <typename A>
COOPFLOW_HD void raise(MixturePeaks<A>& peaks, A x, const Component<A>& c,
                       const LogComponent<A>& log) {
  const A t = (x - c.mean) * c.inv_scale;
  peaks.cdf = larger_of(peaks.cdf, log.log_weight + smaller_of(t, A(0)));
  peaks.survival = larger_of(peaks.survival, log.log_weight + smaller_of(-t, A(0)));
  peaks.density = larger_of(peaks.density, log.log_weight - log.log_scale - absolute(t));
}

// A component's terms of F, S and D, each divided by the power of its peak.
template <typename A>
struct MixtureTerms {
  A cdf, survival, density;
};

template <typename A>
COOPFLOW_HD MixtureTerms<A> scaled_terms(const Logistic<A>& at, const LogComponent<A>& log,
                                         const MixturePeaks<A>& peaks) {
  const A cdf = power(log.log_weight + smaller_of(at.t, A(0)) - peaks.cdf);
  const A survival = power(log.log_weight + smaller_of(-at.t, A(0)) - peaks.survival);
  const A density = power(log.log_weight - log.log_scale - absolute(at.t) - peaks.density);
  return {cdf * at.larger, survival * at.larger, density * at.larger * at.larger};
}

template <typename A>
struct ScaledSums {
  A cdf = A(0), survival = A(0), density = A(0), weight = A(0);
  A cdf_slope = A(0), survival_slope = A(0);  // D in units, over the peaks of F and of S
};

template <typename A>
COOPFLOW_HD void add(ScaledSums<A>& sums, A x, const Component<A>& c, const LogComponent<A>& log,
                     const MixturePeaks<A>& peaks) {
  const Logistic<A> at = logistic(x, c);
  const MixtureTerms<A> terms = scaled_terms(at, log, peaks);
  sums.cdf += terms.cdf;
  sums.survival += terms.survival;
  sums.density += terms.density;
  sums.weight += c.weight;
  sums.cdf_slope = multiply_add(terms.cdf * at.above, c.inv_scale, sums.cdf_slope);
  sums.survival_slope = multiply_add(terms.survival * at.below, c.inv_scale, sums.survival_slope);
}

template <typename A>
COOPFLOW_HD A scaled_logit_value(A cdf, A survival, const MixturePeaks<A>& peaks) {
  return (peaks.cdf - peaks.survival) * MixtureConstants<A>::kPerUnit +
         (log_positive(cdf) - log_positive(survival));
}

template <typename A>
COOPFLOW_HD MixtureLogit<A> scaled_logit(const ScaledSums<A>& sums, const MixturePeaks<A>& peaks) {
  return {scaled_logit_value(sums.cdf, sums.survival, peaks),
          multiply_add(sums.cdf_slope, reciprocal(sums.cdf),
                       sums.survival_slope * reciprocal(sums.survival))};
}

// Where the slope itself is lost to underflow, between components far apart, its logarithm comes
// from that of D.
template <typename A>
COOPFLOW_HD A scaled_log_slope(const MixtureLogit<A>& logit, const ScaledSums<A>& sums,
                               const MixturePeaks<A>& peaks) {
  const A of_density =
      (peaks.density - peaks.cdf - peaks.survival) * MixtureConstants<A>::kPerUnit +
      (log_positive(sums.density) + log_positive(sums.weight)) -
      (log_positive(sums.cdf) + log_positive(sums.survival));
  return logit.slope >= MixtureConstants<A>::kSmallestSum ? direct_log_slope(logit) : of_density;
}

// --- the inverse ---

// Solves logit F(x) = target: the root lies between the smallest and the largest quantile of the
// components. A step is Newton's while that stays inside the bracket and is at most half the step
// before last, else it halves the bracket.
template <typename A>
struct RootSearch {
  A tolerance;  // of the logit
  A x, low, high;
  A step, step_before;
  bool pending;
};

// The components' quantiles of the target: their range, and their weighted sum.
template <typename A>
struct Quantiles {
  A low = INFINITY, high = -INFINITY;
  A weighted = A(0), weight = A(0);
};

template <typename A>
COOPFLOW_HD void add(Quantiles<A>& quantiles, A target, const Component<A>& c) {
  // mean + scale * target
  const A quantile = c.mean + target * (MixtureConstants<A>::kUnit * reciprocal(c.inv_scale));
  quantiles.low = smaller_of(quantiles.low, quantile);
  quantiles.high = larger_of(quantiles.high, quantile);
  quantiles.weighted = multiply_add(c.weight, quantile, quantiles.weighted);
  quantiles.weight += c.weight;
}

// Of two parts of the components.
template <typename A>
COOPFLOW_HD Quantiles<A> merge(const Quantiles<A>& a, const Quantiles<A>& b) {
  return {smaller_of(a.low, b.low), larger_of(a.high, b.high), a.weighted + b.weighted,
          a.weight + b.weight};
}

// From the mean of the quantiles.
template <typename A>
COOPFLOW_HD RootSearch<A> begin_search(const Quantiles<A>& quantiles, A target) {
  const A low = quantiles.low, high = quantiles.high;
  const A tolerance = A(4) * MixtureConstants<A>::kEpsilon * larger_of(A(1), absolute(target));
  const A step = A(2) * (high - low);
  return {tolerance,
          clamp_keep_nan(quantiles.weighted / quantiles.weight, low, high),
          low,
          high,
          step,
          step,
          is_finite(target)};
}

template <typename A>
COOPFLOW_HD bool is_solved(const RootSearch<A>& s, A error) {
  return !(absolute(error) > s.tolerance);
}

template <typename A>
COOPFLOW_HD A newton_step(A error, const MixtureLogit<A>& logit) {
  return error * MixtureConstants<A>::kUnit * reciprocal(logit.slope);
}

// One evaluation's progress; x stays where the search ends. NaN ends it. Once it has ended, another
// evaluation at x changes nothing.
template <typename A>
COOPFLOW_HD void advance(RootSearch<A>& s, A target, const MixtureLogit<A>& logit) {
  const A error = logit.value - target;
  const bool solved = is_solved(s, error);
  const bool beyond = error > A(0);
  const A low = beyond ? s.low : s.x;
  const A high = beyond ? s.x : s.high;
  const A half = A(0.5) * (high - low);
  const A ulp = MixtureConstants<A>::kEpsilon * absolute(s.x);
  const bool closed = !(half > ulp);
  // At least one ulp, so that a root next to x is bracketed from both sides.
  const A length = larger_of(absolute(newton_step(error, logit)), ulp);
  const A guess = beyond ? s.x - length : s.x + length;
  const bool take = (guess > low) & (guess < high) & (length <= A(0.5) * s.step_before);
  const bool move = s.pending & !solved & !closed;
  s.low = low;
  s.high = high;
  s.step_before = s.step;
  s.step = take ? length : half;
  s.x = move ? (take ? guess : low + half) : s.x;
  s.pending = move;
}

// x after an evaluation that may have ended the search. Where it was solved there, Newton's step is
// taken too if it is short: it costs no evaluation. A long one, where F is flat, would bring x to
// where log|det| is another than at the evaluation.
template <typename A>
COOPFLOW_HD A last_step(const RootSearch<A>& s, A target, const MixtureLogit<A>& logit) {
  const A error = logit.value - target;
  const A newton = newton_step(error, logit);
  const A last = s.x - newton;
  const A reach = A(4) * MixtureConstants<A>::kEpsilon * larger_of(A(1), absolute(s.x));
  const bool take =
      is_solved(s, error) & (last >= s.low) & (last <= s.high) & (absolute(newton) <= reach);
  return take ? last : s.x;
}

// The logit that the inverse solves for. An element where it overflows has no root and is NaN.
template <typename A>
COOPFLOW_HD A inverse_target(A y, A a, A b) {
  return multiply_add(y, exponential(-a), -b);
}

// The published inverse clamps the CDF's value to [1e-5, 1 - 1e-5] before root finding.
template <typename A>
COOPFLOW_HD A legacy_clamp(A v) {
  constexpr A kLimit = A(11.512915464920228);  // log((1 - 1e-5) / 1e-5)
  return clamp_keep_nan(v, -kLimit, kLimit);
}

// log sigma(v) + log sigma(-v)
template <typename A>
COOPFLOW_HD A log_logistic_density(A v) {
  const A size = absolute(v);
  return A(-2) * log_positive(A(1) + exponential(-size)) - size;
}

// --- the results ---

template <typename A>
struct CouplingResult {
  A out, ladj;
};

// y = (logit F + b) e^a.
template <typename A>
COOPFLOW_HD CouplingResult<A> mixture_forward_result(A logit, A log_slope, A a, A b, A poison) {
  const A bad = poisoned(poison, logit);
  return {(logit + b) * exponential(a) + bad, log_slope + a + bad};
}

// What legacy mode takes from the inverse's log|det|, given the target before and after its clamp.
template <typename A>
COOPFLOW_HD A legacy_correction(A target, A clamped) {
  return log_logistic_density(clamped) - log_logistic_density(target);
}

// x, where logit F is the target. The correction is zero without the legacy clamp.
template <typename A>
COOPFLOW_HD CouplingResult<A> mixture_inverse_result(A x, A log_slope, A a, A correction,
                                                     A poison) {
  return {x + poison, -(log_slope + a + correction) + poison};
}

// --- derivatives ---
// u = logit F, l = log slope. Of x: du/dx = slope and
//   dl/dx = bend - D/F + D/S,  bend = sum_k (D_k/D) (sigma(-t_k) - sigma(t_k)) / scale_k.
// Both forms of the sums give them from the terms F_k, S_k, D_k; what the terms of one sum have in
// common cancels.

template <typename A>
COOPFLOW_HD MixtureTerms<A> direct_terms(const Logistic<A>& at, const Component<A>& c) {
  const A below = c.weight * at.below;
  return {below, c.weight * at.above, below * at.above * c.inv_scale};
}

template <typename A>
struct GradientSums {
  A cdf = A(0), survival = A(0), density = A(0), weight = A(0);
  A cdf_slope = A(0), survival_slope = A(0), bend = A(0);  // in units
};

template <typename A>
COOPFLOW_HD void add(GradientSums<A>& sums, const Logistic<A>& at, const Component<A>& c,
                     const MixtureTerms<A>& terms) {
  sums.cdf += terms.cdf;
  sums.survival += terms.survival;
  sums.density += terms.density;
  sums.weight += c.weight;
  sums.cdf_slope = multiply_add(terms.cdf * at.above, c.inv_scale, sums.cdf_slope);
  sums.survival_slope = multiply_add(terms.survival * at.below, c.inv_scale, sums.survival_slope);
  sums.bend = multiply_add(terms.density * c.inv_scale, at.above - at.below, sums.bend);
}

// Of two parts of the components.
template <typename A>
COOPFLOW_HD GradientSums<A> merge(const GradientSums<A>& a, const GradientSums<A>& b) {
  return {a.cdf + b.cdf,       a.survival + b.survival,   a.density + b.density,
          a.weight + b.weight, a.cdf_slope + b.cdf_slope, a.survival_slope + b.survival_slope,
          a.bend + b.bend};
}

template <typename A>
struct MixtureSlopes {
  A logit, log_slope;  // du/dx and dl/dx
};

template <typename A>
COOPFLOW_HD MixtureSlopes<A> mixture_slopes(const GradientSums<A>& sums) {
  constexpr A kPerUnit = MixtureConstants<A>::kPerUnit;
  const A cdf = sums.cdf_slope * reciprocal(sums.cdf);
  const A survival = sums.survival_slope * reciprocal(sums.survival);
  const A bend = sums.bend * reciprocal(sums.density);
  return {(cdf + survival) * kPerUnit, (bend - (cdf - survival)) * kPerUnit};
}

// Of the sums; they turn a component's terms into its shares.
template <typename A>
struct Reciprocals {
  A cdf, survival, density, weight;
};

template <typename A>
COOPFLOW_HD Reciprocals<A> reciprocals(const GradientSums<A>& sums) {
  return {reciprocal(sums.cdf), reciprocal(sums.survival), reciprocal(sums.density),
          reciprocal(sums.weight)};
}

template <typename A>
struct ComponentGradient {
  A logit, mean, log_scale;
};

// From the gradients of u and of l. `clamped`: the log-scale is.
template <typename A>
COOPFLOW_HD ComponentGradient<A> component_gradient(const Logistic<A>& at, A inv_scale, A weight,
                                                    bool clamped, const MixtureTerms<A>& terms,
                                                    const Reciprocals<A>& per, A grad_u, A grad_l) {
  constexpr A kPerUnit = MixtureConstants<A>::kPerUnit;
  const MixtureTerms<A> share{terms.cdf * per.cdf, terms.survival * per.survival,
                              terms.density * per.density};
  const A weight_share = weight * per.weight;
  const A grad_cdf = (grad_u - grad_l) * share.cdf;
  const A grad_survival = (grad_u + grad_l) * share.survival;
  const A grad_density = grad_l * share.density;
  const A grad_t =
      grad_cdf * at.above + grad_survival * at.below + grad_density * (at.above - at.below);
  return {grad_cdf - grad_survival + (grad_density + grad_l * weight_share),
          -grad_t * (inv_scale * kPerUnit),
          clamped ? A(0) : -grad_t * (at.t * kPerUnit) - grad_density};
}

// Gradients of u and l, and of the coupling's own arguments.
template <typename A>
struct CouplingGradient {
  A u, l;
  A input, a, b;
};

// y = (u + b) e^a with log|det| = l + a. NaN where u overflows, as y is.
template <typename A>
COOPFLOW_HD CouplingGradient<A> mixture_forward_gradient(A grad_y, A grad_ladj,
                                                         const MixtureSlopes<A>& at, A u, A a,
                                                         A b) {
  const A grad_u = poisoned(grad_y * exponential(a), u);
  return {grad_u, grad_ladj, multiply_add(grad_u, at.logit, grad_ladj * at.log_slope),
          multiply_add(grad_u, u + b, grad_ladj), grad_u};
}

// x solves u(x) = v = y e^-a - b (v clamped in legacy mode), log|det| = -(l + a), by the implicit
// function theorem. Where the slope underflows x is not determined, and its derivative stays
// finite. In legacy mode log|det| gains log sigma'(v) - log sigma'(clamped v).
template <typename A>
COOPFLOW_HD CouplingGradient<A> mixture_inverse_gradient(A grad_x, A grad_ladj,
                                                         const MixtureSlopes<A>& at, A y, A a, A b,
                                                         bool legacy_cdf_clamp) {
  const A scale = exponential(-a);
  const A v = multiply_add(y, scale, -b);
  const A grad_target = (grad_x - grad_ladj * at.log_slope) /
                        larger_of(at.logit, MixtureConstants<A>::kSmallestSlope);
  const bool clamped = legacy_cdf_clamp & (v != legacy_clamp(v));
  const A small = exponential(-absolute(v));
  const A lean = (A(1) - small) / (A(1) + small);  // tanh(|v| / 2)
  const A lean_v = v > A(0) ? -lean : lean;
  const A grad_v = clamped ? grad_ladj * lean_v : grad_target;
  return {-grad_target, -grad_ladj, grad_v * scale, -multiply_add(grad_v, y * scale, grad_ladj),
          -grad_v};
}

// --- launches ---

// `in`, `out` are (batch, per_chain); params and grad_params (batch, rows, per_chain), rows = a and
// b if `affine`, then the logits, means and log-scales of the components. The parameters may have
// another storage type than the state.
struct MixtureShape {
  int64_t batch, per_chain, components;
  bool affine;

  COOPFLOW_HD int64_t first_row() const { return affine ? 2 : 0; }
  COOPFLOW_HD int64_t rows() const { return first_row() + 3 * components; }
};

template <typename A>
struct MixtureCouplingArgs {
  const void* in;
  const void* params;
  void* out;
  A* ladj;  // (batch)
  MixtureShape shape;
  bool inverse, legacy_cdf_clamp;
};

template <typename A>
struct MixtureCouplingBackwardArgs {
  const void* grad_out;
  const A* grad_ladj;  // (batch)
  const void* x;       // the forward map's input, which is the inverse's output
  const void* y;       // the inverse's input; null for the forward map
  const void* params;
  void* grad_in;
  void* grad_params;
  MixtureShape shape;
  bool legacy_cdf_clamp;

  COOPFLOW_HD bool inverse() const { return y != nullptr; }
};

}  // namespace coopflow
