// Large CPU buffers that are kept between calls: touching fresh memory costs as much as a sweep over it.
#pragma once

#include <ATen/core/Tensor.h>

namespace dft {

// An uninitialised tensor whose memory goes back to the pool, not to the system, when its last owner lets go.
at::Tensor pooled(at::IntArrayRef shape, at::ScalarType type);
int64_t release_pool();  // frees what no tensor holds; returns its bytes
int64_t pool_bytes();    // of all buffers, held or free

}  // namespace dft
