// From Philox words to numbers: Box-Muller normals and uniforms. The definition (native noise of
// this package): u = (w0 + 1/2) * 2^-32, phi = 2 * pi * w1 * 2^-32,
//   lanes 0, 1 = sqrt(-2 ln u) * (cos phi, sin phi), words 2 and 3 give lanes 2 and 3.
#pragma once

#include <cmath>
#include <cstdint>

#include "coopflow/elementary.h"
#include "coopflow/intrinsics.h"
#include "coopflow/macros.h"
#include "coopflow/philox.h"

namespace coopflow {

template <typename A>
struct Quad {
  A v0, v1, v2, v3;
};

template <typename A>
struct Pair {
  A first, second;
};

COOPFLOW_HD Pair<float> box_muller(uint32_t w0, uint32_t w1, float /*arithmetic*/) {
  const float u = multiply_add(static_cast<float>(w0), 0x1p-32f, 0x1p-33f);
  float sine, cosine;
#if COOPFLOW_DEVICE_CODE
  // Near u = 1 the approximate logarithm can come out positive, hence the absolute value.
  const float radius = approximate_sqrt(1.38629436f * fabsf(approximate_log2(u)));
  approximate_sincos(static_cast<float>(static_cast<int32_t>(w1)) * 1.46291807926715968e-9f, &sine,
                     &cosine);
#else
  const float radius = std::sqrt(-2.0f * log_positive(u));
  sincos_turns(w1, &sine, &cosine);
#endif
  return {radius * cosine, radius * sine};
}

COOPFLOW_HD Pair<double> box_muller(uint32_t w0, uint32_t w1, double /*arithmetic*/) {
  const double u = (static_cast<double>(w0) + 0.5) * 0x1p-32;
  const double radius = std::sqrt(-2.0 * log_positive(u));
  double sine, cosine;
  sincos_turns(w1, &sine, &cosine);
  return {radius * cosine, radius * sine};
}

template <typename A>
COOPFLOW_HD Quad<A> normals_from_words(PhiloxWords w) {
  const Pair<A> low = box_muller(w.w0, w.w1, A());
  const Pair<A> high = box_muller(w.w2, w.w3, A());
  return {low.first, low.second, high.first, high.second};
}

// In the open interval (0, 1). float32 uses the top 23 bits, so that neither end can be reached by
// rounding; float64 uses all 32.
COOPFLOW_HD float uniform_from_word(uint32_t w, float /*arithmetic*/) {
  return multiply_add(static_cast<float>(w >> 9), 0x1p-23f, 0x1p-24f);
}

COOPFLOW_HD double uniform_from_word(uint32_t w, double /*arithmetic*/) {
  return (static_cast<double>(w) + 0.5) * 0x1p-32;
}

template <typename A>
COOPFLOW_HD Quad<A> uniforms_from_words(PhiloxWords w) {
  return {uniform_from_word(w.w0, A()), uniform_from_word(w.w1, A()), uniform_from_word(w.w2, A()),
          uniform_from_word(w.w3, A())};
}

}  // namespace coopflow
