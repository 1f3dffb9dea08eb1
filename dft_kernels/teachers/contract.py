"""Teachers: they supply the target distribution of each chunk of rows.

The chunk loop opens a teacher once for the blocks of rows that it is going to visit (never ignored rows) and
receives one target per block. A teacher that consists of tensors is sliced; a `Source` (stream.py, mixture.py) runs
Python code.
"""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """Hidden states to logits: cap(logit_scale * (hidden @ weight.T + bias)), cap(x) = softcap * tanh(x / softcap).

    weight [V, H], or None where `hidden` [.., V] already holds the product.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


class DenseTarget(NamedTuple):
    """The target distribution of a chunk: the softmax of the logits of `hidden` and `head`, any floating dtype.

    hidden [R, Ht] with a head's weight, which the backend multiplies; logits [R, V] without one.
    """

    hidden: Tensor
    head: Head

    def part(self, rows: slice) -> DenseTarget:
        """That of some rows."""
        return DenseTarget(self.hidden[rows], self.head)


@dataclass(frozen=True)
class SparseTarget:
    """The target distribution of a chunk over k tokens of each row and the bucket of all others."""

    index: Tensor  # [R, k] int64, distinct in a row; below 0: a token of another part of the vocabulary
    log_prob: Tensor  # [R, k] in the accumulation dtype
    tail: Tensor | None  # [R], log p of the bucket; None: no such outcome
    whole: bool = True  # no index is below 0

    def part(self, rows: slice) -> SparseTarget:
        """That of some rows."""
        tail = None if self.tail is None else self.tail[rows]
        return SparseTarget(self.index[rows], self.log_prob[rows], tail, self.whole)

    def best(self) -> Tensor:
        """The likeliest token of each row [R]; below 0: of another part of the vocabulary."""
        return self.index.gather(1, self.log_prob.argmax(1, keepdim=True))[:, 0]


Target = DenseTarget | SparseTarget


@dataclass(frozen=True)
class Rows:
    """A chunk's rows: positions start..stop of the compacted problem, and their original indices (int64,
    ascending, on the problem's device), None where nothing was compacted away."""

    start: int
    stop: int
    index: Tensor | None

    def take(self, tensor: Tensor) -> Tensor:
        """These rows of `tensor` [N, ...]: itself where they are all, a view where they are contiguous, else a copy."""
        if self.index is not None:
            return tensor.index_select(0, self.index)
        return tensor if self.stop - self.start == len(tensor) else tensor[self.start : self.stop]

    def put(self, tensor: Tensor, value: Tensor, dim: int = 0) -> None:
        """Write `value` to these rows of `tensor`, rows counted along `dim`."""
        if self.index is None:
            tensor.narrow(dim, self.start, self.stop - self.start).copy_(value)
        else:
            tensor.index_copy_(dim, self.index, value)


def _log_sum_exp(logits: Tensor) -> Tensor:
    return logits.logsumexp(-1, keepdim=True)


@dataclass(frozen=True)
class Request:
    """The argument of `Source.open`: targets of `blocks` of a problem of `rows` rows and `vocab` columns."""

    blocks: Sequence[Rows]
    rows: int
    vocab: int
    device: torch.device
    dtype: torch.dtype  # of logits as they are computed
    temperature: float  # the target is softmax(logits / temperature)
    target: Tensor | None  # [rows] labels
    logits: Callable[[Tensor, Head, Tensor], Tensor]  # of hidden states [R, H] and their head, into [R, V]
    start: int = 0  # the id of the first column: the columns are ids start..start + vocab of `total`
    total: int | None = None  # None: all
    log_sum_exp: Callable[[Tensor], Tensor] = _log_sum_exp  # of logits [R, V] over the whole vocabulary, [R, 1]


class Source(ABC):
    """A teacher that runs Python code. An operator's schema cannot hold such an object, so it holds its handle."""

    buffers = 1  # chunks of logits [R, V] that it holds at a time

    def __init__(self) -> None:
        self.handle = next(_handles)
        _living[self.handle] = self

    @property
    @abstractmethod
    def replayable(self) -> bool:
        """Whether the targets of the same rows can be read twice."""

    @abstractmethod
    def open(self, request: Request) -> AbstractContextManager[Iterator[DenseTarget]]:
        """The targets of the request's blocks, in order."""


_handles = itertools.count(1)
_living: weakref.WeakValueDictionary[int, Source] = weakref.WeakValueDictionary()


def source_of(handle: int) -> Source:
    """The living source of this handle."""
    return _living[handle]
