"""One frozen, validated description of a call, and every user-facing check of it.

A `Problem` is flat on purpose: its fields, in this order, are the argument list of the custom operators in
`autograd.py` (`SCHEMA`), so that a traced call and an eager one are the same call. What is checked from shapes
and numbers is checked when it is built; label and group *values* are checked in `selection.py`, at the one
host synchronisation there is, before any product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import Row, Terms
from ..divergences import Divergence
from ..dtypes import accumulate_dtype
from ..teachers.contract import Head, Source, source_of
from ..teachers.stream import LogitStream
from ..teachers.top_k import TopK
from .checks import Checks, autocast, pair
from .wanted import metric_names, wanted

TENSORS = 20  # the leading fields of a Problem that are tensors


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
    compact: bool
    backend: str
    wanted: int  # bit r: Row(r) is computed
    reports: bool  # the row quantities are wanted for their own sake
    columns: bool  # accumulate the column sums
    need_hidden: bool
    need_weight: bool
    need_bias: bool
    need_down: bool
    need_up: bool

    @property
    def vocab(self) -> int:
        """V"""
        return (self.hidden if self.weight is None else self.weight).shape[1 if self.weight is None else 0]

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
    def target_bytes(self) -> int:
        """Bytes of a logit of a chunk's target: of given logits, their copy where rows are left out; of a head or a
        source, what it computes in the accumulation dtype. 0 without a dense one."""
        if self.source:
            return self.dtype.itemsize * source_of(self.source).buffers
        if self.teacher_hidden is None:
            return 0
        return (self.teacher_hidden.dtype if self.teacher_weight is None else self.dtype).itemsize

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
    def teacher_head(self) -> Head:
        """The teacher's head; for plain logits one without a weight."""
        return Head(self.teacher_weight, self.teacher_bias, self.teacher_logit_scale, self.teacher_softcap)

    def terms(self, differentiated: frozenset[Row]) -> Terms:
        """What to ask of a backend, where the quantities `differentiated` take cotangents. Of these, and of what is
        wanted, only what the call has tensors for."""
        absent = {Row.LOG_PROB, Row.CORRECT} if self.target is None else set()
        absent |= set() if self.has_teacher else {Row.DIVERGENCE, Row.AGREEMENT}
        absent |= set() if self.potential is not None else {Row.POTENTIAL}
        differentiated -= absent
        features = self.features
        if features is not None and self.feature_index is not None:
            shape = (self.vocab, self.num_features)
            features = torch.sparse_coo_tensor(
                self.feature_index, features, shape, dtype=self.dtype, check_invariants=False
            )
        return Terms(
            head=Head(self.weight, self.bias, self.logit_scale, self.softcap),
            up=self.up,
            wanted=frozenset(row for row in Row if self.wanted >> row & 1) | differentiated,
            differentiated=differentiated,
            divergence=Divergence(self.divergence, self.parameter),
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            dense=self.has_teacher and self.top_indices is None,
            potential=self.potential,
            features=None if features is None else features.to(self.dtype),
        )


def _schema() -> str:
    kinds = {
        "Tensor": "Tensor", "Tensor | None": "Tensor?", "int": "int", "int | None": "int?", "float": "float",
        "float | None": "float?", "str": "str", "bool": "bool",
    }  # fmt: skip
    fields = {name: str(getattr(kind, "__forward_arg__", kind)) for name, kind in Problem.__annotations__.items()}
    return ", ".join(f"{kinds[kind]} {name}" for name, kind in fields.items())


SCHEMA = _schema()


