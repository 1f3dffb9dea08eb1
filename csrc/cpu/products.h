// The products of the CPU chunk step, in bf16 by brgemm or by ATen: choice of the compiled kernels, packed operands,
// division of the vocabulary among threads, logits = hidden weight.T and the products of their gradient.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>

#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "memory.h"
#include "rows.h"
#include "step.h"
#include "common/tensors.h"

namespace dft {

using at::Tensor;
using std::optional;

// An allocator of cache-line aligned vectors: with an unaligned packed operand a product is a quarter slower.
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

// Measured, see bench/LOG.md
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

// Whether bf16 x bf16 -> fp32 by brgemm runs here: it throws where the processor lacks the instructions.
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

// f(thread, first, end) for each thread's part of the vocabulary rows [begin, end), a run of whole tiles
template <class F>
void share(int64_t begin, int64_t end, F f) {
  int64_t threads = at::get_num_threads(), tiles = (end - begin + kTile - 1) / kTile;
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++)
      f(t, begin + tiles * t / threads * kTile, std::min(end, begin + tiles * (t + 1) / threads * kTile));
  });
}

// [n] numbers as T [c], padded with 0
template <class T>
Numbers<T> padded(const T* from, int64_t n, int64_t c) {
  Numbers<T> out(c, T(0));
  if (n > 0) std::memcpy(out.data(), from, n * sizeof(T));
  return out;
}
template <class T>
Numbers<T> padded(const Tensor& x, int64_t c) {
  const Tensor values = x.to(c10::CppTypeToScalarType<T>::value).contiguous();
  return padded(values.const_data_ptr<T>(), values.numel(), c);
}

// One product of a chunk's logits: left [R, K] (hidden states) times the transpose of right [V, K] (a head).
template <class T>
struct Factor {
  Tensor left, right, wide;  // wide: left in T, where ATen multiplies
  bool tiles;                // bf16, multiplied tile by tile by brgemm
  Numbers<uint32_t> packed;  // left, by pack_hidden

  Factor(Tensor x, const Tensor& w, int64_t c, bool tiles) : left(std::move(x)), right(w), tiles(tiles) {
    if (left.stride(1) != 1) left = left.contiguous();
    if (!tiles) {
      wide = left.to(c10::CppTypeToScalarType<T>::value);
      return;
    }
    const bool odd = left.size(1) % 2;  // operands are packed in pairs
    if (odd) right = at::constant_pad_nd(right, {0, 1});
    if (right.stride(1) != 1) right = right.contiguous();
    packed = pack_hidden(odd ? at::constant_pad_nd(left, {0, 1}) : left, c);
  }

  Tensor block(int64_t v, int64_t n) const { return right.narrow(0, v, n).to(wide.scalar_type()); }
  // out [n, R] (+)= the logits of vocabulary rows [v, v + n)
  void multiply_block(Tensor out, int64_t v, int64_t n, bool add) const {
    if (add)
      at::addmm_out(out, out, block(v, n), wide.t());
    else
      at::mm_out(out, block(v, n), wide.t());
  }
  void multiply_tile(float* out, int64_t v, int64_t m, int64_t c, bool add) const {
    tile_product(m, c, right.size(1), right.const_data_ptr<at::BFloat16>() + v * right.stride(0), right.stride(0),
                 packed.data(), out, add, kTokens);
  }
};

// The gradients of a factor: dleft [R, K] = dlogits right, dright [V, K] (+)= dlogits.T left
template <class T>
class FactorGradient {
 public:
  FactorGradient(const Factor<T>& factor, const optional<Tensor>& dleft, const optional<Tensor>& dright, int64_t c,
                 bool first)
      : factor_(factor), dleft_(dleft), dright_(dright), c_(c), k_(factor.left.size(1)), first_(first) {
    rounds_ = dright && dright->scalar_type() != c10::CppTypeToScalarType<T>::value;
    if (factor.tiles) {
      if (dright) packed_ = pack_tokens(factor.left, c);
      if (rounds_) rounding_.assign(at::get_num_threads(), Numbers<float>(kTile * k_));
    } else if (dleft) {
      wide_ =
          dleft->scalar_type() == factor.wide.scalar_type() ? *dleft : at::empty(dleft->sizes(), factor.wide.options());
    }
  }

