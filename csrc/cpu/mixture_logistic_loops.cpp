// Elements are handled in blocks. Loops run across the elements of a block and are vectorised, with
// the loop over components inside: what an element sums up over them then stays in a register.
#include "mixture_logistic_loops.h"

#include "chain_blocks.h"
#include "tile.h"

// Says that the elements of a block do not depend on one another, which are too many rows to check
// pairwise, and keeps short loops from being unrolled before they can be vectorised.
#define COOPFLOW_INDEPENDENT _Pragma("GCC ivdep") _Pragma("GCC unroll 1")

namespace coopflow {
namespace COOPFLOW_ISA {
namespace {

constexpr int64_t kWidth = kMixtureWidth;
static_assert(kWidth % kLanes == 0 && kTile % kWidth == 0);

// Calls f(k) for k = 0, ..., count - 1, count >= 1. No branch leads round the loop: that lets the
// compiler vectorise a loop across elements which has this one inside.
template <typename F>
void for_each_component(int64_t count, const F& f) {
  int64_t k = 0;
  do {
    f(k);
  } while (++k < count);
}

// From one chain's parameters to the next one's.
inline int64_t params_stride(const MixtureShape& shape) { return shape.rows() * shape.per_chain; }

// Apart from load_block, which is inlined only when it is short.
template <typename T, typename A>
[[gnu::noinline]] void load_part(const Block& block, const T* first, int64_t stride, A* values) {
  for (int64_t i = 0; i < kWidth; ++i) values[i] = A(0);
  gather(block, first, stride, values);
}

template <typename T, typename A>
[[gnu::noinline]] void store_part(const Block& block, const A* values, int64_t stride, T* first) {
  scatter(block, values, stride, first);
}

// The block's values and zeros after them; arguments as for gather.
template <typename T, typename A>
void load_block(const Block& block, const T* first, int64_t stride, A* values) {
  if (block.n < kWidth) return load_part(block, first, stride, values);
  COOPFLOW_INDEPENDENT
  for (int64_t i = 0; i < kWidth; ++i) values[i] = to_arithmetic(first[i]);
  __builtin_prefetch(first + kWidth);  // the next block's
}

template <typename T, typename A>
void store_block(const Block& block, const A* values, int64_t stride, T* first) {
  if (block.n < kWidth) return store_part(block, values, stride, first);
  COOPFLOW_INDEPENDENT
  for (int64_t i = 0; i < kWidth; ++i) first[i] = from_arithmetic<T>(values[i]);
  __builtin_prefetch(first + kWidth, 1);
}

// The components of one block of elements.
template <typename A>
class Components {
 public:
  Components(int64_t components, ComponentBlock<A>* scratch)
      : count(components), blocks_(scratch) {}

  ComponentBlock<A>& operator[](int64_t k) const { return blocks_[k]; }

  // first: the block's first logit. poison becomes NaN where a parameter is not finite, and else
  // stays as it is.
  template <typename P>
  void load_rows(const Block& block, const P* first, const MixtureShape& shape, A* poison) {
    const int64_t stride = params_stride(shape), group = count * shape.per_chain;
    for (int64_t k = 0; k < count; ++k, first += shape.per_chain) {
      load_block(block, first, stride, blocks_[k].log_weight);
      load_block(block, first + group, stride, blocks_[k].mean);
      load_block(block, first + 2 * group, stride, blocks_[k].log_scale);
    }
    alignas(64) A peak[kWidth];
    COOPFLOW_INDEPENDENT
    for (int64_t i = 0; i < kWidth; ++i) {
      A largest = -INFINITY;
      for_each_component(
          count, [&](int64_t k) { largest = larger_of(largest, blocks_[k].log_weight[i]); });
      peak[i] = largest;
    }
    COOPFLOW_INDEPENDENT
    for (int64_t i = 0; i < kWidth; ++i) {
      A bad = poison[i];
      for_each_component(count, [&](int64_t k) {
        ComponentBlock<A>& component = blocks_[k];
        const A log_weight = component.log_weight[i], mean = component.mean[i];
        const A log_scale = component.log_scale[i];
        bad = component_poison(bad, log_weight, mean, log_scale);
        const Component<A> c = make_component(log_weight - peak[i], mean, log_scale);
        component.log_weight[i] = log_weight - peak[i];
        component.weight[i] = c.weight;
        component.inv_scale[i] = c.inv_scale;
      });
      poison[i] = bad;
    }
  }

