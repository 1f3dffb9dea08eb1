// The generic row kernels: any V, any device from sm_75 on; fp32 arithmetic, fp64 for fp64 logits.
//
// One block a row, 8 neighbouring logits a thread at a time (16-byte loads where the row is aligned; 2 of fp64), warp
// shuffles to join the threads. With a, m, h, l, d, c the cotangents of log q_y, mean log q, entropy, lse, divergence, potential:
//
//     dz = q (l - a - m - h (log q + H) + c (G - <q, G>)) + a e_y + m / V + d (g - qT sum g) / T
//     draw = dz * scale * (1 - (z / cap)^2)
//
// Device memory a logit costs, b bytes of it, t of its target's, o of its gradient: statistics b, or 2 (b + t) with the
// value of a divergence; gradient b + t + o; both in one launch 2 (b + t) + o, and b + t more for a divergence whose
// sum g needs the log-sum-exps first (neither flat nor linear in divergence.h).
//
// The last sweep goes from the end of the row to its beginning: what it reads first is what was read last, and the
// gradient may lie in the upper half of the memory of its own row of logits.
#include "rows_cuda.h"

#include <type_traits>

#include "gpu.h"

namespace dft::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
template <class T>
constexpr int kGroup = sizeof(T) == 4 ? 8 : 2;
template <class T>
constexpr int kStep = kThreads * kGroup<T>;
constexpr int kEntropyBit = 1 << kEntropy, kLseBit = 1 << kLse, kLogProbBit = 1 << kLogProb, kMeanBit = 1 << kMeanLogProb;
constexpr int kDivergenceBit = 1 << kDivergence, kPotentialBit = 1 << kPotential;
constexpr int kCorrectBit = 1 << kCorrect, kAgreementBit = 1 << kAgreement;
constexpr int kAtOne = kLogProbBit | kMeanBit | kEntropyBit | kLseBit | kPotentialBit;  // what stands on softmax(z)

