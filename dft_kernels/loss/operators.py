"""The loss and its statistics as custom operators: what torch.compile, export and fake tensors see of a call.

A call is one node of a traced graph, whose arguments are the fields of its `Problem`:

    loss                 scalar reductions; the gradient is emitted by the same pass and saved
    statistics           row quantities, feature means, column means; nothing of size [R, V] survives
    statistics_gradient  its backward: the logits are recomputed, one product more
    scale                grad_output (over the denominator in fp16), applied in the accumulation dtype

None of them can be differentiated twice; `scale` and `statistics_gradient` say so. Eager calls take the functions of
`autograd.py` instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.contract import DIFFERENTIABLE, Row
from ..teachers.contract import source_of
from .gradients import scaled, shapes
from .loop import REPORTED, RESULTS, compute_loss, compute_statistics, compute_statistics_gradient
from .problem import GRADIENTS, SCHEMA, TENSORS, Problem

SECOND_DERIVATIVE = (
    "dft_kernels: double backward must not be asked of a fused loss, got a second differentiation. Its backward "
    "is itself not differentiable; use testing.dense_loss on a small problem for second derivatives."
)


def gradients_of(*gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Those of the first fields of a Problem; None for all the others."""
    return (*gradients, *(None,) * (len(Problem._fields) - GRADIENTS))


def _loss(*arguments: Any) -> tuple[Tensor, ...]:
    return compute_loss(Problem(*arguments))


def _means_fake(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Features, mean probability and group weights."""
    new, wide = problem.hidden.new_empty, problem.dtype
    features = (problem.hidden.shape[0], problem.num_features) if problem.features is not None else (0,)
    groups = (problem.num_groups,) if problem.columns else (0,)
    columns = (*groups, problem.vocab) if problem.columns else (0,)
    return new(features, dtype=wide), new(columns, dtype=wide), new(groups, dtype=wide)


def _loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments)
    new, wide = problem.hidden.new_empty, problem.dtype
    rows = (REPORTED, problem.hidden.shape[0]) if problem.reports else (0,)
    means = _means_fake(problem)
    return (
        *(new((), dtype=wide), new((), dtype=wide), new(rows, dtype=wide)),
        *means,
        new(0 if problem.gradient_error is None or not problem.needs_gradient else 2, dtype=torch.float64),
        *shapes(problem),
    )


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:2], output[1], *output[RESULTS:])
    problem = Problem(*inputs)
    ctx.needs = problem.needs
    ctx.dtype, ctx.folded = problem.hidden.dtype, problem.folds


def _loss_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    hidden, weight, denominator, *gradients = ctx.saved_tensors
    if grad is None:
        return (None,) * len(Problem._fields)
    factor = grad if ctx.folded else grad / denominator
    scaled_ones = (
        scale(g, factor, ctx.dtype, hidden, weight) if need else None
        for g, need in zip(gradients, ctx.needs, strict=True)
    )
    return gradients_of(*scaled_ones)


@torch.library.custom_op("dft_kernels::scale", mutates_args=())
def scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype, hidden: Tensor | None, weight: Tensor | None) -> Tensor:
    """`scaled`. hidden and weight are only what the gradient depends on, so that a second differentiation finds its way
    here and is refused."""
    return scaled(gradient, factor, dtype)


@scale.register_fake
def _(gradient: Tensor, factor: Tensor, dtype: torch.dtype, hidden: Tensor | None, weight: Tensor | None) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


def _refuse_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(SECOND_DERIVATIVE)


scale.register_autograd(_refuse_second_derivative)

loss = torch.library.custom_op(
    "dft_kernels::loss",
    _loss,
    mutates_args=(),
    schema=f"({SCHEMA}) -> (" + ", ".join(["Tensor"] * (RESULTS + GRADIENTS)) + ")",
)
loss.register_fake(_loss_fake)
loss.register_autograd(_loss_backward, setup_context=_loss_setup)


def _statistics(*arguments: Any) -> tuple[Tensor, ...]:
    return compute_statistics(Problem(*arguments))


def _statistics_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments)
    rows = (problem.hidden.new_empty(problem.hidden.shape[0], dtype=problem.dtype) for _ in range(REPORTED))
    return (*rows, *_means_fake(problem))


def statistics_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """What backward needs, to recompute the logits."""
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[Row.CORRECT], output[Row.AGREEMENT], output[-1])
    ctx.save_for_backward(*inputs[:TENSORS], output[-1])
    ctx.rest = inputs[TENSORS:]
    source = Problem(*inputs).source
    ctx.source = source_of(source) if source else None  # keeps it alive until backward


def statistics_cotangents(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Any, ...] | None:
    """The arguments of `statistics_gradient`; None where no gradient is asked for."""
    *tensors, group_weight = ctx.saved_tensors
    problem, rows = Problem(*tensors, *ctx.rest), grads[:DIFFERENTIABLE]
    features = None if problem.features is None else grads[REPORTED]  # else an empty output, whatever its gradient
    columns = grads[REPORTED + 1] if problem.columns else None
    if columns is None and problem.columns and problem.sharded:  # in parts, of which some processes may use none
        columns = problem.hidden.new_zeros(problem.num_groups, problem.vocab, dtype=problem.dtype)
    if all(grad is None for grad in (*rows, features, columns)):
        return None
    return (*problem, *rows, features, columns, group_weight)


def statistics_gradients(ctx: Any, grads: tuple[Tensor | None, ...], gradient: Any) -> tuple[Tensor | None, ...]:
    """The backward of statistics by `gradient`, which is `statistics_gradient` or does what it does."""
    arguments = statistics_cotangents(ctx, grads)
    if arguments is None:
        return (None,) * len(Problem._fields)
    problem = Problem(*arguments[: len(Problem._fields)])
    found = gradient(*arguments)
    return gradients_of(*(g if need else None for g, need in zip(found, problem.needs, strict=True)))


def _statistics_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return statistics_gradients(ctx, grads, statistics_gradient)


def gradient_of_statistics(*arguments: Any) -> tuple[Tensor, ...]:
    """The kernel of `statistics_gradient`."""
    problem = Problem(*arguments[: len(Problem._fields)])
    *rows, features, columns, group_weight = arguments[len(Problem._fields) :]
    return compute_statistics_gradient(problem, rows, features, columns, group_weight)


def _statistics_gradient_fake(*arguments: Any) -> tuple[Tensor, ...]:
    problem = Problem(*arguments[: len(Problem._fields)])
    return shapes(problem, problem.hidden.dtype)


statistics = torch.library.custom_op(
    "dft_kernels::statistics",
    _statistics,
    mutates_args=(),
    schema=f"({SCHEMA}) -> (" + ", ".join(["Tensor"] * (REPORTED + 3)) + ")",
)
statistics.register_fake(_statistics_fake)
statistics.register_autograd(_statistics_backward, setup_context=statistics_setup)

_cotangents = ", ".join(f"Tensor? {Row(row).name.lower()}_cotangent" for row in range(DIFFERENTIABLE))
statistics_gradient = torch.library.custom_op(
    "dft_kernels::statistics_gradient",
    gradient_of_statistics,
    mutates_args=(),
    schema=f"({SCHEMA}, {_cotangents}, Tensor? features_cotangent, Tensor? columns_cotangent, Tensor group_weight)"
    " -> (" + ", ".join(["Tensor"] * GRADIENTS) + ")",
)
statistics_gradient.register_fake(_statistics_gradient_fake)
statistics_gradient.register_autograd(_refuse_second_derivative)
