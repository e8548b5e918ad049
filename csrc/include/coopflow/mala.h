// The Metropolis-adjusted Langevin algorithm: whole chains whose steps are proposals,
//   y = x - (d^2 / 2) grad U(x) + d sqrt(t) xi,
// accepted with probability min(1, p(y) q(x|y) / (p(x) q(y|x))), where p = exp(-U / t) and q(y|x)
// is the proposal's density. Roberts and Tweedie, Bernoulli 2 (1996).
#pragma once

#include <cstdint>
#include <limits>

#include "coopflow/elementary.h"
#include "coopflow/langevin_chain.h"
#include "coopflow/macros.h"
#include "coopflow/normal.h"

namespace coopflow {

// Columns of a step's statistics: of the state after it, then of the proposal.
enum MalaStatistic : int {
  kMalaEnergy,
  kMalaSumGradSquared,
  kMalaAcceptance,
  kMalaAccepted,  // 0 or 1
  kMalaStepSize,
  kMalaStatistics
};

// Everything a back end needs for the chains of one call, beside their energy.
template <typename A>
struct MalaChainArgs : ChainArgs<A> {
  const int64_t* accept_rng;      // as rng, of the uniforms that accept
  A* step_size_out;               // (batch), after the last step
  bool* finite;                   // (batch), whether U and its gradient are finite at x0
  CoefficientTable<A> step_size;  // d
  A temperature, root_temperature;
  A sign;               // of the energy given, -1 where it is f = -U
  int64_t adapt_steps;  // d is adapted in the first so many
  A target_accept;      // to this acceptance

  // Coefficients of a proposal, for the gradient of the energy given.
  COOPFLOW_HD A drift(A size) const { return sign * (size * size / A(2)); }
  COOPFLOW_HD A noise(A size) const { return size * root_temperature; }

  COOPFLOW_HD uint32_t accept_time(int64_t k) const {
    return static_cast<uint32_t>(accept_rng[1] + this->step + k);
  }
};

// --- the acceptance of one chain -----------------------------------------------------------------

// log of p(y) q(x|y) / (p(x) q(y|x)). forward: the square of y - (x - drift grad U(x)), drift being
// d^2 / 2; backward: that of x - (y - drift grad U(y)).
template <typename A>
COOPFLOW_HD A mala_log_ratio(A energy, A energy_y, A forward, A backward, A step_size,
                             A temperature) {
  const A proposals = (forward - backward) / (A(2) * step_size * step_size);
  return (energy - energy_y + proposals) / temperature;
}

// The probability of acceptance: 0 where the proposal's energy or its gradient is not finite.
template <typename A>
COOPFLOW_HD A mala_acceptance(A log_ratio, A energy_y) {
  const A probability = exponential(log_ratio < A(0) ? log_ratio : A(0));
  return is_finite(energy_y) && log_ratio == log_ratio ? probability : A(0);
}

// The uniform that accepts: a single precision one in both, as is drawn step by step.
template <typename A>
COOPFLOW_HD A mala_uniform(uint32_t word) {
  return static_cast<A>(uniform_from_word(word, float()));
}

// --- chains side by side -------------------------------------------------------------------------

// A few chains: their states, and the proposals, which an energy's functor takes for chains.
template <typename A, int kLanes>
struct MalaLanes {
  ChainLanes<A, kLanes> proposal;  // without coefficients
  A *x, *grad;                     // of the states
  A energy[kLanes];
  A step_size[kLanes];
  A log_size[kLanes], sum_of_logs[kLanes];  // while the step size is adapted

