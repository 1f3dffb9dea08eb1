// The chunk step on the CPU, as dft_kernels/backends/native.py drives it.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <tuple>

namespace dft {

// The logits of hidden states [R, H]: cap tanh(scale (hidden weight.T + bias) / cap); cap 0: no softcap. Without a
// weight the "hidden states" are raw logits [R, V].
struct HeadArguments {
  std::optional<at::Tensor> weight, bias;  // [V, H], [V]
  double scale = 1.0, cap = 0.0;
};

// The constants of a call. wanted, differentiated: sets of bits 1 << Row (common/element.h)
struct StepArguments {
  HeadArguments model;
  std::optional<at::Tensor> up;  // [V, r]: hidden weight.T + down up.T
  int64_t vocab = 0;
  int64_t wanted = 0, differentiated = 0;
  bool differentiates = false;  // whether gradient() follows every statistics()
  bool favourites = false;      // whether favourites() follows
  int64_t divergence = 0;
  double parameter = 0.0, temperature = 1.0, teacher_temperature = 1.0;
  std::optional<at::Tensor> potential;                                       // [G, V]
  std::optional<at::Tensor> feature_rows, feature_columns, feature_entries;  // CSR of features [V, K]
  int64_t features = 0;                                                      // K
  // Workspaces of V x (R rounded up to 32) numbers, for the model's logits and the target's: fp32 or fp64, or bf16 or
  // fp16, to which raw logits and their bias are then rounded
  at::Tensor logits;
  std::optional<at::Tensor> target;
};

// How far each column of a chunk's dlogits reaches: what it is worth to multiply it
struct SpreadArguments {
  at::Tensor reach;             // [R]: norms of the rows of hidden
  at::Tensor squares, reached;  // [V], written: sums over rows of dlogits^2, of |dlogits| reach; in T
};

struct ChunkArguments {
  at::Tensor hidden;                               // [R, H] or [R, V]
  std::optional<at::Tensor> label, group, weight;  // [R]
  std::optional<at::Tensor> target;                // the teacher's hidden states [R, Ht] or raw logits [R, V]
  HeadArguments teacher;
  std::optional<at::Tensor> index;      // [R, k]: the tokens of a sparse target, instead of `target`; below 0: none
  std::optional<at::Tensor> favourite;  // [R]: the likeliest of them
  std::optional<at::Tensor> down;       // [R, r], where the step has `up`
};

class CpuStep {
 public:
  using Found = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
  virtual ~CpuStep() = default;
  // Returns row statistics [kRows, R] and features [R, K], adds to columns [G, V], and leaves the logits in the
  // workspace. The value of a flat divergence (common/divergence.h) is left to gradient() if that follows, which writes
  // it into `statistics`. With a sparse target also returns the finished logits at its tokens [R, k], and the
  // log-sum-exp of z / T outside of them with its rounding error [2, R]; the caller then writes kDivergence and kSlope.
  virtual Found statistics(const ChunkArguments& chunk, const std::optional<at::Tensor>& columns) = 0;
  // Between the two halves, where the columns are a part of a vocabulary whose log-sum-exps `statistics` hold: these
  // columns' sums kDivergence and kSlope of a dense target into `statistics`, where kSoftLse stands in `wanted` for the
  // former; and their share of columns [G, V].
  virtual void sums(const ChunkArguments& chunk, const at::Tensor& statistics,
                    const std::optional<at::Tensor>& columns) = 0;
  // Writes dhidden [R, H] and ddown [R, r]; writes (first) or adds to dweight [V, H], dbias [V] and dup [V, r].
  // statistics, features, columns: of statistics(); cotangents [kCorrect, R], feature_cotangents [R, K]. sparse [R, k]:
  // the gradient with respect to the raw logits at a sparse target's tokens. columns are passed to one of the two
  // functions; not to this one with a sparse target, whose tokens its sweep skips. spread: asked for, dhidden and
  // dweight are left alone, and dlogits() has what products() or the caller may multiply.
  virtual void gradient(const ChunkArguments& chunk, const at::Tensor& statistics, const at::Tensor& features,
                        const at::Tensor& cotangents, const std::optional<at::Tensor>& feature_cotangents,
                        const std::optional<at::Tensor>& sparse, const std::optional<at::Tensor>& dhidden,
                        const std::optional<at::Tensor>& dweight, const std::optional<at::Tensor>& dbias,
                        const std::optional<at::Tensor>& ddown, const std::optional<at::Tensor>& dup, bool first,
                        const std::optional<at::Tensor>& columns, const std::optional<SpreadArguments>& spread) = 0;
  // Whether dlogits stand whole in the workspace after gradient()
  virtual bool keeps_dlogits(const ChunkArguments& chunk) const = 0;
  // [V, R], after gradient(): a view of the workspace
  virtual at::Tensor dlogits(const ChunkArguments& chunk) const = 0;
  // dhidden and dweight from all of dlogits()
  virtual void products(const ChunkArguments& chunk, const std::optional<at::Tensor>& dhidden,
                        const std::optional<at::Tensor>& dweight, bool first) const = 0;
  // [R]: the vocabulary entry that a dense target of the last chunk is largest at, where `favourites` asks for it
  virtual at::Tensor favourites() const = 0;
  // statistics() and gradient(), for cotangents that need no statistics and a target that is not sparse
  Found both(const ChunkArguments& chunk, const at::Tensor& cotangents,
             const std::optional<at::Tensor>& feature_cotangents, const std::optional<at::Tensor>& dhidden,
             const std::optional<at::Tensor>& dweight, const std::optional<at::Tensor>& dbias,
             const std::optional<at::Tensor>& ddown, const std::optional<at::Tensor>& dup, bool first,
             const std::optional<at::Tensor>& columns) {
    Found found = statistics(chunk, {});
    gradient(chunk, std::get<0>(found), std::get<1>(found), cotangents, feature_cotangents, {}, dhidden, dweight, dbias,
             ddown, dup, first, columns, {});
    return found;
  }
};

std::unique_ptr<CpuStep> make_step(StepArguments arguments);
bool multiplies_bf16();  // whether bf16 products run tile by tile
// [N] bool: whether a row of ids [N, k] holds one of 0..vocab-1 twice
at::Tensor repeats(const at::Tensor& ids, int64_t vocab);
// Whether target [N] holds ids of 0..vocab-1 alone and never `ignored`
bool all_labels(const at::Tensor& target, int64_t vocab, int64_t ignored);
// The kernels' exp, expm1, log1p, tanh, exp_any of x, for tests of their accuracy
at::Tensor evaluate(int64_t function, const at::Tensor& x);

}  // namespace dft
