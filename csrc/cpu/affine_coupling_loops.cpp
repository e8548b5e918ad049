#include "affine_coupling_loops.h"

#include "tile.h"

namespace coopflow {
namespace COOPFLOW_ISA {
namespace {

template <typename T, typename P>
void map(const AffineCouplingArgs<arithmetic_t<T>>& args, arithmetic_t<T>* partial_sums,
         int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t per_chain = args.per_chain;
  for (int64_t index = begin; index < end; ++index) {
    alignas(64) A lanes[kLanes] = {};
    for_each_tile_of_chunk(per_chain, index, [&](int64_t chain, int64_t e, int64_t n) {
      alignas(64) A in_buffer[kTile], a_buffer[kTile], b_buffer[kTile], out_buffer[kTile];
      const int64_t offset = chain * per_chain + e;
      const int64_t param = 2 * chain * per_chain + e;
      const A* in = view<T>(args.in, offset, n, in_buffer);
      const A* a = view<P>(args.params, param, n, a_buffer);
      const A* b = view<P>(args.params, param + per_chain, n, b_buffer);
      A* out = room<T>(args.out, offset, out_buffer);
      if (args.inverse) {
        COOPFLOW_ELEMENTWISE
        for (int64_t i = 0; i < n; ++i) out[i] = affine_inverse(in[i], a[i], b[i]);
      } else {
        COOPFLOW_ELEMENTWISE
        for (int64_t i = 0; i < n; ++i) out[i] = affine_forward(in[i], a[i], b[i]);
      }
      put_back<T>(out, offset, n, args.out);
      add_by_lane(a, n, lanes);
    });
    partial_sums[index] = args.inverse ? -sum_lanes(lanes) : sum_lanes(lanes);
  }
}

template <typename T, typename P>
void backward(const AffineCouplingBackwardArgs<arithmetic_t<T>>& args, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t per_chain = args.per_chain;
  for (int64_t index = begin; index < end; ++index) {
    for_each_tile_of_chunk(per_chain, index, [&](int64_t chain, int64_t e, int64_t n) {
      alignas(64) A x_buffer[kTile], grad_buffer[kTile], a_buffer[kTile];
      alignas(64) A grad_in_buffer[kTile], grad_a_buffer[kTile], grad_b_buffer[kTile];
      const int64_t offset = chain * per_chain + e;
      const int64_t param = 2 * chain * per_chain + e;
      const A grad_ladj = args.grad_ladj[chain];
      const A* x = view<T>(args.x, offset, n, x_buffer);
      const A* grad = view<T>(args.grad_out, offset, n, grad_buffer);
      const A* a = view<P>(args.params, param, n, a_buffer);
      A* grad_in = room<T>(args.grad_in, offset, grad_in_buffer);
      A* grad_a = room<P>(args.grad_params, param, grad_a_buffer);
      A* grad_b = room<P>(args.grad_params, param + per_chain, grad_b_buffer);
      const auto apply = [&](auto gradient) {
        COOPFLOW_ELEMENTWISE
        for (int64_t i = 0; i < n; ++i) {
          const AffineGradient<A> g = gradient(grad[i], grad_ladj, x[i], a[i]);
          grad_in[i] = g.input;
          grad_a[i] = g.a;
          grad_b[i] = g.b;
        }
      };
      // The direction is chosen outside the loop, which is vectorised only then.
      if (args.inverse) {
        apply([](A g, A l, A in, A scale) { return affine_inverse_gradient(g, l, in, scale); });
      } else {
        apply([](A g, A l, A in, A scale) { return affine_forward_gradient(g, l, in, scale); });
      }
      put_back<T>(grad_in, offset, n, args.grad_in);
      put_back<P>(grad_a, param, n, args.grad_params);
      put_back<P>(grad_b, param + per_chain, n, args.grad_params);
    });
  }
}

}  // namespace

template <typename T, typename P>
AffineCouplingLoops<T, P> affine_coupling_loops() {
  return {map<T, P>, backward<T, P>};
}

template AffineCouplingLoops<float, float> affine_coupling_loops();
template AffineCouplingLoops<float, bfloat16> affine_coupling_loops();
template AffineCouplingLoops<float, float16> affine_coupling_loops();
template AffineCouplingLoops<double, double> affine_coupling_loops();
template AffineCouplingLoops<bfloat16, bfloat16> affine_coupling_loops();
template AffineCouplingLoops<float16, float16> affine_coupling_loops();

}  // namespace COOPFLOW_ISA
}  // namespace coopflow
