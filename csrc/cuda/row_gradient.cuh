// The sweep of RowWork that computes a row's gradient. Internal to each translation unit that includes it.
#pragma once

#include "row_work.cuh"

namespace dft::cuda {
namespace {

// draw [V], by the formula at the head of row_work.cuh: `base` is the factor of q that no column changes, `every` is
// added to all columns, `hit` to the label's. Zero where every cotangent is zero, even if the row holds NaN.
template <class T, class D, bool Present>
__device__ __forceinline__ void RowWork<T, D, Present>::differentiate(const Known<T>& known, int64_t label,
                                                                      bool summed) const {
  using M = Math<T>;
  T lse_by = cotangent(kLse), hit = cotangent(kLogProb), every = cotangent(kMeanLogProb);
  const T entropy_by = cotangent(kEntropy), pulled_by = cotangent(kPotential), soft_by = cotangent(kDivergence);
  if (a.live & kLseBit && a.lse_slope) lse_by += static_cast<const T*>(a.lse_slope)[row] * known.one.lse;
  const bool active = lse_by != 0 || hit != 0 || every != 0 || entropy_by != 0 || pulled_by != 0 || soft_by != 0;
  if (a.live & kLogProbBit && !(label >= 0 && label < a.vocab)) hit = T(NAN);
  T base = lse_by - hit - every;
  if (a.live & kEntropyBit) base -= entropy_by * known.entropy;
  if (a.live & kPotentialBit) base -= pulled_by * known.pulled;
  every /= T(a.vocab);
  const T scale = T(a.finish.scale), cap = T(a.finish.cap);
  const bool at_one = a.live & kAtOne, compared = Present && (summed || a.live & kDivergenceBit);
  T value[1] = {0};
  for (int step = steps() - 1; step >= 0; step--) {  // backwards: see rows.cu
    const int64_t at = begin(step);
    const int n = inside<T>(at, a.vocab);
    T z[kGroup<T>], dz[kGroup<T>] = {};
    if (n > 0) {
      logits(z, at, n);
      if (at_one) {
#pragma unroll
        for (int i = 0; i < kGroup<T>; i++) {
          const T lq = known.one.of(z[i]), q = M::exp(lq);
          T factor = base;
          if (a.live & kEntropyBit) factor -= entropy_by * lq;
          if (a.live & kPotentialBit && i < n) factor += pulled_by * pull[at + i];
          dz[i] = times(q, factor) + every + (at + i == label ? hit : T(0));
        }
      }
      if (compared) {
        T t[kGroup<T>];
        target(t, at, n);
#pragma unroll
        for (int i = 0; i < kGroup<T>; i++) {
          T f = 0, g = 0, q = 0;
          evaluate(z, t, known, i, f, g, q);
          if (summed) value[0] += f;
          if (!D::flat) g -= times(q, known.slope);
          if (a.live & kDivergenceBit) dz[i] += soft_by * T(a.inverse) * g;
        }
      }
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++) {
        if (cap != T(0)) dz[i] *= T(1) - (z[i] / cap) * (z[i] / cap);
        dz[i] = active ? dz[i] * scale : T(0);
      }
    }
    if (a.in_place) __syncthreads();  // all have read the step before any of it is written
    if (n > 0) store(dz, a.out, row, at, n);
  }
  if (summed) {
    block_sum<kWarps>(value, scratch);
    put(kDivergence, value[0]);
  }
}

}  // namespace
}  // namespace dft::cuda
