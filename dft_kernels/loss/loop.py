"""THE chunk loop, over the rows that are not ignored, and the loss, statistics and gradients computed by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import DIFFERENTIABLE, Backend, Backward, Chunk, Cotangents, Row
from ..backends.formulas import head_logits
from ..distributed.sharded import ShardedBackend
from ..teachers.contract import Request, Rows, source_of
from ..teachers.head import open_head
from ..teachers.top_k import open_top_k
from .gradients import RowGradient, allocate, rounded, scaled
from .planning import plan
from .problem import GRADIENTS, Problem, loss_terms
from .row_loss import loss_cotangents, loss_rows
from .selection import Selection, select_rows

REPORTED = Row.AGREEMENT + 1  # the leading quantities that leave the loop
RESULTS = 7  # of `compute_loss` before the gradients

Seed = Callable[[Chunk, Rows, Selection], Cotangents]  # a chunk and its rows, of those in play -> its cotangents


@dataclass
class Outcome:
    """The loop's results: row quantities [REPORTED, N] (0 for ignored rows), q @ features [N, K], column sums
    [G, V], what active columns left out [2] (`ActiveColumns.report`), and gradients of hidden, weight, bias, down, up
    in the input dtype; None where not asked for."""

    selection: Selection
    backend: Backend[Any]
    rows: Tensor
    features: Tensor | None
    columns: Tensor | None
    left_out: Tensor | None = None
    gradients: Sequence[Tensor | None] = (None,) * GRADIENTS


def run(problem: Problem, differentiated: frozenset[Row], seed: Seed | None, dhidden: Tensor | None = None) -> Outcome:
    """The chunk loop. seed: cotangents of a chunk, None for no gradient; dhidden: where to write it if not into
    a new tensor (it may be `problem.hidden` itself where that holds logits)."""
    hidden, vocab, wide = problem.hidden, problem.vocab, problem.dtype
    selection = select_rows(problem)
    chosen = backends.choose(problem.backend, hidden.device, hidden.dtype)
    backend: Backend[Any] = chosen
    if problem.shards is not None:
        backend = ShardedBackend(chosen, problem.shards, problem.sums_hidden and problem.weight is not None)
    terms = problem.terms(differentiated if seed else frozenset())
    planned = plan(problem, backend, selection.count, terms if seed else None)
    blocks = selection.blocks(planned.rows)
    whole = len(blocks) == 1 and selection.index is None  # the quantities of its only chunk are the result
    outcome = Outcome(
        selection,
        backend,
        rows=hidden.new_empty(0) if whole else hidden.new_zeros(REPORTED, hidden.shape[0], dtype=wide),
        features=None if terms.features is None else hidden.new_zeros(len(hidden), terms.features.shape[1], dtype=wide),
        columns=hidden.new_zeros(problem.num_groups, vocab, dtype=wide) if problem.columns else None,
    )
    gradients: tuple[Tensor | None, ...] = (None,) * GRADIENTS
    if seed is not None:
        gradients = allocate(problem, selection, planned.products(selection.count), dhidden)
    into, dweight, dbias, ddown, dup = gradients
    active = None
    if problem.gradient_error is not None and problem.weight is not None and seed is not None:
        active = chosen.active(problem.gradient_error, problem.weight, selection.count)
    workspace = backend.workspace(planned.rows, vocab, hidden, terms, gradient=seed is not None, kept=planned.kept)
    to_hidden, to_down = (RowGradient(g, selection, planned.rows, backend.overlaps) for g in (into, ddown))
    with _without_autocast(hidden.device.type), _open_teacher(problem, blocks) as targets:
        for number, rows in enumerate(blocks):
            chunk = Chunk(
                hidden=rows.take(hidden),
                label=None if problem.target is None else rows.take(problem.target),
                group=None if selection.group is None else rows.take(selection.group),
                weight=None if selection.weight is None else rows.take(selection.weight),
                target=next(targets) if targets is not None else None,
                down=None if problem.down is None else rows.take(problem.down),
            )
            if seed is None:
                found = backend.chunk_statistics(workspace, chunk, outcome.columns)
            else:
                backward = Backward(
                    seed(chunk, rows, selection),
                    dhidden=to_hidden.of(rows),
                    dweight=dweight,
                    dbias=dbias,
                    first=number == 0,
                    last=number == len(blocks) - 1,
                    ddown=to_down.of(rows),
                    dup=dup,
                    active=active,
                )
                found = backend.chunk_step(workspace, chunk, outcome.columns, backward)
                to_hidden.settle(rows)
                to_down.settle(rows)
            statistics = found.rows
            if Row.DIVERGENCE in terms.wanted:  # guards against 0 log 0 are blind to NaN
                broken = (statistics[Row.SOFT_LSE] + statistics[Row.TARGET_LSE]).isnan()
                statistics[Row.DIVERGENCE].masked_fill_(broken, torch.nan)
            if outcome.features is not None and found.features is not None:
                rows.put(outcome.features, found.features)
            if whole:
                outcome.rows = statistics[:REPORTED]
            else:
                rows.put(outcome.rows, statistics[:REPORTED], dim=1)
        to_hidden.finish()
        to_down.finish()
        if targets is not None:
            next(targets, None)  # lets a source check that it ended where the rows do
    if selection.ignored is not None:
        outcome.rows.masked_fill_(selection.ignored, 0.0)
        if outcome.features is not None:
            outcome.features.masked_fill_(selection.ignored[:, None], 0.0)
    if active is not None:
        outcome.left_out = active.report(into, dweight)
    del workspace  # its memory serves the rounding
    outcome.gradients = rounded(problem, gradients)
    return outcome


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _open_teacher(problem: Problem, blocks: list[Rows]) -> AbstractContextManager[Any]:
    hidden, temperature = problem.hidden, problem.teacher_temperature
    if problem.source:
        rows, vocab = hidden.shape[0], problem.vocab
        request = Request(blocks, rows, vocab, hidden.device, problem.dtype, temperature, problem.target, head_logits)
        if (shards := problem.shards) is not None:
            request = replace(request, start=shards.start, total=shards.total, log_sum_exp=shards.log_sum_exp)
        return source_of(problem.source).open(request)
    if problem.top is not None:
        return open_top_k(problem.top, temperature, problem.dtype, blocks)
    if problem.teacher_hidden is None:
        return nullcontext()
    return open_head(problem.teacher_hidden, problem.teacher_head, blocks)


def mean_probability(problem: Problem, outcome: Outcome) -> tuple[Tensor, Tensor]:
    """sum w_n q_n / sum w_n of each group [G, V] (0 for an empty group), and sum w_n [G]."""
    if outcome.columns is None:
        empty = problem.hidden.new_empty(0, dtype=problem.dtype)
        return empty, empty.clone()
    total = outcome.selection.group_weight(problem)
    return outcome.columns.div_(torch.where(total == 0, 1.0, total)[:, None]), total


def run_loss(problem: Problem, dhidden: Tensor | None = None) -> tuple[Tensor, Outcome]:
    """The loss, and what the loop found. `dhidden`: see `run`."""

    def seed(chunk: Chunk, rows: Rows, selection: Selection) -> Cotangents:
        return loss_cotangents(problem, chunk.hidden, chunk.weight, rows, selection if problem.folds else None)

    wanted = problem.needs_gradient or dhidden is not None
    outcome = run(problem, loss_terms(problem), seed if wanted else None, dhidden)
    selection = outcome.selection
    total = loss_rows(problem, outcome.rows, outcome.features, selection.weight).sum()
    return total / selection.denominator, outcome


def compute_loss(problem: Problem, dhidden: Tensor | None = None) -> tuple[Tensor, ...]:
    """Loss, denominator, row quantities (where metrics are wanted), features (where given), mean probability and group
    weights (where a group is), what active columns left out (where they are), and the gradients, by `Problem.folds` of
    the loss or of the sum; what is not there is empty. `dhidden`: see `run`."""
    total, outcome = run_loss(problem, dhidden)
    none, denominator = problem.hidden.new_empty, outcome.selection.denominator
    if not isinstance(denominator, Tensor):
        denominator = torch.full((), denominator, dtype=problem.dtype, device=problem.hidden.device)
    return (
        total,
        denominator.clone() if denominator is problem.num_items else denominator,  # no output may be an argument
        outcome.rows.clone() if problem.reports else none(0, dtype=problem.dtype),
        none(0, dtype=problem.dtype) if outcome.features is None else outcome.features,
        *mean_probability(problem, outcome),
        none(0, dtype=torch.float64) if outcome.left_out is None else outcome.left_out,
        *(none(0) if g is None or g is dhidden else g for g in outcome.gradients),
    )


def compute_statistics(problem: Problem) -> tuple[Tensor, ...]:
    """Row quantities, features (where given), mean probability and group weights (where columns are summed)."""
    outcome = run(problem, frozenset(), None)
    features = problem.hidden.new_empty(0, dtype=problem.dtype) if outcome.features is None else outcome.features
    return (*(row.clone() for row in outcome.rows), features, *mean_probability(problem, outcome))


def compute_statistics_gradient(
    problem: Problem,
    rows: Sequence[Tensor | None],
    features: Tensor | None,
    columns: Tensor | None,
    group_weight: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of the first fields of a problem (empty where not needed) from the cotangents of what
    `compute_statistics` returned: rows of the differentiable quantities, features, mean probability."""
    live = {Row(row): grad for row, grad in enumerate(rows) if grad is not None}
    if columns is not None:  # d mean / d q is a potential of weight w_n, scaled by the group's total weight
        potential = columns / torch.where(group_weight == 0, 1.0, group_weight)[:, None]
        problem = problem._replace(potential=potential)
    problem = problem._replace(columns=False)

    def seed(chunk: Chunk, rows: Rows, _: Selection) -> Cotangents:
        out = chunk.hidden.new_zeros(DIFFERENTIABLE, chunk.hidden.shape[0], dtype=problem.dtype)
        for row, grad in live.items():
            out[row] = rows.take(grad)
        if columns is not None:
            out[Row.POTENTIAL] = 1.0 if chunk.weight is None else chunk.weight
        kappa = None if features is None else rows.take(features)
        if ignored is not None:
            out.masked_fill_(rows.take(ignored), 0.0)
            kappa = None if kappa is None else kappa.masked_fill(rows.take(ignored)[:, None], 0.0)
        return Cotangents(out, kappa)

    ignored = None
    if not problem.compact and problem.target is not None:
        ignored = problem.target == problem.ignore_index
    differentiated = frozenset(live) | ({Row.POTENTIAL} if columns is not None else frozenset())
    outcome = run(problem, differentiated, seed)
    return tuple(
        problem.hidden.new_empty(0) if g is None else scaled(g, None, problem.hidden.dtype) for g in outcome.gradients
    )