  // dright of vocabulary rows [v, v + m), from bf16 dlogits [m, c]
  void tile(int64_t thread, int64_t v, int64_t m, const Dlogits& dlogits) {
    if constexpr (sizeof(T) == 4) {
      if (!factor_.tiles || !dright_) return;
      float* to = rounds_ ? rounding_[thread].data() : dright_->template data_ptr<float>() + v * k_;
      tile_product(m, k_, c_, static_cast<const at::BFloat16*>(dlogits.to), dlogits.stride, packed_.data(), to,
                   !rounds_ && !first_, kHidden);
      if (rounds_)
        kernels<T>().round(to, nullptr, m, k_, dright_->template data_ptr<at::BFloat16>() + v * k_, Element::bf16);
    }
  }
  // both, from dlogits [n, R] of vocabulary rows [v, v + n), where ATen multiplies
  void block(int64_t v, int64_t n, const Tensor& dlogits) {
    if (dright_) {
      Tensor out = dright_->narrow(0, v, n);
      if (rounds_)
        out.copy_(at::mm(dlogits, factor_.wide));
      else
        at::addmm_out(out, out, dlogits, factor_.wide, first_ ? 0.0 : 1.0);
    }
    if (dleft_) at::addmm_out(wide_, wide_, dlogits.t(), factor_.block(v, n), v == 0 ? 0.0 : 1.0);
  }
  // dleft, from the dlogits [R, V] of all tiles
  void finish(const Dlogits& all, int64_t vocab) {
    if (!dleft_) return;
    Tensor out = *dleft_;
    if (!factor_.tiles) {
      if (!wide_.is_same(out)) out.copy_(wide_);
      return;
    }
    Tensor dlogits = at::from_blob(all.to, {out.size(0), vocab}, {1, all.stride}, out.options());
    at::mm_out(out, dlogits, factor_.right.narrow(1, 0, k_));
  }

 private:
  const Factor<T>& factor_;
  optional<Tensor> dleft_, dright_;
  int64_t c_, k_;
  bool first_, rounds_;
  Numbers<uint32_t> packed_;
  std::vector<Numbers<float>> rounding_;  // of each thread: a tile of dright before it is rounded
  Tensor wide_;                           // dleft in T
};

// A chunk's logits [V, c] of one model between sweeps. Those of T are swept where they are held. Narrow ones take half
// the memory; a thread sweeps a copy of a tile, finished, in T, which stays in its cache.
template <class T>
class Logits {
 public:
  Logits() = default;
  Logits(const Tensor& workspace, int64_t vocab, int64_t c, const HeadArguments& head)
      : held_{nullptr, c, element_of(workspace.scalar_type()), {nullptr, T(head.scale), T(head.cap)}} {
    TORCH_CHECK(workspace.numel() >= vocab * c, "dft_kernels: workspace too small");
    held_.z = narrow() ? workspace.data_ptr() : workspace.data_ptr<T>();
    if (narrow()) copies_ = pooled({at::get_num_threads(), kTile * c}, c10::CppTypeToScalarType<T>::value);
  }

  bool narrow() const { return held_.narrow(); }
  const Held<T>& held() const { return held_; }
  // [m, c] of T: where the tile of vocabulary rows from v on is computed and swept
  T* tile(int64_t thread, int64_t v) const {
    return narrow() ? copies_.data_ptr<T>() + thread * kTile * held_.c : static_cast<T*>(held_.z) + v * held_.c;
  }
  // The same with its finished logits
  T* read(int64_t thread, int64_t v, int64_t m) const {
    T* out = tile(thread, v);
    if (narrow()) kernels<T>().widen(held_, v, m, 0, held_.c, out);
    return out;
  }
  // Narrow logits are held: raw ones [m, c] and their bias [m], rounded.
  void hold(const T* raw, const T* bias, int64_t v, int64_t m) const {
    kernels<T>().round(raw, bias, m, held_.c, row(v), held_.element);
  }
  uint16_t* row(int64_t v) const { return static_cast<uint16_t*>(held_.z) + v * held_.c; }  // of narrow logits
  // One finished logit
  T at(int64_t v, int64_t token) const {
    if (!narrow()) return static_cast<const T*>(held_.z)[v * held_.c + token];
    T lanes[kLanes];
    kernels<T>().widen(held_, v, 1, token / kLanes * kLanes, kLanes, lanes);
    return lanes[token % kLanes];
  }

