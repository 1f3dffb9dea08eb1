"""The row kernel: statistics of a row of logits, its gradient, or both in one launch, for every divergence.

One program a row. With z = cap tanh(scale raw / cap), q = softmax(z), qT = softmax(z / T), p the target's softmax at
its temperature, (f, g) the divergence's pair (divergences.py), H the entropy of q, G the row's potential, and the
cotangents a (of LOG_PROB), m (MEAN_LOG_PROB), h (ENTROPY), l (LSE), d (DIVERGENCE), c (POTENTIAL):

    dz = q (l - a - m - h (log q + H) + c (G - <q, G>)) + a e_y + m / V + d (g - qT sum g) / T
    draw = dz scale (1 - (z / cap)^2)

Device memory traffic a logit, with b bytes of it and t of its target's (4 each where a product made them, 2 for a
teacher's bf16 logits), o of its gradient:

    statistics   b           log-sum-exps and everything at T = 1, online (Milakov and Gimelshein, arXiv:1805.02867)
                 2 (b + t)   with the value of a divergence, whose f needs the log-sum-exps first
                 b + t       for that alone, where the log-sum-exps are given
    gradient     b + t + o
    both         2 b + o without a target
                 2 (b + t) + o with a FLAT or LINEAR divergence, whose value is summed in the gradient's sweep
                 3 (b + t) + o with any other

Each sweep goes in the direction opposite to the one before, so that it begins with what that has left in the L2 cache.
The last one goes from the end of the row, so that `out` may be the upper half of the memory of `logits`.
"""

import triton
import triton.language as tl

from .divergences import FLAT, LINEAR, SWEEP, tanh, times

# The statistics of a row, as indices into [STATISTICS, R]. A log-sum-exp is the nearest fp32 number and the rounding
# error of that: log q = (z - LSE) - LSE_LOW is then accurate to an ulp of log q, z - LSE only to an ulp of LSE.
LOG_PROB = tl.constexpr(0)
MEAN_LOG_PROB = tl.constexpr(1)
ENTROPY = tl.constexpr(2)
LSE = tl.constexpr(3)
DIVERGENCE = tl.constexpr(4)
POTENTIAL = tl.constexpr(5)
CORRECT = tl.constexpr(6)
AGREEMENT = tl.constexpr(7)
SOFT_LSE = tl.constexpr(8)
TARGET_LSE = tl.constexpr(9)
SLOPE = tl.constexpr(10)
LSE_LOW = tl.constexpr(11)
SOFT_LSE_LOW = tl.constexpr(12)
TARGET_LSE_LOW = tl.constexpr(13)
TOP = tl.constexpr(14)
TARGET_TOP = tl.constexpr(15)
STATISTICS = 16

_FLAT, _LINEAR, _SWEEP = (tl.constexpr(kind) for kind in (FLAT, LINEAR, SWEEP))

# The same as bits of WANTED and LIVE
HAS_LOG_PROB = tl.constexpr(1 << 0)
HAS_MEAN_LOG_PROB = tl.constexpr(1 << 1)
HAS_ENTROPY = tl.constexpr(1 << 2)
HAS_LSE = tl.constexpr(1 << 3)
HAS_DIVERGENCE = tl.constexpr(1 << 4)
HAS_POTENTIAL = tl.constexpr(1 << 5)
HAS_CORRECT = tl.constexpr(1 << 6)
HAS_AGREEMENT = tl.constexpr(1 << 7)
HAS_SOFT_LSE = tl.constexpr(1 << 8)  # the log-sum-exps of a divergence whose value is not wanted yet
_LOWEST = tl.constexpr(-3e38)  # below any logit but -inf, and finite: the difference to -inf is -inf, not NaN
AT_ONE = tl.constexpr(0b101111)  # what depends on q = softmax(z) at T = 1: all before CORRECT but DIVERGENCE


@triton.jit
def finish(raw, scale, cap, CAP: tl.constexpr):
    """z = cap tanh(scale raw / cap) in fp32; without CAP z = scale raw"""
    z = raw.to(tl.float32) * scale
    if CAP:
        z = cap * tanh(z / cap)
    return z


@triton.jit
def _read(row, at, V, reach, scale, cap, CAP: tl.constexpr):
    """A block of finished logits, -inf beyond the vocabulary. reach: V, or the next multiple of 16 where a row can be
    read that far, so that loads are 16 bytes wide for any V"""
    raw = tl.load(row + at, mask=at < reach, other=0.0)
    return tl.where(at < V, finish(raw, scale, cap, CAP), float("-inf"))


