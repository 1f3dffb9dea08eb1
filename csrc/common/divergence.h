// The divergences of dft_kernels/divergences.py, D(p, q) = sum_v f(log p_v, log q_v), as pairs (f, g) with
// g = df / dlog q; p is the target, q = softmax(z / T) the model. The gradient of D with respect to the logits is
//
//     dD/dz_v = (g_v - q_v sum_u g_u) / T
//
// Shared by the CPU and CUDA kernels; no torch header. Every f is >= 0, so that a sum of them does not cancel.
//
// Each divergence is a class template over the arithmetic M: the number type M::N (a float or double on a GPU, a SIMD
// vector on a CPU, see cpu/simd.h), its M::Scalar, and the functions set, exp (of arguments up to 88), exp_any, expm1,
// log1p, abs, max, select(condition, a, b).
//
//     eval(lp, lq, q, a, f, g)   lp = log p, lq = log q, a the divergence's parameter; writes f and g
//     sums(lp, lq, a, f, s)      where it costs less (on a CPU): f, and s with the same sum over v as g
//     flat                       sum_v g = 0 for any p and q: the gradient needs no sum over v beforehand
//     linear                     sum_v g = sum_v q (log q - log p): accumulated beside the log-sum-exps
//
// A probability of zero is a log of -inf. The difference of two such logs is NaN, so every use of a difference is
// guarded by its probability.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define DFT_FN __host__ __device__ __forceinline__ static
#else
#define DFT_FN [[gnu::always_inline]] static inline
#endif

namespace dft {

// What the divergences have in common
template <class M>
struct Pieces {
  using N = typename M::N;
  using T = typename M::Scalar;

  // e^d - 1 - d for |d| <= 1/2, by its series sum_{k >= 2} d^k / k!, in which nothing cancels. Relative error 4e-8 with
  // terms up to k = 8, 1e-20 up to k = 17.
  DFT_FN N excess(N d) {
    constexpr int last = sizeof(T) == 4 ? 8 : 17;
    T c = T(1);
    for (int k = 2; k <= last; k++) c /= T(k);
    N y = M::set(c);
    for (int k = last; k > 2; k--) {
      c *= T(k);
      y = y * d + c;
    }
    return y * (d * d);
  }

  // x (log x - log y) - x + y, given d = log y - log x
  DFT_FN N kl(N x, N y, N d) {
    N far = y - x * (T(1) + d);
    N addend = M::select(M::abs(d) < T(0.5), x * excess(d), far);
    return M::select(x > T(0), addend, y);
  }

  // q * factor, and 0 where q = 0 whatever the factor is
  DFT_FN N times(N q, N factor) { return M::select(q > T(0), q * factor, M::set(T(0))); }

