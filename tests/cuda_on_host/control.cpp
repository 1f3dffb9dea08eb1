// What the tests ask of the machine in cuda_on_host.h, in the translation unit that has it: the kernels' own.
#include "../../csrc/rows_cuda.cu"

namespace dft::cuda {

void reverse_threads(bool reversed) { on_host::machine().reversed = reversed; }

static void divergent() {
  if (threadIdx.x < 64) __syncthreads();
}

// Half of a block at a barrier that the others never reach: what the machine says of it
const char* run_divergent_barrier() {
  const char* message = launch(divergent, dim3(1), 128, nullptr);
  return message ? message : "";
}

}  // namespace dft::cuda
