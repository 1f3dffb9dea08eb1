"""The chunk step of a cross-entropy without logits: its product leaves exponentials (csrc/cuda/exponentials.cu).

With c_n the logit of row n's label y and S_n the sum of the exponentials of all other columns,

    e[n, v] = exp(z[n, v] - c_n), e[n, y] = 0;   log q_y = -log(1 + S_n),   q_v = e[n, v] / (1 + S_n)

The gradient of a row's logits is r_n e[n, v] + t_n [v = y] + m_n / V, so that its products are of e in bf16:

    dhidden_n = r_n (e weight)_n + t_n weight_y + m_n mean(weight)
    dweight   = e.T (r hidden) + sum over n of t_n hidden_n at y_n + sum over n of m_n hidden_n / V

No maximum comes first, and what is rounded to bf16 is small: the label's share, t, is not, and keeps its digits where
q_y is near 1. Against float64 on SmolLM2's hidden states (512 rows of LAMBADA) the gradients before their own
rounding are off by 0.065 % (dhidden) and 0.076 % (dweight), where fp32 logits, whose dlogits are rounded, give 0.13 %
and 0.11 %. Rows of dweight that are labels are multiplied again in fp32, few columns of e: the two shares of a frequent
token nearly cancel, and one added to the rounded other is off by 0.29 % where 0.18 % is the rounding of the result.

A row whose label is more than 46 nats below its logits, or that holds NaN, is found from 1 + S_n and computed from its
logits; that takes one look from the host a chunk.

Memory: 2 bytes a logit of a chunk, or of all rows where they are kept for one product of dweight. FLOPs: 6 N H V, and
2 N H a distinct label.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from . import extension, gemm
from .contract import Backward, Chunk, Cotangents, Row, Statistics, Terms
from .rows import Operand, RowOperations, RowWorkspace, row_matrix

_ASKED = frozenset({Row.LOG_PROB, Row.MEAN_LOG_PROB, Row.LSE, Row.ENTROPY, Row.CORRECT})
_COMPILED_FOR = (9, 0)
_METRICS = frozenset({Row.ENTROPY, Row.CORRECT})


def fit(terms: Terms, like: Tensor) -> bool:
    """Whether these terms, of hidden states like these, can be computed so."""
    weight, live = terms.head.weight, terms.differentiated
    asked = terms.wanted | live
    if weight is None or terms.up is not None or terms.features is not None or terms.active:
        return False
    return (
        like.dtype == torch.bfloat16
        and terms.logits_dtype == torch.float32
        and Row.LOG_PROB in live
        and asked <= _ASKED
        and Row.ENTROPY not in live
        and not (Row.MEAN_LOG_PROB in asked and terms.head.softcap is not None)
        and not terms.columns
        and weight.stride(1) == 1
        and all(n % 8 == 0 for n in (*weight.shape, weight.stride(0)))
        and weight.data_ptr() % 16 == 0
        and getattr(extension.CUDA, "EXPONENTIALS", False)
        and (not like.is_cuda or torch.cuda.get_device_capability(like.device) == _COMPILED_FOR)
    )


class Factors(NamedTuple):
    """A chunk's factors of its gradient, [R] in fp32, see the head of the module; of rows computed again r = 1 and the
    others are 0."""

    hidden: Tensor
    label: Tensor
    r: Tensor
    t: Tensor
    m: Tensor


@dataclass
class ExponentialWorkspace(RowWorkspace):
    """dlogits: the exponentials, of `rows` rows or of those that are kept. mean: of the weight's rows, [H], where
    MEAN_LOG_PROB is asked for; bias: [V] in fp32; factors: of the rows whose share of dweight waits."""

    mean: Tensor | None = None
    bias: Tensor | None = None
    factors: list[Factors] = field(default_factory=list)


def workspace(rows: int, vocab: int, like: Tensor, terms: Terms, kept: int) -> ExponentialWorkspace:
    """Memory for the exponentials of `rows` rows, or of those kept."""
    assert terms.head.weight is not None
    mean = terms.head.weight.mean(0, dtype=torch.float32) if Row.MEAN_LOG_PROB in terms.wanted else None
    bias = None if terms.head.bias is None else terms.head.bias.float().contiguous()
    e = row_matrix(kept or rows, vocab, like, like.dtype)[:, :vocab]
    return ExponentialWorkspace(rows, terms, dlogits=e, keeps=kept > 0, mean=mean, bias=bias)


def step(workspace: ExponentialWorkspace, chunk: Chunk, backward: Backward, operations: RowOperations) -> Statistics:
    """Both halves of a chunk step. operations: of the rows that are computed from their logits."""
    terms, kernels = workspace.terms, extension.CUDA
    weight, scale, cap = terms.head.weight, terms.head.logit_scale, terms.head.softcap
    assert weight is not None
    assert chunk.label is not None
    assert workspace.dlogits is not None
    hidden, label = chunk.hidden.contiguous(), chunk.label.contiguous()
    first = sum(len(part.hidden) for part in workspace.factors)
    e = workspace.dlogits[first : first + len(hidden)]
    bias, metrics = workspace.bias, bool(terms.wanted & _METRICS)
    shift, number, mean_logit = kernels.label_logits(hidden, weight, bias, label, workspace.mean, scale, cap)
    sums, moments, tops = kernels.exponentials(hidden, weight, bias, shift, number, scale, cap, metrics, e)
    if mean_logit is not None:
        mean_logit = scale * (mean_logit if bias is None else mean_logit + bias.mean())
    rows = _Rows(label, number >= 0, shift, sums.sum(0))
    statistics = _statistics(rows, mean_logit, moments, tops)
    bad = ~(rows.total < kernels.BAD_TOTAL)
    r, t, m = (torch.where(bad, 0.0, x) for x in _factors(rows, terms, backward, statistics))
    if bool(bad.any()):
        again = bad.nonzero()[:, 0]
        _again(chunk, backward, operations, again, e, statistics, terms)
        r[again] = 1.0
    factors = Factors(hidden, label, r, t, m)
    if backward.dhidden is not None:
        at_all = None if workspace.mean is None else m
        product = gemm.wide_product(e, weight)
        kernels.row_gradient_of_labels(hidden, weight, label, workspace.mean, product, r, t, at_all, backward.dhidden)
    if backward.dbias is not None:
        _dbias(e, factors, backward.dbias, add=not backward.first)
    if backward.dweight is not None:
        workspace.factors.append(factors)
        if backward.last or not workspace.keeps:
            parts = workspace.factors
            whole = factors if len(parts) == 1 else Factors(*(torch.cat(part) for part in zip(*parts, strict=True)))
            add = not (backward.first or workspace.keeps)
            _dweight(workspace.dlogits[: len(whole.hidden)], whole, workspace.mean, backward.dweight, add)
            parts.clear()
    return Statistics(statistics)


class _Rows(NamedTuple):
    """What the product left of a chunk's rows, [R]: their labels, whether there is one, c and S."""

    label: Tensor
    labelled: Tensor
    shift: Tensor
    rest: Tensor

    @property
    def total(self) -> Tensor:
        """The sum of all exponentials: the label's is 1."""
        return self.rest + self.labelled