  // over_q = log(m / q) and over_p = log(m / p) of the mixture m = w p + (1 - w) q, given d = log p - log q. The error
  // of the result is a fraction of that of d.
  DFT_FN void mix(N d, T w, N& over_q, N& over_p) {
    N share = M::select(d > T(0), M::set(T(1) - w), M::set(w));
    N common = M::log1p(share * M::expm1(-M::abs(d)));
    over_q = M::select(d > T(0), common + d, common);
    over_p = M::select(d > T(0), common, common - d);
  }
};

// KL(p || q) = sum p (log p - log q) - p + q; Hinton et al., arXiv:1503.02531
template <class M>
struct ForwardKl {
  static constexpr bool flat = true, linear = false;
  using N = typename M::N;
  using T = typename M::Scalar;
  DFT_FN void eval(N lp, N lq, N q, T, N& f, N& g) {
    N p = M::exp(lp), d = lq - lp;
    f = Pieces<M>::kl(p, q, d);
    g = M::select(M::abs(d) < T(0.5), f + p * d, q - p);  // the first does not cancel where p and q nearly agree
  }
};

// KL(q || p) = sum q (log q - log p) - q + p; MiniLLM, arXiv:2306.08543
template <class M>
struct ReverseKl {
  static constexpr bool flat = false, linear = true;
  using N = typename M::N;
  using T = typename M::Scalar;
  DFT_FN void eval(N lp, N lq, N q, T, N& f, N& g) {
    f = Pieces<M>::kl(q, M::exp(lp), lp - lq);
    g = Pieces<M>::times(q, lq - lp);
  }
};

// Jensen-Shannon: a KL(p || m) + (1 - a) KL(q || m) with m = a p + (1 - a) q; GKD, arXiv:2306.13649
template <class M>
struct JensenShannon {
  static constexpr bool flat = false, linear = false;
  using N = typename M::N;
  using T = typename M::Scalar;
  DFT_FN void eval(N lp, N lq, N q, T a, N& f, N& g) {
    N over_q, over_p, p = M::exp(lp), m = a * p + (T(1) - a) * q;
    Pieces<M>::mix(lp - lq, a, over_q, over_p);
    f = a * Pieces<M>::kl(p, m, over_p) + (T(1) - a) * Pieces<M>::kl(q, m, over_q);
    g = Pieces<M>::times(q, (a - T(1)) * over_q);
  }
  // From the larger probability x and the other, y = x (1 + e); g sums to (1 - a) KL(q || m), of which f has the
  // addends. M::log1p with two arguments: cpu/simd.h.
  DFT_FN void sums(N lp, N lq, T a, N& f, N& s) {
    const N lowest = M::set(T(sizeof(T) == 4 ? -87 : -700));  // the log of a probability that counts as 0
    lp = M::select(lp < lowest, lowest, lp), lq = M::select(lq < lowest, lowest, lq);
    N d = lp - lq, apart = M::abs(d), excess;
    N x = M::exp(M::select(d > T(0), lp, lq)), e = M::expm1(-apart), some = a * e;
    N u = M::select(d > T(0), e - some, some);  // m = x (1 + u); 1 - a, rounded, would bias the sums
    N over_x = M::log1p(u, excess), over_y = over_x + apart;
    N y = x + x * e, m = x + x * u;
    N near = y * Pieces<M>::excess(over_y), far = m - y * (T(1) + over_y);
    N kl_x = x * excess, kl_y = M::select(over_y < T(0.5), near, far);  // x (log x - log m) - x + m, and that of y
    N kl_p = M::select(d > T(0), kl_x, kl_y), kl_q = M::select(d > T(0), kl_y, kl_x);
    s = (T(1) - a) * kl_q;
    f = a * kl_p + s;
  }
};

// Skew KL: KL(p || m) with m = a p + (1 - a) q; DistiLLM, arXiv:2402.03898
template <class M>
struct SkewKl {
  static constexpr bool flat = false, linear = false;
  using N = typename M::N;
  using T = typename M::Scalar;
  DFT_FN void eval(N lp, N lq, N q, T a, N& f, N& g) {
    N over_q, over_p, p = M::exp(lp);
    Pieces<M>::mix(lp - lq, a, over_q, over_p);
    f = Pieces<M>::kl(p, a * p + (T(1) - a) * q, over_p);
    g = Pieces<M>::times(q, (a - T(1)) * M::expm1(-over_p));
  }
};

// Skew reverse KL: KL(q || m) with m = a q + (1 - a) p; DistiLLM, arXiv:2402.03898
template <class M>
struct SkewReverseKl {
  static constexpr bool flat = false, linear = false;
  using N = typename M::N;
  using T = typename M::Scalar;
  DFT_FN void eval(N lp, N lq, N q, T a, N& f, N& g) {
    N over_q, over_p;
    Pieces<M>::mix(lp - lq, T(1) - a, over_q, over_p);
    f = Pieces<M>::kl(q, a * q + (T(1) - a) * M::exp(lp), over_q);
    g = Pieces<M>::times(q, -over_q - a * M::expm1(-over_q));
  }
};

// Amari's alpha-divergence: sum (p^a q^(1 - a) - a p - (1 - a) q) / (a (a - 1)); Cichocki and Amari,
// Entropy 12 (2010) 1532-1568
template <class M>
struct AlphaDivergence {
  static constexpr bool flat = false, linear = false;
  using N = typename M::N;
  using T = typename M::Scalar;
  DFT_FN void eval(N lp, N lq, N q, T a, N& f, N& g) {
    N d = lp - lq, zero = M::set(T(0));
    N any = M::max(lp, lq);
    N power = M::select(any > M::set(-INFINITY), M::exp_any(a * lp + (T(1) - a) * lq), zero);
    N near = q * (Pieces<M>::excess(a * d) - a * Pieces<M>::excess(d));  // the linear terms of the two series cancel
    N far = power - a * M::exp(lp) - (T(1) - a) * q;
    f = M::select(M::max(M::abs(d), M::abs(a * d)) < T(0.5), near, far) / (a * (a - T(1)));
    g = (q - power) / a;
  }
};

// Total variation: 1/2 sum |p - q|; f-distill, arXiv:2307.15190
template <class M>
struct TotalVariation {
  static constexpr bool flat = false, linear = false;
  using N = typename M::N;
  using T = typename M::Scalar;
  DFT_FN void eval(N lp, N lq, N q, T, N& f, N& g) {
    N half = T(0.5) * q, zero = M::set(T(0));
    f = M::abs(T(0.5) * M::exp(lp) - half);
    g = M::select(lq > lp, half, M::select(lq < lp, -half, zero));
  }
};

// Squared Hellinger distance: 1/2 sum (sqrt p - sqrt q)^2; Hellinger, J. reine angew. Math. 136 (1909)
template <class M>
struct SquaredHellinger {
  static constexpr bool flat = false, linear = false;
  using N = typename M::N;
  using T = typename M::Scalar;
  DFT_FN void eval(N lp, N lq, N q, T, N& f, N& g) {
    N apart = M::exp(T(0.5) * lp) - M::exp(T(0.5) * lq);
    f = T(0.5) * apart * apart;
    g = T(0.5) * (q - M::exp(T(0.5) * (lp + lq)));
  }
};

// All of them, in the order of their ids in divergences.TABLE
template <template <class> class... D>
struct DivergenceList {
  static constexpr int size = sizeof...(D);
};
using Divergences = DivergenceList<ForwardKl, ReverseKl, JensenShannon, SkewKl, SkewReverseKl, AlphaDivergence,
                                   TotalVariation, SquaredHellinger>;
constexpr int kDivergences = Divergences::size;
constexpr const char* kDivergenceNames[kDivergences] = {"forward_kl",      "reverse_kl",       "jensen_shannon",
                                                        "skew_kl",         "skew_reverse_kl",  "alpha_divergence",
                                                        "total_variation", "squared_hellinger"};

}  // namespace dft
