// The online softmax of Milakov and Gimelshein, arXiv:1805.02867: sums of exp(z - max z) while the maximum is still
// being found. Each thread keeps sums relative to the largest logit it has seen and rescales them when that grows;
// threads and blocks are combined the same way. Internal to each translation unit that includes it.
#pragma once

#include "reductions.cuh"

namespace dft::cuda {
namespace {

// Below any logit but -inf, and finite, so that the difference to -inf is -inf and not NaN
template <class T>
__device__ __forceinline__ T lowest() {
  return sizeof(T) == 4 ? T(-3e38) : T(-1e308);
}

// q * factor, and 0 where q = 0 whatever the factor is
template <class T>
__device__ __forceinline__ T times(T q, T factor) {
  return q > T(0) ? q * factor : T(0);
}

// A log-sum-exp as the nearest T and the rounding error of that: log q = (z - lse) - low is then accurate to an ulp of
// log q, where z - lse is accurate to an ulp of lse only.
template <class T>
struct LogSumExp {
  T lse, low;
  // origin + log(total)
  __device__ __forceinline__ void set(T origin, T total) {
    const T rest = std::log(total);
    lse = origin + rest;
    low = std::fabs(lse) < T(INFINITY) ? (origin - lse) + rest : T(0);
  }
  __device__ __forceinline__ T of(T x) const { return (x - lse) - low; }
};

// The sums of the first sweep. z is the model's logit, t the target's, T and T' their temperatures, top the largest z
// and target_top the largest t so far, G the potential.
enum Sum {
  kTotal,        // sum exp(z - top)
  kSoftTotal,    // sum exp((z - top) / T), where T is not 1
  kEntropySum,   // sum exp(z - top) (z - top)
  kPulled,       // sum exp(z - top) G
  kMean,         // sum z
  kJoint,        // sum exp((z - top) / T) (z / T - t / T'), for a linear divergence
  kTargetTotal,  // sum exp((t - target_top) / T')
  kSums,
};
static_assert(kSums <= kMostSums);

// The state of the first sweep in a thread, a warp, a block or a cluster: maxima with their columns, the sums above.
template <class T, class Index = int64_t>
struct Measured {
  T top, target_top;
  Index best, target_best;  // columns of the maxima
  T sums[kSums];

  // Rescales the sums to other maxima, neither of which is below its own.
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

}  // namespace
}  // namespace dft::cuda
