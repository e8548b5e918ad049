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
      alignas(64) A in[kTile], a[kTile], b[kTile], out[kTile];
      const int64_t offset = chain * per_chain + e;
      const int64_t param = 2 * chain * per_chain + e;
      load<T>(args.in, offset, n, in);
      load<P>(args.params, param, n, a);
      load<P>(args.params, param + per_chain, n, b);
      if (args.inverse) {
        for (int64_t i = 0; i < n; ++i) out[i] = affine_inverse(in[i], a[i], b[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) out[i] = affine_forward(in[i], a[i], b[i]);
      }
      store<T>(out, offset, n, args.out);
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
      alignas(64) A x[kTile], a[kTile], grad[kTile], grad_in[kTile], grad_a[kTile], grad_b[kTile];
      const int64_t offset = chain * per_chain + e;
      const int64_t param = 2 * chain * per_chain + e;
      const A grad_ladj = args.grad_ladj[chain];
      load<T>(args.x, offset, n, x);
      load<T>(args.grad_out, offset, n, grad);
      load<P>(args.params, param, n, a);
      const auto apply = [&](auto gradient) {
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
      store<T>(grad_in, offset, n, args.grad_in);
      store<P>(grad_a, param, n, args.grad_params);
      store<P>(grad_b, param + per_chain, n, args.grad_params);
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
