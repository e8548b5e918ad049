// normal_ and uniform_ on CUDA.
#include "items.cuh"
#include "launch.cuh"
#include "ops/random_op.h"

namespace coopflow {
namespace {

template <typename T, int kVec>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    random_kernel(const __grid_constant__ RandomArgs args, const __grid_constant__ ItemGrid grid) {
  using A = arithmetic_t<T>;
  constexpr int kCount = kItem<T>;
  const PhiloxKey key = make_philox_key(args.rng[0]);
  const uint32_t time = static_cast<uint32_t>(args.rng[1] + args.step);
  const int64_t first_chain = args.rng[2];
  for (ItemCursor<kCount> at(grid); at.valid(); at.next()) {
    A values[kCount];
    COOPFLOW_UNROLL
    for (int q = 0; q < kCount / 4; ++q) {
      const uint32_t block = static_cast<uint32_t>(at.item() * (kCount / 4) + q);
      const Quad<A> quad =
          draw<A>(args.distribution, noise_words(key, first_chain + at.chain(), time, block));
      values[4 * q] = quad.v0;
      values[4 * q + 1] = quad.v1;
      values[4 * q + 2] = quad.v2;
      values[4 * q + 3] = quad.v3;
    }
    store_item<T, kVec>(values, at.offset(), at.size(), args.out);
  }
}

struct CudaRandom {
  template <typename T>
  static void fill(const RandomArgs& args, const Tensor& out) {
    if (can_pack<T>(args.per_chain, {args.out})) {
      launch_over_items<random_kernel<T, kItem<T>>, kItem<T>>(out, args.batch, args.per_chain,
                                                              args);
    } else {
      launch_over_items<random_kernel<T, 1>, kItem<T>>(out, args.batch, args.per_chain, args);
    }
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CUDA, m) {
  m.impl("normal_", TORCH_BOX(&coopflow::normal_<coopflow::CudaRandom>));
  m.impl("uniform_", TORCH_BOX(&coopflow::uniform_<coopflow::CudaRandom>));
}
