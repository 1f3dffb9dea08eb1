// SIMD vectors and the functions that the row kernels need of them (M of common/divergence.h), on GCC/Clang vector
// extensions: one source for AVX-512, AVX2, SSE2 and NEON, the width being chosen by the compiler's flags. Everything
// is in an unnamed namespace: each translation unit has its own copy, and no linker can mix instruction sets.
//
// Accuracy over the arguments that occur (tests/backends/test_native.py measures it): exp, expm1, log1p, tanh within 3
// ulp in float; in double they are the C library's, lane by lane. exp flushes results below 2.4e-38 to zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

#define DFT_INLINE [[gnu::always_inline]] static inline

template <class T>
struct Lanes;

template <class T, class Integer>
struct Common {
  typedef T N __attribute__((vector_size(kBytes)));
  typedef Integer I __attribute__((vector_size(kBytes)));
  using Scalar = T;
  using Int = Integer;
  static constexpr int size = kBytes / sizeof(T);

  DFT_INLINE N set(T x) { return x - N{}; }
  DFT_INLINE I set_int(Integer x) { return x - I{}; }
  DFT_INLINE N load(const T* p) {
    N x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  DFT_INLINE I load_int(const Integer* p) {
    I x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  DFT_INLINE void store(T* p, N x) { std::memcpy(p, &x, sizeof x); }
  DFT_INLINE void store_int(Integer* p, I x) { std::memcpy(p, &x, sizeof x); }
  DFT_INLINE N select(I condition, N a, N b) { return condition ? a : b; }
  DFT_INLINE N max(N a, N b) { return a > b ? a : b; }
  DFT_INLINE T sum(N x) {
    T of[4] = {};  // four independent chains of additions
    for (int l = 0; l < size; l++) of[l % 4] += x[l];
    return (of[0] + of[1]) + (of[2] + of[3]);
  }
  // f of every lane
  template <class F>
  DFT_INLINE N map(N x, F f) {
    for (int l = 0; l < size; l++) x[l] = f(x[l]);
    return x;
  }
};

template <>
struct Lanes<float> : Common<float, int32_t> {
  DFT_INLINE N abs(N x) { return (N)((I)x & 0x7fffffff); }

  // x = n ln 2 + r with |r| <= ln 2 / 2; returns n + kMagic, whose low bits are those of the integer n: the sum
  // rounds on every instruction set, and its bits shifted left by 23 are what multiplies a float by 2^n.
  static constexpr float kMagic = 12582912.0f;  // 1.5 2^23
  DFT_INLINE N reduce(N x, N& r) {
    N shifted = x * 1.44269504f + kMagic, n = shifted - kMagic;
    r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    return shifted;
  }
  // e^r = 1 + r + r^2 p(r); p by a weighted minimax fit, relative error 3e-9
  DFT_INLINE N p(N r) {
    N y = r * 1.3813143e-3f + 8.3694188e-3f;
    y = y * r + 4.1668456e-2f;
    y = y * r + 1.66665152e-1f;
    return y * r + 4.9999994e-1f;
  }

  DFT_INLINE N exp(N x) {  // x <= 88
    N r, shifted = reduce(x, r);
    N y = (p(r) * r + 1.0f) * r + 1.0f;
    return x < -86.6f ? set(0.0f) : (N)((I)y + ((I)shifted << 23));
  }
  DFT_INLINE N exp_any(N x) {
    N half = 0.5f * (x < -200.0f ? set(-200.0f) : x);
    N y = exp(half > 88.0f ? set(88.0f) : half);
    return x == x ? y * y : x;
  }
  DFT_INLINE N expm1(N x) {  // x <= 88
    N r, shifted = reduce(x < -86.6f ? set(-86.6f) : x, r);
    N scale = (N)(((I)shifted << 23) + 0x3f800000);
    return (p(r) * (r * r) + r) * scale + (scale - 1.0f);
  }
  // log(1 + x) of finite x >= -1 (-88 at -1), and x - log(1 + x), which does not cancel near 0
  DFT_INLINE N log1p(N x, N& excess) {
    I e = ((I)(1.0f + x) - 0x3f3504f3) >> 23;  // 1 + x = 2^e (1 + f) with f from sqrt(1/2) - 1 to sqrt(2) - 1
    N scale = (N)(0x3f800000 - (e << 23));
    N f = scale * x + (scale - 1.0f);  // free of the rounding error of 1 + x
    N q = f * -7.8614399e-2f + 1.29026458e-1f;
    q = q * f - 1.31371707e-1f;
    q = q * f + 1.41787261e-1f;
    q = q * f - 1.66235298e-1f;
    q = q * f + 2.00023696e-1f;
    q = q * f - 2.50008374e-1f;
    q = q * f + 3.33333164e-1f;
    N n = __builtin_convertvector(e, N);
    N below = (0.5f - q * f) * (f * f);  // f - log(1 + f)
    N y = ((n * -2.12194440e-4f - below) + f) + n * 0.693359375f;
    excess = e == 0 ? below : x - y;
    return y;
  }
  DFT_INLINE N log1p(N x) {
    N excess;
    return log1p(x, excess);
  }
  DFT_INLINE N tanh(N x) {
    N a = abs(x);
    N e = expm1(2.0f * (a > 10.0f ? set(10.0f) : a));
    N y = e / (e + 2.0f);
    return x < 0 ? -y : y;
  }
};

template <>
struct Lanes<double> : Common<double, int64_t> {
  DFT_INLINE N abs(N x) { return x < 0 ? -x : x; }
  DFT_INLINE N exp(N x) {
    return map(x, [](double v) { return std::exp(v); });
  }
  DFT_INLINE N exp_any(N x) { return exp(x); }
  DFT_INLINE N expm1(N x) {
    return map(x, [](double v) { return std::expm1(v); });
  }
  DFT_INLINE N log1p(N x) {
    return map(x, [](double v) { return std::log1p(v); });
  }
  DFT_INLINE N log1p(N x, N& excess) {
    N y = log1p(x);
    excess = x - y;
    return y;
  }
  DFT_INLINE N tanh(N x) {
    return map(x, [](double v) { return std::tanh(v); });
  }
};

}  // namespace
