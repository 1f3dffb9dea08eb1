"""The teacher of a call, its divergence and temperatures."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..divergences import TABLE, Divergence
from ..teachers.contract import Head, Source
from ..teachers.head import TeacherHead
from ..teachers.logits import TeacherLogits
from ..teachers.mixture import Given, Labels, Mixture
from ..teachers.stream import LogitStream
from ..teachers.top_k import TAILS, TopK
from .checks import Checks, Fields, flattened
from .inputs import autocast, check_head
from .options import LossOptions, untouched


class Taught(NamedTuple):
    """A teacher, flattened: tensors and their head, a sparse one, or a source's handle."""

    hidden: Tensor | None = None
    head: Head = Head()
    top: TopK | None = None
    source: int = 0


def _divergence(check: Checks, value: Any) -> Divergence:
    if isinstance(value, str):
        name = check.choice("divergence", value, tuple(TABLE))
        return Divergence(name, TABLE[name].default)
    if not isinstance(value, Divergence) or value.name not in TABLE:
        check.fail(
            "divergence",
            "be a name or what a function of dft_kernels.divergences returns",
            repr(value),
            f"Pass one of {', '.join(TABLE)}, or divergences.jensen_shannon(0.5)",
            TypeError,
        )
    entry = TABLE[value.name]
    if not entry.admits(value.parameter):
        remedy = f"Its default is {entry.default}; the limits are forward_kl and reverse_kl"
        check.fail(f"{value.name}'s {entry.parameter}", entry.domain, value.parameter, remedy)
    return value


def _teacher(check: Checks, teacher: Any, temperature: float, divergence: Divergence, labelled: bool) -> Taught:
    """A teacher, checked against the model's rows, its vocabulary and the rest of the call, and flattened.
    temperature: the teacher's."""
    if teacher is None:
        return Taught()
    if isinstance(teacher, Mixture):
        _mixture(check, teacher, temperature, divergence, labelled)
        return Taught(source=teacher.handle)
    part = _part(check, teacher, temperature, divergence)
    if isinstance(part, Source):
        return Taught(source=part.handle)
    return Taught(top=part) if isinstance(part, TopK) else Taught(part.hidden, part.head)


def _part(check: Checks, teacher: Any, temperature: float, divergence: Divergence) -> Given | TopK | Source:
    if isinstance(teacher, LogitStream):
        check.positive_int("LogitStream prefetch", teacher.prefetch)
        if not callable(teacher.source) and not hasattr(teacher.source, "__iter__"):
            got = type(teacher.source).__name__
            remedy = "Pass an iterator of logits, or a function rows -> logits"
            check.fail("LogitStream source", "be an iterator or a callable", got, remedy, TypeError)
        return teacher
    if isinstance(teacher, TopK):
        return _top_k(check, teacher, temperature, divergence)
    if isinstance(teacher, Tensor):
        teacher = TeacherLogits(teacher)
    if isinstance(teacher, TeacherLogits):
        logits = check.constant("teacher", teacher.logits)
        if logits.ndim and (own := _own_ids(check, "teacher", logits.shape[-1], teacher.vocab_size)) is not None:
            logits = logits[..., own]
        check.shape("teacher", logits, (*check.lead, check.vocab), f"{check.names[0]}'s leading shape and V")
        return Given(flattened(logits), Head())
    if not isinstance(teacher, TeacherHead):
        check.fail(
            "teacher",
            "be a tensor of logits, TeacherLogits, TeacherHead, TopK, LogitStream or Mixture",
            type(teacher).__name__,
            "Wrap the teacher's hidden states and head as TeacherHead(hidden, weight)",
            TypeError,
        )
    hidden, weight, bias = teacher.hidden, teacher.weight, teacher.bias
    names = ("teacher.hidden", "teacher.weight", "teacher.bias")
    if check.shards is not None and hasattr(weight, "placements"):  # a teacher under tensor parallelism too
        from ..distributed.dtensor import local

        hidden, weight, bias = (
            local(check.function, name, value, dim, check.shards.group)
            for name, value, dim in zip(names, (hidden, weight, bias), (None, 0, 0), strict=True)
        )
    hidden, weight, bias = autocast(hidden, weight, bias)
    for name, value in zip(names, (hidden, weight, bias), strict=True):
        if value is not None:
            check.constant(name, value)
    if hidden.ndim == 0:
        check.fail(names[0], "have shape [..., Ht]", "a 0-d tensor", "Pass the teacher's last hidden states")
    check_head(check, weight, bias, hidden, names, parted=check.shards is not None)
    if (own := _own_ids(check, "teacher", weight.shape[0], teacher.vocab_size)) is not None:
        weight, bias = weight[own], None if bias is None else bias[own]
    check.shape(names[0], hidden, (*check.lead, hidden.shape[-1]), f"{check.names[0]}'s leading shape, then Ht")
    scale = check.nonzero("teacher.logit_scale", teacher.logit_scale)
    softcap = teacher.softcap
    if softcap is not None:
        softcap = check.positive("teacher.softcap", softcap, " or None")
    return Given(flattened(hidden), Head(weight, bias, scale, softcap))


