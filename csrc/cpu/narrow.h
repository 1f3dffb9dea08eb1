// bf16 and fp16 to and from fp32, rounding to nearest even, in integer arithmetic that vectorises on every instruction
// set. Compiled once for each, as part of rows.cpp.
#pragma once

#include "lanes.h"
#include "rows.h"
#include "simd.h"

namespace {

using namespace dft;

DFT_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x == x ? uint16_t(rounded) : uint16_t(0x7fc0);
}

DFT_INLINE float from_bf16(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

DFT_INLINE float from_f16(uint16_t h) {  // exact: a multiplication rebiases the exponent, of subnormals too
  uint32_t bits = uint32_t(h & 0x7fffu) << 13;
  float x;
  std::memcpy(&x, &bits, 4);
  x *= 5.192296858534828e33f;  // 2^112
  uint32_t out;
  std::memcpy(&out, &x, 4);
  out |= (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  out |= uint32_t(h & 0x8000u) << 16;
  std::memcpy(&x, &out, 4);
  return x;
}

DFT_INLINE uint16_t to_f16(float x) {  // nearest even; overflow to inf
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000u, a = bits & 0x7fffffffu;
  float magnitude;
  std::memcpy(&magnitude, &a, 4);
  float shifted = magnitude + 0.5f;  // this rounds a subnormal to its 10 bits, the lowest ones of the sum
  uint32_t small;
  std::memcpy(&small, &shifted, 4);
  uint32_t normal = (a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13;
  uint32_t out = a < 0x38800000u ? small - 0x3f000000u : normal;
  out = a >= 0x477ff000u ? 0x7c00u : out;
  out = a > 0x7f800000u ? 0x7e00u : out;
  return uint16_t(sign | out);
}

DFT_INLINE void store_bf16(uint16_t* out, Lanes<float>::N x) {
  using M = Lanes<float>;
  typedef uint32_t U __attribute__((vector_size(kBytes)));
  typedef uint16_t H __attribute__((vector_size(kBytes / 2)));
  U bits = (U)x;
  U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  rounded = (U)(x == x ? (M::I)rounded : M::set_int(0x7fc0));
  H half = __builtin_convertvector(rounded, H);
  std::memcpy(out, &half, sizeof half);
}
DFT_INLINE void store_bf16(uint16_t*, Lanes<double>::N) {}  // never called: the gradient of fp64 logits is not rounded

// See Kernels in rows.h
template <class T>
void round(const T* in, const T* bias, int64_t m, int64_t n, void* out, Element element) {
  for (int64_t i = 0; i < m; i++) {
    const T* row = in + i * n;
    uint16_t* to = static_cast<uint16_t*>(out) + i * n;
    const T by = bias ? bias[i] : T(0);
    if (element == Element::bf16)
      for (int64_t l = 0; l < n; l++) to[l] = to_bf16(float(row[l] + by));
    else
      for (int64_t l = 0; l < n; l++) to[l] = to_f16(float(row[l] + by));
  }
}

template <class T>
void widen(const Held<T>& held, int64_t v, int64_t m, int64_t first, int64_t n, T* out) {
  using M = Lanes<T>;
  const bool finishes = held.finish.scale != T(1) || held.finish.cap != T(0);
  for (int64_t i = 0; i < m; i++) {
    const uint16_t* row = static_cast<const uint16_t*>(held.z) + (v + i) * held.c + first;
    T* to = out + i * n;
    if (held.element == Element::bf16)
      for (int64_t l = 0; l < n; l++) to[l] = T(from_bf16(row[l]));
    else
      for (int64_t l = 0; l < n; l++) to[l] = T(from_f16(row[l]));
    if (finishes)
      for (int64_t l = 0; l < n; l += M::size) M::store(to + l, finished(M::load(to + l), held.finish, i));
  }
}

}  // namespace
