// The products of the CPU chunk step: which of the compiled kernels run here, packed operands, threads, and where a
// chunk's logits come from.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>

#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "rows_cpu.h"
#include "step_cpu.h"
#include "tensors.h"

namespace dft {

using at::Tensor;
using std::optional;

// A vector that starts on a cache line: a product whose packed operand does not is a quarter slower.
template <class X>
struct OnCacheLine {
  using value_type = X;
  OnCacheLine() = default;
  template <class Y>
  OnCacheLine(const OnCacheLine<Y>&) {}
  X* allocate(size_t n) { return static_cast<X*>(::operator new(n * sizeof(X), std::align_val_t(64))); }
  void deallocate(X* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const OnCacheLine&) const { return true; }
};
template <class X>
using Numbers = std::vector<X, OnCacheLine<X>>;

// bench/LOG.md says how these were found
constexpr int64_t kTile = 64;     // vocabulary rows a tile: with 512 tokens 128 KB of logits
constexpr int64_t kBlock = 2048;  // vocabulary rows an ATen product
constexpr int64_t kTokens = 64;   // columns of a tile's logits a brgemm call
constexpr int64_t kHidden = 256;  // columns of a tile's dweight a brgemm call

inline std::string instruction_set() {
#if defined(__x86_64__)
  const std::string level = at::get_cpu_capability();  // ATEN_CPU_CAPABILITY may have lowered it
  if (level.rfind("AVX512", 0) == 0) return "avx512";
  if (level == "AVX2") return "avx2";
#endif
  return "baseline";
}

template <class T>
const Kernels<T>& kernels() {
  static const Kernels<T>& chosen = []() -> const Kernels<T>& {
    const std::string level = instruction_set();
    if constexpr (sizeof(T) == 4) {
#if defined(__x86_64__)
      if (level == "avx512") return avx512_float();
      if (level == "avx2") return avx2_float();
#endif
      return baseline_float();
    } else {
#if defined(__x86_64__)
      if (level == "avx512") return avx512_double();
      if (level == "avx2") return avx2_double();
#endif
      return baseline_double();
    }
  }();
  return chosen;
}

// Whether the tile product (bf16 x bf16 -> fp32) runs here: brgemm throws where the processor lacks it.
inline bool has_tile_product() {
  static const bool works = [] {
    Numbers<at::BFloat16> a(2 * 32), b(2 * 32);
    Numbers<float> c(32 * 32);
    try {
      at::native::cpublas::brgemm(32, 32, 2, 2, 32, 32, false, a.data(), b.data(), c.data(), true);
      at::native::cpublas::brgemm_release(true);
    } catch (const std::exception&) {
      return false;
    }
    return true;
  }();
  return works;
}

// c [m, n] (+)= a [m, k] b [k, n], b packed in pairs of k
inline void tile_product(int64_t m, int64_t n, int64_t k, const at::BFloat16* a, int64_t lda, const uint32_t* b,
                         float* c, bool add, int64_t width) {
  for (int64_t j = 0; j < n; j += width)
    at::native::cpublas::brgemm(m, std::min(width, n - j), k, lda, n, n, add, a,
                                reinterpret_cast<const at::BFloat16*>(b + j), c + j, true);
}

// [h / 2][c][2] of x [rows, h], tokens beyond `rows` zero: the right operand of logits
inline Numbers<uint32_t> pack_hidden(const Tensor& x, int64_t c) {
  int64_t rows = x.size(0), pairs = x.size(1) / 2, stride = x.stride(0);
  const auto* in = x.const_data_ptr<at::BFloat16>();
  Numbers<uint32_t> out(pairs * c);
  at::parallel_for(0, pairs, 32, [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t k = begin; k < end; k++) std::memcpy(&out[k * c + r], in + r * stride + 2 * k, 4);
  });
  return out;
}

