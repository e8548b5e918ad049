// `coopflow_ext._host`: the layer-1 headers on numpy arrays, without torch, so that tests check the
// very functions that the kernels call, element by element.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "coopflow/affine_coupling.h"
#include "coopflow/elementary.h"
#include "coopflow/langevin.h"
#include "coopflow/mixture_logistic.h"
#include "coopflow/mlp.h"
#include "coopflow/normal.h"
#include "coopflow/philox.h"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

py::dict build_info() {
  py::dict info;
  info["version"] = COOPFLOW_VERSION;
  info["compiler"] = COOPFLOW_COMPILER;
  return info;
}

void check_words(const Array<uint32_t>& words, const char* name) {
  if (words.ndim() != 2 || words.shape(1) != 4) {
    throw std::invalid_argument(std::string(name) + " must have shape (N, 4)");
  }
}

// Applies `f` to every row of four words; the four results are the row of the output.
template <typename T, typename F>
py::array_t<T> map_words(const Array<uint32_t>& words, const char* name, F f) {
  check_words(words, name);
  py::array_t<T> out({words.shape(0), py::ssize_t{4}});
  const auto in = words.unchecked<2>();
  auto row = out.template mutable_unchecked<2>();
  for (py::ssize_t i = 0; i < words.shape(0); ++i) {
    f(coopflow::PhiloxWords{in(i, 0), in(i, 1), in(i, 2), in(i, 3)}, &row(i, 0));
  }
  return out;
}

void store(coopflow::PhiloxWords w, uint32_t* out) {
  out[0] = w.w0;
  out[1] = w.w1;
  out[2] = w.w2;
  out[3] = w.w3;
}

template <typename A>
void store(coopflow::Quad<A> q, A* out) {
  out[0] = q.v0;
  out[1] = q.v1;
  out[2] = q.v2;
  out[3] = q.v3;
}

py::array_t<uint32_t> philox4x32_10(const Array<uint32_t>& counters, uint64_t key) {
  const coopflow::PhiloxKey k = coopflow::make_philox_key(static_cast<int64_t>(key));
  return map_words<uint32_t>(counters, "counters", [k](coopflow::PhiloxWords c, uint32_t* out) {
    store(coopflow::philox4x32_10(c, k), out);
  });
}

py::array_t<uint32_t> noise_words(uint64_t seed, int64_t chain, uint32_t time, uint32_t n_blocks) {
  const coopflow::PhiloxKey key = coopflow::make_philox_key(static_cast<int64_t>(seed));
  py::array_t<uint32_t> out({static_cast<py::ssize_t>(n_blocks), py::ssize_t{4}});
  auto row = out.mutable_unchecked<2>();
  for (uint32_t block = 0; block < n_blocks; ++block) {
    store(coopflow::noise_words(key, chain, time, block), &row(block, 0));
  }
  return out;
}

template <typename A>
py::array_t<A> normals_from_words(const Array<uint32_t>& words) {
  return map_words<A>(words, "words", [](coopflow::PhiloxWords w, A* out) {
    store(coopflow::normals_from_words<A>(w), out);
  });
}

template <typename A>
py::array_t<A> uniforms_from_words(const Array<uint32_t>& words) {
  return map_words<A>(words, "words", [](coopflow::PhiloxWords w, A* out) {
    store(coopflow::uniforms_from_words<A>(w), out);
  });
}

template <typename A>
py::tuple sincos_turns(const Array<uint32_t>& turns) {
  py::array_t<A> sine(turns.size()), cosine(turns.size());
  for (py::ssize_t i = 0; i < turns.size(); ++i) {
    coopflow::sincos_turns(turns.data()[i], sine.mutable_data() + i, cosine.mutable_data() + i);
  }
  return py::make_tuple(sine, cosine);
}

float approximate_sine(float x) {
  float sine, cosine;
  coopflow::approximate_sincos(x, &sine, &cosine);
  return sine;
}

float approximate_cosine(float x) {
  float sine, cosine;
  coopflow::approximate_sincos(x, &sine, &cosine);
  return cosine;
}

template <typename A>
A plain_langevin_update(A x, A grad, A xi, A drift, A noise, A clip, A limit) {
  const coopflow::LangevinLimits<A> limits{clip, INFINITY, -limit, limit};
  const coopflow::LangevinChain<A> chain{drift, noise, A(0), A(0), A(1)};
  return coopflow::langevin_update<false>(limits, chain, false, x, grad, xi, A(0), false).x;
}

template <typename A>
py::tuple activate(int activation, const Array<A>& z, A shape, A threshold) {
  py::array_t<A> value(z.size()), slope(z.size());
  const coopflow::ActivationParameters<A> parameters{shape, threshold};
  coopflow::with_activation(static_cast<coopflow::Activation>(activation), [&](auto tag) {
    for (py::ssize_t i = 0; i < z.size(); ++i) {
      const auto result = coopflow::activate<decltype(tag)::value>(parameters, z.data()[i]);
      value.mutable_data()[i] = result.value;
      slope.mutable_data()[i] = result.slope;
    }
  });
  return py::make_tuple(value, slope);
}