  Component<A> at(int64_t k, int64_t i) const {
    return {blocks_[k].weight[i], blocks_[k].mean[i], blocks_[k].inv_scale[i]};
  }

  LogComponent<A> log_at(int64_t k, int64_t i) const {
    return make_log_component(blocks_[k].log_weight[i], blocks_[k].log_scale[i]);
  }

  const int64_t count;

 private:
  ComponentBlock<A>* const blocks_;
};

template <typename A>
struct Sums {
  alignas(64) A cdf[kWidth], survival[kWidth], density[kWidth];

  MixtureSums<A> at(int64_t i) const { return {cdf[i], survival[i], density[i]}; }
  void set(int64_t i, const MixtureSums<A>& sums) {
    cdf[i] = sums.cdf;
    survival[i] = sums.survival;
    density[i] = sums.density;
  }
};

template <typename A>
void direct_sums(const Components<A>& m, const A* x, Sums<A>& sums) {
  COOPFLOW_INDEPENDENT
  for (int64_t i = 0; i < kWidth; ++i) {
    MixtureSums<A> s;
    for_each_component(m.count, [&](int64_t k) { add(s, x[i], m.at(k, i)); });
    sums.set(i, s);
  }
}

template <typename A>
struct Peaks {
  alignas(64) A cdf[kWidth], survival[kWidth], density[kWidth];

  MixturePeaks<A> at(int64_t i) const { return {cdf[i], survival[i], density[i]}; }
  void set(int64_t i, const MixturePeaks<A>& peaks) {
    cdf[i] = peaks.cdf;
    survival[i] = peaks.survival;
    density[i] = peaks.density;
  }
};

template <typename A>
void find_peaks(const Components<A>& m, const A* x, Peaks<A>& peaks) {
  COOPFLOW_INDEPENDENT
  for (int64_t i = 0; i < kWidth; ++i) {
    MixturePeaks<A> p;
    for_each_component(m.count, [&](int64_t k) { raise(p, x[i], m.at(k, i), m.log_at(k, i)); });
    peaks.set(i, p);
  }
}

template <typename A>
struct Scaled {
  Peaks<A> peaks;
  alignas(64) A cdf[kWidth], survival[kWidth], density[kWidth], weight[kWidth];
  alignas(64) A cdf_slope[kWidth], survival_slope[kWidth];

  ScaledSums<A> at(int64_t i) const {
    return {cdf[i], survival[i], density[i], weight[i], cdf_slope[i], survival_slope[i]};
  }
  void set(int64_t i, const ScaledSums<A>& sums) {
    cdf[i] = sums.cdf;
    survival[i] = sums.survival;
    density[i] = sums.density;
    weight[i] = sums.weight;
    cdf_slope[i] = sums.cdf_slope;
    survival_slope[i] = sums.survival_slope;
  }
};

template <typename A>
void scaled_sums(const Components<A>& m, const A* x, Scaled<A>& sums) {
  find_peaks(m, x, sums.peaks);
  COOPFLOW_INDEPENDENT
  for (int64_t i = 0; i < kWidth; ++i) {
    ScaledSums<A> s;
    const MixturePeaks<A> p = sums.peaks.at(i);
    for_each_component(m.count, [&](int64_t k) { add(s, x[i], m.at(k, i), m.log_at(k, i), p); });
    sums.set(i, s);
  }
}

template <typename A>
struct Logits {
  alignas(64) A value[kWidth], slope[kWidth];

