// A row's work on the GPU, whatever design runs it: groups of a row in and out, the threads of a block joined, and the
// sweeps. See rows_cuda.cu for the mathematics. Internal to each translation unit that includes it.
#pragma once

#include "gpu.h"
#include "rows.h"

namespace dft::cuda {
namespace {

template <class T>
constexpr int kGroup = sizeof(T) == 4 ? 8 : 2;
constexpr int kEntropyBit = 1 << kEntropy, kLseBit = 1 << kLse, kLogProbBit = 1 << kLogProb,
              kMeanBit = 1 << kMeanLogProb;
constexpr int kDivergenceBit = 1 << kDivergence, kPotentialBit = 1 << kPotential;
constexpr int kCorrectBit = 1 << kCorrect, kAgreementBit = 1 << kAgreement;

struct None {
  static constexpr bool flat = true, linear = false;
};

template <class D, bool IsPresent = true>
struct Pair {
  using type = D;
  static constexpr bool present = IsPresent;
};

// f(Pair) of a divergence by its id; of None for any other
template <class T, class F>
auto with_pair(int id, F f) {
  using M = Math<T>;
  switch (id) {
    case dft::kForwardKl:
      return f(Pair<ForwardKl<M>>());
    case dft::kReverseKl:
      return f(Pair<ReverseKl<M>>());
    case dft::kJensenShannon:
      return f(Pair<JensenShannon<M>>());
    case dft::kSkewKl:
      return f(Pair<SkewKl<M>>());
    case dft::kSkewReverseKl:
      return f(Pair<SkewReverseKl<M>>());
    case dft::kAlphaDivergence:
      return f(Pair<AlphaDivergence<M>>());
    case dft::kTotalVariation:
      return f(Pair<TotalVariation<M>>());
    case dft::kSquaredHellinger:
      return f(Pair<SquaredHellinger<M>>());
    default:
      return f(Pair<None, false>());
  }
}

struct alignas(16) Sixteen {
  uint32_t word[4];
};

template <class T>
__device__ __forceinline__ T lowest() {  // below any logit but -inf, and finite
  return sizeof(T) == 4 ? T(-3e38) : T(-1e308);
}

template <class T>
__device__ __forceinline__ T times(T q, T factor) {  // 0 * anything = 0
  return q > T(0) ? q * factor : T(0);
}

// ------------------------------------------------------------------------------------------------- groups of a row

// x = the group of numbers of a row that begins at `at`, of which n are inside; 16 bytes at a time where they can be
template <class T>
__device__ __forceinline__ void load(T (&x)[kGroup<T>], const Matrix& from, int64_t row, int64_t at, int n) {
  const int64_t place = row * from.stride + at;
  if (from.element == Element::bf16 || from.element == Element::f16) {
    const uint16_t* data = static_cast<const uint16_t*>(from.data) + place;
    uint16_t raw[kGroup<T>] = {};
    if (kGroup<T> == 8 && n == 8 && reinterpret_cast<uintptr_t>(data) % 16 == 0) {
      const Sixteen all = *reinterpret_cast<const Sixteen*>(data);
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++) raw[i] = uint16_t(all.word[i / 2] >> (i % 2 * 16));
    } else {
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++)
        if (i < n) raw[i] = data[i];
    }
    if (from.element == Element::bf16) {
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++) x[i] = T(from_bf16(raw[i]));
    } else {
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++) x[i] = T(from_f16(raw[i]));
    }
  } else if (from.element == Element::f32) {
    const float* data = static_cast<const float*>(from.data) + place;
    if (kGroup<T> == 8 && n == 8 && reinterpret_cast<uintptr_t>(data) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kGroup<T>; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(data + i);
        x[i] = T(four.x), x[i + 1] = T(four.y), x[(i + 2) % kGroup<T>] = T(four.z), x[(i + 3) % kGroup<T>] = T(four.w);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++) x[i] = i < n ? T(data[i]) : T(0);
    }
  } else {
    const double* data = static_cast<const double*>(from.data) + place;
#pragma unroll
    for (int i = 0; i < kGroup<T>; i++) x[i] = i < n ? T(data[i]) : T(0);
  }
}

