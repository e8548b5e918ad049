// The Langevin ops on CUDA.
#include "coopflow/langevin.h"
#include "items.cuh"
#include "launch.cuh"
#include "ops/langevin_op.h"
#include "reduce.cuh"

namespace coopflow {
namespace {

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

// Updates one item; adds its statistics to sums where they are wanted. `number`: of its chain, in
// the noise.
template <typename T, int kVec, bool kFull, bool kStats, typename A>
__device__ __forceinline__ void update_item(const LangevinArgs<A>& args,
                                            const LangevinChain<A>& coefficients, PhiloxKey key,
                                            uint32_t time, int64_t number, int64_t item,
                                            int64_t offset, int n, A (&sums)[kStatistics]) {
  constexpr int kCount = kItem<T>;
  A x[kCount], grad[kCount], xi[kCount];
  load_item<T, kVec>(args.x, offset, n, x);
  if (!kFull || args.grad != nullptr) {
    load_item<T, kVec>(args.grad, offset, n, grad);
  } else {
    COOPFLOW_UNROLL
    for (int i = 0; i < kCount; ++i) grad[i] = A(0);
  }
  load_noise<T, kVec, kFull>(args, key, time, number, item, offset, n, xi);
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
    const LangevinChain<A> coefficients = kFull ? langevin_chain(args, at.chain()) : shared;
    update_item<T, kVec, kFull, false>(args, coefficients, key, time, first_chain + at.chain(),
                                       at.item(), at.offset(), at.size(), unused);
  }
}

// The sums over an item of an inactive chain: it keeps its state, so only its gradient counts.
template <typename T, int kVec, typename A>
__device__ __forceinline__ void count_item(const LangevinArgs<A>& args, int64_t offset, int n,
                                           A (&sums)[kStatistics]) {
  A grad[kItem<T>];
  load_item<T, kVec>(args.grad, offset, n, grad);
  COOPFLOW_UNROLL
  for (int i = 0; i < kItem<T>; ++i) {
    const GradientMoments<A> moments = gradient_moments(grad[i]);
    sums[kSumGradSquared] += moments.sum_of_squares;
    sums[kNonFiniteElements] += moments.nonfinite;
  }
}

// The same with statistics: one block a chunk.
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
      const int64_t offset = chain * args.per_chain + e;
      if (active) {
        update_item<T, kVec, true, true>(args, coefficients, key, time, first_chain + chain,
                                         e / kCount, offset, n, sums);
      } else {
        count_item<T, kVec>(args, offset, n, sums);
      }
    });
    block_sum(sums);
    if (threadIdx.x == 0) {
      COOPFLOW_UNROLL
      for (int s = 0; s < kStatistics; ++s) partial_sums[at.index() * kStatistics + s] = sums[s];
    }
  }
}

// Sum of squares of the clipped gradient and number of its non-finite elements, by chunk.
constexpr int kMoments = 2;

template <typename T, int kVec>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    gradient_moments_kernel(const __grid_constant__ LangevinArgs<arithmetic_t<T>> args,
                            arithmetic_t<T>* partial_sums) {
  using A = arithmetic_t<T>;
  constexpr int kCount = kItem<T>;
  const A limit = args.limits.grad_clip;
  for (ChunkCursor at(args.batch, args.per_chain); at.valid(); at.next()) {
    A sums[kMoments] = {};
    for_each_item<kCount>(at, [&](int64_t e, int n) {
      A grad[kCount];
      load_item<T, kVec>(args.grad, at.chain() * args.per_chain + e, n, grad);
      COOPFLOW_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const GradientMoments<A> moments = clipped_gradient_moments(grad[i], limit);
        sums[0] += moments.sum_of_squares;
        sums[1] += moments.nonfinite;
      }
    });
    block_sum(sums);
    if (threadIdx.x == 0) {
      COOPFLOW_UNROLL
      for (int i = 0; i < kMoments; ++i) partial_sums[at.index() * kMoments + i] = sums[i];
    }
  }
}

