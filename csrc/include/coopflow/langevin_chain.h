// Whole Langevin chains: the plain description of a launch over all steps of all chains, and the
// loop of a few chains that move side by side, given their gradient and their noise. The update of
// an element is langevin.h's; chains of the same lanes whose moves are proposals are mala.h's.
#pragma once

#include <cstdint>

#include "coopflow/langevin.h"
#include "coopflow/macros.h"
#include "coopflow/normal.h"
#include "coopflow/philox.h"

namespace coopflow {

// Columns of a chain's statistics: those of a step, then the energy where the gradient was taken.
enum ChainStatistic : int { kEnergyValue = kStatistics, kChainStatistics };

// A coefficient of all steps.
template <typename A>
struct CoefficientTable {
  Coefficient<A> first;  // that of the first step
  int64_t step_stride;   // from row to row, in elements; 0 when one row serves all steps
};

// That of the k-th step.
template <typename A>
COOPFLOW_HD Coefficient<A> coefficient_row(const CoefficientTable<A>& table, int64_t k) {
  Coefficient<A> row = table.first;
  if (table.step_stride == 0) return row;
  const int64_t offset = k * table.step_stride;
  row.row = row.row_is_double
                ? static_cast<const void*>(static_cast<const double*>(row.row) + offset)
                : static_cast<const void*>(static_cast<const float*>(row.row) + offset);
  return row;
}

// What a back end is told of the chains of one call, whatever moves them. The state is float or
// double and (batch, per_chain) in memory; k counts the steps of the call from 0.
template <typename A>
struct ChainArgs {
  const A* x0;
  A* x_out;
  const A* xi;         // (n_steps, batch, per_chain), may be null, as may both below
  A* trajectory;       // (n_steps / thin, batch, per_chain)
  A* stats;            // (n_steps, batch, columns)
  const int64_t* rng;  // seed, time, number of the first chain
  int64_t batch, per_chain, n_steps;
  int64_t thin;
  int64_t step;  // number of the first step: in the noise and in tables
  NoiseSource noise_source;

  // The trajectory's row that the state after step k goes into; -1 for none.
  COOPFLOW_HD int64_t trajectory_row(int64_t k) const {
    return trajectory != nullptr && (k + 1) % thin == 0 ? (k + 1) / thin - 1 : -1;
  }

  COOPFLOW_HD uint32_t noise_time(int64_t k) const {
    return static_cast<uint32_t>(rng[1] + step + k);
  }
};

// Everything a back end needs for Langevin chains, beside their energy; the statistics have
// kChainStatistics columns, and frozen_at counts steps from `step` on.
template <typename A>
struct LangevinChainArgs : ChainArgs<A> {
  const A* x_ref;      // may be null
  int64_t* frozen_at;  // (batch), never null
  CoefficientTable<A> drift, noise, decay, pull;
  LangevinLimits<A> limits, last_limits;  // of the steps; of the last one, the clamp alone differs
  A grad_norm;                            // infinite: none
  bool negate_drift;                      // the energy given is f = -U
  bool freeze_nonfinite;                  // a chain stops at its first gradient that is not finite

  // Whether the plain path of langevin_update is enough, and no statistics are wanted.
  COOPFLOW_HD bool is_plain() const {
    return this->stats == nullptr && x_ref == nullptr && decay.first.row == nullptr &&
           decay.first.value == A(0) && !has_norm_limit();
  }

  COOPFLOW_HD bool has_norm_limit() const { return is_finite(grad_norm); }

  // Whether coefficients must be read again at each step.
  COOPFLOW_HD bool coefficients_vary() const {
    return drift.step_stride != 0 || noise.step_stride != 0 || decay.step_stride != 0 ||
           pull.step_stride != 0;
  }

  // Chosen value by value: between two structs a GPU would choose by their place on its stack.
  COOPFLOW_HD LangevinLimits<A> limits_of(int64_t k) const {
    const bool last = k + 1 == this->n_steps;
    return {limits.grad_clip, limits.step_clip, last ? last_limits.clamp_low : limits.clamp_low,
            last ? last_limits.clamp_high : limits.clamp_high};
  }
};

// What a chain's elements share during step k, with a gradient that is not scaled.
template <typename A>
COOPFLOW_HD LangevinChain<A> chain_coefficients(const LangevinChainArgs<A>& args, int64_t k,
                                                int64_t chain) {
  const A drift = coefficient_at(coefficient_row(args.drift, k), chain);
  return {args.negate_drift ? -drift : drift, coefficient_at(coefficient_row(args.noise, k), chain),
          coefficient_at(coefficient_row(args.decay, k), chain),
          coefficient_at(coefficient_row(args.pull, k), chain), A(1)};
}

// What an element adds to the statistics of a chain that may have stopped: then it only counts its
// gradient.
template <typename A>
COOPFLOW_HD StatisticTerms<A> terms_of_chain(const StatisticTerms<A>& terms, bool active) {
  return {{terms.of[kSumGradSquared], active ? terms.of[kSumDisplacementSquared] : A(0),
           active ? terms.of[kClippedElements] : A(0), active ? terms.of[kClampedElements] : A(0),
           terms.of[kNonFiniteElements]}};
}

// A few chains that move side by side: consecutive ones, from `first` on, of which the first
// `count` exist. Element e of lane l stands at [e * kLanes + l].
template <typename A, int kLanes>
struct ChainLanes {
  int64_t first;
  int count;
  A *x, *grad, *x_ref;  // per_chain elements of each lane
  A* xi;                // the same, up to a multiple of four
  A drift[kLanes], noise[kLanes], decay[kLanes], pull[kLanes];
  A norm_scale[kLanes];
  A active[kLanes];  // 1, and 0 from the first gradient on that is not finite
  A energy[kLanes];

