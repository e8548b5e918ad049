// A vector of Philox words for the instruction set being compiled. One word sits in the low half
// of each 64-bit lane, where the multiply instruction finds its operands and leaves its product;
// what is in the high halves never reaches a result. (Compilers widen and narrow 32-bit lanes
// around every product instead, which costs four times as much.)
#pragma once

#include <cstdint>

#include "coopflow/philox.h"

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

#if defined(__AVX512F__)

struct SimdWords {
  static constexpr int kLanes = 8;
  __m512i v;

  static SimdWords load(const uint32_t* words) {
    return {_mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)))};
  }
  static SimdWords broadcast(uint32_t word) { return {_mm512_set1_epi64(word)}; }
  void store(uint32_t* words) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm512_cvtepi64_epi32(v));
  }
};

inline SimdWords operator^(SimdWords a, SimdWords b) { return {_mm512_xor_si512(a.v, b.v)}; }

inline WideProduct<SimdWords> multiply_wide(SimdWords a, uint32_t b) {
  const __m512i product = _mm512_mul_epu32(a.v, _mm512_set1_epi64(b));
  return {{_mm512_shuffle_epi32(product, _MM_PERM_DDBB)}, {product}};
}

#elif defined(__AVX2__)

struct SimdWords {
  static constexpr int kLanes = 4;
  __m256i v;

  static SimdWords load(const uint32_t* words) {
    return {_mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)))};
  }
  static SimdWords broadcast(uint32_t word) { return {_mm256_set1_epi64x(word)}; }
  void store(uint32_t* words) const {
    const __m256i even = _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words), _mm256_castsi256_si128(even));
  }
};

inline SimdWords operator^(SimdWords a, SimdWords b) { return {_mm256_xor_si256(a.v, b.v)}; }

inline WideProduct<SimdWords> multiply_wide(SimdWords a, uint32_t b) {
  const __m256i product = _mm256_mul_epu32(a.v, _mm256_set1_epi64x(b));
  return {{_mm256_shuffle_epi32(product, 0xF5)}, {product}};
}

#else

struct SimdWords {
  static constexpr int kLanes = 1;
  uint32_t v;

  static SimdWords load(const uint32_t* words) { return {*words}; }
  static SimdWords broadcast(uint32_t word) { return {word}; }
  void store(uint32_t* words) const { *words = v; }
};

inline SimdWords operator^(SimdWords a, SimdWords b) { return {a.v ^ b.v}; }

inline WideProduct<SimdWords> multiply_wide(SimdWords a, uint32_t b) {
  const WideProduct<uint32_t> product = ::coopflow::multiply_wide(a.v, b);
  return {{product.high}, {product.low}};
}

#endif

inline SimdWords operator^(SimdWords a, uint32_t b) { return a ^ SimdWords::broadcast(b); }

}  // namespace
}  // namespace coopflow
