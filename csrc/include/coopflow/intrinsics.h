// Instructions that only a GPU has, each beside a host path of the same meaning. Nothing else in
// csrc uses inline assembly or approximate-math instructions, but for those that a warp executes
// together (cuda/warp_matrix.cuh).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "coopflow/macros.h"

namespace coopflow {

// a * b + c rounded once. The build forbids implicit contraction, so this is the only way to get
// it, and every instruction set gives the same bits.
COOPFLOW_HD float multiply_add(float a, float b, float c) {
#if COOPFLOW_DEVICE_CODE
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

COOPFLOW_HD double multiply_add(double a, double b, double c) {
#if COOPFLOW_DEVICE_CODE
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

// The full product. Written in C++ the device compiler adds a useless zero to its high word.
COOPFLOW_HD uint64_t multiply_words(uint32_t a, uint32_t b) {
#if COOPFLOW_DEVICE_CODE
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

COOPFLOW_HD uint32_t float_bits(float x) {
#if COOPFLOW_DEVICE_CODE
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

COOPFLOW_HD float bits_float(uint32_t bits) {
#if COOPFLOW_DEVICE_CODE
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

COOPFLOW_HD uint64_t double_bits(double x) {
#if COOPFLOW_DEVICE_CODE
  return static_cast<uint64_t>(__double_as_longlong(x));
#else
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

COOPFLOW_HD double bits_double(uint64_t bits) {
#if COOPFLOW_DEVICE_CODE
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
#endif
}

// min(max(x, low), high) that keeps NaN, as torch.clamp does.
COOPFLOW_HD float clamp_keep_nan(float x, float low, float high) {
#if COOPFLOW_DEVICE_CODE
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(low));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(y), "f"(high));
  return y;
#else
  const float y = x < low ? low : x;
  return y > high ? high : y;
#endif
}

COOPFLOW_HD double clamp_keep_nan(double x, double low, double high) {
  const double y = x < low ? low : x;
  return y > high ? high : y;
}

COOPFLOW_HD float absolute(float x) {
#if COOPFLOW_DEVICE_CODE
  return fabsf(x);
#else
  return bits_float(float_bits(x) & 0x7FFFFFFFu);
#endif
}

COOPFLOW_HD double absolute(double x) { return x < 0.0 ? -x : x; }

// --- approximations of the special-function unit ---
// Their special values are those of the tables in the PTX manual, with denormal arguments and
// results flushed to zeros of the same sign. libm has the same tables but for that, so a host path
// is libm between two flushes. Only an emulated device and tests take it: the CPU loops use
// elementary.h, which a compiler can vectorise.

COOPFLOW_HD float flush_denormal(float x) {
  return absolute(x) < 0x1p-126f ? bits_float(float_bits(x) & 0x80000000u) : x;
}

// Absolute error 2^-22 for results in [-1, 1], else 2 ulp.
COOPFLOW_HD float approximate_log2(float x) {
#if COOPFLOW_DEVICE_CODE
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return flush_denormal(std::log2(flush_denormal(x)));
#endif
}

// Relative error 2^-22.
COOPFLOW_HD float approximate_exp2(float x) {
#if COOPFLOW_DEVICE_CODE
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return flush_denormal(std::exp2(flush_denormal(x)));
#endif
}

// Relative error 2^-23.
COOPFLOW_HD float approximate_reciprocal(float x) {
#if COOPFLOW_DEVICE_CODE
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return flush_denormal(1.0f / flush_denormal(x));
#endif
}

COOPFLOW_HD float approximate_sqrt(float x) {
#if COOPFLOW_DEVICE_CODE
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::sqrt(flush_denormal(x));
#endif
}

// Absolute error 2^-20.9 for arguments in [-pi, pi].
COOPFLOW_HD void approximate_sincos(float x, float* sine, float* cosine) {
#if COOPFLOW_DEVICE_CODE
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(*sine) : "f"(x));
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(*cosine) : "f"(x));
#else
  *sine = flush_denormal(std::sin(flush_denormal(x)));
  *cosine = flush_denormal(std::cos(flush_denormal(x)));
#endif
}

// Hides where a value came from, so that what follows is computed again, not kept in registers.
template <typename T>
COOPFLOW_HD T computed_again(T x) {
#if COOPFLOW_DEVICE_CODE
  if constexpr (sizeof(T) == 4) {
    asm volatile("" : "+f"(x));
  } else {
    asm volatile("" : "+d"(x));
  }
#endif
  return x;
}

// Plain words of 16 and 8 bytes, which compilers move in one access.
struct alignas(16) Word16 {
  uint32_t a, b, c, d;
};
struct alignas(8) Word8 {
  uint32_t a, b;
};

// One store of the full width. Written out as a struct copy the compiler sometimes splits it.
COOPFLOW_HD void store_word(Word16 word, Word16* to) {
#if COOPFLOW_DEVICE_CODE
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(word.a), "r"(word.b), "r"(word.c), "r"(word.d)
               : "memory");
#else
  *to = word;
#endif
}

COOPFLOW_HD void store_word(Word8 word, Word8* to) {
#if COOPFLOW_DEVICE_CODE
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(word.a),
               "r"(word.b)
               : "memory");
#else
  *to = word;
#endif
}

}  // namespace coopflow
