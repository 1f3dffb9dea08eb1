// What the blocks of the lean row kernels tell each other, and the beginning of a block's shared memory. Internal to
// each translation unit that includes it.
#pragma once

#include <climits>

#include "lean.h"
#include "online.cuh"

namespace dft::cuda {
namespace {

constexpr int kLeanWarps = kLeanThreads / 32;

// What a warp, a block or a cluster knows of the columns that it has seen; what a meeting joins
struct alignas(8) Part {
  Measured<float, int> s;
  float z_y, value;  // the label's logit, the divergence of the row before: 0 in all who do not have them
  __device__ __forceinline__ static Part none() {
    return {{lowest<float>(), lowest<float>(), INT_MAX, INT_MAX, {}}, 0, 0};
  }
};
struct alignas(8) Sums {
  float f, g;
  __device__ __forceinline__ static Sums none() { return {0, 0}; }
};

// The beginning of a block's shared memory
struct Workspace {
  Arrival full[kMostStages], met[2];
  Part parts[kLeanWarps], part_slots[2][kMostBlocks];
  Sums sums[kLeanWarps], sum_slots[2][kMostBlocks];
};
static_assert(sizeof(Workspace) <= kLeanWorkspace && kLeanWarps <= 16);

}  // namespace
}  // namespace dft::cuda