  MixtureLogit<A> at(int64_t i) const { return {value[i], slope[i]}; }
  void set(int64_t i, const MixtureLogit<A>& logit) {
    value[i] = logit.value;
    slope[i] = logit.slope;
  }
};

// logit F and its slope at x for the elements that are pending; others may hold anything.
template <typename A>
void evaluate(const Components<A>& m, const A* x, const int32_t* pending, Sums<A>& sums,
              Logits<A>& logits) {
  direct_sums(m, x, sums);
  int32_t any = 0;
  COOPFLOW_INDEPENDENT
  for (int64_t i = 0; i < kWidth; ++i) {
    logits.set(i, direct_logit(sums.at(i)));
    any |= logit_is_direct(sums.at(i)) ? 0 : pending[i];
  }
  if (any == 0) return;
  Scaled<A> scaled;
  scaled_sums(m, x, scaled);
  COOPFLOW_INDEPENDENT
  for (int64_t i = 0; i < kWidth; ++i) {
    const bool direct = logit_is_direct(sums.at(i));
    const MixtureLogit<A> of = scaled_logit(scaled.at(i), scaled.peaks.at(i));
    logits.value[i] = direct ? logits.value[i] : of.value;
    logits.slope[i] = direct ? logits.slope[i] : of.slope;
  }
}

// logit F and the logarithm of its slope, from the direct sums at x.
template <typename A>
void finish(const Components<A>& m, const A* x, const Sums<A>& sums, A* logit, A* log_slope) {
  int32_t any = 0;
  COOPFLOW_INDEPENDENT
  for (int64_t i = 0; i < kWidth; ++i) {
    const MixtureLogit<A> at = direct_logit(sums.at(i));
    logit[i] = at.value;
    log_slope[i] = direct_log_slope(at);
    any |= all_is_direct(sums.at(i)) ? 0 : 1;
  }
  if (any == 0) return;
  Scaled<A> scaled;
  scaled_sums(m, x, scaled);
  COOPFLOW_INDEPENDENT
  for (int64_t i = 0; i < kWidth; ++i) {
    const bool direct = all_is_direct(sums.at(i));
    const MixtureLogit<A> at = scaled_logit(scaled.at(i), scaled.peaks.at(i));
    const A of = scaled_log_slope(at, scaled.at(i), scaled.peaks.at(i));
    logit[i] = direct ? logit[i] : at.value;
    log_slope[i] = direct ? log_slope[i] : of;
  }
}

// Where logit F = target, and the direct sums there. Elements with a NaN target are not searched.
template <typename A>
void solve(const Components<A>& m, const A* target, A* x, Sums<A>& sums) {
  alignas(64) A tolerance[kWidth], low[kWidth], high[kWidth], step[kWidth], step_before[kWidth];
  alignas(64) A weight[kWidth];
  int32_t pending[kWidth];
  COOPFLOW_INDEPENDENT
  for (int64_t i = 0; i < kWidth; ++i) {
    Quantiles<A> quantiles;
    for_each_component(m.count, [&](int64_t k) { add(quantiles, target[i], m.at(k, i)); });
    low[i] = quantiles.low;
    high[i] = quantiles.high;
    x[i] = quantiles.weighted;
    weight[i] = quantiles.weight;
    sums.set(i, MixtureSums<A>());
  }
  COOPFLOW_INDEPENDENT
  for (int64_t i = 0; i < kWidth; ++i) {
    const RootSearch<A> s = begin_search(Quantiles<A>{low[i], high[i], x[i], weight[i]}, target[i]);
    tolerance[i] = s.tolerance;
    x[i] = s.x;
    step[i] = s.step;
    step_before[i] = s.step_before;
    pending[i] = s.pending ? 1 : 0;
  }
  Logits<A> logits;
  Sums<A> at_x;
  int32_t any = 1;
  for (int n = 0; any != 0 && n < MixtureConstants<A>::kMaxEvaluations; ++n) {
    evaluate(m, x, pending, at_x, logits);
    COOPFLOW_INDEPENDENT
    for (int64_t i = 0; i < kWidth; ++i) {
      sums.cdf[i] = pending[i] != 0 ? at_x.cdf[i] : sums.cdf[i];
      sums.survival[i] = pending[i] != 0 ? at_x.survival[i] : sums.survival[i];
      sums.density[i] = pending[i] != 0 ? at_x.density[i] : sums.density[i];
    }
    COOPFLOW_INDEPENDENT
    for (int64_t i = 0; i < kWidth; ++i) {
      RootSearch<A> s{tolerance[i], x[i],           low[i],         high[i],
                      step[i],      step_before[i], pending[i] != 0};
      advance(s, target[i], logits.at(i));
      x[i] = pending[i] != 0 ? last_step(s, target[i], logits.at(i)) : s.x;
      low[i] = s.low;
      high[i] = s.high;
      step[i] = s.step;
      step_before[i] = s.step_before;
      pending[i] = s.pending ? 1 : 0;
    }
    any = 0;
    for (int64_t i = 0; i < kWidth; ++i) any |= pending[i];
  }
}

// One block's parameters.
template <typename A>
struct BlockParams {
  alignas(64) A a[kWidth] = {}, b[kWidth] = {};
  alignas(64) A poison[kWidth];  // of these, of the state and of the components

