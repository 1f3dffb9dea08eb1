// The divergences of dft_kernels/divergences.py as pairs (f, g): D(p, q) = sum_v f, g = df / dlog q. For host and
// device; no torch header. Every addend f is >= 0.
//
// M supplies the number type and its functions: M::N, set, exp (of what is not large), exp_any, expm1, log1p, abs,
// max, select(condition, a, b).
// On a CPU N is a vector of lanes (simd.h), on a GPU a float. lp = log p, lq = log q, a = the parameter; a
// probability of zero is log = -inf, and then d below may be NaN: every use of it is guarded by its probability.
// flat: sum_v g = 0 whatever p and q are, so that a gradient needs no sum over v beforehand.
// linear: sum_v g = sum_v q (log q - log p), which can be summed beside the log-sum-exps.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define DFT_FN __host__ __device__ __forceinline__ static
#else
#define DFT_FN [[gnu::always_inline]] static inline
#endif

namespace dft {

enum DivergenceId {  // the ids of divergences.TABLE
  kForwardKl,
  kReverseKl,
  kJensenShannon,
  kSkewKl,
  kSkewReverseKl,
  kAlphaDivergence,
  kTotalVariation,
  kSquaredHellinger,
  kDivergences,
};

template <class M>
struct Pieces {
  using N = typename M::N;
  using T = typename M::Scalar;

  // e^d - 1 - d for |d| <= 1/2: the series sum d^k / k! from k = 2, so that nothing cancels; up to k = 8 it holds to
  // 4e-8 relative, up to 17 to 1e-20
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

  // x (log x - log y) - x + y with d = log y - log x
  DFT_FN N kl(N x, N y, N d) {
    N far = y - x * (T(1) + d);
    N addend = M::select(M::abs(d) < T(0.5), x * excess(d), far);
    return M::select(x > T(0), addend, y);
  }

  // q * factor with 0 * anything = 0
  DFT_FN N times(N q, N factor) { return M::select(q > T(0), q * factor, M::set(T(0))); }

  // With m = w p + (1 - w) q and d = log p - log q: over_q = log(m / q), over_p = log(m / p). An error of d comes
  // out as a share of it.
  DFT_FN void mix(N d, T w, N& over_q, N& over_p) {
    N zero = M::set(T(0));
    N share = M::select(d > T(0), M::set(T(1) - w), M::set(w));
    N common = M::log1p(share * M::expm1(-M::abs(d)));
    over_q = common + M::max(d, zero);
    over_p = common + M::max(-d, zero);
  }
};

// KL(p || q)
template <class M>
struct ForwardKl {
  static constexpr bool flat = true, linear = false;
  using N = typename M::N;
  using T = typename M::Scalar;
  DFT_FN void eval(N lp, N lq, N q, T, N& f, N& g) {
    N p = M::exp(lp), d = lq - lp;
    f = Pieces<M>::kl(p, q, d);
    g = M::select(M::abs(d) < T(0.5), f + p * d, q - p);  // which does not cancel where p and q nearly agree
  }
};

// KL(q || p)
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

// a KL(p || m) + (1 - a) KL(q || m), m = a p + (1 - a) q
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
};

// KL(p || m), m = a p + (1 - a) q
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

// KL(q || m), m = a q + (1 - a) p
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

// (p^a q^(1 - a) - a p - (1 - a) q) / (a (a - 1))
template <class M>
struct AlphaDivergence {
  static constexpr bool flat = false, linear = false;
  using N = typename M::N;
  using T = typename M::Scalar;
  DFT_FN void eval(N lp, N lq, N q, T a, N& f, N& g) {
    N d = lp - lq, zero = M::set(T(0));
    N any = M::max(lp, lq);
    N power = M::select(any > M::set(-INFINITY), M::exp_any(a * lp + (T(1) - a) * lq), zero);
    N near = q * (Pieces<M>::excess(a * d) - a * Pieces<M>::excess(d));  // the linear terms cancel
    N far = power - a * M::exp(lp) - (T(1) - a) * q;
    f = M::select(M::max(M::abs(d), M::abs(a * d)) < T(0.5), near, far) / (a * (a - T(1)));
    g = (q - power) / a;
  }
};

// 1/2 |p - q|
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

// 1/2 (sqrt p - sqrt q)^2
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

}  // namespace dft
