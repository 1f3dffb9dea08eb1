// Sweeps over a row of next-token scores z [n] as it stands in memory, one token a SIMD lane. -inf: a token left out.
// Compiled once for each instruction set, as part of rows.cpp.
#pragma once

#include <limits>

#include "lanes.h"

namespace {

using namespace dft;

// f(i, x) of every vector x of z [n], from i on; beyond n it is -inf
template <class T, class F>
DFT_INLINE void over(const T* z, int64_t n, F f) {
  using M = Lanes<T>;
  int64_t i = 0;
  for (; i + M::size <= n; i += M::size) f(i, M::load(z + i));
  if (i == n) return;
  T rest[M::size];
  for (int l = 0; l < M::size; l++) rest[l] = i + l < n ? z[i + l] : -std::numeric_limits<T>::infinity();
  f(i, M::load(rest));
}

// out [n] = f(x) of every vector x of z, which may be out
template <class T, class F>
DFT_INLINE void map_row(const T* z, T* out, int64_t n, F f) {
  using M = Lanes<T>;
  over(z, n, [&](int64_t i, typename M::N x) {
    typename M::N y = f(i, x);
    if (i + M::size <= n) return M::store(out + i, y);
    for (int64_t l = i; l < n; l++) out[l] = y[l - i];
  });
}

// sums [count] += what f(x, part) adds to part [count], over the vectors x of z
template <int count, class T, class F>
DFT_INLINE void sum_row(const T* z, int64_t n, double* sums, F f) {
  using M = Lanes<T>;
  double lanes[count][M::size] = {};
  for (int64_t first = 0; first < n; first += kRun * M::size) {
    typename M::N part[count] = {};
    over(z + first, n - first < kRun * M::size ? n - first : kRun * M::size,
         [&](int64_t, typename M::N x) { f(x, part); });
    for (int k = 0; k < count; k++) add<T>(lanes[k], part[k]);
  }
  for (int k = 0; k < count; k++)
    for (int l = 0; l < M::size; l++) sums[k] += lanes[k][l];
}

template <class T>
T largest(const T* z, int64_t n) {
  using M = Lanes<T>;
  typename M::N top = M::set(-std::numeric_limits<T>::infinity());
  over(z, n, [&](int64_t, typename M::N x) { top = M::max(x, top); });
  T out = top[0];
  for (int l = 1; l < M::size; l++) out = top[l] > out ? top[l] : out;
  return out;
}

template <class T>
void shifted(const T* z, const T* shift, T* out, int64_t n) {
  using M = Lanes<T>;
  int64_t i = 0;
  for (; i + M::size <= n; i += M::size) M::store(out + i, M::load(z + i) + M::load(shift + i));
  for (; i < n; i++) out[i] = z[i] + shift[i];
}

template <class T>
void weighed(const T* z, int64_t n, const Tempered<T>& at, double* sums) {
  using M = Lanes<T>;
  sum_row<3>(z, n, sums, [&](typename M::N x, typename M::N* part) {
    x = x - at.top;
    typename M::N w = M::exp(x * at.inverse);
    w = x < at.least ? M::set(T(0)) : w;
    x = x < kBelow ? M::set(T(kBelow)) : x;  // 0 times -inf
    part[0] = part[0] + w;
    w = w * x;
    part[1] = part[1] + w;
    part[2] = part[2] + w * x;
  });
}

template <class T>
void moments_of(const T* z, int64_t n, T top, double* sums) {
  using M = Lanes<T>;
  sum_row<3>(z, n, sums, [&](typename M::N x, typename M::N* part) {
    x = x - top;
    const typename M::I left = x == -std::numeric_limits<T>::infinity();
    part[0] = part[0] + (left ? M::set(T(0)) : M::set(T(1)));
    x = left ? M::set(T(0)) : x;
    part[1] = part[1] + x;
    part[2] = part[2] + x * x;
  });
}

template <class T>
void normalised(const T* z, T* out, int64_t n, const Tempered<T>& at, T log_sum) {
  using M = Lanes<T>;
  map_row(z, out, n, [&](int64_t, typename M::N x) {
    x = x - at.top;
    return x < at.least ? M::set(-std::numeric_limits<T>::infinity()) : x * at.inverse - log_sum;
  });
}

}  // namespace
