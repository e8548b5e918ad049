// Kernels of the mixture-of-logistics coupling. Up to a number of components an element's
// parameters stay in registers, so that the root search reads memory once; beyond it each
// evaluation reads them again, mostly from cache. An element has one thread, or several with a part
// of the components each, which merge their sums and then all know the element's: registers decide
// how many warps there can be, and warps hide what memory and dependent arithmetic let one wait.
#pragma once

#include "coopflow/mixture_logistic.h"
#include "coopflow/scalar_types.h"
#include "launch.cuh"
#include "mixture_logistic_launch.h"
#include "parts.cuh"
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

// kComponents > 0: that many components in registers, those of this thread's part. 0: any number,
// from memory at each use. poison becomes NaN where a parameter of the element is not finite.
template <typename P, int kComponents, int kParts>
class MixtureParams {
 public:
  using A = arithmetic_t<P>;
  static_assert(kComponents % kParts == 0 && kComponents / kParts <= 32);

  __device__ __forceinline__ MixtureParams(const ParamRows<P>& memory, A* poison) : rows(memory) {
    const int64_t stride = rows.shape.per_chain;
    const P* weight = rows.row + (rows.shape.first_row() + first()) * stride;
    const P* mean = weight + kComponents * stride;
    const P* log_scale = mean + kComponents * stride;
    COOPFLOW_UNROLL
    for (int k = 0; k < kHeld; ++k, weight += stride) list_[k].weight = to_arithmetic(*weight);
    COOPFLOW_UNROLL
    for (int k = 0; k < kHeld; ++k, mean += stride) list_[k].mean = to_arithmetic(*mean);
    COOPFLOW_UNROLL
    for (int k = 0; k < kHeld; ++k, log_scale += stride) {
      list_[k].inv_scale = to_arithmetic(*log_scale);
    }
    A peak = list_[0].weight;
    COOPFLOW_UNROLL
    for (int k = 0; k < kHeld; ++k) {
      peak = larger_of(peak, list_[k].weight);
      *poison = component_poison(*poison, list_[k].weight, list_[k].mean, list_[k].inv_scale);
      clamped_ |= log_scale_is_clamped(list_[k].inv_scale) ? 1u << k : 0u;
    }
    peak = Parts<kParts>::merged(peak, [](A a, A b) { return larger_of(a, b); });
    *poison = Parts<kParts>::merged(*poison, [](A a, A b) { return a + b; });
    COOPFLOW_UNROLL
    for (int k = 0; k < kHeld; ++k) {
      list_[k] = make_component(list_[k].weight - peak, list_[k].mean, list_[k].inv_scale);
    }
  }

  // The part: components first(), ..., first() + count() - 1.
  __device__ __forceinline__ int first() const { return Parts<kParts>::part() * kHeld; }
  __device__ __forceinline__ int count() const { return kHeld; }

  // Calls f(k, component) for the k-th of the part.
  template <typename F>
  __device__ __forceinline__ void for_each(const F& f) const {
    COOPFLOW_UNROLL
    for (int k = 0; k < kHeld; ++k) f(k, list_[k]);
  }

  // Whether the log-scale of the part's k-th is. Kept, since a read would wait for the writes
  // before it.
  __device__ __forceinline__ bool is_clamped(int k) const { return (clamped_ >> k & 1u) != 0u; }

  const ParamRows<P> rows;

 private:
  static constexpr int kHeld = kComponents / kParts;
  Component<A> list_[kHeld];
  uint32_t clamped_ = 0;
};

template <typename P>
class MixtureParams<P, 0, 1> {
 public:
  using A = arithmetic_t<P>;

  __device__ __forceinline__ MixtureParams(const ParamRows<P>& memory, A* poison)
      : rows(memory), peak_(memory.largest_logit()) {
    for (int k = 0; k < rows.components(); ++k) {
      *poison = component_poison(*poison, rows.logit(k), rows.mean(k), rows.log_scale(k));
    }
  }

