"""THE chunk loop, and the custom operators that put it under autograd and torch.compile.

`run` walks the rows in play once: the target of a chunk, its row quantities, and, where something is
differentiated, its gradient. Three operators share it and the argument list of `Problem`:

    loss                 scalar reductions; the gradient of the *sum* is emitted by the same pass and saved
    statistics           row quantities, feature means, column means; nothing of size [R, V] survives
    statistics_gradient  its backward: the logits are recomputed, one product more

`scale` applies grad_output / denominator in the accumulation dtype and rounds once, leaving what was saved as
it was. None of them can be differentiated twice; `scale` and `statistics_gradient` say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import DIFFERENTIABLE, Backward, Chunk, Cotangents, Row
from ..backends.extension import scratch
from ..backends.formulas import head_logits
from ..teachers.contract import Request, Rows, source_of
from ..teachers.head import open_head
from ..teachers.top_k import open_top_k
from .gradients import GRADIENTS, RowGradient, allocate, shapes
from .problem import SCHEMA, TENSORS, Problem, loss_terms
from .row_loss import loss_cotangents, loss_rows
from .selection import Selection, dweight_dtype, plan_rows, select_rows

REPORTED = Row.AGREEMENT + 1  # the leading quantities that leave the loop

Seed = Callable[[Chunk, Rows], Cotangents]  # a chunk and its rows -> its cotangents


@dataclass
class Outcome:
    """What the loop leaves: row quantities [REPORTED, N] (0 for ignored rows), q @ features [N, K], column sums
    [G, V], and unscaled gradients of hidden, weight, bias, down, up; None where not asked for."""

    selection: Selection
    rows: Tensor
    features: Tensor | None
    columns: Tensor | None
    gradients: Sequence[Tensor | None] = (None,) * GRADIENTS


def run(problem: Problem, differentiated: frozenset[Row], seed: Seed | None, dhidden: Tensor | None = None) -> Outcome:
    """The chunk loop. seed: cotangents of a chunk, None for no gradient; dhidden: where to write it if not into
    a new tensor (it may be `problem.hidden` itself where that holds logits)."""
    hidden, vocab, wide = problem.hidden, problem.vocab, problem.dtype
    selection = select_rows(problem)
    size = plan_rows(problem, selection.count)
    blocks = selection.blocks(size)
    terms = problem.terms(differentiated if seed else frozenset())
    backend = backends.choose(problem.backend, hidden.device, hidden.dtype)
    outcome = Outcome(
        selection,
        rows=hidden.new_zeros(REPORTED, hidden.shape[0], dtype=wide),
        features=None if terms.features is None else hidden.new_zeros(len(hidden), terms.features.shape[1], dtype=wide),
        columns=hidden.new_zeros(problem.num_groups, vocab, dtype=wide) if problem.columns else None,
    )
    if seed is not None:
        outcome.gradients = allocate(problem, selection, len(blocks), dhidden)
    dhidden, dweight, dbias, ddown, dup = outcome.gradients
    workspace = backend.workspace(size, vocab, hidden, terms, gradient=seed is not None)
    to_hidden, to_down = RowGradient(dhidden, selection, size), RowGradient(ddown, selection, size)
    with torch.autocast(hidden.device.type, enabled=False), _open_teacher(problem, blocks) as targets:
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
                into = to_hidden.of(rows), dweight, dbias, number == 0, to_down.of(rows), dup
                found = backend.chunk_step(workspace, chunk, outcome.columns, Backward(seed(chunk, rows), *into))
                to_hidden.settle(rows)
                to_down.settle(rows)
            statistics = found.rows
            if Row.DIVERGENCE in terms.wanted:  # guards against 0 log 0 are blind to NaN
                broken = (statistics[Row.SOFT_LSE] + statistics[Row.TARGET_LSE]).isnan()
                statistics[Row.DIVERGENCE].masked_fill_(broken, torch.nan)
            if outcome.features is not None and found.features is not None:
                rows.put(outcome.features, found.features)
            rows.put(outcome.rows, statistics[:REPORTED], dim=1)
        if targets is not None:
            next(targets, None)  # lets a source check that it ended where the rows do
    if selection.ignored is not None:
        outcome.rows.masked_fill_(selection.ignored, 0.0)
        if outcome.features is not None:
            outcome.features.masked_fill_(selection.ignored[:, None], 0.0)
    return outcome


def _open_teacher(problem: Problem, blocks: list[Rows]) -> AbstractContextManager[Any]:
    hidden, temperature = problem.hidden, problem.teacher_temperature
    if problem.source:
        rows, vocab = hidden.shape[0], problem.vocab
        request = Request(blocks, rows, vocab, hidden.device, problem.dtype, temperature, problem.target, head_logits)
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


# ------------------------------------------------------------------------------------------------ the operators


def _loss(*arguments: Any) -> tuple[Tensor, ...]:
    return compute_loss(Problem(*arguments))


def compute_loss(problem: Problem, dhidden: Tensor | None = None) -> tuple[Tensor, ...]:
    """Loss, denominator, row quantities (where metrics are wanted), features (where given), mean probability and group
    weights (where a group is), and the unscaled gradients; what is not there is empty. `dhidden`: see `run`."""

    def seed(chunk: Chunk, rows: Rows) -> Cotangents:
        return loss_cotangents(problem, chunk.hidden, chunk.weight, rows)

    wanted = problem.needs_gradient or dhidden is not None
    outcome = run(problem, loss_terms(problem), seed if wanted else None, dhidden)
    selection = outcome.selection
    total = loss_rows(problem, outcome.rows, outcome.features, selection.weight).sum() / selection.denominator
    none = problem.hidden.new_empty
    return (
        total,
        selection.denominator,
        outcome.rows if problem.reports else none(0, dtype=problem.dtype),
        none(0, dtype=problem.dtype) if outcome.features is None else outcome.features,
        *mean_probability(problem, outcome),
        *(none(0) if g is None or g is dhidden else g for g in outcome.gradients),
    )


def _loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments)
    new, n = problem.hidden.new_empty, problem.hidden.shape[0]
    wide = problem.dtype
    groups = problem.num_groups if problem.columns else None
    return (
        new((), dtype=wide),
        new((), dtype=wide),
        new((REPORTED, n), dtype=wide) if problem.reports else new(0, dtype=wide),
        new(0, dtype=wide) if problem.features is None else new((n, problem.num_features), dtype=wide),
        new(0, dtype=wide) if groups is None else new((groups, problem.vocab), dtype=wide),
        new(0, dtype=wide) if groups is None else new((groups,), dtype=wide),
        *shapes(problem, dweight_dtype(problem)),
    )


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:2], output[1], *output[6:])
    problem = Problem(*inputs)
    ctx.needs = problem.needs
    ctx.dtype = problem.hidden.dtype


def _loss_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    hidden, weight, denominator, *gradients = ctx.saved_tensors
    if grad is None:
        return (None,) * len(Problem._fields)
    factor = grad / denominator
    scaled = (
        scale(g, factor, ctx.dtype, hidden, weight) if need else None
        for g, need in zip(gradients, ctx.needs, strict=True)
    )
    return _gradients_of(*scaled)


def _gradients_of(*gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Those of the first fields of a Problem; None for all the others."""
    return (*gradients, *(None,) * (len(Problem._fields) - GRADIENTS))


