// Sweep 3 over a tile of logits [m, c]: their gradient, which may be written over them. Compiled once for each
// instruction set, as part of rows.cpp.
#pragma once

#include <limits>

#include "common/divergence.h"
#include "lanes.h"
#include "narrow.h"

namespace {

using namespace dft;

// dz = q (factor - entropy log q + pull G + <features, phi_v>) + label [v = y] + mean + soft (g - qT slope)
// draw = dz scale (1 - (z / cap)^2); see Gradient in rows.h
template <class T, template <class> class D>
void gradient(const Tile<T>& tile, const Gradient<T>& at) {
  using M = Lanes<T>;
  using N = typename M::N;
  using I = typename M::I;
  alignas(64) T value[kSpan];
  for (int64_t start = 0; start < tile.c; start += kSpan) {
    const int64_t n = tile.c - start < kSpan ? tile.c - start : kSpan;
    for (int64_t i = 0; i < tile.m; i++) {
      const T* row = tile.z + i * tile.c;
      uint16_t* half = static_cast<uint16_t*>(at.out.to) + i * at.out.stride;
      T* whole = static_cast<T*>(at.out.to) + i * at.out.stride;
      if (D<M>::flat && i % kRun == 0)
        for (int64_t l = 0; l < n; l++) value[l] = T(0);
      N total = M::set(T(0)), shares = total, squares = total, reached = total;
      for (int64_t first = start; first < start + n; first += M::size) {
        N z = M::load(row + first), dz = M::set(T(0)), q = dz;
        if (at.lse.lse) {
          N lq = log_of(z, T(1), at.lse, first);
          q = M::exp(lq);
          if (at.columns) {
            N weight = M::load(at.weight + first), share = weight != T(0) ? weight * q : M::set(T(0));
            shares = shares + share;
            if (at.group)
              for (int l = 0; l < M::size; l++) at.columns[at.group[first + l] * at.columns_stride + i] += share[l];
          }
          N factor = M::load(at.factor + first);
          if (at.entropy) factor = factor - M::load(at.entropy + first) * lq;
          if (at.pull) factor = factor + M::load(at.pull + first) * potential(at.table, at.group, at.groups, i, first);
          if (at.features)
            for (int64_t e = at.row_start[i]; e < at.row_start[i + 1]; e++)
              factor = factor + at.entry[e] * M::load(at.features + at.column[e] * tile.c + first);
          dz = q > T(0) ? q * factor : dz;
          if (at.label) {
            I here = M::load_int(at.target + first);
            dz = dz + (here == typename M::Int(tile.v + i) ? M::load(at.label + first) : M::set(T(0)));
          }
          if (at.mean) dz = dz + M::load(at.mean + first);
        }
        if constexpr (D<M>::present) {
          N lq = log_of(z, at.inverse, at.soft_lse, first);
          N qt = at.lse.lse && at.inverse == T(1) ? q : M::exp(lq), f, g = M::set(T(0));
          if constexpr (!D<M>::sparse) {
            N lp = log_of(M::load(at.teacher + i * tile.c + first), at.target_inverse, at.target_lse, first);
            D<M>::type::eval(lp, lq, qt, at.parameter, f, g);
          }
          if constexpr (D<M>::flat)
            M::store(value + first - start, M::load(value + first - start) + f);
          else
            g = g - (qt > T(0) ? qt * M::load(at.slope + first) : M::set(T(0)));
          dz = dz + M::load(at.soft + first) * g;
        }
        if (at.cap != T(0)) dz = dz * (T(1) - (z / at.cap) * (z / at.cap));
        dz = dz * at.scale;
        dz = M::load(at.active + first) != T(0) ? dz : M::set(T(0));
        if constexpr (D<M>::sparse) dz = z > -std::numeric_limits<T>::infinity() ? dz : M::set(T(0));
        total = total + dz;
        if (at.reach) {
          squares = squares + dz * dz;
          reached = reached + M::abs(dz) * M::load(at.reach + first);
        }
        if (at.out.narrow)
          store_bf16(half + first, dz);
        else
          M::store(whole + first, dz);
      }
      if (at.bias) at.bias[i] += double(M::sum(total));
      if (at.reach) at.squares[i] += double(M::sum(squares)), at.reached[i] += double(M::sum(reached));
      if (at.columns && !at.group) at.columns[i] += double(M::sum(shares));
      if (D<M>::flat && (i % kRun == kRun - 1 || i == tile.m - 1)) add(at.value + start, value, n);
    }
  }
}

// D of `gradient`: a divergence with a dense target, none, or any divergence outside of a sparse target's tokens, where
// f = g = 0
template <template <class> class D>
struct With {
  template <class M>
  struct Of {
    static constexpr bool present = true, flat = D<M>::flat, sparse = false;
    using type = D<M>;
  };
};
template <class M>
struct Without {
  static constexpr bool present = false, flat = false, sparse = false;
};
template <class M>
struct OutsideSparse {
  static constexpr bool present = true, flat = false, sparse = true;
};

}  // namespace