def _statistics(rows: _Rows, mean_logit: Tensor | None, moments: Tensor | None, tops: Tensor | None) -> Tensor:
    """The row quantities [len(Row), R]."""
    out = rows.rest.new_zeros(len(Row), len(rows.rest))
    log_total = torch.where(rows.labelled, rows.rest.log1p(), rows.rest.log())
    out[Row.LSE] = lse = rows.shift + log_total
    out[Row.LSE_LOW] = (rows.shift - lse) + log_total
    out[Row.LOG_PROB] = torch.where(rows.labelled, -log_total, torch.nan)
    if mean_logit is not None:
        out[Row.MEAN_LOG_PROB] = (mean_logit - rows.shift) - log_total
    if moments is not None and tops is not None:
        out[Row.ENTROPY] = log_total - moments.sum(0) / rows.total
        top = tops.amax(0)
        out[Row.CORRECT] = (top < 0) | ((top == 0) & (rows.label == 0))  # of equal logits the first
    return out


def _factors(rows: _Rows, terms: Terms, backward: Backward, statistics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r, t, m of the head of the module, from the cotangents of the row quantities."""
    by, scale, cap = backward.cotangents.settled(statistics), terms.head.logit_scale, terms.head.softcap
    hit, mean, lse = by[Row.LOG_PROB], by[Row.MEAN_LOG_PROB], by[Row.LSE]
    active = (by != 0).any(0)
    hit = torch.where(rows.labelled | ~active, hit, torch.nan)
    r = scale * (lse - hit - mean) / rows.total
    t = scale * (hit * rows.rest + (lse - mean)) / rows.total
    if cap is not None:
        t = t * (1.0 - (rows.shift / cap).square())
    return torch.where(active, r, 0.0), torch.where(active & rows.labelled, t, 0.0), scale * mean


def _again(
    chunk: Chunk,
    backward: Backward,
    operations: RowOperations,
    rows: Tensor,
    e: Tensor,
    statistics: Tensor,
    terms: Terms,
) -> None:
    """Rows from their logits: their statistics, and their whole gradient in e."""
    assert terms.head.weight is not None
    assert chunk.label is not None
    cotangents, vocab = backward.cotangents, e.shape[1]
    for some in rows.split(max(1, len(e) // 3)):  # whose logits and gradient take no more than all exponentials
        part = Chunk(chunk.hidden[some], chunk.label[some])
        logits = row_matrix(len(some), vocab, statistics, statistics.dtype)[:, :vocab]
        dlogits = row_matrix(len(some), vocab, e, e.dtype)[:, :vocab]
        gemm.logits_(part.hidden, terms.head.weight, terms.head.bias, logits)
        slope = None if cotangents.lse_slope is None else cotangents.lse_slope[some]
        own = Cotangents(cotangents.rows[:, some].contiguous(), None, slope)
        statistics[:, some] = operations.row_step_(Operand(logits, part, terms), own, dlogits)
        e[some] = dlogits


def _dweight(e: Tensor, factors: Factors, mean: Tensor | None, out: Tensor, add: bool) -> None:
    """out (+)= the gradient of the weight; `out` in the accumulation dtype, or in the input dtype where it is written
    once. mean: as the workspace has it."""
    scaled = torch.mul(factors.hidden, factors.r[:, None], out=torch.empty_like(factors.hidden))
    shared = None if mean is None else (factors.m[:, None] * factors.hidden).sum(0) / e.shape[1]
    once = out.dtype == e.dtype
    if once and shared is not None:
        torch.addmm(shared.to(out.dtype), e.t(), scaled, out=out)
    else:
        gemm.dweight_(e, scaled, out, accumulate=add)
        if shared is not None:
            out += shared
    order = torch.argsort(factors.label, stable=True)
    distinct, counts = torch.unique_consecutive(factors.label[order], return_counts=True)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    product = None
    if once:  # the rows of the labels, before they are rounded
        columns = e.index_select(1, distinct.clamp(0, e.shape[1] - 1))
        product = gemm.wide_product(columns.t(), scaled)
        product = product if shared is None else product + shared
    extension.CUDA.label_rows(factors.hidden, factors.t, order, starts, distinct, product, out)


def _dbias(e: Tensor, factors: Factors, out: Tensor, add: bool) -> None:
    """out (+)= the sum of the rows' gradients [V]: r in two numbers of 8 bits each, whose products are exact."""
    high = factors.r.to(e.dtype)
    low = (factors.r - high).to(e.dtype)
    total = gemm.wide_product(e.t(), torch.stack([high, low], dim=1)).sum(1)
    valid = (factors.label >= 0) & (factors.label < len(total))
    label, at_label = torch.where(valid, factors.label, 0), torch.where(valid, factors.t, 0.0)
    total.index_put_((label,), at_label, accumulate=True)  # in the order of the rows
    total += factors.m.sum() / len(total)
    out.add_(total) if add else out.copy_(total)
