// The row operations on CUDA: statistics of rows of raw logits [R, V], their gradient, or both in one launch; sums of
// probabilities over rows. Plain C++, so that callers need no CUDA compiler; no torch header.
#pragma once

#include <cstdint>

#include "common/element.h"

struct CUstream_st;

namespace dft::cuda {

// [R, V] in device memory, rows `stride` numbers apart. data null: absent.
struct Matrix {
  const void* data;
  int64_t stride;
  Element element;
  bool padded;  // every row can be read up to the next multiple of 8 numbers
};

// z = cap tanh(scale raw / cap); cap 0: z = scale raw
struct Finish {
  double scale, cap;
};

// One launch. `Number` below is double where logits are f64, else float.
struct RowArguments {
  int64_t rows, vocab;
  Matrix logits, target;
  Finish finish, target_finish;
  Matrix out;  // the gradient, written; absent: none. May be the logits' own memory: in place, or a row's upper half
  bool in_place;
  void* statistics;  // Number [kRows, R]
  int64_t statistics_stride;
  const void* cotangents;  // Number [kCorrect, R]
  int64_t cotangents_stride;
  const void* lse_slope;         // Number [R] or null: the cotangent of LSE is cotangents[kLse] + lse_slope LSE
  const int64_t *label, *group;  // [R]; group null: all 0
  const void* potential;         // Number [G, V]
  int divergence;                // an index of Divergences, or kDivergences for none
  double parameter, inverse, target_inverse;  // inverse: 1 / temperature
  int wanted, live;  // bits of Row: the statistics to compute (0: they are given), those that have a cotangent. kSoftLse
                     // wants the log-sum-exps of a divergence without its sums
  bool given;        // the divergence's sums alone are wanted, under the log-sum-exps in `statistics`
};

// columns [segments, V] += sum over the rows of a segment of weight q
struct ColumnArguments {
  int64_t vocab, segments;
  Matrix logits;
  Finish finish;
  const void* statistics;  // Number [kRows, R]
  int64_t statistics_stride;
  const void* weight;     // Number [R], null: all 1
  const int64_t* order;   // [R]: the rows by segment, null: 0, 1, 2 ...
  const int64_t* starts;  // [segments + 1]: where each segment begins in `order`
  void* columns;          // Number [segments, V]
};

// out [R, V] = q
struct ProbabilityArguments {
  int64_t rows, vocab;
  Matrix logits;
  Finish finish;
  const void* statistics;  // Number [kRows, R]
  int64_t statistics_stride;
  void* out;  // Number [R, V], contiguous
};

// generic (rows.cu): any row, up to three sweeps over device memory. lean (lean.cu): a row is read once and kept in the
// registers of a cluster, where fits_lean. automatic: lean where it fits.
enum class Design { automatic, generic, lean };

// Launch on a stream of the current device. Returns null, or the error message of a launch that was refused.
const char* launch_rows(const RowArguments&, Design, CUstream_st*);
const char* launch_columns(const ColumnArguments&, CUstream_st*);
const char* launch_probabilities(const ProbabilityArguments&, CUstream_st*);
// x [1, count] *= factor, one Number in device memory
const char* launch_scaling(const Matrix& x, int64_t count, const void* factor, CUstream_st*);

// lean.cu, for launch_rows: whether the current device, what is asked for, the shape and the alignment admit it. The
// launch returns kDoesNotFit where a part of a device (MIG) cannot hold a cluster of the size it takes.
inline constexpr char kDoesNotFit[] = "these rows do not fit the lean design here";
bool fits_lean(const RowArguments&);
const char* launch_lean_rows(const RowArguments&, CUstream_st*);

}  // namespace dft::cuda
