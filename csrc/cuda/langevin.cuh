// The kernels of the Langevin ops and their launches, for states of type T.
#pragma once

#include "coopflow/langevin.h"
#include "items.cuh"
#include "langevin_launch.h"
#include "launch.cuh"
#include "reduce.cuh"
#include "team.cuh"

namespace coopflow {

template <typename A>
__device__ __forceinline__ uint32_t noise_time(const LangevinArgs<A>& args) {
  return static_cast<uint32_t>(args.rng[1] + args.step);
}

// Standard normals of one item; for the full update also those given, or zeros.
template <typename T, int kVec, bool kFull, int kCount, typename A>
__device__ __forceinline__ void load_noise(const LangevinArgs<A>& args, PhiloxKey key,
                                           uint32_t time, int64_t number, int64_t item,
                                           int64_t offset, int n, A (&xi)[kCount]) {
  if (kFull && args.noise_source != NoiseSource::kPhilox) {
    COOPFLOW_UNROLL
    for (int i = 0; i < kCount; ++i) xi[i] = A(0);
    if (args.noise_source == NoiseSource::kGiven) load_item<T, kVec>(args.xi, offset, n, xi);
    return;
  }
  COOPFLOW_UNROLL
  for (int q = 0; q < kCount / 4; ++q) {
    const uint32_t block = static_cast<uint32_t>(item * (kCount / 4) + q);
    const Quad<A> z = normals_from_words<A>(noise_words(key, number, time, block));
    xi[4 * q] = z.v0;
    xi[4 * q + 1] = z.v1;
    xi[4 * q + 2] = z.v2;
    xi[4 * q + 3] = z.v3;
  }
}

template <int kVec, int kCount, typename A>
__device__ __forceinline__ void store_low_precision(const LangevinArgs<A>& args,
                                                    const float (&values)[kCount], int64_t offset,
                                                    int n) {
  if (args.low_precision == LowPrecision::kBFloat16) {
    store_item<bfloat16, kVec>(values, offset, n, args.x_low);
  } else if (args.low_precision == LowPrecision::kFloat16) {
    store_item<float16, kVec>(values, offset, n, args.x_low);
  }
}

template <int kVec, int kCount>
__device__ __forceinline__ void store_low_precision(const LangevinArgs<double>& args,
                                                    const double (&values)[kCount], int64_t offset,
                                                    int n) {
  float narrowed[kCount];
  COOPFLOW_UNROLL
  for (int i = 0; i < kCount; ++i) narrowed[i] = static_cast<float>(values[i]);
  store_low_precision<kVec, kCount, double>(args, narrowed, offset, n);
}

// One item of the gradient, which may lie apart and be of a narrower type than the state.
template <typename T, int kVec, bool kFull, int kCount, typename A>
__device__ __forceinline__ void load_gradient(const LangevinArgs<A>& args, int64_t chain,
                                              int64_t element, int n, A (&grad)[kCount]) {
  if (kFull && args.grad == nullptr) {
    COOPFLOW_UNROLL
    for (int i = 0; i < kCount; ++i) grad[i] = A(0);
  } else if (!kFull || args.gradient_is_dense()) {
    load_item<T, kVec>(args.grad, chain * args.per_chain + element, n, grad);
  } else {
    const int64_t first = chain * args.grad_layout.chain_stride + element * args.grad_layout.stride;
    COOPFLOW_UNROLL
    for (int i = 0; i < kCount; ++i) {
      grad[i] = i < n ? gradient_at<T>(args, first + i * args.grad_layout.stride) : A(0);
    }
  }
}

// What the elements of one item are at in the noise.
struct ItemNoise {
  PhiloxKey key;
  uint32_t time;
  int64_t number;  // of the chain
  int64_t item;
};

// Moves one item; adds its statistics to sums where they are wanted.
template <typename T, int kVec, bool kFull, bool kStats, int kCount, typename A>
__device__ __forceinline__ void move_item(const LangevinArgs<A>& args,
                                          const LangevinChain<A>& coefficients,
                                          const ItemNoise& noise, int64_t offset, int n,
                                          const A (&grad)[kCount], A (&sums)[kStatistics]) {
  A x[kCount], xi[kCount];
  load_item<T, kVec>(args.x, offset, n, x);
  load_noise<T, kVec, kFull>(args, noise.key, noise.time, noise.number, noise.item, offset, n, xi);
  const bool has_ref = kFull && args.x_ref != nullptr;
  const bool noise_after = kFull && args.noise_when == NoiseWhen::kAfterStep;
  A x_ref[kCount] = {};
  if (has_ref) load_item<T, kVec>(args.x_ref, offset, n, x_ref);
  A moved[kCount];
  COOPFLOW_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const LangevinMove<A> move = langevin_update<kFull>(args.limits, coefficients, noise_after,
                                                        x[i], grad[i], xi[i], x_ref[i], has_ref);
    moved[i] = move.x;
    if (kStats && i < n) {
      const StatisticTerms<A> terms = statistic_terms<T>(x[i], grad[i], move);
      COOPFLOW_UNROLL
      for (int s = 0; s < kStatistics; ++s) sums[s] += terms.of[s];
    }
  }
  store_item<T, kVec>(moved, offset, n, args.x_out);
  if (kFull) store_low_precision<kVec, kCount>(args, moved, offset, n);
}

