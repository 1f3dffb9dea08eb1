"""Where target distributions come from: one question, "the target of these rows", answered chunk by chunk.

The chunk loop opens a teacher once for the blocks of rows it is going to visit (ignored rows are never asked
for) and receives one target per block. A teacher that is tensors gives it on the spot; a `Source` (streams.py,
mixture.py) answers in Python.
"""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

TAILS = ("bucket", "renormalise", "ignore")


class Head(NamedTuple):
    """Hidden states to logits: cap(logit_scale * (hidden @ weight.T + bias)), cap(x) = softcap * tanh(x / softcap).

    weight [V, H], or None where `hidden` [.., V] already holds what the product would give.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


class DenseTarget(NamedTuple):
    """The target distribution of a chunk: softmax over what `head` makes of `hidden`, any floating dtype.

    hidden [R, Ht] with a head's weight, whose product is the backend's to do; logits [R, V] without one.
    """

    hidden: Tensor
    head: Head


@dataclass(frozen=True)
class SparseTarget:
    """The target distribution of a chunk over k tokens of each row and the bucket of all others."""

    index: Tensor  # [R, k] int64, distinct in a row
    log_prob: Tensor  # [R, k] in the accumulation dtype
    tail: Tensor | None  # [R], log p of the bucket; None: no such outcome


Target = DenseTarget | SparseTarget


@dataclass(frozen=True)
class Rows:
    """A chunk's rows: positions start..stop of the compacted problem, and their original indices (int64,
    ascending, on the problem's device), None where nothing was compacted away."""

    start: int
    stop: int
    index: Tensor | None

    def take(self, tensor: Tensor) -> Tensor:
        """These rows of `tensor` [N, ...]: a view where they are contiguous, else a copy."""
        return tensor[self.start : self.stop] if self.index is None else tensor.index_select(0, self.index)

    def put(self, tensor: Tensor, value: Tensor, dim: int = 0) -> None:
        """Write `value` to these rows of `tensor`, rows counted along `dim`."""
        if self.index is None:
            tensor.narrow(dim, self.start, self.stop - self.start).copy_(value)
        else:
            tensor.index_copy_(dim, self.index, value)


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """Logits [..., V] that are already there, of any floating dtype; leading dimensions follow `hidden`'s.

    What a plain tensor passed as `teacher` becomes. vocab_size: of a padded vocabulary, only its first ids are the
    model's; p is the softmax over these.
    """

    logits: Tensor
    vocab_size: int | None = None


@dataclass(frozen=True, eq=False)
class TeacherHead:
    """A teacher model's last hidden states [..., Ht] and head [V, Ht]; a chunk of its logits is one product.

    logits = cap(logit_scale * (hidden @ weight.T + bias)), cap(x) = softcap * tanh(x / softcap); Ht is the
    teacher's own hidden size. Costs 2 N Ht V FLOP and a chunk of fp32 logits; no [N, V] tensor exists.
    vocab_size: of a padded vocabulary, only its first ids are the model's; p is the softmax over these.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None


@dataclass(frozen=True, eq=False)
class TopK:
    """The k likeliest tokens of each row and what the rest weighs: a sparse target.

    indices: [..., k] int64, distinct in a row; log_probs: [..., k], log p of them in the whole distribution
    softmax(teacher logits / temperature); tail_log_prob: [...], log of the mass outside, None: 1 - sum, which
    rounding spoils where the tail is small, so keep it at capture. Leading dimensions follow `hidden`'s.

    tail says what becomes of the mass outside of the k tokens S:

        "bucket"       one outcome more, for target and model alike: D over k + 1 outcomes, the model's tail
                       summed over its tokens. Exact for what is known: a lower bound of D over the whole
                       vocabulary, 0 only where the model agrees on S and on the tail's mass. In S the gradient of
                       forward KL is q - p, outside q (1 - p_tail / q_tail).
        "renormalise"  p / sum of p over S, nothing outside. Biased: draws all of the model's mass into S, and is
                       overconfident by what the tail held; reverse KL would be infinite and is refused.
        "ignore"       sum of the divergence's addends f >= 0 over S alone. Biased low: nothing is asked of how
                       far the tail's mass is off beyond what S says of it.

    Log-probabilities are of the temperature they were captured at: the loss's teacher_temperature must be that one,
    but for "renormalise", where p over S follows any. FLOPs: O(N k) beside the loss; memory: O(chunk k).
    """

    indices: Tensor
    log_probs: Tensor
    tail_log_prob: Tensor | None = None
    temperature: float = 1.0
    tail: str = "bucket"


@dataclass(frozen=True)
class Request:
    """What a `Source` is asked for: targets of `blocks` of a problem of `rows` rows and `vocab` columns."""

    blocks: Sequence[Rows]
    rows: int
    vocab: int
    device: torch.device
    dtype: torch.dtype  # of logits as they are computed
    temperature: float  # the target is softmax(logits / temperature)
    target: Tensor | None  # [rows] labels


class Source(ABC):
    """A teacher that answers in Python: an operator's schema, which has no room for it, holds its handle."""

    buffers = 1  # logits [chunk, V] that it holds at a time

    def __init__(self) -> None:
        self.handle = next(_handles)
        _living[self.handle] = self

    @property
    @abstractmethod
    def replayable(self) -> bool:
        """Whether the same rows can be asked for twice."""

    @abstractmethod
    def open(self, request: Request) -> AbstractContextManager[Iterator[DenseTarget]]:
        """The targets of the request's blocks, in order."""


_handles = itertools.count(1)
_living: weakref.WeakValueDictionary[int, Source] = weakref.WeakValueDictionary()


def source_of(handle: int) -> Source:
    """The living source of this handle."""
    return _living[handle]


@contextmanager
def open_head(hidden: Tensor, head: Head, blocks: Sequence[Rows]) -> Generator[Iterator[DenseTarget]]:
    """Targets of `blocks` from a teacher that is tensors."""
    yield (DenseTarget(rows.take(hidden), head) for rows in blocks)


@contextmanager
def open_top_k(top: TopK, temperature: float, dtype: torch.dtype, blocks: Sequence[Rows]) -> Generator[Iterator[Any]]:
    """Sparse targets of `blocks` at `temperature`: log p over the outcomes, which sum to 1 (but for "ignore")."""
    yield (_sparse(top, rows, temperature, dtype) for rows in blocks)


def _sparse(top: TopK, rows: Rows, temperature: float, dtype: torch.dtype) -> SparseTarget:
    index, log_p = rows.take(top.indices), rows.take(top.log_probs).to(dtype)
    if top.tail == "renormalise":
        log_p = (log_p * (top.temperature / temperature)).log_softmax(-1)
        return SparseTarget(index, log_p, log_p.new_full((len(log_p),), -torch.inf))
    if top.tail == "ignore":
        return SparseTarget(index, log_p, None)
    if top.tail_log_prob is None:
        return SparseTarget(index, log_p, torch.log1p(-log_p.exp().sum(-1).clamp(max=1.0)))
    tail = rows.take(top.tail_log_prob).to(dtype)
    total = torch.logaddexp(log_p.logsumexp(-1), tail)  # what rounding, at capture, made of 1
    return SparseTarget(index, log_p - total[:, None], tail - total)
