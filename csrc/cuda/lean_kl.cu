#include "lean.cuh"

namespace dft::cuda {

template const char* launch_lean<ForwardKl<Math<float>>, 32>(const RowArguments&, const Plan&, CUstream_st*);
template const char* launch_lean<ReverseKl<Math<float>>, 32>(const RowArguments&, const Plan&, CUstream_st*);

}  // namespace dft::cuda
