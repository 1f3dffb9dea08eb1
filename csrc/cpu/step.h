// The chunk step on the CPU, as dft_kernels/backends/native.py drives it.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <tuple>

namespace dft {

// hidden states to logits: cap(scale * (hidden weight.T + bias)); no weight: the "hidden states" are logits. cap 0:
// none
struct HeadArguments {
  std::optional<at::Tensor> weight, bias;
  double scale = 1.0, cap = 0.0;
};

// The constants of a call; wanted and differentiated are sets of bits 1 << Row (backends/contract.py).
struct StepArguments {
  HeadArguments model;
  std::optional<at::Tensor> up;  // [V, r]: hidden weight.T + down up.T
  int64_t vocab = 0;
  int64_t wanted = 0, differentiated = 0;
  bool differentiates = false;  // whether gradient() follows every statistics()
  int64_t divergence = 0;
  double parameter = 0.0, temperature = 1.0, teacher_temperature = 1.0;
  std::optional<at::Tensor> potential;                                       // [G, V]
  std::optional<at::Tensor> feature_rows, feature_columns, feature_entries;  // CSR of features [V, K]
  int64_t features = 0;                                                      // K
  at::Tensor logits;                 // workspace of V x (rows rounded up to 32) numbers, fp32 or fp64
  std::optional<at::Tensor> target;  // the same for the target's logits
};

struct ChunkArguments {
  at::Tensor hidden;                               // [R, H] or [R, V]
  std::optional<at::Tensor> label, group, weight;  // [R]
  std::optional<at::Tensor> target;                // the teacher's hidden states [R, Ht], or logits [R, V]
  HeadArguments teacher;
  std::optional<at::Tensor> index;      // [R, k]: the tokens of a sparse target, which stands in for `target`
  std::optional<at::Tensor> favourite;  // [R]: the likeliest of them
  std::optional<at::Tensor> down;       // [R, r], where the step has `up`
};

class CpuStep {
 public:
  virtual ~CpuStep() = default;
  // Row quantities [rows, R] and features [R, K]; adds to columns [G, V]; leaves the logits in the workspace, and the
  // value of a flat divergence to gradient(), if that follows: it then writes it into `statistics`. Of a sparse target
  // the finished logits at its tokens [R, k] and the log-sum-exp of z / T outside of them with what its rounding
  // dropped [2, R]; DIVERGENCE and SLOPE are then the caller's to write.
  virtual std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> statistics(
      const ChunkArguments& chunk, const std::optional<at::Tensor>& columns) = 0;
  // dhidden [R, H] and ddown [R, r] written; dweight [V, H], dbias [V] and dup [V, r] written by the first chunk, added
  // to by the others. sparse [R, k]: the whole gradient with respect to the raw logits at a sparse target's tokens.
  // columns as in statistics(), for one of the two; not here with a sparse target, whose tokens this sweep skips.
  virtual void gradient(const ChunkArguments& chunk, const at::Tensor& statistics, const at::Tensor& features,
                        const at::Tensor& cotangents, const std::optional<at::Tensor>& feature_cotangents,
                        const std::optional<at::Tensor>& sparse, const std::optional<at::Tensor>& dhidden,
                        const std::optional<at::Tensor>& dweight, const std::optional<at::Tensor>& dbias,
                        const std::optional<at::Tensor>& ddown, const std::optional<at::Tensor>& dup, bool first,
                        const std::optional<at::Tensor>& columns) = 0;
};

std::unique_ptr<CpuStep> make_step(StepArguments arguments);
bool multiplies_bf16();  // whether bf16 products go tile by tile
at::Tensor repeats(const at::Tensor& ids,
                   int64_t vocab);  // [N] bool: rows of ids [N, k] with an id of 0..vocab-1 twice
at::Tensor evaluate(int64_t function, const at::Tensor& x);  // the kernels' exp, expm1, ..., for tests

}  // namespace dft