// The components of one element. Evaluated as the kernels do: in the direct form where it holds.
template <typename A>
class Mixture {
 public:
  Mixture(const A* logits, const A* means, const A* log_scales, py::ssize_t count) {
    A peak = logits[0];
    for (py::ssize_t k = 1; k < count; ++k) peak = coopflow::larger_of(peak, logits[k]);
    for (py::ssize_t k = 0; k < count; ++k) {
      components_.push_back(coopflow::make_component(logits[k] - peak, means[k], log_scales[k]));
      logs_.push_back(coopflow::make_log_component(logits[k] - peak, log_scales[k]));
    }
  }

  struct Value {
    coopflow::MixtureLogit<A> logit;
    A log_slope;
  };

  Value at(A x) const {
    coopflow::MixtureSums<A> sums;
    for (const auto& c : components_) add(sums, x, c);
    if (coopflow::all_is_direct(sums)) {
      const coopflow::MixtureLogit<A> logit = coopflow::direct_logit(sums);
      return {logit, coopflow::direct_log_slope(logit)};
    }
    coopflow::MixturePeaks<A> peaks;
    for (size_t k = 0; k < logs_.size(); ++k) raise(peaks, x, components_[k], logs_[k]);
    coopflow::ScaledSums<A> scaled;
    for (size_t k = 0; k < logs_.size(); ++k) add(scaled, x, components_[k], logs_[k], peaks);
    const coopflow::MixtureLogit<A> logit = coopflow::scaled_logit(scaled, peaks);
    return {logit, coopflow::scaled_log_slope(logit, scaled, peaks)};
  }

  // From the middle of the exact bracket, which takes more evaluations than the kernels' start.
  A solve(A target) const {
    coopflow::Quantiles<A> quantiles;
    for (const auto& c : components_) add(quantiles, target, c);
    coopflow::RootSearch<A> s = coopflow::begin_search(quantiles, target);
    s.x = A(0.5) * (s.low + s.high);
    coopflow::MixtureLogit<A> logit{};
    for (int n = 0; s.pending && n < coopflow::MixtureConstants<A>::kMaxEvaluations; ++n) {
      logit = at(s.x).logit;
      advance(s, target, logit);
    }
    return last_step(s, target, logit);
  }

 private:
  std::vector<coopflow::Component<A>> components_;
  std::vector<coopflow::LogComponent<A>> logs_;
};

// Calls f(mixture i, i) for values (N,) beside logits, means and log-scales, each (N, K).
template <typename A, typename F>
void for_each_mixture(const Array<A>& values, const Array<A>& logits, const Array<A>& means,
                      const Array<A>& log_scales, F f) {
  const py::ssize_t n = values.size();
  for (const Array<A>* rows : {&logits, &means, &log_scales}) {
    if (values.ndim() != 1 || rows->ndim() != 2 || rows->shape(0) != n || rows->shape(1) < 1 ||
        rows->shape(1) != logits.shape(1)) {
      throw std::invalid_argument("logits, means and log_scales must have shape (N, K), K >= 1");
    }
  }
  const py::ssize_t k = logits.shape(1);
  for (py::ssize_t i = 0; i < n; ++i) {
    f(Mixture<A>(logits.data() + i * k, means.data() + i * k, log_scales.data() + i * k, k), i);
  }
}

template <typename A>
py::tuple mixture_logit(const Array<A>& x, const Array<A>& logits, const Array<A>& means,
                        const Array<A>& log_scales) {
  py::array_t<A> value(x.size()), log_slope(x.size());
  for_each_mixture(x, logits, means, log_scales, [&](const Mixture<A>& mixture, py::ssize_t i) {
    const auto at = mixture.at(x.data()[i]);
    value.mutable_data()[i] = at.logit.value;
    log_slope.mutable_data()[i] = at.log_slope;
  });
  return py::make_tuple(value, log_slope);
}

template <typename A>
py::array_t<A> mixture_quantile(const Array<A>& logit, const Array<A>& logits,
                                const Array<A>& means, const Array<A>& log_scales) {
  py::array_t<A> x(logit.size());
  for_each_mixture(logit, logits, means, log_scales, [&](const Mixture<A>& mixture, py::ssize_t i) {
    x.mutable_data()[i] = mixture.solve(logit.data()[i]);
  });
  return x;
}