struct None {
  static constexpr bool flat = true, linear = false;
};

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
    for (int i = 0; i < kGroup<T>; i++) raw[i] = to.element == Element::bf16 ? to_bf16(float(x[i])) : to_f16(float(x[i]));
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
        *reinterpret_cast<float4*>(data + i) = float4{float(x[i]), float(x[i + 1]), float(x[(i + 2) % kGroup<T>]),
                                                      float(x[(i + 3) % kGroup<T>])};
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
__device__ __forceinline__ void read(T (&z)[kGroup<T>], const Matrix& from, const Finish& finish, int64_t row, int64_t at,
                                     int n) {
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

template <class T, int Count>
__device__ __forceinline__ void block_sum(T (&x)[Count]) {
  __shared__ T meet[Count][kWarps];
#pragma unroll
  for (int k = 0; k < Count; k++)
    for (int distance = 16; distance > 0; distance /= 2) x[k] += __shfl_xor_sync(~0u, x[k], distance);
  __syncthreads();  // the room may still be read by who was here before
  if (threadIdx.x % 32 == 0)
    for (int k = 0; k < Count; k++) meet[k][threadIdx.x / 32] = x[k];
  __syncthreads();
  for (int k = 0; k < Count; k++) {
    x[k] = meet[k][0];
    for (int w = 1; w < kWarps; w++) x[k] += meet[k][w];
  }
}

// The largest value, and the lowest index that has it
template <class T>
__device__ __forceinline__ void block_max(T& value, int64_t& index) {
  __shared__ T meet[kWarps];
  __shared__ int64_t where[kWarps];
  for (int distance = 16; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(~0u, value, distance);
    const int64_t place = __shfl_xor_sync(~0u, index, distance);
    const bool better = other > value || (other == value && place < index);
    value = better ? other : value;
    index = better ? place : index;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) meet[threadIdx.x / 32] = value, where[threadIdx.x / 32] = index;
  __syncthreads();
  for (int w = 0; w < kWarps; w++) {
    const bool better = meet[w] > value || (meet[w] == value && where[w] < index);
    value = better ? meet[w] : value;
    index = better ? where[w] : index;
  }
}

// --------------------------------------------------------------------------------------------------- the row kernel

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

// Sums of a thread relative to the largest logit it has seen
template <class T>
struct Sums {
  T top, total, soft, entropy, pulled, mean, joint;
  int64_t best;
};

template <class T, class D, bool Present>
struct Row_ {
  const RowArguments& a;
  const int64_t row;
  const T* pull;  // the row's potential
  T* statistics;

  __device__ Row_(const RowArguments& arguments, int64_t number)
      : a(arguments), row(number), pull(nullptr), statistics(static_cast<T*>(arguments.statistics) + number) {
    if ((a.wanted | a.live) & kPotentialBit)
      pull = static_cast<const T*>(a.potential) + (a.group ? a.group[row] * a.vocab : 0);
  }

  __device__ __forceinline__ void put(int which, T value) const {
    if (threadIdx.x == 0) statistics[which * a.statistics_stride] = value;
  }
  __device__ __forceinline__ T get(int which) const { return statistics[which * a.statistics_stride]; }

  // f and g of a group
  __device__ __forceinline__ void evaluate(const T (&z)[kGroup<T>], const T (&t)[kGroup<T>], const Known<T>& known, int i, T& f,
                                           T& g, T& q) const {
    if constexpr (Present) {
      const T lq = known.soft.of(z[i] * T(a.inverse)), lp = known.target.of(t[i] * T(a.target_inverse));
      q = Math<T>::exp(lq);
      D::eval(lp, lq, q, T(a.parameter), f, g);
    }
  }

  __device__ __forceinline__ void measure(Known<T>& known, int64_t label, bool separate) const {
    using M = Math<T>;
    const bool same = a.inverse == 1.0, one = (a.wanted & kAtOne) || (Present && same), soft = Present && !same;
    const bool entropy = a.wanted & kEntropyBit, pulled = a.wanted & kPotentialBit, agrees = a.wanted & kAgreementBit;
    const T inverse = T(a.inverse), target_inverse = T(a.target_inverse);
    Sums<T> s = {lowest<T>(), 0, 0, 0, 0, 0, 0, 0};
    Sums<T> p = s;
    for (int64_t at = threadIdx.x * kGroup<T>; at < a.vocab; at += kStep<T>) {
      const int n = inside<T>(at, a.vocab);
      T z[kGroup<T>], t[kGroup<T>];
      read(z, a.logits, a.finish, row, at, n);
      if (Present || agrees) read(t, a.target, a.target_finish, row, at, n);
      T high = s.top;
      int which = -1;
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++)
        if (z[i] > high) high = z[i], which = i;
      if (which >= 0) {
        const T back = s.top - high, shrink = M::exp(back), soft_shrink = same ? shrink : M::exp(back * inverse);
        s.entropy = times(shrink, s.entropy + back * s.total);
        s.total *= shrink;
        s.pulled *= shrink;
        s.soft *= soft_shrink;
        s.joint = times(soft_shrink, s.joint);
        s.top = high;
        s.best = at + which;
      }
      if (one) {
#pragma unroll
        for (int i = 0; i < kGroup<T>; i++) {
          const T e = M::exp(z[i] - s.top);
          s.total += e;
          if (entropy) s.entropy += times(e, z[i] - s.top);
          if (pulled && i < n) s.pulled += e * pull[at + i];
          if (Present && D::linear && same) s.joint += times(e, z[i] - t[i] * target_inverse);
        }
      }
      if (soft) {
#pragma unroll
        for (int i = 0; i < kGroup<T>; i++) {
          const T e = M::exp((z[i] - s.top) * inverse);
          s.soft += e;
          if (D::linear) s.joint += times(e, z[i] * inverse - t[i] * target_inverse);
        }
      }
      if (a.wanted & kMeanBit) {
#pragma unroll
        for (int i = 0; i < kGroup<T>; i++) s.mean += i < n ? z[i] : T(0);
      }
      if (Present || agrees) {
        high = p.top, which = -1;
#pragma unroll
        for (int i = 0; i < kGroup<T>; i++)
          if (t[i] > high) high = t[i], which = i;
        if (which >= 0) {
          p.total *= M::exp((p.top - high) * target_inverse);
          p.top = high;
          p.best = at + which;
        }
#pragma unroll
        for (int i = 0; i < kGroup<T>; i++) p.total += M::exp((t[i] - p.top) * target_inverse);
      }
    }

    // The threads meet
    T top = s.top, target_top = p.top;
    block_max(top, s.best);
    if (Present || agrees) block_max(target_top, p.best);
    const T back = s.top - top, shrink = M::exp(back), soft_shrink = M::exp(back * inverse);
    T sums[7] = {s.total * shrink,
                 s.soft * soft_shrink,
                 times(shrink, s.entropy + back * s.total),
                 s.pulled * shrink,
                 s.mean,
                 times(soft_shrink, s.joint),
                 p.total * M::exp((p.top - target_top) * target_inverse)};
    block_sum(sums);
    const T total = sums[0], soft_total = same ? total : sums[1];
    if (one) {
      known.one.set(top, total);
      put(kLse, known.one.lse);
      put(kLseLow, known.one.low);
    }
    if (a.wanted & kLogProbBit) {
      const bool valid = label >= 0 && label < a.vocab;
      T z_y[kGroup<T>];
      read(z_y, a.logits, a.finish, row, valid ? label : 0, 1);
      put(kLogProb, valid ? known.one.of(z_y[0]) : T(NAN));
    }
    if (a.wanted & kMeanBit) put(kMeanLogProb, known.one.of(sums[4] / T(a.vocab)));
    if (entropy) put(kEntropy, known.entropy = std::log(total) - sums[2] / total);
    if (pulled) put(kPotential, known.pulled = sums[3] / total);
    if (a.wanted & kCorrectBit) put(kCorrect, T(s.best == label));
    if (agrees) put(kAgreement, T(s.best == p.best));
    if constexpr (Present) {
      known.target.set(target_top * target_inverse, sums[6]);
      if (same)
        known.soft = known.one;
      else
        known.soft.set(top * inverse, soft_total);
      known.slope = T(0);
      if (D::linear)
        known.slope = (sums[5] / soft_total - (known.soft.lse - known.target.lse)) - (known.soft.low - known.target.low);
      put(kSoftLse, known.soft.lse);
      put(kSoftLseLow, known.soft.low);
      put(kTargetLse, known.target.lse);
      put(kTargetLseLow, known.target.low);
      if (separate) compare(known);
      put(kSlope, known.slope);
    }
  }

  // A sweep of its own for the divergence's value and its sum g
  __device__ __forceinline__ void compare(Known<T>& known) const {
    T sums[2] = {0, 0};
    for (int64_t at = threadIdx.x * kGroup<T>; at < a.vocab; at += kStep<T>) {
      const int n = inside<T>(at, a.vocab);
      T z[kGroup<T>], t[kGroup<T>];
      read(z, a.logits, a.finish, row, at, n);
      read(t, a.target, a.target_finish, row, at, n);
#pragma unroll
      for (int i = 0; i < kGroup<T>; i++) {
        T f = 0, g = 0, q;
        evaluate(z, t, known, i, f, g, q);
        sums[0] += f;
        sums[1] += g;
      }
    }
    block_sum(sums);
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
    for (int64_t first = (a.vocab - 1) / kStep<T> * kStep<T>; first >= 0; first -= kStep<T>) {
      const int64_t at = first + threadIdx.x * kGroup<T>;
      const int n = inside<T>(at, a.vocab);
      T z[kGroup<T>], dz[kGroup<T>] = {};
      if (n > 0) {
        read(z, a.logits, a.finish, row, at, n);
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
          read(t, a.target, a.target_finish, row, at, n);
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
      if (a.in_place) __syncthreads();  // all of the step is read before any of it is written
      if (n > 0) store(dz, a.out, row, at, n);
    }
    if (summed) {
      block_sum(value);
      put(kDivergence, value[0]);
    }
  }
};

template <class T, class D, bool Present>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 5 : 2) row_kernel(const RowArguments a) {
  const Row_<T, D, Present> row(a, blockIdx.x);
  const int64_t label = (a.wanted | a.live) & (kLogProbBit | kCorrectBit) ? a.label[blockIdx.x] : -1;
  const bool gradient = a.out.data, separate = Present && (!gradient || !(D::flat || D::linear));
  Known<T> known = {};
  if (a.wanted)
    row.measure(known, label, separate);
  else
    row.recall(known);
  if (gradient) row.differentiate(known, label, Present && a.wanted && !separate);
}