  __device__ __forceinline__ int first() const { return 0; }
  __device__ __forceinline__ int count() const { return rows.components(); }

  template <typename F>
  __device__ __forceinline__ void for_each(const F& f) const {
    for (int k = 0; k < rows.components(); ++k) f(k, rows.component(k, peak_));
  }

  __device__ __forceinline__ bool is_clamped(int k) const {
    return log_scale_is_clamped(rows.log_scale(k));
  }

  const ParamRows<P> rows;

 private:
  const A peak_;
};

// --- sums over the components ---

template <int kParts, typename Params, typename A = typename Params::A>
__device__ __forceinline__ MixtureSums<A> direct_sums(const Params& params, A x) {
  MixtureSums<A> sums;
  params.for_each([&](int, const Component<A>& c) { add(sums, x, c); });
  return Parts<kParts>::merged(sums, [](const auto& a, const auto& b) { return merge(a, b); });
}

// The scaled form, read from memory. It is seldom needed: every thread goes through all components
// of its element.
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

// logit F and the logarithm of its slope, from the direct sums at x and the logit that they give.
template <typename A>
struct LogitAndLogSlope {
  A logit, log_slope;
};

template <typename Params, typename A = typename Params::A>
__device__ __forceinline__ LogitAndLogSlope<A> finish(const Params& params, A x,
                                                      const MixtureSums<A>& sums,
                                                      const MixtureLogit<A>& direct) {
  if (all_is_direct(sums)) return {direct.value, direct_log_slope(direct)};
  const ScaledEvaluation<A> scaled = scaled_sums(params.rows, x);
  const MixtureLogit<A> at = scaled_logit(scaled.sums, scaled.peaks);
  return {at.value, scaled_log_slope(at, scaled.sums, scaled.peaks)};
}

// Where logit F = target, and what the last evaluation gave.
template <typename A>
struct Root {
  A x;
  MixtureSums<A> sums;
  MixtureLogit<A> logit;
};

