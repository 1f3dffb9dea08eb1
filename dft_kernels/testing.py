"""For our tests and our users' tests: the oracle, input makers, the error gate, the allocation recorder.

The oracle holds the full logits and lets autograd differentiate textbook formulas in float64; it imports no
backend, so that it cannot share a mistake with a closed-form gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .divergences import TABLE, Divergence
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


def allowance(eager: Tensor, exact: Tensor, dtype: torch.dtype) -> float:
    """The error gate: twice the relative error of the same-dtype eager loss, plus one eps of the input dtype."""
    return 2 * relative_error(eager, exact) + torch.finfo(dtype).eps


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
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
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