// -------------------------------------------------------------------------------------------- sums over rows, and q

constexpr int kColumns = 128;  // threads a block, one column each

template <class T>
__device__ __forceinline__ T probability(const Matrix& logits, const Finish& finish, const void* statistics,
                                         int64_t stride, int64_t row, int64_t v) {
  T z[kGroup<T>];
  read(z, logits, finish, row, v, 1);
  const T* known = static_cast<const T*>(statistics) + row;
  return Math<T>::exp((z[0] - known[kLse * stride]) - known[kLseLow * stride]);
}

template <class T>
__global__ void __launch_bounds__(kColumns) column_kernel(const ColumnArguments a) {
  const int64_t v = int64_t(blockIdx.x) * kColumns + threadIdx.x, segment = blockIdx.y;
  if (v >= a.vocab) return;
  T total = 0;
  for (int64_t place = a.starts[segment]; place < a.starts[segment + 1]; place++) {
    const int64_t row = a.order ? a.order[place] : place;
    const T weight = a.weight ? static_cast<const T*>(a.weight)[row] : T(1);
    if (weight != T(0)) total += weight * probability<T>(a.logits, a.finish, a.statistics, a.statistics_stride, row, v);
  }
  static_cast<T*>(a.columns)[segment * a.vocab + v] += total;
}