// --- chains that need no look at their whole gradient ---
template <typename T, int kVec, bool kFull>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    langevin_step_kernel(const __grid_constant__ LangevinArgs<arithmetic_t<T>> args,
                         const __grid_constant__ ItemGrid grid) {
  using A = arithmetic_t<T>;
  const PhiloxKey key = make_philox_key(args.rng[0]);
  const uint32_t time = noise_time(args);
  const int64_t first_chain = args.rng[2];
  const LangevinChain<A> shared = langevin_chain(args, 0);
  A unused[kStatistics];
  for (ItemCursor<kItem<T>> at(grid); at.valid(); at.next()) {
    if (kFull && args.active != nullptr && !args.active[at.chain()]) continue;
    A grad[kItem<T>];
    load_gradient<T, kVec, kFull>(args, at.chain(), at.item() * kItem<T>, at.size(), grad);
    const LangevinChain<A> coefficients = kFull ? langevin_chain(args, at.chain()) : shared;
    move_item<T, kVec, kFull, false>(args, coefficients,
                                     {key, time, first_chain + at.chain(), at.item()}, at.offset(),
                                     at.size(), grad, unused);
  }
}

// --- chains whose gradient fits the registers of a thread, a warp or a block ---
// Resident blocks that registers must allow: as many as the gradient and the options leave.
template <typename T, int kHeld, bool kFull>
constexpr int kMinTeamBlocks = kHeld == 16 && !kFull ? kMinBlocks<T>
                               : sizeof(T) == 8      ? 1
                               : kHeld > 16          ? 2
                                                     : 3;

// Sums over a chain's gradient: one that tells whether it moves, and one for the statistics.
enum HeldMoment : int { kSquares, kNonFinite, kHeldMoments };

template <typename Team, int kItems, int kCount, typename A>
__device__ __forceinline__ void held_moments(const A (&grad)[kItems][kCount], int items,
                                             A (&moments)[kHeldMoments]) {
  for_held_items<Team, kItems>(items, [&](int k, int) {
    COOPFLOW_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const GradientMoments<A> raw = gradient_moments(grad[k][i]);
      moments[kSquares] += raw.sum_of_squares;
      moments[kNonFinite] += raw.nonfinite;
    }
  });
  Team::sum(moments);
}

// What brings the norm of a chain's gradient to its limit.
template <typename Team, int kItems, int kCount, typename A>
__device__ __forceinline__ A held_norm_scale(const LangevinArgs<A>& args,
                                             const A (&grad)[kItems][kCount], int items) {
  double sums[kNormSums<A>] = {};
  for_held_items<Team, kItems>(items, [&](int k, int) {
    COOPFLOW_UNROLL
    for (int i = 0; i < kCount; ++i) add_norm_terms(grad[k][i], args.limits.grad_clip, sums);
  });
  Team::sum(sums);
  return norm_clip_scale(sums, args.grad_norm);
}

