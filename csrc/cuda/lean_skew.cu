#include "lean.cuh"

namespace dft::cuda {

template const char* launch_lean<SkewKl<Math<float>>, 32>(const RowArguments&, const Plan&, CUstream_st*);
template const char* launch_lean<SkewReverseKl<Math<float>>, 32>(const RowArguments&, const Plan&, CUstream_st*);

}  // namespace dft::cuda
