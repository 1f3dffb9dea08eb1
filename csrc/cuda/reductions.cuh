// Reductions over the threads of a block: warp shuffles, then shared memory. Each begins with a barrier, and its result
// does not depend on timing: the same bits every time. Internal to each translation unit that includes it.
#pragma once

#include "gpu.h"

namespace dft::cuda {
namespace {

constexpr int kMostWarps = 4;
constexpr int kMostSums = 7;  // reduced by one call

// Shared memory through which the warps of a block exchange their partial results
template <class T>
struct Scratch {
  T sums[kMostSums][kMostWarps];
  T value[kMostWarps];
  int64_t index[kMostWarps];
};

// Every x[k] summed over the block, in every thread
template <int Warps, class T, int Count>
__device__ __forceinline__ void block_sum(T (&x)[Count], Scratch<T>& scratch) {
#pragma unroll
  for (int k = 0; k < Count; k++)
    for (int distance = 16; distance > 0; distance /= 2) x[k] += __shfl_xor_sync(~0u, x[k], distance);
  __syncthreads();  // an earlier reduction's results may still be read
  if (threadIdx.x % 32 == 0)
    for (int k = 0; k < Count; k++) scratch.sums[k][threadIdx.x / 32] = x[k];
  __syncthreads();
  for (int k = 0; k < Count; k++) {
    x[k] = scratch.sums[k][0];
    for (int w = 1; w < Warps; w++) x[k] += scratch.sums[k][w];
  }
}

// The larger of two values with its index; of equal values the lower index
template <class T>
__device__ __forceinline__ void prefer(T& value, int64_t& index, T other, int64_t other_index) {
  const bool better = other > value || (other == value && other_index < index);
  value = better ? other : value;
  index = better ? other_index : index;
}

// The largest value of the block with its index, in every thread
template <int Warps, class T>
__device__ __forceinline__ void block_max(T& value, int64_t& index, Scratch<T>& scratch) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(~0u, value, distance);
    const int64_t other_index = __shfl_xor_sync(~0u, index, distance);
    prefer(value, index, other, other_index);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch.value[threadIdx.x / 32] = value, scratch.index[threadIdx.x / 32] = index;
  __syncthreads();
  for (int w = 0; w < Warps; w++) prefer(value, index, scratch.value[w], scratch.index[w]);
}

}  // namespace
}  // namespace dft::cuda
