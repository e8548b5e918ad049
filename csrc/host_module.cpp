// `coopflow_ext._host`: the layer-1 headers on numpy arrays, without torch, so that tests check the
// very functions that the kernels call, element by element.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "coopflow/elementary.h"
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
  m.def("exponential2_nonpositive_float32",
        py::vectorize([](float x) { return coopflow::exponential2_nonpositive(x); }), py::arg("x"),
        "2^x for x <= 0.");
  bind_precision<float>(m, "float32");
  bind_precision<double>(m, "float64");
}
