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
  RowWork<T, D, Present>(a, scratch, blockIdx.x).run();
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
