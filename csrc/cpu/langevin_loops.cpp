#include "langevin_loops.h"

#include "noise_range.h"
#include "noise_tile.h"
#include "tile.h"

namespace coopflow {
namespace COOPFLOW_ISA {
namespace {

template <typename A>
struct StatisticLanes {
  alignas(64) A sums[kStatistics][kLanes] = {};

  // Those of a chain, or a chunk of it.
  void write(int64_t per_chain, A* out) const {
    for (int s = 0; s < kStatistics; ++s) out[s] = sum_lanes(sums[s], per_chain);
  }
};

template <typename A>
void store_low_precision(const LangevinArgs<A>& args, const A* values, int64_t offset, int64_t n) {
  if (args.low_precision == LowPrecision::kBFloat16) {
    store<bfloat16>(values, offset, n, args.x_low);
  } else if (args.low_precision == LowPrecision::kFloat16) {
    store<float16>(values, offset, n, args.x_low);
  }
}

// Up to kTile consecutive elements that share their coefficients. xi holds their noise.
template <typename T, bool kFull, bool kStats>
void update_span(const LangevinArgs<arithmetic_t<T>>& args,
                 const LangevinChain<arithmetic_t<T>>& coefficients, int64_t offset, int64_t n,
                 const arithmetic_t<T>* xi, StatisticLanes<arithmetic_t<T>>* statistics) {
  using A = arithmetic_t<T>;
  alignas(64) A x_buffer[kTile], grad_buffer[kTile], ref_buffer[kTile], moved_buffer[kTile];
  const LangevinLimits<A> limits = args.limits;
  const LangevinChain<A> chain = coefficients;
  const bool noise_after = kFull && args.noise_when == NoiseWhen::kAfterStep;
  const bool has_ref = kFull && args.x_ref != nullptr;
  const A* x = view<T>(args.x, offset, n, x_buffer);
  const A* grad = grad_buffer;
  if (args.grad != nullptr) {
    grad = view<T>(args.grad, offset, n, grad_buffer);
  } else {
    for (int64_t i = 0; i < n; ++i) grad_buffer[i] = A(0);
  }
  const A* x_ref = has_ref ? view<T>(args.x_ref, offset, n, ref_buffer) : grad;
  A* moved = room<T>(args.x_out, offset, moved_buffer);
  if constexpr (kStats) {
    alignas(64) A terms[kStatistics][kTile];
    COOPFLOW_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i) {
      const A before = x[i], g = grad[i];  // which moved[i] may overwrite
      const LangevinMove<A> move = langevin_update<kFull>(
          limits, chain, noise_after, before, g, xi[i], has_ref ? x_ref[i] : A(0), has_ref);
      moved[i] = move.x;
      const StatisticTerms<A> of = statistic_terms<T>(before, g, move);
      COOPFLOW_UNROLL
      for (int s = 0; s < kStatistics; ++s) terms[s][i] = of.of[s];
    }
    for (int s = 0; s < kStatistics; ++s) add_by_lane(terms[s], n, statistics->sums[s]);
  } else {
    COOPFLOW_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i) {
      moved[i] = langevin_update<kFull>(limits, chain, noise_after, x[i], grad[i], xi[i],
                                        has_ref ? x_ref[i] : A(0), has_ref)
                     .x;
    }
  }
  put_back<T>(moved, offset, n, args.x_out);
  store_low_precision(args, moved, offset, n);
}

// An inactive chain keeps its state; only the sums over its gradient are real.
template <typename T>
void keep_span(const LangevinArgs<arithmetic_t<T>>& args, int64_t offset, int64_t n,
               StatisticLanes<arithmetic_t<T>>* statistics) {
  using A = arithmetic_t<T>;
  alignas(64) A buffer[kTile], squares[kTile], nonfinite[kTile];
  const A* grad = view<T>(args.grad, offset, n, buffer);
  for (int64_t i = 0; i < n; ++i) {
    const GradientMoments<A> moments = gradient_moments(grad[i]);
    squares[i] = moments.sum_of_squares;
    nonfinite[i] = moments.nonfinite;
  }
  add_by_lane(squares, n, statistics->sums[kSumGradSquared]);
  add_by_lane(nonfinite, n, statistics->sums[kNonFiniteElements]);
}

// One tile of the flat range of quads over all chains, which share their coefficients: they follow
// one another in memory, so one span serves them all.
template <typename T, bool kFull>
void update_shared_tile(const LangevinArgs<arithmetic_t<T>>& args, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  alignas(64) A xi[kTile] = {};
  const int64_t first = first_element(args.per_chain, begin);
  const int64_t n = first_element(args.per_chain, end) - first;
  if (args.noise_source == NoiseSource::kPhilox) {
    fill_without_gaps<NormalNoise>(args.rng, args.step, args.per_chain, begin, end, xi);
  } else if (args.noise_source == NoiseSource::kGiven) {
    load<T>(args.xi, first, n, xi);
  }
  update_span<T, kFull, false>(args, langevin_chain(args, 0), first, n, xi, nullptr);
}

// The same, chain by chain.
template <typename T, bool kFull>
void update_tile(const LangevinArgs<arithmetic_t<T>>& args, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  alignas(64) A xi[kTile] = {};
  const int64_t per_chain = args.per_chain;
  const int64_t quads_per_chain = divide_up(per_chain, 4);
  if (args.noise_source == NoiseSource::kPhilox) {
    TileCounters counters{};
    set_counters(args.rng[2], quads_per_chain, begin, end, &counters);
    fill_tile<NormalNoise>(counters, make_philox_key(args.rng[0]), noise_time(args.rng, args.step),
                           xi);
  }
  for_each_run(quads_per_chain, begin, end, [&](const Run& run) {
    if (args.active != nullptr && !args.active[run.chain]) return;
    const int64_t offset = run.chain * per_chain + 4 * run.first_block;
    A* noise = xi + 4 * run.quad;
    const int64_t n = run_elements(run, per_chain);
    if (args.noise_source == NoiseSource::kGiven) load<T>(args.xi, offset, n, noise);
    update_span<T, kFull, false>(args, langevin_chain(args, run.chain), offset, n, noise, nullptr);
  });
}

template <typename T>
void update_tiles(const LangevinArgs<arithmetic_t<T>>& args, int64_t begin, int64_t end) {
  const int64_t quads = args.batch * divide_up(args.per_chain, 4);
  const bool plain = args.is_plain();
  const auto update = args.is_uniform()
                          ? (plain ? update_shared_tile<T, false> : update_shared_tile<T, true>)
                          : (plain ? update_tile<T, false> : update_tile<T, true>);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kQuadsPerTile;
    const int64_t last = first + kQuadsPerTile < quads ? first + kQuadsPerTile : quads;
    update(args, first, last);
  }
}

