// The generic row kernels: any V, any device from sm_75 on; fp32 arithmetic, fp64 for fp64 logits. One block a row. See
// row_work.cuh for the formulas.
//
// Device memory traffic a logit, with b bytes of it, t of its target's and o of its gradient:
//
//     statistics   b, or 2 (b + t) with the value of a divergence
//     gradient     b + t + o
//     both         2 b + o without a target
//                  2 (b + t) + o with a flat or linear divergence (common/divergence.h)
//                  3 (b + t) + o with any other, whose sum g needs the log-sum-exps first
//
// The gradient's sweep goes from the end of the row to its beginning: it starts with what the sweep before has left in
// the L2 cache, and the gradient may lie in the upper half of the memory of its own row of logits.
#include "dispatch.cuh"
#include "row_gradient.cuh"
#include "row_statistics.cuh"

namespace dft::cuda {
namespace {

constexpr int kThreads = 128;

// The whole row in device memory, read by one block in every sweep
template <class T>
struct MemoryStorage {
  static constexpr int threads = kThreads, warps = kThreads / 32;
  static constexpr bool backwards = true, leads = true;
  static constexpr int64_t first = 0;

  const RowArguments& a;
  Scratch<T>& scratch;
  const int64_t row, end;

  __device__ __forceinline__ void wait(int) const {}
  __device__ __forceinline__ void logits(T (&z)[kGroup<T>], int64_t at, int n) const {
    read(z, a.logits, a.finish, row, at, n);
  }
  __device__ __forceinline__ void target(T (&t)[kGroup<T>], int64_t at, int n) const {
    read(t, a.target, a.target_finish, row, at, n);
  }
  template <int Count>
  __device__ __forceinline__ void sum(T (&x)[Count]) const {
    block_sum<warps>(x, scratch);
  }
  __device__ __forceinline__ void reduce(Measured<T>& s, T inverse, T target_inverse) const {
    T top = s.top, target_top = s.target_top;
    block_max<warps>(top, s.best, scratch);
    block_max<warps>(target_top, s.target_best, scratch);
    s.raise(top, target_top, inverse, target_inverse);
    block_sum<warps>(s.sums, scratch);
  }
  __device__ __forceinline__ void consumed(int) const {
    if (a.in_place) __syncthreads();
  }
};

// Resident blocks a multiprocessor, at the least: this leaves a thread 102 registers (128 on sm_100, which would spill
// with fewer), or 255 in fp64.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kBlocks = 4;
#else
constexpr int kBlocks = 5;
#endif

template <class T, class D, bool Present>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? kBlocks : 2) row_kernel(const RowArguments a) {
  __shared__ Scratch<T> scratch;
  MemoryStorage<T> storage = {a, scratch, int64_t(blockIdx.x), a.vocab};
  RowWork<T, D, Present, MemoryStorage<T>>(a, storage, blockIdx.x).run();
}

template <class T>
const char* launch_generic(const RowArguments& a, CUstream_st* stream) {
  return with_pair<T>(Divergences(), a.divergence, [&](auto pair) {
    using P = decltype(pair);
    return launch(row_kernel<T, typename P::type, P::present>, dim3(unsigned(a.rows)), kThreads, stream, a);
  });
}

}  // namespace

const char* launch_rows(const RowArguments& a, Design design, CUstream_st* stream) {
  if (a.rows == 0) return nullptr;
  if (design != Design::generic && a.wanted) {  // a gradient alone is one sweep
    const char* message = fits_lean(a) ? launch_lean_rows(a, stream) : kDoesNotFit;
    if (message != kDoesNotFit || design == Design::lean) return message;
  }
  return a.logits.element == Element::f64 ? launch_generic<double>(a, stream) : launch_generic<float>(a, stream);
}

}  // namespace dft::cuda