@torch.library.custom_op("dft_kernels::scale", mutates_args=())
def scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype, hidden: Tensor | None, weight: Tensor | None) -> Tensor:
    """gradient * factor (0-d), multiplied in the accumulation dtype and rounded once to `dtype`; blockwise, so
    that no second full-size tensor in the accumulation dtype appears. hidden and weight are only what the
    gradient depends on, so that a second differentiation finds its way here and is refused."""
    out = scratch(gradient.shape, dtype, gradient.device)
    factor = factor.reshape(1)
    step = max(1, (1 << 18) // max(1, gradient[:1].numel())) if gradient.device.type == "cpu" else max(1, len(gradient))
    for start in range(0, gradient.shape[0], step):
        torch.mul(gradient[start : start + step], factor, out=out[start : start + step])
    return out


@scale.register_fake
def _(gradient: Tensor, factor: Tensor, dtype: torch.dtype, hidden: Tensor | None, weight: Tensor | None) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def _refuse_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "dft_kernels: double backward must not be asked of a fused loss, got a second differentiation. Its backward "
        "is itself not differentiable; use testing.dense_loss on a small problem for second derivatives."
    )


scale.register_autograd(_refuse_second_derivative)

loss = torch.library.custom_op(
    "dft_kernels::loss",
    _loss,
    mutates_args=(),
    schema=f"({SCHEMA}) -> (" + ", ".join(["Tensor"] * (6 + GRADIENTS)) + ")",
)
loss.register_fake(_loss_fake)
loss.register_autograd(_loss_backward, setup_context=_loss_setup)


def _statistics(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments)
    outcome = run(problem, frozenset(), None)
    features = problem.hidden.new_empty(0, dtype=problem.dtype) if outcome.features is None else outcome.features
    return (*(row.clone() for row in outcome.rows), features, *mean_probability(problem, outcome))


