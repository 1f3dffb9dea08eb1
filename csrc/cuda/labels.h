// What a label's column adds beside the products over all columns: its logit, and its share of the gradients, kept
// apart from the exponentials of exponentials.h. Plain C++, as rows.h.
#pragma once

#include <cstdint>

#include "rows.h"

namespace dft::cuda {

// Of rows [R, H] and a head [V, H], in bf16; a label outside of 0..V-1 is none
struct LabelArguments {
  int64_t rows, vocab, width;
  Matrix hidden, weight;
  const int64_t* label;  // [R]
  const float* mean;     // [H], the mean of the head's rows, or null
  const float* bias;     // [V], or null
};

// shift[n] = the finished logit of row n's label, of column 0 where it has none; label[n]: as a number, -1 for none;
// mean_logit[n] = hidden_n . mean, where there is a mean
struct LabelLogitArguments : LabelArguments {
  Finish finish;
  float *shift, *out_label, *mean_logit;
};
const char* launch_label_logits(const LabelLogitArguments&, CUstream_st*);

// out[n] = by_n product[n] + at_label_n weight[label_n] + at_all_n mean, rounded once to bf16
struct RowGradientArguments : LabelArguments {
  const float *product, *by, *at_label, *at_all;  // [R, H] contiguous, [R]; at_all null with mean
  Matrix out;
};
const char* launch_row_gradient_of_labels(const RowGradientArguments&, CUstream_st*);

// Segment i are the rows order[starts[i]] .. order[starts[i + 1] - 1], all of the label distinct[i]:
//
//     out[distinct_i] = product[i] + sum over the segment of at_label_n hidden_n      rounded once to bf16
//     out[distinct_i] += that sum                                                     where out is fp32: no product
struct LabelRowArguments : LabelArguments {
  int64_t segments;
  const int64_t *order, *starts, *distinct;
  const float *product, *at_label;  // [segments, H] contiguous, [R]
  Matrix out;                       // [V, H]
};
const char* launch_label_rows(const LabelRowArguments&, CUstream_st*);

}  // namespace dft::cuda
