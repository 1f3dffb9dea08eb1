// How the lean row kernels spread a row over a cluster, and their launches. See lean.cuh.
#pragma once

#include "dispatch.cuh"

namespace dft::cuda {

#ifdef DFT_CUDA_ON_HOST
constexpr int kLeanThreads = 64;  // of a block: on a CPU rows of a few thousand columns then take clusters
#else
constexpr int kLeanThreads = 512;
#endif
constexpr int kMostBlocks = 16;  // of a cluster; more than 8 is no portable size
constexpr int kMostStages = 3;
constexpr int kLeanWorkspace = 4096;  // bytes of a block's shared memory before the stages

__host__ __device__ inline int bytes_of(Element element) {
  return element == Element::f32 ? 4 : element == Element::f64 ? 8 : 2;
}

// What the kernel takes beside RowArguments, all of it worked out once a launch: constant memory costs no register.
struct Plan {
  // `part` columns a block, a multiple of 8; blocks of a cluster; stages of shared memory, each for the block's part of
  // a row and of its target's, `stage_bytes` each; columns a thread. blocks 0: the row does not fit.
  int part, blocks, stages, stage_bytes, columns;
  float inverse, target_inverse, scale, cap, inverse_cap, target_scale, target_cap, parameter;  // of RowArguments
  bool same, one, tracked;  // T = 1; there are sums at T = 1; there are argmaxima
  int used;                 // the sums that are needed, as bits of Sum
  int arena() const { return kLeanWorkspace + stages * stage_bytes; }
};

// The divergences with a lean kernel: the first of Divergences
using LeanDivergences = DivergenceList<ForwardKl, ReverseKl, JensenShannon, SkewKl, SkewReverseKl>;

// The kernel for divergence D, or None, with Columns columns a thread: those below, each compiled in a lean_*.cu
template <class D, int Columns>
const char* launch_lean(const RowArguments&, const Plan&, CUstream_st*);

}  // namespace dft::cuda
