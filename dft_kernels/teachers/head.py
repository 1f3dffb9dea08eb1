"""A teacher given by its last hidden states and its head."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from .contract import DenseTarget, Head, Rows


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


@contextmanager
def open_head(hidden: Tensor, head: Head, blocks: Sequence[Rows]) -> Generator[Iterator[DenseTarget]]:
    """Targets of `blocks` from a teacher that consists of tensors."""
    yield (DenseTarget(rows.take(hidden), head) for rows in blocks)
