// The row kernels for CUDA: statistics of rows of raw logits [R, V], their gradient, or both in one launch; sums of
// probabilities over rows. Plain C++, so that whoever calls them needs no CUDA compiler; no torch header.
#pragma once

#include <cstdint>

#include "common/element.h"

struct CUstream_st;

namespace dft::cuda {

// Bits of Row: what stands on softmax(z), and so on its log-sum-exp
constexpr int kAtOne = 1 << kLogProb | 1 << kMeanLogProb | 1 << kEntropy | 1 << kLse | 1 << kPotential;

// Rows of V numbers; stride in numbers. null: not there.
struct Matrix {
  const void* data;
  int64_t stride;
  Element element;
  bool padded;  // every row can be read to a multiple of 8 numbers
};

// z = cap(scale * raw), cap(x) = cap tanh(x / cap); cap 0: none
struct Finish {
  double scale, cap;
};

// One launch. `Number` below is double where logits are f64, else float.
struct RowArguments {
  int64_t rows, vocab;
  Matrix logits, target;
  Finish finish, target_finish;
  Matrix out;  // the gradient, written; null: none. May be the logits' own memory: in place, or their rows' upper half
  bool in_place;
  void* statistics;  // Number [kRows, R]
  int64_t statistics_stride;
  const void* cotangents;  // Number [6, R]
  int64_t cotangents_stride;
  const void* lse_slope;  // Number [R] or null: LSE's cotangent is cotangents[kLse] + lse_slope LSE
  const int64_t *label, *group;
  const void* potential;                      // Number [G, V]
  int divergence;                             // an id of divergence.h, or kDivergences for none
  double parameter, inverse, target_inverse;  // inverse: 1 / temperature
  int wanted, live;  // bits of Row: what to compute (0: the statistics are there), what has a cotangent
};

// columns [segments, V] += sum over a segment's rows of weight q. order: rows by segment, null: as they come;
// starts [segments + 1]: where each begins in it. weight null: all 1.
struct ColumnArguments {
  int64_t vocab, segments;
  Matrix logits;
  Finish finish;
  const void* statistics;
  int64_t statistics_stride;
  const void* weight;
  const int64_t *order, *starts;
  void* columns;
};

// out Number [R, V] = q
struct ProbabilityArguments {
  int64_t rows, vocab;
  Matrix logits;
  Finish finish;
  const void* statistics;
  int64_t statistics_stride;
  void* out;
};

// generic: any row, two or three sweeps over device memory. cluster: where fits_cluster, rows stay on chip between
// them.
enum class Design { automatic, generic, cluster };

// Launch on a stream of the current device; a message where it was refused, else null.
const char* launch_rows(const RowArguments&, Design, CUstream_st*);
const char* launch_columns(const ColumnArguments&, CUstream_st*);
const char* launch_probabilities(const ProbabilityArguments&, CUstream_st*);

// rows_cluster.cu, for launch_rows: whether the current device, the shape and the alignment admit that design; kNoRoom
// where a part of a device (MIG) has no cluster of the size it takes.
inline constexpr char kNoRoom[] = "these rows do not fit the cluster design here";
bool fits_cluster(const RowArguments&);
const char* launch_rows_in_clusters(const RowArguments&, CUstream_st*);

}  // namespace dft::cuda