  // Lanes that do not exist read what the last one reads, and write nothing.
  COOPFLOW_HD int64_t chain(int lane) const { return first + (lane < count ? lane : count - 1); }
};

template <int kLanes, typename A>
COOPFLOW_HD void load_lanes(const A* from, const ChainLanes<A, kLanes>& at, int64_t per_chain,
                            A* lanes) {
  for (int64_t e = 0; e < per_chain; ++e) {
    for (int l = 0; l < kLanes; ++l) lanes[e * kLanes + l] = from[at.chain(l) * per_chain + e];
  }
}

template <int kLanes, typename A>
COOPFLOW_HD void store_lanes(const A* lanes, const ChainLanes<A, kLanes>& at, int64_t per_chain,
                             A* to) {
  for (int64_t e = 0; e < per_chain; ++e) {
    for (int l = 0; l < at.count; ++l) to[at.chain(l) * per_chain + e] = lanes[e * kLanes + l];
  }
}

template <int kLanes, typename A>
COOPFLOW_HD void load_coefficients(const LangevinChainArgs<A>& args, int64_t k,
                                   ChainLanes<A, kLanes>& lanes) {
  for (int l = 0; l < kLanes; ++l) {
    const LangevinChain<A> chain = chain_coefficients(args, k, lanes.chain(l));
    lanes.drift[l] = chain.drift;
    lanes.noise[l] = chain.noise;
    lanes.decay[l] = chain.decay;
    lanes.pull[l] = chain.pull;
  }
}

template <int kLanes, typename A>
COOPFLOW_HD void scale_norms(const LangevinChainArgs<A>& args, int64_t per_chain,
                             ChainLanes<A, kLanes>& lanes) {
  double sums[kLanes][kNormSums<A>] = {};
  for (int64_t e = 0; e < per_chain; ++e) {
    COOPFLOW_LANES
    for (int l = 0; l < kLanes; ++l) {
      add_norm_terms(lanes.grad[e * kLanes + l], args.limits.grad_clip, sums[l]);
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    lanes.norm_scale[l] = norm_clip_scale(sums[l], args.grad_norm);
  }
}

// Sets norm_scale, and stops the chains whose gradient is not finite.
template <bool kFull, int kLanes, typename A>
COOPFLOW_HD void gradient_pass(const LangevinChainArgs<A>& args, int64_t k, int64_t per_chain,
                               ChainLanes<A, kLanes>& lanes) {
  if (kFull && args.has_norm_limit()) scale_norms(args, per_chain, lanes);
  if (!args.freeze_nonfinite) return;
  A nonfinite[kLanes];
  COOPFLOW_LANES
  for (int l = 0; l < kLanes; ++l) nonfinite[l] = A(0);
  for (int64_t e = 0; e < per_chain; ++e) {
    COOPFLOW_LANES
    for (int l = 0; l < kLanes; ++l) {
      nonfinite[l] += is_finite(lanes.grad[e * kLanes + l]) ? A(0) : A(1);
    }
  }
  A stopped = A(0);
  for (int l = 0; l < kLanes; ++l) stopped += nonfinite[l];
  if (stopped == A(0)) return;
  for (int l = 0; l < kLanes; ++l) {
    if (nonfinite[l] == A(0) || lanes.active[l] == A(0)) continue;
    lanes.active[l] = A(0);
    if (l < lanes.count) args.frozen_at[lanes.chain(l)] = args.step + k;
  }
}

// Moves the chains by step k, given their gradient, their noise and their energy. kFull: with
// decay, pull, norm scaling and statistics.
template <bool kFull, int kLanes, typename A>
COOPFLOW_HD void move_lanes(const LangevinChainArgs<A>& args, int64_t k, int64_t per_chain,
                            ChainLanes<A, kLanes>& lanes) {
  if (args.freeze_nonfinite || (kFull && args.has_norm_limit())) {
    gradient_pass<kFull>(args, k, per_chain, lanes);
  }
  const LangevinLimits<A> limits = args.limits_of(k);
  const bool has_ref = kFull && args.x_ref != nullptr;
  A sums[kStatistics][kLanes] = {};
  for (int64_t e = 0; e < per_chain; ++e) {
    A* const x = lanes.x + e * kLanes;
    const A* const grad = lanes.grad + e * kLanes;
    const A* const xi = lanes.xi + e * kLanes;
    const A* const x_ref = has_ref ? lanes.x_ref + e * kLanes : grad;
    COOPFLOW_LANES
    for (int l = 0; l < kLanes; ++l) {
      const LangevinChain<A> chain{lanes.drift[l], lanes.noise[l], lanes.decay[l], lanes.pull[l],
                                   lanes.norm_scale[l]};
      const A before = x[l];
      const LangevinMove<A> move =
          langevin_update<kFull>(limits, chain, false, before, grad[l], xi[l], x_ref[l], has_ref);
      const bool active = lanes.active[l] != A(0);
      x[l] = active ? move.x : before;
      if (kFull) {
        const StatisticTerms<A> terms =
            terms_of_chain(statistic_terms<A>(before, grad[l], move), active);
        COOPFLOW_UNROLL
        for (int s = 0; s < kStatistics; ++s) sums[s][l] += terms.of[s];
      }
    }
  }
  if (!kFull || args.stats == nullptr) return;
  for (int l = 0; l < kLanes; ++l) {
    if (l >= lanes.count) break;  // not a bound of the loop, which a GPU unrolls
    A* const row = args.stats + (k * args.batch + lanes.chain(l)) * kChainStatistics;
    COOPFLOW_UNROLL
    for (int s = 0; s < kStatistics; ++s) row[s] = sums[s][l];
    row[kEnergyValue] = lanes.energy[l];
  }
}

// Sets xi for step k, at this time of the noise: by noise(lanes, key, time), or to what is given.
// Without noise it stays as it is.
template <int kLanes, typename A, typename Noise>
COOPFLOW_HD void fill_xi(const ChainArgs<A>& args, int64_t k, int64_t per_chain, PhiloxKey key,
                         uint32_t time, const Noise& noise, ChainLanes<A, kLanes>& lanes) {
  if (args.noise_source == NoiseSource::kPhilox) {
    noise(lanes, key, time);
  } else if (args.noise_source == NoiseSource::kGiven) {
    load_lanes(args.xi + k * (args.batch * per_chain), lanes, per_chain, lanes.xi);
  }
}

// Keeps x, the states of the chains after step k, if they are wanted.
template <int kLanes, typename A>
COOPFLOW_HD void record_lanes(const ChainArgs<A>& args, int64_t k, int64_t per_chain,
                              const ChainLanes<A, kLanes>& lanes, const A* x) {
  const int64_t row = args.trajectory_row(k);
  if (row >= 0) store_lanes(x, lanes, per_chain, args.trajectory + row * (args.batch * per_chain));
}

// All steps of a few chains. gradient(lanes) sets grad and energy from x; noise(lanes, key, time)
// sets xi. kPerChain is the number of elements where it is known when the code is compiled, else 0.
template <bool kFull, int64_t kPerChain, int kLanes, typename A, typename Gradient, typename Noise>
COOPFLOW_HD void run_lanes(const LangevinChainArgs<A>& args, ChainLanes<A, kLanes>& lanes,
                           const Gradient& gradient, const Noise& noise) {
  const int64_t per_chain = kPerChain == 0 ? args.per_chain : kPerChain;
  const PhiloxKey key = make_philox_key(args.rng[0]);
  const uint32_t first_time = args.noise_time(0);
  load_lanes(args.x0, lanes, per_chain, lanes.x);
  if (args.x_ref != nullptr) load_lanes(args.x_ref, lanes, per_chain, lanes.x_ref);
  for (int l = 0; l < kLanes; ++l) {
    lanes.norm_scale[l] = lanes.active[l] = A(1);
    if (l < lanes.count) args.frozen_at[lanes.chain(l)] = args.step + args.n_steps;
  }
  if (kLanes > 1 || args.noise_source == NoiseSource::kNone) {  // of lanes that do not exist, too
    for (int64_t i = 0; i < per_chain * kLanes; ++i) lanes.xi[i] = A(0);
  }
  for (int64_t k = 0; k < args.n_steps; ++k) {
    if (k == 0 || args.coefficients_vary()) load_coefficients(args, k, lanes);
    gradient(lanes);
    fill_xi(args, k, per_chain, key, first_time + static_cast<uint32_t>(k), noise, lanes);
    move_lanes<kFull>(args, k, per_chain, lanes);
    record_lanes(args, k, per_chain, lanes, lanes.x);
  }
  store_lanes(lanes.x, lanes, per_chain, args.x_out);
}

}  // namespace coopflow
