#include "lean.cuh"

namespace dft::cuda {

template const char* launch_lean<None, 32>(const RowArguments&, const Plan&, CUstream_st*);
template const char* launch_lean<None, 64>(const RowArguments&, const Plan&, CUstream_st*);

}  // namespace dft::cuda