// [c / 2][h][2] of x [rows, h]: the right operand of dweight
inline Numbers<uint32_t> pack_tokens(const Tensor& x, int64_t c) {
  int64_t rows = x.size(0), h = x.size(1), stride = x.stride(0);
  const auto* in = reinterpret_cast<const uint16_t*>(x.const_data_ptr<at::BFloat16>());
  Numbers<uint32_t> out(c / 2 * h);
  at::parallel_for(0, (rows + 1) / 2, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++)
      for (int64_t k = 0; k < h; k++) {
        uint32_t low = in[2 * p * stride + k], high = 2 * p + 1 < rows ? in[(2 * p + 1) * stride + k] : 0;
        out[p * h + k] = low | high << 16;
      }
  });
  return out;
}

// Runs f(thread, first row, end row) over rows [begin, end), each thread a run of whole tiles.
template <class F>
void share(int64_t begin, int64_t end, F f) {
  int64_t threads = at::get_num_threads(), tiles = (end - begin + kTile - 1) / kTile;
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++)
      f(t, begin + tiles * t / threads * kTile, std::min(end, begin + tiles * (t + 1) / threads * kTile));
  });
}

template <class T>
Numbers<T> padded(const Tensor& row, int64_t c) {
  Numbers<T> out(c, T(0));
  Tensor values = row.to(c10::CppTypeToScalarType<T>::value).contiguous();
  std::memcpy(out.data(), values.const_data_ptr(), values.numel() * sizeof(T));
  return out;
}

// One matrix of logits of the chunk: where they come from, and where they are kept, [V, c]
template <class T>
struct Source {
  const HeadArguments& head;
  Tensor hidden;  // [R, H], or [R, V] where the head has no weight
  Tensor wide;    // hidden in T, where ATen multiplies
  T* logits;
  int64_t vocab, c;
  bool tiles = false;  // multiplied tile by tile
  Numbers<uint32_t> packed;
  Numbers<T> bias;

  Source(const HeadArguments& head, Tensor x, T* logits, int64_t vocab, int64_t c)
      : head(head), hidden(std::move(x)), logits(logits), vocab(vocab), c(c) {
    if (hidden.stride(1) != 1) hidden = hidden.contiguous();
    if (head.weight) {
      tiles = hidden.scalar_type() == at::kBFloat16 && hidden.size(1) % 2 == 0 && hidden.size(1) > 0 &&
              head.weight->stride(1) == 1 && has_tile_product();
      if (tiles)
        packed = pack_hidden(hidden, c);
      else
        wide = hidden.to(c10::CppTypeToScalarType<T>::value);
    }
    if (head.bias) bias = padded<T>(*head.bias, vocab);
  }

  bool blocks() const { return head.weight && !tiles; }
  Finish<T> finish(int64_t v) const { return {bias.empty() ? nullptr : bias.data() + v, T(head.scale), T(head.cap)}; }
  Tensor weight_block(int64_t v, int64_t n) const { return head.weight->narrow(0, v, n).to(wide.scalar_type()); }
  // the logits of vocabulary rows [v, v + n) as a tensor [n, R]
  Tensor view(int64_t v, int64_t n) const {
    return at::from_blob(logits + v * c, {n, hidden.size(0)}, {c, 1}, wide.options());
  }
  void multiply_block(int64_t v, int64_t n) const {
    Tensor out = view(v, n);
    at::mm_out(out, weight_block(v, n), wide.t());
  }
  void fill_tile(int64_t v, int64_t m) const {
    if constexpr (sizeof(T) == 4) {
      if (tiles)
        return tile_product(m, c, hidden.size(1),
                            head.weight->const_data_ptr<at::BFloat16>() + v * head.weight->stride(0),
                            head.weight->stride(0), packed.data(), logits + v * c, false, kTokens);
    }
    if (!head.weight)
      kernels<T>().load(logits + v * c, m, c, hidden.const_data_ptr(), element_of(hidden.scalar_type()), hidden.size(0),
                        hidden.stride(0), v);
  }
};

}  // namespace dft
