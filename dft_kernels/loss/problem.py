"""One frozen, validated description of a call.

A `Problem` is flat on purpose: its fields, in this order, are the argument list of the custom operators in
`operators.py` (`SCHEMA`), so that a traced call and an eager one are the same call. `build.py` makes it
and checks shapes and numbers; label and group *values* are checked in `selection.py`, at the one host
synchronisation there is, before any product.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.contract import Row, Terms
from ..distributed.shards import Shards, shards_of
from ..divergences import Divergence
from ..dtypes import accumulate_dtype, sparse_matrix
from ..teachers.contract import Head, source_of
from ..teachers.top_k import TopK
from .checks import has_tangent

TENSORS = 20  # the leading fields of a Problem that are tensors
GRADIENTS = 5  # the first of these take gradients
_ROWS = (1 << len(Row)) - 1  # the bits of `Problem.reported` that are rows
NEEDS = ("need_hidden", "need_weight", "need_bias", "need_down", "need_up")


class Problem(NamedTuple):
    """A call, flattened to N rows. Absent tensors are None."""

    hidden: Tensor  # [N, H], or logits [N, V] where there is no weight
    weight: Tensor | None  # [V, H]
    bias: Tensor | None  # [V]
    down: Tensor | None  # [N, r]
    up: Tensor | None  # [V, r]
    target: Tensor | None  # [N] int64
    row_weight: Tensor | None  # [N]
    num_items: Tensor | None  # 0-d
    teacher_hidden: Tensor | None  # [N, Ht], or logits [N, V] where there is no teacher_weight
    teacher_weight: Tensor | None  # [V, Ht]
    teacher_bias: Tensor | None  # [V]
    top_indices: Tensor | None  # [N, k] int64 of a sparse teacher
    top_log_probs: Tensor | None  # [N, k]
    top_tail: Tensor | None  # [N]
    potential: Tensor | None  # [G, V]
    group: Tensor | None  # [N] int64
    features: Tensor | None  # [V, K], or the values [nnz] of a sparse one
    feature_index: Tensor | None  # [2, nnz] of a sparse one
    feature_weight: Tensor | None  # [N, K]
    entropy_weight: Tensor | None  # [N]
    num_features: int
    num_groups: int
    source: int  # Source.handle, 0: none
    sharded: int  # Shards.handle of a vocabulary of several processes, 0: it is of this one
    sums_hidden: bool  # gradients of hidden and down are summed over these processes
    top_temperature: float
    top_mode: str  # TopK.tail
    teacher_logit_scale: float
    teacher_softcap: float | None
    logit_scale: float
    softcap: float | None
    divergence: str
    parameter: float
    hard_weight: float
    soft_weight: float  # temperature_scaling is folded into `soft_scale`
    soft_scale: float
    temperature: float
    teacher_temperature: float
    label_smoothing: float
    z_loss: float
    ignore_index: int
    reduction: str
    chunk_size: int | None
    memory_budget: int | None
    gradient_error: float | None  # relative, that dhidden and dweight may have
    narrow: bool  # logits are held in the input dtype, not in the accumulation dtype
    compact: bool
    backend: str
    reported: int  # bit r: Row(r) is wanted for its own sake; bit len(Row): any result but the loss is
    columns: bool  # accumulate the column sums
    need_hidden: bool = False
    need_weight: bool = False
    need_bias: bool = False
    need_down: bool = False
    need_up: bool = False

    @property
    def vocab(self) -> int:
        """V; of a vocabulary of several processes, what this one has of it."""
        return (self.hidden if self.weight is None else self.weight).shape[1 if self.weight is None else 0]

    @property
    def shards(self) -> Shards | None:
        """How the vocabulary is divided over processes, None: it is not."""
        return shards_of(self.sharded) if self.sharded else None

    @property
    def whole_vocab(self) -> int:
        """V of all processes."""
        return self.vocab if self.shards is None else self.shards.total

    @property
    def widest_vocab(self) -> int:
        """The most of V that a process has."""
        return self.vocab if self.shards is None else self.shards.widest

    @property
    def has_teacher(self) -> bool:
        """Whether there is a target distribution."""
        return self.teacher_hidden is not None or self.top is not None or self.source != 0

    @property
    def top(self) -> TopK | None:
        """The sparse teacher, if that is what it is."""
        if self.top_indices is None or self.top_log_probs is None:
            return None
        return TopK(self.top_indices, self.top_log_probs, self.top_tail, self.top_temperature, self.top_mode)

    @property
    def reports(self) -> bool:
        """Whether any result but the loss is wanted."""
        return self.reported != 0

    @property
    def target_dtype(self) -> torch.dtype | None:
        """The dtype of a chunk's dense target: of logits, that they are given in; of a head, that of the model's; of a
        source, the accumulation dtype. None without one."""
        if self.source:
            return self.dtype
        if self.teacher_hidden is None:
            return None
        return self.teacher_hidden.dtype if self.teacher_weight is None else self.logits_dtype

    @property
    def target_bytes(self) -> int:
        """Bytes of a logit of a chunk's target: of given logits, their copy where rows are left out; of a head or a
        source, what it computes. 0 without a dense one."""
        if self.target_dtype is None:
            return 0
        return self.target_dtype.itemsize * (source_of(self.source).buffers if self.source else 1)

    def with_needs(self) -> Problem:
        """With the gradients to compute beside those known, where a transform has changed what they are of."""
        known = zip(NEEDS, self.needs, self.differentiated, strict=True)
        return self._replace(**{name: need or needs_gradient(tensor) for name, need, tensor in known})  # type: ignore[arg-type]

    @property
    def differentiated(self) -> tuple[Tensor | None, ...]:
        """The first fields, which take gradients."""
        return self.hidden, self.weight, self.bias, self.down, self.up

    @property
    def needs(self) -> tuple[bool, bool, bool, bool, bool]:
        """Which of the first fields take a gradient: hidden, weight, bias, down, up."""
        return self.need_hidden, self.need_weight, self.need_bias, self.need_down, self.need_up

    @property
    def needs_gradient(self) -> bool:
        """Whether any gradient product is needed."""
        return any(self.needs)

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype: of losses and of row quantities."""
        return accumulate_dtype(self.hidden.dtype)

    @property
    def logits_dtype(self) -> torch.dtype:
        """The dtype that a chunk's logits are held in, where the call computes them."""
        return self.hidden.dtype if self.narrow else self.dtype

    @property
    def folds(self) -> bool:
        """Whether the saved gradients are those of the loss itself, in the input dtype, divided by the denominator. In
        fp16, which has not the range, they are those of the sum of the rows' losses, summed in fp32."""
        return self.hidden.dtype != torch.float16

    @property
    def teacher_head(self) -> Head:
        """The teacher's head; for plain logits one without a weight."""
        return Head(self.teacher_weight, self.teacher_bias, self.teacher_logit_scale, self.teacher_softcap)

    @property
    def wanted(self) -> frozenset[Row]:
        """The row quantities to compute: those of the loss, and what is reported and there are tensors for."""
        rows, asked = loss_terms(self), self.reported & _ROWS
        return rows if asked == 0 else (rows | _rows_of(asked)) - self._absent

    @property
    def _absent(self) -> frozenset[Row]:
        """The row quantities that the call has no tensors for."""
        return _ABSENT[self.target is None, not self.has_teacher, self.potential is None]

    def terms(self, differentiated: frozenset[Row]) -> Terms:
        """What to ask of a backend, where the quantities `differentiated` take cotangents, as far as there are tensors
        for them."""
        differentiated -= self._absent
        features = self.features
        if features is not None and self.feature_index is not None:
            shape = (self.vocab, self.num_features)
            features = sparse_matrix(self.feature_index, features.to(self.dtype), shape, check=False)
        return Terms(
            head=Head(self.weight, self.bias, self.logit_scale, self.softcap),
            up=self.up,
            logits_dtype=self.logits_dtype,
            wanted=self.wanted | differentiated,
            differentiated=differentiated,
            divergence=Divergence(self.divergence, self.parameter),
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            target_dtype=self.target_dtype,
            columns=self.columns,
            potential=self.potential,
            features=None if features is None else features.to(self.dtype),
            active=self.gradient_error is not None,
        )