template <typename Team, int kItems, int kCount, typename A>
__device__ __forceinline__ bool all_finite(const A (&grad)[kItems][kCount], int items) {
  bool finite = true;
  for_held_items<Team, kItems>(items, [&](int k, int) {
    COOPFLOW_UNROLL
    for (int i = 0; i < kCount; ++i) finite = finite && is_finite(grad[k][i]);
  });
  return !Team::any(!finite);
}

template <typename Team, typename A>
__device__ __forceinline__ void store_statistics(const LangevinArgs<A>& args, int64_t chain,
                                                 const A (&moments)[kHeldMoments],
                                                 const A (&of_items)[kStatistics]) {
  A moved[3] = {of_items[kSumDisplacementSquared], of_items[kClippedElements],
                of_items[kClampedElements]};
  Team::sum(moved);
  if (team_rank<Team>() != 0) return;
  A* const row = args.stats + chain * kStatistics;
  row[kSumGradSquared] = moments[kSquares];
  row[kSumDisplacementSquared] = moved[0];
  row[kClippedElements] = moved[1];
  row[kClampedElements] = moved[2];
  row[kNonFiniteElements] = moments[kNonFinite];
}

// One kernel a step: the whole gradient is read, then the chain moves or stops. Each thread holds
// kHeld elements.
template <typename T, int kVec, typename Team, int kHeld, bool kFull>
__global__ void __launch_bounds__(kBlockThreads, kMinTeamBlocks<T, kHeld, kFull>)
    langevin_chain_step_kernel(const __grid_constant__ LangevinArgs<arithmetic_t<T>> args) {
  using A = arithmetic_t<T>;
  constexpr int kCount = kItem<T>;
  constexpr int kItems = kHeld / kCount;
  const PhiloxKey key = make_philox_key(args.rng[0]);
  const uint32_t time = noise_time(args);
  const int64_t first_chain = args.rng[2];
  const int items = static_cast<int>(divide_up(args.per_chain, kCount));
  const bool has_stats = kFull && args.stats != nullptr;
  for (int64_t chain = team_index<Team>(); chain < args.batch; chain += team_count<Team>()) {
    bool moves = args.active == nullptr || args.active[chain];
    if (!moves && !has_stats) continue;
    A grad[kItems][kCount];
    for_held_items<Team, kItems>(items, [&](int k, int item) {
      load_gradient<T, kVec, kFull>(args, chain, int64_t{item} * kCount,
                                    item_size<kCount>(args.per_chain, item), grad[k]);
    });
    LangevinChain<A> coefficients = langevin_chain(args, kFull ? chain : 0);
    A moments[kHeldMoments] = {};
    bool finite;
    if constexpr (kFull) {
      held_moments<Team>(grad, items, moments);
      if (args.clips_norm) {
        coefficients.norm_scale = held_norm_scale<Team>(args, grad, items);
      }
      finite = moments[kNonFinite] == A(0);
    } else {
      finite = all_finite<Team>(grad, items);
    }
    if (args.freeze_nonfinite && moves && !finite) {
      if (team_rank<Team>() == 0) freeze_chain(args, chain);
      moves = false;
    }
    A of_items[kStatistics] = {};
    if (moves) {
      for_held_items<Team, kItems>(items, [&](int k, int item) {
        move_item<T, kVec, kFull, kFull>(args, coefficients, {key, time, first_chain + chain, item},
                                         chain * args.per_chain + int64_t{item} * kCount,
                                         item_size<kCount>(args.per_chain, item), grad[k],
                                         of_items);
      });
    }
    if (has_stats) store_statistics<Team>(args, chain, moments, of_items);
  }
}

// --- longer chains: a pass over the gradient, then one that moves ---
// The sums over an item of an inactive chain: it keeps its state, so only its gradient counts.
template <int kCount, typename A>
__device__ __forceinline__ void count_item(const A (&grad)[kCount], A (&sums)[kStatistics]) {
  COOPFLOW_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const GradientMoments<A> moments = gradient_moments(grad[i]);
    sums[kSumGradSquared] += moments.sum_of_squares;
    sums[kNonFiniteElements] += moments.nonfinite;
  }
}

