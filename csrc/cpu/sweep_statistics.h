// Sweep 2 over a tile of logits [m, c], with the log-sum-exps known: divergences, entropy, potentials, column sums and
// features. Compiled once for each instruction set, as part of rows.cpp.
#pragma once

#include "common/divergence.h"
#include "lanes.h"
#include "narrow.h"

namespace {

using namespace dft;

// value [c] += sum_v f, slope [c] += sum_v g, see Divergence in rows.h
template <class T, template <class> class D>
void divergence(const Tile<T>& tile, const Divergence<T>& at) {
  using M = Lanes<T>;
  using N = typename M::N;
  alignas(64) T value[kSpan], slope[kSpan];
  for (int64_t start = 0; start < tile.c; start += kSpan) {
    const int64_t n = tile.c - start < kSpan ? tile.c - start : kSpan;
    for (int64_t run = 0; run < tile.m; run += kRun) {
      for (int64_t l = 0; l < n; l++) value[l] = slope[l] = T(0);
      for (int64_t i = run; i < run + kRun && i < tile.m; i++) {
        const T *z = tile.z + i * tile.c + start, *t = at.target + i * tile.c + start;
        for (int64_t l = 0; l < n; l += M::size) {
          N lq = log_of(M::load(z + l), at.inverse, at.model_lse, start + l);
          N lp = log_of(M::load(t + l), at.target_inverse, at.target_lse, start + l);
          N f, g;
          if constexpr (requires { D<M>::sums(lp, lq, at.parameter, f, g); })
            D<M>::sums(lp, lq, at.parameter, f, g);
          else
            D<M>::eval(lp, lq, M::exp(lq), at.parameter, f, g);
          M::store(value + l, M::load(value + l) + f);
          M::store(slope + l, M::load(slope + l) + g);
        }
      }
      add(at.value + start, value, n);
      add(at.slope + start, slope, n);
    }
  }
}

// mean [c] += sum z, entropy [c] += -sum q log q, potential [c] += <q, G>, columns [groups, m] += sum weight q; see
// Moments in rows.h
template <class T>
void moments(const Tile<T>& tile, const Moments<T>& at) {
  using M = Lanes<T>;
  using N = typename M::N;
  const bool summed = at.columns && !at.group;
  N shares[kRun];  // of one group: sums over the tokens of a span, lane by lane
  for (int64_t start = 0; start < tile.c; start += kSpan) {
    const int64_t end = tile.c - start < kSpan ? tile.c : start + kSpan;
    for (int64_t run = 0; run < tile.m; run += kRun) {
      const int64_t last = tile.m - run < kRun ? tile.m : run + kRun;
      for (auto& share : shares) share = M::set(T(0));
      for (int64_t first = start; first < end; first += M::size) {
        N weight = at.columns ? M::load(at.weight + first) : M::set(T(0));
        N mean = M::set(T(0)), entropy = mean, pulled = mean;
        for (int64_t i = run; i < last; i++) {
          N z = M::load(tile.z + i * tile.c + first), lq = log_of(z, T(1), at.lse, first), q = M::exp(lq);
          mean = mean + z;
          entropy = entropy - (q > T(0) ? q * lq : M::set(T(0)));
          if (at.potential) pulled = pulled + q * potential(at.table, at.group, at.groups, i, first);
          if (at.columns) {
            N share = weight != T(0) ? weight * q : M::set(T(0));
            if (summed)
              shares[i - run] = shares[i - run] + share;
            else
              for (int l = 0; l < M::size; l++) at.columns[at.group[first + l] * at.columns_stride + i] += share[l];
          }
        }
        if (at.mean) add<T>(at.mean + first, mean);
        if (at.entropy) add<T>(at.entropy + first, entropy);
        if (at.potential) add<T>(at.potential + first, pulled);
      }
      if (summed)
        for (int64_t i = run; i < last; i++) at.columns[i] += double(M::sum(shares[i - run]));
    }
  }
}

// out [R, K] = <q, phi_k>, see Features in rows.h
template <class T>
void features(const Features<T>& at, int64_t first, int64_t rows) {
  using M = Lanes<T>;
  alignas(64) T wide[kLanes];
  for (int64_t i = 0; i < at.k * kLanes; i++) at.sum[i] = 0.0;
  for (int64_t n = 0; n < at.count; n++) {
    const int64_t v = at.filled[n];
    const T* z = wide;
    if (at.held.narrow())
      widen(at.held, v, 1, first, kLanes, wide);
    else
      z = static_cast<const T*>(at.held.z) + v * at.held.c + first;
    for (int64_t l = 0; l < kLanes; l += M::size) {
      typename M::N q = M::exp(log_of(M::load(z + l), T(1), at.lse, first + l));
      for (int64_t e = at.row_start[v]; e < at.row_start[v + 1]; e++)
        add<T>(at.sum + at.column[e] * kLanes + l, q * at.entry[e]);
    }
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < at.k; j++) at.out[(first + r) * at.k + j] = T(at.sum[j * kLanes + r]);
}

}  // namespace
