// The device functions and launches that the kernels use.
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

#include <atomic>
#include <utility>

namespace dft::cuda {

__device__ __forceinline__ float from_bf16(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }
__device__ __forceinline__ uint16_t to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ float from_f16(uint16_t x) { return __half2float(__ushort_as_half(x)); }
__device__ __forceinline__ uint16_t to_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }

// Two numbers, the first in the lower half
__device__ __forceinline__ uint32_t pack_bf16(float a, float b) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  return uint32_t(__bfloat16_as_ushort(both.y)) << 16 | __bfloat16_as_ushort(both.x);
}
__device__ __forceinline__ uint32_t pack_f16(float a, float b) {
  const __half2 both = __floats2half2_rn(a, b);
  return uint32_t(__half_as_ushort(both.y)) << 16 | __half_as_ushort(both.x);
}

inline const char* message_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int threads, CUstream_st* stream,
                   Arguments&&... arguments) {
  cudaLaunchConfig_t how = {};
  how.gridDim = grid, how.blockDim = dim3(unsigned(threads)), how.stream = stream;
  return message_of(cudaLaunchKernelEx(&how, kernel, std::forward<Arguments>(arguments)...));
}

// ------------------------------------------------------------------------ thread-block clusters and bulk copies

constexpr int kDevices = 64, kSizes = 5;

// What launch_clusters knows of a kernel, by device and the size of a cluster (1, 2, 4, 8, 16): the clusters that are
// resident at a time. 0: not asked yet, -1: none.
struct Resident {
  std::atomic<int> clusters[kDevices][kSizes];
};

// Bytes of shared memory that a block of the current device may have; 0 where it has no clusters and bulk copies
inline int cluster_arena() {
  static std::atomic<int> known[kDevices];  // 1 + the bytes
  int device = 0, major = 0, most = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (device < kDevices && known[device]) return known[device] - 1;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  const int bytes = major >= 9 ? most : 0;
  if (device < kDevices) known[device] = bytes + 1;
  return bytes;
}

// Launches as many clusters of `size` blocks as are resident at a time, at most `most`; arena() has `bytes`. One block
// of the kernel fills a multiprocessor, so that the number of resident clusters does not depend on `bytes`.
template <class... Parameters, class... Arguments>
const char* launch_clusters(Resident& resident, void (*kernel)(Parameters...), int64_t most, int size, int threads,
                            int bytes, CUstream_st* stream, Arguments&&... arguments) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(size), cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t how = {};
  how.gridDim = dim3(unsigned(size)), how.blockDim = dim3(unsigned(threads));
  how.dynamicSmemBytes = size_t(bytes), how.stream = stream, how.attrs = &cluster, how.numAttrs = 1;
  int device = 0, place = 0;
  while (1 << place < size) place++;
  cudaError_t error = cudaGetDevice(&device);
  int clusters = error == cudaSuccess && device < kDevices ? resident.clusters[device][place].load() : 0;
  if (clusters == 0) {
    const int all = cluster_arena();
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, all);
    if (error == cudaSuccess && size > 8)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &how);
    if (error != cudaSuccess) return message_of(error);
    if (clusters == 0) clusters = -1;
    if (device < kDevices) resident.clusters[device][place] = clusters;
  }
  if (clusters < 0) return kDoesNotFit;
  how.gridDim.x = unsigned((most < clusters ? most : clusters) * size);
  return message_of(cudaLaunchKernelEx(&how, kernel, std::forward<Arguments>(arguments)...));
}

// A block's dynamic shared memory
__device__ __forceinline__ char* arena() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// An mbarrier: a phase of it ends when one thread has announced a number of bytes and all of these have arrived, in
// whatever order.
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
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
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

// volatile: read where it is needed, rather than kept, with all that depends on it, in registers
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ unsigned cluster_size() { return __clusterSizeInBlocks(); }
__device__ __forceinline__ void cluster_barrier() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

// Writes x to the address that `to` has in this block, in the shared memory of block `rank` of the cluster, and its
// bytes are counted by the mbarrier that is there where `arrival` is here.
template <class X>
__device__ __forceinline__ void send(X* to, unsigned rank, const X& x, Arrival* arrival) {
  static_assert(sizeof(X) % 8 == 0 && alignof(X) % 8 == 0);
  uint32_t there, counter;
  uint64_t words[sizeof(X) / 8];
  memcpy(words, &x, sizeof x);
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counter) : "r"(shared_address(arrival)), "r"(rank));
#pragma unroll
  for (unsigned i = 0; i < sizeof(X) / 8; i++)
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(there + 8 * i),
                 "l"(words[i]), "r"(counter)
                 : "memory");
}

#endif

}  // namespace dft::cuda
#endif

#include "arithmetic.h"