// Chains so short that one tile of noise serves several of them.
template <typename T>
void update_short_chains(const LangevinArgs<arithmetic_t<T>>& args, arithmetic_t<T>* sums,
                         int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t per_chain = args.per_chain;
  const int64_t quads = divide_up(per_chain, 4);
  const int64_t group = kQuadsPerTile / quads;
  for (int64_t first = begin; first < end; first += group) {
    const int64_t last = first + group < end ? first + group : end;
    alignas(64) A xi[kTile] = {};
    if (args.noise_source == NoiseSource::kPhilox) {
      TileCounters counters{};
      set_counters(args.rng[2], quads, first * quads, last * quads, &counters);
      fill_tile<NormalNoise>(counters, make_philox_key(args.rng[0]),
                             noise_time(args.rng, args.step), xi);
    }
    for (int64_t chain = first; chain < last; ++chain) {
      StatisticLanes<A> statistics;
      const int64_t offset = chain * per_chain;
      A* noise = xi + 4 * quads * (chain - first);
      if (args.active != nullptr && !args.active[chain]) {
        keep_span<T>(args, offset, per_chain, &statistics);
      } else {
        if (args.noise_source == NoiseSource::kGiven) load<T>(args.xi, offset, per_chain, noise);
        update_span<T, true, true>(args, langevin_chain(args, chain), offset, per_chain, noise,
                                   &statistics);
      }
      statistics.write(per_chain, sums + chain * kStatistics);
    }
  }
}

