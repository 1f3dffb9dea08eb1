// The device functions and launches that the kernels use, and the arithmetic of divergence.h on a GPU.
// tests/cuda_on_host compiles the same kernels for the CPU, with its own threads, barriers and shuffles.
#pragma once

#include <cmath>
#include <cstdint>

#include "rows.h"

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

inline const char* message_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int threads, CUstream_st* stream,
                   Arguments&&... arguments) {
  cudaLaunchConfig_t how = {};
  how.gridDim = grid, how.blockDim = dim3(unsigned(threads)), how.stream = stream;
  return message_of(cudaLaunchKernelEx(&how, kernel, std::forward<Arguments>(arguments)...));
}

// ------------------------------------------------------------------------ thread-block clusters and bulk copies

// Launches as many clusters of `size` blocks as are resident at a time, at most `most`; arena() has `bytes`.
template <class... Parameters, class... Arguments>
const char* launch_clusters(void (*kernel)(Parameters...), int64_t most, int size, int threads, int bytes,
                            CUstream_st* stream, Arguments&&... arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return message_of(error);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(size), cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t how = {};
  how.gridDim = dim3(unsigned(size)), how.blockDim = dim3(unsigned(threads));
  how.dynamicSmemBytes = size_t(bytes), how.stream = stream, how.attrs = &cluster, how.numAttrs = 1;
  int resident = 0;
  error = cudaOccupancyMaxActiveClusters(&resident, kernel, &how);
  if (error != cudaSuccess) return message_of(error);
  if (resident == 0) return kDoesNotFit;
  how.gridDim.x = unsigned((most < resident ? most : resident) * size);
  return message_of(cudaLaunchKernelEx(&how, kernel, std::forward<Arguments>(arguments)...));
}

// `bytes`, or less where a block of the current device cannot have that much shared memory
inline int64_t arena_limit(int64_t bytes) {
  int device = 0, most = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  return bytes < most ? bytes : most;
}

// Whether the current device has clusters and bulk copies
inline bool has_clusters() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
}

// A block's dynamic shared memory
__device__ __forceinline__ char* arena() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// An mbarrier: counts the bytes of the copies announced to it; a phase ends when all have arrived.
struct alignas(8) Arrival {
  uint64_t state;
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void arrival_init(Arrival* a) {  // by one thread, before a barrier of the block
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(a)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrival_expect(Arrival* a, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(a)), "r"(bytes)
               : "memory");
}

// Waits for the end of the phase of this parity (0 for the first, 1 for the second, 0 ...)
__device__ __forceinline__ void arrival_wait(Arrival* a, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(a)), "r"(parity)
                 : "memory");
}

// Starts a copy of global memory to shared memory: 16-byte aligned, a multiple of 16 bytes, announced to `a` before
__device__ __forceinline__ void bulk_load(void* to, const void* from, uint32_t bytes, Arrival* a) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(a))
               : "memory");
}

__device__ __forceinline__ unsigned cluster_rank() { return __clusterRelativeBlockRank(); }
__device__ __forceinline__ unsigned cluster_size() { return __clusterSizeInBlocks(); }
__device__ __forceinline__ void cluster_barrier() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}
// The same address in the shared memory of another block of the cluster
template <class T>
__device__ __forceinline__ T* of_rank(T* mine, unsigned rank) {
  return static_cast<T*>(__cluster_map_shared_rank(mine, rank));
}

#endif

}  // namespace dft::cuda
#endif

#include "common/divergence.h"

namespace dft::cuda {

// The arithmetic M of divergence.h on single numbers. exp in fp32 is the hardware's: 2 ulp, enough for q and p.
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
