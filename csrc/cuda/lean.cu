// Which rows the lean kernels take, how these are cut, and which of the kernels it is.
#include "lean.h"
#include "online.cuh"

namespace dft::cuda {
namespace {

// The smallest cluster whose blocks can hold a row in registers and in at least one stage of shared memory
Plan cut(const RowArguments& a) {
  const int bytes = bytes_of(a.logits.element) + (a.target.data ? bytes_of(a.target.element) : 0);
  const int64_t arena = cluster_arena() - kLeanWorkspace;
  for (int columns : {32, 64}) {
    if (columns == 64 && a.target.data) break;  // a thread has no registers for as many targets
    for (int blocks = 1; blocks <= (a.target.data ? kMostBlocks : 8); blocks *= 2) {
      const int64_t part = (a.vocab + blocks * 8 - 1) / (blocks * 8) * 8;
      const int64_t stages = arena / (part * bytes);
      if (part <= kLeanThreads * columns && stages > 0)
        return {int(part), blocks, int(stages < kMostStages ? stages : kMostStages), int(part * bytes), columns, {}};
    }
  }
  return {};
}

}  // namespace

bool fits_lean(const RowArguments& a) {
  const auto whole = [](const Matrix& m) {  // 16-byte aligned rows
    return !m.data || (reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * bytes_of(m.element) % 16 == 0);
  };
  const bool compared = a.divergence < LeanDivergences::size, none = a.divergence == kDivergences;
  const int asked = a.wanted | a.live;
  return a.wanted && !a.given && !(asked & (1 << kPotential | 1 << kSoftLse)) && (compared || (none && !a.target.data)) &&
         a.logits.element != Element::f64 && a.target.element != Element::f64 && whole(a.logits) && whole(a.target) &&
         whole(a.out) && a.rows < 1 << 30 && a.logits.padded && (!a.target.data || a.target.padded) &&
         cut(a).blocks > 0;
}

const char* launch_lean_rows(const RowArguments& a, CUstream_st* stream) {
  Plan plan = cut(a);
  const bool compared = a.target.data;
  plan.inverse = float(a.inverse), plan.target_inverse = float(a.target_inverse), plan.parameter = float(a.parameter);
  plan.scale = float(a.finish.scale), plan.cap = float(a.finish.cap);
  plan.inverse_cap = plan.cap == 0 ? 0 : 1 / plan.cap;
  plan.target_scale = float(a.target_finish.scale), plan.target_cap = float(a.target_finish.cap);
  plan.same = a.inverse == 1.0, plan.one = ((a.wanted | a.live) & kAtOne) || (compared && plan.same);
  plan.tracked = a.wanted & (1 << kCorrect | 1 << kAgreement);
  plan.used = plan.one << kTotal | (a.wanted >> kEntropy & 1) << kEntropySum | (a.wanted >> kMeanLogProb & 1) << kMean;
  if (compared) plan.used |= !plan.same << kSoftTotal | 1 << kJoint | 1 << kTargetTotal;
  if (plan.columns == 64) return launch_lean<None, 64>(a, plan, stream);
  return with_pair<float>(LeanDivergences(), a.divergence,
                          [&](auto pair) { return launch_lean<typename decltype(pair)::type, 32>(a, plan, stream); });
}

}  // namespace dft::cuda
