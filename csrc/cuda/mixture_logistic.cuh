// Kernels of the mixture-of-logistics coupling: one thread an element. Up to a number of components
// an element's parameters stay in registers, so that the root search reads memory once; beyond it
// each evaluation reads them again, mostly from cache.
#pragma once

#include "coopflow/mixture_logistic.h"
#include "coopflow/scalar_types.h"
#include "launch.cuh"
#include "mixture_logistic_launch.h"
#include "reduce.cuh"

namespace coopflow {

// --- one element's parameters ---

// The parameters of an element in memory, the first of them at row; parameter type P.
template <typename P>
struct ParamRows {
  using A = arithmetic_t<P>;
  const MixtureShape& shape;
  const P* row;

  __device__ __forceinline__ int components() const { return static_cast<int>(shape.components); }
  __device__ __forceinline__ A logit(int k) const { return at(k); }
  __device__ __forceinline__ A mean(int k) const { return at(components() + k); }
  __device__ __forceinline__ A log_scale(int k) const { return at(2 * components() + k); }
  // peak: the largest logit.
  __device__ __forceinline__ Component<A> component(int k, A peak) const {
    return make_component(logit(k) - peak, mean(k), log_scale(k));
  }
  __device__ __forceinline__ LogComponent<A> log_component(int k, A peak) const {
    return make_log_component(logit(k) - peak, log_scale(k));
  }
  __device__ __forceinline__ A largest_logit() const {
    A peak = logit(0);
    COOPFLOW_NO_UNROLL
    for (int k = 1; k < components(); ++k) peak = larger_of(peak, logit(k));
    return peak;
  }

 private:
  __device__ __forceinline__ A at(int index) const {
    return to_arithmetic(row[(shape.first_row() + index) * shape.per_chain]);
  }
};

// kComponents > 0: that many components in registers. 0: any number, from memory at each use.
// poison becomes NaN where a parameter is not finite.
template <typename P, int kComponents>
class MixtureParams {
 public:
  using A = arithmetic_t<P>;

  __device__ __forceinline__ MixtureParams(const ParamRows<P>& memory, A* poison) : rows(memory) {
    const int64_t stride = rows.shape.per_chain;
    const P* value = rows.row + rows.shape.first_row() * stride;
    COOPFLOW_UNROLL
    for (int k = 0; k < kComponents; ++k, value += stride) list_[k].weight = to_arithmetic(*value);
    COOPFLOW_UNROLL
    for (int k = 0; k < kComponents; ++k, value += stride) list_[k].mean = to_arithmetic(*value);
    COOPFLOW_UNROLL
    for (int k = 0; k < kComponents; ++k, value += stride) {
      list_[k].inv_scale = to_arithmetic(*value);
    }
    A peak = list_[0].weight;
    COOPFLOW_UNROLL
    for (int k = 0; k < kComponents; ++k) {
      peak = larger_of(peak, list_[k].weight);
      *poison = component_poison(*poison, list_[k].weight, list_[k].mean, list_[k].inv_scale);
    }
    COOPFLOW_UNROLL
    for (int k = 0; k < kComponents; ++k) {
      list_[k] = make_component(list_[k].weight - peak, list_[k].mean, list_[k].inv_scale);
    }
  }

  template <typename F>
  __device__ __forceinline__ void for_each(const F& f) const {
    COOPFLOW_UNROLL
    for (int k = 0; k < kComponents; ++k) f(k, list_[k]);
  }

  const ParamRows<P> rows;

 private:
  Component<A> list_[kComponents];
};

template <typename P>
class MixtureParams<P, 0> {
 public:
  using A = arithmetic_t<P>;

  __device__ __forceinline__ MixtureParams(const ParamRows<P>& memory, A* poison)
      : rows(memory), peak_(memory.largest_logit()) {
    for (int k = 0; k < rows.components(); ++k) {
      *poison = component_poison(*poison, rows.logit(k), rows.mean(k), rows.log_scale(k));
    }
  }

  template <typename F>
  __device__ __forceinline__ void for_each(const F& f) const {
    for (int k = 0; k < rows.components(); ++k) f(k, rows.component(k, peak_));
  }

  const ParamRows<P> rows;

