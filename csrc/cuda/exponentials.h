// The logits product with exponentials in its epilogue: no logits are ever written. Plain C++, as rows.h.
#pragma once

#include <cstdint>

#include "rows.h"

namespace dft::cuda {

// The product's tile: rows and columns of the logits that a block finishes at a time
constexpr int64_t kExponentialRows = 128, kExponentialColumns = 256;
// A row whose sum reaches this, or is no number, is to be computed again from its logits
constexpr float kBadTotal = 1e20f;

// With z = cap tanh(scale (hidden weight.T + bias) / cap), as Finish says, and the columns t of a tile:
//
//     e[n, v]     = exp(z[n, v] - shift_n), 0 at v = label_n
//     out[n, v]   = e[n, v] (1 - (z[n, v] / cap)^2)          rounded once to bf16
//     sums[t, n]  = sum of e[n, v] over the tile             fp32, not of the rounded ones
//     moments     = sum of e[n, v] (z[n, v] - shift_n)
//     tops        = max of z[n, v] - shift_n, the label's left out
struct ExponentialArguments {
  int64_t rows, vocab, width;                   // R, V, H
  const void *hidden, *weight;                  // bf16 [R, H], [V, H]
  int64_t hidden_stride, weight_stride;         // multiples of 8, as is that of out; 16-byte aligned
  Finish finish;
  const float* bias;                            // [V], or null
  const float *shift, *label;                   // [R]; label: as a number, -1 for none
  void* out;                                    // bf16 [R, V]
  int64_t out_stride;
  float *sums, *moments, *tops;                 // [ceil(V / kExponentialColumns), R rounded up to kExponentialRows]
};                                              // moments, tops: both, or neither without bias and cap

// Whether this build has it: it takes CUTLASS's headers
bool has_exponentials();
// Bytes of device memory that a launch takes beside
int64_t exponentials_workspace(const ExponentialArguments&);
const char* launch_exponentials(const ExponentialArguments&, void* workspace, CUstream_st*);

}  // namespace dft::cuda