template <typename T>
void update_chunks(const LangevinArgs<arithmetic_t<T>>& args, arithmetic_t<T>* partial_sums,
                   int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  if (2 * divide_up(args.per_chain, 4) <= kQuadsPerTile) {
    return update_short_chains<T>(args, partial_sums, begin, end);
  }
  for (int64_t index = begin; index < end; ++index) {
    StatisticLanes<A> statistics;
    for_each_tile_of_chunk(args.per_chain, index, [&](int64_t chain, int64_t e, int64_t n) {
      const int64_t offset = chain * args.per_chain + e;
      if (args.active != nullptr && !args.active[chain]) {
        return keep_span<T>(args, offset, n, &statistics);
      }
      alignas(64) A xi[kTile] = {};
      if (args.noise_source == NoiseSource::kPhilox) {
        TileCounters counters;
        counters.set_run(args.rng[2] + chain, e / 4);
        fill_tile<NormalNoise>(counters, make_philox_key(args.rng[0]),
                               noise_time(args.rng, args.step), xi);
      } else if (args.noise_source == NoiseSource::kGiven) {
        load<T>(args.xi, offset, n, xi);
      }
      update_span<T, true, true>(args, langevin_chain(args, chain), offset, n, xi, &statistics);
    });
    statistics.write(args.per_chain, partial_sums + index * kStatistics);
  }
}

// A tile of gradient, added to the sums of its norm.
template <typename A>
void add_norm_tile(const A* grad, int64_t n, A limit, double (*lanes)[kLanes]) {
  alignas(64) double terms[kNormSums<A>][kTile];
  for (int64_t i = 0; i < n; ++i) {
    const NormTerms<A> of = clipped_norm_terms(grad[i], limit);
    COOPFLOW_UNROLL
    for (int s = 0; s < kNormSums<A>; ++s) terms[s][i] = of.of[s];
  }
  for (int s = 0; s < kNormSums<A>; ++s) add_by_lane(terms[s], n, lanes[s]);
}

template <typename T>
void reduce_chunks(const LangevinArgs<arithmetic_t<T>>& args, GradientLook<arithmetic_t<T>>* looks,
                   int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  for (int64_t index = begin; index < end; ++index) {
    alignas(64) double norm_lanes[kNormSums<A>][kLanes] = {};
    alignas(64) A nonfinite_lanes[kLanes] = {};
    for_each_tile_of_chunk(args.per_chain, index, [&](int64_t chain, int64_t e, int64_t n) {
      alignas(64) A buffer[kTile], nonfinite[kTile];
      const A* grad = view<T>(args.grad, chain * args.per_chain + e, n, buffer);
      if (args.clips_norm) add_norm_tile(grad, n, args.limits.grad_clip, norm_lanes);
      for (int64_t i = 0; i < n; ++i) nonfinite[i] = is_finite(grad[i]) ? A(0) : A(1);
      add_by_lane(nonfinite, n, nonfinite_lanes);
    });
    for (int s = 0; s < kNormSums<A>; ++s)
      looks[index].norm[s] = sum_lanes(norm_lanes[s], args.per_chain);
    looks[index].nonfinite = sum_lanes(nonfinite_lanes, args.per_chain);
  }
}

template <typename T>
bool all_finite(const LangevinArgs<arithmetic_t<T>>& args, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  for (int64_t first = begin; first < end; first += kTile) {
    alignas(64) A buffer[kTile];
    const int64_t n = end - first < kTile ? end - first : kTile;
    const A* grad = view<T>(args.grad, first, n, buffer);
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; ++i) bad |= is_finite(grad[i]) ? 0U : 1U;
    if (bad != 0) return false;
  }
  return true;
}

}  // namespace

template <typename T>
LangevinLoops<T> langevin_loops() {
  return {update_tiles<T>, update_chunks<T>, reduce_chunks<T>, all_finite<T>};
}

template LangevinLoops<float> langevin_loops<float>();
template LangevinLoops<double> langevin_loops<double>();
template LangevinLoops<bfloat16> langevin_loops<bfloat16>();
template LangevinLoops<float16> langevin_loops<float16>();

}  // namespace COOPFLOW_ISA
}  // namespace coopflow