 private:
  const A peak_;
};

// --- sums over the components ---

template <typename Params, typename A = typename Params::A>
__device__ __forceinline__ MixtureSums<A> direct_sums(const Params& params, A x) {
  MixtureSums<A> sums;
  params.for_each([&](int, const Component<A>& c) { add(sums, x, c); });
  return sums;
}

// The scaled form, read from memory.
template <typename A>
struct ScaledEvaluation {
  ScaledSums<A> sums;
  MixturePeaks<A> peaks;
};

template <typename P, typename A = arithmetic_t<P>>
__device__ __forceinline__ MixturePeaks<A> find_peaks(const ParamRows<P>& rows, A x, A peak) {
  MixturePeaks<A> peaks;
  COOPFLOW_NO_UNROLL
  for (int k = 0; k < rows.components(); ++k) {
    raise(peaks, x, rows.component(k, peak), rows.log_component(k, peak));
  }
  return peaks;
}

template <typename P, typename A = arithmetic_t<P>>
__device__ __forceinline__ ScaledEvaluation<A> scaled_sums(const ParamRows<P>& rows, A x) {
  const A peak = rows.largest_logit();
  ScaledEvaluation<A> of{{}, find_peaks(rows, x, peak)};
  COOPFLOW_NO_UNROLL
  for (int k = 0; k < rows.components(); ++k) {
    add(of.sums, x, rows.component(k, peak), rows.log_component(k, peak), of.peaks);
  }
  return of;
}

// logit F and the logarithm of its slope, from the direct sums at x.
template <typename A>
struct LogitAndLogSlope {
  A logit, log_slope;
};

template <typename Params, typename A = typename Params::A>
__device__ __forceinline__ LogitAndLogSlope<A> finish(const Params& params, A x,
                                                      const MixtureSums<A>& sums) {
  if (all_is_direct(sums)) {
    const MixtureLogit<A> at = direct_logit(sums);
    return {at.value, direct_log_slope(at)};
  }
  const ScaledEvaluation<A> scaled = scaled_sums(params.rows, x);
  const MixtureLogit<A> at = scaled_logit(scaled.sums, scaled.peaks);
  return {at.value, scaled_log_slope(at, scaled.sums, scaled.peaks)};
}

// Where logit F = target, and the direct sums at the last evaluation.
template <typename Params, typename A = typename Params::A>
__device__ __forceinline__ A solve(const Params& params, A target, MixtureSums<A>* sums) {
  RootSearch<A> search{root_tolerance(target), A(0), INFINITY, -INFINITY, A(0), A(0),
                       is_finite(target)};
  A total = A(0);
  params.for_each([&](int, const Component<A>& c) {
    const A quantile = component_quantile(c, target);
    search.low = smaller_of(search.low, quantile);
    search.high = larger_of(search.high, quantile);
    search.x = multiply_add(c.weight, quantile, search.x);
    total += c.weight;
  });
  search.x = clamp_keep_nan(search.x / total, search.low, search.high);
  search.step = search.step_before = A(2) * (search.high - search.low);
  COOPFLOW_NO_UNROLL
  for (int n = 0; search.pending && n < MixtureConstants<A>::kMaxEvaluations; ++n) {
    *sums = direct_sums(params, search.x);
    MixtureLogit<A> logit = direct_logit(*sums);
    if (!logit_is_direct(*sums)) {
      const ScaledEvaluation<A> scaled = scaled_sums(params.rows, search.x);
      logit = scaled_logit(scaled.sums, scaled.peaks);
    }
    advance(search, target, logit);
  }
  return search.x;
}

// --- forward and inverse ---

// The state is of type P or, beside half-precision parameters, float: of the arithmetic type.
template <typename P>
__device__ __forceinline__ arithmetic_t<P> load_state(const void* base, int64_t offset,
                                                      bool arithmetic) {
  if (arithmetic) return static_cast<const arithmetic_t<P>*>(base)[offset];
  return to_arithmetic(static_cast<const P*>(base)[offset]);
}

template <typename P>
__device__ __forceinline__ void store_state(arithmetic_t<P> value, int64_t offset, bool arithmetic,
                                            void* base) {
  if (arithmetic) {
    static_cast<arithmetic_t<P>*>(base)[offset] = value;
  } else {
    static_cast<P*>(base)[offset] = from_arithmetic<P>(value);
  }
}

constexpr int kMixtureThreads = 128;

// Threads of a block, an element for each; a chunk of ladj is a block's elements.
inline int mixture_threads(int64_t per_chain) {
  return static_cast<int>(std::min<int64_t>(kMixtureThreads, divide_up(per_chain, kWarp) * kWarp));
}

// Resident blocks that a kernel's registers must allow: 4 leave a thread 128, 3 leave 168 and 2 all
// 255. A parameter in registers takes one, or two for double; 32 components take 96.
template <typename P, int kComponents, bool kBackward>
constexpr int kMixtureMinBlocks =
    sizeof(arithmetic_t<P>) == 8 ? 2 : (kComponents < 32 ? 4 : (kBackward ? 2 : 3));

template <typename A>
struct Affine {
  A a, b;
};

// a and b of the element whose first parameter is at row.
template <typename P>
__device__ __forceinline__ Affine<arithmetic_t<P>> load_affine(const MixtureShape& shape,
                                                               const P* row) {
  if (!shape.affine) return {};
  return {to_arithmetic(row[0]), to_arithmetic(row[shape.per_chain])};
}

template <typename P, int kComponents, typename A = arithmetic_t<P>>
__device__ __forceinline__ CouplingResult<A> forward_element(const MixtureShape& shape,
                                                             const P* row, A x) {
  const Affine<A> affine = load_affine(shape, row);
  A poison = coupling_poison(x, affine.a, affine.b);
  const MixtureParams<P, kComponents> params({shape, row}, &poison);
  const LogitAndLogSlope<A> at = finish(params, x, direct_sums(params, x));
  return mixture_forward_result(at.logit, at.log_slope, affine.a, affine.b, poison);
}

template <typename P, int kComponents, typename A = arithmetic_t<P>>
__device__ __forceinline__ CouplingResult<A> inverse_element(const MixtureShape& shape,
                                                             const P* row, const void* state,
                                                             int64_t offset, bool arithmetic_state,
                                                             bool legacy_cdf_clamp) {
  const auto load_y = [&] { return load_state<P>(state, offset, arithmetic_state); };
  const Affine<A> affine = load_affine(shape, row);
  const A y = load_y();
  A target = inverse_target(y, affine.a, affine.b);
  A poison = poisoned(coupling_poison(y, affine.a, affine.b), target);
  const MixtureParams<P, kComponents> params({shape, row}, &poison);
  target += poison;
  if (legacy_cdf_clamp) target = legacy_clamp(target);
  MixtureSums<A> sums;
  const A x = solve(params, target, &sums);
  const A log_slope = finish(params, x, sums).log_slope;
  // What the search does not need is not kept beside it: registers are short.
  forget_reads();
  const Affine<A> again = load_affine(shape, row);
  A correction = A(0);
  if (legacy_cdf_clamp) {
    correction = legacy_correction(inverse_target(load_y(), again.a, again.b), target);
  }
  return mixture_inverse_result(x, log_slope, again.a, correction, poisoned(A(0), target));
}

template <typename P, int kComponents, bool kInverse>
__global__ void __launch_bounds__(kMixtureThreads, kMixtureMinBlocks<P, kComponents, false>)
    mixture_coupling_kernel(const __grid_constant__ MixtureCouplingArgs<arithmetic_t<P>> args,
                            int64_t chunks, bool arithmetic_state, arithmetic_t<P>* partial_sums) {
  using A = arithmetic_t<P>;
  const MixtureShape& shape = args.shape;
  for (int64_t index = blockIdx.x; index < shape.batch * chunks; index += gridDim.x) {
    const int64_t chain = index / chunks;
    const int64_t e = (index - chain * chunks) * blockDim.x + threadIdx.x;
    A sums[1] = {A(0)};
    if (e < shape.per_chain) {
      const int64_t offset = chain * shape.per_chain + e;
      const P* row =
          static_cast<const P*>(args.params) + chain * shape.rows() * shape.per_chain + e;
      CouplingResult<A> result;
      if constexpr (kInverse) {
        result = inverse_element<P, kComponents>(shape, row, args.in, offset, arithmetic_state,
                                                 args.legacy_cdf_clamp);
      } else {
        result = forward_element<P, kComponents>(shape, row,
                                                 load_state<P>(args.in, offset, arithmetic_state));
      }
      store_state<P>(result.out, offset, arithmetic_state, args.out);
      sums[0] = result.ladj;
    }
    block_sum(sums);
    if (threadIdx.x == 0) partial_sums[index] = sums[0];
  }
}

// --- backward ---

// Writes the gradients of component k's three parameters.
template <typename P, typename A = arithmetic_t<P>>
__device__ __forceinline__ void store_component_gradient(const ParamRows<P>& rows, int k,
                                                         const Logistic<A>& at, A inv_scale,
                                                         A weight, const MixtureTerms<A>& terms,
                                                         const Reciprocals<A>& per, A grad_u,
                                                         A grad_l, P* grad_logits) {
  const ComponentGradient<A> g =
      component_gradient(at, inv_scale, weight, terms, per, grad_u, grad_l);
  const A log_scale = rows.log_scale(k);
  const int64_t stride = rows.shape.per_chain;
  grad_logits[k * stride] = from_arithmetic<P>(g.logit);
  grad_logits[(rows.components() + k) * stride] = from_arithmetic<P>(g.mean);
  grad_logits[(2 * rows.components() + k) * stride] =
      from_arithmetic<P>(clamp_log_scale_gradient(log_scale, g.log_scale));
}

// Gradients of the coupling's own arguments, from what the sums gave.
template <typename A>
__device__ __forceinline__ CouplingGradient<A> coupling_gradient(
    const MixtureCouplingBackwardArgs<A>& args, const GradientSums<A>& sums, A logit, A grad_out,
    A grad_ladj, A y, const Affine<A>& affine) {
  const MixtureSlopes<A> slopes = mixture_slopes(sums);
  return args.inverse()
             ? mixture_inverse_gradient(grad_out, grad_ladj, slopes, y, affine.a, affine.b,
                                        args.legacy_cdf_clamp)
             : mixture_forward_gradient(grad_out, grad_ladj, slopes, logit, affine.a, affine.b);
}

template <typename P, int kComponents>
__global__ void __launch_bounds__(kMixtureThreads, kMixtureMinBlocks<P, kComponents, true>)
    mixture_coupling_backward_kernel(
        const __grid_constant__ MixtureCouplingBackwardArgs<arithmetic_t<P>> args, int64_t chunks,
        bool arithmetic_state) {
  using A = arithmetic_t<P>;
  const int64_t stride = args.shape.per_chain;
  for (int64_t index = blockIdx.x; index < args.shape.batch * chunks; index += gridDim.x) {
    const int64_t chain = index / chunks;
    const int64_t e = (index - chain * chunks) * blockDim.x + threadIdx.x;
    if (e >= stride) continue;
    const int64_t offset = chain * stride + e;
    const int64_t param = chain * args.shape.rows() * stride + e;
    P* grad_row = static_cast<P*>(args.grad_params) + param;
    const P* row = static_cast<const P*>(args.params) + param;
    const A x = load_state<P>(args.x, offset, arithmetic_state);
    const A grad_out = load_state<P>(args.grad_out, offset, arithmetic_state);
    const A y = args.inverse() ? load_state<P>(args.y, offset, arithmetic_state) : A(0);
    const Affine<A> affine = load_affine(args.shape, row);
    A poison = coupling_poison(x, affine.a, affine.b);
    poison = poisoned(poisoned(poison, grad_out), y);
    const MixtureParams<P, kComponents> params({args.shape, row}, &poison);
    const ParamRows<P>& rows = params.rows;
    P* grad_logits = grad_row + args.shape.first_row() * stride;
    const A grad_ladj = args.grad_ladj[chain];

    GradientSums<A> sums;
    params.for_each([&](int, const Component<A>& c) {
      const Logistic<A> at = logistic(x, c);
      add(sums, at, c, direct_terms(at, c));
    });
    const MixtureSums<A> main_sums{sums.cdf, sums.survival, sums.density};
    CouplingGradient<A> g;
    if (all_is_direct(main_sums)) {
      g = coupling_gradient(args, sums, direct_logit(main_sums).value, grad_out, grad_ladj, y,
                            affine);
      const A grad_u = g.u + poison;
      const Reciprocals<A> per = reciprocals(sums);
      const A same_x = computed_again(x);
      params.for_each([&](int k, const Component<A>& c) {
        const Logistic<A> at = logistic(same_x, c);
        store_component_gradient(rows, k, at, c.inv_scale, c.weight, direct_terms(at, c), per,
                                 grad_u, g.l, grad_logits);
      });
    } else {
      const A peak = rows.largest_logit();
      const MixturePeaks<A> peaks = find_peaks(rows, x, peak);
      sums = GradientSums<A>();
      COOPFLOW_NO_UNROLL
      for (int k = 0; k < rows.components(); ++k) {
        const Component<A> c = rows.component(k, peak);
        const Logistic<A> at = logistic(x, c);
        add(sums, at, c, scaled_terms(at, rows.log_component(k, peak), peaks));
      }
      g = coupling_gradient(args, sums, scaled_logit_value(sums.cdf, sums.survival, peaks),
                            grad_out, grad_ladj, y, affine);
      const A grad_u = g.u + poison;
      const Reciprocals<A> per = reciprocals(sums);
      COOPFLOW_NO_UNROLL
      for (int k = 0; k < rows.components(); ++k) {
        const Component<A> c = rows.component(k, peak);
        const Logistic<A> at = logistic(x, c);
        store_component_gradient(rows, k, at, c.inv_scale, c.weight,
                                 scaled_terms(at, rows.log_component(k, peak), peaks), per, grad_u,
                                 g.l, grad_logits);
      }
    }
    store_state<P>(g.input + poison, offset, arithmetic_state, args.grad_in);
    if (args.shape.affine) {
      grad_row[0] = from_arithmetic<P>(g.a + poison);
      grad_row[stride] = from_arithmetic<P>(g.b + poison);
    }
  }
}

// --- launches ---

template <typename P, int kComponents, bool kInverse, typename A = arithmetic_t<P>>
void launch_mixture_coupling(const MixtureCouplingArgs<A>& args, bool arithmetic_state,
                             const Tensor& state) {
  const int threads = mixture_threads(args.shape.per_chain);
  const int64_t batch = args.shape.batch;
  const int64_t chunks = divide_up(args.shape.per_chain, threads);
  if (chunks == 1) {
    launch<mixture_coupling_kernel<P, kComponents, kInverse>>(state, batch, threads, args, chunks,
                                                              arithmetic_state, args.ladj);
    return;
  }
  const Tensor storage = torch::stable::new_empty(
      state, {batch * chunks}, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
  A* partial_sums = static_cast<A*>(storage.mutable_data_ptr());
  launch<mixture_coupling_kernel<P, kComponents, kInverse>>(state, batch * chunks, threads, args,
                                                            chunks, arithmetic_state, partial_sums);
  launch<sum_chunks_kernel<A>>(state, divide_up(batch, kBlockThreads), kBlockThreads,
                               static_cast<const A*>(partial_sums), args.ladj, batch, chunks, 1);
}

// Calls f(std::integral_constant<int, N>()) with the kernels' number of components.
template <typename P, typename F>
void dispatch_components(int64_t components, const F& f) {
  if constexpr (sizeof(arithmetic_t<P>) == 4) {
    switch (components) {
      case 4:
        return f(std::integral_constant<int, 4>());
      case 8:
        return f(std::integral_constant<int, 8>());
      case 16:
        return f(std::integral_constant<int, 16>());
      case 32:
        return f(std::integral_constant<int, 32>());
      default:
        break;
    }
  }
  f(std::integral_constant<int, 0>());
}

template <typename P>
void run_mixture_coupling_kernel(const MixtureCouplingArgs<arithmetic_t<P>>& args,
                                 bool arithmetic_state, const Tensor& state) {
  dispatch_components<P>(args.shape.components, [&](auto components) {
    constexpr int kComponents = decltype(components)::value;
    const auto run = args.inverse ? launch_mixture_coupling<P, kComponents, true>
                                  : launch_mixture_coupling<P, kComponents, false>;
    run(args, arithmetic_state, state);
  });
}

template <typename P>
void run_mixture_coupling_backward_kernel(const MixtureCouplingBackwardArgs<arithmetic_t<P>>& args,
                                          bool arithmetic_state, const Tensor& state) {
  dispatch_components<P>(args.shape.components, [&](auto components) {
    constexpr int kComponents = decltype(components)::value;
    const int threads = mixture_threads(args.shape.per_chain);
    const int64_t chunks = divide_up(args.shape.per_chain, threads);
    launch<mixture_coupling_backward_kernel<P, kComponents>>(
        state, args.shape.batch * chunks, threads, args, chunks, arithmetic_state);
  });
}

}  // namespace coopflow