template <class T>
__global__ void __launch_bounds__(kColumns) probability_kernel(const ProbabilityArguments a) {
  const int64_t v = int64_t(blockIdx.y) * kColumns + threadIdx.x, row = blockIdx.x;
  if (v < a.vocab)
    static_cast<T*>(a.out)[row * a.vocab + v] =
        probability<T>(a.logits, a.finish, a.statistics, a.statistics_stride, row, v);
}

// ---------------------------------------------------------------------------------------------------- the launchers

template <class T>
using RowKernel = void (*)(RowArguments);

template <class T>
RowKernel<T> row_kernel_of(int divergence) {
  using M = Math<T>;
  switch (divergence) {
    case dft::kForwardKl:
      return row_kernel<T, ForwardKl<M>, true>;
    case dft::kReverseKl:
      return row_kernel<T, ReverseKl<M>, true>;
    case dft::kJensenShannon:
      return row_kernel<T, JensenShannon<M>, true>;
    case dft::kSkewKl:
      return row_kernel<T, SkewKl<M>, true>;
    case dft::kSkewReverseKl:
      return row_kernel<T, SkewReverseKl<M>, true>;
    case dft::kAlphaDivergence:
      return row_kernel<T, AlphaDivergence<M>, true>;
    case dft::kTotalVariation:
      return row_kernel<T, TotalVariation<M>, true>;
    case dft::kSquaredHellinger:
      return row_kernel<T, SquaredHellinger<M>, true>;
    default:
      return row_kernel<T, None, false>;
  }
}

unsigned blocks(int64_t vocab) { return unsigned((vocab + kColumns - 1) / kColumns); }

}  // namespace

const char* launch_rows(const RowArguments& a, CUstream_st* stream) {
  if (a.rows == 0) return nullptr;
  const bool wide = a.logits.element == Element::f64;
  return launch(wide ? row_kernel_of<double>(a.divergence) : row_kernel_of<float>(a.divergence), dim3(unsigned(a.rows)),
                kThreads, stream, a);
}

const char* launch_columns(const ColumnArguments& a, CUstream_st* stream) {
  if (a.segments == 0) return nullptr;
  const bool wide = a.logits.element == Element::f64;
  return launch(wide ? column_kernel<double> : column_kernel<float>, dim3(blocks(a.vocab), unsigned(a.segments)), kColumns,
                stream, a);
}

const char* launch_probabilities(const ProbabilityArguments& a, CUstream_st* stream) {
  if (a.rows == 0) return nullptr;
  const bool wide = a.logits.element == Element::f64;
  return launch(wide ? probability_kernel<double> : probability_kernel<float>, dim3(unsigned(a.rows), blocks(a.vocab)),
                kColumns, stream, a);
}

}  // namespace dft::cuda
