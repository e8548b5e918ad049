// Storage types and their arithmetic types. Half-precision values are stored in 16 bits and
// computed in float; conversions round to nearest even and are branch-free on the host.
#pragma once

#include <cstdint>
#include <cstring>

#include "coopflow/intrinsics.h"
#include "coopflow/macros.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace coopflow {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// The type that a storage type is computed in.
template <typename T>
struct ArithmeticType {
  using type = float;
};
template <>
struct ArithmeticType<double> {
  using type = double;
};
template <typename T>
using arithmetic_t = typename ArithmeticType<T>::type;

COOPFLOW_HD float to_arithmetic(float x) { return x; }
COOPFLOW_HD double to_arithmetic(double x) { return x; }

COOPFLOW_HD float to_arithmetic(bfloat16 x) {
  return bits_float(static_cast<uint32_t>(x.bits) << 16);
}

COOPFLOW_HD float to_arithmetic(float16 x) {
#if COOPFLOW_DEVICE_CODE
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = (static_cast<uint32_t>(x.bits) & 0x8000u) << 16;
  const uint32_t shifted = (static_cast<uint32_t>(x.bits) & 0x7FFFu) << 13;
  const bool denormal = shifted < 0x00800000u;
  const bool special = shifted >= 0x0F800000u;  // infinity or NaN
  const float small = bits_float(shifted + 0x38800000u) - 0x1p-14f;
  const uint32_t large = shifted + (special ? 0x70000000u : 0x38000000u);
  return bits_float(sign | (denormal ? float_bits(small) : large));
#endif
}

template <typename T>
struct FromArithmetic;

template <>
struct FromArithmetic<float> {
  COOPFLOW_HD static float convert(float x) { return x; }
};

template <>
struct FromArithmetic<double> {
  COOPFLOW_HD static double convert(double x) { return x; }
};

template <>
struct FromArithmetic<bfloat16> {
  COOPFLOW_HD static bfloat16 convert(float x) {
#if COOPFLOW_DEVICE_CODE
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    const uint32_t bits = float_bits(x);
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>(nan ? 0x7FC0u : rounded)};
#endif
  }
};

template <>
struct FromArithmetic<float16> {
  COOPFLOW_HD static float16 convert(float x) {
#if COOPFLOW_DEVICE_CODE
    return {__half_as_ushort(__float2half_rn(x))};
#else
    const uint32_t bits = float_bits(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint32_t denormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t y = magnitude < 0x38800000u ? denormal : normal;
    y = magnitude >= 0x47800000u ? 0x7C00u : y;  // 65536 and beyond, infinity
    y = magnitude > 0x7F800000u ? 0x7E00u : y;
    return {static_cast<uint16_t>(sign | y)};
#endif
  }
};

template <typename T>
COOPFLOW_HD T from_arithmetic(arithmetic_t<T> x) {
  return FromArithmetic<T>::convert(x);
}

// Two at a time: half-precision pairs are one instruction on a GPU.
template <typename T>
COOPFLOW_HD void from_arithmetic_pair(arithmetic_t<T> first, arithmetic_t<T> second, T* pair) {
  pair[0] = from_arithmetic<T>(first);
  pair[1] = from_arithmetic<T>(second);
}

#if COOPFLOW_DEVICE_CODE
template <>
COOPFLOW_HD void from_arithmetic_pair<bfloat16>(float first, float second, bfloat16* pair) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  memcpy(pair, &both, sizeof(both));
}

template <>
COOPFLOW_HD void from_arithmetic_pair<float16>(float first, float second, float16* pair) {
  const __half2 both = __floats2half2_rn(first, second);
  memcpy(pair, &both, sizeof(both));
}
#endif

}  // namespace coopflow
