// Between tensors [R, V] of any dtype and tiles of transposed logits [m, c]. Compiled once for each instruction set, as
// part of rows.cpp.
#pragma once

#include "narrow.h"
#include "rows.h"

namespace {

using namespace dft;

// Both ways go through blocks of 16 x 16 numbers, so that either side is accessed in whole cache lines. See Kernels in
// rows.h for the arguments.
template <class T, class In, class F>
DFT_INLINE void load_as(T* out, int64_t m, int64_t c, const In* in, int64_t rows, int64_t stride, int64_t v, F widen) {
  constexpr int64_t kBlock = 16;
  for (int64_t r0 = 0; r0 < c; r0 += kBlock)
    for (int64_t i0 = 0; i0 < m; i0 += kBlock) {
      int64_t n = m - i0 < kBlock ? m - i0 : kBlock;
      T block[kBlock][kBlock] = {};
      for (int64_t r = 0; r < kBlock && r0 + r < rows; r++)
        for (int64_t i = 0; i < n; i++) block[i][r] = T(widen(in[(r0 + r) * stride + v + i0 + i]));
      for (int64_t i = 0; i < n; i++) std::memcpy(out + (i0 + i) * c + r0, block[i], sizeof block[i]);
    }
}

template <class T>
void load(T* out, int64_t m, int64_t c, const void* in, Element element, int64_t rows, int64_t stride, int64_t v) {
  switch (element) {
    case Element::f32:
      return load_as(out, m, c, static_cast<const float*>(in), rows, stride, v, [](float x) { return x; });
    case Element::f64:
      return load_as(out, m, c, static_cast<const double*>(in), rows, stride, v, [](double x) { return x; });
    case Element::bf16:
      return load_as(out, m, c, static_cast<const uint16_t*>(in), rows, stride, v,
                     [](uint16_t x) { return from_bf16(x); });
    case Element::f16:
      return load_as(out, m, c, static_cast<const uint16_t*>(in), rows, stride, v,
                     [](uint16_t x) { return from_f16(x); });
  }
}

template <class T, class Out, class F>
DFT_INLINE void save_as(const T* in, int64_t m, int64_t c, Out* out, int64_t rows, int64_t stride, int64_t v,
                        F narrow) {
  constexpr int64_t kBlock = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += kBlock)
    for (int64_t i0 = 0; i0 < m; i0 += kBlock) {
      int64_t n = m - i0 < kBlock ? m - i0 : kBlock;
      Out block[kBlock][kBlock];
      for (int64_t i = 0; i < n; i++)
        for (int64_t r = 0; r < kBlock; r++) block[r][i] = narrow(in[(i0 + i) * c + r0 + r]);
      for (int64_t r = 0; r < kBlock && r0 + r < rows; r++)
        std::memcpy(out + (r0 + r) * stride + v + i0, block[r], n * sizeof(Out));
    }
}

template <class T>
void save(const T* in, int64_t m, int64_t c, void* out, Element element, int64_t rows, int64_t stride, int64_t v) {
  switch (element) {
    case Element::f32:
      return save_as(in, m, c, static_cast<float*>(out), rows, stride, v, [](T x) { return float(x); });
    case Element::f64:
      return save_as(in, m, c, static_cast<double*>(out), rows, stride, v, [](T x) { return double(x); });
    case Element::bf16:
      return save_as(in, m, c, static_cast<uint16_t*>(out), rows, stride, v, [](T x) { return to_bf16(float(x)); });
    case Element::f16:
      return save_as(in, m, c, static_cast<uint16_t*>(out), rows, stride, v, [](T x) { return to_f16(float(x)); });
  }
}

}  // namespace