def _statistics_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments)
    new, n, wide = problem.hidden.new_empty, problem.hidden.shape[0], problem.dtype
    groups = problem.num_groups if problem.columns else None
    return (
        *(new((n,), dtype=wide) for _ in range(REPORTED)),
        new(0, dtype=wide) if problem.features is None else new((n, problem.num_features), dtype=wide),
        new(0, dtype=wide) if groups is None else new((groups, problem.vocab), dtype=wide),
        new(0, dtype=wide) if groups is None else new((groups,), dtype=wide),
    )


def _statistics_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[Row.CORRECT], output[Row.AGREEMENT], output[-1])
    ctx.save_for_backward(*inputs[:TENSORS], output[-1])
    ctx.rest = inputs[TENSORS:]
    source = Problem(*inputs).source
    ctx.source = source_of(source) if source else None  # keeps it alive until backward


def _statistics_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, group_weight = ctx.saved_tensors
    problem, rows = Problem(*tensors, *ctx.rest), grads[:DIFFERENTIABLE]
    features = None if problem.features is None else grads[REPORTED]  # else an empty output, whatever its gradient
    columns = grads[REPORTED + 1] if problem.columns else None
    if all(grad is None for grad in (*rows, features, columns)):
        return (None,) * len(Problem._fields)
    gradients = statistics_gradient(*problem, *rows, features, columns, group_weight)
    return _gradients_of(*(g if need else None for g, need in zip(gradients, problem.needs, strict=True)))


def _statistics_gradient(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments[: len(Problem._fields)])
    *rows, features, columns, group_weight = arguments[len(Problem._fields) :]
    live = {Row(row): grad for row, grad in enumerate(rows) if grad is not None}
    if columns is not None:  # d mean / d q is a potential of weight w_n, scaled by the group's total weight
        potential = columns / torch.where(group_weight == 0, 1.0, group_weight)[:, None]
        problem = problem._replace(potential=potential)
    problem = problem._replace(columns=False)

    def seed(chunk: Chunk, rows: Rows) -> Cotangents:
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
    one = torch.ones((), dtype=problem.dtype, device=problem.hidden.device)
    return tuple(
        problem.hidden.new_empty(0) if g is None else scale(g, one, problem.hidden.dtype, None, None)
        for g in outcome.gradients
    )


def _statistics_gradient_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments[: len(Problem._fields)])
    return shapes(problem, problem.hidden.dtype)


statistics = torch.library.custom_op(
    "dft_kernels::statistics",
    _statistics,
    mutates_args=(),
    schema=f"({SCHEMA}) -> (" + ", ".join(["Tensor"] * 11) + ")",
)
statistics.register_fake(_statistics_fake)
statistics.register_autograd(_statistics_backward, setup_context=_statistics_setup)

_cotangents = ", ".join(f"Tensor? {Row(row).name.lower()}_cotangent" for row in range(DIFFERENTIABLE))
statistics_gradient = torch.library.custom_op(
    "dft_kernels::statistics_gradient",
    _statistics_gradient,
    mutates_args=(),
    schema=f"({SCHEMA}, {_cotangents}, Tensor? features_cotangent, Tensor? columns_cotangent, Tensor group_weight)"
    " -> (" + ", ".join(["Tensor"] * GRADIENTS) + ")",
)
statistics_gradient.register_fake(_statistics_gradient_fake)
statistics_gradient.register_autograd(_refuse_second_derivative)


class InplaceLoss(torch.autograd.Function):
    """The loss of logits that the caller gives up: their gradient is written over them in forward, scaled in
    place in backward, once. Outside of torch.compile: a functional operator cannot own its argument's memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, problem: Problem) -> tuple[Tensor, ...]:
        flat = problem.hidden.detach()
        out = compute_loss(problem._replace(hidden=flat, need_hidden=False), flat)
        ctx.save_for_backward(flat)
        ctx.denominator, ctx.used, ctx.leaf, ctx.shape = out[1], False, logits.is_leaf, logits.shape
        ctx.mark_non_differentiable(*out[1:])
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
        if grad is None:
            return None, None
        if ctx.used:
            raise RuntimeError(
                "cross_entropy: inplace_gradient=True must be followed by one backward, got a second. The first one "
                "scaled the gradient in place; use inplace_gradient=False with retain_graph."
            )
        (gradient,) = ctx.saved_tensors
        ctx.used = True
        factor = (grad / ctx.denominator).reshape(1)
        for block in gradient.split(max(1, (1 << 22) // max(1, gradient.shape[1]))):
            torch.mul(block, factor, out=block)
        gradient = gradient.view(ctx.shape)
        return (gradient.clone() if ctx.leaf else gradient), None
