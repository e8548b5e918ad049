// Elements are handled in blocks. Loops run across the elements of a block and are vectorised, with
// the loop over components inside: what an element sums up over them then stays in a register.
#include "mixture_logistic_loops.h"

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

// n values and zeros after them.
template <typename T, typename A>
void load_block(const void* source, int64_t offset, int64_t n, A* values) {
  if (n == kWidth) {
    const T* from = static_cast<const T*>(source) + offset;
    COOPFLOW_INDEPENDENT
    for (int64_t i = 0; i < kWidth; ++i) values[i] = to_arithmetic(from[i]);
    __builtin_prefetch(from + kWidth);  // the next block's
  } else {
    for (int64_t i = n; i < kWidth; ++i) values[i] = A(0);
    load<T>(source, offset, n, values);
  }
}

template <typename T, typename A>
void store_block(const A* values, int64_t offset, int64_t n, void* destination) {
  if (n == kWidth) {
    T* to = static_cast<T*>(destination) + offset;
    COOPFLOW_INDEPENDENT
    for (int64_t i = 0; i < kWidth; ++i) to[i] = from_arithmetic<T>(values[i]);
    __builtin_prefetch(to + kWidth, 1);
  } else {
    store<T>(values, offset, n, destination);
  }
}

// The components of one block of elements.
template <typename A>
class Components {
 public:
  Components(int64_t components, ComponentBlock<A>* scratch)
      : count(components), blocks_(scratch) {}

  ComponentBlock<A>& operator[](int64_t k) const { return blocks_[k]; }

  // Rows of logits, means and log-scales lie `stride` apart. poison becomes NaN where a parameter
  // is not finite, and else stays as it is.
  template <typename P>
  void load_rows(const void* params, int64_t offset, int64_t stride, int64_t n, A* poison) {
    for (int64_t k = 0; k < count; ++k) {
      const int64_t row = offset + k * stride;
      load_block<P>(params, row, n, blocks_[k].log_weight);
      load_block<P>(params, row + count * stride, n, blocks_[k].mean);
      load_block<P>(params, row + 2 * count * stride, n, blocks_[k].log_scale);
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
        ComponentBlock<A>& block = blocks_[k];
        const A log_weight = block.log_weight[i], mean = block.mean[i];
        const A log_scale = block.log_scale[i];
        bad = component_poison(bad, log_weight, mean, log_scale);
        const Component<A> c = make_component(log_weight - peak[i], mean, log_scale);
        block.log_weight[i] = log_weight - peak[i];
        block.weight[i] = c.weight;
        block.inv_scale[i] = c.inv_scale;
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

// Calls f(chain, element, n) for each block of one chunk.
template <typename F>
void for_each_block_of_chunk(int64_t per_chain, int64_t index, const F& f) {
  for_each_tile_of_chunk(per_chain, index, [&](int64_t chain, int64_t e, int64_t n) {
    for (int64_t i = 0; i < n; i += kWidth) {
      f(chain, e + i, n - i < kWidth ? n - i : kWidth);
    }
  });
}

// One block's parameters.
template <typename A>
struct BlockParams {
  alignas(64) A a[kWidth] = {}, b[kWidth] = {};
  alignas(64) A poison[kWidth];  // of these, of the state and of the components

  template <typename P>
  void load_params(const void* params, const MixtureShape& shape, int64_t chain, int64_t e,
                   int64_t n, const A* state, Components<A>& m) {
    const int64_t stride = shape.per_chain;
    int64_t offset = chain * shape.rows() * stride + e;
    if (shape.affine) {
      load_block<P>(params, offset, n, a);
      load_block<P>(params, offset + stride, n, b);
      offset += 2 * stride;
    }
    COOPFLOW_INDEPENDENT
    for (int64_t i = 0; i < kWidth; ++i) poison[i] = coupling_poison(state[i], a[i], b[i]);
    m.template load_rows<P>(params, offset, stride, n, poison);
  }
};

template <typename T, typename P>
void map(const MixtureCouplingArgs<arithmetic_t<T>>& args, ComponentBlock<arithmetic_t<T>>* scratch,
         arithmetic_t<T>* partial_sums, int64_t begin, int64_t end) {
  using A = arithmetic_t<T>;
  const MixtureShape& shape = args.shape;
  Components<A> m(shape.components, scratch);
  for (int64_t index = begin; index < end; ++index) {
    alignas(64) A lanes[kLanes] = {};
    for_each_block_of_chunk(shape.per_chain, index, [&](int64_t chain, int64_t e, int64_t n) {
      BlockParams<A> p;
      alignas(64) A in[kWidth], x[kWidth], logit[kWidth], log_slope[kWidth];
      alignas(64) A out[kWidth], ladj[kWidth];
      const auto put = [&](int64_t i, const CouplingResult<A>& result) {
        out[i] = result.out;
        ladj[i] = result.ladj;
      };
      const int64_t offset = chain * shape.per_chain + e;
      load_block<T>(args.in, offset, n, in);
      p.template load_params<P>(args.params, shape, chain, e, n, in, m);
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
      store<T>(out, offset, n, args.out);
      add_by_lane(ladj, n, lanes);
    });
    partial_sums[index] = sum_lanes(lanes);
  }
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
  const int64_t stride = shape.per_chain;
  Components<A> m(shape.components, scratch);
  const auto block = [&](int64_t chain, int64_t e, int64_t n) {
    BlockParams<A> p;
    alignas(64) A x[kWidth], y[kWidth] = {}, grad_out[kWidth];
    const int64_t offset = chain * stride + e;
    load_block<T>(args.x, offset, n, x);
    load_block<T>(args.grad_out, offset, n, grad_out);
    if (args.inverse()) load_block<T>(args.y, offset, n, y);
    p.template load_params<P>(args.params, shape, chain, e, n, x, m);
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
    const A grad_ladj = args.grad_ladj[chain];
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
        put(i, mixture_inverse_gradient(grad_out[i], grad_ladj, {slope[i], log_slope[i]}, y[i],
                                        p.a[i], p.b[i], legacy));
      }
    } else {
      COOPFLOW_INDEPENDENT
      for (int64_t i = 0; i < kWidth; ++i) {
        put(i, mixture_forward_gradient(grad_out[i], grad_ladj, {slope[i], log_slope[i]}, logit[i],
                                        p.a[i], p.b[i]));
      }
    }
    store_block<T>(grad_in, offset, n, args.grad_in);
    int64_t row = chain * shape.rows() * stride + e;
    if (shape.affine) {
      store_block<P>(grad_a, row, n, args.grad_params);
      store_block<P>(grad_b, row + stride, n, args.grad_params);
      row += 2 * stride;
    }
    if (any_scaled != 0) {
      component_gradients<true>(m, scaling, sums, grad_u, grad_l);
    } else {
      component_gradients<false>(m, scaling, sums, grad_u, grad_l);
    }
    for (int64_t k = 0; k < m.count; ++k, row += stride) {
      store_block<P>(m[k].log_weight, row, n, args.grad_params);
      store_block<P>(m[k].mean, row + m.count * stride, n, args.grad_params);
      store_block<P>(m[k].log_scale, row + 2 * m.count * stride, n, args.grad_params);
    }
  };
  for (int64_t index = begin; index < end; ++index) {
    for_each_block_of_chunk(stride, index, block);
  }
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