def _schema() -> str:
    kinds = {
        "Tensor": "Tensor", "Tensor | None": "Tensor?", "int": "int", "int | None": "int?", "float": "float",
        "float | None": "float?", "str": "str", "bool": "bool",
    }  # fmt: skip
    fields = {name: str(getattr(kind, "__forward_arg__", kind)) for name, kind in Problem.__annotations__.items()}
    return ", ".join(f"{kinds[kind]} {name}" for name, kind in fields.items())


SCHEMA = _schema()


def loss_terms(problem: Problem) -> frozenset[Row]:
    """The row quantities that the loss of a row is made of."""
    hard = problem.hard_weight != 0
    present = (
        hard,
        hard and problem.label_smoothing != 0,
        problem.entropy_weight is not None,
        problem.z_loss != 0,
        problem.soft_weight != 0 and problem.has_teacher,
        problem.potential is not None,
    )
    return _LOSS_TERMS[present]


_TERMS = (Row.LOG_PROB, Row.MEAN_LOG_PROB, Row.ENTROPY, Row.LSE, Row.DIVERGENCE, Row.POTENTIAL)
_LOSS_TERMS = {
    present: frozenset(itertools.compress(_TERMS, present))
    for present in itertools.product((False, True), repeat=len(_TERMS))
}


_PER_TENSOR = (
    frozenset({Row.LOG_PROB, Row.MEAN_LOG_PROB, Row.CORRECT}),
    frozenset({Row.DIVERGENCE, Row.AGREEMENT}),
    frozenset({Row.POTENTIAL}),
)
_ABSENT = {  # without a target, a teacher, a potential
    absent: frozenset[Row]().union(*itertools.compress(_PER_TENSOR, absent))
    for absent in itertools.product((False, True), repeat=len(_PER_TENSOR))
}


def needs_gradient(tensor: Tensor | None) -> bool:
    """Whether it requires grad, or forward mode runs through it."""
    return tensor is not None and ((tensor.requires_grad and torch.is_grad_enabled()) or has_tangent(tensor))


@functools.cache
def _rows_of(bits: int) -> frozenset[Row]:
    return frozenset(row for row in Row if bits >> row & 1)
