// The arithmetic M of common/divergence.h on single numbers: the C library's in fp64, in fp32 made of the hardware's
// 2^x, log2 x and 1/x, without branches. Includes no header of CUDA.
#pragma once

#include <cmath>

#include "common/divergence.h"

namespace dft::cuda {

template <class T>
struct Math {
  using N = T;
  using Scalar = T;
  DFT_FN T set(T x) { return x; }
  DFT_FN T exp(T x) { return std::exp(x); }
  DFT_FN T exp_any(T x) { return std::exp(x); }
  DFT_FN T expm1(T x) { return std::expm1(x); }
  DFT_FN T log1p(T x) { return std::log1p(x); }
  DFT_FN T tanh(T x) { return std::tanh(x); }
  DFT_FN T abs(T x) { return std::fabs(x); }
  DFT_FN T max(T a, T b) { return a > b ? a : b; }
  DFT_FN T select(bool condition, T a, T b) { return condition ? a : b; }
};

// Errors relative to the result, in units of 2^-24, with the hardware's (2^x: 2.8 of these units; log2 x: 4 of them
// outside of 1/2..2, and 2^-22 absolute within; 1/x: 2):
//
//     exp      3 and what rounding x log2 e adds, |x| of these units; below 2^-126: 0
//     expm1    8 for x < 1: a polynomial for |x| < 1/2; beyond as exp
//     log1p    7: 2 atanh(x / (2 + x)) as a series for |x| < 1/2
//     tanh     11
template <>
struct Math<float> {
  using N = float;
  using Scalar = float;
  static constexpr float kLog2E = 1.44269504f;

#ifdef __CUDA_ARCH__
  DFT_FN float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  DFT_FN float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  DFT_FN float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
#else
  DFT_FN float exp2(float x) { return std::exp2(x); }
  DFT_FN float log2(float x) { return std::log2(x); }
  DFT_FN float reciprocal(float x) { return 1.0f / x; }
#endif

  DFT_FN float set(float x) { return x; }
  DFT_FN float exp(float x) { return exp2(x * kLog2E); }
  DFT_FN float exp_any(float x) { return exp(x); }
  // x + x^2 P(x); P by a fit whose error is below 4e-9 of the result
  DFT_FN float expm1(float x) {
    float y = 0.000198498103f;
    y = y * x + 0.00139961766f;
    y = y * x + 0.00833357903f;
    y = y * x + 0.0416653586f;
    y = y * x + 0.16666664f;
    y = y * x + 0.500000039f;
    const float near = y * (x * x) + x;
    return std::fabs(x) < 0.5f ? near : exp(x) - 1.0f;
  }
  // with s = x / (2 + x): 2 s + s^3 Q(s^2); Q by a fit whose error is below 5e-9 of the result
  DFT_FN float log1p(float x) {
    const float s = x * reciprocal(2.0f + x), s2 = s * s;
    float y = 0.28024464f;
    y = y * s2 + 0.279991401f;
    y = y * s2 + 0.400216991f;
    y = y * s2 + 0.666664131f;
    const float near = (y * s2) * s + 2.0f * s;
    return std::fabs(x) < 0.5f ? near : log2(1.0f + x) * 0.693147181f;
  }
  // of |x|: -e / (2 + e) with e = expm1(-2 |x|)
  DFT_FN float tanh(float x) {
    const float e = expm1(-2.0f * std::fabs(x));
    return std::copysign(e * reciprocal(2.0f + e), x);
  }
  DFT_FN float abs(float x) { return std::fabs(x); }
  DFT_FN float max(float a, float b) { return a > b ? a : b; }
  DFT_FN float select(bool condition, float a, float b) { return condition ? a : b; }
};

}  // namespace dft::cuda