// One block a chunk, with statistics.
template <typename T, int kVec>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    langevin_step_statistics_kernel(const __grid_constant__ LangevinArgs<arithmetic_t<T>> args,
                                    arithmetic_t<T>* partial_sums) {
  using A = arithmetic_t<T>;
  constexpr int kCount = kItem<T>;
  const PhiloxKey key = make_philox_key(args.rng[0]);
  const uint32_t time = noise_time(args);
  const int64_t first_chain = args.rng[2];
  for (ChunkCursor at(args.batch, args.per_chain); at.valid(); at.next()) {
    const int64_t chain = at.chain();
    const bool active = args.active == nullptr || args.active[chain];
    const LangevinChain<A> coefficients = langevin_chain(args, chain);
    A sums[kStatistics] = {};
    for_each_item<kCount>(at, [&](int64_t e, int n) {
      A grad[kCount];
      load_gradient<T, kVec, true>(args, chain, e, n, grad);
      if (active) {
        move_item<T, kVec, true, true>(args, coefficients,
                                       {key, time, first_chain + chain, e / kCount},
                                       chain * args.per_chain + e, n, grad, sums);
      } else {
        count_item(grad, sums);
      }
    });
    block_sum(sums);
    if (threadIdx.x == 0) {
      COOPFLOW_UNROLL
      for (int s = 0; s < kStatistics; ++s) partial_sums[at.index() * kStatistics + s] = sums[s];
    }
  }
}

// A look at each chunk of the gradients.
template <typename T, int kVec>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    gradient_look_kernel(const __grid_constant__ LangevinArgs<arithmetic_t<T>> args,
                         GradientLook<arithmetic_t<T>>* looks) {
  using A = arithmetic_t<T>;
  constexpr int kCount = kItem<T>;
  for (ChunkCursor at(args.batch, args.per_chain); at.valid(); at.next()) {
    double norm[kNormSums<A>] = {};
    A nonfinite[1] = {};
    for_each_item<kCount>(at, [&](int64_t e, int n) {
      A grad[kCount];
      load_gradient<T, kVec, true>(args, at.chain(), e, n, grad);
      COOPFLOW_UNROLL
      for (int i = 0; i < kCount; ++i) {
        nonfinite[0] += is_finite(grad[i]) ? A(0) : A(1);
        if (args.clips_norm) add_norm_terms(grad[i], args.limits.grad_clip, norm);
      }
    });
    block_sum(norm);
    block_sum(nonfinite);
    if (threadIdx.x == 0) {
      GradientLook<A>& look = looks[at.index()];
      COOPFLOW_UNROLL
      for (int i = 0; i < kNormSums<A>; ++i) look.norm[i] = norm[i];
      look.nonfinite = nonfinite[0];
    }
  }
}

// Sets norm_scale and clears active from the looks at each chain's chunks.
template <typename A>
__global__ void __launch_bounds__(kBlockThreads)
    apply_looks_kernel(const __grid_constant__ LangevinArgs<A> args, const GradientLook<A>* looks) {
  const int64_t chunks = divide_up(args.per_chain, kReductionChunk);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t chain = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       chain < args.batch; chain += stride) {
    GradientLook<A> look{};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) look.add(looks[chain * chunks + chunk]);
    apply_gradient_look(args, chain, look);
  }
}