def build(
    function: str,
    hidden: Any,
    weight: Any,
    target: Any,
    teacher: Any,
    *,
    names: tuple[str, str, str] = ("hidden", "weight", "bias"),
    projected: bool = True,
    statistics: bool = False,
    labelled: bool = False,
    class_weight: Any = None,
    bias: Any = None,
    low_rank: Any = None,
    divergence: Any = "forward_kl",
    soft_weight: Any = 1.0,
    hard_weight: Any = None,
    temperature: Any = 1.0,
    teacher_temperature: Any = None,
    temperature_scaling: Any = "none",
    label_smoothing: Any = 0.0,
    z_loss: Any = 0.0,
    logit_scale: Any = 1.0,
    softcap: Any = None,
    potential: Any = None,
    group: Any = None,
    num_groups: Any = 1,
    features: Any = None,
    feature_weight: Any = None,
    entropy_weight: Any = None,
    ignore_index: Any = -100,
    row_weight: Any = None,
    reduction: Any = "mean",
    num_items: Any = None,
    chunk_size: Any = None,
    memory_budget: Any = None,
    compact: Any = True,
    backend: Any = "auto",
    return_metrics: Any = False,
) -> Problem:
    """Check a call and flatten it.

    projected: there is a weight (else hidden holds logits); statistics: the row quantities themselves are the
    result; labelled: target is not optional. The other meanings are those of `linear_distribution_loss`.
    """
    down, up = pair(function, low_rank)
    if projected:
        hidden, weight, bias, down, up = autocast(hidden, weight, bias, down, up)
    check = Checks(function, names, hidden)
    if projected:
        check.head(weight, bias, hidden, names)
        check.low_rank(down, up, weight)
    vocab = weight.shape[0] if projected else hidden.shape[-1]
    if vocab == 0:
        check.fail(names[0], "have at least one class (V >= 1)", list(hidden.shape), "Pass logits [..., V]")
    if labelled:
        check.tensor("target", target)
    target = check.per_row("target", target, floating=False)
    group = check.per_row("group", group, floating=False)
    row_weight = check.per_row("row_weight", row_weight, floating=True)
    chosen = check.divergence(divergence)
    temperature = check.number("temperature", temperature, "be greater than 0", lambda x: x > 0)
    if teacher_temperature is None:
        teacher_temperature = temperature
    teacher_temperature = check.number("teacher_temperature", teacher_temperature, "be greater than 0", lambda x: x > 0)
    check.choice("temperature_scaling", temperature_scaling, ("none", "squared"))
    label_smoothing = check.number("label_smoothing", label_smoothing, "lie in 0..1", lambda x: 0 <= x <= 1)
    z_loss = check.number("z_loss", z_loss, "be at least 0", lambda x: x >= 0)
    logit_scale = check.number("logit_scale", logit_scale, "be a number other than 0", lambda x: x != 0)
    if softcap is not None:
        softcap = check.number("softcap", softcap, "be greater than 0 or None", lambda x: x > 0)
    soft_weight = check.number("soft_weight", soft_weight, "be a number", lambda x: True)
    if hard_weight is None:
        hard_weight = 1.0 if teacher is None and target is not None else 0.0
    hard_weight = check.number("hard_weight", hard_weight, "be a number or None", lambda x: True)
    if target is None and (hard_weight != 0 or label_smoothing != 0):
        got = f"hard_weight={hard_weight}, label_smoothing={label_smoothing}"
        check.fail("target", "be given where a cross-entropy is asked for", f"None with {got}", "Pass the labels")
    num_groups = check.positive_int("num_groups", num_groups)
    if group is None and num_groups > 1:
        check.fail("group", f"be given with num_groups={num_groups}", "None", "Pass the group of each row")
    if potential is not None:
        potential = check.constant("potential", potential)
        check.shape("potential", potential, (num_groups, vocab), "num_groups, V")
    values, feature_index, num_features = check.features(features, vocab)
    feature_weight = check.feature_weight(feature_weight, None if features is None else num_features)
    entropy_weight = check.per_row("entropy_weight", entropy_weight, floating=True)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        check.fail("ignore_index", "be an int", repr(ignore_index), "The usual one is -100", TypeError)
    metrics = metric_names(check, return_metrics)
    row_weight = _class_weight(check, class_weight, target, row_weight, vocab, label_smoothing)
    check.choice("reduction", reduction, ("mean", "sum", "none"))
    num_items = check.num_items(num_items, reduction)
    if chunk_size is not None:
        check.positive_int("chunk_size", chunk_size)
    if memory_budget is not None:
        check.positive_int("memory_budget", memory_budget)
    if chunk_size is not None and memory_budget is not None:
        check.fail("chunk_size", "be None where memory_budget is given", chunk_size, "Give one of the two")
    backend = check.backend(backend)
    asked = (target, teacher, potential, feature_weight, entropy_weight)
    if not (z_loss != 0 or statistics or any(term is not None for term in asked)):
        check.fail("target or teacher", "be given", "neither", "Pass labels, a teacher, or a potential")

    taught = check.teacher(teacher, vocab, teacher_temperature, chosen, target is not None)
    grad = torch.is_grad_enabled()
    problem = Problem(
        hidden=hidden.reshape(-1, hidden.shape[-1]),
        weight=weight,
        bias=bias,
        down=None if down is None else down.reshape(-1, down.shape[-1]),
        up=up,
        target=target,
        row_weight=row_weight,
        num_items=num_items,
        teacher_hidden=taught.hidden,
        teacher_weight=taught.head.weight,
        teacher_bias=taught.head.bias,
        top_indices=None if taught.top is None else taught.top.indices,
        top_log_probs=None if taught.top is None else taught.top.log_probs,
        top_tail=None if taught.top is None else taught.top.tail_log_prob,
        potential=potential,
        group=group,
        features=values,
        feature_index=feature_index,
        feature_weight=feature_weight,
        entropy_weight=entropy_weight,
        num_features=num_features,
        num_groups=num_groups,
        source=taught.source,
        top_temperature=1.0 if taught.top is None else taught.top.temperature,
        top_mode="" if taught.top is None else taught.top.tail,
        teacher_logit_scale=taught.head.logit_scale,
        teacher_softcap=taught.head.softcap,
        logit_scale=logit_scale,
        softcap=softcap,
        divergence=chosen.name,
        parameter=chosen.parameter,
        hard_weight=hard_weight,
        soft_weight=soft_weight if teacher is not None else 0.0,
        soft_scale=temperature**2 if temperature_scaling == "squared" else 1.0,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        ignore_index=ignore_index,
        reduction=reduction,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        compact=bool(compact),
        backend=backend,
        wanted=0,
        reports=statistics or bool(metrics),
        columns=statistics or ("mean_probability" in metrics and group is not None),
        need_hidden=grad and hidden.requires_grad,
        need_weight=grad and weight is not None and weight.requires_grad,
        need_bias=grad and bias is not None and bias.requires_grad,
        need_down=grad and down is not None and down.requires_grad,
        need_up=grad and up is not None and up.requires_grad,
    )
    if memory_budget is not None:
        chosen_backend = backends.choose(backend, hidden.device, hidden.dtype)
        row = chosen_backend.chunk_bytes(hidden.dtype, projected, problem.target_bytes) * vocab
        if memory_budget < row:
            relation = f"be at least {row} bytes (one row of {vocab} logits)"
            check.fail("memory_budget", relation, memory_budget, "Raise it, or give chunk_size=1")
    if isinstance(teacher, Source) and not teacher.replayable:
        streams = getattr(teacher, "teachers", [teacher])
        if any(isinstance(stream, LogitStream) and not stream.replayable and stream.spent for stream in streams):
            check.fail("teacher", "be an unread stream", "an iterator that was read before", "Make a new LogitStream")
        if problem.needs_gradient and (statistics or reduction == "none"):
            check.fail(
                "teacher",
                "be replayable where backward recomputes logits (reduction='none', statistics)",
                "a LogitStream over an iterator",
                "Give LogitStream a callable rows -> logits",
            )
    smoothed, known = problem.label_smoothing != 0, loss_terms(problem)
    return problem._replace(
        wanted=wanted(known, metrics, statistics, target is not None, problem.has_teacher, smoothed)
    )


