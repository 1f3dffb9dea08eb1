#include "lean.cuh"

namespace dft::cuda {

template const char* launch_lean<JensenShannon<Math<float>>, 32>(const RowArguments&, const Plan&, CUstream_st*);

}  // namespace dft::cuda