def _top_k(check: Checks, top: TopK, temperature: float, divergence: Divergence) -> TopK:
    indices = check.constant("teacher.indices", top.indices, floating=False)
    if indices.dtype != torch.int64:
        check.fail("teacher.indices", "be int64", indices.dtype, "Cast it with .long()", TypeError)
    k = indices.shape[-1] if indices.ndim else 0
    if not 1 <= k <= check.whole_vocab:
        remedy = "Pass token ids [..., k]"
        check.fail("teacher.indices", f"hold 1 to {check.whole_vocab} ids a row (V)", list(indices.shape), remedy)
    check.shape("teacher.indices", indices, (*check.lead, k), f"{check.names[0]}'s leading shape, then k")
    log_probs = check.constant("teacher.log_probs", top.log_probs)
    check.shape("teacher.log_probs", log_probs, tuple(indices.shape), "one for each of teacher.indices")
    tail_log_prob = check.per_row("teacher.tail_log_prob", top.tail_log_prob, floating=True)
    check.choice("teacher.tail", top.tail, TAILS)
    captured = check.positive("teacher.temperature", top.temperature)
    if top.tail != "renormalise" and captured != temperature:
        check.fail(
            "teacher_temperature",
            f"be {captured}, at which this TopK was captured (what its tail weighs at another is not known)",
            temperature,
            f'Pass teacher_temperature={captured}, capture at {temperature}, or use tail="renormalise"',
        )
    if top.tail == "renormalise" and not TABLE[divergence.name].finite_at_zero(divergence.parameter):
        check.fail(
            "divergence",
            'be finite where the target is 0 with tail="renormalise"',
            f"{divergence.name}, which is infinite there",
            'Use tail="bucket", or jensen_shannon',
        )
    tail = "ignore" if top.tail == "bucket" and k == check.whole_vocab else top.tail  # there is nothing outside
    return TopK(indices.reshape(-1, k), log_probs.reshape(-1, k), tail_log_prob, captured, tail)


def _mixture(check: Checks, mixture: Mixture, temperature: float, divergence: Divergence, labelled: bool) -> None:
    linear = check.choice("Mixture kind", mixture.kind, ("linear", "log_linear")) == "linear"
    count = len(mixture.teachers)
    if count == 0 or len(mixture.weights) != count:
        got = f"{count} teachers, {len(mixture.weights)} weights"
        check.fail("Mixture", "have one weight for each of its teachers, and one teacher at least", got, "Count them")
    for weight in mixture.weights:
        if linear:
            check.positive("Mixture weights", weight)
        else:
            check.nonzero("Mixture weights", weight)
    if linear and abs(math.fsum(mixture.weights) - 1.0) > 1e-6:
        total = math.fsum(mixture.weights)
        check.fail("Mixture weights", "sum to 1 in a linear mixture", total, "Divide them by their sum")
    parts: list[Given | TopK | Source | Labels] = []
    for teacher in mixture.teachers:
        if isinstance(teacher, Labels):
            if not (linear and labelled):
                got = "no target" if linear else "a log-linear mixture, in which all else would be 0"
                check.fail("Labels()", "come with target in a linear mixture", got, "Pass the labels as target")
            parts.append(teacher)
            continue
        if isinstance(teacher, TopK) and teacher.tail != "renormalise":
            relation = 'have tail="renormalise" in a mixture, which weighs single tokens (a bucket does not)'
            remedy = 'Use TopK alone with hard_weight for the label, a whole teacher, or tail="renormalise"'
            check.fail("TopK", relation, repr(teacher.tail), remedy)
        if isinstance(teacher, Mixture):
            remedy = "Multiply the weights out"
            check.fail("Mixture", "hold teachers that are not mixtures", "a Mixture", remedy, TypeError)
        parts.append(_part(check, teacher, temperature, divergence))
    mixture.parts = parts


