"""For our tests and our users' tests: the oracle, input makers, the error gate, the allocation recorder.

The oracle holds the full logits and lets autograd differentiate textbook formulas in float64; it imports no
backend, so that it cannot share a mistake with a closed-form gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .divergences import TABLE, Divergence
from .dtypes import accumulate_dtype
from .loss.options import Function, LossOptions, complete
from .teachers.head import TeacherHead
from .teachers.logits import TeacherLogits
from .teachers.mixture import Labels, Mixture
from .teachers.stream import LogitStream
from .teachers.top_k import TopK

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Allocations", "allowance", "dense_loss", "record_allocations", "relative_error", "textbook_divergence"]


def textbook_divergence(log_p: Tensor, log_q: Tensor, divergence: Any) -> Tensor:
    """D(p, q) of each row, summed from its definition; 0 log 0 = 0. Of measures that do not sum to 1 too, where each
    KL(x‖y) is sum x log(x / y) - x + y."""
    if isinstance(divergence, str):
        divergence = Divergence(divergence, TABLE[divergence].default)
    p, q, a = log_p.exp(), log_q.exp(), divergence.parameter

    def kl(log_x: Tensor, log_y: Tensor) -> Tensor:
        x = log_x.exp()
        safe_x = torch.where(x > 0, log_x, 0.0)
        safe_y = torch.where(x > 0, log_y, 0.0)
        return (x * (safe_x - safe_y)).sum(-1) - x.sum(-1) + log_y.exp().sum(-1)

    def log_mix(log_x: Tensor, log_y: Tensor, weight: float) -> Tensor:
        mixed = weight * log_x.exp() + (1 - weight) * log_y.exp()
        return torch.where(mixed > 0, mixed, 1.0).log()

    name = divergence.name
    if name == "forward_kl":
        return kl(log_p, log_q)
    if name == "reverse_kl":
        return kl(log_q, log_p)
    if name == "jensen_shannon":
        log_m = log_mix(log_p, log_q, a)
        return a * kl(log_p, log_m) + (1 - a) * kl(log_q, log_m)
    if name == "skew_kl":
        return kl(log_p, log_mix(log_p, log_q, a))
    if name == "skew_reverse_kl":
        return kl(log_q, log_mix(log_q, log_p, a))
    if name == "alpha_divergence":
        mass = a * p.sum(-1) + (1 - a) * q.sum(-1)
        return ((a * log_p + (1 - a) * log_q).exp().sum(-1) - mass) / (a * (a - 1))
    if name == "total_variation":
        return 0.5 * (p - q).abs().sum(-1)
    if name == "squared_hellinger":
        return 0.5 * ((0.5 * log_p).exp() - (0.5 * log_q).exp()).square().sum(-1)
    raise KeyError(name)


def _finish(raw: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    z = raw * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _outcomes(top: TopK, log_q: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """log p and log q over the tokens of a sparse teacher and its bucket, [N, k + 1] or [N, k]."""
    index, log_p = top.indices.reshape(len(log_q), -1), top.log_probs.reshape(len(log_q), -1).to(log_q.dtype)
    inside = log_q.gather(1, index)
    outside = log_q.scatter(1, index, -torch.inf)
    rest = torch.where(outside.isinf().all(-1), 0.0, outside.exp().sum(-1))
    tail = torch.where(rest > 0, rest, 1.0).log()[:, None]
    tail = torch.where(rest[:, None] > 0, tail, -torch.inf)
    if top.tail == "ignore" or (top.tail == "bucket" and index.shape[1] == log_q.shape[1]):
        return log_p, inside
    if top.tail == "renormalise":
        p = (log_p * (top.temperature / temperature)).softmax(-1)
        return torch.cat([p, torch.zeros_like(p[:, :1])], 1).log(), torch.cat([inside, tail], 1)
    p = log_p.exp()
    if top.tail_log_prob is None:
        p_tail = 1 - p.sum(-1, keepdim=True)
    else:
        p_tail = top.tail_log_prob.reshape(-1, 1).to(p.dtype).exp()
        whole = p.sum(-1, keepdim=True) + p_tail
        p, p_tail = p / whole, p_tail / whole
    return torch.cat([p, p_tail], 1).log(), torch.cat([inside, tail], 1)


def _mixed(mixture: Mixture, target: Tensor | None, rows: int, vocab: int, dtype: Any, temperature: float) -> Tensor:
    """Logits whose softmax at `temperature` is the mixture."""
    logs = []
    for teacher in mixture.teachers:
        if isinstance(teacher, Labels):
            assert target is not None
            one_hot = torch.nn.functional.one_hot(target.clamp(0, vocab - 1), vocab)
            logs.append(one_hot.to(dtype or torch.float32).log())
        elif isinstance(teacher, TopK):
            log_p = (teacher.log_probs.to(dtype or torch.float32) * teacher.temperature / temperature).log_softmax(-1)
            empty = log_p.new_full((rows, vocab), -torch.inf)
            logs.append(empty.scatter(1, teacher.indices.reshape(rows, -1), log_p.reshape(rows, -1)))
        else:
            logs.append((_teacher_logits(teacher, rows, vocab, dtype) / temperature).log_softmax(-1))
    if mixture.kind == "linear":
        mixed = sum(w * log_p.exp() for w, log_p in zip(mixture.weights, logs, strict=True))
        assert isinstance(mixed, Tensor)
        return mixed.log() * temperature
    blend = sum(w * log_p for w, log_p in zip(mixture.weights, logs, strict=True))
    assert isinstance(blend, Tensor)
    return blend * temperature


def _teacher_logits(teacher: Any, rows: int, vocab: int, dtype: torch.dtype | None) -> Tensor:
    def cast(x: Tensor) -> Tensor:
        return x if dtype is None else x.to(dtype)

    if isinstance(teacher, LogitStream):
        if not callable(teacher.source):
            raise TypeError("the oracle reads streams over callables only")
        return cast(teacher.source(torch.arange(rows)))
    if isinstance(teacher, TeacherHead):
        bias = None if teacher.bias is None else cast(teacher.bias)
        raw = torch.nn.functional.linear(cast(teacher.hidden), cast(teacher.weight), bias)
        return _finish(raw[..., :vocab].reshape(rows, vocab), teacher.logit_scale, teacher.softcap)
    logits = teacher.logits if isinstance(teacher, TeacherLogits) else teacher
    return cast(logits[..., :vocab]).reshape(rows, vocab)


def dense_loss(
    hidden: Tensor,
    weight: Tensor | None,
    target: Tensor | None = None,
    teacher: Any = None,
    *,
    compute_dtype: torch.dtype | None = torch.float64,
    **options: Unpack[LossOptions],
) -> Tensor:
    """`linear_distribution_loss` on full [N, V] logits, by autograd. weight None: hidden holds logits.

    compute_dtype float64: the oracle. None: the eager loss that people write, logits in the input dtype,
    upcast to fp32 for the log-softmax. Any number of derivatives. Memory: several [N, V] tensors. Options that say how
    a loss is computed, and return_metrics, change nothing.
    """
    given = SimpleNamespace(**complete(Function("dense_loss", own=("compute_dtype",)), options))
    lead = hidden.shape[:-1]

    def cast(x: Tensor) -> Tensor:
        return x if compute_dtype is None else x.to(compute_dtype)

    raw = cast(hidden).reshape(lead.numel(), hidden.shape[-1])
    if weight is not None:
        raw = torch.nn.functional.linear(raw, cast(weight), None if given.bias is None else cast(given.bias))
    if given.low_rank is not None:
        raw = raw + torch.nn.functional.linear(*map(cast, given.low_rank)).reshape(raw.shape)
    if raw.dtype in (torch.bfloat16, torch.float16):
        raw = raw.float()
    z = _finish(raw, given.logit_scale, given.softcap)  # [N, V]
    n, vocab = z.shape
    log_q = z.log_softmax(-1)
    total = torch.zeros(n, dtype=z.dtype, device=z.device)
    hard_weight = given.hard_weight
    if hard_weight is None:
        hard_weight = 1.0 if teacher is None and target is not None else 0.0
    valid = torch.ones(n, dtype=torch.bool, device=z.device)
    if target is not None:
        target = target.reshape(-1)
        valid = target != given.ignore_index
        if hard_weight:
            nll = -log_q.gather(1, torch.where(valid, target, 0)[:, None])[:, 0]
            if given.label_smoothing:
                nll = (1 - given.label_smoothing) * nll - given.label_smoothing * log_q.mean(-1)
            total = total + hard_weight * nll
    if teacher is not None and given.soft_weight:
        tau = given.temperature if given.teacher_temperature is None else given.teacher_temperature
        log_q_soft = (z / given.temperature).log_softmax(-1)
        if isinstance(teacher, TopK):
            log_p, log_q_soft = _outcomes(teacher, log_q_soft, tau)
        else:
            if isinstance(teacher, Mixture):
                log_p = _mixed(teacher, target, n, vocab, compute_dtype, tau)
            else:
                log_p = _teacher_logits(teacher, n, vocab, compute_dtype)
            log_p = (log_p.to(z.dtype) / tau).log_softmax(-1)
        scale = given.temperature**2 if given.temperature_scaling == "squared" else 1.0
        soft = textbook_divergence(log_p, log_q_soft, given.divergence)
        total = total + given.soft_weight * scale * soft
    if given.z_loss:
        total = total + given.z_loss * z.logsumexp(-1).square()
    if given.potential is not None:
        rows = given.potential[torch.zeros(n, dtype=torch.int64) if given.group is None else given.group.reshape(-1)]
        total = total + (log_q.exp() * rows.to(z.dtype)).sum(-1)
    if given.features is not None and given.feature_weight is not None:
        by = given.feature_weight.reshape(n, -1).to(z.dtype)
        total = total + (log_q.exp() @ given.features.to_dense().to(z.dtype) * by).sum(-1)
    if given.entropy_weight is not None:
        minus = torch.where(log_q.isinf(), 0.0, log_q)
        total = total - given.entropy_weight.reshape(-1).to(z.dtype) * (log_q.exp() * minus).sum(-1)
    weights = torch.ones_like(total) if given.row_weight is None else given.row_weight.reshape(-1).to(z.dtype)
    weights = torch.where(valid, weights, 0.0)
    total = torch.where(weights != 0, total, 0.0) * weights
    if given.reduction == "none":
        return total.reshape(lead)
    if given.reduction == "sum":
        return total.sum()
    if given.num_items is not None:
        return total.sum() / given.num_items
    denominator = weights.sum()
    return total.sum() / (denominator if float(denominator) != 0 else 1.0)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """The 2-norm of value - exact over that of exact (over 1 where exact is zero), in float64."""
    value, exact = value.detach().double(), exact.detach().double()
    scale = float(exact.norm())
    return float((value - exact).norm()) / (scale if scale > 0 else 1.0)


def _inexact(value: Any, relative: float, generator: torch.Generator) -> Any:
    """`value` in float64, every number of it off by a random relative error of that rms; what holds no floats as is."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.layout != torch.strided:
            return value
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        return value.detach().double().mul(1 + relative * noise)
    if isinstance(value, LogitStream):
        source = value.source
        return LogitStream(lambda rows: _inexact(source(rows), relative, generator)) if callable(source) else value
    if isinstance(value, Mixture):
        teachers = [_inexact(teacher, relative, generator) for teacher in value.teachers]
        return Mixture(teachers, value.weights, value.kind)
    if isinstance(value, TeacherHead | TeacherLogits | TopK):
        return replace(value, **{name: _inexact(x, relative, generator) for name, x in vars(value).items()})
    return tuple(_inexact(x, relative, generator) for x in value) if isinstance(value, tuple) else value


