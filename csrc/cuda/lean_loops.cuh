// The loops of the lean row kernels over the columns of a thread, which are in registers: z, the finished logits, and
// t, the target's. Each is unrolled whole; what a call does not ask for is left out around a loop, never within it.
// Internal to each translation unit that includes it.
#pragma once

#include <type_traits>

#include "groups.cuh"
#include "lean_parts.cuh"
#include "row_work.cuh"

namespace dft::cuda {
namespace {

// A row's constants in its gradient, by the formula at the head of row_work.cuh, with the head's scale in all of them:
//
//     draw = (q (base - entropy log q) + every + hit e_y + soft (g - qT slope)) (1 - (z / cap)^2)
struct Pull {
  float base, entropy, every, hit, soft;
  bool active;  // some cotangent is not 0
  bool plain;   // neither cap nor entropy, and all numbers finite: no product needs a guard against 0 times infinity
};

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// The compiler is not to know these numbers again: what one loop computed of them would else be kept in registers for
// the next, or be taken out of the two loops of which a branch chooses one. `Loop` tells loops apart.
template <int Loop, int Count>
__device__ __forceinline__ void forget(float (&x)[Count]) {
#ifdef __CUDA_ARCH__
#pragma unroll
  for (int i = 0; i < Count; i++) asm volatile("// loop %1" : "+f"(x[i]) : "n"(Loop));
#endif
}

template <class D, int Columns>
struct LeanLoops {
  using M = Math<float>;
  static constexpr bool present = !std::is_same<D, None>::value;
  static constexpr int kTargets = present ? Columns : 1;

  const RowArguments& a;
  const Plan& plan;
  const int first, inside;  // the columns of this block

  __device__ __forceinline__ LeanLoops(const RowArguments& arguments, const Plan& how, int from)
      : a(arguments),
        plan(how),
        first(from),
        inside(int(a.vocab) - from < plan.part ? int(a.vocab) - from : plan.part) {}

  // The block's column of this thread's number i. Four neighbours are one load and one store.
  __device__ __forceinline__ static int column(int i) {
    return (i / 4 * kLeanThreads + int(threadIdx.x)) * 4 + i % 4;
  }

  // Whether a loop ends before number i, as nobody in this launch has so many. Asked every few numbers: the compiler
  // orders instructions between two branches, and over a whole unrolled loop it would put off the sums and keep all of
  // their addends in registers.
  template <int Stretch = 4>
  __device__ __forceinline__ bool ends(int i) const {
    return i % Stretch == 0 && i > 0 && i * kLeanThreads >= plan.part;
  }

  __device__ __forceinline__ float cotangent(int which, int row) const {
    if (!a.cotangents || !(a.live >> which & 1)) return 0;
    return static_cast<const float*>(a.cotangents)[which * a.cotangents_stride + row];
  }

  // -------------------------------------------------------------------------------------------- from shared memory

  // x = this thread's columns of a part, finished; -inf beyond the end of the row
  template <int Count>
  __device__ __forceinline__ void take_one(float (&x)[Count], const char* from, Element element, float scale,
                                           float cap) const {
    if (element == Element::f32) {
#pragma unroll
      for (int i = 0; i < Count; i += 4) {
        float4 four = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
        if (column(i) < inside) four = *reinterpret_cast<const float4*>(from + column(i) * 4);
        x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
      }
    } else if (element == Element::bf16) {
#pragma unroll
      for (int i = 0; i < Count; i += 4) {
        uint2 four = {0xff80ff80u, 0xff80ff80u};
        if (column(i) < inside) four = *reinterpret_cast<const uint2*>(from + column(i) * 2);
        x[i] = from_bf16(uint16_t(four.x)), x[i + 1] = from_bf16(uint16_t(four.x >> 16));
        x[i + 2] = from_bf16(uint16_t(four.y)), x[i + 3] = from_bf16(uint16_t(four.y >> 16));
      }
    } else {
#pragma unroll
      for (int i = 0; i < Count; i += 4) {
        uint2 four = {0xfc00fc00u, 0xfc00fc00u};
        if (column(i) < inside) four = *reinterpret_cast<const uint2*>(from + column(i) * 2);
        x[i] = from_f16(uint16_t(four.x)), x[i + 1] = from_f16(uint16_t(four.x >> 16));
        x[i + 2] = from_f16(uint16_t(four.y)), x[i + 3] = from_f16(uint16_t(four.y >> 16));
      }
    }
    if (cap != 0.0f) {
#pragma unroll
      for (int i = 0; i < Count; i++) x[i] = finished(x[i], scale, cap);
    } else if (scale != 1.0f) {
#pragma unroll
      for (int i = 0; i < Count; i++) x[i] *= scale;
    }
    if (cap != 0.0f || scale != 1.0f || inside % 4 != 0) {
#pragma unroll
      for (int i = 0; i < Count; i++) x[i] = column(i) < inside ? x[i] : -INFINITY;
    }
  }