// Functions that exist in both precisions, named with the dtype as numpy does.
template <typename A>
void bind_precision(py::module_& m, const std::string& dtype) {
  m.def(("normals_from_words_" + dtype).c_str(), &normals_from_words<A>, py::arg("words"),
        "Box-Muller normals, (N, 4), from Philox words, uint32 (N, 4).");
  m.def(("uniforms_from_words_" + dtype).c_str(), &uniforms_from_words<A>, py::arg("words"),
        "Uniforms in (0, 1), (N, 4), from Philox words, uint32 (N, 4).");
  m.def(("sincos_turns_" + dtype).c_str(), &sincos_turns<A>, py::arg("turns"),
        "(sine, cosine) of 2 pi turns 2^-32, each (N,), from uint32 (N,).");
  m.def(("log_positive_" + dtype).c_str(),
        py::vectorize([](A x) { return coopflow::log_positive(x); }), py::arg("x"),
        "Natural logarithm of positive, finite, normal numbers.");
  m.def(("exponential_" + dtype).c_str(),
        py::vectorize([](A x) { return coopflow::exponential(x); }), py::arg("x"), "exp(x).");
  m.def(("exponential_nonpositive_" + dtype).c_str(),
        py::vectorize([](A x) { return coopflow::exponential_nonpositive(x); }), py::arg("x"),
        "exp(x) for x <= 0.");
  m.def(("exponential_minus_one_" + dtype).c_str(),
        py::vectorize([](A x) { return coopflow::exponential_minus_one(x); }), py::arg("x"),
        "exp(x) - 1 for x <= 0.");
  m.def(("exponential2_nonpositive_" + dtype).c_str(),
        py::vectorize([](A x) { return coopflow::exponential2_nonpositive(x); }), py::arg("x"),
        "2^x for x <= 0.");
  m.def(("activate_" + dtype).c_str(), &activate<A>, py::arg("activation"), py::arg("z"),
        py::arg("shape") = A(0), py::arg("threshold") = A(0),
        "(value, slope) of an activation by its number, each (N,).");
  m.def(("langevin_update_" + dtype).c_str(), py::vectorize(&plain_langevin_update<A>),
        py::arg("x"), py::arg("grad"), py::arg("xi"), py::arg("drift"), py::arg("noise"),
        py::arg("grad_clip"), py::arg("clamp"),
        "clamp(x - drift clip(grad) + noise xi), the limits being +- grad_clip and +- clamp.");
  m.def(("affine_forward_" + dtype).c_str(), py::vectorize(&coopflow::affine_forward<A>),
        py::arg("x"), py::arg("a"), py::arg("b"), "x e^a + b.");
  m.def(("affine_inverse_" + dtype).c_str(), py::vectorize(&coopflow::affine_inverse<A>),
        py::arg("y"), py::arg("a"), py::arg("b"), "(y - b) e^-a.");
  m.def(
      ("mixture_logit_" + dtype).c_str(), &mixture_logit<A>, py::arg("x"), py::arg("logits"),
      py::arg("means"), py::arg("log_scales"),
      "(logit F(x), log of its slope), each (N,), of mixtures of K logistics, parameters (N, K).");
  m.def(("mixture_quantile_" + dtype).c_str(), &mixture_quantile<A>, py::arg("logit"),
        py::arg("logits"), py::arg("means"), py::arg("log_scales"),
        "x with logit F(x) = logit, (N,).");
}

// What stands on a host for an instruction that only a GPU has.
void bind_instruction(py::module_& m, const char* name, float (*f)(float), const char* doc) {
  m.def(name, py::vectorize(f), py::arg("x"), doc);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "The mathematics of csrc/include/coopflow on numpy arrays (for tests).";
  m.def("build_info", &build_info, "Version and compiler of this module.");
  m.def("philox4x32_10", &philox4x32_10, py::arg("counters"), py::arg("key"),
        "Philox4x32-10 of counters, uint32 (N, 4), under one 64-bit key: uint32 (N, 4).");
  m.def("noise_words", &noise_words, py::arg("seed"), py::arg("chain"), py::arg("time"),
        py::arg("n_blocks"), "The words of elements 0 ... 4 n_blocks - 1 of a chain at a time.");
  m.def("fold_in", &coopflow::fold_in, py::arg("seed"), py::arg("data"),
        "The seed of a separate use.");
  bind_instruction(m, "approximate_log2", coopflow::approximate_log2, "lg2.approx.ftz.f32");
  bind_instruction(m, "approximate_exp2", coopflow::approximate_exp2, "ex2.approx.ftz.f32");
  bind_instruction(m, "approximate_reciprocal", coopflow::approximate_reciprocal,
                   "rcp.approx.ftz.f32");
  bind_instruction(m, "approximate_sqrt", coopflow::approximate_sqrt, "sqrt.approx.ftz.f32");
  bind_instruction(m, "approximate_sine", approximate_sine, "sin.approx.ftz.f32");
  bind_instruction(m, "approximate_cosine", approximate_cosine, "cos.approx.ftz.f32");
  bind_precision<float>(m, "float32");
  bind_precision<double>(m, "float64");
}
