// What device code needs of the machine it runs on. tests/cuda_on_host compiles the same kernels for the CPU, with its own
// threads, barriers and shuffles in the place of CUDA's.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef DFT_CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <utility>

namespace dft::cuda {

__device__ __forceinline__ float from_bf16(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }
__device__ __forceinline__ uint16_t to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ float from_f16(uint16_t x) { return __half2float(__ushort_as_half(x)); }
__device__ __forceinline__ uint16_t to_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int threads, CUstream_st* stream, Arguments&&... arguments) {
  kernel<<<grid, threads, 0, stream>>>(std::forward<Arguments>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace dft::cuda
#endif

#include "divergence.h"

namespace dft::cuda {

// The functions divergence.h asks for, of one number. exp is the hardware's (2 ulp), as much of it as q and p need.
template <class T>
struct Math {
  using N = T;
  using Scalar = T;
  DFT_FN T set(T x) { return x; }
  DFT_FN T exp(T x) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(T) == 4) return __expf(x);
#endif
    return std::exp(x);
  }
  DFT_FN T exp_any(T x) { return exp(x); }
  DFT_FN T expm1(T x) { return std::expm1(x); }
  DFT_FN T log1p(T x) { return std::log1p(x); }
  DFT_FN T abs(T x) { return std::fabs(x); }
  DFT_FN T max(T a, T b) { return a > b ? a : b; }
  DFT_FN T select(bool condition, T a, T b) { return condition ? a : b; }
};

}  // namespace dft::cuda
