// Multiplication of a finished gradient by a factor that only the device knows: x *= factor. In the usual case,
// loss.backward(), the factor is 1: every thread then reads that one number and returns.
#include "groups.cuh"

namespace dft::cuda {
namespace {

constexpr int kThreads = 256, kMostBlocks = 2048;  // each block goes over several parts of a large gradient

template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(const Matrix x, const int64_t count, const T* factor) {
  const T by = *factor;
  if (by == T(1)) return;
  const int64_t step = int64_t(gridDim.x) * kThreads * kGroup<T>;
  for (int64_t at = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kGroup<T>; at < count; at += step) {
    const int n = inside<T>(at, count);
    T numbers[kGroup<T>];
    load(numbers, x, 0, at, n);
#pragma unroll
    for (int i = 0; i < kGroup<T>; i++) numbers[i] *= by;
    store(numbers, x, 0, at, n);
  }
}

template <class T>
const char* launch_in(const Matrix& x, int64_t count, const void* factor, CUstream_st* stream) {
  const int64_t blocks = (count + kThreads * kGroup<T> - 1) / (kThreads * kGroup<T>);
  return launch(scale_kernel<T>, dim3(unsigned(blocks < kMostBlocks ? blocks : kMostBlocks)), kThreads, stream, x,
                count, static_cast<const T*>(factor));
}

}  // namespace

const char* launch_scaling(const Matrix& x, int64_t count, const void* factor, CUstream_st* stream) {
  if (count == 0) return nullptr;
  return x.element == Element::f64 ? launch_in<double>(x, count, factor, stream)
                                   : launch_in<float>(x, count, factor, stream);
}

}  // namespace dft::cuda
