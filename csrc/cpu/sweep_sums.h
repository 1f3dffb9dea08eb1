// Sweep 1 over a tile of logits [m, c]: finishing, maxima, and the sums of the online log-sum-exp (Milakov and
// Gimelshein, arXiv:1805.02867). Compiled once for each instruction set, as part of rows.cpp.
#pragma once

#include "lanes.h"

namespace {

using namespace dft;

// See Sums in rows.h. When a tile raises a token's maximum from m to m', its sums so far are rescaled:
//
//     sum exp((z - m') / T) = exp((m - m') / T) sum exp((z - m) / T)
//     sum exp(z - m') (z - m') = exp(m - m') (sum exp(z - m) (z - m) + (m - m') sum exp(z - m))
template <class T>
void sums(const Tile<T>& tile, const Finish<T>& finish, const Sums<T>& to) {
  using M = Lanes<T>;
  using N = typename M::N;
  using I = typename M::I;
  constexpr int kGroup = kLanes / M::size > 2 ? 2 : kLanes / M::size;  // vectors at a time
  const bool finishes = finish.bias || finish.scale != T(1) || finish.cap != T(0);
  for (int64_t first = 0; first < tile.c; first += kGroup * M::size) {
    N top[kGroup], best[kGroup];
    I arg[kGroup] = {};
    for (int g = 0; g < kGroup; g++) {
      top[g] = best[g] = M::load(to.max + first + g * M::size);
      if (to.arg) arg[g] = M::load_int(to.arg + first + g * M::size);
    }
    for (int64_t i = 0; i < tile.m; i++) {
      T* row = tile.z + i * tile.c + first;
      for (int g = 0; g < kGroup; g++) {
        N z = M::load(row + g * M::size);
        if (finishes) {
          z = finished(z, finish, i);
          M::store(row + g * M::size, z);
        }
        if (to.arg) arg[g] = z > top[g] ? M::set_int(typename M::Int(tile.v + i)) : arg[g];
        top[g] = M::max(z, top[g]);
      }
    }
    for (int k = 0; k < to.temperatures; k++) {
      double *spread = k ? nullptr : to.spread, *pulled = k ? nullptr : to.pulled;
      for (int g = 0; g < kGroup; g++) {
        const int64_t at = first + g * M::size;
        N shrink = M::exp((best[g] - top[g]) * to.inverse[k]);
        for (int l = 0; l < M::size; l++) {
          const double by = shrink[l];
          if (spread && by != 1) {
            const double old =
                by > 0 ? spread[at + l] + (double(best[g][l]) - double(top[g][l])) * to.sum[k][at + l] : 0;
            spread[at + l] = old * by;
          }
          if (pulled) pulled[at + l] *= by;
          to.sum[k][at + l] *= by;
        }
      }
      for (int64_t start = 0; start < tile.m; start += kRun) {
        const int64_t end = start + kRun < tile.m ? start + kRun : tile.m;
        N total[kGroup], apart[kGroup], drawn[kGroup];
        for (int g = 0; g < kGroup; g++) total[g] = apart[g] = drawn[g] = M::set(T(0));
        for (int64_t i = start; i < end; i++)
          for (int g = 0; g < kGroup; g++) {
            N below = M::load(tile.z + i * tile.c + first + g * M::size) - top[g];
            N e = M::exp(below * to.inverse[k]);
            total[g] = total[g] + e;
            if (spread) apart[g] = apart[g] + (e > T(0) ? e * below : M::set(T(0)));
            if (pulled) drawn[g] = drawn[g] + e * to.table[i];
          }
        for (int g = 0; g < kGroup; g++) {
          const int64_t at = first + g * M::size;
          add<T>(to.sum[k] + at, total[g]);
          if (spread) add<T>(spread + at, apart[g]);
          if (pulled) add<T>(pulled + at, drawn[g]);
        }
      }
    }
    for (int g = 0; g < kGroup; g++) {
      M::store(to.max + first + g * M::size, top[g]);
      if (to.arg) M::store_int(to.arg + first + g * M::size, arg[g]);
    }
  }
}

}  // namespace
