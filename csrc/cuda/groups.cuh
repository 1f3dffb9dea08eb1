// A thread's group of neighbouring numbers of a row [V]: 8 in fp32 arithmetic, so that 16-bit numbers are one 16-byte
// load and fp32 numbers two, and 2 in fp64. Loads, stores, and the finishing of raw logits. Internal to each
// translation unit that includes it.
#pragma once

#include "gpu.h"
#include "rows.h"

namespace dft::cuda {
namespace {

// Numbers a group
template <class T>
constexpr int kGroup = sizeof(T) == 4 ? 8 : 2;

struct alignas(16) Sixteen {
  uint32_t word[4];
};

// x = the n numbers of a row from column `at` on, converted to T; the others are 0. One 16-byte load for each 16 bytes
// where the address is aligned and n is a whole group.
template <class T>
__device__ __forceinline__ void load(T (&x)[kGroup<T>], const Matrix& from, int64_t row, int64_t at, int n) {
  const int64_t offset = row * from.stride + at;
  if (from.element == Element::bf16 || from.element == Element::f16) {
    const uint16_t* data = static_cast<const uint16_t*>(from.data) + offset;
    uint16_t raw[kGroup<T>] = {};
    if (kGroup<T> == 8 && n == 8 && reinterpret_cast<uintptr_t>(data) % 16 == 0) {
      const Sixteen all = *reinterpret_cast<const Sixteen*>(data);
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++) raw[i] = uint16_t(all.word[i / 2] >> (i % 2 * 16));
    } else {
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++)
        if (i < n) raw[i] = data[i];
    }
    if (from.element == Element::bf16) {
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++) x[i] = T(from_bf16(raw[i]));
    } else {
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++) x[i] = T(from_f16(raw[i]));
    }
  } else if (from.element == Element::f32) {
    const float* data = static_cast<const float*>(from.data) + offset;
    if (kGroup<T> == 8 && n == 8 && reinterpret_cast<uintptr_t>(data) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kGroup<T>; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(data + i);
        x[i] = T(four.x), x[i + 1] = T(four.y), x[(i + 2) % kGroup<T>] = T(four.z), x[(i + 3) % kGroup<T>] = T(four.w);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++) x[i] = i < n ? T(data[i]) : T(0);
    }
  } else {
    const double* data = static_cast<const double*>(from.data) + offset;
#pragma unroll
    for (int i = 0; i < kGroup<T>; i++) x[i] = i < n ? T(data[i]) : T(0);
  }
}

// The n numbers of x to a row from column `at` on, rounded to nearest even; 16-byte stores under the same conditions
template <class T>
__device__ __forceinline__ void store(const T (&x)[kGroup<T>], const Matrix& to, int64_t row, int64_t at, int n) {
  const int64_t offset = row * to.stride + at;
  void* base = const_cast<void*>(to.data);
  if (to.element == Element::bf16 || to.element == Element::f16) {
    uint16_t* data = static_cast<uint16_t*>(base) + offset;
    uint16_t raw[kGroup<T>];
#pragma unroll
    for (int i = 0; i < kGroup<T>; i++)
      raw[i] = to.element == Element::bf16 ? to_bf16(float(x[i])) : to_f16(float(x[i]));
    if (kGroup<T> == 8 && n == 8 && reinterpret_cast<uintptr_t>(data) % 16 == 0) {
      Sixteen all = {};
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++) all.word[i / 2] |= uint32_t(raw[i]) << (i % 2 * 16);
      *reinterpret_cast<Sixteen*>(data) = all;
    } else {
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++)
        if (i < n) data[i] = raw[i];
    }
  } else if (to.element == Element::f32) {
    float* data = static_cast<float*>(base) + offset;
    if (kGroup<T> == 8 && n == 8 && reinterpret_cast<uintptr_t>(data) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kGroup<T>; i += 4)
        *reinterpret_cast<float4*>(data + i) =
            float4{float(x[i]), float(x[i + 1]), float(x[(i + 2) % kGroup<T>]), float(x[(i + 3) % kGroup<T>])};
    } else {
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++)
        if (i < n) data[i] = float(x[i]);
    }
  } else {
    double* data = static_cast<double*>(base) + offset;
#pragma unroll
    for (int i = 0; i < kGroup<T>; i++)
      if (i < n) data[i] = double(x[i]);
  }
}

// z = cap tanh(scale raw / cap); cap 0: no softcap
template <class T>
__device__ __forceinline__ T finished(T raw, T scale, T cap) {
  const T z = raw * scale;
  return cap == T(0) ? z : cap * Math<T>::tanh(z * (T(1) / cap));
}

// A group of logits, scaled and softcapped; -inf beyond the first n
template <class T>
__device__ __forceinline__ void read(T (&z)[kGroup<T>], const Matrix& from, const Finish& finish, int64_t row,
                                     int64_t at, int n) {
  load(z, from, row, at, n);
  const T scale = T(finish.scale), cap = T(finish.cap);
#pragma unroll
  for (int i = 0; i < kGroup<T>; i++) z[i] = i < n ? finished(z[i], scale, cap) : -T(INFINITY);
}

// How many numbers of the group at column `at` are columns below `vocab`
template <class T>
__device__ __forceinline__ int inside(int64_t at, int64_t vocab) {
  return at >= vocab ? 0 : vocab - at < kGroup<T> ? int(vocab - at) : kGroup<T>;
}

}  // namespace
}  // namespace dft::cuda
