// What the tests ask of the machine in cuda_on_host.h.
#include "cuda/gpu.h"

namespace dft::cuda {

void reverse_threads(bool reversed) { on_host::machine().reversed = reversed; }

void limit_arena(int64_t bytes) { on_host::machine().arena_limit = bytes; }

// Of the last launch
int cluster_blocks() { return int(on_host::machine().blocks); }

static void divergent() {
  if (threadIdx.x < 64) __syncthreads();
}

// Half of a block at a barrier that the others never reach: what the machine says of it
const char* run_divergent_barrier() {
  const char* message = launch(divergent, dim3(1), 128, nullptr);
  return message ? message : "";
}

}  // namespace dft::cuda
