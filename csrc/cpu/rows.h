// The row mathematics of a chunk on *transposed* logits [m, c]: one vocabulary entry a row, one token a lane, so that
// per-token quantities are vectors and nothing is reduced across lanes. The chunk step (step_cpu.cpp) calls these
// kernels on tiles that are still in the cache; they are compiled once for each instruction set (rows_*.cpp).
//
// A log-sum-exp comes as the number nearest to it and what that rounding dropped: log q = (z / T - lse) - low is then
// good to an ulp of log q, not of lse.
//
// c is a multiple of kLanes; lanes beyond the chunk's rows are padding, computed and ignored.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/element.h"

namespace dft {

constexpr int64_t kLanes = 32;

template <class T>
struct LogSumExp {
  const T *lse, *low;  // [c]; null: not there
};

template <class T>
using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // as wide as T

// A tile of logits z [m, c] that starts at vocabulary entry v.
template <class T>
struct Tile {
  T* z;
  int64_t m, c, v;
};

// cap(scale * (raw + bias)); cap 0: none. bias [m] or null.
template <class T>
struct Finish {
  const T* bias;
  T scale, cap;
};

// Sweep 1, over every tile once: finishes z in place, and keeps per token the maximum and where it is, and for each
// of up to two temperatures sum exp((z - max) / T); beside the first one, which then is T = 1, what the entropy and the
// mean of a potential that all tokens share are made of. The sums are kept in double, tile by tile.
template <class T>
struct Sums {
  T* max;           // [c], starts at the lowest finite number
  Integer<T>* arg;  // [c] or null
  int temperatures;
  T inverse[2];
  double* sum[2];  // [c]
  double* spread;  // [c] or null: sum exp(z - max) (z - max), so that H = log sum - spread / sum
  double* pulled;  // [c] or null: sum exp(z - max) table
  const T* table;  // [m]: of this tile
};

// Sweep 2 of the divergence, where the log-sum-exps are known: value += sum f, slope += sum g.
template <class T>
struct Divergence {
  const T* target;                     // [m, c], finished
  T inverse, target_inverse;           // 1 / temperature
  LogSumExp<T> model_lse, target_lse;  // at those temperatures
  T parameter;
  double *value, *slope;  // [c]
};

// Sweep 2 of what else is asked for at T = 1; null: not asked for.
template <class T>
struct Moments {
  LogSumExp<T> lse;
  double* mean;       // [c]: += sum z
  double* entropy;    // [c]: += -sum q log q
  double* potential;  // [c]: += <q, potential[group]>
  const T* table;     // potentials of this tile [m, groups]
  double* columns;    // [groups, stride]: += sum over tokens of weight q
  int64_t columns_stride;
  const T* weight;       // [c], 0 for padding
  const int64_t* group;  // [c], null: one group
  int64_t groups;
};

// <q, phi_k> of kLanes tokens, where the log-sum-exp is known: reads the vocabulary entries that have features alone.
template <class T>
struct Features {
  const T* z;  // [V, c], finished
  int64_t c;
  LogSumExp<T> lse;
  const int64_t* filled;  // [count]: the vocabulary entries that have any
  int64_t count;
  const int64_t *row_start, *column;  // features as rows of a sparse matrix: entries row_start[v]..row_start[v+1]
  const T* entry;
  int64_t k;
  double* sum;  // [k, kLanes]: scratch
  T* out;       // [R, k]
};

// Sweep 3: dz = q (factor - entropy log q + pull (G - ..) + phi k) + label [v = y] + mean
//               + soft (g - qT slope), times scale (1 - (z / cap)^2); 0 for a token that is not active.
// Per-token constants fold everything that does not depend on v; null: not there. Outside of a sparse target's tokens
// g = 0; these themselves are -inf here, get 0, and are written by the caller.
template <class T>
struct Gradient {
  LogSumExp<T> lse;                                 // null: no term at T = 1
  const T *factor, *entropy, *pull, *label, *mean;  // [c]
  const Integer<T>* target;                         // [c]: labels, -1 where there is none
  const T* table;                                   // as in Moments
  const int64_t* group;
  int64_t groups;
  const int64_t *row_start, *column;
  const T* entry;
  const T* features;                  // [K, c]: cotangents
  LogSumExp<T> soft_lse, target_lse;  // null: no divergence
  const T *soft, *slope;              // [c]
  const T* teacher;                   // [m, c], null for a sparse target
  T inverse, target_inverse, parameter;
  const T* active;  // [c]: 1 or 0
  T scale, cap;
  bool narrow;      // write bf16, each row over the first half of its own logits, else T over them
  double* bias;     // [m]: += sum over tokens, or null
  double* columns;  // as in Moments, or null: of all tokens, active or not
  int64_t columns_stride;
  const T* weight;  // [c], 0 for padding
  double* value;    // [c]: += sum f, for a flat divergence (divergence.h), whose sweep 2 this replaces
};

template <class T>
struct Kernels {
  void (*sums)(const Tile<T>&, const Finish<T>&, const Sums<T>&);
  void (*divergence[8])(const Tile<T>&, const Divergence<T>&);
  bool flat[8];  // divergence.h: whether the value may be left to the gradient's sweep
  void (*moments)(const Tile<T>&, const Moments<T>&);
  // tokens first .. first + kLanes, of which `rows` are there
  void (*features)(const Features<T>&, int64_t first, int64_t rows);
  void (*gradient[10])(const Tile<T>&, const Gradient<T>&);  // [8]: no divergence, [9]: of a sparse target
  // out [m, c] = in[token, v..v+m] transposed, tokens beyond `rows` zero; stride: of a token in `in`
  void (*load)(T* out, int64_t m, int64_t c, const void* in, Element element, int64_t rows, int64_t stride, int64_t v);
  void (*save)(const T* in, int64_t m, int64_t c, void* out, Element element, int64_t rows, int64_t stride, int64_t v);
  // out [n] = in [n], rounded to nearest even
  void (*round)(const T* in, void* out, Element element, int64_t n);
  // y = exp, expm1, log1p, tanh, exp_any (simd.h) of x [n], for the tests of accuracy; n a multiple of kLanes
  void (*evaluate)(int function, const T* x, T* y, int64_t n);
};

#define DFT_DECLARE(ISA)               \
  const Kernels<float>& ISA##_float(); \
  const Kernels<double>& ISA##_double();
DFT_DECLARE(baseline)
#if defined(__x86_64__)
DFT_DECLARE(avx2)
DFT_DECLARE(avx512)
#endif
#undef DFT_DECLARE

}  // namespace dft