def _own_ids(check: Checks, argument: str, theirs: int, vocab_size: Any) -> slice | None:
    """Which of a teacher's `theirs` ids are those of the model's columns here, None: all; as its vocab_size says, where
    its vocabulary is the larger one. Where the model's lies over several processes, it may be whole, or divided
    alike."""
    ours = check.whole_vocab
    start = 0 if check.shards is None else check.shards.start
    own = slice(start, start + check.vocab)
    if vocab_size is not None:
        check.positive_int(f"{argument}.vocab_size", vocab_size)
        if vocab_size != ours or vocab_size > theirs:
            relation = f"be the model's vocabulary of {ours}, and at most the teacher's of {theirs}"
            remedy = "A model whose own vocabulary is the padded one is sliced by its weight: weight[:vocab_size]"
            check.fail(f"{argument}.vocab_size", relation, vocab_size, remedy)
        return own if theirs > check.vocab else None
    if theirs in (ours, check.vocab):
        return own if theirs > check.vocab else None
    remedy = f"If its first {ours} ids are the model's and the rest is padding, give the teacher vocab_size={ours}"
    if theirs < ours:
        remedy = f"If the model's ids from {theirs} on are padding, slice its head: weight[:{theirs}]"
    part = "" if check.shards is None else f", or this process's part of it of {check.vocab}"
    return check.fail(argument, f"have the model's vocabulary of {ours}{part}", f"a vocabulary of {theirs}", remedy)


def teacher_fields(check: Checks, teacher: Any, labelled: bool, options: LossOptions, given: Collection[str]) -> Fields:
    """The teacher, the divergence to it and both temperatures. given: the names of options that are not defaults."""
    if teacher is None and untouched(given, _OPTIONS):
        return _UNTAUGHT
    divergence = _divergence(check, options["divergence"])
    temperature = check.positive("temperature", options["temperature"])
    theirs = options["teacher_temperature"]
    theirs = temperature if theirs is None else check.positive("teacher_temperature", theirs)
    return _fields(_teacher(check, teacher, theirs, divergence, labelled), divergence, temperature, theirs)


def _fields(taught: Taught, divergence: Divergence, temperature: float, theirs: float) -> Fields:
    top = taught.top
    return {
        "teacher_hidden": taught.hidden,
        "teacher_weight": taught.head.weight,
        "teacher_bias": taught.head.bias,
        "teacher_logit_scale": taught.head.logit_scale,
        "teacher_softcap": taught.head.softcap,
        "top_indices": None if top is None else top.indices,
        "top_log_probs": None if top is None else top.log_probs,
        "top_tail": None if top is None else top.tail_log_prob,
        "top_temperature": 1.0 if top is None else top.temperature,
        "top_mode": "" if top is None else top.tail,
        "source": taught.source,
        "divergence": divergence.name,
        "parameter": divergence.parameter,
        "temperature": temperature,
        "teacher_temperature": theirs,
    }


_OPTIONS = frozenset(("divergence", "temperature", "teacher_temperature"))
_UNTAUGHT = _fields(Taught(), Divergence("forward_kl", TABLE["forward_kl"].default), 1.0, 1.0)