template <class T>
__device__ __forceinline__ void store(const T (&x)[kGroup<T>], const Matrix& to, int64_t row, int64_t at, int n) {
  const int64_t place = row * to.stride + at;
  void* base = const_cast<void*>(to.data);
  if (to.element == Element::bf16 || to.element == Element::f16) {
    uint16_t* data = static_cast<uint16_t*>(base) + place;
    uint16_t raw[kGroup<T>];
#pragma unroll
    for (int i = 0; i < kGroup<T>; i++)
      raw[i] = to.element == Element::bf16 ? to_bf16(float(x[i])) : to_f16(float(x[i]));
    if (kGroup<T> == 8 && n == 8 && reinterpret_cast<uintptr_t>(data) % 16 == 0) {
      Sixteen all = {};
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++) all.word[i / 2] |= uint32_t(raw[i]) << (i % 2 * 16);
      *reinterpret_cast<Sixteen*>(data) = all;
    } else {
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++)
        if (i < n) data[i] = raw[i];
    }
  } else if (to.element == Element::f32) {
    float* data = static_cast<float*>(base) + place;
    if (kGroup<T> == 8 && n == 8 && reinterpret_cast<uintptr_t>(data) % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kGroup<T>; i += 4)
        *reinterpret_cast<float4*>(data + i) =
            float4{float(x[i]), float(x[i + 1]), float(x[(i + 2) % kGroup<T>]), float(x[(i + 3) % kGroup<T>])};
    } else {
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++)
        if (i < n) data[i] = float(x[i]);
    }
  } else {
    double* data = static_cast<double*>(base) + place;
#pragma unroll
    for (int i = 0; i < kGroup<T>; i++)
      if (i < n) data[i] = double(x[i]);
  }
}

template <class T>
__device__ __forceinline__ T finished(T raw, T scale, T cap) {
  const T z = raw * scale;
  return cap == T(0) ? z : cap * std::tanh(z / cap);
}

// A group of finished logits, -inf beyond the vocabulary
template <class T>
__device__ __forceinline__ void read(T (&z)[kGroup<T>], const Matrix& from, const Finish& finish, int64_t row,
                                     int64_t at, int n) {
  load(z, from, row, at, n);
  const T scale = T(finish.scale), cap = T(finish.cap);
#pragma unroll
  for (int i = 0; i < kGroup<T>; i++) z[i] = i < n ? finished(z[i], scale, cap) : -T(INFINITY);
}

// How many of a group's numbers from `at` on are inside the vocabulary
template <class T>
__device__ __forceinline__ int inside(int64_t at, int64_t vocab) {
  return at >= vocab ? 0 : vocab - at < kGroup<T> ? int(vocab - at) : kGroup<T>;
}

// ---------------------------------------------------------------------------------------------- the block's threads

constexpr int kMostWarps = 8, kSums = 7;

// Where the warps of a block meet
template <class T>
struct Scratch {
  T sums[kSums][kMostWarps];
  T value[kMostWarps];
  int64_t index[kMostWarps];
};

template <int Warps, class T, int Count>
__device__ __forceinline__ void block_sum(T (&x)[Count], Scratch<T>& room) {
#pragma unroll
  for (int k = 0; k < Count; k++)
    for (int distance = 16; distance > 0; distance /= 2) x[k] += __shfl_xor_sync(~0u, x[k], distance);
  __syncthreads();  // the room may still be read by who was here before
  if (threadIdx.x % 32 == 0)
    for (int k = 0; k < Count; k++) room.sums[k][threadIdx.x / 32] = x[k];
  __syncthreads();
  for (int k = 0; k < Count; k++) {
    x[k] = room.sums[k][0];
    for (int w = 1; w < Warps; w++) x[k] += room.sums[k][w];
  }
}

// The larger value, of equal ones the lower index
template <class T>
__device__ __forceinline__ void prefer(T& value, int64_t& index, T other, int64_t place) {
  const bool better = other > value || (other == value && place < index);
  value = better ? other : value;
  index = better ? place : index;
}

