// A pool of large CPU buffers that are kept between calls: the page faults of fresh memory cost as much as a sweep over
// it.
#pragma once

#include <ATen/core/Tensor.h>

namespace dft {

// An uninitialised tensor whose memory returns to the pool, not to the system, when its last owner releases it.
at::Tensor pooled(at::IntArrayRef shape, at::ScalarType type);
int64_t release_pool();  // frees the buffers that no tensor holds; returns their bytes
int64_t pool_bytes();    // of all buffers, held or free

}  // namespace dft