  template <typename P>
  void load_params(const Block& block, const void* params, const MixtureShape& shape,
                   const A* state, Components<A>& m) {
    const P* first = block.first<P>(params, params_stride(shape));
    if (shape.affine) {
      load_block(block, first, params_stride(shape), a);
      load_block(block, first + shape.per_chain, params_stride(shape), b);
    }
    COOPFLOW_INDEPENDENT
    for (int64_t i = 0; i < kWidth; ++i) poison[i] = coupling_poison(state[i], a[i], b[i]);
    m.load_rows(block, first + shape.first_row() * shape.per_chain, shape, poison);
  }
};

// ladj: of each element of the block.
template <typename T, typename P>
void map_block(const MixtureCouplingArgs<arithmetic_t<T>>& args, const Block& block,
               Components<arithmetic_t<T>>& m, arithmetic_t<T>* ladj) {
  using A = arithmetic_t<T>;
  const int64_t per_chain = args.shape.per_chain;
  BlockParams<A> p;
  alignas(64) A in[kWidth], x[kWidth], logit[kWidth], log_slope[kWidth], out[kWidth];
  const auto put = [&](int64_t i, const CouplingResult<A>& result) {
    out[i] = result.out;
    ladj[i] = result.ladj;
  };
  load_block(block, block.first<T>(args.in, per_chain), per_chain, in);
  p.template load_params<P>(block, args.params, args.shape, in, m);
  Sums<A> sums;
  if (args.inverse) {
    alignas(64) A target[kWidth], correction[kWidth] = {};
    COOPFLOW_INDEPENDENT
    for (int64_t i = 0; i < kWidth; ++i) {
      target[i] = inverse_target(in[i], p.a[i], p.b[i]);
      p.poison[i] = poisoned(p.poison[i], target[i]);
      target[i] += p.poison[i];
    }
    if (args.legacy_cdf_clamp) {
      COOPFLOW_INDEPENDENT
      for (int64_t i = 0; i < kWidth; ++i) {
        const A clamped = legacy_clamp(target[i]);
        correction[i] = legacy_correction(target[i], clamped);
        target[i] = clamped;
      }
    }
    solve(m, target, x, sums);
    finish(m, x, sums, logit, log_slope);
    COOPFLOW_INDEPENDENT
    for (int64_t i = 0; i < kWidth; ++i) {
      put(i, mixture_inverse_result(x[i], log_slope[i], p.a[i], correction[i], p.poison[i]));
    }
  } else {
    direct_sums(m, in, sums);
    finish(m, in, sums, logit, log_slope);
    COOPFLOW_INDEPENDENT
    for (int64_t i = 0; i < kWidth; ++i) {
      put(i, mixture_forward_result(logit[i], log_slope[i], p.a[i], p.b[i], p.poison[i]));
    }
  }
  store_block(block, out, per_chain, block.first<T>(args.out, per_chain));
}

template <typename T, typename P>
void map(const MixtureCouplingArgs<arithmetic_t<T>>& args, ComponentBlock<arithmetic_t<T>>* scratch,
         arithmetic_t<T>* partial_sums, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  Components<A> m(args.shape.components, scratch);
  sum_blocks<kWidth>(args.shape.per_chain, begin, end, partial_sums,
                     [&](const Block& block, A* ladj) {
                       map_block<T, P>(args, block, m, ladj);
                       return ladj;
                     });
}

// --- backward ---

template <typename A>
struct GradientBlock {
  alignas(64) A cdf[kWidth], survival[kWidth], density[kWidth], weight[kWidth];
  alignas(64) A cdf_slope[kWidth], survival_slope[kWidth], bend[kWidth];

