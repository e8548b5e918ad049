#include "affine_coupling_loops.h"

#include "chain_blocks.h"
#include "tile.h"

namespace coopflow {
namespace COOPFLOW_ISA {
namespace {

// The block's values of one row of parameters, from `first` on.
template <typename P>
const arithmetic_t<P>* view_row(const Block& block, const P* first, int64_t stride,
                                arithmetic_t<P>* buffer) {
  if (block.chains == 1) return view<P>(first, 0, block.n, buffer);
  gather(block, first, stride, buffer);
  return buffer;
}

// Where such a row is to be written; put_back_row stores it.
template <typename P>
arithmetic_t<P>* row_room(const Block& block, P* first, arithmetic_t<P>* buffer) {
  return block.chains == 1 ? room<P>(first, 0, buffer) : buffer;
}

template <typename P>
void put_back_row(const Block& block, const arithmetic_t<P>* values, int64_t stride, P* first) {
  if (block.chains == 1) return put_back<P>(values, 0, block.n, first);
  scatter(block, values, stride, first);
}

// The states of a block are one run in memory. Returns its row a.
template <typename T, typename P>
const arithmetic_t<T>* map_block(const AffineCouplingArgs<arithmetic_t<T>>& args,
                                 const Block& block, arithmetic_t<T>* a_buffer) {
  using A = arithmetic_t<T>;
  alignas(64) A in_buffer[kTile], b_buffer[kTile], out_buffer[kTile];
  const int64_t per_chain = args.per_chain, stride = 2 * per_chain, n = block.size();
  const int64_t offset = block.chain * per_chain + block.e;
  const P* row = block.first<P>(args.params, stride);
  const A* in = view<T>(args.in, offset, n, in_buffer);
  const A* a = view_row(block, row, stride, a_buffer);
  const A* b = view_row(block, row + per_chain, stride, b_buffer);
  A* out = room<T>(args.out, offset, out_buffer);
  if (args.inverse) {
    COOPFLOW_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i) out[i] = affine_inverse(in[i], a[i], b[i]);
  } else {
    COOPFLOW_ELEMENTWISE
    for (int64_t i = 0; i < n; ++i) out[i] = affine_forward(in[i], a[i], b[i]);
  }
  put_back<T>(out, offset, n, args.out);
  return a;
}

template <typename T, typename P>
void map(const AffineCouplingArgs<arithmetic_t<T>>& args, arithmetic_t<T>* partial_sums,
         int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  sum_blocks<kTile>(args.per_chain, begin, end, partial_sums, [&](const Block& block, A* buffer) {
    return map_block<T, P>(args, block, buffer);
  });
  if (!args.inverse) return;
  for (int64_t index = begin; index < end; ++index) partial_sums[index] = -partial_sums[index];
}

template <typename T, typename P>
void backward(const AffineCouplingBackwardArgs<arithmetic_t<T>>& args, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const int64_t per_chain = args.per_chain, stride = 2 * per_chain;
  for_each_block<kTile>(per_chain, begin, end, [&](const Block& block) {
    alignas(64) A x_buffer[kTile], grad_buffer[kTile], a_buffer[kTile], grad_ladj[kTile];
    alignas(64) A grad_in_buffer[kTile], grad_a_buffer[kTile], grad_b_buffer[kTile];
    const int64_t offset = block.chain * per_chain + block.e, n = block.size();
    P* to = block.first<P>(args.grad_params, stride);
    const A* x = view<T>(args.x, offset, n, x_buffer);
    const A* grad = view<T>(args.grad_out, offset, n, grad_buffer);
    const A* a = view_row(block, block.first<P>(args.params, stride), stride, a_buffer);
    A* grad_in = room<T>(args.grad_in, offset, grad_in_buffer);
    A* grad_a = row_room(block, to, grad_a_buffer);
    A* grad_b = row_room(block, to + per_chain, grad_b_buffer);
    const auto loop = [&](auto gradient, auto grad_ladj_at) {
      COOPFLOW_ELEMENTWISE
      for (int64_t i = 0; i < n; ++i) {
        const AffineGradient<A> g = gradient(grad[i], grad_ladj_at(i), x[i], a[i]);
        grad_in[i] = g.input;
        grad_a[i] = g.a;
        grad_b[i] = g.b;
      }
    };
    const auto apply = [&](auto gradient) {
      if (block.chains == 1) {
        const A of_chain = args.grad_ladj[block.chain];
        loop(gradient, [of_chain](int64_t) { return of_chain; });
      } else {
        spread(block, args.grad_ladj, grad_ladj);
        loop(gradient, [&](int64_t i) { return grad_ladj[i]; });
      }
    };
    // The direction is chosen outside the loop, which is vectorised only then.
    if (args.inverse) {
      apply([](A g, A l, A in, A scale) { return affine_inverse_gradient(g, l, in, scale); });
    } else {
      apply([](A g, A l, A in, A scale) { return affine_forward_gradient(g, l, in, scale); });
    }
    put_back<T>(grad_in, offset, n, args.grad_in);
    put_back_row(block, grad_a, stride, to);
    put_back_row(block, grad_b, stride, to + per_chain);
  });
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
