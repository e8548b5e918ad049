// A vector of floats or doubles for the instruction set being compiled, for products of small
// matrices: compilers do not keep a block of sums in registers by themselves. Included by the
// *_loops.cpp files only, each compiled once per instruction set: everything here has internal
// linkage.
#pragma once

#include "coopflow/intrinsics.h"
#include "coopflow/macros.h"

#if defined(__AVX512F__) || defined(__AVX2__)
// GCC 12 calls the undefined-value helpers of its own header uninitialized.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace coopflow {
namespace {

template <typename A>
struct SimdReals;

// kSimdRows: rows of a block of sums, of one or two vectors each, that the registers hold.
#if defined(__AVX512F__)

constexpr int kSimdRows = 8;

template <>
struct SimdReals<float> {
  static constexpr int kLanes = 16;
  __m512 v;

  static SimdReals load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static SimdReals broadcast(float x) { return {_mm512_set1_ps(x)}; }
  void store(float* to) const { _mm512_storeu_ps(to, v); }
};

template <>
struct SimdReals<double> {
  static constexpr int kLanes = 8;
  __m512d v;

  static SimdReals load(const double* from) { return {_mm512_loadu_pd(from)}; }
  static SimdReals broadcast(double x) { return {_mm512_set1_pd(x)}; }
  void store(double* to) const { _mm512_storeu_pd(to, v); }
};

inline SimdReals<float> multiply_add(SimdReals<float> a, SimdReals<float> b, SimdReals<float> c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}

inline SimdReals<double> multiply_add(SimdReals<double> a, SimdReals<double> b,
                                      SimdReals<double> c) {
  return {_mm512_fmadd_pd(a.v, b.v, c.v)};
}

#elif defined(__AVX2__)

constexpr int kSimdRows = 4;

template <>
struct SimdReals<float> {
  static constexpr int kLanes = 8;
  __m256 v;

  static SimdReals load(const float* from) { return {_mm256_loadu_ps(from)}; }
  static SimdReals broadcast(float x) { return {_mm256_set1_ps(x)}; }
  void store(float* to) const { _mm256_storeu_ps(to, v); }
};

template <>
struct SimdReals<double> {
  static constexpr int kLanes = 4;
  __m256d v;

  static SimdReals load(const double* from) { return {_mm256_loadu_pd(from)}; }
  static SimdReals broadcast(double x) { return {_mm256_set1_pd(x)}; }
  void store(double* to) const { _mm256_storeu_pd(to, v); }
};

inline SimdReals<float> multiply_add(SimdReals<float> a, SimdReals<float> b, SimdReals<float> c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}

inline SimdReals<double> multiply_add(SimdReals<double> a, SimdReals<double> b,
                                      SimdReals<double> c) {
  return {_mm256_fmadd_pd(a.v, b.v, c.v)};
}

#else

constexpr int kSimdRows = 4;

template <typename A>
struct SimdReals {
  static constexpr int kLanes = 4;
  A v[kLanes];

  static SimdReals load(const A* from) { return {{from[0], from[1], from[2], from[3]}}; }
  static SimdReals broadcast(A x) { return {{x, x, x, x}}; }
  void store(A* to) const {
    for (int i = 0; i < kLanes; ++i) to[i] = v[i];
  }
};

template <typename A>
inline SimdReals<A> multiply_add(const SimdReals<A>& a, const SimdReals<A>& b,
                                 const SimdReals<A>& c) {
  return {{::coopflow::multiply_add(a.v[0], b.v[0], c.v[0]),
           ::coopflow::multiply_add(a.v[1], b.v[1], c.v[1]),
           ::coopflow::multiply_add(a.v[2], b.v[2], c.v[2]),
           ::coopflow::multiply_add(a.v[3], b.v[3], c.v[3])}};
}

#endif

}  // namespace
}  // namespace coopflow