// Sums need all threads of a warp, so that one whose search is over goes on at its last x until the
// others' are.
template <int kParts, typename Params, typename A = typename Params::A>
__device__ __forceinline__ Root<A> solve(const Params& params, A target) {
  Quantiles<A> quantiles;
  params.for_each([&](int, const Component<A>& c) { add(quantiles, target, c); });
  quantiles =
      Parts<kParts>::merged(quantiles, [](const auto& a, const auto& b) { return merge(a, b); });
  RootSearch<A> search = begin_search(quantiles, target);
  MixtureSums<A> sums;
  MixtureLogit<A> logit{};
  COOPFLOW_NO_UNROLL
  for (int left = MixtureConstants<A>::kMaxEvaluations;
       Parts<kParts>::any(search.pending) && left > 0; --left) {
    sums = direct_sums<kParts>(params, search.x);
    const MixtureLogit<A> of_sums = direct_logit(sums);
    const bool direct = logit_is_direct(sums);
    if (direct) logit = of_sums;
    if (!direct && search.pending) {
      const ScaledEvaluation<A> scaled = scaled_sums(params.rows, search.x);
      logit = scaled_logit(scaled.sums, scaled.peaks);
    }
    advance(search, target, logit);
  }
  return {last_step(search, target, logit), sums, logit};
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

// Threads of an element. Each does what is done once an element, a fifth of an evaluation's work
// for two of them and 32 components; 16 components leave enough registers to one.
template <int kComponents>
constexpr int kMixtureParts = kComponents == 32 ? 2 : 1;

// Threads of a block; a chunk of ladj is a block's elements.
template <int kParts>
int mixture_threads(int64_t per_chain) {
  const int64_t needed = divide_up(per_chain, Parts<kParts>::kElements) * kWarp;
  return static_cast<int>(std::min<int64_t>(kMixtureThreads, needed));
}

// Resident blocks that a kernel's registers must allow: 6 leave a thread 80, 5 leave 96, 4 leave
// 128. A parameter in registers takes one.
template <typename P, int kComponents>
struct MixtureBlocks {
  static constexpr bool kFew = sizeof(arithmetic_t<P>) == 8 || kComponents == 16;
  static constexpr int kForward = kFew ? 4 : 6;
  static constexpr int kInverse = kFew ? 4 : (kComponents == 32 ? 5 : 6);
  static constexpr int kBackward = kFew || kComponents == 32 ? 4 : 5;
};

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

template <typename P, int kComponents, int kParts, typename A = arithmetic_t<P>>
__device__ __forceinline__ CouplingResult<A> forward_element(const MixtureShape& shape,
                                                             const P* row, A x) {
  const Affine<A> affine = load_affine(shape, row);
  A poison = coupling_poison(x, affine.a, affine.b);
  const MixtureParams<P, kComponents, kParts> params({shape, row}, &poison);
  const MixtureSums<A> sums = direct_sums<kParts>(params, x);
  const LogitAndLogSlope<A> at = finish(params, x, sums, direct_logit(sums));
  return mixture_forward_result(at.logit, at.log_slope, affine.a, affine.b, poison);
}

template <typename P, int kComponents, int kParts, typename A = arithmetic_t<P>>
__device__ __forceinline__ CouplingResult<A> inverse_element(const MixtureShape& shape,
                                                             const P* row, const void* state,
                                                             int64_t offset, bool arithmetic_state,
                                                             bool legacy_cdf_clamp) {
  const Affine<A> affine = load_affine(shape, row);
  const A y = load_state<P>(state, offset, arithmetic_state);
  A target = inverse_target(y, affine.a, affine.b);
  A poison = poisoned(coupling_poison(y, affine.a, affine.b), target);
  const MixtureParams<P, kComponents, kParts> params({shape, row}, &poison);
  target += poison;
  A correction = A(0);
  if (legacy_cdf_clamp) {
    const A clamped = legacy_clamp(target);
    correction = legacy_correction(target, clamped);
    target = clamped;
  }
  const Root<A> root = solve<kParts>(params, target);
  const A log_slope = finish(params, root.x, root.sums, root.logit).log_slope;
  return mixture_inverse_result(root.x, log_slope, affine.a, correction, poison);
}

// The element of a thread, counted in its chain. Where the chain ends threads may have none; they
// stand in for its last one, as the others of their warp need them.
struct MixtureElement {
  int64_t index;
  bool exists;
};

template <int kParts>
__device__ __forceinline__ MixtureElement mixture_element(int64_t per_chain, int64_t chunk) {
  const int elements = static_cast<int>(blockDim.x) / kParts;
  const int64_t begin = chunk * elements;
  const int64_t left = per_chain - begin;
  const int there = left < elements ? static_cast<int>(left) : elements;
  const int e = Parts<kParts>::element();
  return {begin + (e < there ? e : there - 1), e < there};
}

template <typename P, int kComponents, int kParts, bool kInverse>
__global__ void __launch_bounds__(kMixtureThreads, kInverse
                                                       ? MixtureBlocks<P, kComponents>::kInverse
                                                       : MixtureBlocks<P, kComponents>::kForward)
    mixture_coupling_kernel(const __grid_constant__ MixtureCouplingArgs<arithmetic_t<P>> args,
                            int64_t chunks, bool arithmetic_state, arithmetic_t<P>* partial_sums) {
  using A = arithmetic_t<P>;
  const MixtureShape& shape = args.shape;
  for (int64_t index = blockIdx.x; index < shape.batch * chunks; index += gridDim.x) {
    const int64_t chain = index / chunks;
    const MixtureElement e = mixture_element<kParts>(shape.per_chain, index - chain * chunks);
    A sums[1] = {A(0)};
    if (Parts<kParts>::any(e.exists)) {
      const int64_t offset = chain * shape.per_chain + e.index;
      const P* row =
          static_cast<const P*>(args.params) + chain * shape.rows() * shape.per_chain + e.index;
      CouplingResult<A> result;
      if constexpr (kInverse) {
        result = inverse_element<P, kComponents, kParts>(shape, row, args.in, offset,
                                                         arithmetic_state, args.legacy_cdf_clamp);
      } else {
        result = forward_element<P, kComponents, kParts>(
            shape, row, load_state<P>(args.in, offset, arithmetic_state));
      }
      if (e.exists && Parts<kParts>::part() == 0) {
        store_state<P>(result.out, offset, arithmetic_state, args.out);
        sums[0] = result.ladj;
      }
    }
    block_sum(sums);
    if (threadIdx.x == 0) partial_sums[index] = sums[0];
  }
}

// --- backward ---

// Writes the gradients of a component's three parameters, the logit's at `to`.
template <typename P, typename A = arithmetic_t<P>>
__device__ __forceinline__ void store_component_gradient(const MixtureShape& shape,
                                                         const ComponentGradient<A>& gradient,
                                                         P* to) {
  const int64_t kind = shape.components * shape.per_chain;
  to[0] = from_arithmetic<P>(gradient.logit);
  to[kind] = from_arithmetic<P>(gradient.mean);
  to[2 * kind] = from_arithmetic<P>(gradient.log_scale);
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

template <typename P, int kComponents, int kParts>
__global__ void __launch_bounds__(kMixtureThreads, MixtureBlocks<P, kComponents>::kBackward)
    mixture_coupling_backward_kernel(
        const __grid_constant__ MixtureCouplingBackwardArgs<arithmetic_t<P>> args, int64_t chunks,
        bool arithmetic_state) {
  using A = arithmetic_t<P>;
  const MixtureShape& shape = args.shape;
  const int64_t stride = shape.per_chain;
  for (int64_t index = blockIdx.x; index < shape.batch * chunks; index += gridDim.x) {
    const int64_t chain = index / chunks;
    const MixtureElement e = mixture_element<kParts>(stride, index - chain * chunks);
    if (!Parts<kParts>::any(e.exists)) continue;
    const int64_t offset = chain * stride + e.index;
    const int64_t param = chain * shape.rows() * stride + e.index;
    const P* row = static_cast<const P*>(args.params) + param;
    const A x = load_state<P>(args.x, offset, arithmetic_state);
    const A grad_out = load_state<P>(args.grad_out, offset, arithmetic_state);
    const A y = args.inverse() ? load_state<P>(args.y, offset, arithmetic_state) : A(0);
    const Affine<A> affine = load_affine(shape, row);
    A poison = coupling_poison(x, affine.a, affine.b);
    poison = poisoned(poisoned(poison, grad_out), y);
    const MixtureParams<P, kComponents, kParts> params({shape, row}, &poison);
    const A grad_ladj = args.grad_ladj[chain];

    GradientSums<A> sums;
    params.for_each([&](int, const Component<A>& c) {
      const Logistic<A> at = logistic(x, c);
      add(sums, at, c, direct_terms(at, c));
    });
    sums = Parts<kParts>::merged(sums, [](const auto& a, const auto& b) { return merge(a, b); });
    const ParamRows<P>& rows = params.rows;
    const MixtureSums<A> main_sums{sums.cdf, sums.survival, sums.density};
    const bool direct = all_is_direct(main_sums);
    A logit = direct_logit(main_sums).value;
    A peak = A(0);
    MixturePeaks<A> peaks;
    if (!direct) {
      peak = rows.largest_logit();
      peaks = find_peaks(rows, x, peak);
      sums = GradientSums<A>();
      COOPFLOW_NO_UNROLL
      for (int k = 0; k < rows.components(); ++k) {
        const Component<A> c = rows.component(k, peak);
        const Logistic<A> at = logistic(x, c);
        add(sums, at, c, scaled_terms(at, rows.log_component(k, peak), peaks));
      }
      logit = scaled_logit_value(sums.cdf, sums.survival, peaks);
    }

    const CouplingGradient<A> g =
        coupling_gradient(args, sums, logit, grad_out, grad_ladj, y, affine);
    P* grad_row = static_cast<P*>(args.grad_params) + param;
    if (Parts<kParts>::part() == 0) {
      store_state<P>(g.input + poison, offset, arithmetic_state, args.grad_in);
      if (shape.affine) {
        grad_row[0] = from_arithmetic<P>(g.a + poison);
        grad_row[stride] = from_arithmetic<P>(g.b + poison);
      }
    }
    P* grad_logits = grad_row + (shape.first_row() + params.first()) * stride;
    const A grad_u = g.u + poison;
    const Reciprocals<A> per = reciprocals(sums);
    if (direct) {
      const A same_x = computed_again(x);
      params.for_each([&](int k, const Component<A>& c) {
        const Logistic<A> at = logistic(same_x, c);
        store_component_gradient(shape,
                                 component_gradient(at, c.inv_scale, c.weight, params.is_clamped(k),
                                                    direct_terms(at, c), per, grad_u, g.l),
                                 grad_logits + k * stride);
      });
    } else {
      COOPFLOW_NO_UNROLL
      for (int k = 0; k < params.count(); ++k) {
        const int own = params.first() + k;
        const Component<A> c = rows.component(own, peak);
        const Logistic<A> at = logistic(x, c);
        store_component_gradient(
            shape,
            component_gradient(at, c.inv_scale, c.weight, log_scale_is_clamped(rows.log_scale(own)),
                               scaled_terms(at, rows.log_component(own, peak), peaks), per, grad_u,
                               g.l),
            grad_logits + k * stride);
      }
    }
  }
}

// --- launches ---

template <typename P, int kComponents, int kParts, bool kInverse, typename A = arithmetic_t<P>>
void launch_mixture_coupling(const MixtureCouplingArgs<A>& args, bool arithmetic_state,
                             const Tensor& state) {
  constexpr auto kKernel = mixture_coupling_kernel<P, kComponents, kParts, kInverse>;
  const int threads = mixture_threads<kParts>(args.shape.per_chain);
  const int64_t batch = args.shape.batch;
  const int64_t chunks = divide_up(args.shape.per_chain, threads / kParts);
  if (chunks == 1) {
    launch<kKernel>(state, batch, threads, args, chunks, arithmetic_state, args.ladj);
    return;
  }
  const Tensor storage = torch::stable::new_empty(
      state, {batch * chunks}, std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
  A* partial_sums = static_cast<A*>(storage.mutable_data_ptr());
  launch<kKernel>(state, batch * chunks, threads, args, chunks, arithmetic_state, partial_sums);
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
    constexpr int kParts = kMixtureParts<kComponents>;
    const auto run = args.inverse ? launch_mixture_coupling<P, kComponents, kParts, true>
                                  : launch_mixture_coupling<P, kComponents, kParts, false>;
    run(args, arithmetic_state, state);
  });
}

template <typename P>
void run_mixture_coupling_backward_kernel(const MixtureCouplingBackwardArgs<arithmetic_t<P>>& args,
                                          bool arithmetic_state, const Tensor& state) {
  dispatch_components<P>(args.shape.components, [&](auto components) {
    constexpr int kComponents = decltype(components)::value;
    constexpr int kParts = kMixtureParts<kComponents>;
    const int threads = mixture_threads<kParts>(args.shape.per_chain);
    const int64_t chunks = divide_up(args.shape.per_chain, threads / kParts);
    launch<mixture_coupling_backward_kernel<P, kComponents, kParts>>(
        state, args.shape.batch * chunks, threads, args, chunks, arithmetic_state);
  });
}

}  // namespace coopflow