  __device__ __forceinline__ void take(float (&z)[Columns], float (&t)[kTargets], const char* stage, int part) const {
    take_one(z, stage, a.logits.element, plan.scale, plan.cap);
    if constexpr (present)
      take_one(t, stage + part * bytes_of(a.logits.element), a.target.element, plan.target_scale,
               plan.target_cap);
  }

  // The finished logit of one column of the block, from its stage
  __device__ __forceinline__ float one_of(const char* stage, int column) const {
    const uint16_t narrow = reinterpret_cast<const uint16_t*>(stage)[column];
    const float raw = a.logits.element == Element::f32    ? reinterpret_cast<const float*>(stage)[column]
                      : a.logits.element == Element::bf16 ? from_bf16(narrow)
                                                          : from_f16(narrow);
    return finished(raw, plan.scale, plan.cap);
  }

  // ------------------------------------------------------------------------------------------------------- the sums

  // Over groups of lanes, From * 2 of them: the largest x; and the lowest column of those that have it
  template <int From, class X, class Better>
  __device__ __forceinline__ static X best_of_lanes(X x, Better better) {
#pragma unroll
    for (int distance = From; distance > 0; distance /= 2) x = better(x, __shfl_xor_sync(~0u, x, distance));
    return x;
  }
  template <int From>
  __device__ __forceinline__ static float largest(float x) {
    return best_of_lanes<From>(x, [](float one, float other) { return fmaxf(one, other); });
  }
  template <int From>
  __device__ __forceinline__ static int lowest_column(int x) {
    return best_of_lanes<From>(x, [](int one, int other) { return other < one ? other : one; });
  }
  template <int From>
  __device__ __forceinline__ void add_up(float (&sums)[kSums]) const {
#pragma unroll
    for (int k = 0; k < kSums; k++)
      if ((k != kJoint || D::linear) && plan.used >> k & 1) {
#pragma unroll
        for (int distance = From; distance > 0; distance /= 2) sums[k] += __shfl_xor_sync(~0u, sums[k], distance);
      }
  }

  // Parts, one a lane, joined over 16 lanes
  __device__ __forceinline__ void join(Part& p) const {
    const float top = largest<8>(p.s.top), target_top = present ? largest<8>(p.s.target_top) : p.s.target_top;
    if (plan.tracked) {
      p.s.best = lowest_column<8>(p.s.top == top ? p.s.best : INT_MAX);
      if (present) p.s.target_best = lowest_column<8>(p.s.target_top == target_top ? p.s.target_best : INT_MAX);
    }
    p.s.raise(top, target_top, plan.inverse, plan.target_inverse);
    add_up<8>(p.s.sums);
    for (int distance = 8; distance > 0; distance /= 2) {
      p.z_y += __shfl_xor_sync(~0u, p.z_y, distance);
      if (present) p.value += __shfl_xor_sync(~0u, p.value, distance);
    }
  }
  __device__ __forceinline__ void join(Sums& s) const {
    for (int distance = 8; distance > 0; distance /= 2) {
      s.f += __shfl_xor_sync(~0u, s.f, distance);
      s.g += __shfl_xor_sync(~0u, s.g, distance);
    }
  }

  template <int Count>
  __device__ __forceinline__ static float top_of(const float (&x)[Count]) {
    float top = lowest<float>();
#pragma unroll
    for (int i = 0; i < Count; i++) top = fmaxf(top, x[i]);
    return largest<16>(top);
  }
  template <int Count>
  __device__ __forceinline__ int best_of(const float (&x)[Count], float top) const {
    int best = INT_MAX;
#pragma unroll
    for (int i = Count - 1; i >= 0; i--) best = x[i] == top ? first + column(i) : best;
    return lowest_column<16>(best);
  }

  // Sums of e = exp((x - top) / T) and, where Joint, of e (z / T - t / T')
  template <bool Joint, int Count>
  __device__ __forceinline__ void weigh(const float (&x)[Count], const float (&t)[kTargets], float top, float by,
                                        float& total, float& joint) const {
    const float scale = by * M::kLog2E;
#pragma unroll
    for (int i = 0; i < Count; i++) {
      if (ends<Joint || Columns == 64 ? 4 : 8>(i)) break;
      const float e = M::exp2((x[i] - top) * scale);
      total += e;
      if constexpr (Joint) joint += times(e, x[i] * by - t[i] * plan.target_inverse);
    }
  }

