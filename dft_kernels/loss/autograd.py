"""The loss and its statistics under autograd and the transforms of torch.func.

Eager calls are torch.autograd.Functions over the chunk loop. Reverse mode (backward, torch.func.grad, vjp) is that of
the kernels. Forward mode (torch.func.jvp, dual numbers) of a scalar loss is the inner product of its gradient with the
tangents; of row quantities it is refused. torch.vmap calls once for each element. Second derivatives are refused, in
every order of the two modes. A traced call (torch.compile, export, fake tensors) is the operator of `operators.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from ..backends.contract import Backend
from ..teachers.contract import Source
from . import operators
from .checks import has_tangents
from .gradients import scaled, scaled_
from .loop import RESULTS, compute_loss, compute_statistics, mean_probability, run_loss
from .operators import (
    SECOND_DERIVATIVE,
    gradient_of_statistics,
    gradients_of,
    statistics_gradients,
    statistics_setup,
)
from .problem import GRADIENTS, Problem

_FIELDS = len(Problem._fields)


def loss(problem: Problem) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Loss, row quantities, features, mean probability and what active columns left out, of which the first is
    differentiable in the first fields of the problem; the others may be None or empty where metrics do not want
    them."""
    tangents = has_tangents(problem.differentiated)
    if _traced(problem.hidden):
        total, _, rows, features, mean, _, left_out, *_ = operators.loss(*problem)
    elif tangents or torch._C._are_functorch_transforms_active():
        total, _, rows, features, mean, _, left_out, *_ = TransformedLoss.apply(*problem, tangents)
    else:
        call = Call(problem)
        total = _apply_fused_loss(*problem.differentiated, call)
        return total, call.rows, call.features, call.mean, call.left_out
    return total, rows, features, mean, left_out


def statistics(problem: Problem) -> tuple[Tensor, ...]:
    """What `compute_statistics` returns, differentiable in the first fields of the problem."""
    if has_tangents(problem.differentiated):
        raise RuntimeError(
            'dft_kernels: forward-mode differentiation must be of a loss with reduction="mean" or "sum", got row '
            'quantities (statistics, or reduction="none"). Use reverse mode (backward, torch.func.grad, vjp), or '
            "testing.dense_loss on a small problem."
        )
    if _traced(problem.hidden):
        return operators.statistics(*problem)  # type: ignore[no-any-return]
    return FusedStatistics.apply(*problem)  # type: ignore[no-any-return]


def _traced(tensor: Tensor) -> bool:
    """Whether a call is to be a node of a graph, or has no values. The operators have no rules for torch.func."""
    traced = torch.compiler.is_compiling() or tensor.is_meta or torch._C._len_torch_dispatch_stack() > 0
    traced = traced or type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if traced and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "dft_kernels: transforms of torch.func (grad, vjp, jvp, vmap) must be of an eager call, got one that is "
            "traced (torch.compile, export, fake tensors). Keep them outside of what is compiled, or use backward()."
        )
    return traced


def outside_graph(function: Any, problem: Problem, teacher: Any = None) -> Any:
    """`function`, kept out of torch.compile's graph where a teacher calls back into Python, or other processes are
    waited for."""
    if isinstance(teacher, Source):
        reason = f"a {type(teacher).__name__} calls back into Python; pass tensors to compile"
    elif problem.sharded:
        reason = "the processes of process_group exchange statistics between chunks"
    else:
        return function
    return torch.compiler.disable(function, reason=reason)


def _refuse_second_derivative(*_: Any) -> NoReturn:
    raise RuntimeError(SECOND_DERIVATIVE)


def _one_by_one(function: Callable[..., Any], info: Any, in_dims: Any, arguments: tuple[Any, ...]) -> Any:
    """A rule of vmap: a call for each element, in turn."""
    if Problem(*arguments[:_FIELDS]).source:
        raise RuntimeError(
            "dft_kernels: teacher must be tensors under torch.vmap, got one that calls back into Python (LogitStream, "
            "Mixture), which does not know the elements apart. Call once for each element instead."
        )
    outputs = [
        function(*(a if dim is None else a.select(dim, n) for a, dim in zip(arguments, in_dims, strict=True)))
        for n in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*outputs, strict=True))
    return stacked, (0,) * len(stacked)


@dataclass
class Call:
    """A problem, whose tensors autograd has seen, and what its metrics are made of."""

    problem: Problem
    rows: Tensor | None = None
    features: Tensor | None = None
    mean: Tensor | None = None
    left_out: Tensor | None = None