  GradientSums<A> at(int64_t i) const {
    return {cdf[i], survival[i], density[i], weight[i], cdf_slope[i], survival_slope[i], bend[i]};
  }
  void set(int64_t i, const GradientSums<A>& s) {
    cdf[i] = s.cdf;
    survival[i] = s.survival;
    density[i] = s.density;
    weight[i] = s.weight;
    cdf_slope[i] = s.cdf_slope;
    survival_slope[i] = s.survival_slope;
    bend[i] = s.bend;
  }
};

// Where the scaled form is needed, and what it needs.
template <typename A>
struct Scaling {
  Peaks<A> peaks;
  int32_t needed[kWidth];
};

template <bool kAnyScaled, typename A>
MixtureTerms<A> terms(const Components<A>& m, int64_t k, int64_t i, const Logistic<A>& at,
                      const Scaling<A>& scaling) {
  const MixtureTerms<A> direct = direct_terms(at, m.at(k, i));
  if constexpr (!kAnyScaled) return direct;
  const MixtureTerms<A> scaled = scaled_terms(at, m.log_at(k, i), scaling.peaks.at(i));
  const bool use = scaling.needed[i] != 0;
  return {use ? scaled.cdf : direct.cdf, use ? scaled.survival : direct.survival,
          use ? scaled.density : direct.density};
}

template <bool kAnyScaled, typename A>
void gradient_sums(const Components<A>& m, const A* x, const Scaling<A>& scaling,
                   GradientBlock<A>& sums) {
  COOPFLOW_INDEPENDENT
  for (int64_t i = 0; i < kWidth; ++i) {
    GradientSums<A> s;
    for_each_component(m.count, [&](int64_t k) {
      const Component<A> c = m.at(k, i);
      const Logistic<A> at = logistic(x[i], c);
      m[k].t[i] = at.t;
      m[k].below[i] = at.below;
      m[k].above[i] = at.above;
      add(s, at, c, terms<kAnyScaled>(m, k, i, at, scaling));
    });
    sums.set(i, s);
  }
}

template <typename A>
struct ReciprocalBlock {
  alignas(64) A cdf[kWidth], survival[kWidth], density[kWidth], weight[kWidth];

