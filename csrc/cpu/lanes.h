// What the sweeps over tiles of logits [m, c] share: sums in double, log-probabilities, potentials. Compiled once for
// each instruction set, as part of rows.cpp.
#pragma once

#include "rows.h"
#include "simd.h"

namespace {

using namespace dft;

// Sums over vocabulary entries are accumulated in T for this many of them, then in double: the rounding error stays
// near one ulp.
constexpr int64_t kRun = 8;

// Sums over a tile's rows are accumulated for this many tokens at a time, so that logits are read in runs of cache
// lines.
constexpr int64_t kSpan = 1024;

// to [M::size] += x
template <class T>
DFT_INLINE void add(double* to, typename Lanes<T>::N x) {
  for (int l = 0; l < Lanes<T>::size; l++) to[l] += double(x[l]);
}

// to [n] += from [n]
template <class T>
DFT_INLINE void add(double* to, const T* from, int64_t n) {
  for (int64_t l = 0; l < n; l++) to[l] += double(from[l]);
}

// log q = (z / T - lse) - low of the tokens from `first` on
template <class T>
DFT_INLINE typename Lanes<T>::N log_of(typename Lanes<T>::N z, T inverse, const LogSumExp<T>& at, int64_t first) {
  using M = Lanes<T>;
  return (z * inverse - M::load(at.lse + first)) - M::load(at.low + first);
}

// cap tanh(scale (z + bias) / cap) in row i of a tile, see Finish in rows.h
template <class T>
DFT_INLINE typename Lanes<T>::N finished(typename Lanes<T>::N z, const Finish<T>& finish, int64_t i) {
  if (finish.bias) z = z + finish.bias[i];
  z = z * finish.scale;
  if (finish.cap != T(0)) z = finish.cap * Lanes<T>::tanh(z / finish.cap);
  return z;
}

// G[group of the token, i] for the tokens from `first` on; table [m, groups]
template <class T>
DFT_INLINE typename Lanes<T>::N potential(const T* table, const int64_t* group, int64_t groups, int64_t i,
                                          int64_t first) {
  using M = Lanes<T>;
  if (!group) return M::set(table[i * groups]);
  typename M::N out;
  for (int l = 0; l < M::size; l++) out[l] = table[i * groups + group[first + l]];
  return out;
}

}  // namespace