def conditions(
    evaluate: Callable[[dict[str, Any]], Sequence[Tensor]], arguments: dict[str, Any], exact: Sequence[Tensor]
) -> list[float]:
    """The condition number of each result for rounding: its relative error over that of the numbers given.

    evaluate: arguments (float64) -> results, in float64; exact: what it returns for `arguments`. Every number given
    is changed by an independent relative error of rms 1e-7, eight times (seeded); the rms of the results' relative
    errors, over 1e-7. About 1 to 3 for the gradient of a loss, hundreds where p and q nearly agree.
    """
    relative, samples = 1e-7, 8
    generator = torch.Generator().manual_seed(0)
    squares = [0.0] * len(exact)
    for _ in range(samples):
        found = evaluate({name: _inexact(value, relative, generator) for name, value in arguments.items()})
        for result, (value, truth) in enumerate(zip(found, exact, strict=True)):
            squares[result] += (relative_error(value, truth) / relative) ** 2 / samples
    return [math.sqrt(square) for square in squares]


def one_after_the_other(length: int) -> int:
    """What `allowance` takes as the length of a sum without blocks, such as a library's product with a vector: each of
    its L additions rounds, L / 2 roundings of the whole, which a sum of L^2 / 4 numbers in blocks has too."""
    return max(length, length * length // 4)


def allowance(
    exact: Tensor, dtype: torch.dtype, condition: float, sums: Sequence[int], narrow_roundings: int = 3
) -> float:
    """The error gate: the relative 2-norm error that rounding may leave in a result that is held in `dtype`.

        3 sqrt(n / 12) max(1, condition) eps(accumulation dtype)     n = 24 + sum of sqrt(L) over `sums`
        + 3 sqrt(narrow_roundings / 12) eps(dtype)                   only where dtype is narrower than that
        + sqrt(numel) / 2 * (least subnormal of dtype) / norm(exact)

    It depends on the problem alone, not on what some other implementation's sums happened to round to, so it is the
    same on every processor. Derivation:

    - One rounding is off by at most eps / 2 and, uniform in that interval, by eps / sqrt(12) rms. Independent
      roundings add in quadrature: n of them give eps sqrt(n / 12).
    - A sum of L numbers in blocks of sqrt(L) (the lanes, tiles and blocks of a product, and trees do better) takes an
      addend through 2 sqrt(L) additions. Each rounds a partial sum, whose mean square is a half of the whole's for
      addends of random sign, a third for positive ones: sqrt(L) roundings of the whole. A result goes through the
      `sums` of its path: of H products for a logit, of V exponentials, and last over the vocabulary (dhidden, ddown)
      or over rows (the loss, dweight, dbias, dup).
    - 24: exp and log (or log1p, expm1, tanh) at an rms error of one eps, which is 12 roundings, each. The few single
      roundings beside them (bias, scale, temperature, cotangent) are less than what the blocks leave over.
    - The condition number (see `conditions`) turns relative errors of intermediate numbers into one of the result.
      It is not taken below 1: the last operations' roundings are in the result itself.
    - Logit gradients are rounded to a narrow dtype once, for the products; a gradient once as it is saved and once
      as it is scaled: three narrow roundings. They are independent, and a product's do not grow by the condition.
    - Below the normal range a number is off by up to half of the least subnormal, which fp16 gradients reach.
    - Not covered: a result in which every row's gradient cancels beyond what its inputs' errors explain, as
      q_y - 1 does for a label of probability 1. Give such a problem rows whose gradient does not.
    - 3: standard deviations. The norm of many independent errors hardly leaves one; a loss is a single number.
    """
    wide, own = torch.finfo(accumulate_dtype(dtype)), torch.finfo(dtype)
    roundings = 24 + sum(math.sqrt(length) for length in sums)
    gate = 3 * math.sqrt(roundings / 12) * max(1.0, condition) * wide.eps
    if own.eps > wide.eps:
        gate += 3 * math.sqrt(narrow_roundings / 12) * own.eps
    scale = float(exact.detach().double().norm())
    return gate + (math.sqrt(exact.numel()) / 2 * own.tiny * own.eps / scale if scale > 0 else 0.0)


@dataclass
class Allocations:
    """What `record_allocations` saw on the CPU, in bytes."""

    largest: int
    peak: int  # of memory allocated and not yet freed since the start


class record_allocations:  # noqa: N801 - used as a context manager, like torch.no_grad
    """Record every allocation of torch's CPU allocator, inside operators too (by the profiler's memory events).

    with record_allocations() as seen: ...; afterwards seen.largest and seen.peak are set.
    """

    def __enter__(self) -> Allocations:
        self.seen = Allocations(0, 0)
        kinds = [torch.profiler.ProfilerActivity.CPU]
        self.profile = torch.profiler.profile(activities=kinds, profile_memory=True, acc_events=True)  # or 2.11 warns
        self.profile.__enter__()
        return self.seen

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        profiler = self.profile.profiler
        assert profiler is not None
        assert profiler.kineto_results is not None
        events: list[Any] = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
        live = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            live += event.nbytes()
            self.seen.largest = max(self.seen.largest, event.nbytes())
            self.seen.peak = max(self.seen.peak, live)
