#include "memory.h"

#include <ATen/ATen.h>

#include <cstdlib>
#include <map>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dft {
namespace {

constexpr size_t kPage = size_t(2) << 20;

// Asks for huge pages: fewer page faults at the first access.
void advise(void* memory, size_t bytes) {
#if defined(__linux__)
  madvise(memory, bytes, MADV_HUGEPAGE);  // advice: a refusal is no error
#else
  (void)memory, (void)bytes;
#endif
}

struct Pool {
  std::mutex lock;
  std::multimap<size_t, void*> free;  // by size
  size_t total = 0;

  void drop(std::multimap<size_t, void*>::iterator buffer) {
    total -= buffer->first;
    std::free(buffer->second);
    free.erase(buffer);
  }

  std::pair<void*, size_t> take(size_t bytes) {
    bytes = (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
    std::lock_guard<std::mutex> guard(lock);
    auto fits = free.lower_bound(bytes);
    if (fits != free.end() && fits->first <= 2 * bytes) {
      auto out = std::make_pair(fits->second, fits->first);
      free.erase(fits);
      return out;
    }
    if (fits != free.begin()) drop(std::prev(fits));  // replaces the next smaller one: calls have grown
    void* memory = std::aligned_alloc(kPage, bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, memory, "dft_kernels: no memory for ", bytes,
                     " bytes of scratch. Lower memory_budget.");
    advise(memory, bytes);
    total += bytes;
    return {memory, bytes};
  }

  void give(void* memory, size_t bytes) {
    std::lock_guard<std::mutex> guard(lock);
    free.emplace(bytes, memory);
  }
};

Pool& pool() {
  static Pool* one = new Pool;  // never destroyed: tensors may outlive every static
  return *one;
}

}  // namespace

at::Tensor pooled(at::IntArrayRef shape, at::ScalarType type) {
  size_t bytes = c10::elementSize(type) * c10::multiply_integers(shape);
  auto [memory, size] = pool().take(bytes);
  return at::from_blob(
      memory, shape, [size = size](void* p) { pool().give(p, size); }, at::TensorOptions().dtype(type));
}

int64_t release_pool() {
  std::lock_guard<std::mutex> guard(pool().lock);
  size_t before = pool().total;
  while (!pool().free.empty()) pool().drop(pool().free.begin());
  return int64_t(before - pool().total);
}

int64_t pool_bytes() {
  std::lock_guard<std::mutex> guard(pool().lock);
  return int64_t(pool().total);
}

}  // namespace dft
