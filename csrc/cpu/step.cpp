// The chunk step on the CPU: products, the three sweeps of rows.h over tiles of logits that are in the cache, products
// again.
//
// Logits are kept transposed, [V, c]: the weight's rows are then the left operand as they are stored, and only the
// small chunk of hidden states is packed. Where the processor multiplies bf16 (AVX512-BF16, AMX) each thread goes over
// its part of the vocabulary tile by tile: product, sweep, next tile; in the gradient sweep, then the product of the
// tile's dlogits into the fp32 dweight. Elsewhere, and for other dtypes, ATen multiplies a block of the vocabulary at a
// time in fp32 (fp64), after a conversion if need be, and the same sweeps follow. Threads own disjoint rows of the
// vocabulary, and their sums are reduced in the order of the threads: no atomics, the same bits for the same number of
// threads.
#include "step.h"

#include "chunk_gradient.h"
#include "chunk_statistics.h"

namespace dft {

template <class T>
Step<T>::Step(StepArguments arguments) : a_(std::move(arguments)) {
  auto type = c10::CppTypeToScalarType<T>::value;
  if (a_.potential) {
    tables_.potential = a_.potential->to(type).t().contiguous();
    tables_.groups = tables_.potential.size(1);
  }
  if (a_.feature_entries) {
    tables_.entries = a_.feature_entries->to(type).contiguous();
    const int64_t* start = a_.feature_rows->const_data_ptr<int64_t>();
    for (int64_t v = 0; v < a_.vocab; v++)
      if (start[v + 1] > start[v]) tables_.filled.push_back(v);
  }
}

bool multiplies_bf16() { return has_tile_product(); }

std::unique_ptr<CpuStep> make_step(StepArguments arguments) {
  TORCH_CHECK(0 <= arguments.divergence && arguments.divergence < kDivergences,
              "dft_kernels: divergence must be one of the ", kDivergences, " that the CPU kernels were built with, got id ",
              arguments.divergence, ". Rebuild them: pip install --no-build-isolation -e .");
  if (arguments.logits.scalar_type() == at::kDouble) return std::make_unique<Step<double>>(std::move(arguments));
  return std::make_unique<Step<float>>(std::move(arguments));
}

at::Tensor repeats(const at::Tensor& ids, int64_t vocab) {
  const at::Tensor in = ids.contiguous();
  const int64_t rows = in.size(0), k = in.size(1);
  at::Tensor out = at::zeros({rows}, in.options().dtype(at::kBool));
  const int64_t* from = in.const_data_ptr<int64_t>();
  bool* to = out.data_ptr<bool>();
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> last(vocab, -1);  // the row that an id was last seen in
    for (int64_t r = begin; r < end; r++)
      for (int64_t j = r * k; j < (r + 1) * k; j++) {
        if (from[j] < 0 || from[j] >= vocab) continue;
        to[r] |= last[from[j]] == r;
        last[from[j]] = int32_t(r);
      }
  });
  return out;
}

bool all_labels(const at::Tensor& target, int64_t vocab, int64_t ignored) {
  const int64_t *from = target.const_data_ptr<int64_t>(), stride = target.stride(0);
  for (int64_t n = 0; n < target.size(0); n++)
    if (from[n * stride] < 0 || from[n * stride] >= vocab || from[n * stride] == ignored) return false;
  return true;
}

at::Tensor evaluate(int64_t function, const at::Tensor& x) {
  at::Tensor in = x.contiguous(), out = at::empty_like(in);
  TORCH_CHECK(in.numel() % kLanes == 0, "dft_kernels: evaluate needs a multiple of ", kLanes, " numbers");
  if (in.scalar_type() == at::kDouble)
    kernels<double>().evaluate(int(function), in.const_data_ptr<double>(), out.data_ptr<double>(), in.numel());
  else
    kernels<float>().evaluate(int(function), in.const_data_ptr<float>(), out.data_ptr<float>(), in.numel());
  return out;
}

}  // namespace dft