 private:
  Held<T> held_{};
  Tensor copies_;  // [threads, kTile c]
};

// Whether bf16 products with a head run tile by tile
inline bool by_tiles(const HeadArguments& head, const Tensor& hidden) {
  return head.weight && hidden.scalar_type() == at::kBFloat16 && hidden.size(1) % 2 == 0 && hidden.size(1) > 0 &&
         head.weight->stride(1) == 1 && has_tile_product();
}

// A chunk's logits of one model, and the products that make them
template <class T>
struct Source {
  const HeadArguments& head;
  Tensor hidden;  // [R, H], or [R, V] where the head has no weight
  Logits<T> logits;
  int64_t vocab, c;
  std::vector<Factor<T>> factors;  // hidden and weight, then down and up of a low-rank adapter; none: given logits
  Numbers<T> bias;
  Tensor apart;  // [kBlock, c]: a block that ATen multiplies, and then its gradient, where logits are narrow

  Source(const HeadArguments& head, Tensor x, Logits<T> held, int64_t vocab, int64_t c,
         const optional<Tensor>& down = {}, const optional<Tensor>& up = {})
      : head(head), hidden(std::move(x)), logits(std::move(held)), vocab(vocab), c(c) {
    if (hidden.stride(1) != 1) hidden = hidden.contiguous();
    if (head.weight) {
      const bool tiles = by_tiles(head, hidden);
      factors.emplace_back(hidden, *head.weight, c, tiles);
      if (down) factors.emplace_back(*down, *up, c, tiles);
    }
    if (head.bias) bias = padded<T>(*head.bias, vocab);
    if (blocks() && logits.narrow())
      apart = pooled({std::min(kBlock, vocab), c}, c10::CppTypeToScalarType<T>::value);
  }

  bool tiles() const { return !factors.empty() && factors[0].tiles; }
  bool blocks() const { return !factors.empty() && !factors[0].tiles; }
  // What sweep 1 is left to do
  Finish<T> finish(int64_t v) const {
    if (logits.narrow()) return {nullptr, T(1), T(0)};
    return {bias.empty() ? nullptr : bias.data() + v, T(head.scale), T(head.cap)};
  }
  // Where ATen's product of a block has the vocabulary row v
  T* in_block(int64_t v) const {
    return apart.defined() ? apart.data_ptr<T>() + v % kBlock * c : logits.tile(0, v);
  }
  // [n, R]: the logits of vocabulary rows [v, v + n), or their gradient
  Tensor view(int64_t v, int64_t n) const {
    return at::from_blob(in_block(v), {n, hidden.size(0)}, {c, 1}, factors[0].wide.options());
  }
  void multiply_block(int64_t v, int64_t n) const {
    for (size_t i = 0; i < factors.size(); i++) factors[i].multiply_block(view(v, n), v, n, i > 0);
  }
  // A tile of raw logits, or finished ones if they are narrow; after multiply_block, where ATen multiplies
  T* fill_tile(int64_t thread, int64_t v, int64_t m) const {
    T* tile = logits.tile(thread, v);
    if constexpr (sizeof(T) == 4)
      if (tiles())
        for (size_t i = 0; i < factors.size(); i++) factors[i].multiply_tile(tile, v, m, c, i > 0);
    if (!head.weight)
      kernels<T>().load(tile, m, c, hidden.const_data_ptr(), element_of(hidden.scalar_type()), hidden.size(0),
                        hidden.stride(0), v);
    if (!logits.narrow()) return tile;
    logits.hold(blocks() ? in_block(v) : tile, bias.empty() ? nullptr : bias.data() + v, v, m);
    return logits.read(thread, v, m);
  }
  // Where the gradient of a tile goes: over its logits; in bf16 where that is multiplied; into ATen's block
  Dlogits dlogits(T* tile, int64_t v) const {
    if (!tiles()) return {blocks() ? in_block(v) : tile, c, false};
    return logits.narrow() ? Dlogits{logits.row(v), c, true} : Dlogits{tile, 2 * c, true};
  }
};

}  // namespace dft
