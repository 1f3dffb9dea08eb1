// CUDA's runtime and driver as far as an object of nvcc asks for them: one device of few multiprocessors, whose kernels
// are translated ones. What is of no use to a single launch says so.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace {

constexpr int kMultiprocessors = 4, kMostShared = 227 << 10, kResidentClusters = 2;

struct Kernel {
  std::string name;
  int most_shared = 48 << 10;  // until more is asked for
  bool large_clusters = false;
};
std::map<const void*, Kernel>& kernels() {  // by the host's stand-ins for them
  static std::map<const void*, Kernel> k;
  return k;
}

// PTX_INDEX: lines of a kernel's name and the path of its C++, without the ending
const std::string& path_of(const std::string& name) {
  static std::map<std::string, std::string> paths;
  if (paths.empty()) {
    std::ifstream index(PTX_INDEX);
    for (std::string found, path; index >> found >> std::ws && std::getline(index, path);) paths[found] = path;
  }
  return paths.at(name);
}

unsigned cluster_of(const cudaLaunchConfig_t& launch) {
  for (unsigned i = 0; i < launch.numAttrs; i++)
    if (launch.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& size = launch.attrs[i].val.clusterDim;
      if (size.y != 1 || size.z != 1) throw std::runtime_error("a cluster that is not along x");
      return size.x;
    }
  return 1;
}

// What a launch is refused for
cudaError_t error_of(const cudaLaunchConfig_t& launch, const Kernel& kernel) {
  const unsigned cluster = cluster_of(launch);
  if (cluster > (kernel.large_clusters ? 16u : 8u) || launch.gridDim.x % cluster) return cudaErrorInvalidClusterSize;
  const bool fits = launch.dynamicSmemBytes <= size_t(kernel.most_shared) && launch.blockDim.x <= 1024;
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}

void refuse_unless(bool good, const char* what) {
  if (!good) throw std::runtime_error(std::string("a tensor map with ") + what);
}

// What the driver would refuse, refused
CUresult encode(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* dims,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  ptx::TensorMap map = {static_cast<char*>(data), {1, 1, 1, 1, 1}, {}, {1, 1, 1, 1, 1}, 2, 0};
  refuse_unless(type == CU_TENSOR_MAP_DATA_TYPE_UINT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, "other numbers");
  refuse_unless(interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE, "a fill");
  refuse_unless(swizzle <= CU_TENSOR_MAP_SWIZZLE_128B && rank >= 1 && rank <= 5, "an unknown swizzle or rank");
  refuse_unless(reinterpret_cast<uintptr_t>(data) % 16 == 0, "memory that is not on 16 bytes");
  for (cuuint32_t i = 0; i < rank; i++) {
    refuse_unless(dims[i] >= 1 && dims[i] <= 1ull << 32 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1, "a bad box");
    map.dims[i] = dims[i], map.box[i] = box[i];
    if (i + 1 == rank) break;
    refuse_unless(strides[i] % 16 == 0 && strides[i] < 1ull << 40, "strides that are not of 16 bytes");
    map.strides[i] = strides[i];
  }
  map.swizzle = uint16_t(swizzle);  // none, and 1 to 3 bits for 32 to 128 bytes
  refuse_unless(!map.swizzle || box[0] * map.size <= 16u << map.swizzle, "a box that is wider than its swizzle");
  std::memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}

[[noreturn]] cudaError_t unused(const char* name) { throw std::runtime_error(std::string("a call of ") + name); }

}  // namespace

extern "C" {

void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[host] = {device};
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { unused("__cudaGetKernel"); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  unused("__cudaLaunchKernel");
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { unused("__cudaPopCallConfiguration"); }

cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the stand-in for CUDA"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMultiProcessorCount) *value = kMultiprocessors;
  else if (attribute == cudaDevAttrComputeCapabilityMajor) *value = 9;
  else if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) *value = kMostShared;
  else unused("cudaDeviceGetAttribute");
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* host, const cudaLaunchConfig_t* launch) {
  return *clusters = kResidentClusters, error_of(*launch, kernels().at(host));
}
cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) kernels().at(host).large_clusters = value;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value > kMostShared) return cudaErrorInvalidValue;
  return kernels().at(host).most_shared = value, cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  if (std::strcmp(name, "cuTensorMapEncodeTiled")) unused(name);
  *function = reinterpret_cast<void*>(encode), *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* launch, const void* host, void** parameters) {
  const Kernel& kernel = kernels().at(host);
  if (const cudaError_t error = error_of(*launch, kernel)) return error;
  const dim3 grid = launch->gridDim;
  ptx::launch(path_of(kernel.name), {grid.x, grid.y, grid.z}, cluster_of(*launch), launch->blockDim.x,
              launch->dynamicSmemBytes, parameters);
  return cudaSuccess;
}

}  // extern "C"