template <int Warps, class T>
__device__ __forceinline__ void block_max(T& value, int64_t& index, Scratch<T>& room) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(~0u, value, distance);
    const int64_t place = __shfl_xor_sync(~0u, index, distance);
    prefer(value, index, other, place);
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) room.value[threadIdx.x / 32] = value, room.index[threadIdx.x / 32] = index;
  __syncthreads();
  for (int w = 0; w < Warps; w++) prefer(value, index, room.value[w], room.index[w]);
}

// --------------------------------------------------------------------------------------------------- a row's work

// log of a probability: x - (lse + low), lse the nearest number and low what that rounding dropped
template <class T>
struct LogSumExp {
  T lse, low;
  __device__ __forceinline__ void set(T origin, T total) {
    const T rest = std::log(total);
    lse = origin + rest;
    low = std::fabs(lse) < T(INFINITY) ? (origin - lse) + rest : T(0);
  }
  __device__ __forceinline__ T of(T x) const { return (x - lse) - low; }
};

// What a row's statistics are made of, for the gradient
template <class T>
struct Known {
  LogSumExp<T> one, soft, target;
  T entropy, pulled, slope;
};

// What several threads, or blocks, have summed: relative to the largest logit each has seen
enum Sum { kTotal, kSoftTotal, kEntropySum, kPulled, kMean, kJoint, kTargetTotal };

template <class T>
struct Measured {
  T top, target_top;
  int64_t best, target_best;
  T sums[kSums];

  // The same sums relative to other maxima, none of which is below its own
  __device__ __forceinline__ void raise(T to, T target_to, T inverse, T target_inverse) {
    using M = Math<T>;
    const T back = top - to, shrink = M::exp(back), soft_shrink = inverse == T(1) ? shrink : M::exp(back * inverse);
    sums[kEntropySum] = times(shrink, sums[kEntropySum] + back * sums[kTotal]);
    sums[kTotal] *= shrink;
    sums[kPulled] *= shrink;
    sums[kSoftTotal] *= soft_shrink;
    sums[kJoint] = times(soft_shrink, sums[kJoint]);
    sums[kTargetTotal] *= M::exp((target_top - target_to) * target_inverse);
    top = to;
    target_top = target_to;
  }
};

// One row, or a block's part of it. Where it lies, how its threads meet and what follows a step is its Place:
//   threads, warps, backwards                the block's size; whether the last sweep goes from the end
//   first, end, leads                        the block's columns; whether it writes the row's statistics
//   arrive(step), logits(..), target(..)     wait for a step's numbers; read a group of them
//   meet(Measured), sum(x)                   of all threads of the row
//   consumed(step)                           the last sweep is through with a step
template <class T, class D, bool Present, class Place>
struct RowWork {
  static constexpr int kStep = Place::threads * kGroup<T>;

  const RowArguments& a;
  Place& place;
  const int64_t row;
  const T* pull;  // the row's potential
  T* statistics;

  __device__ __forceinline__ RowWork(const RowArguments& arguments, Place& where, int64_t number)
      : a(arguments), place(where), row(number), pull(nullptr), statistics(static_cast<T*>(a.statistics) + number) {
    if ((a.wanted | a.live) & kPotentialBit)
      pull = static_cast<const T*>(a.potential) + (a.group ? a.group[row] * a.vocab : 0);
  }

  __device__ __forceinline__ void put(int which, T value) const {
    if (place.leads && threadIdx.x == 0) statistics[which * a.statistics_stride] = value;
  }
  __device__ __forceinline__ T get(int which) const { return statistics[which * a.statistics_stride]; }

  // f and g of a group
  __device__ __forceinline__ void evaluate(const T (&z)[kGroup<T>], const T (&t)[kGroup<T>], const Known<T>& known,
                                           int i, T& f, T& g, T& q) const {
    if constexpr (Present) {
      const T lq = known.soft.of(z[i] * T(a.inverse)), lp = known.target.of(t[i] * T(a.target_inverse));
      q = Math<T>::exp(lq);
      D::eval(lp, lq, q, T(a.parameter), f, g);
    }
  }