def loss_terms(problem: Problem) -> frozenset[Row]:
    """The row quantities that the loss of a row is made of."""
    parts = {
        Row.LOG_PROB: problem.hard_weight != 0,
        Row.MEAN_LOG_PROB: problem.hard_weight != 0 and problem.label_smoothing != 0,
        Row.ENTROPY: problem.entropy_weight is not None,
        Row.LSE: problem.z_loss != 0,
        Row.DIVERGENCE: problem.soft_weight != 0 and problem.has_teacher,
        Row.POTENTIAL: problem.potential is not None,
    }
    return frozenset(row for row, present in parts.items() if present)


def _class_weight(
    check: Checks, value: Any, target: Tensor | None, row_weight: Tensor | None, vocab: int, label_smoothing: float
) -> Tensor | None:
    """Class weights are row weights: w[y_n], which "mean" sums as torch does. With smoothing they are not."""
    if value is None or target is None:
        return row_weight
    check.shape("weight", check.constant("weight", value), (vocab,), "V")
    if label_smoothing != 0:
        got = f"label_smoothing={label_smoothing}"
        check.fail("weight", "come without label_smoothing", got, "Use one of the two, or F.cross_entropy")
    weight: Tensor = value.index_select(0, target.clamp(0, vocab - 1))
    return weight if row_weight is None else weight * row_weight
