// Branch-free elementary functions that a compiler can vectorise, bit-identical on every
// instruction set because each rounding is written out. Coefficients are those of the Cephes
// library (S. Moshier). Device code calls the standard library.
//
// Those of float64 err by less than 2 ulp; its logarithm and its exponential are for every
// argument. Outside the arguments that a function of float32 is for, device code differs: the
// logarithm of zero is -inf there, and an ordinary number here. A kernel that runs on a CPU in a
// device's place gets what the device makes of such arguments; of ordinary ones it gets the bits of
// the CPU loops, with which its results are compared.
#pragma once

#include <cmath>
#include <cstdint>

#include "coopflow/intrinsics.h"
#include "coopflow/macros.h"

namespace coopflow {

// Whether an argument or a result is neither zero, denormal, infinite nor NaN.
COOPFLOW_HD bool is_ordinary(float x) {
  return (float_bits(x) & 0x7FFFFFFFu) - 0x00800000u < 0x7F000000u;
}

// Whether an emulated device gives the device's result.
COOPFLOW_HD bool is_special(float x, float on_device) {
  return !is_ordinary(x) || !is_ordinary(on_device);
}

// log x for a positive, finite, normal x; within 1 ulp of the result or 1e-7, whichever is larger.
COOPFLOW_HD float log_positive(float x) {
#if COOPFLOW_DEVICE_CODE
  return logf(x);
#else
  if (COOPFLOW_EMULATED_DEVICE && is_special(x, std::log(x))) return std::log(x);
  constexpr uint32_t kSqrtHalf = 0x3F3504F3u;
  // Integer arithmetic on the bits splits x into m * 2^e with m in [sqrt(1/2), sqrt(2)).
  const uint32_t shifted = float_bits(x) - kSqrtHalf;
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float f = bits_float((shifted & 0x007FFFFFu) + kSqrtHalf) - 1.0f;
  float p = 7.0376836292e-2f;
  p = multiply_add(p, f, -1.1514610310e-1f);
  p = multiply_add(p, f, 1.1676998740e-1f);
  p = multiply_add(p, f, -1.2420140846e-1f);
  p = multiply_add(p, f, 1.4249322787e-1f);
  p = multiply_add(p, f, -1.6668057665e-1f);
  p = multiply_add(p, f, 2.0000714765e-1f);
  p = multiply_add(p, f, -2.4999993993e-1f);
  p = multiply_add(p, f, 3.3333331174e-1f);
  const float f2 = f * f;
  float y = p * f * f2;
  y = multiply_add(e, -2.12194440e-4f, y);
  y = multiply_add(-0.5f, f2, y);
  return multiply_add(e, 0.693359375f, f + y);
#endif
}

// log x for every x.
COOPFLOW_HD double log_positive(double x) {
#if COOPFLOW_DEVICE_CODE
  return log(x);
#else
  constexpr uint64_t kSqrtHalf = 0x3FE6A09E667F3BCD;
  const bool denormal = x < 0x1p-1022;
  const uint64_t bits = double_bits(denormal ? x * 0x1p54 : x);
  // As for float32, but that 1024 keeps the exponent from becoming negative: then its bits are the
  // last ones of a double beside 2^52.
  const uint64_t exponent = (bits - kSqrtHalf + (uint64_t{1024} << 52)) >> 52;
  const double e =
      bits_double(exponent | double_bits(0x1p52)) - (denormal ? 0x1p52 + 1024 + 54 : 0x1p52 + 1024);
  const double f = bits_double(((bits - kSqrtHalf) & 0x000FFFFFFFFFFFFF) + kSqrtHalf) - 1.0;
  double p = 1.01875663804580931796e-4;
  p = multiply_add(p, f, 4.97494994976747001425e-1);
  p = multiply_add(p, f, 4.70579119878881725854);
  p = multiply_add(p, f, 1.44989225341610930846e1);
  p = multiply_add(p, f, 1.79368678507819816313e1);
  p = multiply_add(p, f, 7.70838733755885391666);
  double q = f + 1.12873587189167450590e1;
  q = multiply_add(q, f, 4.52279145837532221105e1);
  q = multiply_add(q, f, 8.29875266912776603211e1);
  q = multiply_add(q, f, 7.11544750618563894466e1);
  q = multiply_add(q, f, 2.31251620126765340583e1);
  const double f2 = f * f;
  double y = f * (f2 * p / q);
  y = multiply_add(e, -2.121944400546905827679e-4, y);
  y = multiply_add(-0.5, f2, y);
  y = multiply_add(e, 0.693359375, f + y);
  y = x == 0.0 ? -INFINITY : y;
  y = x < 0.0 ? NAN : y;
  return x < INFINITY ? y : x;  // infinity and NaN stay
#endif
}

// The same in few instructions: on a GPU absolute error 2^-22 for x in [1/2, 2], else 2 ulp.
COOPFLOW_HD float quick_log_positive(float x) {
#if COOPFLOW_DEVICE_CODE
  return 0.69314718f * approximate_log2(x);
#else
  if (COOPFLOW_EMULATED_DEVICE && is_special(x, approximate_log2(x))) return approximate_log2(x);
  return log_positive(x);
#endif
}

COOPFLOW_HD double quick_log_positive(double x) { return log_positive(x); }

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

// e^t = (1 + excess) * 2^n for a t that is not large; n is the integer in the low bits of shifted.
template <typename A>
struct ScaledExponential {
  A excess, shifted;
};

COOPFLOW_HD ScaledExponential<float> scaled_exponential(float t) {
  const float shifted = multiply_add(t, 1.44269504f, kRounder);
  const float n = shifted - kRounder;
  float r = multiply_add(n, -0.693359375f, t);
  r = multiply_add(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = multiply_add(p, r, 1.3981999507e-3f);
  p = multiply_add(p, r, 8.3334519073e-3f);
  p = multiply_add(p, r, 4.1665795894e-2f);
  p = multiply_add(p, r, 1.6666665459e-1f);
  p = multiply_add(p, r, 5.0000001201e-1f);
  return {multiply_add(p * r, r, r), shifted};
}

// exp x for every x: 0, infinity and NaN where they belong, denormal results included.
COOPFLOW_HD float exponential(float x) {
#if COOPFLOW_DEVICE_CODE
  return expf(x);
#else
  const ScaledExponential<float> e = scaled_exponential(clamp_keep_nan(x, -104.0f, 89.0f));
  // 2^n in two factors, since n can leave the exponent range of either one alone.
  const int32_t exponent = static_cast<int32_t>(float_bits(e.shifted) - float_bits(kRounder));
  const int32_t half = exponent >> 1;
  const float scale0 = bits_float(static_cast<uint32_t>(half + 127) << 23);
  const float scale1 = bits_float(static_cast<uint32_t>(exponent - half + 127) << 23);
  return (e.excess + 1.0f) * scale0 * scale1;
#endif
}

constexpr double kDoubleRounder = 0x1.8p52;  // as kRounder

// e^r - 1 for |r| <= log(2) / 2, with the coefficients of fdlibm.
COOPFLOW_HD double exponential_excess(double r) {
  const double r2 = r * r;
  double p = 4.13813679705723846039e-8;
  p = multiply_add(p, r2, -1.65339022054652515390e-6);
  p = multiply_add(p, r2, 6.61375632143793436117e-5);
  p = multiply_add(p, r2, -2.77777777770155933842e-3);
  p = multiply_add(p, r2, 1.66666666666666019037e-1);
  const double c = multiply_add(-r2, p, r);
  return r + r * c / (2.0 - c);
}

COOPFLOW_HD ScaledExponential<double> scaled_exponential(double t) {
  const double shifted = multiply_add(t, 1.4426950408889634, kDoubleRounder);
  const double n = shifted - kDoubleRounder;
  const double r = multiply_add(n, -6.93145751953125e-1, t);
  return {exponential_excess(multiply_add(n, -1.42860682030941723212e-6, r)), shifted};
}

// 2^n for the n in the low bits of shifted, where that is normal.
COOPFLOW_HD double power_of_two(double shifted) {
  return bits_double((double_bits(shifted) << 52) + double_bits(1.0));
}

// (1 + excess) * 2^n, in two factors, since n can leave the exponent range of either one alone.
COOPFLOW_HD double scaled(const ScaledExponential<double>& e) {
  const double half = multiply_add(e.shifted - kDoubleRounder, 0.5, kDoubleRounder);
  const double rest = e.shifted - half + kDoubleRounder;
  return (e.excess + 1.0) * power_of_two(half) * power_of_two(rest);
}

// exp x for every x.
COOPFLOW_HD double exponential(double x) {
#if COOPFLOW_DEVICE_CODE
  return exp(x);
#else
  return scaled(scaled_exponential(clamp_keep_nan(x, -746.0, 710.0)));
#endif
}

// exp x for x <= 88; below -87 anything up to exp(-87).
COOPFLOW_HD float exponential_normal(float x) {
#if COOPFLOW_DEVICE_CODE
  return expf(x);
#else
  if (COOPFLOW_EMULATED_DEVICE && is_special(x, std::exp(x))) return std::exp(x);
  const ScaledExponential<float> e = scaled_exponential(x < -87.0f ? -87.0f : x);
  return bits_float(float_bits(e.excess + 1.0f) + (float_bits(e.shifted) << 23));
#endif
}

COOPFLOW_HD double exponential_normal(double x) { return exponential(x); }

// 2^n of a ScaledExponential, where that is normal.
COOPFLOW_HD float power_of_two(const ScaledExponential<float>& e) {
  return bits_float(float_bits(1.0f) + (float_bits(e.shifted) << 23));
}

// exp x for x <= 0 and NaN, which stays NaN; below -87 anything up to exp(-87).
COOPFLOW_HD float exponential_nonpositive(float x) {
#if COOPFLOW_DEVICE_CODE
  return expf(x);
#else
  if (COOPFLOW_EMULATED_DEVICE && is_special(x, std::exp(x))) return std::exp(x);
  const ScaledExponential<float> e = scaled_exponential(x < -87.0f ? -87.0f : x);
  const float scale = power_of_two(e);
  return multiply_add(e.excess, scale, scale);
#endif
}

COOPFLOW_HD double exponential_nonpositive(double x) { return exponential(x); }

// exp(x) - 1 for x <= 0 and NaN, accurate near 0 too.
COOPFLOW_HD float exponential_minus_one(float x) {
#if COOPFLOW_DEVICE_CODE
  return expm1f(x);
#else
  const ScaledExponential<float> e = scaled_exponential(x < -87.0f ? -87.0f : x);
  const float scale = power_of_two(e);
  return multiply_add(e.excess, scale, scale - 1.0f);
#endif
}

COOPFLOW_HD double exponential_minus_one(double x) {
#if COOPFLOW_DEVICE_CODE
  return expm1(x);
#else
  const ScaledExponential<double> e = scaled_exponential(x < -700.0 ? -700.0 : x);
  const double scale = power_of_two(e.shifted);
  return multiply_add(e.excess, scale, scale - 1.0);
#endif
}

// 2^x for x <= 0 and NaN; results below 2^kLeast come out as that (as 0 below 2^-126 on a GPU).
template <int kLeast = -125>
COOPFLOW_HD float exponential2_nonpositive(float x) {
#if COOPFLOW_DEVICE_CODE
  return approximate_exp2(x);
#else
  if (COOPFLOW_EMULATED_DEVICE && is_special(x, approximate_exp2(x))) return approximate_exp2(x);
  constexpr float kLowest = kLeast;
  const float t = x < kLowest ? kLowest : x;
  const float shifted = t + kRounder;
  const float f = t - (shifted - kRounder);
  float p = 1.535336188319500e-4f;
  p = multiply_add(p, f, 1.339887440266574e-3f);
  p = multiply_add(p, f, 9.618437357674640e-3f);
  p = multiply_add(p, f, 5.550332471162809e-2f);
  p = multiply_add(p, f, 2.402264791363012e-1f);
  p = multiply_add(p, f, 6.931472028550421e-1f);
  // The polynomial is normal and so is the result: the exponent can be added to the bits.
  return bits_float(float_bits(multiply_add(p, f, 1.0f)) + (float_bits(shifted) << 23));
#endif
}

template <int kLeast = -125>
COOPFLOW_HD double exponential2_nonpositive(double x) {
#if COOPFLOW_DEVICE_CODE
  return exp2(x);
#else
  const double t = x < -1080.0 ? -1080.0 : x;
  const double shifted = t + kDoubleRounder;
  const double f = t - (shifted - kDoubleRounder);
  return scaled(ScaledExponential<double>{exponential_excess(f * 0.69314718055994530942), shifted});
#endif
}

COOPFLOW_HD float reciprocal(float x) {
#if COOPFLOW_DEVICE_CODE
  return approximate_reciprocal(x);
#else
  if (COOPFLOW_EMULATED_DEVICE && is_special(x, approximate_reciprocal(x)))
    return approximate_reciprocal(x);
  return 1.0f / x;
#endif
}

COOPFLOW_HD double reciprocal(double x) { return 1.0 / x; }

// sigma(t) and 1 - sigma(t), neither of them formed from the other; e = exp(-|t|) and r = 1/(1+e).
template <typename A>
struct Sigmoid {
  A below, above, e, r;
};

template <typename A>
COOPFLOW_HD Sigmoid<A> sigmoid(A t) {
  const A e = exponential_nonpositive(-absolute(t));
  const A r = reciprocal(A(1) + e);
  const A small = e * r;
  return {t < A(0) ? small : r, t < A(0) ? r : small, e, r};
}

// Sine and cosine of quadrant * pi / 2 + r for |r| <= pi / 4; of the quadrant the low two bits
// count.
COOPFLOW_HD void sincos_quadrant(uint32_t quadrant, float r, float* sine, float* cosine) {
  const float r2 = r * r;
  float s = multiply_add(-1.9515295891e-4f, r2, 8.3321608736e-3f);
  s = multiply_add(s, r2, -1.6666654611e-1f);
  s = multiply_add(s * r2, r, r);
  float c = multiply_add(2.443315711809948e-5f, r2, -1.388731625493765e-3f);
  c = multiply_add(c, r2, 4.166664568298827e-2f);
  c = multiply_add(c * r2, r2, multiply_add(-0.5f, r2, 1.0f));
  const bool odd = (quadrant & 1u) != 0u;
  const uint32_t sine_sign = (quadrant & 2u) << 30;
  const uint32_t cosine_sign = ((quadrant + 1u) & 2u) << 30;
  *sine = bits_float(float_bits(odd ? c : s) ^ sine_sign);
  *cosine = bits_float(float_bits(odd ? s : c) ^ cosine_sign);
}

// Sine and cosine of 2 * pi * turns * 2^-32. The quadrant is taken from the integer, so the range
// reduction is exact.
COOPFLOW_HD void sincos_turns(uint32_t turns, float* sine, float* cosine) {
  const uint32_t quadrant = (turns + 0x20000000u) >> 30;
  const float r = static_cast<float>(static_cast<int32_t>(turns - (quadrant << 30))) *
                  1.46291807926715968e-9f;  // 2 * pi * 2^-32
  sincos_quadrant(quadrant, r, sine, cosine);
}

COOPFLOW_HD void sincos_quadrant(uint64_t quadrant, double r, double* sine, double* cosine) {
  const double r2 = r * r;
  double s = multiply_add(1.58962301576546568060e-10, r2, -2.50507477628578072866e-8);
  s = multiply_add(s, r2, 2.75573136213857245213e-6);
  s = multiply_add(s, r2, -1.98412698295895385996e-4);
  s = multiply_add(s, r2, 8.33333333332211858878e-3);
  s = multiply_add(s, r2, -1.66666666666666307295e-1);
  s = multiply_add(s * r2, r, r);
  double c = multiply_add(-1.13585365213876817300e-11, r2, 2.08757008419747316778e-9);
  c = multiply_add(c, r2, -2.75573141792967388112e-7);
  c = multiply_add(c, r2, 2.48015872888517045348e-5);
  c = multiply_add(c, r2, -1.38888888888730564116e-3);
  c = multiply_add(c, r2, 4.16666666666665929218e-2);
  c = multiply_add(c * r2, r2, multiply_add(-0.5, r2, 1.0));
  const bool odd = (quadrant & 1) != 0;
  const uint64_t sine_sign = (quadrant & 2) << 62;
  const uint64_t cosine_sign = ((quadrant + 1) & 2) << 62;
  *sine = bits_double(double_bits(odd ? c : s) ^ sine_sign);
  *cosine = bits_double(double_bits(odd ? s : c) ^ cosine_sign);
}

COOPFLOW_HD void sincos_turns(uint32_t turns, double* sine, double* cosine) {
#if COOPFLOW_DEVICE_CODE
  sincospi(static_cast<double>(turns) * 0x1p-31, sine, cosine);
#else
  const uint32_t quadrant = (turns + 0x20000000u) >> 30;
  const double r = static_cast<double>(static_cast<int32_t>(turns - (quadrant << 30))) *
                   1.46291807926715968105e-9;  // 2 * pi * 2^-32
  sincos_quadrant(uint64_t{quadrant}, r, sine, cosine);
#endif
}

// Sine and cosine of 2 * pi * x, whose whole turns are taken off exactly; NaN where x is not
// finite.
COOPFLOW_HD void sincos_2pi(float x, float* sine, float* cosine) {
#if COOPFLOW_DEVICE_CODE
  sincospif(2.0f * x, sine, cosine);
#else
  const float turn = x - std::nearbyint(x);
  const float shifted = multiply_add(turn, 4.0f, kRounder);
  const float rest = multiply_add(shifted - kRounder, -0.25f, turn);
  sincos_quadrant(float_bits(shifted), rest * 6.28318531f, sine, cosine);
#endif
}

COOPFLOW_HD void sincos_2pi(double x, double* sine, double* cosine) {
#if COOPFLOW_DEVICE_CODE
  sincospi(2.0 * x, sine, cosine);
#else
  const double turn = x - std::nearbyint(x);
  const double shifted = multiply_add(turn, 4.0, kDoubleRounder);
  const double rest = multiply_add(shifted - kDoubleRounder, -0.25, turn);
  sincos_quadrant(double_bits(shifted), rest * 6.28318530717958647693, sine, cosine);
#endif
}

}  // namespace coopflow
