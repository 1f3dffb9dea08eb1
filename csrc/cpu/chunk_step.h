// The chunk step in arithmetic T, as a class template: what its two halves (chunk_statistics.h,
// chunk_gradient.h) share.
#pragma once

#include <limits>

#include "products.h"
#include "step.h"
#include "sums.h"

namespace dft {

// What a step prepares once, in T where it is numbers
struct Tables {
  Tensor potential;             // [V, G]
  int64_t groups = 1;           // G
  Tensor entries;               // of the features [V, K], a CSR matrix
  std::vector<int64_t> filled;  // the vocabulary entries that have features
};

// [R] int64, contiguous
inline Numbers<int64_t> ids_of(const Tensor& ids) {
  Tensor flat = ids.contiguous();
  return {flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel()};
}
// [c], padded with 0; empty where there is one group, whose sums and potential all rows share
inline Numbers<int64_t> groups_of(const ChunkArguments& chunk, int64_t c, int64_t groups) {
  if (!chunk.group || groups == 1) return {};
  Numbers<int64_t> out(c, 0);
  Tensor group = chunk.group->contiguous();
  std::copy_n(group.const_data_ptr<int64_t>(), group.numel(), out.begin());
  return out;
}

// What the second sweep is to sum
struct Swept {
  bool soft = false, mean = false, entropy = false, potential = false;
};

template <class T>
class Step final : public CpuStep {
 public:
  explicit Step(StepArguments arguments);
  Found statistics(const ChunkArguments& chunk, const optional<Tensor>& columns) override;
  void sums(const ChunkArguments& chunk, const Tensor& statistics, const optional<Tensor>& columns) override;
  void gradient(const ChunkArguments& chunk, const Tensor& statistics, const Tensor& features, const Tensor& cotangents,
                const optional<Tensor>& feature_cotangents, const optional<Tensor>& sparse,
                const optional<Tensor>& dhidden, const optional<Tensor>& dweight, const optional<Tensor>& dbias,
                const optional<Tensor>& ddown, const optional<Tensor>& dup, bool first,
                const optional<Tensor>& columns, const optional<SpreadArguments>& spread) override;
  bool keeps_dlogits(const ChunkArguments& chunk) const override;
  Tensor dlogits(const ChunkArguments& chunk) const override;
  void products(const ChunkArguments& chunk, const optional<Tensor>& dhidden, const optional<Tensor>& dweight,
                bool first) const override;
  Tensor favourites() const override { return favourites_; }

 private:
  using Parts = std::vector<Numbers<double>>;  // of each thread: its sums

  StepArguments a_;
  Tables tables_;
  optional<SparseTokens> tokens_;  // of the chunk's sparse target
  Tensor favourites_;

  // whether the divergence's value is left to the gradient's sweep
  bool waits() const {
    return a_.differentiates && wants(kDivergence) && live(kDivergence) && a_.target &&
           kernels<T>().flat[a_.divergence];
  }
  // whether the model is compared with a target, here or in sums()
  bool compares() const { return wants(kDivergence) || wants(kSoftLse); }
  bool wants(Row row) const { return a_.wanted >> row & 1; }
  bool live(Row row) const { return a_.differentiated >> row & 1; }
  static at::TensorOptions options() { return at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value); }
  static int64_t padded_rows(const Tensor& hidden) { return (hidden.size(0) + kLanes - 1) / kLanes * kLanes; }

  // The product of a chunk with a head; its logits are kept in `workspace`.
  Source<T> source(const HeadArguments& head, const Tensor& hidden, const Tensor& workspace,
                   const optional<Tensor>& down = {}, const optional<Tensor>& up = {}) const {
    const int64_t c = padded_rows(hidden);
    return Source<T>(head, hidden, Logits<T>(workspace, a_.vocab, c, head), a_.vocab, c, down, up);
  }

  // Moves a tile's logits at the sparse target's tokens to `to` [R, k], if given, and leaves -inf.
  void take(const Tile<T>& tile, T* to) const {
    tokens_->in_tile(tile.v, [&](int64_t i, int64_t row, int64_t slot) {
      T& z = tile.z[i * tile.c + row];
      if (to) to[slot] = z;
      z = -std::numeric_limits<T>::infinity();
    });
  }

  // out[row] [R] = scale values [c]
  template <class X>
  static void put(const Tensor& out, Row row, const Numbers<X>& values, double scale = 1.0) {
    T* to = out.data_ptr<T>() + row * out.size(1);
    for (int64_t r = 0; r < out.size(1); r++) to[r] = T(values[r] * scale);
  }

  // Weights [c] of the rows in column sums, 0 for padding
  Numbers<T> weights_of(const ChunkArguments& chunk, int64_t c) const {
    if (chunk.weight) return padded<T>(*chunk.weight, c);
    Numbers<T> out(c, T(0));
    std::fill_n(out.begin(), chunk.hidden.size(0), T(1));
    return out;
  }
  // columns [G, V] += tile [G, kTile] at the vocabulary entries v..v+m
  void add_columns(const Tensor& columns, const Numbers<double>& tile, int64_t v, int64_t m) const {
    for (int64_t g = 0; g < columns.size(0); g++) {
      T* to = columns.data_ptr<T>() + g * a_.vocab + v;
      for (int64_t i = 0; i < m; i++) to[i] += T(tile[g * kTile + i]);
    }
  }

  // chunk_statistics.h
  Source<T> teacher_source(const ChunkArguments& chunk) const;
  template <class F>
  void over_blocks(const Source<T>& model, const Source<T>& teacher, bool taught, F f) const;
  void second_sweep(const Logits<T>& model, const Logits<T>& teacher, const ChunkArguments& chunk,
                    const optional<Tensor>& columns, Swept asked, const Merged<T>& lse, const Merged<T>& soft_lse,
                    const Merged<T>& target_lse, const Tensor& out) const;
  void features_of(const Source<T>& model, const Merged<T>& lse, const Tensor& out) const;
  void picks(const Source<T>& model, const Source<T>& teacher, const ChunkArguments& chunk, const Merged<T>& lse,
             const std::vector<Online<T>>& online, const std::vector<Online<T>>& target_online, const Tensor& found,
             const Tensor& out) const;
  // chunk_gradient.h
  void give(const Tile<T>& tile, const T* from, const Gradient<T>& at) const;
};

}  // namespace dft
