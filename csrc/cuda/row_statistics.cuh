// The sweeps of RowWork that compute a row's statistics. Internal to each translation unit that includes it.
#pragma once

#include "row_work.cuh"

namespace dft::cuda {
namespace {

// The first sweep: the online log-sum-exps of z, z / T and the target, what is accumulated beside them, the argmaxima;
// and from these, once all threads' are reduced, every statistic but the divergence:
//
//     lse = top + log sum exp(z - top)                  mean log q = sum z / V - lse
//     H   = log sum exp(z - top) - <q, z - top>         <q, G>     = sum exp(z - top) G / sum exp(z - top)
template <class T, class D, bool Present>
__device__ __forceinline__ void RowWork<T, D, Present>::measure(Known<T>& known, int64_t label, bool separate) const {
  using M = Math<T>;
  const bool same = a.inverse == 1.0, one = (a.wanted & kAtOne) || (Present && same), soft = Present && !same;
  const bool entropy = a.wanted & kEntropyBit, pulled = a.wanted & kPotentialBit, agrees = a.wanted & kAgreementBit;
  const T inverse = T(a.inverse), target_inverse = T(a.target_inverse);
  const bool valid = label >= 0 && label < a.vocab;
  T z_y[kGroup<T>] = {};  // read now: `out` may be memory of logits
  if (a.wanted & kLogProbBit) read(z_y, a.logits, a.finish, row, valid ? label : 0, 1);
  Measured<T> s = {lowest<T>(), lowest<T>(), 0, 0, {}};
  for (int step = 0; step < steps(); step++) {
    const int64_t at = begin(step);
    const int n = inside<T>(at, a.vocab);
    T z[kGroup<T>], t[kGroup<T>];
    if (n > 0) {
      logits(z, at, n);
      T high = s.top, target_high = s.target_top;
      int which = -1;
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++)
        if (z[i] > high) high = z[i], which = i;
      if (which >= 0) s.best = at + which;
      if (Present || agrees) {
        target(t, at, n);
        int target_which = -1;
#pragma unroll
        for (int i = 0; i < kGroup<T>; i++)
          if (t[i] > target_high) target_high = t[i], target_which = i;
        if (target_which >= 0) s.target_best = at + target_which;
      }
      if (high > s.top || target_high > s.target_top) s.raise(high, target_high, inverse, target_inverse);
      if (one) {
#pragma unroll
        for (int i = 0; i < kGroup<T>; i++) {
          const T e = M::exp(z[i] - s.top);
          s.sums[kTotal] += e;
          if (entropy) s.sums[kEntropySum] += times(e, z[i] - s.top);
          if (pulled && i < n) s.sums[kPulled] += e * pull[at + i];
          if (Present && D::linear && same) s.sums[kJoint] += times(e, z[i] - t[i] * target_inverse);
        }
      }
      if (soft) {
#pragma unroll
        for (int i = 0; i < kGroup<T>; i++) {
          const T e = M::exp((z[i] - s.top) * inverse);
          s.sums[kSoftTotal] += e;
          if (D::linear) s.sums[kJoint] += times(e, z[i] * inverse - t[i] * target_inverse);
        }
      }
      if (a.wanted & kMeanBit) {
#pragma unroll
        for (int i = 0; i < kGroup<T>; i++) s.sums[kMean] += i < n ? z[i] : T(0);
      }
      if (Present || agrees) {
#pragma unroll
        for (int i = 0; i < kGroup<T>; i++) s.sums[kTargetTotal] += M::exp((t[i] - s.target_top) * target_inverse);
      }
    }
  }

  T top = s.top, target_top = s.target_top;
  block_max<kWarps>(top, s.best, scratch);
  block_max<kWarps>(target_top, s.target_best, scratch);
  s.raise(top, target_top, inverse, target_inverse);
  block_sum<kWarps>(s.sums, scratch);
  const T total = s.sums[kTotal], soft_total = same ? total : s.sums[kSoftTotal];
  if (one) {
    known.one.set(s.top, total);
    put(kLse, known.one.lse);
    put(kLseLow, known.one.low);
  }
  if (a.wanted & kLogProbBit) put(kLogProb, valid ? known.one.of(z_y[0]) : T(NAN));
  if (a.wanted & kMeanBit) put(kMeanLogProb, known.one.of(s.sums[kMean] / T(a.vocab)));
  if (entropy) put(kEntropy, known.entropy = std::log(total) - s.sums[kEntropySum] / total);
  if (pulled) put(kPotential, known.pulled = s.sums[kPulled] / total);
  if (a.wanted & kCorrectBit) put(kCorrect, T(s.best == label));
  if (agrees) {
    put(kAgreement, T(s.best == s.target_best));
    put(kTargetTop, s.target_top);
  }
  if (a.wanted & (kCorrectBit | kAgreementBit)) put(kTop, s.top);
  if constexpr (Present) {
    known.target.set(s.target_top * target_inverse, s.sums[kTargetTotal]);
    if (same)
      known.soft = known.one;
    else
      known.soft.set(s.top * inverse, soft_total);
    known.slope = T(0);
    if (D::linear)
      known.slope =
          (s.sums[kJoint] / soft_total - (known.soft.lse - known.target.lse)) - (known.soft.low - known.target.low);
    put(kSoftLse, known.soft.lse);
    put(kSoftLseLow, known.soft.low);
    put(kTargetLse, known.target.lse);
    put(kTargetLseLow, known.target.low);
    if (separate) compare(known);
    put(kSlope, known.slope);
  }
}

// A sweep for the divergence's value sum f and its slope sum g
template <class T, class D, bool Present>
__device__ __forceinline__ void RowWork<T, D, Present>::compare(Known<T>& known) const {
  T sums[2] = {0, 0};
  for (int step = 0; step < steps(); step++) {
    const int64_t at = begin(step);
    const int n = inside<T>(at, a.vocab);
    if (n > 0) {
      T z[kGroup<T>], t[kGroup<T>];
      logits(z, at, n);
      target(t, at, n);
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++) {
        T f = 0, g = 0, q;
        evaluate(z, t, known, i, f, g, q);
        sums[0] += f;
        sums[1] += g;
      }
    }
  }
  block_sum<kWarps>(sums, scratch);
  put(kDivergence, sums[0]);
  if (a.live & kDivergenceBit && !D::flat) known.slope = sums[1];
}

template <class T, class D, bool Present>
__device__ __forceinline__ void RowWork<T, D, Present>::recall(Known<T>& known) const {
  known.one = {get(kLse), get(kLseLow)};
  known.soft = {get(kSoftLse), get(kSoftLseLow)};
  known.target = {get(kTargetLse), get(kTargetLseLow)};
  known.entropy = get(kEntropy), known.pulled = get(kPotential), known.slope = get(kSlope);
}

}  // namespace
}  // namespace dft::cuda
