// What the machine (launch.cpp) and the stand-in for CUDA's runtime (runtime.cpp) have in common.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace ptx {

constexpr uint32_t kFirstShared = 1024;

// What a tensor map says, in the 128 bytes that the driver encodes it in
struct TensorMap {
  char* data;
  uint64_t dims[5], strides[4];  // in numbers, innermost first; in bytes, from the second on
  uint32_t box[5];
  uint16_t size, swizzle;  // bytes of a number; how many bits of an address change
};
static_assert(sizeof(TensorMap) <= 128);

// Runs the kernel whose C++ is `path`.cpp, along x in clusters; throws what goes wrong in it
__attribute__((visibility("default"))) void launch(const std::string& path, const unsigned (&grid)[3],
                                                   unsigned cluster, unsigned threads, size_t dynamic_bytes,
                                                   void* const* parameters);

}  // namespace ptx