// Sets norm_scale and clears active from the moments of each chain's chunks.
template <typename A>
__global__ void __launch_bounds__(kBlockThreads)
    apply_moments_kernel(const __grid_constant__ LangevinArgs<A> args, const A* partial_sums) {
  const int64_t chunks = divide_up(args.per_chain, kReductionChunk);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t chain = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       chain < args.batch; chain += stride) {
    GradientMoments<A> moments{};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      moments.sum_of_squares += partial_sums[(chain * chunks + chunk) * kMoments];
      moments.nonfinite += partial_sums[(chain * chunks + chunk) * kMoments + 1];
    }
    apply_gradient_moments(args, chain, moments);
  }
}

template <typename A>
Tensor scratch(const Tensor& x, int64_t count) {
  return torch::stable::new_empty(
      x, {count}, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
}

template <typename T, int kVec>
void launch_gradient_pass(const LangevinArgs<arithmetic_t<T>>& args, const Tensor& x) {
  using A = arithmetic_t<T>;
  const int64_t chunks = args.batch * reduction_chunks(args.per_chain);
  const Tensor storage = scratch<A>(x, chunks * kMoments);
  A* partial_sums = static_cast<A*>(storage.mutable_data_ptr());
  launch<gradient_moments_kernel<T, kVec>>(x, chunks, reduction_threads(args.per_chain), args,
                                           partial_sums);
  launch<apply_moments_kernel<A>>(x, divide_up(args.batch, kBlockThreads), kBlockThreads, args,
                                  static_cast<const A*>(partial_sums));
}

template <typename T, int kVec>
void launch_with_statistics(const LangevinArgs<arithmetic_t<T>>& args, const Tensor& x) {
  using A = arithmetic_t<T>;
  const int64_t chunks = reduction_chunks(args.per_chain);
  const int threads = reduction_threads(args.per_chain);
  if (chunks == 1) {
    launch<langevin_step_statistics_kernel<T, kVec>>(x, args.batch, threads, args, args.stats);
    return;
  }
  const Tensor storage = scratch<A>(x, args.batch * chunks * kStatistics);
  A* partial_sums = static_cast<A*>(storage.mutable_data_ptr());
  launch<langevin_step_statistics_kernel<T, kVec>>(x, args.batch * chunks, threads, args,
                                                   partial_sums);
  launch<sum_chunks_kernel<A>>(x, divide_up(args.batch * kStatistics, kBlockThreads), kBlockThreads,
                               static_cast<const A*>(partial_sums), args.stats, args.batch, chunks,
                               static_cast<int>(kStatistics));
}

template <typename T, int kVec>
void launch_langevin_step(const LangevinArgs<arithmetic_t<T>>& args, const Tensor& x) {
  if (args.needs_gradient_pass()) launch_gradient_pass<T, kVec>(args, x);
  if (args.stats != nullptr) return launch_with_statistics<T, kVec>(args, x);
  // The common case has a kernel of its own: it needs few registers and instructions.
  const bool plain = args.is_plain() && args.shares_coefficients() && args.grad != nullptr &&
                     args.x_low == nullptr && args.noise_source == NoiseSource::kPhilox;
  if (plain) {
    launch_over_items<langevin_step_kernel<T, kVec, false>, kItem<T>>(x, args.batch, args.per_chain,
                                                                      args);
  } else {
    launch_over_items<langevin_step_kernel<T, kVec, true>, kItem<T>>(x, args.batch, args.per_chain,
                                                                     args);
  }
}

struct CudaLangevin {
  template <typename T>
  static void langevin_step(const LangevinArgs<arithmetic_t<T>>& args, const Tensor& x) {
    const bool packed = can_pack<T>(
        args.per_chain, {args.x, args.x_out, args.grad, args.x_ref, args.xi, args.x_low});
    if (packed) {
      launch_langevin_step<T, kItem<T>>(args, x);
    } else {
      launch_langevin_step<T, 1>(args, x);
    }
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CUDA, m) {
  using coopflow::CudaLangevin;
  m.impl("langevin_step_", TORCH_BOX(&coopflow::langevin_step_<CudaLangevin>));
  m.impl("langevin_plain_step_", TORCH_BOX(&coopflow::langevin_plain_step_<CudaLangevin>));
  m.impl("langevin_step", TORCH_BOX(&coopflow::langevin_step<CudaLangevin>));
  m.impl("langevin_noise_", TORCH_BOX(&coopflow::langevin_noise_<CudaLangevin>));
}
