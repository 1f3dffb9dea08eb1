// Probabilities of rows of raw logits [R, V], and their sums over rows, from log-sum-exps that are known:
//
//     q[n, v] = exp((z[n, v] - lse_n) - low_n)
//     columns[g, v] += sum over the rows n of segment g of weight_n q[n, v]
//
// A column sum reads each logit once and uses no atomics: the order of its additions depends on shapes and segments
// alone, so that the result has the same bits every time.
#include "groups.cuh"

namespace dft::cuda {
namespace {

constexpr int kColumns = 128;  // threads a block, one column each

// q[row, v], from the row's log-sum-exp in `statistics` [kRows, R]
template <class T>
__device__ __forceinline__ T probability(const Matrix& logits, const Finish& finish, const void* statistics,
                                         int64_t stride, int64_t row, int64_t v) {
  T z[kGroup<T>];
  read(z, logits, finish, row, v, 1);
  const T* known = static_cast<const T*>(statistics) + row;
  return Math<T>::exp((z[0] - known[kLse * stride]) - known[kLseLow * stride]);
}

// columns[segment, v] += sum over the segment's rows of weight[row] q[row, v]. Grid: [column blocks, segments]
template <class T>
__global__ void __launch_bounds__(kColumns) column_kernel(const ColumnArguments a) {
  const int64_t v = int64_t(blockIdx.x) * kColumns + threadIdx.x, segment = blockIdx.y;
  if (v >= a.vocab) return;
  T total = 0;
  for (int64_t at = a.starts[segment]; at < a.starts[segment + 1]; at++) {
    const int64_t row = a.order ? a.order[at] : at;
    const T weight = a.weight ? static_cast<const T*>(a.weight)[row] : T(1);
    if (weight != T(0)) total += weight * probability<T>(a.logits, a.finish, a.statistics, a.statistics_stride, row, v);
  }
  static_cast<T*>(a.columns)[segment * a.vocab + v] += total;
}

// out[row, v] = q[row, v]. Grid: [rows, column blocks]
template <class T>
__global__ void __launch_bounds__(kColumns) probability_kernel(const ProbabilityArguments a) {
  const int64_t v = int64_t(blockIdx.y) * kColumns + threadIdx.x, row = blockIdx.x;
  if (v < a.vocab)
    static_cast<T*>(a.out)[row * a.vocab + v] =
        probability<T>(a.logits, a.finish, a.statistics, a.statistics_stride, row, v);
}

unsigned blocks(int64_t vocab) { return unsigned((vocab + kColumns - 1) / kColumns); }

}  // namespace

const char* launch_columns(const ColumnArguments& a, CUstream_st* stream) {
  if (a.segments == 0) return nullptr;
  const bool wide = a.logits.element == Element::f64;
  return launch(wide ? column_kernel<double> : column_kernel<float>, dim3(blocks(a.vocab), unsigned(a.segments)),
                kColumns, stream, a);
}

const char* launch_probabilities(const ProbabilityArguments& a, CUstream_st* stream) {
  if (a.rows == 0) return nullptr;
  const bool wide = a.logits.element == Element::f64;
  return launch(wide ? probability_kernel<double> : probability_kernel<float>, dim3(unsigned(a.rows), blocks(a.vocab)),
                kColumns, stream, a);
}

}  // namespace dft::cuda