@triton.jit
def _start(step, V, BLOCK: tl.constexpr, BACKWARDS: tl.constexpr):
    """The column at which a step of a sweep begins"""
    if BACKWARDS:
        return (tl.cdiv(V, BLOCK) - 1 - step) * BLOCK
    else:
        return step * BLOCK


@triton.jit
def _lse(origin, total):
    """origin + log(total) as the nearest number, and the rounding error of that"""
    rest = tl.log(total)
    lse = origin + rest
    return lse, tl.where(tl.abs(lse) < float("inf"), (origin - lse) + rest, 0.0)


@triton.jit(do_not_specialize=["statistics_stride", "cotangents_stride"])
def row_kernel(
    logits,  # [R, V] raw
    logits_stride,
    logits_reach,
    target,  # [R, V] raw, any floating dtype
    target_stride,
    target_reach,
    out,  # [R, V]: draw
    out_stride,
    statistics,  # [STATISTICS, R]: written by the statistics half, read by the gradient's
    statistics_stride,
    cotangents,  # [6, R]
    cotangents_stride,
    lse_slope,  # [R] or None: LSE's cotangent is cotangents[LSE] + lse_slope * LSE
    label,  # [R] int64
    group,  # [R] int64 or None: all 0
    potential,  # [G, V]
    V,
    scale,
    cap,
    target_scale,
    target_cap,
    inverse,  # 1 / T
    target_inverse,
    parameter,  # of the divergence
    PAIR: tl.constexpr,  # (f, g), None: no divergence
    SUMS: tl.constexpr,
    SAME: tl.constexpr,  # T = 1
    CAP: tl.constexpr,
    TARGET_CAP: tl.constexpr,
    WANTED: tl.constexpr,  # bits: the statistics to compute, 0: they are given
    GIVEN: tl.constexpr,  # of WANTED's divergence the log-sum-exps are given, and nothing else is wanted
    LIVE: tl.constexpr,  # bits: what has a cotangent
    GRADIENT: tl.constexpr,
    IN_PLACE: tl.constexpr,  # out is memory of logits
    BLOCK: tl.constexpr,
):
    """One program a row: up to three sweeps over it, see the docstring of this module."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    steps = tl.cdiv(V, BLOCK)
    lanes = tl.arange(0, BLOCK)
    if target is not None:
        target += row * target_stride
    if HAS_POTENTIAL & (WANTED | LIVE):
        if group is not None:
            potential += tl.load(group + row) * V
    if (HAS_LOG_PROB | HAS_CORRECT) & (WANTED | LIVE):
        y = tl.load(label + row)
    known = statistics + row

    if WANTED and not GIVEN:
        # whether the divergence's sums need a sweep of their own, between this one and the gradient's
        BETWEEN: tl.constexpr = HAS_DIVERGENCE & WANTED and (not GRADIENT or SUMS == _SWEEP)
        ARGMAX: tl.constexpr = (HAS_CORRECT | HAS_AGREEMENT) & WANTED
        AGREES: tl.constexpr = HAS_AGREEMENT & WANTED
        TARGET: tl.constexpr = PAIR is not None or AGREES
        ONE: tl.constexpr = AT_ONE & WANTED or (PAIR is not None and SAME)
        SOFT: tl.constexpr = PAIR is not None and not SAME
        # Every lane keeps the maximum of what it has seen and sums relative to that, so that a sweep has no barrier.
        # With d = z - maximum, one exponential e = exp(-|d|) serves both cases: if d > 0 the sums are rescaled by e and
        # the logit adds 1, else it adds e.
        zeros = tl.zeros([BLOCK], tl.float32)
        top, total, soft_total = zeros + _LOWEST, zeros, zeros
        target_top, target_total = zeros + _LOWEST, zeros
        entropy, pulled, mean, joint = zeros, zeros, zeros, zeros
        best, target_best = lanes, lanes
        for step in range(steps):
            at = _start(step, V, BLOCK, BETWEEN) + lanes
            z = _read(logits, at, V, logits_reach, scale, cap, CAP)
            d = z - top
            if ARGMAX:
                best = tl.where(d >= 0 if BETWEEN else d > 0, at, best)
            if ONE:
                e = tl.exp(-tl.abs(d))
                if HAS_ENTROPY & WANTED:
                    entropy = tl.where(d > 0, times(e, entropy - d * total), entropy + times(e, d))
                if HAS_POTENTIAL & WANTED:
                    pull = tl.load(potential + at, mask=at < V, other=0.0)
                    pulled = tl.where(d > 0, pulled * e + pull, pulled + e * pull)
                total = tl.where(d > 0, total * e + 1.0, total + e)
            if HAS_MEAN_LOG_PROB & WANTED:
                mean += tl.where(at < V, z, 0.0)
            if TARGET:
                t = _read(target, at, V, target_reach, target_scale, target_cap, TARGET_CAP)
                target_d = t - target_top
            if AGREES:
                target_best = tl.where(target_d >= 0 if BETWEEN else target_d > 0, at, target_best)
            if PAIR is not None:
                if SOFT:
                    e = tl.exp(-tl.abs(d) * inverse)
                    soft_total = tl.where(d > 0, soft_total * e + 1.0, soft_total + e)
                if not BETWEEN and SUMS == _LINEAR:
                    ratio = z * inverse - t * target_inverse
                    joint = tl.where(d > 0, times(e, joint) + ratio, joint + times(e, ratio))
                target_e = tl.exp(-tl.abs(target_d) * target_inverse)
                target_total = tl.where(target_d > 0, target_total * target_e + 1.0, target_total + target_e)
            if TARGET:
                target_top = tl.maximum(target_top, t)
            top = tl.maximum(top, z)

        # Reduction over the lanes
        origin = tl.max(top, 0)
        back = top - origin
        if ONE:
            e = tl.exp(back)
            if HAS_ENTROPY & WANTED:
                entropy = tl.sum(times(e, entropy + back * total), 0)
            if HAS_POTENTIAL & WANTED:
                pulled = tl.sum(pulled * e, 0)
            total = tl.sum(total * e, 0)
        if ARGMAX:
            best = tl.min(tl.where(back == 0, best, V), 0)
        if TARGET:
            target_origin = tl.max(target_top, 0)
            target_back = target_top - target_origin
        if AGREES:
            target_best = tl.min(tl.where(target_back == 0, target_best, V), 0)
        if PAIR is not None:
            if SOFT:
                e = tl.exp(back * inverse)
                soft_total = tl.sum(soft_total * e, 0)
            else:
                soft_total = total
            if not BETWEEN and SUMS == _LINEAR:
                joint = tl.sum(times(e, joint), 0)
            target_total = tl.sum(target_total * tl.exp(target_back * target_inverse), 0)
        if ONE:
            lse, lse_low = _lse(origin, total)
            tl.store(known + LSE * statistics_stride, lse)
            tl.store(known + LSE_LOW * statistics_stride, lse_low)
        if HAS_LOG_PROB & WANTED:
            inside = (y >= 0) & (y < V)
            z_y = finish(tl.load(logits + tl.where(inside, y, 0)), scale, cap, CAP)
            tl.store(known + LOG_PROB * statistics_stride, tl.where(inside, (z_y - lse) - lse_low, float("nan")))
        if HAS_MEAN_LOG_PROB & WANTED:
            tl.store(known + MEAN_LOG_PROB * statistics_stride, (tl.sum(mean, 0) / V - lse) - lse_low)
        if HAS_ENTROPY & WANTED:
            spread = tl.log(total) - entropy / total
            tl.store(known + ENTROPY * statistics_stride, spread)
        if HAS_POTENTIAL & WANTED:
            pulled = pulled / total
            tl.store(known + POTENTIAL * statistics_stride, pulled)
        if HAS_CORRECT & WANTED:
            tl.store(known + CORRECT * statistics_stride, (best == y).to(tl.float32))
        if ARGMAX:
            tl.store(known + TOP * statistics_stride, origin)
        if AGREES:
            tl.store(known + TARGET_TOP * statistics_stride, target_origin)
            tl.store(known + AGREEMENT * statistics_stride, (best == target_best).to(tl.float32))
        if PAIR is not None:
            target_lse, target_low = _lse(target_origin * target_inverse, target_total)
            if SAME:
                soft_lse, soft_low = lse, lse_low
            else:
                soft_lse, soft_low = _lse(origin * inverse, soft_total)
            tl.store(known + SOFT_LSE * statistics_stride, soft_lse)
            tl.store(known + SOFT_LSE_LOW * statistics_stride, soft_low)
            tl.store(known + TARGET_LSE * statistics_stride, target_lse)
            tl.store(known + TARGET_LSE_LOW * statistics_stride, target_low)
            slope = 0.0
            if not BETWEEN and SUMS == _LINEAR:
                slope = (joint / soft_total - (soft_lse - target_lse)) - (soft_low - target_low)
    else:
        if AT_ONE & LIVE:
            lse = tl.load(known + LSE * statistics_stride)
            lse_low = tl.load(known + LSE_LOW * statistics_stride)
        if HAS_ENTROPY & LIVE:
            spread = tl.load(known + ENTROPY * statistics_stride)
        if HAS_POTENTIAL & LIVE:
            pulled = tl.load(known + POTENTIAL * statistics_stride)
        if PAIR is not None:
            soft_lse = tl.load(known + SOFT_LSE * statistics_stride)
            soft_low = tl.load(known + SOFT_LSE_LOW * statistics_stride)
            target_lse = tl.load(known + TARGET_LSE * statistics_stride)
            target_low = tl.load(known + TARGET_LSE_LOW * statistics_stride)
            slope = tl.load(known + SLOPE * statistics_stride)

    if PAIR is not None and WANTED:
        if HAS_DIVERGENCE & WANTED and (GIVEN or not GRADIENT or SUMS == _SWEEP):
            value, slopes = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            for step in range(steps):
                at = _start(step, V, BLOCK, False) + lanes
                z = _read(logits, at, V, logits_reach, scale, cap, CAP)
                t = _read(target, at, V, target_reach, target_scale, target_cap, TARGET_CAP)
                lq = (z * inverse - soft_lse) - soft_low
                lp = (t * target_inverse - target_lse) - target_low
                f, g = PAIR(lp, lq, tl.exp(lq), parameter)
                value += f
                if HAS_DIVERGENCE & LIVE and SUMS != _FLAT:
                    slopes += g
            tl.store(known + DIVERGENCE * statistics_stride, tl.sum(value, 0))
            slope = tl.sum(slopes, 0)
        tl.store(known + SLOPE * statistics_stride, slope)

    if GRADIENT:
        cotangents += row
        base, every, hit = 0.0, 0.0, 0.0  # the factor of q; added to every entry; added to the label's
        active = False
        if HAS_LSE & LIVE:
            base = tl.load(cotangents + LSE * cotangents_stride)
            if lse_slope is not None:
                base += tl.load(lse_slope + row) * lse
            active = active | (base != 0)
        if HAS_LOG_PROB & LIVE:
            hit = tl.load(cotangents + LOG_PROB * cotangents_stride)
            active = active | (hit != 0)
            hit = tl.where((y >= 0) & (y < V), hit, float("nan"))
            base -= hit
        if HAS_MEAN_LOG_PROB & LIVE:
            every = tl.load(cotangents + MEAN_LOG_PROB * cotangents_stride)
            active = active | (every != 0)
            base -= every
            every = every / V
        if HAS_ENTROPY & LIVE:
            spread_by = tl.load(cotangents + ENTROPY * cotangents_stride)
            active = active | (spread_by != 0)
            base -= spread_by * spread
        if HAS_POTENTIAL & LIVE:
            pulled_by = tl.load(cotangents + POTENTIAL * cotangents_stride)
            active = active | (pulled_by != 0)
            base -= pulled_by * pulled
        if HAS_DIVERGENCE & LIVE:
            soft_by = tl.load(cotangents + DIVERGENCE * cotangents_stride)
            active = active | (soft_by != 0)
            soft_by = soft_by * inverse
        SUMMED: tl.constexpr = WANTED and PAIR is not None and SUMS != _SWEEP  # the value is summed here
        value = tl.zeros([BLOCK], tl.float32)
        out += row * out_stride
        for step in range(steps):
            at = _start(step, V, BLOCK, True) + lanes
            z = _read(logits, at, V, logits_reach, scale, cap, CAP)
            dz = tl.zeros([BLOCK], tl.float32)
            if AT_ONE & LIVE:
                lq = (z - lse) - lse_low
                q = tl.exp(lq)
                factor = base
                if HAS_ENTROPY & LIVE:
                    factor = factor - spread_by * lq
                if HAS_POTENTIAL & LIVE:
                    factor = factor + pulled_by * tl.load(potential + at, mask=at < V, other=0.0)
                dz = times(q, factor)
                if HAS_LOG_PROB & LIVE:
                    dz += tl.where(at == y, hit, 0.0)
                if HAS_MEAN_LOG_PROB & LIVE:
                    dz += every
            if SUMMED or HAS_DIVERGENCE & LIVE:
                t = _read(target, at, V, target_reach, target_scale, target_cap, TARGET_CAP)
                if not (SAME and AT_ONE & LIVE):
                    lq = (z * inverse - soft_lse) - soft_low
                    q = tl.exp(lq)
                lp = (t * target_inverse - target_lse) - target_low
                f, g = PAIR(lp, lq, q, parameter)
                if SUMMED:
                    value += f
                if HAS_DIVERGENCE & LIVE:
                    if SUMS != _FLAT:
                        g -= times(q, slope)
                    dz += soft_by * g
            if CAP:
                dz *= 1.0 - (z / cap) * (z / cap)
            dz = tl.where(active, dz * scale, 0.0)
            if IN_PLACE:
                tl.debug_barrier()  # all of the block is read before any of it is written
            tl.store(out + at, dz.to(out.dtype.element_ty), mask=at < V)
        if SUMMED:
            tl.store(known + DIVERGENCE * statistics_stride, tl.sum(value, 0))