  __device__ __forceinline__ int steps() const { return int((place.end - place.first + kStep - 1) / kStep); }
  __device__ __forceinline__ int64_t begin(int step) const {
    return place.first + int64_t(step) * kStep + threadIdx.x * kGroup<T>;
  }

  // The first sweep: the log-sum-exps and all that can be summed beside them. separate: the divergence has a sweep of
  // its own; last: no sweep follows
  __device__ __forceinline__ void measure(Known<T>& known, int64_t label, bool separate, bool last) const {
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
      const int n = inside<T>(at, place.end);
      T z[kGroup<T>], t[kGroup<T>];
      place.arrive(step);
      if (n > 0) {
        place.logits(z, at, n);
        T high = s.top, target_high = s.target_top;
        int which = -1;
#pragma unroll
        for (int i = 0; i < kGroup<T>; i++)
          if (z[i] > high) high = z[i], which = i;
        if (which >= 0) s.best = at + which;
        if (Present || agrees) {
          place.target(t, at, n);
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
      if (last) place.consumed(step);
    }

    place.meet(s, inverse, target_inverse);
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
    if (agrees) put(kAgreement, T(s.best == s.target_best));
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
      if (separate) compare(known, !a.out.data);
      put(kSlope, known.slope);
    }
  }

  // A sweep of its own for the divergence's value and its sum g
  __device__ __forceinline__ void compare(Known<T>& known, bool last) const {
    T sums[2] = {0, 0};
    for (int step = 0; step < steps(); step++) {
      const int64_t at = begin(step);
      const int n = inside<T>(at, place.end);
      if (n > 0) {
        T z[kGroup<T>], t[kGroup<T>];
        place.logits(z, at, n);
        place.target(t, at, n);
#pragma unroll
        for (int i = 0; i < kGroup<T>; i++) {
          T f = 0, g = 0, q;
          evaluate(z, t, known, i, f, g, q);
          sums[0] += f;
          sums[1] += g;
        }
      }
      if (last) place.consumed(step);
    }
    place.sum(sums);
    put(kDivergence, sums[0]);
    if (a.live & kDivergenceBit && !D::flat) known.slope = sums[1];
  }

  __device__ __forceinline__ void recall(Known<T>& known) const {
    known.one = {get(kLse), get(kLseLow)};
    known.soft = {get(kSoftLse), get(kSoftLseLow)};
    known.target = {get(kTargetLse), get(kTargetLseLow)};
    known.entropy = get(kEntropy), known.pulled = get(kPotential), known.slope = get(kSlope);
  }

  __device__ __forceinline__ T cotangent(int which) const {
    return a.live >> which & 1 ? static_cast<const T*>(a.cotangents)[which * a.cotangents_stride + row] : T(0);
  }

  __device__ __forceinline__ void differentiate(const Known<T>& known, int64_t label, bool summed) const {
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
    for (int count = 0; count < steps(); count++) {
      const int step = Place::backwards ? steps() - 1 - count : count;
      const int64_t at = begin(step);
      const int n = inside<T>(at, place.end);
      T z[kGroup<T>], dz[kGroup<T>] = {};
      if (n > 0) {
        place.logits(z, at, n);
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
          place.target(t, at, n);
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
      place.consumed(step);  // before anything of it is written
      if (n > 0) store(dz, a.out, row, at, n);
    }
    if (summed) {
      place.sum(value);
      put(kDivergence, value[0]);
    }
  }

  // All that a launch asks of the row
  __device__ __forceinline__ void run() const {
    const int64_t label = (a.wanted | a.live) & (kLogProbBit | kCorrectBit) ? a.label[row] : -1;
    const bool gradient = a.out.data, separate = Present && (!gradient || !(D::flat || D::linear));
    Known<T> known = {};
    if (a.wanted)
      measure(known, label, separate, !gradient && !separate);
    else
      recall(known);
    if (gradient) differentiate(known, label, Present && a.wanted && !separate);
  }
};

}  // namespace
}  // namespace dft::cuda