  // In the memory of Langevin chains: a proposal is made where its noise was drawn.
  COOPFLOW_HD explicit MalaLanes(const ChainLanes<A, kLanes>& memory)
      : proposal(memory), x(memory.x_ref), grad(memory.xi) {
    proposal.xi = memory.x;
  }
};

template <int kLanes, typename A>
COOPFLOW_HD void load_step_sizes(const MalaChainArgs<A>& args, int64_t k,
                                 MalaLanes<A, kLanes>& lanes) {
  for (int l = 0; l < kLanes; ++l) {
    lanes.step_size[l] =
        coefficient_at(coefficient_row(args.step_size, k), lanes.proposal.chain(l));
  }
}

// The states are the proposals' x, their energy and gradient are known.
template <int kLanes, typename A>
COOPFLOW_HD void start_lanes(const MalaChainArgs<A>& args, int64_t per_chain,
                             MalaLanes<A, kLanes>& lanes) {
  A nonfinite[kLanes];
  load_step_sizes(args, 0, lanes);
  for (int l = 0; l < kLanes; ++l) {
    lanes.energy[l] = lanes.proposal.energy[l];
    lanes.log_size[l] = args.adapt_steps > 0 ? log_positive(lanes.step_size[l]) : A(0);
    lanes.sum_of_logs[l] = A(0);
    nonfinite[l] = is_finite(lanes.energy[l]) ? A(0) : A(1);
  }
  for (int64_t i = 0; i < per_chain * kLanes; i += kLanes) {
    COOPFLOW_LANES
    for (int l = 0; l < kLanes; ++l) {
      lanes.x[i + l] = lanes.proposal.x[i + l];
      lanes.grad[i + l] = lanes.proposal.grad[i + l];
      nonfinite[l] += gradient_moments(lanes.grad[i + l]).nonfinite;
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    if (l < lanes.proposal.count) args.finite[lanes.proposal.chain(l)] = nonfinite[l] == A(0);
  }
}

// Makes the proposals of step k, whose noise is drawn.
template <int kLanes, typename A>
COOPFLOW_HD void propose_lanes(const MalaChainArgs<A>& args, int64_t k, int64_t per_chain,
                               MalaLanes<A, kLanes>& lanes) {
  constexpr A kNoLimit = std::numeric_limits<A>::infinity();
  const LangevinLimits<A> limits{kNoLimit, kNoLimit, -kNoLimit, kNoLimit};
  if (k > 0 && args.step_size.step_stride != 0) load_step_sizes(args, k, lanes);
  for (int64_t e = 0; e < per_chain; ++e) {
    const A* const x = lanes.x + e * kLanes;
    const A* const grad = lanes.grad + e * kLanes;
    A* const y = lanes.proposal.x + e * kLanes;
    COOPFLOW_LANES
    for (int l = 0; l < kLanes; ++l) {
      const LangevinChain<A> chain{args.drift(lanes.step_size[l]), args.noise(lanes.step_size[l]),
                                   A(0), A(0), A(1)};
      y[l] = langevin_update<false>(limits, chain, false, x[l], grad[l], y[l], A(0), false).x;
    }
  }
}

// A step of stochastic approximation (Andrieu and Thoms, Stat. Comput. 18, 2008); after the last,
// the mean of log d over the second half of them.
template <int kLanes, typename A>
COOPFLOW_HD void adapt_lanes(const MalaChainArgs<A>& args, int64_t k, const A (&acceptance)[kLanes],
                             MalaLanes<A, kLanes>& lanes) {
  const A gain = exponential(A(-0.6) * log_positive(static_cast<A>(k + 1)));
  const A share = 2 * k + 1 >= args.adapt_steps ? A(1) : A(0);
  const A count = static_cast<A>((args.adapt_steps + 1) / 2);
  const bool last = k + 1 == args.adapt_steps;
  COOPFLOW_LANES
  for (int l = 0; l < kLanes; ++l) {
    lanes.log_size[l] += (acceptance[l] - args.target_accept) * gain;
    lanes.sum_of_logs[l] += share * lanes.log_size[l];
    lanes.step_size[l] = exponential(last ? lanes.sum_of_logs[l] / count : lanes.log_size[l]);
  }
}

template <int kLanes, typename A>
COOPFLOW_HD void record_statistics(const MalaChainArgs<A>& args, int64_t k, int64_t per_chain,
                                   const A (&acceptance)[kLanes], const A (&accepted)[kLanes],
                                   const MalaLanes<A, kLanes>& lanes) {
  A squares[kLanes] = {};
  for (int64_t i = 0; i < per_chain * kLanes; i += kLanes) {
    COOPFLOW_LANES
    for (int l = 0; l < kLanes; ++l) squares[l] += lanes.grad[i + l] * lanes.grad[i + l];
  }
  for (int l = 0; l < kLanes; ++l) {
    if (l >= lanes.proposal.count) break;  // not a bound of the loop, which a GPU unrolls
    A* const row = args.stats + (k * args.batch + lanes.proposal.chain(l)) * kMalaStatistics;
    row[kMalaEnergy] = args.sign * lanes.energy[l];
    row[kMalaSumGradSquared] = squares[l];
    row[kMalaAcceptance] = acceptance[l];
    row[kMalaAccepted] = accepted[l];
    row[kMalaStepSize] = lanes.step_size[l];
  }
}

// Accepts or rejects the proposals of step k, whose energy and gradient are known.
template <int kLanes, typename A>
COOPFLOW_HD void accept_lanes(const MalaChainArgs<A>& args, int64_t k, int64_t per_chain,
                              const A (&uniforms)[kLanes], MalaLanes<A, kLanes>& lanes) {
  A forward[kLanes] = {}, backward[kLanes] = {}, acceptance[kLanes], accepted[kLanes];
  for (int64_t i = 0; i < per_chain * kLanes; i += kLanes) {
    COOPFLOW_LANES
    for (int l = 0; l < kLanes; ++l) {
      const A move = lanes.proposal.x[i + l] - lanes.x[i + l];
      const A drift = args.drift(lanes.step_size[l]);
      const A from_x = multiply_add(drift, lanes.grad[i + l], move);
      const A from_y = multiply_add(drift, lanes.proposal.grad[i + l], -move);
      forward[l] += from_x * from_x;
      backward[l] += from_y * from_y;
    }
  }
  COOPFLOW_LANES
  for (int l = 0; l < kLanes; ++l) {
    const A energy_y = lanes.proposal.energy[l];
    const A log_ratio =
        mala_log_ratio(args.sign * lanes.energy[l], args.sign * energy_y, forward[l], backward[l],
                       lanes.step_size[l], args.temperature);
    acceptance[l] = mala_acceptance(log_ratio, energy_y);
    accepted[l] = uniforms[l] < acceptance[l] ? A(1) : A(0);
    lanes.energy[l] = accepted[l] != A(0) ? energy_y : lanes.energy[l];
  }
  for (int64_t i = 0; i < per_chain * kLanes; i += kLanes) {
    COOPFLOW_LANES
    for (int l = 0; l < kLanes; ++l) {
      const bool moves = accepted[l] != A(0);
      lanes.x[i + l] = moves ? lanes.proposal.x[i + l] : lanes.x[i + l];
      lanes.grad[i + l] = moves ? lanes.proposal.grad[i + l] : lanes.grad[i + l];
    }
  }
  if (args.stats != nullptr) record_statistics(args, k, per_chain, acceptance, accepted, lanes);
  if (k < args.adapt_steps) adapt_lanes(args, k, acceptance, lanes);
}

// Writes what the chains end with.
template <int kLanes, typename A>
COOPFLOW_HD void finish_lanes(const MalaChainArgs<A>& args, int64_t per_chain,
                              const MalaLanes<A, kLanes>& lanes) {
  store_lanes(lanes.x, lanes.proposal, per_chain, args.x_out);
  for (int l = 0; l < kLanes; ++l) {
    if (l < lanes.proposal.count) args.step_size_out[lanes.proposal.chain(l)] = lanes.step_size[l];
  }
}

// All steps of a few chains. gradient(proposals) sets grad and energy from x; noise(proposals, key,
// time) sets xi; uniforms(key, time, numbers) gives one number of each chain.
template <int kLanes, typename A, typename Gradient, typename Noise, typename Uniforms>
COOPFLOW_HD void run_mala_lanes(const MalaChainArgs<A>& args, const ChainLanes<A, kLanes>& memory,
                                const Gradient& gradient, const Noise& noise,
                                const Uniforms& uniforms) {
  const int64_t per_chain = args.per_chain;
  const PhiloxKey key = make_philox_key(args.rng[0]);
  const PhiloxKey accept_key = make_philox_key(args.accept_rng[0]);
  const uint32_t first_time = args.noise_time(0), first_accept_time = args.accept_time(0);
  MalaLanes<A, kLanes> lanes(memory);
  load_lanes(args.x0, lanes.proposal, per_chain, lanes.proposal.x);
  // Before the first step the start itself is evaluated, in the same place of the code.
  for (int64_t k = -1; k < args.n_steps; ++k) {
    const uint32_t steps = static_cast<uint32_t>(k);
    if (k >= 0) {
      fill_xi(args, k, per_chain, key, first_time + steps, noise, lanes.proposal);
      propose_lanes(args, k, per_chain, lanes);
    }
    gradient(lanes.proposal);
    if (k < 0) {
      start_lanes(args, per_chain, lanes);
      continue;
    }
    A numbers[kLanes];
    uniforms(accept_key, first_accept_time + steps, numbers);
    accept_lanes(args, k, per_chain, numbers, lanes);
    record_lanes(args, k, per_chain, lanes.proposal, lanes.x);
  }
  finish_lanes(args, per_chain, lanes);
}

}  // namespace coopflow
