"""A teacher given by its logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """A teacher's logits [..., V], of any floating dtype; leading dimensions follow `hidden`'s.

    What a plain tensor passed as `teacher` becomes. vocab_size: of a padded vocabulary, only its first ids are the
    model's; p is the softmax over these.
    """

    logits: Tensor
    vocab_size: int | None = None
