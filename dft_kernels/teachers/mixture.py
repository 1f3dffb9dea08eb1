"""Mixtures of teachers: each teacher's probabilities of a chunk, accumulated into one target."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract import DenseTarget, Head, Request, Rows, Source, SparseTarget
from .head import open_head
from .top_k import TopK, open_top_k


class Given(NamedTuple):
    """A teacher that consists of tensors, flattened to N rows."""

    hidden: Tensor
    head: Head


class Labels:
    """The label itself as a distribution, e_y: a part of a `Mixture`."""


class Mixture(Source):
    """Several teachers as one, each a distribution p_i at the loss's teacher_temperature.

        "linear"      p = sum_i w_i p_i: keeps every teacher's modes; weights above 0 that sum to 1
        "log_linear"  p = prod_i p_i^w_i / sum of it: what they agree on; any weights other than 0, so that
                      [1 - g, g] goes from one to the other, and beyond with g outside 0..1

    teachers: tensors of logits, `TeacherLogits`, `TeacherHead`, `LogitStream`, `TopK` with tail="renormalise",
    `Labels()` (linear only: a e_y + (1 - a) p). A `TopK` with a bucket is refused: a mixture weighs tokens, and
    what a token of the bucket weighs is not known. For forward KL the gradient of a e_y + (1 - a) p is that of
    hard_weight=a, soft_weight=1-a, which costs less; for other divergences it is another loss.

    Memory: three chunks of logits in the accumulation dtype. FLOPs: each teacher's own. Outside torch.compile's graph.
    """

    buffers = 3  # the mixture, one teacher, and a temporary of its log-sum-exp

    def __init__(self, teachers: Sequence[Any], weights: Sequence[float], kind: str = "linear") -> None:
        super().__init__()
        self.teachers, self.weights, self.kind = list(teachers), list(weights), kind
        self.parts: list[Given | TopK | Source | Labels] = []  # `teachers`, as the call's checks have flattened them

    @property
    def replayable(self) -> bool:
        """Whether every part is."""
        return all(part.replayable for part in self.teachers if isinstance(part, Source))

    def open(self, request: Request) -> Any:
        """The mixture of each block, as dense logits."""
        return _open(self.parts, self.weights, self.kind, request)


@contextmanager
def _open(parts: list[Any], weights: list[float], kind: str, request: Request) -> Generator[Iterator[DenseTarget]]:
    with ExitStack() as stack:
        opened: list[Iterator[Any] | None] = []
        for part in parts:
            if isinstance(part, Labels):
                opened.append(None)
            elif isinstance(part, Source):
                opened.append(stack.enter_context(part.open(request)))
            elif isinstance(part, TopK):
                context = open_top_k(part, request.temperature, request.dtype, request.blocks)
                opened.append(stack.enter_context(context))
            else:
                opened.append(stack.enter_context(open_head(part.hidden, part.head, request.blocks)))
        yield _blended(opened, weights, kind, request)


def _blended(
    opened: list[Iterator[Any] | None], weights: list[float], kind: str, request: Request
) -> Iterator[DenseTarget]:
    rows = max((block.stop - block.start for block in request.blocks), default=0)
    buffers = [torch.empty(rows, request.vocab, dtype=request.dtype, device=request.device) for _ in range(2)]
    for block in request.blocks:
        total, own = (buffer[: block.stop - block.start] for buffer in buffers)
        total.fill_(-torch.inf if kind == "linear" else 0.0)
        for targets, weight in zip(opened, weights, strict=True):
            if targets is None:
                _one_hot_(block, request, own)
            else:
                _log_probabilities_(next(targets), request, own)
            if kind == "linear":
                torch.logaddexp(total, own.add_(math.log(weight)), out=total)
            else:
                total.add_(own, alpha=weight)
        yield DenseTarget(total.mul_(request.temperature), Head())  # divided by it where it is read
    for targets in opened:
        if targets is not None:
            next(targets, None)  # lets a stream check that it ended where the rows do


def _one_hot_(block: Rows, request: Request, out: Tensor) -> None:
    assert request.target is not None
    label = block.take(request.target) - request.start
    out.fill_(-torch.inf)
    _scatter_(out, label[:, None], out.new_zeros(len(label), 1))


def _log_probabilities_(target: DenseTarget | SparseTarget, request: Request, out: Tensor) -> None:
    """log p [R, V] into `out`."""
    if isinstance(target, SparseTarget):
        _scatter_(out.fill_(-torch.inf), target.index - request.start, target.log_prob)
        return
    request.logits(target.hidden, target.head, out).div_(request.temperature)
    out.sub_(request.log_sum_exp(out))


def _scatter_(out: Tensor, index: Tensor, log_p: Tensor) -> None:
    """log_p [R, k] into `out` [R, V] of -inf at the indices that it has: labels may be ignored, ids another part's."""
    if out.shape[1] > 0:
        inside = (index >= 0) & (index < out.shape[1])
        out.scatter_reduce_(1, torch.where(inside, index, 0), torch.where(inside, log_p, -torch.inf), "amax")