class FusedLoss(torch.autograd.Function):
    """The loss of a problem: what is called where no transform runs. Few arguments: each costs host time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Any, bias: Any, down: Any, up: Any, call: Call) -> Tensor:
        problem = call.problem
        total, outcome = run_loss(problem)
        if problem.reports:
            call.rows, call.features = outcome.rows, outcome.features
            call.mean, _ = mean_probability(problem, outcome)
            call.left_out = outcome.left_out
        ctx.needs, ctx.dtype, ctx.backend = problem.needs, hidden.dtype, outcome.backend
        ctx.divisor = None if problem.folds else outcome.selection.denominator
        ctx.save_for_backward(hidden, weight, *outcome.gradients)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept = torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()
        factor = grad if ctx.divisor is None else grad / ctx.divisor
        return (*_multiplied(ctx, ctx.saved_tensors, factor, None if kept else ctx.backend), None)


# without a second look for transforms, which takes longer than all else that apply does
_apply_fused_loss = super(torch.autograd.Function, FusedLoss).apply


def _multiplied(
    ctx: Any, saved: Sequence[Tensor], factor: Tensor, backend: Backend[Any] | None
) -> Iterator[Tensor | None]:
    """The saved gradients times factor; by `backend` in place where nobody reads them again, None: somebody may. saved:
    hidden, weight and the gradients."""
    hidden, weight, *gradients = saved
    twice = torch.is_grad_enabled() or forward_ad._current_level >= 0  # a second derivative may be taken
    for gradient, need in zip(gradients, ctx.needs, strict=True):
        if not need:
            yield None
        elif twice:
            yield _Scaled.apply(gradient, factor, ctx.dtype, hidden, weight)
        elif backend is None:
            yield scaled(gradient, factor, ctx.dtype)
        else:
            yield scaled_(backend, gradient, factor, ctx.dtype)


class TransformedLoss(torch.autograd.Function):
    """compute_loss of the fields of a problem, under forward mode and the transforms of torch.func. The last argument:
    whether the caller saw tangents on them."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return compute_loss(Problem(*arguments[:_FIELDS]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        kept = (*inputs[:2], output[1], *output[RESULTS:])
        ctx.save_for_backward(*kept)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*kept)
        problem = Problem(*inputs[:_FIELDS])
        ctx.needs, ctx.dtype, ctx.folded = problem.needs, problem.hidden.dtype, problem.folds
        ctx.tangents = inputs[_FIELDS]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Any:
        if grad is None:
            return (None,) * (_FIELDS + 1)
        hidden, weight, denominator, *gradients = ctx.saved_tensors
        factor = grad if ctx.folded else grad / denominator
        return (*gradients_of(*_multiplied(ctx, (hidden, weight, *gradients), factor, None)), None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        if not ctx.tangents:  # forward mode over a gradient: the caller saw none
            _refuse_second_derivative()
        hidden, weight, denominator, *gradients = ctx.saved_tensors
        known = [n for n in range(GRADIENTS) if tangents[n] is not None]
        both = (*(gradients[n] for n in known), *(tangents[n] for n in known))
        primals = (None if t is None else forward_ad.unpack_dual(t).primal for t in (hidden, weight))
        denominator = torch.ones_like(denominator) if ctx.folded else denominator
        return (_Tangent.apply(*primals, denominator, *both), *(None,) * (RESULTS - 1 + GRADIENTS))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _one_by_one(lambda *fields: _transformed(Problem(*fields[:_FIELDS])), info, in_dims, arguments)


def _statistics_of_one(*fields: Any) -> tuple[Tensor, ...]:
    """One element of a vmap."""
    return statistics(Problem(*fields).with_needs())


def _transformed(problem: Problem) -> tuple[Tensor, ...]:
    """One element of a vmap: under what other transforms run."""
    problem = problem.with_needs()
    return TransformedLoss.apply(*problem, has_tangents(problem.differentiated))  # type: ignore[no-any-return]


class _Scaled(torch.autograd.Function):
    """`scaled`, where a second derivative may be taken: refused. hidden and weight are what the gradient depends on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, factor: Tensor, dtype: torch.dtype, hidden: Any, weight: Any) -> Any:
        return (gradient * factor).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None: ...

    backward = jvp = staticmethod(_refuse_second_derivative)  # type: ignore[assignment]


class _Tangent(torch.autograd.Function):
    """sum <gradient_i, tangent_i> / denominator. Its own derivative would be a second one: refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: Any, weight: Any, denominator: Tensor, *gradients_and_tangents: Tensor) -> Any:
        wide, half = denominator.dtype, len(gradients_and_tangents) // 2
        pairs = zip(gradients_and_tangents[:half], gradients_and_tangents[half:], strict=True)
        products = [(gradient.to(wide) * tangent.to(wide)).sum() for gradient, tangent in pairs]
        return sum(products[1:], products[0]) / denominator

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None: ...

    backward = jvp = staticmethod(_refuse_second_derivative)  # type: ignore[assignment]


class FusedStatistics(torch.autograd.Function):
    """compute_statistics of the fields of a problem."""

    @staticmethod
    def forward(*fields: Any) -> Any:
        return compute_statistics(Problem(*fields))

    setup_context = staticmethod(statistics_setup)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        known = torch.is_grad_enabled() or forward_ad._current_level >= 0
        return statistics_gradients(ctx, grads, FusedStatisticsGradient.apply if known else gradient_of_statistics)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        _refuse_second_derivative()  # the caller, who would have seen tangents, saw none

    @staticmethod
    def vmap(info: Any, in_dims: Any, *fields: Any) -> Any:
        return _one_by_one(_statistics_of_one, info, in_dims, fields)


class FusedStatisticsGradient(torch.autograd.Function):
    """The gradient of `FusedStatistics`, where a second derivative may be taken: refused."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return gradient_of_statistics(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None: ...

    backward = jvp = staticmethod(_refuse_second_derivative)  # type: ignore[assignment]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _one_by_one(FusedStatisticsGradient.apply, info, in_dims, arguments)


class InplaceLoss(torch.autograd.Function):
    """The loss of logits that the caller gives up: their gradient is written over them in forward, scaled in
    place in backward, once. Outside of torch.compile: a functional operator cannot own its argument's memory."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, problem: Problem) -> tuple[Tensor, ...]:
        flat = problem.hidden.detach()
        out = compute_loss(problem._replace(hidden=flat, need_hidden=False), flat)
        ctx.save_for_backward(flat)
        ctx.backend = backends.choose(problem.backend, flat.device, flat.dtype)
        ctx.denominator = None if problem.folds else out[1]
        ctx.used, ctx.leaf, ctx.shape = False, logits.is_leaf, logits.shape
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
        factor = grad if ctx.denominator is None else grad / ctx.denominator
        gradient = scaled_(ctx.backend, gradient, factor, gradient.dtype).view(ctx.shape)
        return (gradient.clone() if ctx.leaf else gradient), None