  // What this warp finds in its columns
  __device__ __forceinline__ Part measure(const float (&z)[Columns], const float (&t)[kTargets]) const {
    Part p = Part::none();
    float unused = 0;
    auto& sums = p.s.sums;
    const float top = p.s.top = top_of(z);
    if constexpr (present) p.s.target_top = top_of(t);
    if (plan.tracked) {
      p.s.best = best_of(z, top);
      if constexpr (present) p.s.target_best = best_of(t, p.s.target_top);
    }
    if (present && plan.same)
      weigh<D::linear>(z, t, top, 1.0f, sums[kTotal], sums[kJoint]);
    else if (plan.one)
      weigh<false>(z, t, top, 1.0f, sums[kTotal], unused);
    if (present && !plan.same) weigh<D::linear>(z, t, top, plan.inverse, sums[kSoftTotal], sums[kJoint]);
    if constexpr (present) weigh<false>(t, t, p.s.target_top, plan.target_inverse, sums[kTargetTotal], unused);
    if (a.wanted & kEntropyBit) {
#pragma unroll
      for (int i = 0; i < Columns; i++) sums[kEntropySum] += times(M::exp(z[i] - top), z[i] - top);
    }
    if (a.wanted & kMeanBit) {
#pragma unroll
      for (int i = 0; i < Columns; i++) sums[kMean] += column(i) < inside ? z[i] : 0.0f;
    }
    add_up<16>(sums);
    return p;
  }

  // --------------------------------------------------------------------------------------------------- the gradient

  __device__ __forceinline__ Pull pull_of(const Known<float>& known, const float (&by)[kCorrect], float lse_slope,
                                          float z_y, bool valid) const {
    Pull pull;
    float lse_by = by[kLse], hit = by[kLogProb];
    if (lse_slope != 0.0f) lse_by += lse_slope * known.one.lse;
    pull.active = lse_by != 0 || hit != 0 || by[kMeanLogProb] != 0 || by[kEntropy] != 0 || by[kDivergence] != 0;
    if (a.live & kLogProbBit && !valid) hit = NAN;
    const float scale = plan.scale, bent = plan.cap == 0 ? 0.0f : z_y * plan.inverse_cap;
    pull.base = lse_by - hit - by[kMeanLogProb];
    if (a.live & kEntropyBit) pull.base -= by[kEntropy] * known.entropy;
    pull.base *= scale;
    pull.entropy = by[kEntropy] * scale;
    pull.every = by[kMeanLogProb] / float(a.vocab) * scale;
    pull.hit = hit * scale * (1.0f - bent * bent);
    pull.soft = by[kDivergence] * plan.inverse * scale;
    const float lses = known.one.lse + known.soft.lse + known.target.lse;
    const float all = pull.base + pull.every + pull.soft + lses + known.slope;
    pull.plain = plan.cap == 0 && !(a.live & kEntropyBit) && std::fabs(all) < INFINITY &&
                 (!present || a.live & kDivergenceBit);
    return pull;
  }

  // f, g and qT = softmax(z / T) of one column
  __device__ __forceinline__ void evaluate(float z, float t, const Known<float>& known, float& f, float& g,
                                           float& q) const {
    if constexpr (present) {
      const float lq = known.soft.of(z * plan.inverse), lp = known.target.of(t * plan.target_inverse);
      q = M::exp(lq);
      D::eval(lp, lq, q, plan.parameter, f, g);
    }
  }

  // Sums f and g. Keep: leaves g in z and qT in t, for combine.
  template <bool Keep>
  __device__ __forceinline__ Sums compare(float (&z)[Columns], float (&t)[kTargets], const Known<float>& known) const {
    Sums sums = {0, 0};
    forget<Keep>(z);
    forget<Keep>(t);
#pragma unroll
    for (int i = 0; i < Columns; i++) {
      if (ends(i)) break;
      float f = 0, g = 0, q = 0;
      evaluate(z[i], t[i], known, f, g, q);
      sums.f += f, sums.g += g;
      if constexpr (Keep) z[i] = g, t[i] = q;
    }
    return sums;
  }

  // Whether g and qT are all that the gradient needs
  __device__ __forceinline__ bool keeps(const Pull& pull) const {
    return a.out.data && pull.plain && (plan.same || !(a.live & kAtOne));
  }
  __device__ __forceinline__ void combine(float (&z)[Columns], const float (&t)[kTargets], const Known<float>& known,
                                          const Pull& pull) const {
    const float base = pull.base - pull.soft * known.slope;
#pragma unroll
    for (int i = 0; i < Columns; i++) z[i] = pull.soft * z[i] + (t[i] * base + pull.every);
  }