template <typename A>
Tensor scratch(const Tensor& x, int64_t count) {
  return torch::stable::new_empty(
      x, {count}, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
}

// Leaves the scales of the norms in args, which point into the tensor that is returned.
template <typename T, int kVec>
Tensor launch_gradient_pass(LangevinArgs<arithmetic_t<T>>& args, const Tensor& x) {
  using A = arithmetic_t<T>;
  using Look = GradientLook<A>;
  const int64_t chunks = args.batch * reduction_chunks(args.per_chain);
  constexpr int64_t kWidth = sizeof(Look) / sizeof(double);
  const Tensor storage = scratch<double>(x, chunks * kWidth + args.batch);
  double* const memory = static_cast<double*>(storage.mutable_data_ptr());
  Look* const looks = reinterpret_cast<Look*>(memory);
  if (args.clips_norm) args.norm_scale = reinterpret_cast<A*>(memory + chunks * kWidth);
  launch<gradient_look_kernel<T, kVec>>(x, chunks, kBlockThreads, args, looks);
  launch<apply_looks_kernel<A>>(x, divide_up(args.batch, kBlockThreads), kBlockThreads, args,
                                static_cast<const Look*>(looks));
  return storage;
}

template <typename T, int kVec>
void launch_with_statistics(const LangevinArgs<arithmetic_t<T>>& args, const Tensor& x) {
  using A = arithmetic_t<T>;
  const int64_t chunks = reduction_chunks(args.per_chain);
  const Tensor storage = scratch<A>(x, args.batch * chunks * kStatistics);
  A* partial_sums = static_cast<A*>(storage.mutable_data_ptr());
  launch<langevin_step_statistics_kernel<T, kVec>>(x, args.batch * chunks, kBlockThreads, args,
                                                   partial_sums);
  launch<sum_chunks_kernel<A>>(x, divide_up(args.batch * kStatistics, kBlockThreads), kBlockThreads,
                               static_cast<const A*>(partial_sums), args.stats, args.batch, chunks,
                               static_cast<int>(kStatistics));
}

// Whether the update without the rarer options will do: it needs few registers and instructions.
template <typename A>
bool is_plain(const LangevinArgs<A>& args) {
  return args.is_plain() && args.shares_coefficients() && args.stats == nullptr &&
         args.x_low == nullptr && args.noise_source == NoiseSource::kPhilox &&
         args.grad != nullptr && args.gradient_is_dense();
}

template <typename T, int kVec, typename Team, int kHeld>
void launch_chains(const LangevinArgs<arithmetic_t<T>>& args, const Tensor& x) {
  const int64_t blocks = divide_up(args.batch, kTeamsPerBlock<Team>);
  if (is_plain(args)) {
    launch<langevin_chain_step_kernel<T, kVec, Team, kHeld, false>>(x, blocks, kBlockThreads, args);
  } else {
    launch<langevin_chain_step_kernel<T, kVec, Team, kHeld, true>>(x, blocks, kBlockThreads, args);
  }
}

// The longest chains that a block holds.
constexpr int64_t kLongestHeldChain = 64 * kBlockThreads;

// The team, and with it the order of a sum, depends on a chain's length alone.
template <typename T, int kVec>
void launch_held_chains(const LangevinArgs<arithmetic_t<T>>& args, const Tensor& x) {
  if (args.per_chain <= 8) {
    launch_chains<T, 1, ThreadTeam, 8>(args, x);
  } else if (args.per_chain <= 16 * kWarp) {
    launch_chains<T, kVec, WarpTeam, 16>(args, x);
  } else if (args.per_chain <= 16 * kBlockThreads) {
    launch_chains<T, kVec, BlockTeam, 16>(args, x);
  } else {
    launch_chains<T, kVec, BlockTeam, 64>(args, x);
  }
}

template <typename T, int kVec>
void launch_langevin_step(LangevinArgs<arithmetic_t<T>> args, const Tensor& x) {
  const bool looks_first = args.needs_gradient_look();
  if ((looks_first || args.stats != nullptr) && args.per_chain <= kLongestHeldChain) {
    return launch_held_chains<T, kVec>(args, x);
  }
  OptionalTensor scales;
  if (looks_first) scales = launch_gradient_pass<T, kVec>(args, x);
  if (args.stats != nullptr) return launch_with_statistics<T, kVec>(args, x);
  if (is_plain(args) && args.active == nullptr) {
    launch_over_items<langevin_step_kernel<T, kVec, false>, kItem<T>>(x, args.batch, args.per_chain,
                                                                      args);
  } else {
    launch_over_items<langevin_step_kernel<T, kVec, true>, kItem<T>>(x, args.batch, args.per_chain,
                                                                     args);
  }
}

template <typename T>
void run_langevin_step_kernels(const LangevinArgs<arithmetic_t<T>>& args, const Tensor& x) {
  const void* const dense_grad = args.gradient_is_dense() ? args.grad : nullptr;
  const bool packed = can_pack<T>(
      args.per_chain, {args.x, args.x_out, dense_grad, args.x_ref, args.xi, args.x_low});
  if (packed) {
    launch_langevin_step<T, kItem<T>>(args, x);
  } else {
    launch_langevin_step<T, 1>(args, x);
  }
}

}  // namespace coopflow
