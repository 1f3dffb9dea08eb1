// The label's column: see labels.h. Sums are in fp32, in the order of columns or of rows: the same bits every time.
#include "labels.h"

#include "groups.cuh"

namespace dft::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
using Group = float[kGroup<float>];

__device__ __forceinline__ int64_t column_of(const LabelArguments& a, int64_t row) {
  const int64_t label = a.label[row];
  return label >= 0 && label < a.vocab ? label : -1;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// A warp a row
__global__ void __launch_bounds__(kThreads) label_logit_kernel(const LabelLogitArguments a) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= a.rows) return;
  const int64_t column = column_of(a, row), from = column < 0 ? 0 : column;
  float logit = 0, mean = 0;
  for (int64_t at = threadIdx.x % 32 * kGroup<float>; at < a.width; at += 32 * kGroup<float>) {
    const int n = inside<float>(at, a.width);
    Group h, w;
    load(h, a.hidden, row, at, n);
    load(w, a.weight, from, at, n);
#pragma unroll
    for (int i = 0; i < kGroup<float>; i++) {
      logit += h[i] * w[i];
      if (a.mean && i < n) mean += h[i] * a.mean[at + i];
    }
  }
  logit = warp_sum(logit), mean = warp_sum(mean);
  if (threadIdx.x % 32 != 0) return;
  if (a.bias) logit += a.bias[from];
  a.shift[row] = finished(logit, float(a.finish.scale), float(a.finish.cap));
  a.out_label[row] = float(column);
  if (a.mean) a.mean_logit[row] = mean;
}

// A block a row
__global__ void __launch_bounds__(kThreads) row_gradient_kernel(const RowGradientArguments a) {
  const int64_t row = blockIdx.x, column = column_of(a, row);
  const float by = a.by[row], at_label = column < 0 ? 0 : a.at_label[row], at_all = a.mean ? a.at_all[row] : 0;
  for (int64_t at = threadIdx.x * kGroup<float>; at < a.width; at += kThreads * kGroup<float>) {
    const int n = inside<float>(at, a.width);
    Group x, w = {};
    load(x, Matrix{a.product, a.width, Element::f32, false}, row, at, n);
    if (column >= 0) load(w, a.weight, column, at, n);
#pragma unroll
    for (int i = 0; i < kGroup<float>; i++) {
      x[i] = by * x[i] + at_label * w[i];
      if (a.mean && i < n) x[i] += at_all * a.mean[at + i];
    }
    store(x, a.out, row, at, n);
  }
}

// A block a label. Grid: [labels, parts of H]
__global__ void __launch_bounds__(kThreads) label_row_kernel(const LabelRowArguments a) {
  const int64_t segment = blockIdx.x, row = a.distinct[segment];
  const int64_t at = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * kGroup<float>;
  if (row < 0 || row >= a.vocab || at >= a.width) return;
  const int n = inside<float>(at, a.width);
  Group x = {};
  if (a.product)
    load(x, Matrix{a.product, a.width, Element::f32, false}, segment, at, n);
  else
    load(x, a.out, row, at, n);
  for (int64_t i = a.starts[segment]; i < a.starts[segment + 1]; i++) {
    const int64_t from = a.order[i];
    const float by = a.at_label[from];
    Group h;
    load(h, a.hidden, from, at, n);
#pragma unroll
    for (int k = 0; k < kGroup<float>; k++) x[k] += by * h[k];
  }
  store(x, a.out, row, at, n);
}

unsigned blocks(int64_t count, int64_t each) { return unsigned((count + each - 1) / each); }

}  // namespace

const char* launch_label_logits(const LabelLogitArguments& a, CUstream_st* stream) {
  if (a.rows == 0) return nullptr;
  return launch(label_logit_kernel, dim3(blocks(a.rows, kWarps)), kThreads, stream, a);
}

const char* launch_row_gradient_of_labels(const RowGradientArguments& a, CUstream_st* stream) {
  if (a.rows == 0) return nullptr;
  return launch(row_gradient_kernel, dim3(unsigned(a.rows)), kThreads, stream, a);
}

const char* launch_label_rows(const LabelRowArguments& a, CUstream_st* stream) {
  if (a.segments == 0 || a.width == 0) return nullptr;
  return launch(label_row_kernel, dim3(unsigned(a.segments), blocks(a.width, kThreads * kGroup<float>)), kThreads,
                stream, a);
}

}  // namespace dft::cuda
