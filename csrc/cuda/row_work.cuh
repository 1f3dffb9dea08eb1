// The work of one block on one row of logits [V]: its statistics, its gradient or both, in sweeps over device memory.
// With z = cap tanh(scale raw / cap), q = softmax(z), qT = softmax(z / T), p the target's softmax at
// its own temperature, (f, g) the divergence's pair (common/divergence.h), H the entropy of q, G the row's potential,
// and a, m, h, l, d, c the cotangents of log q_y, mean log q, H, log-sum-exp, divergence and <q, G>:
//
//     dz = q (l - a - m - h (log q + H) + c (G - <q, G>)) + a e_y + m / V + d (g - qT sum g) / T
//     draw = dz scale (1 - (z / cap)^2)
//
// Sweeps over the row: measure (row_statistics.cuh) accumulates the log-sum-exps and all else that needs no
// probability; compare sums f and g, where g needs the log-sum-exps or no gradient follows; differentiate
// (row_gradient.cuh) writes draw and sums f where compare was not needed. Internal to each translation unit that
// includes it.
#pragma once

#include "groups.cuh"
#include "online.cuh"

namespace dft::cuda {
namespace {

constexpr int kLogProbBit = 1 << kLogProb, kMeanBit = 1 << kMeanLogProb, kEntropyBit = 1 << kEntropy;
constexpr int kLseBit = 1 << kLse, kDivergenceBit = 1 << kDivergence, kPotentialBit = 1 << kPotential;
constexpr int kCorrectBit = 1 << kCorrect, kAgreementBit = 1 << kAgreement;

// What the later sweeps need of the first: the log-sum-exps of z, of z / T and of the target; H, <q, G>, sum g
template <class T>
struct Known {
  LogSumExp<T> one, soft, target;
  T entropy, pulled, slope;
};

constexpr int kThreads = 128, kWarps = kThreads / 32;

// D is the divergence (Present: there is one), in arithmetic T.
template <class T, class D, bool Present>
struct RowWork {
  static constexpr int kStep = kThreads * kGroup<T>;

  const RowArguments& a;
  Scratch<T>& scratch;
  const int64_t row;
  const T* pull;  // [V]: the row's potential
  T* statistics;  // [kRows], a.statistics_stride apart

  __device__ __forceinline__ RowWork(const RowArguments& arguments, Scratch<T>& shared, int64_t number)
      : a(arguments), scratch(shared), row(number), pull(nullptr), statistics(static_cast<T*>(a.statistics) + number) {
    if ((a.wanted | a.live) & kPotentialBit)
      pull = static_cast<const T*>(a.potential) + (a.group ? a.group[row] * a.vocab : 0);
  }

  // Writes and reads one of the row's statistics.
  __device__ __forceinline__ void put(int which, T value) const {
    if (threadIdx.x == 0) statistics[which * a.statistics_stride] = value;
  }
  __device__ __forceinline__ T get(int which) const { return statistics[which * a.statistics_stride]; }

  // f, g and qT = softmax(z / T) of number i of a group
  __device__ __forceinline__ void evaluate(const T (&z)[kGroup<T>], const T (&t)[kGroup<T>], const Known<T>& known,
                                           int i, T& f, T& g, T& q) const {
    if constexpr (Present) {
      const T lq = known.soft.of(z[i] * T(a.inverse)), lp = known.target.of(t[i] * T(a.target_inverse));
      q = Math<T>::exp(lq);
      D::eval(lp, lq, q, T(a.parameter), f, g);
    }
  }

  // A sweep goes over the row in steps of one group a thread; begin: the column of this thread's group.
  __device__ __forceinline__ int steps() const { return int((a.vocab + kStep - 1) / kStep); }
  __device__ __forceinline__ int64_t begin(int step) const {
    return int64_t(step) * kStep + threadIdx.x * kGroup<T>;
  }
  __device__ __forceinline__ void logits(T (&z)[kGroup<T>], int64_t at, int n) const {
    read(z, a.logits, a.finish, row, at, n);
  }
  __device__ __forceinline__ void target(T (&t)[kGroup<T>], int64_t at, int n) const {
    read(t, a.target, a.target_finish, row, at, n);
  }

  __device__ __forceinline__ T cotangent(int which) const {
    return a.live >> which & 1 ? static_cast<const T*>(a.cotangents)[which * a.cotangents_stride + row] : T(0);
  }

  // separate: compare follows.
  __device__ __forceinline__ void measure(Known<T>& known, int64_t label, bool separate) const;
  __device__ __forceinline__ void compare(Known<T>& known) const;
  // What measure and compare wrote in an earlier launch
  __device__ __forceinline__ void recall(Known<T>& known) const;
  // summed: the divergence's value is summed here.
  __device__ __forceinline__ void differentiate(const Known<T>& known, int64_t label, bool summed) const;

  // All that the launch asks for
  __device__ __forceinline__ void run() const {
    const int64_t label = (a.wanted | a.live) & (kLogProbBit | kCorrectBit) ? a.label[row] : -1;
    const bool gradient = a.out.data, valued = Present && a.wanted & kDivergenceBit;
    const bool separate = valued && (!gradient || !(D::flat || D::linear));
    Known<T> known = {};
    if (a.wanted && !a.given)
      measure(known, label, separate);
    else
      recall(known);
    if (a.given) {
      compare(known);
      put(kSlope, known.slope);
    }
    if (gradient) differentiate(known, label, valued && !separate);
  }
};

}  // namespace
}  // namespace dft::cuda
