// The affine coupling ops on CUDA.
#include "items.cuh"
#include "launch.cuh"
#include "ops/affine_coupling_op.h"
#include "reduce.cuh"

namespace coopflow {
namespace {

// One block a chunk, since ladj sums over a chain.
template <typename T, typename P, int kVec, bool kInverse>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>)
    affine_coupling_kernel(const __grid_constant__ AffineCouplingArgs<arithmetic_t<T>> args,
                           arithmetic_t<T>* partial_sums) {
  using A = arithmetic_t<T>;
  constexpr int kCount = kItem<T>;
  for (ChunkCursor at(args.batch, args.per_chain); at.valid(); at.next()) {
    A sums[1] = {};
    for_each_item<kCount>(at, [&](int64_t e, int n) {
      const int64_t offset = at.chain() * args.per_chain + e;
      const int64_t param = offset + at.chain() * args.per_chain;
      A in[kCount], a[kCount], b[kCount], out[kCount];
      load_item<T, kVec>(args.in, offset, n, in);
      load_item<P, kVec>(args.params, param, n, a);
      load_item<P, kVec>(args.params, param + args.per_chain, n, b);
      COOPFLOW_UNROLL
      for (int i = 0; i < kCount; ++i) {
        out[i] = kInverse ? affine_inverse(in[i], a[i], b[i]) : affine_forward(in[i], a[i], b[i]);
        sums[0] += a[i];  // zero beyond the item's end
      }
      store_item<T, kVec>(out, offset, n, args.out);
    });
    block_sum(sums);
    if (threadIdx.x == 0) partial_sums[at.index()] = kInverse ? -sums[0] : sums[0];
  }
}

template <typename T, typename P, int kVec, bool kInverse>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks<T>) affine_coupling_backward_kernel(
    const __grid_constant__ AffineCouplingBackwardArgs<arithmetic_t<T>> args,
    const __grid_constant__ ItemGrid grid) {
  using A = arithmetic_t<T>;
  constexpr int kCount = kItem<T>;
  for (ItemCursor<kCount> at(grid); at.valid(); at.next()) {
    const int n = at.size();
    const int64_t param = at.offset() + at.chain() * args.per_chain;
    const A grad_ladj = args.grad_ladj[at.chain()];
    A x[kCount], a[kCount], grad[kCount], grad_in[kCount], grad_a[kCount], grad_b[kCount];
    load_item<T, kVec>(args.x, at.offset(), n, x);
    load_item<T, kVec>(args.grad_out, at.offset(), n, grad);
    load_item<P, kVec>(args.params, param, n, a);
    COOPFLOW_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const AffineGradient<A> g = kInverse
                                      ? affine_inverse_gradient(grad[i], grad_ladj, x[i], a[i])
                                      : affine_forward_gradient(grad[i], grad_ladj, x[i], a[i]);
      grad_in[i] = g.input;
      grad_a[i] = g.a;
      grad_b[i] = g.b;
    }
    store_item<T, kVec>(grad_in, at.offset(), n, args.grad_in);
    store_item<P, kVec>(grad_a, param, n, args.grad_params);
    store_item<P, kVec>(grad_b, param + args.per_chain, n, args.grad_params);
  }
}

template <typename T, typename P, int kVec, bool kInverse>
void launch_affine_coupling(const AffineCouplingArgs<arithmetic_t<T>>& args, const Tensor& state) {
  using A = arithmetic_t<T>;
  const int64_t chunks = reduction_chunks(args.per_chain);
  const int threads = reduction_threads(args.per_chain);
  if (chunks == 1) {
    launch<affine_coupling_kernel<T, P, kVec, kInverse>>(state, args.batch, threads, args,
                                                         args.ladj);
    return;
  }
  const Tensor storage =
      torch::stable::new_empty(state, {args.batch * chunks},
                               std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
  A* partial_sums = static_cast<A*>(storage.mutable_data_ptr());
  launch<affine_coupling_kernel<T, P, kVec, kInverse>>(state, args.batch * chunks, threads, args,
                                                       partial_sums);
  launch<sum_chunks_kernel<A>>(state, divide_up(args.batch, kBlockThreads), kBlockThreads,
                               static_cast<const A*>(partial_sums), args.ladj, args.batch, chunks,
                               1);
}

template <typename T, typename P, int kVec, bool kInverse>
void launch_affine_coupling_backward(const AffineCouplingBackwardArgs<arithmetic_t<T>>& args,
                                     const Tensor& state) {
  launch_over_items<affine_coupling_backward_kernel<T, P, kVec, kInverse>, kItem<T>>(
      state, args.batch, args.per_chain, args);
}

struct CudaAffineCoupling {
  template <typename T, typename P>
  static void affine_coupling(const AffineCouplingArgs<arithmetic_t<T>>& args,
                              const Tensor& state) {
    const bool packed = can_pack<T>(args.per_chain, {args.in, args.params, args.out});
    const auto run = packed ? (args.inverse ? launch_affine_coupling<T, P, kItem<T>, true>
                                            : launch_affine_coupling<T, P, kItem<T>, false>)
                            : (args.inverse ? launch_affine_coupling<T, P, 1, true>
                                            : launch_affine_coupling<T, P, 1, false>);
    run(args, state);
  }

  template <typename T, typename P>
  static void affine_coupling_backward(const AffineCouplingBackwardArgs<arithmetic_t<T>>& args,
                                       const Tensor& state) {
    const bool packed = can_pack<T>(
        args.per_chain, {args.x, args.grad_out, args.params, args.grad_in, args.grad_params});
    const auto run = packed
                         ? (args.inverse ? launch_affine_coupling_backward<T, P, kItem<T>, true>
                                         : launch_affine_coupling_backward<T, P, kItem<T>, false>)
                         : (args.inverse ? launch_affine_coupling_backward<T, P, 1, true>
                                         : launch_affine_coupling_backward<T, P, 1, false>);
    run(args, state);
  }
};

}  // namespace
}  // namespace coopflow

STABLE_TORCH_LIBRARY_IMPL(coopflow, CUDA, m) {
  using Cuda = coopflow::CudaAffineCoupling;
  m.impl("affine_coupling", TORCH_BOX(&coopflow::affine_coupling<Cuda>));
  m.impl("affine_coupling_inverse", TORCH_BOX(&coopflow::affine_coupling_inverse<Cuda>));
  m.impl("affine_coupling_backward", TORCH_BOX(&coopflow::affine_coupling_backward<Cuda>));
  m.impl("affine_coupling_inverse_backward",
         TORCH_BOX(&coopflow::affine_coupling_inverse_backward<Cuda>));
}
