// The generic row kernels: any V, any device from sm_75 on; fp32 arithmetic, fp64 for fp64 logits.
//
// One block a row, 8 neighbouring logits a thread at a time (16-byte loads where the row is aligned; 2 of fp64), warp
// shuffles to join the threads. With a, m, h, l, d, c the cotangents of log q_y, mean log q, entropy, lse, divergence,
// potential:
//
//     dz = q (l - a - m - h (log q + H) + c (G - <q, G>)) + a e_y + m / V + d (g - qT sum g) / T
//     draw = dz * scale * (1 - (z / cap)^2)
//
// Device memory a logit costs, b bytes of it, t of its target's, o of its gradient: statistics b, or 2 (b + t) with the
// value of a divergence; gradient b + t + o; both in one launch 2 (b + t) + o, and b + t more for a divergence whose
// sum g needs the log-sum-exps first (neither flat nor linear in divergence.h).
//
// The last sweep goes from the end of the row to its beginning: what it reads first is what was read last, and the
// gradient may lie in the upper half of the memory of its own row of logits.
#include "row_work.cuh"

namespace dft::cuda {
namespace {

constexpr int kThreads = 128;

// A row that one block reads from device memory, sweep by sweep
template <class T>
struct MemoryPlace {
  static constexpr int threads = kThreads, warps = kThreads / 32;
  static constexpr bool backwards = true, leads = true;
  static constexpr int64_t first = 0;

  const RowArguments& a;
  Scratch<T>& room;
  const int64_t row, end;

  __device__ __forceinline__ void arrive(int) const {}
  __device__ __forceinline__ void logits(T (&z)[kGroup<T>], int64_t at, int n) const {
    read(z, a.logits, a.finish, row, at, n);
  }
  __device__ __forceinline__ void target(T (&t)[kGroup<T>], int64_t at, int n) const {
    read(t, a.target, a.target_finish, row, at, n);
  }
  template <int Count>
  __device__ __forceinline__ void sum(T (&x)[Count]) const {
    block_sum<warps>(x, room);
  }
  __device__ __forceinline__ void meet(Measured<T>& s, T inverse, T target_inverse) const {
    T top = s.top, target_top = s.target_top;
    block_max<warps>(top, s.best, room);
    block_max<warps>(target_top, s.target_best, room);
    s.raise(top, target_top, inverse, target_inverse);
    block_sum<warps>(s.sums, room);
  }
  __device__ __forceinline__ void consumed(int) const {
    if (a.in_place) __syncthreads();
  }
};

// Blocks a multiprocessor at the least: at most 102 registers a thread (128 where fewer would spill), 255 in fp64
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocks = 4;
#else
constexpr int kBlocks = 5;
#endif

template <class T, class D, bool Present>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? kBlocks : 2) row_kernel(const RowArguments a) {
  __shared__ Scratch<T> room;
  MemoryPlace<T> place = {a, room, int64_t(blockIdx.x), a.vocab};
  RowWork<T, D, Present, MemoryPlace<T>>(a, place, blockIdx.x).run();
}

// -------------------------------------------------------------------------------------------- sums over rows, and q

constexpr int kColumns = 128;  // threads a block, one column each

template <class T>
__device__ __forceinline__ T probability(const Matrix& logits, const Finish& finish, const void* statistics,
                                         int64_t stride, int64_t row, int64_t v) {
  T z[kGroup<T>];
  read(z, logits, finish, row, v, 1);
  const T* known = static_cast<const T*>(statistics) + row;
  return Math<T>::exp((z[0] - known[kLse * stride]) - known[kLseLow * stride]);
}

template <class T>
__global__ void __launch_bounds__(kColumns) column_kernel(const ColumnArguments a) {
  const int64_t v = int64_t(blockIdx.x) * kColumns + threadIdx.x, segment = blockIdx.y;
  if (v >= a.vocab) return;
  T total = 0;
  for (int64_t place = a.starts[segment]; place < a.starts[segment + 1]; place++) {
    const int64_t row = a.order ? a.order[place] : place;
    const T weight = a.weight ? static_cast<const T*>(a.weight)[row] : T(1);
    if (weight != T(0)) total += weight * probability<T>(a.logits, a.finish, a.statistics, a.statistics_stride, row, v);
  }
  static_cast<T*>(a.columns)[segment * a.vocab + v] += total;
}

template <class T>
__global__ void __launch_bounds__(kColumns) probability_kernel(const ProbabilityArguments a) {
  const int64_t v = int64_t(blockIdx.y) * kColumns + threadIdx.x, row = blockIdx.x;
  if (v < a.vocab)
    static_cast<T*>(a.out)[row * a.vocab + v] =
        probability<T>(a.logits, a.finish, a.statistics, a.statistics_stride, row, v);
}

// ---------------------------------------------------------------------------------------------------- the launchers

template <class T>
const char* launch_generic(const RowArguments& a, CUstream_st* stream) {
  return with_pair<T>(a.divergence, [&](auto pair) {
    using P = decltype(pair);
    return launch(row_kernel<T, typename P::type, P::present>, dim3(unsigned(a.rows)), kThreads, stream, a);
  });
}

unsigned blocks(int64_t vocab) { return unsigned((vocab + kColumns - 1) / kColumns); }

}  // namespace

const char* launch_rows(const RowArguments& a, Design design, CUstream_st* stream) {
  if (a.rows == 0) return nullptr;
  if (design != Design::generic && a.wanted) {  // a gradient alone reads each logit once in any design
    const char* message = fits_cluster(a) ? launch_rows_in_clusters(a, stream) : kNoRoom;
    if (message != kNoRoom || design == Design::cluster) return message;
  }
  return a.logits.element == Element::f64 ? launch_generic<double>(a, stream) : launch_generic<float>(a, stream);
}

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