  // z = the gradient but for the label's own share, and the sum of f where D's value is summed here. Hard: the terms at
  // T = 1 need a probability of their own. Plain: as Pull says.
  template <bool Hard, bool Plain>
  __device__ __forceinline__ float gradient(float (&z)[Columns], float (&t)[kTargets], const Known<float>& known,
                                            const Pull& pull) const {
    const float soft_base = (Hard ? 0.0f : pull.base) - (D::flat ? 0.0f : pull.soft * known.slope);
    const bool hard = a.live & kAtOne, soft = a.live & kDivergenceBit;
    float value = 0;
    forget<2 + Hard * 2 + Plain>(z);
    forget<2 + Hard * 2 + Plain>(t);
#pragma unroll
    for (int i = 0; i < Columns; i++) {
      if (ends(i)) break;
      float dz = pull.every;
      if constexpr (present) {
        float f = 0, g = 0, q = 0;
        evaluate(z[i], t[i], known, f, g, q);
        if constexpr (D::flat || D::linear) value += f;
        if constexpr (Plain)
          dz += pull.soft * g + q * soft_base;
        else
          dz += soft ? pull.soft * (D::flat ? g : g - times(q, known.slope)) : 0.0f;
      }
      if constexpr (Hard) {
        const float lq = known.one.of(z[i]), q = M::exp(lq);
        if constexpr (Plain)
          dz += q * pull.base;
        else
          dz += hard ? times(q, pull.base - pull.entropy * lq) : 0.0f;
      }
      if constexpr (!Plain) {
        const float bent = plan.cap == 0 ? 0.0f : z[i] * plan.inverse_cap;
        dz *= 1.0f - bent * bent;
      }
      z[i] = dz;
    }
    return value;
  }

  __device__ __forceinline__ float differentiate(float (&z)[Columns], float (&t)[kTargets],
                                                 const Known<float>& known, const Pull& pull) const {
    if (!pull.plain) return gradient<true, false>(z, t, known, pull);
    if constexpr (present && (D::flat || D::linear))
      if (plan.same || !(a.live & kAtOne)) return gradient<false, true>(z, t, known, pull);
    return gradient<true, true>(z, t, known, pull);
  }

  // The label's own share; zero where every cotangent is zero, even if the row holds NaN
  __device__ __forceinline__ void hit(float (&z)[Columns], const Pull& pull, int label) const {
    const int at = label - first;
    if (pull.hit != 0 && at >= 0 && at < inside && at / 4 % kLeanThreads == int(threadIdx.x)) {
      const int which = at / 4 / kLeanThreads * 4 + at % 4;
#pragma unroll
      for (int i = 0; i < Columns; i++) z[i] += i == which ? pull.hit : 0.0f;
    }
    if (!pull.active) {
#pragma unroll
      for (int i = 0; i < Columns; i++) z[i] = 0;
    }
  }

  // ----------------------------------------------------------------------------------------------- to device memory

  __device__ __forceinline__ void write(const float (&z)[Columns], int row) const {
    char* to = static_cast<char*>(const_cast<void*>(a.out.data)) +
               (int64_t(row) * a.out.stride + first) * bytes_of(a.out.element);
    if (a.out.element == Element::f32) {
#pragma unroll
      for (int i = 0; i < Columns; i += 4)
        if (column(i + 3) < inside)
          *reinterpret_cast<float4*>(to + column(i) * 4) = float4{z[i], z[i + 1], z[i + 2], z[i + 3]};
    } else if (a.out.element == Element::bf16) {
#pragma unroll
      for (int i = 0; i < Columns; i += 4)
        if (column(i + 3) < inside)
          *reinterpret_cast<uint2*>(to + column(i) * 2) = {pack_bf16(z[i], z[i + 1]), pack_bf16(z[i + 2], z[i + 3])};
    } else {
#pragma unroll
      for (int i = 0; i < Columns; i += 4)
        if (column(i + 3) < inside)
          *reinterpret_cast<uint2*>(to + column(i) * 2) = {pack_f16(z[i], z[i + 1]), pack_f16(z[i + 2], z[i + 3])};
    }
    if (inside % 4 == 0) return;  // else the last up to three columns, one by one
#pragma unroll
    for (int i = 0; i < Columns; i++) {
      const int at = column(i);
      if (at >= inside / 4 * 4 && at < inside) {
        if (a.out.element == Element::f32)
          reinterpret_cast<float*>(to)[at] = z[i];
        else
          reinterpret_cast<uint16_t*>(to)[at] = a.out.element == Element::bf16 ? to_bf16(z[i]) : to_f16(z[i]);
      }
    }
  }
};

}  // namespace
}  // namespace dft::cuda
