// The row operations on tiles of *transposed* logits [m, c]: m vocabulary entries, c tokens (rows of the chunk), one
// token a SIMD lane, so that per-token quantities are vectors and no reduction goes across lanes. The chunk step
// (step.h) calls these kernels on tiles that are still in the cache; rows.cpp compiles them once for each instruction
// set.
//
// A log-sum-exp is given as the nearest T and the rounding error of that: log q = (z / T - lse) - low is then accurate
// to an ulp of log q, where z / T - lse is accurate to an ulp of lse only.
//
// c is a multiple of kLanes; lanes beyond the chunk's rows are padding, computed and ignored. A null pointer means
// "absent" or "not asked for".
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/divergence.h"
#include "common/element.h"

namespace dft {

constexpr int64_t kLanes = 32;

template <class T>
struct LogSumExp {
  const T *lse, *low;  // [c]
};

template <class T>
using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // as wide as T

// Logits z [m, c] of the vocabulary entries from v on
template <class T>
struct Tile {
  T* z;
  int64_t m, c, v;
};

// Where the gradient of a tile goes: rows `stride` numbers apart, of bf16 where `narrow`, else of T. A row may be its
// row of logits, or the first half of that.
struct Dlogits {
  void* to;
  int64_t stride;
  bool narrow;
};

// z = cap tanh(scale (raw + bias) / cap); cap 0: z = scale (raw + bias)
template <class T>
struct Finish {
  const T* bias;  // [m]
  T scale, cap;
};

// Logits [V, c] as they are held between sweeps: of T, finished; or narrow, of bf16 or fp16, as they were rounded, so
// that each reader finishes them
template <class T>
struct Held {
  void* z;
  int64_t c;
  Element element;
  Finish<T> finish;  // of narrow ones, whose bias is in them
  bool narrow() const { return element == Element::bf16 || element == Element::f16; }
};

// Sweep 1, over every tile once: finishes z in place and accumulates for each token the maximum, its vocabulary entry,
// and sum exp((z - max) / T) at one or two temperatures; beside the first, which then is T = 1, the sums from which the
// entropy and the mean of a potential shared by all tokens follow. Sums are in double.
template <class T>
struct Sums {
  T* max;           // [c], starts at the lowest finite number
  Integer<T>* arg;  // [c]
  int temperatures;
  T inverse[2];
  double* sum[2];  // [c]
  double* spread;  // [c]: sum exp(z - max) (z - max), so that H = log sum - spread / sum
  double* pulled;  // [c]: sum exp(z - max) table
  const T* table;  // [m]: the potential of this tile
};

// Sweep 2 of the divergence, with the log-sum-exps known
template <class T>
struct Divergence {
  const T* target;                     // [m, c], finished
  T inverse, target_inverse;           // 1 / temperature
  LogSumExp<T> model_lse, target_lse;  // at those temperatures
  T parameter;
  double *value, *slope;  // [c]: += sum f, += sum g
};

// Sweep 2 of what else is asked for at T = 1
template <class T>
struct Moments {
  LogSumExp<T> lse;
  double* mean;       // [c]: += sum z
  double* entropy;    // [c]: += -sum q log q
  double* potential;  // [c]: += <q, potential[group]>
  const T* table;     // [m, groups]: the potentials G of this tile
  double* columns;    // [groups, m], columns_stride apart: += sum over tokens of weight q
  int64_t columns_stride;
  const T* weight;       // [c], 0 for padding
  const int64_t* group;  // [c], null: one group
  int64_t groups;
};

// <q, phi_k> of kLanes tokens, with the log-sum-exp known: reads only the vocabulary entries that have features.
template <class T>
struct Features {
  Held<T> held;  // [V, c]
  LogSumExp<T> lse;
  const int64_t* filled;  // [count]: the vocabulary entries that have features
  int64_t count;
  const int64_t *row_start, *column;  // phi [V, K] as a CSR matrix: entries row_start[v]..row_start[v+1] are of v
  const T* entry;
  int64_t k;    // K
  double* sum;  // [k, kLanes]: scratch
  T* out;       // [R, k]
};

// Sweep 3: dz = q (factor - entropy log q + pull (G - ..) + phi k) + label [v = y] + mean
//               + soft (g - qT slope), times scale (1 - (z / cap)^2); 0 for a token that is not active.
// Everything that does not depend on v is folded into per-token constants (fold.h). With a sparse target, g = 0 outside
// of its tokens; the logits at its tokens are -inf here, their gradient is 0, and the caller writes it.
template <class T>
struct Gradient {
  LogSumExp<T> lse;                                 // null: no term at T = 1
  const T *factor, *entropy, *pull, *label, *mean;  // [c]
  const Integer<T>* target;                         // [c]: labels y, -1 where there is none
  const T* table;                                   // as in Moments
  const int64_t* group;
  int64_t groups;
  const int64_t *row_start, *column;
  const T* entry;
  const T* features;                  // [K, c]: cotangents of <q, phi_k>
  LogSumExp<T> soft_lse, target_lse;  // null: no divergence
  const T *soft, *slope;              // [c]
  const T* teacher;                   // [m, c]: the target's logits; null for a sparse target
  T inverse, target_inverse, parameter;
  const T* active;  // [c]: 1 or 0
  T scale, cap;
  Dlogits out;
  double* bias;     // [m]: += sum over tokens
  double* columns;  // as in Moments, over all tokens, active or not
  int64_t columns_stride;
  const T* weight;  // [c], 0 for padding
  double* value;    // [c]: += sum f of a flat divergence, whose sweep 2 is then not needed
  const T* reach;   // [c]: norms of the tokens' hidden states, where the spread of the gradient is asked for
  double *squares, *reached;  // [m]: += sum over tokens of draw^2, of |draw| reach
};

// A row of next-token scores at a temperature: x = z - top of the tokens with x >= least. Sums and moments take an x
// below kBelow for that: at any temperature that is allowed, 100 at most, it has no mass.
constexpr double kBelow = -1e4;

template <class T>
struct Tempered {
  T top, inverse, least;
};

// Of a row z [n] of next-token scores, whose tokens are the lanes (sweep_scores.h). Sums are in double.
template <class T>
struct ScoreKernels {
  T (*largest)(const T* z, int64_t n);
  // out = z + shift
  void (*shifted)(const T* z, const T* shift, T* out, int64_t n);
  // sums [3] += sum w, sum w x, sum w x^2 of w = exp(inverse x)
  void (*weighed)(const T* z, int64_t n, const Tempered<T>&, double* sums);
  // sums [3] += the number of tokens that are not left out, and sum x, sum x^2 of these
  void (*moments)(const T* z, int64_t n, T top, double* sums);
  // out = inverse x - log_sum, -inf where x < least; out may be z
  void (*normalised)(const T* z, T* out, int64_t n, const Tempered<T>&, T log_sum);
};

template <class T>
struct Kernels {
  void (*sums)(const Tile<T>&, const Finish<T>&, const Sums<T>&);
  void (*divergence[kDivergences])(const Tile<T>&, const Divergence<T>&);
  bool flat[kDivergences];  // common/divergence.h: whether the value can be left to sweep 3
  void (*moments)(const Tile<T>&, const Moments<T>&);
  // of the tokens first .. first + kLanes, of which `rows` are no padding
  void (*features)(const Features<T>&, int64_t first, int64_t rows);
  // [kDivergences]: without a divergence, [kDivergences + 1]: with a sparse target
  void (*gradient[kDivergences + 2])(const Tile<T>&, const Gradient<T>&);
  // out [m, c] = in [rows, V] at columns v..v+m, transposed; tokens beyond `rows` are 0. stride: of a row of `in`
  void (*load)(T* out, int64_t m, int64_t c, const void* in, Element element, int64_t rows, int64_t stride, int64_t v);
  // the way back: out [rows, V] at columns v..v+m = in [m, c]
  void (*save)(const T* in, int64_t m, int64_t c, void* out, Element element, int64_t rows, int64_t stride, int64_t v);
  // out [m, n] = in [m, n] + bias [m], rounded to nearest even to a 16-bit element
  void (*round)(const T* in, const T* bias, int64_t m, int64_t n, void* out, Element element);
  // out [m, n] = narrow logits of the vocabulary entries v..v+m and the tokens first..first+n, finished
  void (*widen)(const Held<T>&, int64_t v, int64_t m, int64_t first, int64_t n, T* out);
  // y = exp, expm1, log1p, tanh, exp_any (simd.h) of x [n], for the tests of accuracy; n a multiple of kLanes
  void (*evaluate)(int function, const T* x, T* y, int64_t n);
  ScoreKernels<T> scores;
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