  Reciprocals<A> at(int64_t i) const { return {cdf[i], survival[i], density[i], weight[i]}; }
  void set(int64_t i, const Reciprocals<A>& per) {
    cdf[i] = per.cdf;
    survival[i] = per.survival;
    density[i] = per.density;
    weight[i] = per.weight;
  }
};

// The gradients of the components' logits, means and log-scales take the place of these. t, below
// and above are what gradient_sums left at the same x.
template <bool kAnyScaled, typename A>
void component_gradients(const Components<A>& m, const Scaling<A>& scaling,
                         const GradientBlock<A>& sums, const A* grad_u, const A* grad_l) {
  ReciprocalBlock<A> per;
  COOPFLOW_INDEPENDENT
  for (int64_t i = 0; i < kWidth; ++i) per.set(i, reciprocals(sums.at(i)));
  COOPFLOW_INDEPENDENT
  for (int64_t i = 0; i < kWidth; ++i) {
    for_each_component(m.count, [&](int64_t k) {
      ComponentBlock<A>& block = m[k];
      const Component<A> c = m.at(k, i);
      const A below = block.below[i], above = block.above[i];
      const Logistic<A> at{block.t[i], below, above, larger_of(below, above)};
      const MixtureTerms<A> of = terms<kAnyScaled>(m, k, i, at, scaling);
      const ComponentGradient<A> g =
          component_gradient(at, c.inv_scale, c.weight, log_scale_is_clamped(block.log_scale[i]),
                             of, per.at(i), grad_u[i], grad_l[i]);
      block.log_weight[i] = g.logit;
      block.mean[i] = g.mean;
      block.log_scale[i] = g.log_scale;
    });
  }
}

template <typename T, typename P>
void backward(const MixtureCouplingBackwardArgs<arithmetic_t<T>>& args,
              ComponentBlock<arithmetic_t<T>>* scratch, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const MixtureShape& shape = args.shape;
  const int64_t per_chain = shape.per_chain;
  Components<A> m(shape.components, scratch);
  const auto differentiate = [&](const Block& block) {
    BlockParams<A> p;
    alignas(64) A x[kWidth], y[kWidth] = {}, grad_out[kWidth];
    const auto load_state = [&](const void* source, A* values) {
      load_block(block, block.first<T>(source, per_chain), per_chain, values);
    };
    load_state(args.x, x);
    load_state(args.grad_out, grad_out);
    if (args.inverse()) load_state(args.y, y);
    p.template load_params<P>(block, args.params, shape, x, m);
    COOPFLOW_INDEPENDENT
    for (int64_t i = 0; i < kWidth; ++i) {
      p.poison[i] = poisoned(poisoned(p.poison[i], grad_out[i]), y[i]);  // y is 0 without one
    }

    Scaling<A> scaling;
    GradientBlock<A> sums;
    gradient_sums<false>(m, x, scaling, sums);
    int32_t any_scaled = 0;
    COOPFLOW_INDEPENDENT
    for (int64_t i = 0; i < kWidth; ++i) {
      scaling.needed[i] =
          all_is_direct(MixtureSums<A>{sums.cdf[i], sums.survival[i], sums.density[i]}) ? 0 : 1;
      any_scaled |= scaling.needed[i];
    }
    if (any_scaled != 0) {
      find_peaks(m, x, scaling.peaks);
      gradient_sums<true>(m, x, scaling, sums);
    }

    alignas(64) A grad_u[kWidth], grad_l[kWidth], grad_in[kWidth], grad_a[kWidth], grad_b[kWidth];
    alignas(64) A grad_ladj[kWidth] = {};
    spread(block, args.grad_ladj, grad_ladj);
    alignas(64) A logit[kWidth], slope[kWidth], log_slope[kWidth];
    COOPFLOW_INDEPENDENT
    for (int64_t i = 0; i < kWidth; ++i) {
      const GradientSums<A> s = sums.at(i);
      logit[i] = direct_logit(MixtureSums<A>{s.cdf, s.survival, s.density}).value;
      slope[i] = mixture_slopes(s).logit;
      log_slope[i] = mixture_slopes(s).log_slope;
    }
    if (any_scaled != 0) {
      COOPFLOW_INDEPENDENT
      for (int64_t i = 0; i < kWidth; ++i) {
        const A of = scaled_logit_value(sums.cdf[i], sums.survival[i], scaling.peaks.at(i));
        logit[i] = scaling.needed[i] != 0 ? of : logit[i];
      }
    }
    const auto put = [&](int64_t i, const CouplingGradient<A>& g) {
      grad_u[i] = g.u + p.poison[i];
      grad_l[i] = g.l;
      grad_in[i] = g.input + p.poison[i];
      grad_a[i] = g.a + p.poison[i];
      grad_b[i] = g.b + p.poison[i];
    };
    if (args.inverse()) {
      const bool legacy = args.legacy_cdf_clamp;
      COOPFLOW_INDEPENDENT
      for (int64_t i = 0; i < kWidth; ++i) {
        put(i, mixture_inverse_gradient(grad_out[i], grad_ladj[i], {slope[i], log_slope[i]}, y[i],
                                        p.a[i], p.b[i], legacy));
      }
    } else {
      COOPFLOW_INDEPENDENT
      for (int64_t i = 0; i < kWidth; ++i) {
        put(i, mixture_forward_gradient(grad_out[i], grad_ladj[i], {slope[i], log_slope[i]},
                                        logit[i], p.a[i], p.b[i]));
      }
    }
    store_block(block, grad_in, per_chain, block.first<T>(args.grad_in, per_chain));
    P* row = block.first<P>(args.grad_params, params_stride(shape));
    if (shape.affine) {
      store_block(block, grad_a, params_stride(shape), row);
      store_block(block, grad_b, params_stride(shape), row + per_chain);
      row += 2 * per_chain;
    }
    if (any_scaled != 0) {
      component_gradients<true>(m, scaling, sums, grad_u, grad_l);
    } else {
      component_gradients<false>(m, scaling, sums, grad_u, grad_l);
    }
    const int64_t group = m.count * per_chain;
    for (int64_t k = 0; k < m.count; ++k, row += per_chain) {
      store_block(block, m[k].log_weight, params_stride(shape), row);
      store_block(block, m[k].mean, params_stride(shape), row + group);
      store_block(block, m[k].log_scale, params_stride(shape), row + 2 * group);
    }
  };
  for_each_block<kWidth>(per_chain, begin, end, differentiate);
}

}  // namespace

template <typename T, typename P>
MixtureLogisticLoops<T, P> mixture_logistic_loops() {
  return {map<T, P>, backward<T, P>};
}

template MixtureLogisticLoops<float, float> mixture_logistic_loops();
template MixtureLogisticLoops<float, bfloat16> mixture_logistic_loops();
template MixtureLogisticLoops<float, float16> mixture_logistic_loops();
template MixtureLogisticLoops<double, double> mixture_logistic_loops();
template MixtureLogisticLoops<bfloat16, bfloat16> mixture_logistic_loops();
template MixtureLogisticLoops<float16, float16> mixture_logistic_loops();

}  // namespace COOPFLOW_ISA
}  // namespace coopflow
