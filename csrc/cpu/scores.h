// Next-token distributions at inference: log-probabilities out [B, V] from scores [B, V], row by row, as the steps of
// dft_kernels/generation leave them. Rows are contiguous, fp32 or fp64, out of the dtype of scores, which it may be.
// -inf: a token left out; NaN makes its row NaN.
#pragma once

#include <ATen/core/Tensor.h>

namespace dft {

// log softmax(scores + shift), shift [V]
void shifted_scores(const at::Tensor& scores, const at::Tensor& shift, const at::Tensor& out);

// log softmax of the scores of at least max - n sigma, sigma their standard deviation in the row
void scores_within(const at::Tensor& scores, double n, const at::Tensor& out);

// What is asked of a row's entropy H(T) of softmax(scores / T), in nats
struct Entropies {
  double least, most;  // of log T
  int iterations;      // of Newton's method at most
  double close;        // to what is asked for
};

// log softmax(scores / T), H(T) = factor H(1) as far as log T stays in least..most, by Newton's method in log T on
// log H, bracketed; see dft_kernels/generation/temperature.py
void scores_at_entropy(const at::Tensor& scores, double factor, const Entropies& how, const at::Tensor& out);

// log softmax(scores / T), log T = log_temperature + pull / H(1), at least `least`
void scores_by_entropy(const at::Tensor& scores, double log_temperature, double pull, double least,
                       const at::Tensor& out);

}  // namespace dft
