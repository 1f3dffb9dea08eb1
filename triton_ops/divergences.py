"""The divergences of dft_kernels/divergences.py, D(p, q) = sum_v f(log p_v, log q_v), as pairs (f, g) with
g = df / dlog q: functions that the row kernel takes as a constexpr. p is the target, q = softmax(z / T) the model, and

    dD/dz_v = (g_v - q_v sum_u g_u) / T

Arguments: lp = log p, lq = log q, q, and the divergence's parameter a. A probability of zero is a log of -inf; the
difference of two such logs is NaN, so every use of a difference is guarded by its probability. Every f is >= 0, so that
a sum of them does not cancel.

How the row kernel computes sum_v g (`sums`): beside the log-sum-exps where that is possible, else in another sweep.

    FLAT     sum g = 0 for any p and q
    LINEAR   sum g = sum q (log q - log p)
    SWEEP    any other: g needs the log-sum-exps first. (squared_hellinger's is (1 - sum sqrt(p q)) / 2, which could be
             accumulated beside them; but it cancels where p and q nearly agree, and the gradient was then off by 1e-5
             of its norm.)
"""

import triton
import triton.language as tl

FLAT, LINEAR, SWEEP = range(3)


@triton.jit
def _excess(d):
    """e^d - 1 - d for |d| <= 1/2 by its series, in which nothing cancels, up to k = 8: relative error 4e-8"""
    y = 1.0 / 40320
    y = y * d + 1.0 / 5040
    y = y * d + 1.0 / 720
    y = y * d + 1.0 / 120
    y = y * d + 1.0 / 24
    y = y * d + 1.0 / 6
    y = y * d + 0.5
    return y * d * d


@triton.jit
def expm1(x):
    """e^x - 1"""
    return tl.where(tl.abs(x) < 0.5, _excess(x) + x, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1, corrected to first order for the rounding of 1 + x"""
    y = 1.0 + x
    return tl.log(y) + (x - (y - 1.0)) / y


@triton.jit
def tanh(x):
    """(1 - e^(-2|x|)) / (1 + e^(-2|x|)) with the sign of x"""
    y = expm1(-2.0 * tl.abs(x))
    y = y / (2.0 + y)
    return tl.where(x > 0, -y, y)


@triton.jit
def _kl(x, y, d):
    """x (log x - log y) - x + y, given d = log y - log x"""
    addend = tl.where(tl.abs(d) < 0.5, x * _excess(d), y - x * (1.0 + d))
    return tl.where(x > 0, addend, y)


@triton.jit
def times(q, factor):
    """q * factor, and 0 where q = 0 whatever the factor is"""
    return tl.where(q > 0, q * factor, 0.0)


@triton.jit
def _mix(d, w):
    """log(m / q) and log(m / p) of the mixture m = w p + (1 - w) q, given d = log p - log q. The error of the result is
    a fraction of that of d."""
    common = log1p(tl.where(d > 0, 1.0 - w, w) * expm1(-tl.abs(d)))
    return common + tl.maximum(d, 0.0), common + tl.maximum(-d, 0.0)


@triton.jit
def forward_kl(lp, lq, q, a):
    """KL(p || q) = sum p (log p - log q) - p + q; Hinton et al., arXiv:1503.02531. g = q - p, computed as f + p d where
    d = log q - log p is small: q - p would cancel."""
    p, d = tl.exp(lp), lq - lp
    f = _kl(p, q, d)
    return f, tl.where(tl.abs(d) < 0.5, f + p * d, q - p)


@triton.jit
def reverse_kl(lp, lq, q, a):
    """KL(q || p) = sum q (log q - log p) - q + p; MiniLLM, arXiv:2306.08543"""
    return _kl(q, tl.exp(lp), lp - lq), times(q, lq - lp)


@triton.jit
def jensen_shannon(lp, lq, q, a):
    """a KL(p || m) + (1 - a) KL(q || m) with m = a p + (1 - a) q; GKD, arXiv:2306.13649"""
    p = tl.exp(lp)
    m = a * p + (1.0 - a) * q
    over_q, over_p = _mix(lp - lq, a)
    return a * _kl(p, m, over_p) + (1.0 - a) * _kl(q, m, over_q), times(q, (a - 1.0) * over_q)


@triton.jit
def skew_kl(lp, lq, q, a):
    """KL(p || m) with m = a p + (1 - a) q; DistiLLM, arXiv:2402.03898"""
    p = tl.exp(lp)
    _, over_p = _mix(lp - lq, a)
    return _kl(p, a * p + (1.0 - a) * q, over_p), times(q, (a - 1.0) * expm1(-over_p))


@triton.jit
def skew_reverse_kl(lp, lq, q, a):
    """KL(q || m) with m = a q + (1 - a) p; DistiLLM, arXiv:2402.03898"""
    over_q, _ = _mix(lp - lq, 1.0 - a)
    return _kl(q, a * q + (1.0 - a) * tl.exp(lp), over_q), times(q, -over_q - a * expm1(-over_q))


@triton.jit
def alpha_divergence(lp, lq, q, a):
    """sum (p^a q^(1 - a) - a p - (1 - a) q) / (a (a - 1)); Cichocki and Amari, Entropy 12 (2010) 1532-1568"""
    d = lp - lq
    power = tl.where(tl.maximum(lp, lq) > float("-inf"), tl.exp(a * lp + (1.0 - a) * lq), 0.0)
    near = q * (_excess(a * d) - a * _excess(d))  # the linear terms cancel
    far = power - a * tl.exp(lp) - (1.0 - a) * q
    close = tl.maximum(tl.abs(d), tl.abs(a * d)) < 0.5
    return tl.where(close, near, far) / (a * (a - 1.0)), tl.where(close, -q * expm1(a * d), q - power) / a


@triton.jit
def total_variation(lp, lq, q, a):
    """1/2 sum |p - q|; f-distill, arXiv:2307.15190"""
    half = 0.5 * q
    return tl.abs(0.5 * tl.exp(lp) - half), tl.where(lq > lp, half, tl.where(lq < lp, -half, 0.0))


@triton.jit
def squared_hellinger(lp, lq, q, a):
    """1/2 sum (sqrt p - sqrt q)^2; Hellinger, J. reine angew. Math. 136 (1909)"""
    root_p, root_q = tl.exp(0.5 * lp), tl.exp(0.5 * lq)
    apart = root_p - root_q
    return 0.5 * apart * apart, -0.5 * root_q * apart


DIVERGENCES = {
    function.__name__: function
    for function in (
        forward_kl,
        reverse_kl,
        jensen_shannon,
        skew_kl,
        skew_reverse_kl,
        alpha_divergence,
        total_variation,
        squared_hellinger,
    )
}


def sums(name: str) -> int:
    """How sum_v g is computed."""
    return {"forward_kl": FLAT, "reverse_kl": LINEAR}.get(name, SWEEP)
